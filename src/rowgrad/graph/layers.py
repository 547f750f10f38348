"""Rows of a layered drawing: which row a box stands in, and in which order (Sugiyama, Tagawa and Toda 1981).

Note [trunks]
    An arrow that spans several rows passes each row in between at a place of its own, so that it runs around the boxes.
    All long arrows from one box share these places: a trunk down to the last row that needs it, from which each arrow
    branches off in the row before its target. A weight read in a thousand steps is one line.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SWEEPS = 24
WORK = 400_000  # places times sweeps, to bound the time for large graphs


@dataclass(frozen=True)
class Rows:
    """Places in rows: boxes carry their own numbers, the places of trunks those behind.

    Attributes:
        rows: numbers of the places in each row, from left to right.
        row_of: of each place.
        source: of each place, the box itself or the one whose trunk it is on.
        below: of each place, those in the next row that it leads to; boxes or its trunk.
        above: the reverse.
        n_boxes: how many of the places are boxes.
    """

    rows: list[list[int]]
    row_of: list[int]
    source: list[int]
    below: list[list[int]]
    above: list[list[int]]
    n_boxes: int

    def is_box(self, place: int) -> bool:
        """Whether a box stands there."""
        return place < self.n_boxes

    def path(self, source: int, target: int) -> list[int]:
        """Places from one box to another that it leads to."""
        path = [target]
        while path[-1] != source:
            path.append(next(p for p in self.above[path[-1]] if self.source[p] == source))
        return path[::-1]


def arranged_rows(n_boxes: int, arrows: Sequence[tuple[int, int]]) -> Rows:
    """Boxes in rows with few crossings; each arrow leads from a lower number to a higher one."""
    row_of = _row_of(n_boxes, arrows)
    found = _with_trunks(row_of, arrows)
    _reduce_crossings(found)
    return found


def _row_of(n_boxes: int, arrows: Sequence[tuple[int, int]]) -> list[int]:
    """As many rows from the start as the longest path; what reads nothing stands just above its first reader."""
    inputs: list[list[int]] = [[] for _ in range(n_boxes)]
    readers: list[list[int]] = [[] for _ in range(n_boxes)]
    for source, target in arrows:
        inputs[target].append(source)
        readers[source].append(target)
    row = [0] * n_boxes
    for box in range(n_boxes):
        row[box] = max((row[i] + 1 for i in inputs[box]), default=0)
    for box in range(n_boxes):
        if not inputs[box] and readers[box]:
            row[box] = min(row[r] for r in readers[box]) - 1
    return row


def _with_trunks(row_of: list[int], arrows: Sequence[tuple[int, int]]) -> Rows:
    n = len(row_of)
    rows = Rows([[] for _ in range(max(row_of) + 1)], row_of, list(range(n)), [[] for _ in row_of], [], n)
    rows.above.extend([] for _ in row_of)
    for box in range(n):
        rows.rows[row_of[box]].append(box)
    trunks: dict[int, list[int]] = {}
    for source, target in arrows:
        trunk = trunks.setdefault(source, [source])
        while row_of[trunk[-1]] < row_of[target] - 1:
            trunk.append(_append(rows, source, row_of[trunk[-1]] + 1))
            _link(rows, trunk[-2], trunk[-1])
        _link(rows, trunk[row_of[target] - row_of[source] - 1], target)
    return rows


def _append(rows: Rows, source: int, row: int) -> int:
    place = len(rows.row_of)
    rows.row_of.append(row)
    rows.source.append(source)
    rows.below.append([])
    rows.above.append([])
    rows.rows[row].append(place)
    return place


def _link(rows: Rows, upper: int, lower: int) -> None:
    rows.below[upper].append(lower)
    rows.above[lower].append(upper)


def _reduce_crossings(rows: Rows) -> None:
    """Sort each row by the mean position of its neighbours, downwards and upwards in turn; keep the best order."""
    best, fewest = [list(row) for row in rows.rows], n_crossings(rows)
    for sweep in range(max(2, min(SWEEPS, WORK // len(rows.row_of)))):
        if not fewest:
            break
        down = sweep % 2 == 0
        order = range(1, len(rows.rows)) if down else range(len(rows.rows) - 2, -1, -1)
        for r in order:
            _sort(rows.rows[r], rows.rows[r - 1 if down else r + 1], rows.above if down else rows.below)
        crossings = n_crossings(rows)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows.rows], crossings
    rows.rows[:] = best


def _sort(row: list[int], fixed: Sequence[int], neighbours: Sequence[Sequence[int]]) -> None:
    position = {place: k for k, place in enumerate(fixed)}
    own = {place: k / max(len(row), 1) * len(fixed) for k, place in enumerate(row)}
    row.sort(key=lambda p: _mean([position[n] for n in neighbours[p]], own[p]))


def _mean(positions: Sequence[int], default: float) -> float:
    return sum(positions) / len(positions) if positions else default


def n_crossings(rows: Rows) -> int:
    """Pairs of lines between neighbouring rows that cross."""
    return sum(_crossings(upper, lower, rows.below) for upper, lower in zip(rows.rows, rows.rows[1:], strict=False))


def _crossings(upper: Sequence[int], lower: Sequence[int], below: Sequence[Sequence[int]]) -> int:
    position: Mapping[int, int] = {place: k for k, place in enumerate(lower)}
    seen: list[int] = []
    n = 0
    for place in upper:
        ends = sorted(position[p] for p in below[place])
        n += sum(len(seen) - bisect_left(seen, end + 1) for end in ends)
        for end in ends:
            insort(seen, end)
    return n
