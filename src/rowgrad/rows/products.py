"""Rules for the less common products: with a vector, of three, and of stacks whose rows are routed."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from rowgrad.rows.factors import Form, Outer, wide
from rowgrad.rows.ownership import Axis, Entries, Layout, owners_along
from rowgrad.rows.site import Cotangents, Recipe, Site, only, scalar


def vector(site: Site, saved: str = "self", scale: str | None = None) -> Recipe | None:
    """z = h v: the parameter is a vector, positions are the entries of z."""
    group = site.grouping(1)
    if group is None:
        return None
    h, shape = site.node.saved(saved), site.target_shape
    factor = scalar(site.node.attribute(scale)) if scale else 1

    def build(cotangents: Cotangents) -> Form:
        z = wide(group(only(cotangents))) * factor  # (B, T)
        return Outer(z[:, None, :, None], wide(group(h)).unsqueeze(1), shape, True, group.positions)

    return Recipe(build, "outer product")


def bilinear(site: Site) -> Recipe | None:
    """Bilinear layer: z_o = x^T W_o y."""
    node = site.node
    expands = [tuple(node.attribute(name)) for name in ("expand1", "expand2", "expand3", "sumdim")]
    group = site.grouping(1)
    if group is None or expands != [(1, 3), (0,), (1, 2), (2, 3)]:
        return None
    x, y, shape = node.saved("i1"), node.saved("i3"), site.target_shape

    def build(cotangents: Cotangents) -> Form:
        z, left, right = (wide(group(t)) for t in (only(cotangents), x, y))
        pairs = (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(2)
        return Outer(z.unsqueeze(1), pairs.unsqueeze(1), shape, True, group.positions)

    return Recipe(build, "outer product")


def grouped(site: Site) -> Recipe | None:
    """Rows sorted by group, each group with a matrix of its own (experts): owners vary from row to row."""
    node = site.node
    shape, ends = site.target_shape, node.saved("offs")
    data = node.saved("self")
    owner = row_owners(site.layout(), node.shape(), 1, site.n_examples)
    if owner is None or len(shape) != 3 or data.ndim != 2 or ends is None:
        return None
    rows = torch.arange(len(owner), device=owner.device)
    stack = torch.searchsorted(ends.to(rows.dtype), rows, right=True)
    owner = torch.where(stack < shape[0], owner, -1)  # rows behind the last group take no part
    return _routed(site, data, owner, stack, shape, weight_first=False)


def stacked(site: Site, *, weight_first: bool, saved: str) -> Recipe | None:
    """z_g = h_g W_g (or W_g h_g) with owners that vary from row to row and from group to group."""
    node = site.node
    order = (0, 2, 1) if weight_first else (0, 1, 2)
    owner = row_owners(_permuted(site.layout(), order), [node.shape()[d] for d in order], 2, site.n_examples)
    if owner is None or node.dtype().is_complex:
        return None
    n_groups, n_rows = node.shape()[0], node.shape()[order[1]]
    stack = torch.arange(n_groups, device=owner.device).repeat_interleave(n_rows)
    data = node.saved(saved).permute(order).flatten(0, 1)
    return _routed(site, data, owner, stack, site.target_shape, weight_first=weight_first)


def _permuted(layout: Layout, order: tuple[int, ...]) -> Layout:
    if isinstance(layout, Axis):
        return Axis(order.index(layout.dim), layout.inner)
    return Entries(layout.owner.permute(order)) if isinstance(layout, Entries) else layout


def _routed(
    site: Site, data: Tensor, owner: Tensor, stack: Tensor, shape: torch.Size, *, weight_first: bool
) -> Recipe | None:
    """Rows (N, .) to (B, G, T, .), T the largest number of rows that one example has in one group."""
    n, n_groups = site.n_examples, shape[0]
    cell = (owner * n_groups + stack)[owner >= 0]
    rows = (owner >= 0).nonzero().squeeze(1)
    order = torch.argsort(cell, stable=True)
    rows, cell = rows[order], cell[order]
    counts = torch.bincount(cell, minlength=n * n_groups)
    width = max(1, int(counts.max())) if len(cell) else 1
    start = counts.cumsum(0) - counts
    place = cell * width + torch.arange(len(cell), device=cell.device) - start[cell]

    def spread(t: Tensor) -> Tensor:
        whole = t.new_zeros(n * n_groups * width, t.shape[1])
        return whole.index_copy_(0, place, t[rows]).reshape(n, n_groups, width, t.shape[1])

    def build(cotangents: Cotangents) -> Form:
        z = only(cotangents)
        z = z.mT.flatten(0, 1) if weight_first else z.reshape(-1, z.shape[-1])
        h, zbar = spread(wide(data)), spread(wide(z))
        left, right = (zbar, h) if weight_first else (h, zbar)
        return Outer(left, right, shape, cotangent_left=weight_first)

    return Recipe(build, "routed outer product")


def row_owners(layout: Layout, shape: list[int] | torch.Size, n_positions: int, n_examples: int) -> Tensor | None:
    """Owner of each row (positions flattened), -1 where there is none; None where a row has several."""
    n_rows = prod(shape[:n_positions])
    if n_examples == 1:
        return torch.zeros(n_rows, dtype=torch.long)
    if isinstance(layout, Axis):
        if layout.dim >= n_positions:
            return None
        along = owners_along(layout, shape, n_examples, torch.device("cpu"))
        view = [-1 if d == layout.dim else 1 for d in range(n_positions)]
        return along.reshape(view).expand(tuple(shape[:n_positions])).reshape(-1)
    if isinstance(layout, Entries):
        owner = layout.owner.reshape(n_rows, prod(shape[n_positions:]))
        of_row = owner.amax(1) if owner.shape[1] else owner.new_full((n_rows,), -1)
        return of_row if bool(((owner == of_row.unsqueeze(1)) | (owner < 0)).all()) else None
    return torch.full((n_rows,), -1)
