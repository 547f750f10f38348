"""Where a convolution's kernel meets the pixels it moves over."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """Along one dimension, the pixels that lie in one phase of the stride, of which places of the kernel meet any."""

    step: int  # the stride
    first: int
    n: int
    offsets: tuple[int, ...]  # by place of the kernel that meets them: position t meets pixel t + offset of these

    @property
    def of_all(self) -> slice:
        return slice(self.first, self.first + self.step * self.n, self.step)

    def met(self, offset: int, n_positions: int) -> tuple[int, int]:
        """The first position that meets a pixel, and how many do; the others meet padding."""
        first = max(0, -offset)
        return first, max(0, min(n_positions, self.n - offset) - first)


@dataclass(frozen=True)
class Sliding:
    """How the kernel moves over y."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def _reach(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Entries of padded y that are met, along each dimension."""
        moves = zip(positions, self.kernel, self.stride, self.dilation, strict=True)
        return tuple((n - 1) * s + d * (k - 1) + 1 for n, k, s, d in moves)

    def padded(self, y: Tensor, positions: Sequence[int]) -> Tensor:
        """y padded, and cut where the kernel does not reach."""
        n = len(self.kernel)
        ends = zip(self.padding, self._reach(positions), y.shape[-n:], strict=True)
        sizes = [(before, reach - size - before) for before, reach, size in ends]
        return F.pad(y, [p for pair in reversed(sizes) for p in pair])

    def fills(self, y: Tensor, positions: Sequence[int]) -> bool:
        """Whether a convolution of y has exactly these positions; a transposed one may leave a rest."""
        return self._natural(y) == tuple(positions)

    def _natural(self, y: Tensor) -> tuple[int, ...]:
        n = len(self.kernel)
        moves = zip(y.shape[-n:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in moves)

    @lru_cache(maxsize=256)  # noqa: B019 (it holds numbers alone)
    def phases(self, positions: tuple[int, ...], extent: tuple[int, ...]) -> tuple[tuple[Pixels, ...], ...]:
        """The parts of y, an image of this extent, whose pixels places of the kernel meet together; by dimension.

        With a stride, a place meets only the pixels of one phase.
        """
        moves = zip(positions, extent, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple(itertools.product(*itertools.starmap(_phases, moves)))


def _phases(n_positions: int, extent: int, kernel: int, stride: int, padding: int, dilation: int) -> Iterator[Pixels]:
    met: dict[int, list[int]] = {}
    for place in range(kernel):
        at = dilation * place - padding  # the pixel that position 0 meets
        met.setdefault(at % stride, []).append(at // stride)
    for first, offsets in met.items():
        n = min(len(range(first, extent, stride)), n_positions + max(offsets))
        if n > 0:
            yield Pixels(stride, first, n, tuple(offsets))
