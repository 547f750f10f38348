"""A drawing as text: one line for each box, in the order of the forward pass."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rowgrad.graph.boxes import Arrow, Box, Picture
from rowgrad.graph.lettering import cells, elided

COLUMNS = 100
N_SIZE, N_GRADIENT = 30, 22  # at most, in characters
N_READS = 24  # room for what a box reads, before it goes on in further lines


def listing(picture: Picture, facts: str) -> str:
    """The boxes below a line of facts; a box reads the one above it unless `<-` says which."""
    widths = _widths(picture)
    lines = [f"{facts}: {picture.name}", "Each reads the one above it, unless <- says which.", ""]
    above: tuple[str, ...] = ()
    for k, box in enumerate(picture.boxes):
        parents = tuple(box.module.split(".")[:-1])
        lines += [f"{'':5}{'  ' * (n - 1)}{'.'.join(parents[:n])}" for n in _opened(above, parents)]
        above = parents
        lines += _lines(k, box, _reads(picture, k), widths, len(parents))
    return "\n".join(_fitted(line) for line in lines) + "\n"


def _opened(above: tuple[str, ...], parents: tuple[str, ...]) -> Iterator[int]:
    """Lengths of the names of modules that begin here."""
    return (n for n in range(1, len(parents) + 1) if parents[:n] != above[:n])


def _widths(picture: Picture) -> tuple[int, int, int]:
    size = min(max(cells(box.size) for box in picture.boxes), N_SIZE)
    gradient = min(max(cells(box.gradient) for box in picture.boxes), N_GRADIENT)
    return COLUMNS - 5 - size - gradient - N_READS - 6, size, gradient


def _lines(k: int, box: Box, reads: str, widths: tuple[int, int, int], depth: int) -> Iterator[str]:
    label = "  " * depth + _label(box)
    columns = [f"{k + 1:4d} {_filled(label, widths[0])}", _filled(box.size, widths[1])]
    if widths[2]:
        columns.append(_filled(box.gradient, widths[2]))
    start = "  ".join(columns) + "  "
    for n, part in enumerate(textwrap.wrap(reads, COLUMNS - cells(start)) or [""]):
        yield f"{start if n == 0 else ' ' * cells(start)}{part}".rstrip()


def _label(box: Box) -> str:
    parent = box.module.rpartition(".")[0]
    title = box.title.replace(f"{parent}.", "", 1) if parent else box.title
    return f"{title}: {box.detail}" if box.detail else title


def _filled(text: str, n_cells: int) -> str:
    short = elided(text, n_cells)
    return short + " " * (n_cells - cells(short))


def _fitted(line: str) -> str:
    return elided(line, COLUMNS).rstrip()


def _reads(picture: Picture, k: int) -> str:
    arrows = [arrow for arrow in picture.arrows if arrow.target == k]
    if [arrow.source for arrow in arrows] == [k - 1] and not arrows[0].text:
        return ""
    if not arrows:
        return "<- nothing" if k else ""
    return "<- " + ", ".join(_read(arrow) for arrow in arrows)


def _read(arrow: Arrow) -> str:
    return f"{arrow.source + 1} ({arrow.text})" if arrow.text else str(arrow.source + 1)
