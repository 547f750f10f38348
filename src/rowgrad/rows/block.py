"""All rows of one parameter: the forms of its uses, put together with their cross terms.

A parameter used several times (tied weights, an unrolled recurrence) has one gradient: norms of uses are never added
up. Uses that see the same entries are joined, by concatenating positions where their forms allow, else by exact cross
terms. Uses that see disjoint entries do not interact. Uses that overlap in any other way are written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rowgrad.rows.factors import (
    CANCELLATION,
    CHUNK_BYTES,
    Dense,
    Form,
    Multiples,
    Outer,
    Rows,
    energies,
    formed,
    handed_out,
    in_type,
    let_go,
    reshaped,
    wide_dtype,
)
from rowgrad.rows.pairs import gram, inner
from rowgrad.rows.placement import Place


@dataclass
class Region:
    """Forms that see exactly the same entries of the parameter."""

    forms: list[Form]
    place: Place
    _canceling: Tensor | None = field(default=None, repr=False)  # examples
    _whole: Dense | None = field(default=None, repr=False)  # all forms added up; the next question uses it, too

    @property
    def formed_bytes(self) -> int:
        """Of the rows that questions formed and left."""
        rows = [None if self._whole is None else self._whole.values, *map(formed, self.forms)]
        return sum([r.nbytes for r in rows if r is not None])

    def let_go(self) -> None:
        """Keep no formed rows any longer."""
        self._whole = None
        for form in self.forms:
            let_go(form)

    @property
    def adds_up(self) -> bool:
        """Whether products of rows with rows would write out those of one form anyway, and the others are rows of a
        table, which can be added to them."""
        if len(self.forms) == 1:
            return False
        outers = [f for f in self.forms if isinstance(f, Outer) and f.is_formed_and_kept]
        tables = [f for f in self.forms if isinstance(f, Rows) and all(_takes(outer, f) for outer in outers)]
        return len(outers) == 1 and len(tables) == len(self.forms) - 1

    def whole(self) -> Dense:
        """All rows, where the forms add up; they stay for the next question."""
        if self._whole is None:
            (outer,) = [f for f in self.forms if isinstance(f, Outer)]
            self._whole = _with_tables(handed_out(outer), [f for f in self.forms if isinstance(f, Rows)])
        return self._whole

    def sq_norms(self, keep: bool) -> Tensor:
        if len(self.forms) == 1:
            return self.forms[0].sq_norms(keep)
        return self.whole().sq_norms() if self.adds_up else self._sq_norms_by_forms()

    def _sq_norms_by_forms(self) -> Tensor:
        """Tells on the way which examples' uses cancel."""
        own = [form.sq_norms(keep=True) for form in self.forms]  # the cross terms ask next
        found = sum_of(own)
        for i, f in enumerate(self.forms):
            for g in self.forms[i + 1 :]:
                found = found + 2 * inner(f, g)
        self._canceling = _canceling(found, own)
        for part in self._canceling_parts():
            found[part] = energies(self.select(part).dense())
        return found

    def gram(self, other: Region) -> Tensor:
        if self.adds_up and other.adds_up:
            return gram(self.whole(), other.whole())
        if other is self:
            crosses = [gram(f, g) for i, f in enumerate(self.forms) for g in self.forms[i + 1 :]]  # they may form f
            own = [gram(f, f) for f in self.forms]
            found = sum_of(own + [part for cross in crosses for part in (cross, cross.T)])
            if crosses:
                self._canceling = _canceling(found.diagonal(), [part.diagonal() for part in own])
        else:
            found = sum_of(gram(f, g) for f in self.forms for g in other.forms)
        for columns in other._canceling_parts():
            right = Dense(other.select(columns).dense())
            found[:, columns] = sum_of(gram(f, right) for f in self.forms)
        for rows in self._canceling_parts():
            left = Dense(self.select(rows).dense())
            found[rows] = sum_of(gram(left, g) for g in other.forms)
            for columns in other._canceling_parts():
                found[rows.unsqueeze(1), columns] = gram(left, Dense(other.select(columns).dense()))
        return found

    def inner(self, other: Region) -> Tensor:
        if self.adds_up and other.adds_up:
            return inner(self.whole(), other.whole())
        found = sum_of(inner(f, g) for f in self.forms for g in other.forms)
        for rows in (*self._canceling_parts(), *other._canceling_parts()):
            found[rows] = (self.select(rows).dense() * other.select(rows).dense()).reshape(len(rows), -1).sum(1)
        return found

    def _canceling_parts(self) -> Sequence[Tensor]:
        """Examples whose uses cancel so far that products of the uses would lose the digits that are left, so few at a
        time that their rows may be written out."""
        if len(self.forms) == 1:
            return ()
        if self._canceling is None:
            self._sq_norms_by_forms()
            assert self._canceling is not None
        if not len(self._canceling):
            return ()
        return self._canceling.split(max(1, CHUNK_BYTES // max(1, 8 * self.forms[0].shape.numel())))

    def select(self, index: Tensor) -> Region:
        return Region([f.select(index) for f in self.forms], self.place)

    def weighted_sum(self, c: Tensor) -> Tensor:
        """Shape of the place; sparse where all forms are sparse embeddings."""
        if self._whole is not None:
            return reshaped(self._whole.weighted_sum(c), self.place.shape)
        parts = [form.weighted_sum(c) for form in self.forms]
        if all(p.is_sparse for p in parts):
            return sum_of(parts)
        return sum_of(reshaped(p.to_dense() if p.is_sparse else p, self.place.shape) for p in parts)

    def dot(self, direction: Tensor) -> Tensor:
        """direction: the parameter's, contiguous, and perhaps itself a part of a larger tensor."""
        if not self.place.covers(direction.numel()):
            start = int(direction.storage_offset()) + self.place.offset
            direction = direction.as_strided(self.place.shape, self.place.stride, start)
        if self._whole is not None:
            return self._whole.dot(reshaped(direction, self._whole.shape))
        return sum_of(form.dot(reshaped(direction, form.shape)) for form in self.forms)

    def dense(self) -> Tensor:
        if self.adds_up:
            whole, self._whole = self.whole(), None  # it is handed out
            return whole.values.reshape(whole.n_examples, *self.place.shape)
        return sum_of(handed_out(form).reshape(form.n_examples, *self.place.shape) for form in self.forms)


def _canceling(found: Tensor, own: Sequence[Tensor]) -> Tensor:
    """Where squared norms are a small part of what they would be if no use took from another, (n,)."""
    bound = sum_of(part.clamp(min=0).sqrt() for part in own).square()
    return (found < CANCELLATION * bound).nonzero().squeeze(1)


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """Their sum; one part alone is returned as it is."""
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
        regions = _regions(uses)
        block = cls(parameter.shape, regions, n_examples, wide_dtype(parameter.dtype), parameter.device)
        if len(regions) > 1 and _overlap([region.place for region in regions]):
            place = Place.whole(uses[0][1].leaf, parameter.shape)
            return replace(block, regions=[Region([Dense(block.dense())], place)])
        return block

    @property
    def is_plain(self) -> bool:
        """Whether one region is the whole parameter, in its own order."""
        return len(self.regions) == 1 and self.regions[0].place.covers(self.shape.numel())

    @property
    def bytes(self) -> int:
        """Of all rows, written out."""
        return self.n_examples * self.shape.numel() * self.dtype.itemsize

    @property
    def formed_bytes(self) -> int:
        """Of the rows that questions formed and left."""
        return sum([region.formed_bytes for region in self.regions])

    def let_go(self) -> None:
        """Keep no formed rows any longer."""
        for region in self.regions:
            region.let_go()

    def _zeros(self) -> Tensor:
        return torch.zeros(self.n_examples, dtype=self.dtype, device=self.device)

    @property
    def is_absent(self) -> bool:
        return not self.regions

    def sq_norms(self, keep: bool = False) -> Tensor:
        """(B,); `keep` what is formed on the way for the next question."""
        return self._total([r.sq_norms(keep) for r in self.regions])

    def dot(self, direction: Tensor) -> Tensor:
        direction = direction.contiguous()
        return self._total([r.dot(direction) for r in self.regions])

    def _total(self, parts: list[Tensor]) -> Tensor:
        """What the regions contribute, in the dtype of products; (B,) where there are none."""
        if not parts:
            return self._zeros()
        return sum_of(in_type(part, self.dtype) for part in parts)

    def weighted_sum(self, c: Tensor) -> Tensor:
        """Shape of the parameter; sparse where all its uses are sparse embeddings."""
        if self.is_plain:
            found = self.regions[0].weighted_sum(c)
            return found if found.is_sparse else reshaped(found, self.shape)
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for region in self.regions:
            found = region.weighted_sum(c)
            place = region.place
            total.as_strided(place.shape, place.stride, place.offset).add_(
                found.to_dense() if found.is_sparse else found
            )
        return total

    def dense(self) -> Tensor:
        """(B, *shape), the caller's own."""
        if self.is_plain:
            return self.regions[0].dense().reshape(self.n_examples, *self.shape)
        total = torch.zeros(self.n_examples, *self.shape, dtype=self.dtype, device=self.device)
        numel = self.shape.numel()
        for region in self.regions:
            place = region.place
            view = total.as_strided((self.n_examples, *place.shape), (numel, *place.stride), place.offset)
            view.add_(region.dense())
        return total

    def gram(self, other: Block) -> Tensor:
        """(B, B')."""
        if self.is_absent or other.is_absent:
            return torch.zeros(self.n_examples, other.n_examples, dtype=self.dtype, device=self.device)
        if self._matches(other):
            return self._total([r.gram(s) for r, s in zip(self.regions, other.regions, strict=True)])
        return gram(Dense(self.dense()), Dense(other.dense()))

    def inner(self, other: Block) -> Tensor:
        """(B,): row j with row j of the other."""
        if self.is_absent or other.is_absent:
            return self._zeros()
        if self._matches(other):
            return self._total([r.inner(s) for r, s in zip(self.regions, other.regions, strict=True)])
        return (Dense(self.dense()).flat * Dense(other.dense()).flat).sum(1)

    def _matches(self, other: Block) -> bool:
        mine, theirs = ([(r.place.shape, r.place.stride, r.place.offset) for r in b.regions] for b in (self, other))
        return mine == theirs

    def select(self, index: Tensor) -> Block:
        return replace(self, regions=[r.select(index) for r in self.regions], n_examples=len(index))

    def with_cotangents(self, transform: Callable[[Tensor], Tensor]) -> Block:
        """The block with `transform` applied to the cotangents of every use."""
        changed = [Region([f.with_cotangents(transform) for f in r.forms], r.place) for r in self.regions]
        return replace(self, regions=changed)


def _regions(uses: list[tuple[Form, Place]]) -> list[Region]:
    if len(uses) == 1:
        return [Region([uses[0][0]], uses[0][1])]
    by_key: dict[tuple, list[tuple[Form, Place]]] = {}
    for form, place in uses:
        by_key.setdefault(place.key, []).append((form, place))
    return [Region(_joined([form for form, _ in group]), group[0][1]) for group in by_key.values()]


def _joined(forms: list[Form]) -> list[Form]:
    """Fewer forms with the same sum: positions concatenated, written-out rows added."""
    if len(forms) == 1:
        return forms
    forms = [f.plain() for f in forms]
    dense = [f for f in forms if isinstance(f, Dense)]
    multiples: list[Form] = [f for f in forms if isinstance(f, Multiples)]
    by_table: dict[torch.Size, list[Rows]] = {}
    for f in forms:
        if isinstance(f, Rows):
            by_table.setdefault(f.shape, []).append(f)
    found = joined_outers([f for f in forms if isinstance(f, Outer)])
    tables = [_cat_rows(group) for group in by_table.values()]
    if dense:
        whole = dense[0]
        if len(dense) > 1:
            whole = Dense(sum_of(f.values.reshape(f.n_examples, *whole.shape) for f in dense), is_own=True)
        taken = [t for t in tables if whole.is_own and _takes(whole, t)]
        found.append(_with_tables(whole.values, taken) if taken else whole)
        tables = [t for t in tables if not any(t is other for other in taken)]
    return found + tables + multiples


def _takes(form: Form, table: Rows) -> bool:
    """Whether the rows of a table can be added to those of a form."""
    return form.shape == table.shape and form.held[0].dtype == table.held[0].dtype


def _with_tables(rows: Tensor, tables: Iterable[Rows]) -> Dense:
    """Rows that are nobody else's, (B, *shape), with those of some tables of their shape added to them."""
    rows = rows.contiguous()
    for table in tables:
        table.add_to(rows)
    return Dense(rows, is_own=True)


def joined_outers(forms: list[Form]) -> list[Form]:
    """Fewer forms with the same sum, for forms of the same entries: positions of outer products concatenated."""
    if len(forms) == 1:
        return forms
    alike: dict[tuple, list[Outer]] = {}
    others: list[Form] = []
    for f in forms:
        if isinstance(f, Outer):
            _, g, _, a, b = f.sizes
            alike.setdefault((g, a, b, f.cotangent_left, f.left.dtype), []).append(f)
        else:
            others.append(f)
    return [*(_cat_outer(group) for group in alike.values()), *others]


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
