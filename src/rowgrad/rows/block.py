"""All rows of one parameter: the forms of its uses, put together with their cross terms.

A parameter used several times (tied weights, an unrolled recurrence) has one gradient: norms of uses are never added
up. Uses that see the same entries are joined, by concatenating positions where their forms allow, else by exact cross
terms. Uses that see disjoint entries do not interact. Uses that overlap in any other way are written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rowgrad.rows.factors import Dense, Form, Multiples, Outer, Rows
from rowgrad.rows.pairs import gram, inner
from rowgrad.rows.placement import Place, row_major


@dataclass
class Region:
    """Forms that see exactly the same entries of the parameter, at shape, stride and offset of a contiguous one."""

    forms: list[Form]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def covers(self, numel: int) -> bool:
        return self.offset == 0 and self.shape.numel() == numel and self.is_contiguous

    @property
    def is_contiguous(self) -> bool:
        expected = row_major(self.shape)
        return all(n == 1 or s == e for n, s, e in zip(self.shape, self.stride, expected, strict=True))

    def sq_norms(self) -> Tensor:
        found = sum_of(form.sq_norms() for form in self.forms)
        for i, f in enumerate(self.forms):
            for g in self.forms[i + 1 :]:
                found = found + 2 * inner(f, g)
        return found

    def gram(self, other: Region) -> Tensor:
        if other is not self:
            return sum_of(gram(f, g) for f in self.forms for g in other.forms)
        crosses = [gram(f, g) for i, f in enumerate(self.forms) for g in self.forms[i + 1 :]]  # first: they may form f
        return sum_of([gram(f, f) for f in self.forms] + [part for cross in crosses for part in (cross, cross.T)])

    def inner(self, other: Region) -> Tensor:
        return sum_of(inner(f, g) for f in self.forms for g in other.forms)

    def weighted_sum(self, c: Tensor) -> Tensor:
        parts = [form.weighted_sum(c) for form in self.forms]
        if all(p.is_sparse for p in parts):
            return sum_of(parts)
        return sum_of((p.to_dense() if p.is_sparse else p).reshape(self.shape) for p in parts)

    def dot(self, direction: Tensor) -> Tensor:
        """direction: the parameter's, contiguous, and perhaps itself a part of a larger tensor."""
        part = direction.as_strided(self.shape, self.stride, int(direction.storage_offset()) + self.offset)
        return sum_of(form.dot(part.reshape(form.shape)) for form in self.forms)

    def dense(self) -> Tensor:
        return sum_of(form.dense().reshape(-1, *self.shape) for form in self.forms)


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total + part
    if total is None:
        raise AssertionError("bug in rowgrad, please report: a parameter's region has no forms")
    return total


@dataclass
class Block:
    """All rows of one parameter of shape `shape`; `regions` never overlap."""

    shape: torch.Size
    regions: list[Region]
    n_examples: int
    dtype: torch.dtype  # of the products
    device: torch.device

    @classmethod
    def of(cls, parameter: Tensor, uses: list[tuple[Form, Place]], n_examples: int) -> Block:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        by_key: dict[tuple, list[tuple[Form, Place]]] = {}
        for form, place in uses:
            by_key.setdefault(place.key, []).append((form, place))
        regions = [_region(group) for group in by_key.values()]
        block = cls(parameter.shape, regions, n_examples, dtype, parameter.device)
        if _overlap([group[0][1] for group in by_key.values()]):
            written_out = Region([Dense(block.dense())], parameter.shape, row_major(parameter.shape), 0)
            return replace(block, regions=[written_out])
        return block

    def _zeros(self) -> Tensor:
        return torch.zeros(self.n_examples, dtype=self.dtype, device=self.device)

    @property
    def is_absent(self) -> bool:
        return not self.regions

    def sq_norms(self) -> Tensor:
        return sum_of(r.sq_norms().to(self.dtype) for r in self.regions) if self.regions else self._zeros()

    def dot(self, direction: Tensor) -> Tensor:
        direction = direction.contiguous()
        return sum_of(r.dot(direction).to(self.dtype) for r in self.regions) if self.regions else self._zeros()

    def weighted_sum(self, c: Tensor) -> Tensor:
        """Shape of the parameter; sparse where all its uses are sparse embeddings."""
        if len(self.regions) == 1 and self.regions[0].covers(self.shape.numel()):
            found = self.regions[0].weighted_sum(c)
            return found if found.is_sparse else found.reshape(self.shape)
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for region in self.regions:
            found = region.weighted_sum(c)
            total.as_strided(region.shape, region.stride, region.offset).add_(
                found.to_dense() if found.is_sparse else found
            )
        return total

    def dense(self) -> Tensor:
        """(B, *shape)."""
        if len(self.regions) == 1 and self.regions[0].covers(self.shape.numel()):
            return self.regions[0].dense().reshape(self.n_examples, *self.shape)
        total = torch.zeros(self.n_examples, *self.shape, dtype=self.dtype, device=self.device)
        numel = self.shape.numel()
        for region in self.regions:
            view = total.as_strided((self.n_examples, *region.shape), (numel, *region.stride), region.offset)
            view.add_(region.dense())
        return total

    def gram(self, other: Block) -> Tensor:
        """(B, B')."""
        found = torch.zeros(self.n_examples, other.n_examples, dtype=self.dtype, device=self.device)
        if self.is_absent or other.is_absent:
            return found
        if self._matches(other):
            return sum_of([found, *(r.gram(s) for r, s in zip(self.regions, other.regions, strict=True))])
        return Dense(self.dense()).flat @ Dense(other.dense()).flat.T

    def inner(self, other: Block) -> Tensor:
        """(B,): row j with row j of the other."""
        if self.is_absent or other.is_absent:
            return self._zeros()
        if self._matches(other):
            return sum_of([self._zeros(), *(r.inner(s) for r, s in zip(self.regions, other.regions, strict=True))])
        return (Dense(self.dense()).flat * Dense(other.dense()).flat).sum(1)

    def _matches(self, other: Block) -> bool:
        mine, theirs = ([(r.shape, r.stride, r.offset) for r in b.regions] for b in (self, other))
        return mine == theirs

    def select(self, index: Tensor) -> Block:
        regions = [replace(r, forms=[f.select(index) for f in r.forms]) for r in self.regions]
        return replace(self, regions=regions, n_examples=len(index))

    def with_cotangents(self, transform: Callable[[Tensor], Tensor]) -> Block:
        """The block with `transform` applied to the cotangents of every use."""
        changed = [replace(r, forms=[f.with_cotangents(transform) for f in r.forms]) for r in self.regions]
        return replace(self, regions=changed)


def _region(group: list[tuple[Form, Place]]) -> Region:
    place = group[0][1]
    return Region(_joined([form for form, _ in group]), torch.Size(place.shape), place.stride, place.offset)


def _joined(forms: list[Form]) -> list[Form]:
    """Fewer forms with the same sum: positions concatenated, written-out rows added."""
    if len(forms) == 1:
        return forms
    forms = [f.plain() for f in forms]
    dense = [f for f in forms if isinstance(f, Dense)]
    multiples: list[Form] = [f for f in forms if isinstance(f, Multiples)]
    by_table: dict[torch.Size, list[Rows]] = {}
    by_split: dict[tuple, list[Outer]] = {}
    for f in forms:
        if isinstance(f, Outer):
            _, g, _, a, b = f.sizes
            by_split.setdefault((g, a, b, f.cotangent_left, f.left.dtype), []).append(f)
        if isinstance(f, Rows):
            by_table.setdefault(f.shape, []).append(f)
    found: list[Form] = [_cat_outer(group) for group in by_split.values()]
    found += [_cat_rows(group) for group in by_table.values()]
    if dense:
        found.append(Dense(sum_of(f.values.reshape(-1, *dense[0].shape) for f in dense)))
    return found + multiples


def _cat_outer(forms: list[Outer]) -> Outer:
    if len(forms) == 1:
        return forms[0]
    positions = None
    if any(f.positions is not None for f in forms):
        positions = torch.cat([_positions(f) for f in forms], 1)
    left, right = (
        torch.cat([f.left for f in forms], 2),
        torch.cat([f.right for f in forms], 2),
    )
    return Outer(left, right, forms[0].shape, forms[0].cotangent_left, positions)


def _positions(form: Outer) -> Tensor:
    if form.positions is not None:
        return form.positions
    return torch.ones(form.sizes[0], form.sizes[2], dtype=torch.bool, device=form.left.device)


def _cat_rows(forms: list[Rows]) -> Rows:
    if len(forms) == 1:
        return forms[0]
    ids, rows = (
        torch.cat([f.ids for f in forms], 1),
        torch.cat([f.rows for f in forms], 1),
    )
    positions = None
    if any(f.positions is not None for f in forms):
        positions = torch.cat(
            [torch.ones_like(f.ids, dtype=torch.bool) if f.positions is None else f.positions for f in forms], 1
        )
    return Rows(ids, rows, forms[0].shape, all(f.sparse for f in forms), positions)


def _overlap(places: list[Place]) -> bool:
    """Whether regions may share entries: spans that intersect, unless strides interleave them provably apart."""
    for i, p in enumerate(places):
        for q in places[i + 1 :]:
            (a, b), (c, d) = p.span(), q.span()
            if a <= d and c <= b and not _interleaved(p, q):
                return True
    return False


def _interleaved(p: Place, q: Place) -> bool:
    """Column blocks of one matrix: same outer stride, both within it, different columns."""
    if len(p.shape) != 2 or p.stride != q.stride or p.stride[1] != 1:
        return False
    row = p.stride[0]
    starts = [place.offset % row for place in (p, q)]
    ends = [start + place.shape[1] for start, place in zip(starts, (p, q), strict=True)]
    return max(ends) <= row and (ends[0] <= starts[1] or ends[1] <= starts[0])
