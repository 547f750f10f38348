"""Rules for lookups: rows of a table chosen by ids."""

from __future__ import annotations

import torch
from torch import Tensor

from rowgrad.rows.factors import Rows, wide
from rowgrad.rows.ownership import Axis
from rowgrad.rows.site import Cotangents, Recipe, Site, only
from rowgrad.tape import signed


def embedding(site: Site) -> Recipe | None:
    """Embedding: rows of a table looked up at ids, dense or sparse; padding has no gradient."""
    node = site.node
    if node.attribute("scale_grad_by_freq"):
        return None  # divides by counts over the whole batch: not the derivative of any one loss
    ids = node.saved("indices")
    return _rows(site, ids, signed(node.attribute("padding_idx")), sparse=node.attribute("sparse"))


def _rows(site: Site, ids: Tensor, padding: int, *, sparse: bool = False) -> Recipe | None:
    group = site.grouping(ids.ndim)
    if group is None:
        return None
    shape = site.target_shape
    kept = group(ids != padding).unsqueeze(-1)
    by_example = group(ids)

    def build(cotangents: Cotangents) -> Rows:
        rows = wide(group(only(cotangents))).reshape(*by_example.shape, -1) * kept
        return Rows(by_example, rows, torch.Size((shape[0], rows.shape[2])), sparse, group.positions)

    return Recipe(build, "lookup")


def indexed(site: Site) -> Recipe | None:
    """Indexing of a table's first dimension by one tensor of ids."""
    indices = site.node.saved("indices")
    if len(indices) != 1 or indices[0] is None or indices[0].dtype not in (torch.long, torch.int):
        return None
    return _rows(site, indices[0].long() % site.target_shape[0], -1)


def selected(site: Site) -> Recipe | None:
    """Selection of a table's rows."""
    if site.node.dim("dim", len(site.target_shape)) != 0:
        return None
    return _rows(site, site.node.saved("index").reshape(-1).long(), -1)


def bag(site: Site) -> Recipe | None:
    """Embedding bag: sum, mean or maximum of the rows of each bag."""
    node = site.node
    if node.attribute("scale_grad_by_freq"):
        return None
    layout, mode = site.layout(), node.attribute("mode")
    if not isinstance(layout, Axis) or layout.dim != 0:
        return None
    n_bags = node.shape()[0]
    owner = torch.arange(n_bags, device=node.device()).div(layout.inner, rounding_mode="floor") % site.n_examples
    if mode == 2:
        return _largest(site, owner)
    return _added(site, owner, mean=mode == 1)


def _added(site: Site, owner: Tensor, *, mean: bool) -> Recipe | None:
    node = site.node
    ids, weights, padding = (
        node.saved("indices"),
        node.saved("per_sample_weights"),
        signed(node.attribute("padding_idx")),
    )
    starts = node.saved("offsets")[: len(owner)]
    bag_of = torch.searchsorted(starts, torch.arange(len(ids), device=ids.device), right=True) - 1
    kept = (ids != padding).unsqueeze(1)
    size = torch.bincount(bag_of[kept.squeeze(1)], minlength=len(owner)).clamp(min=1)
    n, shape, sparse = site.n_examples, site.target_shape, node.attribute("sparse")
    slot, width = _places(owner[bag_of], n)

    def build(cotangents: Cotangents) -> Rows:
        z = cotangents[0]
        assert z is not None
        rows = wide(z)[bag_of] * kept
        if mean:
            rows = rows / size[bag_of].unsqueeze(1)
        if weights is not None:
            rows = rows * wide(weights).unsqueeze(1)
        return _placed(ids, rows, slot, n, width, shape, sparse)

    return Recipe(build, "lookup")


def _largest(site: Site, owner: Tensor) -> Recipe | None:
    """Each feature of a bag comes from one row: as many rows as features, each with one entry."""
    node = site.node
    chosen = node.saved("result3")  # (bags, d) ids, -1 for an empty bag
    n, shape = site.n_examples, site.target_shape
    d = shape[1]
    ids = chosen.reshape(-1).clamp(min=0)
    slot, width = _places(owner.repeat_interleave(d), n)
    feature = torch.arange(d, device=chosen.device).repeat(len(chosen))

    def build(cotangents: Cotangents) -> Rows:
        z = cotangents[0]
        assert z is not None
        rows = wide(z).new_zeros(len(ids), d)
        rows[torch.arange(len(ids)), feature] = wide(z).reshape(-1) * (chosen.reshape(-1) >= 0)
        return _placed(ids, rows, slot, n, width, shape, False)

    return Recipe(build, "lookup")


def _places(owner: Tensor, n_examples: int) -> tuple[Tensor, int]:
    """Where each row goes in a padded (B, T): its flat index, and T."""
    order = torch.argsort(owner, stable=True)
    counts = torch.bincount(owner, minlength=n_examples)
    start = counts.cumsum(0) - counts
    width = max(1, int(counts.max())) if len(owner) else 1
    within = torch.empty_like(owner)
    within[order] = torch.arange(len(owner), device=owner.device) - start[owner[order]]
    return owner * width + within, width


def _placed(ids: Tensor, rows: Tensor, slot: Tensor, n: int, width: int, shape: torch.Size, sparse: bool) -> Rows:
    all_ids = ids.new_zeros(n * width).index_copy_(0, slot, ids)
    all_rows = rows.new_zeros(n * width, rows.shape[1]).index_copy_(0, slot, rows)
    present = torch.zeros(n * width, dtype=torch.bool, device=ids.device).index_fill_(0, slot, True)
    positions = None if bool(present.all()) else present.reshape(n, width)
    return Rows(all_ids.reshape(n, width), all_rows.reshape(n, width, -1), shape, sparse, positions)
