"""Rules for the scale and shift of normalizations, and for parameters repeated over the examples.

The scale's gradient is the cotangent times the normalized input, the shift's the cotangent, each summed over what the
example owns. How the normalized input came about (also from a whole batch) does not matter here: that is another input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rowgrad.rows.factors import Dense, wide
from rowgrad.rows.ownership import Axis, Entries
from rowgrad.rows.site import Cotangents, Recipe, Site, reduce_broadcast
from rowgrad.tape import Node


def _first(cotangents: Cotangents) -> Tensor:
    z = cotangents[0]
    assert z is not None
    return z


def _scale(site: Site, parameter: Sequence[int], normalized: Callable[[], Tensor]) -> Recipe | None:
    """`parameter`: the scale's shape with ones where it is broadcast, aligned with the input."""
    reduce = reduce_broadcast(site, site.node.shape(), torch.Size(parameter))
    if reduce is None:
        return None
    shape = (-1, *site.target_shape)
    return Recipe(lambda cotangents: Dense(reduce(wide(_first(cotangents)) * normalized()).reshape(shape)), "scale")


def _shift(site: Site, parameter: Sequence[int]) -> Recipe | None:
    reduce = reduce_broadcast(site, site.node.shape(), torch.Size(parameter))
    if reduce is None:
        return None
    shape = (-1, *site.target_shape)
    return Recipe(lambda cotangents: Dense(reduce(wide(_first(cotangents))).reshape(shape)), "shift")


def _standardized(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (wide(x) - wide(mean)) * wide(rstd)


def layer_scale(site: Site) -> Recipe | None:
    """Scale of a layer normalization."""
    x, mean, rstd = (site.node.saved(name) for name in ("input", "result1", "result2"))
    return _scale(site, site.target_shape, lambda: _standardized(x, mean, rstd))


def layer_shift(site: Site) -> Recipe | None:
    """Shift of a layer normalization."""
    return _shift(site, site.target_shape)


def rms_scale(site: Site) -> Recipe | None:
    """Scale of a fused root-mean-square normalization."""
    x, rstd = (site.node.saved(name) for name in ("input", "result1"))
    return _scale(site, site.target_shape, lambda: wide(x) * wide(rstd))


def _channels(node: Node) -> tuple[int, ...]:
    """Shape of a per-channel parameter aligned with (N, C, ...)."""
    shape = node.shape()
    return (shape[1], *[1] * (len(shape) - 2))


def group_scale(site: Site) -> Recipe | None:
    """Scale of a group normalization."""
    x, mean, rstd = (site.node.saved(name) for name in ("input", "result1", "result2"))
    n, groups = x.shape[0], site.node.attribute("group")

    def normalized() -> Tensor:
        of_group = (t.reshape(n, groups, 1) for t in (mean, rstd))
        return _standardized(x.reshape(n, groups, -1), *of_group).reshape(x.shape)

    return _scale(site, _channels(site.node), normalized)


def batch_scale(site: Site) -> Recipe | None:
    """Scale of a batch normalization (its input goes the general path in training)."""
    node = site.node
    x, shape = node.saved("input"), _channels(node)
    if node.attribute("training"):
        mean, rstd = node.saved("result1"), node.saved("result2")
    else:
        eps = node.attribute("epsilon" if node.has_saved("epsilon") else "eps")
        mean, rstd = node.saved("running_mean"), (wide(node.saved("running_var")) + eps).rsqrt()
    return _scale(site, shape, lambda: _standardized(x, mean.reshape(shape), rstd.reshape(shape)))


def channel_shift(site: Site) -> Recipe | None:
    """Shift of each channel: bias of a convolution, of a group or batch normalization."""
    return _shift(site, _channels(site.node))


def repeated(site: Site) -> Recipe | None:
    """Repeated copies of a parameter (instance normalization, prompts): the copies an example owns are added up."""
    layout, repeats = site.layout(), tuple(site.node.attribute("repeats"))
    sizes = (1,) * (len(repeats) - len(site.target_shape)) + tuple(site.target_shape)
    split = torch.Size(n for pair in zip(repeats, sizes, strict=True) for n in pair)
    if isinstance(layout, Entries):
        layout = Entries(layout.owner.reshape(split))
    elif isinstance(layout, Axis):
        if layout.inner % sizes[layout.dim] and site.n_examples > 1:
            return None
        layout = Axis(2 * layout.dim, max(1, layout.inner // sizes[layout.dim]))
    once = torch.Size(n for size in sizes for n in (1, size))
    reduce = reduce_broadcast(site, split, once, layout)
    if reduce is None:
        return None
    shape = (-1, *site.target_shape)
    return Recipe(lambda cotangents: Dense(reduce(wide(_first(cotangents)).reshape(split)).reshape(shape)), "sum")
