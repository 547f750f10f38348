"""A drawing as text: one line for each box, in the order of the forward pass."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from rowgrad.graph.boxes import Arrow, Box, Picture
from rowgrad.graph.lettering import cells, elided, number

COLUMNS = 100
N_SHAPE, N_READS = 24, 26  # of the columns, at most; a long list of what is read goes on in further lines
NAMES = ("", "box", "shape", "weights", "gradient rms", "reads")


def listing(picture: Picture, facts: str) -> str:
    """The boxes below a line of facts; a box reads the one above it unless `<-` says which."""
    rows = [_row(k, box, _reads(picture, k)) for k, box in enumerate(picture.boxes)]
    kept = [c for c in range(len(NAMES)) if c < 3 or any(row[c] for row in rows)]
    widths = _widths([NAMES, *rows], kept)
    lines = [f"{facts}: {picture.name}", "Each box reads the one above it, unless <- says which.", ""]
    lines += _line([name if c in kept else "" for c, name in enumerate(NAMES)], widths)
    above = ""
    for box, row in zip(picture.boxes, rows, strict=True):
        parent = box.module.rpartition(".")[0]
        if parent != above and parent:
            lines.append(f"{'':5}{'  ' * parent.count('.')}{parent}")
        above = parent
        lines += _line(row, widths)
    return "\n".join(elided(line, COLUMNS).rstrip() for line in lines) + "\n"


def _row(k: int, box: Box, reads: str) -> tuple[str, ...]:
    return (
        f"{k + 1:4d}",
        _label(box),
        box.shape,
        box.weights,
        "" if box.gradient is None else number(box.gradient),
        reads,
    )


def _label(box: Box) -> str:
    parent = box.module.rpartition(".")[0]
    title = box.title.replace(f"{parent}.", "", 1) if parent else box.title
    indent = "  " * (parent.count(".") + 1) if parent else ""
    return indent + (f"{title}: {box.detail}" if box.detail else title)


def _widths(rows: Sequence[Sequence[str]], kept: Sequence[int]) -> dict[int, int]:
    """What each column takes; the label has what the others leave."""
    widths = {c: max(cells(row[c]) for row in rows) for c in kept}
    widths[0] = max(widths[0], 4)
    widths[2] = min(widths[2], N_SHAPE)
    if 5 in widths:
        widths[5] = min(widths[5], N_READS)
    rest = COLUMNS - sum(widths[c] + 2 for c in kept if c not in (0, 1)) - widths[0] - 1
    return widths | {1: min(widths[1], rest)}


def _line(row: Sequence[str], widths: Mapping[int, int]) -> Iterator[str]:
    start = _filled(row[0], widths[0]) + " " + "  ".join(_filled(row[c], widths[c]) for c in widths if 0 < c < 5)
    reads = textwrap.wrap(row[5], widths.get(5, 1)) or [""]
    yield f"{start}  {reads[0]}"
    yield from (f"{' ' * cells(start)}  {'   '}{part}" for part in reads[1:])


def _filled(text: str, n_cells: int) -> str:
    short = elided(text, n_cells)
    return short + " " * (n_cells - cells(short))


def _reads(picture: Picture, k: int) -> str:
    arrows = [arrow for arrow in picture.arrows if arrow.target == k]
    if [arrow.source for arrow in arrows] == [k - 1] and not arrows[0].text:
        return ""
    if not arrows:
        return "<- none" if k else ""
    return "<- " + ", ".join(_read(arrow) for arrow in arrows)


def _read(arrow: Arrow) -> str:
    return f"{arrow.source + 1} ({arrow.text})" if arrow.text else str(arrow.source + 1)
