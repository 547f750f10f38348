"""Where everything of a drawing stands, in pixels: boxes in rows, arrows around them, labels in lanes of their own.

Note [lanes]
    Between two rows there is first room for arrows to bend, then one lane above the other for the labels of those that
    arrive, then room for their tips. Labels that would touch in one lane take the next; the rows move apart by as many
    lanes as that needs. So no label can touch another, or a box, however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rowgrad.graph.boxes import Arrow, Box, Picture
from rowgrad.graph.columns import centers, spread
from rowgrad.graph.layers import Rows, arranged_rows
from rowgrad.graph.lettering import cells, elided, width

SIZE, SMALL = 12.0, 11.0  # of the fonts
LINE = 16.0  # height of a line of text
N_CELLS, N_LABEL = 36, 28  # characters in a line of a box and in a label, at most
INSIDE_X, INSIDE_Y = 12.0, 7.0  # between a box and its text
LEAST = 96.0  # width of a box
BESIDE = 22.0  # between neighbours in a row
LANE = 17.0
BEND, TIP = 18.0, 11.0
STEEP = 0.08  # further room to bend, for each pixel an arrow goes aside
PORTS = 13.0  # between arrows that arrive at one box
MARGIN = 14.0


@dataclass(frozen=True)
class Rect:
    """Left, top, width and height."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height


@dataclass(frozen=True)
class Stem:
    """A vertical piece of an arrow; curves lead from one to the next."""

    x: float
    top: float
    bottom: float


@dataclass(frozen=True)
class Layout:
    """The places of a picture's boxes and arrows, and of the arrows' labels (None without a text).

    `around` holds all of them, with a margin.
    """

    boxes: tuple[Rect, ...]
    routes: tuple[tuple[Stem, ...], ...]
    labels: tuple[Rect | None, ...]
    around: Rect


def lines(box: Box) -> list[tuple[str, str]]:
    """(style, text) of each line: the title, what is in it beside or below, sizes."""
    both = f"{box.title}  {box.detail}"
    if box.detail and cells(both) <= N_CELLS:
        head = [("both", both)]
    else:
        head = [("name", box.title)] + [("detail", box.detail)] * bool(box.detail)
    return [(style, elided(text, N_CELLS)) for style, text in (*head, *(("fact", fact) for fact in box.facts))]


def label(arrow: Arrow) -> str:
    """As it is written."""
    return elided(arrow.text, N_LABEL)


@dataclass(frozen=True)
class _Band:
    """A row's vertical places: where arrows have bent above it, its lowest lane's bottom, its boxes' top, its end."""

    bent: float
    lanes: float
    top: float
    bottom: float


def layout(picture: Picture) -> Layout:
    """Give everything its place."""
    arrows = picture.arrows
    rows = arranged_rows(len(picture.boxes), [(a.source, a.target) for a in arrows])
    sizes = [_size(box) for box in picture.boxes]
    widths = [w for w, _ in sizes] + [0.0] * (len(rows.row_of) - len(sizes))
    x = centers(rows, widths, BESIDE)
    ports = _ports(arrows, rows, x, widths)
    lanes = _lanes(arrows, rows, ports)
    bands = _bands(arrows, rows, [height for _, height in sizes], x, lanes)
    boxes = tuple(Rect(x[k] - w / 2, bands[rows.row_of[k]].top, w, height) for k, (w, height) in enumerate(sizes))
    labels = tuple(
        _label(a, bands[rows.row_of[a.target]], lane, port) for a, lane, port in zip(arrows, lanes, ports, strict=True)
    )
    routes = tuple(_route(a, rows, bands, boxes, x, port) for a, port in zip(arrows, ports, strict=True))
    return Layout(boxes, routes, labels, _around(boxes, routes, labels))


def _size(box: Box) -> tuple[float, float]:
    written = lines(box)
    wide = max(width(text, SIZE) for _, text in written)
    return max(LEAST, wide + 2 * INSIDE_X), len(written) * LINE + 2 * INSIDE_Y


def _label_width(arrow: Arrow) -> float:
    return width(label(arrow), SMALL) + 6 if arrow.text else 0.0


def _ports(arrows: Sequence[Arrow], rows: Rows, x: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Where on top of its target each arrow arrives: straight from above as far as the others allow."""
    arriving: dict[int, list[tuple[float, int]]] = {}
    for k, arrow in enumerate(arrows):
        arriving.setdefault(arrow.target, []).append((x[rows.path(arrow.source, arrow.target)[-2]], k))
    found = [0.0] * len(arrows)
    for target, sources in arriving.items():
        sources.sort()
        room = widths[target] / 2 - INSIDE_X
        low, high = x[target] - room, x[target] + room
        needed = [_label_width(arrows[k]) for _, k in sources]
        apart = [max(PORTS, (a + b) / 2 + 6) for a, b in pairwise(needed)]
        shrink = min(1.0, (high - low) / sum(apart)) if apart else 1.0
        wishes = [[(min(max(place, low), high), 1.0)] for place, _ in sources]
        for (_, k), place in zip(sources, spread(wishes, [shrink * a for a in apart], low, high), strict=True):
            found[k] = place
    return found


def _lanes(arrows: Sequence[Arrow], rows: Rows, ports: Sequence[float]) -> list[int]:
    """The lane of each label, counted upwards in the row it is above; the first in which nothing is in the way."""
    found = [0] * len(arrows)
    taken: dict[int, list[float]] = {}  # by row, how far to the right each lane is full
    for k in sorted(range(len(arrows)), key=lambda k: ports[k] - _label_width(arrows[k]) / 2):
        if arrows[k].text:
            full, half = taken.setdefault(rows.row_of[arrows[k].target], []), _label_width(arrows[k]) / 2
            free = next((n for n, right in enumerate(full) if right + 4 <= ports[k] - half), len(full))
            full[free : free + 1] = [ports[k] + half]
            found[k] = free
    return found


def _bands(
    arrows: Sequence[Arrow], rows: Rows, heights: Sequence[float], x: Sequence[float], lanes: Sequence[int]
) -> list[_Band]:
    n_lanes, found = [0] * len(rows.rows), []
    for arrow, lane in zip(arrows, lanes, strict=True):
        row = rows.row_of[arrow.target]
        n_lanes[row] = max(n_lanes[row], lane + 1 if arrow.text else 0)
    above = MARGIN
    for r, row in enumerate(rows.rows):
        farthest = max((abs(x[p] - x[q]) for p in row for q in rows.above[p]), default=0.0)
        bent = above + (BEND + min(farthest * STEEP, 3 * BEND) if r else 0)
        below = bent + n_lanes[r] * LANE
        top = below + (TIP if r else 0)
        above = top + max(heights[p] for p in row if rows.is_box(p))
        found.append(_Band(bent, below, top, above))
    return found


def _label(arrow: Arrow, band: _Band, lane: int, port: float) -> Rect | None:
    if not arrow.text:
        return None
    needed = _label_width(arrow)
    return Rect(port - needed / 2, band.lanes - (lane + 1) * LANE, needed, LANE - 2)


def _route(
    arrow: Arrow, rows: Rows, bands: Sequence[_Band], boxes: Sequence[Rect], x: Sequence[float], port: float
) -> tuple[Stem, ...]:
    source, *trunk, target = rows.path(arrow.source, arrow.target)
    return (
        Stem(x[source], boxes[source].bottom, bands[rows.row_of[source]].bottom),
        *(Stem(x[p], bands[rows.row_of[p]].bent, bands[rows.row_of[p]].bottom) for p in trunk),
        Stem(port, bands[rows.row_of[target]].bent, boxes[target].y),
    )


def _around(boxes: Sequence[Rect], routes: Sequence[Sequence[Stem]], labels: Sequence[Rect | None]) -> Rect:
    ends = [end for rect in (*boxes, *labels) if rect is not None for end in (rect.x, rect.right)]
    ends += [stem.x for route in routes for stem in route]
    left, right = min(ends) - MARGIN, max(ends) + MARGIN
    return Rect(left, 0.0, right - left, max(rect.bottom for rect in boxes) + MARGIN)
