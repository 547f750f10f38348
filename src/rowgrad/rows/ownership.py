"""Whose entry is it: which example each entry of each cotangent belongs to, proved by numbers.

An entry of a cotangent belongs to example j if the losses of all other examples have zero derivative in it.

Note [ownership by codes]
    The losses are seeded with a code v instead of ones. Multiplication by zero and by powers of two commutes exactly
    with rounding, so an entry of example j alone comes back multiplied by exactly v_j, bit for bit; an entry that
    mixes examples does not. Each example has a word of digits, one digit a pass: 0 stands for the seed 0, higher
    digits for powers of two far apart. All words have the same digit sum, so for any two examples j and k some pass
    seeds j lower than k, and some other pass the other way round: an entry of j with a part of k, however small, shows
    that part in the first of them. Where j is seeded 0 the part stands alone and any part above underflow is seen;
    where both are powers of two it is seen above rounding of the separation, see `detectable_ratio`. An entry that
    overflows shows a part only where j is seeded 0, so where there is one the digits are 0 and 1 alone.

Note [layouts]
    What was proved is kept as a layout. `Axis(dim, inner)`: along `dim`, entry i belongs to example (i // inner) % B;
    this covers batch-first, sequence-first, and batch dimensions flattened with others in either order. `Entries`: an
    owner for each entry (packed or routed tokens), decoded from the codes or told by ids (rows/listed.py). A cotangent
    that is zero in every pass has any layout: `ZERO`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from math import prod

import torch
from torch import Tensor

from rowgrad.tape import Tape

Edge = tuple[int, int]
CPU = torch.device("cpu")
PROBE_BYTES = 512 * 2**20  # cotangents of one block of edges held at a time while proving

# dtype -> (number of digits, exponent of the separation). float16 has no room for more than zero and one.
_CODES = {
    torch.float64: (3, 200),
    torch.float32: (3, 30),
    torch.bfloat16: (3, 30),
    torch.float16: (2, 0),
}
WITHOUT_POWERS = {torch.float16}  # whose digits, zero and one, serve every dtype
_LARGEST_POWER = 12  # of two, for seeds that differ from example to example


@dataclass(frozen=True)
class Axis:
    """Along dimension `dim`, entry i belongs to example (i // inner) % B."""

    dim: int
    inner: int = 1

    def __str__(self) -> str:
        return f"dim {self.dim}" if self.inner == 1 else f"dim {self.dim}, every {self.inner}"


@dataclass(frozen=True, eq=False)
class Entries:
    """An owner for every entry, shape of the cotangent; -1 where the entry was zero in every pass.

    groupings: made of them; layouts that tell the same of tensors of other widths share them.
    """

    owner: Tensor
    groupings: dict[tuple, Grouping | None] = field(default_factory=dict)

    def __str__(self) -> str:
        return "by entry"

    @cached_property
    def told(self) -> Tensor:
        """The owners once, where they are the same all along a dimension, to be broadcast."""
        return self.owner[tuple([slice(0, 1) if stride == 0 else slice(None) for stride in self.owner.stride()])]


class _Mark:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


ZERO = _Mark("zero")
MIXED = _Mark("mixed")
Layout = Axis | Entries | _Mark


def detectable_ratio(dtype: torch.dtype) -> float:
    """Part of an entry that another example may contribute unseen where neither is seeded zero."""
    n_digits, separation = _CODES[dtype]
    return 0.0 if n_digits == 2 else torch.finfo(dtype).eps * 2.0 ** (-2 * separation)


def whole(shape: Sequence[int]) -> Axis:
    """For a single example everything is its own."""
    return Axis(0, max(1, shape[0]) if shape else 1)


def axis_candidates(shape: Sequence[int], n_examples: int) -> list[Axis]:
    """Dimensions along which the examples may lie, the plain one first."""
    found = []
    for dim, size in enumerate(shape):
        if size and size % n_examples == 0:
            found.append(Axis(dim, 1))
            if size > n_examples:
                found.append(Axis(dim, size // n_examples))
    return found


def owners_along(layout: Axis, shape: Sequence[int], n_examples: int, device: torch.device) -> Tensor:
    """Owner of each index of the layout's dimension, shape (shape[dim],)."""
    return torch.arange(shape[layout.dim], device=device).div(layout.inner, rounding_mode="floor") % n_examples


def mask(cotangent: Tensor, layout: Layout, example: int, n_examples: int) -> Tensor:
    """The cotangent with the entries of all other examples set to zero."""
    if layout is ZERO:
        return cotangent
    if isinstance(layout, Entries):
        return cotangent.clone().masked_fill_(layout.told != example, 0)  # as it lies in memory
    if cotangent.ndim == 0:
        return cotangent
    assert isinstance(layout, Axis)
    keep = owners_along(layout, cotangent.shape, n_examples, cotangent.device) == example
    index = keep.nonzero().squeeze(1)
    return torch.zeros_like(cotangent).index_copy_(layout.dim, index, cotangent.index_select(layout.dim, index))


@dataclass(frozen=True)
class Code:
    """One pass: the seed of each example, and the value each digit stands for."""

    seed: Tensor  # (B,)
    values: tuple[float, ...]  # by digit


@dataclass(frozen=True)
class Codebook:
    """The passes of one proof. See Note [ownership by codes]."""

    words: Tensor  # (B, passes) digits
    passes: tuple[Code, ...]
    halves: tuple[Code, Code]  # a random half of the examples seeded zero, then the other
    fresh: Code  # a different power of two for each example, beyond what was used for decoding
    n_digits: int

    @property
    def owner_of_word(self) -> Tensor:
        """Owner by the number that a word spells; -1 for words that were not issued."""
        n, length = self.words.shape
        table = torch.full((self.n_digits**length,), -1, dtype=torch.long, device="cpu")
        place = (self.words * self.n_digits ** torch.arange(length, device="cpu")).sum(1)
        table[place] = torch.arange(n, device="cpu")
        return table


def codebook(
    n_examples: int,
    dtypes: Iterable[torch.dtype],
    losses: Tensor,
    generator: torch.Generator,
) -> Codebook:
    """Words of equal digit sum, as short as the number of examples allows, for the narrowest dtype in the graph."""
    known = [_CODES.get(d, _CODES[torch.float16]) for d in dtypes]
    n_digits, separation = min(known)
    words = _words(n_examples, n_digits)
    words = words[torch.randperm(n_examples, generator=generator, device="cpu")]
    passes = []
    for column in words.T:
        jitter = torch.randint(-2, 3, (n_digits,), generator=generator, device="cpu").tolist()
        exponents = [jitter[1]] if n_digits == 2 else [-separation + jitter[1], separation + jitter[2]]
        values = (0.0, *(2.0**e for e in exponents))
        passes.append(Code(_seed([values[d] for d in column.tolist()], losses), values))
    silent = torch.randperm(n_examples, generator=generator, device="cpu") < n_examples // 2
    halves = [_powers(n_examples, n_digits, generator).masked_fill(mask, 0) for mask in (silent, ~silent)]
    first, second, fresh = (
        Code(_seed(values.tolist(), losses), ()) for values in (*halves, _powers(n_examples, n_digits, generator))
    )
    return Codebook(words, tuple(passes), (first, second), fresh, n_digits)


def _powers(n: int, n_digits: int, generator: torch.Generator) -> Tensor:
    """A random power of two for each example."""
    spread = 2 if n_digits == 2 else _LARGEST_POWER
    return torch.randint(-spread, spread + 1, (n,), generator=generator, device="cpu").double().exp2()


def _seed(values: list[float], losses: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu").to(losses.dtype).to(losses.device)


def _words(n: int, n_digits: int) -> Tensor:
    """n distinct words over 0..n_digits-1 of equal digit sum, so that none is digit-wise at or below another."""
    for length in range(1, 64):
        middle = length * (n_digits - 1) // 2
        found = list(islice(_compositions(length, middle, n_digits - 1), n))
        if len(found) == n:
            return torch.tensor(found, dtype=torch.long, device="cpu").reshape(n, length)
    raise AssertionError(f"bug in rowgrad, please report: no code for {n} examples")


def _compositions(length: int, total: int, largest: int) -> Iterable[tuple[int, ...]]:
    if length == 0:
        if total == 0:
            yield ()
        return
    for digit in range(min(largest, total), -1, -1):
        if total - digit <= largest * (length - 1):
            for rest in _compositions(length - 1, total - digit, largest):
                yield (digit, *rest)


class Prover:
    """Proves the layout of edges of one tape, in blocks of bounded size.

    `rounded` holds the edges whose proof had to be taken within rounding (float16, kernels that add in no fixed order).
    """

    def __init__(self, tape: Tape, seed: Tensor, generator: torch.Generator, *, allow_rounding: bool) -> None:
        self.tape = tape
        self.seed = seed
        self.n_examples = seed.shape[0]
        self._generator = generator
        self._allow_rounding = allow_rounding
        self.rounded: set[Edge] = set()

    @cached_property
    def _dtypes(self) -> set[torch.dtype]:
        return {n.dtype(nr) for n in self.tape.nodes for nr in range(n.n_outputs) if n.is_traced(nr)}

    @cached_property
    def allow_rounding(self) -> bool:
        return self._allow_rounding or torch.float16 in self._dtypes

    @cached_property
    def codes(self) -> Codebook:
        return self._codebook(self._dtypes)

    def _codebook(self, dtypes: Iterable[torch.dtype]) -> Codebook:
        return codebook(self.n_examples, dtypes, self.seed, self._generator)

    def layouts(self, edges: Sequence[Edge]) -> dict[Edge, Layout]:
        """The layout of each edge. Below a mixed node everything is MIXED."""
        if self.n_examples == 1:
            return {e: whole(self.tape.nodes[e[0]].shape(e[1])) for e in edges}
        found: dict[Edge, Layout] = {}
        for block in self._blocks(edges):
            self._prove(block, found)
        return found

    def look(self, edges: Sequence[Edge], expected: Mapping[Edge, Axis | Entries]) -> dict[Edge, Layout]:
        """What three passes show: whether the expected layouts hold, else ZERO or MIXED, and which others are MIXED.

        Two examples are told apart by a zero in both passes with probability 1/2, and by powers of two else: enough to
        notice a structure that was read wrongly, which mixes more than one pair. No proof for the other edges: absent.
        """
        found: dict[Edge, Layout] = {}
        for block in self._blocks(edges):
            base = zip(block, self._cotangents(block, self.seed), strict=True)
            attempts = {e: _LayoutTest(z, [expected[e]], self) if e in expected else _Attempt(z, self) for e, z in base}
            for k, code in enumerate(self.codes.halves):
                self._see(attempts, k, code)
            found.update({e: layout for e, attempt in attempts.items() if (layout := attempt.result()) is not None})
            found.update({e: MIXED for e in block if e in expected and e not in found})
            self.rounded.update(e for e, attempt in attempts.items() if attempt.rounded)
        return found

    def _blocks(self, edges: Sequence[Edge]) -> Iterable[list[Edge]]:
        block: list[Edge] = []
        size = 0
        for edge in edges:
            node = self.tape.nodes[edge[0]]
            n_bytes = prod(node.shape(edge[1])) * node.dtype(edge[1]).itemsize
            if block and size + 2 * n_bytes > PROBE_BYTES:
                yield block
                block, size = [], 0
            block.append(edge)
            size += 2 * n_bytes
        if block:
            yield block

    def _prove(self, block: list[Edge], found: dict[Edge, Layout]) -> None:
        """In rounds of all passes: along one of the dimensions of each edge, then entry by entry."""
        base = dict(zip(block, self._cotangents(block, self.seed), strict=True))
        if self.codes.n_digits > 2 and not all(bool(z.isfinite().all()) for z in base.values()):
            self.codes = self._codebook(WITHOUT_POWERS)  # an entry that overflows shows no other times a power
        candidates = {e: axis_candidates(z.shape, self.n_examples) for e, z in base.items()}
        while remaining := [e for e in block if e not in found]:
            below = self._below_mixed(found)
            found.update({e: MIXED for e in remaining if e[0] in below})
            attempts = {
                e: _LayoutTest(base[e], axes, self) if (axes := candidates.pop(e, None)) else _Decoding(base[e], self)
                for e in remaining
                if e not in found
            }
            self._round(attempts)
            for edge, attempt in attempts.items():
                layout = attempt.result()
                if layout is not None:
                    found[edge] = layout
                    if attempt.rounded:
                        self.rounded.add(edge)
        if self.tape.runs_python:
            self._cotangents(block, self.seed)  # again, see Note [one answer] of the tape

    def _cotangents(self, edges: Sequence[Edge], seed: Tensor) -> list[Tensor]:
        return [self._filled(e, z) for e, z in zip(edges, self.tape.cotangents(edges, seed), strict=True)]

    def _filled(self, edge: Edge, cotangent: Tensor | None) -> Tensor:
        """An undefined cotangent is zero."""
        if cotangent is not None:
            return cotangent.to_dense() if cotangent.is_sparse else cotangent
        node, nr = self.tape.nodes[edge[0]], edge[1]
        return torch.zeros(node.shape(nr), dtype=node.dtype(nr), device=node.device(nr))

    def _round(self, attempts: Mapping[Edge, _Attempt]) -> None:
        for k, code in enumerate(self.codes.passes):
            self._see(attempts, k, code)
        decoded = {e: attempt for e, attempt in attempts.items() if attempt.alive and isinstance(attempt, _Decoding)}
        fresh = self._cotangents(list(decoded), self.codes.fresh.seed * self.seed)
        for attempt, z in zip(decoded.values(), fresh, strict=True):
            attempt.see_fresh(self.codes.fresh, z)

    def _see(self, attempts: Mapping[Edge, _Attempt], k: int, code: Code) -> None:
        alive = [e for e, attempt in attempts.items() if attempt.alive]
        for edge, z in zip(alive, self._cotangents(alive, code.seed * self.seed), strict=True):
            attempts[edge].see(k, code, z)

    def _below_mixed(self, found: Mapping[Edge, Layout]) -> set[int]:
        below = {i for (i, _), layout in found.items() if layout is MIXED}
        for node in self.tape.nodes:
            if node.index in below:
                below |= {t[0] for t in node.slots if t is not None}
        return below


class _Attempt:
    """Comparison of one edge's cotangent under the codes with its cotangent under ones; alive until it mixes."""

    def __init__(self, base: Tensor, prover: Prover) -> None:
        self.base = base
        self.prover = prover
        self.alive = True
        self.rounded = False
        self.zero = not bool(base.any())

    def see(self, k: int, code: Code, z: Tensor) -> None:
        self.alive = not self.mixes(z)

    def result(self) -> Layout | None:
        """None: not known yet."""
        return None if self.alive else MIXED

    def mixes(self, z: Tensor) -> bool:
        """Whether some entry surely has several owners: it came back neither as zero nor times a power of two."""
        return not self.prover.allow_rounding and bool((~scaled_by_power_of_two(self.base, z)).any())

    def agrees(self, z: Tensor, v: Tensor) -> bool:
        """Whether z is v times the base, bit for bit, or within rounding where that is allowed."""
        expected = self.base * v
        if torch.equal(z, expected):
            return True
        good = scaled_exactly(self.base, z, expected, v)
        if bool(good.all()):
            return True
        if self.prover.allow_rounding and bool((good | scaled_within_rounding(self.base, z, expected, v)).all()):
            self.rounded = True
            return True
        return False


class _LayoutTest(_Attempt):
    """The hypothesis that the examples lie in one of some ways, the likeliest first."""

    def __init__(self, base: Tensor, layouts: Sequence[Axis | Entries], prover: Prover) -> None:
        super().__init__(base, prover)
        self.owners = {layout: self._owner(layout) for layout in layouts if self._is_zero_elsewhere(layout)}
        self.mixed = False

    def see(self, k: int, code: Code, z: Tensor) -> None:
        seed = code.seed.to(_real(self.base.dtype))
        seed = torch.cat([seed, seed.new_zeros(1)])  # the last for nobody, -1
        self.owners = {layout: owner for layout, owner in self.owners.items() if self.agrees(z, seed[owner])}
        self.alive = bool(self.owners)
        self.mixed = not self.alive and self.mixes(z)

    def _is_zero_elsewhere(self, layout: Axis | Entries) -> bool:
        """Whether entries of nobody are zero, and not what zero times infinity gives."""
        return isinstance(layout, Axis) or not bool(((layout.told < 0) & (self.base != 0)).any())

    def _owner(self, layout: Axis | Entries) -> Tensor:
        if isinstance(layout, Entries):
            return layout.told
        owner = owners_along(layout, self.base.shape, self.prover.n_examples, self.base.device)
        return owner.reshape([-1 if d == layout.dim else 1 for d in range(self.base.ndim)])

    def result(self) -> Layout | None:
        """None: along none of these dimensions."""
        if self.mixed:
            return MIXED
        if not self.alive:
            return None
        return ZERO if self.zero else next(iter(self.owners))


class _Decoding(_Attempt):
    """The word of each entry, read digit by digit, and its owner checked against seeds never used before."""

    def __init__(self, base: Tensor, prover: Prover) -> None:
        super().__init__(base, prover)
        self.word = torch.zeros(base.shape, dtype=torch.long, device=base.device)
        self.owner: Tensor | None = None

    def see(self, k: int, code: Code, z: Tensor) -> None:
        digits, matched = self._read_off(code, z)
        if bool(matched.all()):
            self.word += digits * self.prover.codes.n_digits**k
            return
        matched = torch.zeros_like(matched)
        for digit, value in enumerate(code.values):
            v = torch.tensor(value, dtype=_real(self.base.dtype), device=self.base.device)
            expected = self.base * v
            good = scaled_exactly(self.base, z, expected, v) & self.base.isfinite()
            if self.prover.allow_rounding:
                near = scaled_within_rounding(self.base, z, expected, v) & ~good & ~matched
                self.rounded |= bool(near.any())
                good = good | near
            good &= ~matched
            self.word += good * (digit * self.prover.codes.n_digits**k)
            matched |= good
        self.alive = bool(matched.all())

    def _read_off(self, code: Code, z: Tensor) -> tuple[Tensor, Tensor]:
        """The digit of each entry that came back exactly, and which did."""
        digits, matched = torch.zeros_like(self.word), (z == 0) & self.base.isfinite()
        for digit, value in list(enumerate(code.values))[1:]:
            good = (z == self.base * value).logical_and_(~matched)
            digits.masked_fill_(good, digit)
            matched |= good
        return digits, matched

    def see_fresh(self, code: Code, z: Tensor) -> None:
        owner = self.prover.codes.owner_of_word.to(self.word.device)[self.word]
        self.owner = torch.where(self.base == 0, torch.full_like(owner, -1), owner)
        issued = bool(((owner >= 0) | (self.base == 0)).all())
        seed = code.seed.to(_real(self.base.dtype))
        v = torch.where(self.owner < 0, torch.zeros((), dtype=seed.dtype), seed[self.owner.clamp(min=0)])
        self.alive = issued and self.agrees(z, v)

    def result(self) -> Layout:
        if not self.alive or self.owner is None:
            return MIXED
        return ZERO if self.zero else Entries(self.owner)


def scaled_by_power_of_two(base: Tensor, z: Tensor) -> Tensor:
    """Same sign and mantissa, or zero, or too small to be exact; entries of a non-finite example say nothing."""
    dtype = _real(base.dtype)
    says_nothing = ~base.isfinite() | ~z.isfinite()
    if base.is_complex():
        base, z = torch.view_as_real(base.resolve_conj()), torch.view_as_real(z.resolve_conj())
        says_nothing = says_nothing.unsqueeze(-1)
    separation = _CODES.get(dtype, _CODES[torch.float16])[1]
    smallest = torch.finfo(dtype).tiny * 2.0 ** max(separation + 2, _LARGEST_POWER)
    return (base.frexp()[0] == z.frexp()[0]) | (z.abs() <= smallest) | says_nothing


def scaled_exactly(base: Tensor, z: Tensor, expected: Tensor, v: Tensor) -> Tensor:
    """Equal, or differing by less than the dtype holds exactly. Of entries that are not finite only those seeded zero
    say something: what is left there is another example's."""
    tiny = torch.finfo(_real(base.dtype)).tiny
    slack = torch.where(v == 0, 0.0, v.abs().clamp(min=1.0) * tiny)
    return ((z - expected).abs() <= slack) | (z == expected) | (~base.isfinite() & ((v != 0) | (z == 0) | z.isnan()))


def scaled_within_rounding(base: Tensor, z: Tensor, expected: Tensor, v: Tensor) -> Tensor:
    """Within rounding of the largest entry along the last dimension; entries seeded zero must be zero still."""
    info = torch.finfo(_real(base.dtype))
    size = base.abs().nan_to_num(0, 0, 0)
    size = size.amax(-1, keepdim=True) if base.ndim and base.shape[-1] else size
    return ((z - expected).abs() <= 32 * info.eps * (size + info.smallest_normal) * v.abs()) & (v != 0)


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


class Grouping:
    """Rearranges entries by example: (*positions, *features) -> (B, T, *features).

    Made from the layout of a cotangent whose leading `n_positions` dimensions tell the owner; None where they do not.
    """

    def __init__(
        self,
        n_examples: int,
        split: tuple[int, int, int, int] | None,
        index: Tensor | None,
    ) -> None:
        self.n_examples = n_examples
        self._split = split  # (dim, outer, inner, n_positions)
        self._index = index  # (B, T) into the flattened positions, -1 where absent

    @classmethod
    def of(
        cls,
        layout: Layout,
        shape: Sequence[int],
        n_positions: int,
        n_examples: int,
        device: torch.device = CPU,
    ) -> Grouping | None:
        """`device`: of the cotangent, for a layout that has no tensor to tell it."""
        if n_examples == 1 or layout is ZERO:
            layout = Axis(0, max(1, shape[0] // n_examples)) if n_positions and n_examples == 1 else layout
            if n_positions == 0:
                return cls(n_examples, None, None) if n_examples == 1 else None
        if layout is ZERO:
            fitting = [a for a in axis_candidates(shape, n_examples) if a.dim < n_positions]
            layout = fitting[0] if fitting else Entries(torch.full(tuple(shape), -1, device=device))
        if isinstance(layout, Axis):
            if layout.dim >= n_positions:
                return None
            outer = shape[layout.dim] // (n_examples * layout.inner)
            return cls(n_examples, (layout.dim, outer, layout.inner, n_positions), None)
        if isinstance(layout, Entries):
            told, positions = layout.told, tuple(shape[:n_positions])
            key = (positions, told.shape, told.device, n_examples)
            if key not in layout.groupings:
                told = told.expand((*positions, *told.shape[n_positions:])) if prod(shape) else layout.owner
                told = told.reshape(prod(positions), prod(told.shape[n_positions:]))
                layout.groupings[key] = cls._by_entry(told, n_positions, n_examples)
            return layout.groupings[key]
        return None

    @classmethod
    def _by_entry(cls, owner: Tensor, n_positions: int, n_examples: int) -> Grouping | None:
        if owner.shape[1] == 0:
            return None
        of_row = owner.amax(1)
        if not bool(((owner == of_row.unsqueeze(1)) | (owner < 0)).all()):
            return None
        order = torch.argsort(of_row, stable=True)
        order = order[int((of_row < 0).sum()) :]
        owners = of_row[order]
        counts = torch.bincount(owners, minlength=n_examples)
        start = counts.cumsum(0) - counts
        index = owner.new_full((n_examples, max(1, int(counts.max()))), -1)
        index[owners, torch.arange(len(order), device=owner.device) - start[owners]] = order
        return cls(n_examples, (0, 0, 0, n_positions), index)

    @property
    def positions(self) -> Tensor | None:
        """(B, T) True where a position is real; None where all are."""
        return None if self._index is None else self._index >= 0

    def __call__(self, t: Tensor) -> Tensor:
        if self._split is None:
            return t.reshape(1, 1, *t.shape)
        dim, outer, inner, n_positions = self._split
        features = t.shape[n_positions:]
        if self._index is not None:
            flat = t.reshape(prod(t.shape[:n_positions]), *features)
            if not len(flat):
                return t.new_zeros(*self._index.shape, *features)
            picked = flat.index_select(0, self._index.clamp(min=0).view(-1)).view(*self._index.shape, *features)
            return picked.masked_fill_((self._index < 0).view(*self._index.shape, *[1] * len(features)), 0)
        if dim == 0 and outer == 1:
            return t.reshape(self.n_examples, inner * prod(t.shape[1:n_positions]), *features)
        t = t.reshape(*t.shape[:dim], outer, self.n_examples, inner, *t.shape[dim + 1 :])
        return t.movedim(dim + 1, 0).flatten(1, n_positions + 1)

    def positions_of(self, t: Tensor) -> Tensor:
        """(B, 1, T, *features): as a side of an outer product has them, in one group."""
        if self._split is not None and self._index is None:
            dim, outer, inner, n_positions = self._split
            if dim == 0 and outer == 1:
                return t.reshape(self.n_examples, 1, inner * prod(t.shape[1:n_positions]), *t.shape[n_positions:])
        return self(t).unsqueeze(1)
