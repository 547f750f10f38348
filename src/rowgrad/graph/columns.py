"""Horizontal places of a layered drawing: near to their neighbours above and below, apart in their row.

Note [straight where it matters]
    A row's places minimize the weighted sum of distances to where each would like to stand. As with a median, and
    unlike a mean, the heaviest stays exactly where it wants to be and others make room: chains of boxes are straight
    lines, and trunks run straight beside them. What joins a chain from the side stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from rowgrad.graph.layers import Rows

ROUNDS = 6
# Weights of a line from box to box, from one that begins a chain, along a trunk, and from a box to a trunk.
CHAIN, START, TRUNK, BRANCH = 16.0, 8.0, 4.0, 1.0

Wish = tuple[float, float]  # place, weight


def centers(rows: Rows, widths: Sequence[float], gap: float) -> list[float]:
    """The middle of each place; neighbours in a row keep their distance, the leftmost edge is at 0."""
    x = [0.0] * len(rows.row_of)
    passes = [*[rows.above, rows.below] * ROUNDS, rows.above]
    for neighbours in passes:
        order = rows.rows if neighbours is rows.above else rows.rows[::-1]
        for row in order:
            wishes = [[(x[n], _weight(rows, p, n)) for n in neighbours[p]] or [(x[p], BRANCH)] for p in row]
            apart = [(widths[a] + widths[b]) / 2 + gap for a, b in pairwise(row)]
            for place, found in zip(row, spread(wishes, apart), strict=True):
                x[place] = found
    left = min(x[p] - widths[p] / 2 for p in range(len(x)))
    return [place - left for place in x]


def _weight(rows: Rows, a: int, b: int) -> float:
    if rows.is_box(a) and rows.is_box(b):
        upper = a if rows.row_of[a] < rows.row_of[b] else b
        return CHAIN if rows.above[upper] else START
    return BRANCH if rows.is_box(a) or rows.is_box(b) else TRUNK


def spread(
    wishes: Sequence[Sequence[Wish]], apart: Sequence[float], low: float = float("-inf"), high: float = float("inf")
) -> list[float]:
    """Ascending places, `apart` from each other at least, nearest to what each wishes; within [low, high] if they fit.

    Isotonic regression by absolute distance: neighbours that would come too close are pooled and share a median.
    """
    offsets = [0.0, *accumulate(apart)]
    pools: list[tuple[list[Wish], float, int]] = []  # wishes less offsets, their median, how many places
    for own, offset in zip(wishes, offsets, strict=True):
        pool, n = [(place - offset, weight) for place, weight in own], 1
        middle = _median(pool)
        while pools and pools[-1][1] > middle:
            before, _, m = pools.pop()
            pool, n = before + pool, n + m
            middle = _median(pool)
        pools.append((pool, middle, n))
    flat = [max(low, min(middle, high - offsets[-1])) for _, middle, n in pools for _ in range(n)]
    return [place + offset for place, offset in zip(flat, offsets, strict=True)]


def _median(wishes: Sequence[Wish]) -> float:
    """Half of the weight lies below it."""
    ascending = sorted(wishes)
    half, total = sum(weight for _, weight in ascending) / 2, 0.0
    for k, (place, weight) in enumerate(ascending):
        total += weight
        if total == half and k + 1 < len(ascending):
            return (place + ascending[k + 1][0]) / 2
        if total > half:
            return place
    return ascending[-1][0]
