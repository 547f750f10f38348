"""Suspects as cards: what was given, what is suggested, why, and the example itself as picture, text or values."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rowgrad.errors import InputError
from rowgrad.graph.lettering import escape, number
from rowgrad.uses.scores import AuditScores

MAX_SIDE = 96  # pixels of a picture
MOST_LETTERS = 400  # of a text
MOST_VALUES = 24  # of an example with named values


def cards(
    scores: AuditScores, positions: Sequence[int], examples: Any = None, classes: Sequence[str] | None = None
) -> str:
    """A list of cards, one for each position.

    Args:
        examples: gives by position a picture (a tensor or array of 2 or 3 dimensions), a text, or a mapping of named
            values; None shows none.
    """
    return f'<ol class="suspects">{"".join(_card(scores, k, examples, classes) for k in positions)}</ol>'


def _card(scores: AuditScores, k: int, examples: Any, classes: Sequence[str] | None) -> str:
    flags = "".join(f'<span class="badge">{escape(name)}</span>' for name, mask in scores.flags.items() if mask[k])
    shown = "" if examples is None else _shown(examples[k], k)
    return (
        f'<li class="card"><div class="who"><b>{int(scores.rank[k])}</b> <span>example {k}</span> {flags}</div>'
        f"{_labels(scores, k, classes)}{shown}"
        f'<div class="numbers">mean loss {number(float(scores.mean_loss[k]))}</div>'
        f'<p class="numbers">{escape(scores.reason(k, classes))}</p></li>'
    )


def _labels(scores: AuditScores, k: int, classes: Sequence[str] | None) -> str:
    if scores.given is None or scores.suggested is None or scores.suggested_probability is None:
        return ""
    given, suggested = (
        str(int(labels[k])) if classes is None else str(classes[int(labels[k])])
        for labels in (scores.given, scores.suggested)
    )
    share = f"{float(scores.suggested_probability[k]):.0%}"
    if given == suggested:
        return f'<div class="labels">given <b>{escape(given)}</b>, confirmed ({share})</div>'
    return (
        f'<div class="labels">given <b>{escape(given)}</b>, suggested <span class="new">{escape(suggested)}</span> '
        f"({share})</div>"
    )


def _shown(example: Any, k: int) -> str:
    if isinstance(example, str):
        cut = example if len(example) <= MOST_LETTERS else example[: MOST_LETTERS - 1] + "…"
        return f'<p class="text">{escape(cut)}</p>'
    if isinstance(example, Mapping):
        pairs = "".join(
            f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
            for name, value in list(example.items())[:MOST_VALUES]
        )
        return f"<dl>{pairs}</dl>"
    pixels = torch.as_tensor(example)
    if pixels.ndim not in (2, 3):
        raise InputError(
            f"example {k} has shape {tuple(pixels.shape)}; the page shows pictures of 2 or 3 dimensions, texts and "
            "mappings"
        )
    return f'<img src="{picture(pixels)}" alt="image of example {k}" width="88">'


def picture(pixels: Tensor) -> str:
    """A PNG as a `data:` address, of (height, width), (channels, height, width) or (height, width, channels) pixels.

    Other values than uint8 are scaled from their smallest to 0 and their largest to 255. One, three or four channels
    are shown, of another number the first. Large pictures are reduced.

    >>> picture(torch.zeros(2, 2))[:22]
    'data:image/png;base64,'
    """
    channels = pixels.detach().cpu()
    if channels.ndim == 2:
        channels = channels[None]
    elif channels.shape[0] not in (1, 3, 4) and channels.shape[2] in (1, 3, 4):
        channels = channels.permute(2, 0, 1)
    if channels.shape[0] not in (1, 3, 4):
        channels = channels[:1]
    values = channels.float()
    if pixels.dtype != torch.uint8:
        low, high = values.amin(), values.amax()
        values = (values - low) / (high - low if high > low else 1) * 255
    longest = max(values.shape[1:])
    if longest > MAX_SIDE:
        size = [max(1, round(side * MAX_SIDE / longest)) for side in values.shape[1:]]
        values = F.interpolate(values[None], size=size, mode="area")[0]
    return f"data:image/png;base64,{base64.b64encode(_png(values.round().byte())).decode('ascii')}"


def _png(channels: Tensor) -> bytes:
    """The file, of (1, 3 or 4, height, width) bytes; each line begins with the filter 0."""
    n_channels, height, width = channels.shape
    lines = channels.permute(1, 2, 0).reshape(height, width * n_channels)
    raw = bytes(F.pad(lines, (1, 0)).flatten().tolist())
    kind = {1: 0, 3: 2, 4: 6}[n_channels]  # gray, colors, colors and opacity
    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", head), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    )
