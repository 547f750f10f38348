"""Rules for products of a matrix with the examples' positions."""

from __future__ import annotations

import torch

from rowgrad.rows.factors import Form, Outer, wide
from rowgrad.rows.ownership import Grouping
from rowgrad.rows.site import Cotangents, Recipe, Site, only, scalar


def _outer(site: Site, saved: str, scale: str | None, *, data_left: bool) -> Recipe | None:
    """For z = h W (positions in rows), or z = W h, whose positions are columns."""

    def worked_out() -> tuple[Grouping, torch.Size, float] | None:
        group = site.grouping(1, order=None if data_left else (1, 0))
        factor = scalar(site.node.attribute(scale)) if scale else 1.0
        return None if group is None else (group, site.target_shape, factor)

    found = site.once(("outer", scale, data_left), worked_out)
    if found is None:
        return None
    group, shape, factor = found
    data = site.node.saved(saved)

    def build(cotangents: Cotangents) -> Form:
        z = only(cotangents)
        h, z = (data, z) if data_left else (data.mT, z.mT)
        h, z = wide(group(h)).unsqueeze(1), wide(group(z)).unsqueeze(1)
        if factor != 1:
            z = z * factor
        left, right = (h, z) if data_left else (z, h)
        return Outer(left, right, shape, cotangent_left=not data_left, positions=group.positions)

    return Recipe(build, "outer product")


def matrix_second(site: Site, saved: str = "self", scale: str | None = None) -> Recipe | None:
    """z = h W: the weight is the second operand, positions are the rows of z."""
    return _outer(site, saved, scale, data_left=True)


def matrix_first(site: Site, saved: str = "mat2", scale: str | None = None) -> Recipe | None:
    """z = W h: the weight is the first operand, positions are the columns of z."""
    return _outer(site, saved, scale, data_left=False)
