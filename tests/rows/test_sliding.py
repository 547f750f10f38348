"""Where a kernel meets pixels, against a walk over all positions and places."""

from __future__ import annotations

import itertools

import pytest

from rowgrad.rows.sliding import Sliding

SIZES = [
    (n, extent, kernel, stride, padding, dilation)
    for n, extent, kernel, stride, padding, dilation in itertools.product(
        (1, 4), (1, 2, 7), (1, 3), (1, 2, 3), (0, 1, 3), (1, 2)
    )
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_position_meets_the_pixels_under_the_kernel(sizes: tuple[int, ...]) -> None:
    n, extent, kernel, stride, padding, dilation = sizes
    walked = [
        (position, pixel)
        for position, place in itertools.product(range(n), range(kernel))
        if 0 <= (pixel := stride * position + dilation * place - padding) < extent
    ]
    met = []
    for (along,) in Sliding((kernel,), (stride,), (padding,), (dilation,), 1).phases((n,), (extent,)):
        pixels = list(range(extent))[along.of_all]
        assert len(pixels) == along.n
        for offset in along.offsets:
            first, many = along.met(offset, n)
            met += [(position, pixels[position + offset]) for position in range(first, first + many)]
    assert sorted(met) == sorted(walked)


def test_phases_of_several_dimensions_are_all_pairs() -> None:
    sliding = Sliding((3, 1), (2, 1), (1, 0), (1, 1), 1)
    phases = sliding.phases((4, 5), (8, 5))
    assert [(rows.first, columns.first) for rows, columns in phases] == [(1, 0), (0, 0)]
    assert [(rows.offsets, columns.offsets) for rows, columns in phases] == [((-1, 0), (0,)), ((0,), (0,))]
