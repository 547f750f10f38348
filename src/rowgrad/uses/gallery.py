"""Suspects as cards: what was given, what is suggested, why, and the example itself as picture, text or values."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rowgrad.errors import InputError
from rowgrad.graph.lettering import escape, number
from rowgrad.uses.indexed import Indexed
from rowgrad.uses.scores import AuditScores

MAX_SIDE = 96  # pixels of a picture
MOST_LETTERS = 400  # of a text
MOST_VALUES = 24  # of an example with named values
VALUE_LETTERS = 80  # of one of them


def cards(
    scores: AuditScores, positions: Sequence[int], examples: Any = None, classes: Sequence[str] | None = None
) -> str:
    """A list of cards, one for each position.

    Args:
        examples: gives by position a picture (a tensor, array or Pillow image of 2 or 3 dimensions), a text, or a
            mapping of named values; of a tuple, (inputs, label), the first is shown. A data frame gives its rows. None
            shows none.
    Raises:
        InputError: it has another length than the audit, gives nothing by position, or something else.
    """
    of = None if examples is None else _by_position(examples, len(scores.rank))
    return f'<ol class="suspects">{"".join(_card(scores, k, of, classes) for k in positions)}</ol>'


def _card(scores: AuditScores, k: int, of: Callable[[int], Any] | None, classes: Sequence[str] | None) -> str:
    flags = " ".join(f'<span class="badge">{escape(name)}</span>' for name, mask in scores.flags.items() if mask[k])
    shown = "" if of is None else _shown(of(k), k)
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


def _by_position(examples: Any, n: int) -> Callable[[int], Any]:
    """What gives the k-th of n examples; see `cards` for what can be asked."""
    if isinstance(examples, Indexed):
        examples = examples.dataset
    if hasattr(examples, "__len__") and len(examples) != n:
        raise InputError(
            f"examples holds {len(examples)}, the audit {n}; pass all that the audit's positions count, in their order"
        )
    if hasattr(examples, "iloc"):  # of pandas: by position, whatever the index
        return examples.iloc.__getitem__
    if hasattr(examples, "row") and hasattr(examples, "columns"):  # of polars
        return partial(examples.row, named=True)
    if not hasattr(examples, "__getitem__"):
        raise InputError(
            f"examples is a {type(examples).__name__}; expected what gives an example by its position: a data set, a "
            "list, an array, a tensor or a data frame"
        )
    return examples.__getitem__


def _shown(given: Any, k: int) -> str:
    example: Any = given[0] if isinstance(given, tuple) and given else given  # of (inputs, label), as data sets give
    if isinstance(example, str):
        return f'<p class="text">{escape(_cut(example, MOST_LETTERS))}</p>'
    named = example.to_dict() if hasattr(example, "to_dict") else example  # a row of pandas
    if isinstance(named, Mapping):
        named = list(named.items())[:MOST_VALUES]
        pairs = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(_value(value))}</dd>" for name, value in named)
        return f"<dl>{pairs}</dl>"
    return f'<img src="{picture(_pixels(example, k))}" alt="image of example {k}" width="88">'


def _cut(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"


def _value(value: Any) -> str:
    """A named value as a reader wants it: one of a tensor or of NumPy as a number, six digits, few letters."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    return _cut(readable(value), VALUE_LETTERS)


def readable(value: object) -> str:
    """A value of the data as text."""
    if value is None or (isinstance(value, str) and not value):
        return "(missing)"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _pixels(example: Any, k: int) -> Tensor:
    """A picture as a tensor: of one, an array, nested lists, or what NumPy can read, such as Pillow's images."""
    if getattr(example, "mode", None) in ("P", "CMYK"):  # Pillow's palettes and inks
        example = example.convert("RGB")
    if hasattr(example, "__array_interface__"):
        import numpy as np  # here where its arrays are, which PyTorch does without

        example = np.array(example)
    expected = "the page shows pictures of 2 or 3 dimensions, texts and mappings of named values"
    try:
        pixels = torch.as_tensor(example)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"example {k} is a {type(example).__name__}; {expected}") from error
    if pixels.ndim not in (2, 3) or not pixels.numel() or pixels.is_complex():
        raise InputError(f"example {k} has shape {tuple(pixels.shape)} and {pixels.dtype}; {expected}")
    return pixels


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
        values = values.nan_to_num()
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
