"""Rules for convolutions in any number of dimensions, plain or transposed.

Both kinds are one sum, see rows/patches.py: what moves is the output's cotangent over the input, or, transposed, the
input over the output's cotangent.
"""

from __future__ import annotations

from torch import Tensor

from rowgrad.rows.factors import Form, Outer, wide
from rowgrad.rows.patches import Convolved
from rowgrad.rows.site import Cotangents, Recipe, Site, only
from rowgrad.rows.sliding import Sliding


def convolution_weight(site: Site) -> Recipe | None:
    """Kernel of a convolution in 1 to 3 dimensions, plain or transposed, with stride, dilation and groups."""
    group = site.grouping(1)
    if group is None:
        return _over_positions(site)
    node = site.node
    transposed = node.attribute("transposed")
    sliding, shape = _sliding(site), site.target_shape

    def build(cotangents: Cotangents, data: Tensor) -> Form:
        z = only(cotangents)
        x, y = (group(wide(t)) for t in ((data, z) if transposed else (z, data)))
        form = Convolved(x, y, sliding, shape, not transposed, group.positions)
        return form.outer() if form.has_small_patches else form

    return Recipe(build, "convolution", saved=("input",))


def _sliding(site: Site) -> Sliding:
    kernel = tuple(site.target_shape[2:])
    moves = (tuple(site.node.attribute(name)) for name in ("stride", "padding", "dilation"))
    stride, padding, dilation = (m * len(kernel) if len(m) == 1 else m for m in moves)  # one number for all
    return Sliding(kernel, stride, padding, dilation, site.node.attribute("groups"))


def _over_positions(site: Site) -> Recipe | None:
    """Examples along the positions themselves, as for a kernel of one over the batch."""
    node = site.node
    order = (0, *range(2, len(node.shape())), 1)
    group = site.grouping(len(order) - 1, order=order)
    if group is None or node.attribute("transposed"):
        return None
    sliding, shape = _sliding(site), site.target_shape

    def build(cotangents: Cotangents, data: Tensor) -> Form:
        x, y = (wide(t).unsqueeze(1) for t in (only(cotangents), data))
        whole = Convolved(x, y, sliding, shape, cotangent_left=True).outer()  # each image an example
        sides = [t.transpose(1, 2).unflatten(1, x.shape[3:]) for t in (whole.left, whole.right)]
        left, right = (group(t).transpose(1, 2) for t in sides)  # (B, groups, T, .)
        return Outer(left, right, shape, cotangent_left=True, positions=group.positions)

    return Recipe(build, "convolution", saved=("input",))
