"""Rules for the scale and shift of normalizations, and for parameters repeated over the examples.

The scale's gradient is the cotangent times the normalized input, the shift's the cotangent, each summed over what the
example owns. How the normalized input came about (also from a whole batch) does not matter here: that is another input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from rowgrad.rows.factors import Dense, reshaped, step_bytes, wide
from rowgrad.rows.ownership import Axis, Entries
from rowgrad.rows.site import Cotangents, Recipe, Site, reduce_broadcast
from rowgrad.tape import Node


def _first(cotangents: Cotangents) -> Tensor:
    z = cotangents[0]
    assert z is not None
    return z


def _scale(
    site: Site, parameter: Sequence[int], normalized: Callable[..., Tensor], saved: tuple[str, ...]
) -> Recipe | None:
    """`parameter`: the scale's shape with ones where it is broadcast, aligned with the input.

    normalized: from the saved values, a tensor of its own.
    """
    reduce = reduce_broadcast(site, site.node.shape(), torch.Size(parameter))
    if reduce is None:
        return None
    shape = (site.n_examples, *site.target_shape)

    def build(cotangents: Cotangents, *values: Tensor) -> Dense:
        return Dense(reshaped(reduce(normalized(*values).mul_(wide(_first(cotangents)))), shape))

    return Recipe(build, "scale", saved)


def _shift(site: Site, parameter: Sequence[int]) -> Recipe | None:
    reduce = reduce_broadcast(site, site.node.shape(), torch.Size(parameter))
    if reduce is None:
        return None
    shape = (site.n_examples, *site.target_shape)
    return Recipe(lambda cotangents: Dense(reshaped(reduce(wide(_first(cotangents))), shape)), "shift", saved=())


def _standardized(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (wide(x) - wide(mean)).mul_(wide(rstd))


def layer_scale(site: Site) -> Recipe | None:
    """Scale of a layer normalization."""
    return _scale(site, site.target_shape, _standardized, ("input", "result1", "result2"))


def layer_shift(site: Site) -> Recipe | None:
    """Shift of a layer normalization."""
    return _shift(site, site.target_shape)


def rms_scale(site: Site) -> Recipe | None:
    """Scale of a fused root-mean-square normalization."""
    return _scale(site, site.target_shape, lambda x, rstd: wide(x) * wide(rstd), ("input", "result1"))


def _channels(node: Node) -> tuple[int, ...]:
    """Shape of a per-channel parameter aligned with (N, C, ...)."""
    shape = node.shape()
    return (shape[1], *[1] * (len(shape) - 2))


def group_scale(site: Site) -> Recipe | None:
    """Scale of a group normalization."""
    groups, layout = site.node.attribute("group"), site.layout()
    if isinstance(layout, Axis) and layout.dim <= 1:
        return _scale_of_lines(site, layout, groups)

    def normalized(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        of_group = (t.reshape(len(x), groups, 1) for t in (mean, rstd))
        return _standardized(x.reshape(len(x), groups, -1), *of_group).reshape(x.shape)

    return _scale(site, _channels(site.node), normalized, ("input", "result1", "result2"))


def _scale_of_lines(site: Site, layout: Axis, groups: int) -> Recipe | None:
    """The scale of a group normalization where no channel of an image is shared between examples.

    sum z (x - mean) rstd = (sum z x - mean sum z) rstd over each channel, as PyTorch's own backward has it.
    """
    shape = site.node.shape()
    lines, split = shape[:2], torch.Size((*shape[:2], prod(shape[2:])))
    reduce = reduce_broadcast(site, lines, torch.Size((1, lines[1])), layout)
    if reduce is None:
        return None

    def build(cotangents: Cotangents, x: Tensor, mean: Tensor, rstd: Tensor) -> Dense:
        z, x = _first(cotangents).reshape(split), x.reshape(split)
        mean, rstd = (wide(t.reshape(lines[0], groups, 1)) for t in (mean, rstd))
        products, sums = (t.unflatten(1, (groups, -1)) for t in (line_products(z, x), wide(z).sum(2)))
        found = products.addcmul_(sums, mean, value=-1).mul_(rstd)
        return Dense(reduce(found.reshape(lines)).reshape(-1, lines[1]))

    return Recipe(build, "scale", saved=("input", "result1", "result2"))


def line_products(z: Tensor, x: Tensor) -> Tensor:
    """sum over the last dimension of z x, (N, C, n) to (N, C), in pieces that stay near the processor."""
    found = wide(z).new_empty(z.shape[:2])
    step = max(1, step_bytes(z) // max(1, z[0].numel() * found.element_size() * 8)) if len(z) else 1
    for i in range(0, len(z), step):
        torch.sum(wide(z[i : i + step]) * wide(x[i : i + step]), 2, out=found[i : i + step])
    return found


def batch_scale(site: Site) -> Recipe | None:
    """Scale of a batch normalization (its input goes the general path in training)."""
    node = site.node
    shape = _channels(node)
    if node.attribute("training"):
        statistics = ("result1", "result2")
        rstd_of = wide
    else:
        statistics = ("running_mean", "running_var")
        eps = node.attribute("epsilon" if node.has_saved("epsilon") else "eps")
        rstd_of = lambda variance: (wide(variance) + eps).rsqrt()  # noqa: E731

    def normalized(x: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
        return _standardized(x, mean.reshape(shape), rstd_of(spread).reshape(shape))

    return _scale(site, shape, normalized, ("input", *statistics))


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
    shape = (site.n_examples, *site.target_shape)

    def build(cotangents: Cotangents) -> Dense:
        return Dense(reshaped(reduce(wide(_first(cotangents)).reshape(split)), shape))

    return Recipe(build, "sum", saved=())
