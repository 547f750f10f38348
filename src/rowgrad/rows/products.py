"""Rules for products of stacks of matrices, with owners of any pattern, and for the less common products."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from rowgrad.rows.factors import Dense, Form, Outer, wide
from rowgrad.rows.ownership import Axis, Entries, Grouping, Layout, owners_along
from rowgrad.rows.site import Cotangents, Recipe, Site, only, scalar


def vector(site: Site, saved: str = "self", scale: str | None = None) -> Recipe | None:
    """z = h v: the parameter is a vector, positions are the entries of z."""
    group = site.grouping(1)
    if group is None:
        return None
    shape, factor = site.target_shape, scalar(site.node.attribute(scale)) if scale else 1

    def build(cotangents: Cotangents, h: Tensor) -> Form:
        z = wide(group(only(cotangents))) * factor  # (B, T)
        return Outer(z[:, None, :, None], wide(group(h)).unsqueeze(1), shape, True, group.positions)

    return Recipe(build, "outer product", saved=(saved,))


def matrix_of_vector(site: Site, saved: str = "vec", scale: str | None = None) -> Recipe | None:
    """z = W h for a vector h that belongs to one example."""
    group = _of_one_example(site)
    if group is None:
        return None
    shape, factor = site.target_shape, scalar(site.node.attribute(scale)) if scale else 1

    def build(cotangents: Cotangents, h: Tensor) -> Form:
        left, right = (wide(group(t.unsqueeze(0))).unsqueeze(1) for t in (only(cotangents), h))
        return Outer(left * factor, right, shape, True, group.positions)

    return Recipe(build, "outer product", saved=(saved,))


def dot(site: Site, saved: str) -> Recipe | None:
    """z = <w, h> for a vector h that belongs to one example."""
    group = _of_one_example(site)
    if group is None:
        return None

    def build(cotangents: Cotangents, h: Tensor) -> Form:
        return Dense(group((wide(only(cotangents)) * wide(h)).unsqueeze(0)).squeeze(1))

    return Recipe(build, "product", saved=(saved,))


def outer(site: Site, saved: str, dim: int) -> Recipe | None:
    """z = h w^T or w h^T for vectors: dimension `dim` of z is that of the parameter w."""
    order = (1 - dim, dim)
    group = site.grouping(1, order=order)
    if group is None:
        return None
    factor = scalar(site.node.attribute("alpha"))

    def build(cotangents: Cotangents, h: Tensor) -> Form:
        z, left = (wide(group(t)) for t in (only(cotangents).permute(order), h))  # (B, T, p), (B, T)
        return Dense(torch.einsum("bt,btp->bp", left * factor, z))

    return Recipe(build, "product", saved=(saved,))


def summed_first(site: Site) -> Recipe | None:
    """z = sum_g W_g h_g: as for each g, with the same cotangent; positions are the columns of z."""
    group = site.grouping(1, order=(1, 0))
    if group is None:
        return None
    factor, shape = scalar(site.node.attribute("alpha")), site.target_shape

    def build(cotangents: Cotangents, h: Tensor) -> Form:
        z = wide(group(only(cotangents).mT)).unsqueeze(1)  # (B, 1, T, .)
        right = wide(group(h.permute(2, 0, 1))).transpose(1, 2)  # (B, G, T, .)
        return Outer((z * factor).expand(-1, shape[0], -1, -1), right, shape, True, group.positions)

    return Recipe(build, "outer product", saved=("batch2",))


def summed_second(site: Site) -> Recipe | None:
    """z = sum_g h_g W_g, which is one product with the h_g side by side; positions are the rows of z."""
    group = site.grouping(1)
    if group is None:
        return None
    factor, shape = scalar(site.node.attribute("alpha")), site.target_shape

    def build(cotangents: Cotangents, h: Tensor) -> Form:
        left, z = (wide(group(t)).unsqueeze(1) for t in (h.transpose(0, 1).flatten(1), only(cotangents)))
        return Outer(left, z * factor, shape, False, group.positions)

    return Recipe(build, "outer product", saved=("batch1",))


def _of_one_example(site: Site) -> Grouping | None:
    """For one position made of the whole cotangent, where all of it belongs to one example."""
    layout = site.layout()
    if site.node.dtype().is_complex or (isinstance(layout, Axis) and site.n_examples > 1):
        return None
    owner = (
        layout.owner.amax().reshape(1) if isinstance(layout, Entries) else torch.tensor([-1], device=site.node.device())
    )
    if isinstance(layout, Entries) and bool(((layout.owner != owner) & (layout.owner >= 0)).any()):
        return None
    return Grouping.of(Entries(owner), (1,), 1, site.n_examples)


def bilinear(site: Site) -> Recipe | None:
    """Bilinear layer: z_o = x^T W_o y."""
    node = site.node
    expands = [tuple(node.attribute(name)) for name in ("expand1", "expand2", "expand3", "sumdim")]
    group = site.grouping(1)
    if group is None or expands != [(1, 3), (0,), (1, 2), (2, 3)]:
        return None
    shape = site.target_shape

    def build(cotangents: Cotangents, x: Tensor, y: Tensor) -> Form:
        z, left, right = (wide(group(t)) for t in (only(cotangents), x, y))
        pairs = (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(2)
        return Outer(z.unsqueeze(1), pairs.unsqueeze(1), shape, True, group.positions)

    return Recipe(build, "outer product", saved=("i1", "i3"))


def grouped(site: Site, *, weight_first: bool) -> Recipe | None:
    """Rows sorted by group, each group with a matrix of its own (experts): owners vary from row to row."""
    node, shape = site.node, site.target_shape
    ends, data = node.saved("offs"), node.saved("mat2" if weight_first else "self")
    if ends is None:
        return batched(site, weight_first=weight_first, saved="mat2" if weight_first else "self")
    order = (1, 0) if weight_first else (0, 1)
    owner = _row_owners(site, order, 1)
    if owner is None or len(shape) != 3 or data.ndim != 2:
        return None
    rows = torch.arange(len(owner), device=owner.device)
    stack = torch.searchsorted(ends.to(rows.dtype), rows, right=True)
    owner = torch.where(stack < shape[0], owner, -1)  # rows behind the last group take no part
    return _routed(site, data.permute(order), owner, stack, order)


def batched(site: Site, *, weight_first: bool, saved: str, scale: str | None = None) -> Recipe | None:
    """z_g = h_g W_g or W_g h_g for a stack of matrices, its rows of any owners."""
    order = (2, 0, 1) if weight_first else (1, 0, 2)
    group = site.grouping(1, order=order)
    factor = scalar(site.node.attribute(scale)) if scale else 1
    if group is None:
        return _stacked(site, weight_first=weight_first, saved=saved, factor=factor)
    shape = site.target_shape

    def build(cotangents: Cotangents, data: Tensor) -> Form:
        z = only(cotangents).permute(order)  # (positions, G, p)
        h = data.permute(order)
        sides = [wide(group(t)).transpose(1, 2) for t in (h, z)]  # (B, G, T, .)
        if factor != 1:
            sides[1] = sides[1] * factor
        left, right = sides[::-1] if weight_first else sides
        return Outer(left, right, shape, cotangent_left=weight_first, positions=group.positions)

    return Recipe(build, "outer product", saved=(saved,))


def _stacked(site: Site, *, weight_first: bool, saved: str, factor: float) -> Recipe | None:
    """Owners that vary from row to row and from group to group: routed tokens, examples along the stack."""
    order = (0, 2, 1) if weight_first else (0, 1, 2)
    owner = _row_owners(site, order, 2)
    if owner is None:
        return None
    n_groups, n_rows = (site.node.shape()[d] for d in order[:2])
    stack = torch.arange(n_groups, device=owner.device).repeat_interleave(n_rows)
    data = site.node.saved(saved).permute(order).flatten(0, 1)
    return _routed(site, data, owner, stack, order, factor)


def _row_owners(site: Site, order: tuple[int, ...], n_positions: int) -> Tensor | None:
    """Owner of each row of the cotangent with its dimensions in `order`; None where a row has several."""
    node, layout = site.node, site.layout()
    if node.dtype().is_complex:
        return None
    if isinstance(layout, Axis):
        layout = Axis(order.index(layout.dim), layout.inner)
    elif isinstance(layout, Entries):
        layout = Entries(layout.owner.permute(order))
    shape = [node.shape()[d] for d in order]
    return row_owners(layout, shape, n_positions, site.n_examples, node.device())


def _routed(
    site: Site, data: Tensor, owner: Tensor, stack: Tensor, order: tuple[int, ...], factor: float = 1
) -> Recipe | None:
    """Rows (N, .) to (B, G, T, .), T the largest number of rows that one example has in one group."""
    n, shape, weight_first = site.n_examples, site.target_shape, order[-1] < order[-2]
    n_groups = shape[0]
    rows = (owner >= 0).nonzero().squeeze(1)
    cell = (owner * n_groups + stack)[rows]
    by_cell = torch.argsort(cell, stable=True)
    rows, cell = rows[by_cell], cell[by_cell]
    counts = torch.bincount(cell, minlength=n * n_groups)
    width = max(1, int(counts.max())) if len(cell) else 1
    start = counts.cumsum(0) - counts
    place = cell * width + torch.arange(len(cell), device=cell.device) - start[cell]

    def spread(t: Tensor) -> Tensor:
        whole = t.new_zeros(n * n_groups * width, t.shape[1])
        return whole.index_copy_(0, place, t[rows]).reshape(n, n_groups, width, t.shape[1])

    def build(cotangents: Cotangents) -> Form:
        z = only(cotangents).permute(order)
        h, zbar = spread(wide(data)), spread(wide(z.reshape(-1, z.shape[-1])) * factor)
        left, right = (zbar, h) if weight_first else (h, zbar)
        return Outer(left, right, shape, cotangent_left=weight_first)

    return Recipe(build, "routed outer product")


def row_owners(
    layout: Layout, shape: Sequence[int], n_positions: int, n_examples: int, device: torch.device
) -> Tensor | None:
    """Owner of each row (positions flattened), -1 where there is none; None where a row has several."""
    n_rows = prod(shape[:n_positions])
    if n_examples == 1:
        return torch.zeros(n_rows, dtype=torch.long, device=device)
    if isinstance(layout, Axis):
        if layout.dim >= n_positions:
            return None
        along = owners_along(layout, shape, n_examples, device)
        view = [-1 if d == layout.dim else 1 for d in range(n_positions)]
        return along.reshape(view).expand(tuple(shape[:n_positions])).reshape(-1)
    if isinstance(layout, Entries):
        owner = layout.owner.reshape(n_rows, prod(shape[n_positions:]))
        of_row = owner.amax(1) if owner.shape[1] else owner.new_full((n_rows,), -1)
        return of_row if bool(((owner == of_row.unsqueeze(1)) | (owner < 0)).all()) else None
    return torch.full((n_rows,), -1, device=device)
