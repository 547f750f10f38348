"""Rules for lookups: rows of a table chosen by ids. Positions without a gradient (padding) are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from rowgrad.rows.factors import Rows, wide
from rowgrad.rows.products import row_owners
from rowgrad.rows.site import Cotangents, Recipe, Site, only
from rowgrad.tape import Node, signed

NO_PADDING = -1


def embedding(site: Site) -> Recipe | None:
    """Embedding: rows of a table looked up at ids, dense or sparse; padding has no gradient."""
    node = site.node
    if node.attribute("scale_grad_by_freq"):
        return None  # divides by counts over the whole batch: not the derivative of any one loss
    padding, sparse = signed(node.attribute("padding_idx")), node.attribute("sparse")
    build = _rows(site, len(node.shape()) - 1, site.target_shape[:1], padding, sparse=sparse)
    return None if build is None else Recipe(build, "lookup", saved=("indices",))


def indexed(site: Site) -> Recipe | None:
    """Indexing of a table's leading dimensions by tensors of ids."""
    indices = leading_ids(site.node)
    if indices is None:
        return None
    return _at(site, flat_ids(indices, site.target_shape), site.target_shape[: len(indices)])


def leading_ids(node: Node) -> list[Tensor] | None:
    """The tensors that index the leading dimensions; None where others are indexed, or by masks."""
    indices = list(node.saved("indices"))
    while indices and indices[-1] is None:
        indices.pop()
    if not indices or any(i is None or i.dtype not in (torch.long, torch.int) for i in indices):
        return None
    return indices


def selected(site: Site) -> Recipe | None:
    """Selection of a table's rows."""
    if not site.target_shape or site.node.dim("dim", len(site.target_shape)) != 0:
        return None
    return _at(site, site.node.saved("index").reshape(-1).long(), site.target_shape[:1])


def gathered(site: Site) -> Recipe | None:
    """Single entries of a table, by `gather`."""
    index, shape = site.node.saved("index"), site.target_shape
    if not shape:
        return None
    dim = site.node.dim("dim", len(shape))
    along = [
        index
        if d == dim
        else torch.arange(size, device=index.device).reshape([-1 if e == d else 1 for e in range(len(shape))])
        for d, size in enumerate(index.shape)
    ]
    return _at(site, flat_ids(along, shape), shape)


def taken(site: Site) -> Recipe | None:
    """Single entries of a table, by `take`."""
    return _at(site, site.node.saved("index") % site.target_shape.numel(), site.target_shape)


def flat_ids(indices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Number of each entry of a table of leading dimensions `shape`; ids may be negative."""
    flat = torch.zeros((), dtype=torch.long, device=indices[0].device)
    for index, size in zip(indices, shape, strict=False):
        flat = flat * size + index.long() % size
    return flat


def _at(site: Site, ids: Tensor, table: Sequence[int]) -> Recipe | None:
    """z = table[ids] for ids at hand."""
    build = _rows(site, ids.ndim, table)
    return None if build is None else Recipe(lambda cotangents: build(cotangents, ids), "lookup")


def _rows(
    site: Site, n_positions: int, table: Sequence[int], padding: int = NO_PADDING, *, sparse: bool = False
) -> Callable[[Cotangents, Tensor], Rows] | None:
    """For z = table[ids]: from the cotangents and the ids; `table` are the dimensions that ids count through."""
    group = site.grouping(n_positions)
    if group is None:
        return None
    shape = torch.Size((prod(table), prod(site.target_shape[len(table) :])))
    everywhere = group.positions is None and padding == NO_PADDING

    def build(cotangents: Cotangents, ids: Tensor) -> Rows:
        by_example = group(ids).long()
        rows = wide(group(only(cotangents))).reshape(*by_example.shape, shape[1])
        if everywhere:
            return Rows(by_example, rows, shape, sparse)
        real = group(ids != padding)
        return Rows(by_example, torch.where(real.unsqueeze(-1), rows, 0.0), shape, sparse, real)

    return build


def bag(site: Site) -> Recipe | None:
    """Embedding bag: sum, mean or maximum of the rows of each bag."""
    node = site.node
    if node.attribute("scale_grad_by_freq"):
        return None
    owner = row_owners(site.layout(), node.shape(), 1, site.n_examples, node.device())
    if owner is None:
        return None
    return _largest(site, owner) if node.attribute("mode") == 2 else _added(site, owner)


def _added(site: Site, owner: Tensor) -> Recipe | None:
    """Sums and means; owner (bags,)."""
    node = site.node
    ids, weights, starts = (node.saved(name) for name in ("indices", "per_sample_weights", "offsets"))
    positions = torch.arange(len(ids), device=ids.device)
    of_bag = torch.searchsorted(starts[: len(owner)].contiguous(), positions.to(starts.dtype), right=True) - 1
    counts = ids != signed(node.attribute("padding_idx"))
    size = torch.bincount(of_bag[counts], minlength=len(owner))[of_bag] if node.attribute("mode") == 1 else None
    places = _Places(owner[of_bag], counts, site.n_examples)
    shape, sparse = site.target_shape, node.attribute("sparse")

    def build(cotangents: Cotangents) -> Rows:
        rows = wide(_first(cotangents))[of_bag]
        if size is not None:
            rows = rows / size.unsqueeze(1)
        if weights is not None:
            rows = rows * wide(weights).unsqueeze(1)
        return Rows(places(ids).long(), places(rows), shape, sparse, places.real)

    return Recipe(build, "lookup")


def _largest(site: Site, owner: Tensor) -> Recipe | None:
    """Maxima: each feature of a bag comes from one row, so single entries of the table are looked up."""
    chosen, size = site.node.saved("result3"), site.node.saved("result2")  # (bags, d) ids; (bags,) without padding
    n_ids, d = site.target_shape
    entries = (chosen.clamp(min=0) * d + torch.arange(d, device=chosen.device)).reshape(-1)
    places = _Places(owner.repeat_interleave(d), (size > 0).repeat_interleave(d), site.n_examples)

    def build(cotangents: Cotangents) -> Rows:
        rows = wide(_first(cotangents)).reshape(-1, 1)
        return Rows(places(entries).long(), places(rows), torch.Size((n_ids * d, 1)), False, places.real)

    return Recipe(build, "lookup")


def _first(cotangents: Cotangents) -> Tensor:
    z = cotangents[0]
    assert z is not None
    return z


class _Places:
    """Brings rows (N, ...) that count and have an owner to (B, T, ...), T the most that one example has."""

    def __init__(self, owner: Tensor, counts: Tensor, n_examples: int) -> None:
        self._kept = (counts & (owner >= 0)).nonzero().squeeze(1)
        owner = owner[self._kept]
        of_example = torch.bincount(owner, minlength=n_examples)
        self._size = (n_examples, max(1, int(of_example.max())))
        order = torch.argsort(owner, stable=True)
        start = of_example.cumsum(0) - of_example
        within = torch.empty_like(owner)
        within[order] = torch.arange(len(owner), device=owner.device) - start[owner[order]]
        self._index = owner * self._size[1] + within
        self.real = self(torch.ones_like(counts))

    def __call__(self, t: Tensor) -> Tensor:
        whole = t.new_zeros(prod(self._size), *t.shape[1:]).index_copy_(0, self._index, t[self._kept])
        return whole.unflatten(0, self._size)
