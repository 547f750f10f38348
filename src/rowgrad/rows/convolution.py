"""Rules for convolutions in any number of dimensions, plain or transposed.

Both kinds are one sum. With x the side whose positions are counted (the output's cotangent of a convolution, the input
of a transposed one), y the other, padded:

    weight[a, b, k] = sum_t x[a, t] y[b, stride t + dilation k]        for each group

Note [patches or shifts]
    As an outer product the right side holds, for each position, the patch of y under the kernel: k^n times the size of
    y. It pays where there are few positions and the Gram route is taken. Otherwise the product is formed directly, one
    shift of the kernel at a time, from slices of y.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from rowgrad.rows.factors import KEEP_BYTES, Dense, Form, Outer, wide
from rowgrad.rows.ownership import Grouping
from rowgrad.rows.site import Cotangents, Recipe, Site, only


def convolution_weight(site: Site) -> Recipe | None:
    """Kernel of a convolution in 1 to 3 dimensions, plain or transposed, with stride, dilation and groups."""
    group = site.grouping(1)
    if group is None:
        return _over_positions(site)
    node = site.node
    data, transposed = node.saved("input"), node.attribute("transposed")
    geometry = _Geometry.of(site)

    def build(cotangents: Cotangents) -> Form:
        z = only(cotangents)
        x, y = (data, z) if transposed else (z, data)
        return geometry.form(wide(x), wide(y), group, cotangent_left=not transposed)

    return Recipe(build, "convolution")


def _over_positions(site: Site) -> Recipe | None:
    """Examples along the positions themselves, as for a kernel of one over the batch."""
    node = site.node
    order = (0, *range(2, len(node.shape())), 1)
    group = site.grouping(len(order) - 1, order=order)
    if group is None or node.attribute("transposed"):
        return None
    geometry, data = _Geometry.of(site), node.saved("input")

    def build(cotangents: Cotangents) -> Form:
        x, y = wide(only(cotangents)).unsqueeze(1), geometry.padded(wide(data)).unsqueeze(1)
        left, right = geometry.positions(x), geometry.patches(x, y)  # (N, groups, positions, .)
        sides = [t.transpose(1, 2).unflatten(1, x.shape[3:]) for t in (left, right)]
        left, right = (group(t).transpose(1, 2) for t in sides)
        return Outer(left, right, geometry.shape, cotangent_left=True, positions=group.positions)

    return Recipe(build, "convolution")


class _Geometry:
    """Shape of the weight (groups * a, b, *kernel) and how the kernel moves."""

    def __init__(
        self,
        shape: torch.Size,
        groups: int,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> None:
        self.shape = shape
        self.groups = groups
        self.kernel = tuple(shape[2:])
        self.stride, self.padding, self.dilation = stride, padding, dilation

    @classmethod
    def of(cls, site: Site) -> _Geometry:
        moves = (tuple(site.node.attribute(name)) for name in ("stride", "padding", "dilation"))
        return cls(site.target_shape, site.node.attribute("groups"), *moves)

    def padded(self, y: Tensor) -> Tensor:
        return F.pad(y, [p for size in reversed(self.padding) for p in (size, size)])

    def form(self, x: Tensor, y: Tensor, group: Grouping, *, cotangent_left: bool) -> Form:
        """x (N, channels, *positions), y (N, channels, *extent)."""
        x = group(x)  # (B, images, channels, *positions)
        y = group(self.padded(y))
        n_positions = x.shape[1] * prod(x.shape[3:])
        a, b = self.shape[0] // self.groups, prod(self.shape[1:])
        by_gram = n_positions * (a + b) < a * b
        formed_bytes = x.shape[0] * self.shape.numel() * x.element_size()
        if not by_gram and formed_bytes <= KEEP_BYTES:
            return Dense(self._by_shifts(x, y))
        real = group.positions
        if real is not None:
            real = real.repeat_interleave(n_positions // x.shape[1], 1)
        return Outer(self.positions(x), self.patches(x, y), self.shape, cotangent_left, real)

    def _split(self, t: Tensor) -> Tensor:
        """(B, images, channels, ...) to (B, images, groups, channels of the group, ...)."""
        return t.unflatten(2, (self.groups, -1))

    def positions(self, x: Tensor) -> Tensor:
        """(B, groups, images * positions, a)."""
        return self._split(x).flatten(4).permute(0, 2, 1, 4, 3).flatten(2, 3)

    def patches(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, groups, images * positions, b * kernel): a view of y with the kernel's dimensions added, then copied."""
        n_dims = len(self.kernel)
        y = self._split(y).contiguous()
        strides, moves = y.stride()[:4], y.stride()[4:]
        steps = [m * s for m, s in zip(moves, self.stride, strict=True)]
        reach = [m * d for m, d in zip(moves, self.dilation, strict=True)]
        view = y.as_strided((*y.shape[:4], *x.shape[3:], *self.kernel), (*strides, *steps, *reach))
        spatial, kernel = range(4, 4 + n_dims), range(4 + n_dims, 4 + 2 * n_dims)
        return view.permute(0, 2, 1, *spatial, 3, *kernel).flatten(4 + n_dims - 1).flatten(2, 2 + n_dims)

    def _by_shifts(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, *shape), one product over the positions for each place of the kernel."""
        n_examples = x.shape[0]
        left = self._split(x).flatten(4).permute(0, 2, 3, 1, 4).flatten(3)  # (B, groups, a, images * positions)
        y = self._split(y).permute(0, 2, 1, *range(4, y.ndim + 1), 3)  # (B, groups, images, *extent, b)
        found = x.new_empty(n_examples, *self.kernel, self.groups, left.shape[2], y.shape[-1])
        for place in product(*map(range, self.kernel)):
            window = y[(slice(None),) * 3 + self._window(place, x.shape[3:])]
            right = window.reshape(n_examples, self.groups, -1, y.shape[-1])
            found[(slice(None), *place)] = left @ right
        order = (0, -3, -2, -1, *range(1, 1 + len(self.kernel)))
        return found.permute(*(d % found.ndim for d in order)).reshape(n_examples, *self.shape)

    def _window(self, place: Sequence[int], positions: Sequence[int]) -> tuple[slice, ...]:
        """The entries of y that one place of the kernel meets."""
        starts = [k * d for k, d in zip(place, self.dilation, strict=True)]
        return tuple(
            slice(start, start + (n - 1) * step + 1, step)
            for start, n, step in zip(starts, positions, self.stride, strict=True)
        )
