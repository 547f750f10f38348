"""Rules for products of a matrix with the examples' positions."""

from __future__ import annotations

from torch import Tensor

from rowgrad.rows.factors import Form, Outer, wide
from rowgrad.rows.ownership import Grouping
from rowgrad.rows.site import Cotangents, Recipe, Site, only, scalar


def _outer(
    site: Site,
    group: Grouping,
    data: Tensor,
    *,
    data_left: bool,
    transposed: bool,
    scale: float = 1,
) -> Recipe:
    """For z = h W (positions in rows), or z = W h with `transposed`, whose positions are columns."""
    h = data.mT if transposed else data
    shape = site.target_shape

    def build(cotangents: Cotangents) -> Form:
        z = only(cotangents)
        z = z.mT if transposed else z
        sides = [wide(group(t)).unsqueeze(1) for t in (h, z)]
        if scale != 1:
            sides[1] = sides[1] * scale
        left, right = sides if data_left else sides[::-1]
        return Outer(left, right, shape, cotangent_left=not data_left, positions=group.positions)

    return Recipe(build, "outer product")


def matrix_second(site: Site, saved: str = "self", scale: str | None = None) -> Recipe | None:
    """z = h W: the weight is the second operand, positions are the rows of z."""
    group = site.grouping(1)
    if group is None:
        return None
    factor = scalar(site.node.attribute(scale)) if scale else 1
    return _outer(
        site,
        group,
        site.node.saved(saved),
        data_left=True,
        transposed=False,
        scale=factor,
    )


def matrix_first(site: Site, saved: str = "mat2", scale: str | None = None) -> Recipe | None:
    """z = W h: the weight is the first operand, positions are the columns of z."""
    group = site.grouping(1, order=(1, 0))
    if group is None:
        return None
    factor = scalar(site.node.attribute(scale)) if scale else 1
    return _outer(
        site,
        group,
        site.node.saved(saved),
        data_left=False,
        transposed=True,
        scale=factor,
    )
