"""Rules for products of a matrix with the examples' positions."""

from __future__ import annotations

from torch import Tensor

from rowgrad.rows.factors import Form, Outer, wide
from rowgrad.rows.site import Cotangents, Recipe, Site, only, scalar


def _outer(site: Site, saved: str, scale: str | None, *, data_left: bool) -> Recipe | None:
    """For z = h W (positions in rows), or z = W h, whose positions are columns."""
    group = site.grouping(1, order=None if data_left else (1, 0))
    if group is None:
        return None
    shape, factor = site.target_shape, scalar(site.node.attribute(scale)) if scale else 1.0

    def build(cotangents: Cotangents, data: Tensor) -> Form:
        z = only(cotangents)
        h, z = (data, z) if data_left else (data.mT, z.mT)
        h, z = wide(group.positions_of(h)), wide(group.positions_of(z))
        if factor != 1:
            z = z * factor
        left, right = (h, z) if data_left else (z, h)
        return Outer(left, right, shape, cotangent_left=not data_left, positions=group.positions)

    return Recipe(build, "outer product", saved=(saved,))


def matrix_second(site: Site, saved: str = "self", scale: str | None = None) -> Recipe | None:
    """z = h W: the weight is the second operand, positions are the rows of z."""
    return _outer(site, saved, scale, data_left=True)


def matrix_first(site: Site, saved: str = "mat2", scale: str | None = None) -> Recipe | None:
    """z = W h: the weight is the first operand, positions are the columns of z."""
    return _outer(site, saved, scale, data_left=False)
