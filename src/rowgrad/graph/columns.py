"""Horizontal places of a layered drawing: straight lines wherever rows allow (after Brandes and Köpf 2002).

Note [blocks]
    Places of neighbouring rows that shall stand exactly below each other are tied to a block: trunks first, then boxes
    with boxes, then the rest, but never two ties that cross. Blocks are thus curves that go down and do not meet, one
    left of the other or unrelated, and the least places that keep them apart are found in one pass from left to right.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from rowgrad.graph.layers import Rows

ROUNDS = 8


def centers(rows: Rows, widths: Sequence[float], gap: float) -> list[float]:
    """The middle of each place, so that neighbours in a row keep their distance; the leftmost edge is at 0."""
    block_of = _blocks(rows)
    apart = _distances(rows, block_of, widths, gap)
    order = _from_left_to_right(apart)
    x = [0.0] * len(apart)
    half = [0.0] * len(apart)
    for place, block in enumerate(block_of):
        half[block] = max(half[block], widths[place] / 2)
    for block in order:
        x[block] = max([half[block], *(x[b] + d for b, d in _left(apart)[block])])
    _relax(rows, block_of, apart, order, x)
    shift = min(x[b] - half[b] for b in range(len(x)))
    return [x[b] - shift for b in block_of]
