"""The forms in which one use of a parameter holds all its rows, and the algebra on them.

For a use of a parameter, row j is a block of the parameter's (effective) shape. It is never stored as such unless that
is cheapest. Letters: B examples, T positions, G groups, a and b the two sides of an outer product, n scattered rows.

    Outer   row j = left_j^T right_j per group     left (B, G, T, a), right (B, G, T, b)     linear
    Convolved  an Outer whose right side is patches of images (rows/patches.py)              convolution
    Projected  an Outer less its part along fixed directions (rows/projected.py)            weight norm
    Hadamard   another form times a tensor, entry by entry (rows/hadamard.py)               masks, softplus
    Rows    row j = zeros with rows added at ids   ids (B, T), rows (B, T, d)                embedding
    Dense   row j itself                           (B, *shape)                               bias, scale, general path
    Multiples  row j = weights_j times one tensor  weights (B,), tensor of the shape         penalty on the weights

Every form answers the same questions, all in at least float32: `sq_norms` (with `keep`, what is formed is kept for the
next question), `weighted_sum(c)`, `dot(direction)`, `dense()`, `select(index)`; rows/pairs.py joins any two. Law: each
equals the same question asked of `dense()`.

Note [gram or form]
    ||left^T right||^2 is either the inner product of two T x T Gram matrices, T^2 (a + b) multiply-adds, or the squared
    sum of the formed product, T a b. The Gram route loses digits where positions cancel: its error is relative to
    (sum_t |left_t| |right_t|)^2. Where the result is a small part of that bound, the product is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import gcd, prod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rowgrad.rows import memory

CHUNK_BYTES = 64 * 2**20  # largest temporary made by one step of a chunked product
CACHE_BYTES = 8 * 2**20  # the same where it is read at once: a CPU has it near, and need not ask for new memory
KEEP_BYTES = 256 * 2**20  # a formed product is kept for the next question up to this size
PIECE = 4096  # numbers that are added up plainly
FEW_ROWS = 4  # times fewer than the large matrix has: threads share such a product better with that first
SMALLEST_HALF = 64  # positions, from which it pays to take a Gram matrix without one of its corners
CANCELLATION = 1e-3  # Gram route trusted while its result is above this part of its bound


def step_bytes(like: Tensor) -> int:
    """Size of a temporary that is used up by the next operation."""
    return min(CACHE_BYTES, CHUNK_BYTES) if like.is_cpu else CHUNK_BYTES


def count(n: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)


@cache
def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of what is asked of the rows of a parameter."""
    return torch.promote_types(dtype, torch.float32)


def wide(t: Tensor) -> Tensor:
    """At least float32: products and sums of half-precision factors are taken in float32."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def in_type(t: Tensor, dtype: torch.dtype) -> Tensor:
    """As `to`, which also takes its time where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def reshaped(t: Tensor, shape: Sequence[int]) -> Tensor:
    """As `reshape`, which also takes its time where there is nothing to do."""
    return t if t.shape == shape else t.reshape(shape)


def lengths(t: Tensor, n_kept: int = 1) -> Tensor:
    """Square root of the sum of squares over all but the leading dimensions.

    `vector_norm` reads once and keeps nothing, but adds up plainly: piece by piece, so that few are added at a time.
    """
    shape = t.shape
    if len(shape) == n_kept:
        return t.abs()
    n = prod(shape[n_kept:])
    if n <= PIECE:
        return torch.linalg.vector_norm(t, dim=tuple(range(n_kept, len(shape))))
    piece = gcd(n, PIECE)
    if piece < 128:
        return t.flatten(n_kept).square().sum(-1).sqrt_()
    pieces = t.reshape(*shape[:n_kept], n // piece, piece)
    return torch.linalg.vector_norm(torch.linalg.vector_norm(pieces, dim=-1), dim=-1)


def energies(t: Tensor, n_kept: int = 1) -> Tensor:
    """Sum of squares over all but the leading dimensions."""
    return lengths(t, n_kept).square_()


def transformed(given: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """What a user's transform makes of cotangents, checked. It may write to what it gets, which others still need."""
    found = transform(given.clone())
    if not isinstance(found, Tensor) or found.shape != given.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"transform was given cotangents of shape {tuple(given.shape)} and returned {shape}")
    return found


class Form(Protocol):
    """All rows of one use of a parameter."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def n_examples(self) -> int: ...
    @property
    def held(self) -> tuple[Tensor, ...]:
        """What the rows are made of; the first has their dtype."""
        ...

    def sq_norms(self, keep: bool = False) -> Tensor: ...
    def weighted_sum(self, c: Tensor) -> Tensor: ...
    def dot(self, direction: Tensor) -> Tensor: ...
    def dense(self) -> Tensor:
        """(B, *shape), to be read: it may be what the form holds. See `handed_out`."""
        ...

    def select(self, index: Tensor) -> Form: ...
    def scaled(self, weights: Tensor) -> Form: ...
    def factors(self) -> tuple[Tensor | None, Tensor, Tensor]: ...
    def with_cotangents(self, transform: Callable[[Tensor], Tensor]) -> Form: ...
    def plain(self) -> Form:
        """The same rows as one of the forms of this module."""
        ...

    def condensed(self) -> Form:
        """The same rows written out, where the norms would write them out and keep them, and where they take no more
        than the cotangents; for those who need no factors."""
        ...

    def route(self) -> str: ...


def _columns(weights: Tensor, like: Tensor) -> Tensor:
    return weights.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _time_first(side: Tensor) -> bool:
    """Whether (B, G, T, a) lies in memory with the positions before the examples."""
    return side.shape[2] > 1 and side.stride(0) < side.stride(2)


@dataclass
class Dense:
    """Rows as they are: values (B, *shape)."""

    values: Tensor
    is_own: bool = False  # nobody else holds the values, which may be written to

    @property
    def shape(self) -> torch.Size:
        return self.values.shape[1:]

    @property
    def held(self) -> tuple[Tensor, ...]:
        return (self.values,)

    @property
    def n_examples(self) -> int:
        return self.values.shape[0]

    @property
    def flat(self) -> Tensor:
        return reshaped(self.values, (self.n_examples, prod(self.shape)))

    def sq_norms(self, keep: bool = False) -> Tensor:
        return energies(self.values)

    def weighted_sum(self, c: Tensor) -> Tensor:
        return reshaped(in_type(c, self.values.dtype) @ self.flat, self.shape)

    def dot(self, direction: Tensor) -> Tensor:
        return self.flat @ in_type(direction, self.values.dtype).reshape(-1)

    def dense(self) -> Tensor:
        return self.values

    def select(self, index: Tensor) -> Dense:
        return Dense(self.values[index])

    def scaled(self, weights: Tensor) -> Dense:
        return Dense(self.values * _columns(weights, self.values))

    def factors(self) -> tuple[None, Tensor, Tensor]:
        return (
            None,
            self.values,
            torch.arange(self.n_examples, device=self.values.device),
        )

    def plain(self) -> Dense:
        return self

    def condensed(self) -> Dense:
        return self

    def route(self) -> str:
        return f"{count(self.values.numel())} entries"

    def with_cotangents(self, transform: Callable[[Tensor], Tensor]) -> Dense:
        return Dense(transformed(self.values, transform))


@dataclass
class Outer:
    """Row j = left_j^T right_j, group by group, reshaped to `shape`; (G, a, b) in memory order.

    `cotangent_left` says which side is zbar, for those who ask for the factors by name.
    """

    left: Tensor  # (B, G, T, a)
    right: Tensor  # (B, G, T, b)
    shape: torch.Size
    cotangent_left: bool
    positions: Tensor | None = None  # (B, T) True where a position is real, None: all are
    cotangent_gram: Callable[[], Tensor] | None = None  # (B G, T, T) of zbar, where several forms share it
    _formed: Tensor | None = field(default=None, repr=False)
    _cancels: bool | None = field(default=None, repr=False)
    sizes: tuple[int, int, int, int, int] = field(init=False, repr=False)  # B, G, T, a, b

    def __post_init__(self) -> None:
        b, g, t, a = self.left.shape
        self.sizes = b, g, t, a, self.right.shape[3]

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self.left, self.right

    @property
    def n_examples(self) -> int:
        return self.sizes[0]

    @property
    def formed_bytes(self) -> int:
        b, g, _, a, c = self.sizes
        return b * g * a * c * self.left.element_size()

    @property
    def prefers_gram(self) -> bool:
        _, _, t, a, b = self.sizes
        return t * (a + b) < a * b

    @property
    def is_formed_and_kept(self) -> bool:
        """Whether norms write the rows out, and these are small enough to be kept for the next question."""
        return self.sizes[2] > 1 and not self.prefers_gram and self.formed_bytes <= KEEP_BYTES

    def transposed(self, seen: torch.Size | None = None) -> Outer:
        """The same rows with the two sides exchanged; only for a plain matrix or a stack of them.

        seen: in place of the shape, without its dimensions of 1.
        """
        shape = self.shape if seen is None else seen
        shape = torch.Size((*shape[:-2], shape[-1], shape[-2]))
        formed = None if self._formed is None else self._formed.transpose(-1, -2)
        turned = (self.right, self.left, shape, not self.cotangent_left)
        return Outer(*turned, self.positions, self.cotangent_gram, formed, self._cancels)

    def chunks(self, bytes_per_example: int, at_once: int = 0) -> Iterator[slice]:
        step = max(1, (at_once or CHUNK_BYTES) // max(1, bytes_per_example))
        return (slice(i, i + step) for i in range(0, self.n_examples, step))

    def form(self) -> Tensor:
        """(B, G, a, b); kept for the next question while it is small enough."""
        if self._formed is not None:
            return self._formed
        formed = self.rows_of(slice(None))
        if self.formed_bytes <= KEEP_BYTES:
            self._formed = formed
        return formed

    def rows_of(self, examples: slice) -> Tensor:
        """(n, G, a, b) of some examples, to be read."""
        if self._formed is not None:
            return self._formed[examples]
        b, g, _, a, d = self.sizes
        n = len(range(*examples.indices(b)))
        return self.write_out(examples, memory.empty((n, g, a, d), self.left))

    def sq_norms(self, keep: bool = False) -> Tensor:
        b, g, t, _, _ = self.sizes
        if t == 0 or b == 0:
            return self.left.new_zeros(b)
        if t == 1:
            found = lengths(self.left, 2).mul_(lengths(self.right, 2)).square_()
            return found.sum(1) if g > 1 else found.squeeze(1)
        if self._formed is None and self.prefers_gram:
            found = self._sq_norms_by_gram()
            if not self._cancels:
                return found
        return self._sq_norms_by_forming(keep)

    def cancels(self) -> bool:
        """Whether positions of some example cancel so far that Gram matrices would lose the digits that are left."""
        if self._cancels is None:
            self._cancels = False
            if self.sizes[2] > 1:
                self._sq_norms_by_gram()
        return self._cancels

    def _sq_norms_by_gram(self) -> Tensor:
        """Tells on the way whether positions cancel. The diagonals of the two Gram matrices are squared lengths."""
        b, g, t, _, _ = self.sizes
        per_example = 2 * g * t * t * self.left.element_size()
        if self.cotangent_gram is not None and b * per_example <= CHUNK_BYTES:
            side = self.right if self.cotangent_left else self.left
            found, bound = _summed(_grams(side).mul_(self.cotangent_gram()), g)
        elif b * per_example <= CHUNK_BYTES:
            found, bound = _products_of_grams(self.left, self.right)
        else:
            pieces = [_products_of_grams(self.left[s], self.right[s]) for s in self.chunks(per_example)]
            found, bound = map(torch.cat, zip(*pieces, strict=True))
        self._cancels = bool((found < bound.mul_(CANCELLATION)).any())
        return found

    def _sq_norms_by_forming(self, keep: bool) -> Tensor:
        if self._formed is not None or (keep and self.formed_bytes <= KEEP_BYTES):
            return energies(self.form())
        b, _, _, a, d = self.sizes  # a product with more columns than rows is faster
        left, right = (self.left, self.right) if a <= d else (self.right, self.left)
        n_bytes, at_once = self.formed_bytes, step_bytes(left)
        if n_bytes <= at_once:
            return _energies_of_products(left, right)
        pieces = self.chunks(n_bytes // b, at_once)
        return torch.cat([_energies_of_products(left[s], right[s]) for s in pieces])

    def write_out(self, examples: slice, out: Tensor) -> Tensor:
        """The rows of some examples, written to (n, G, a, b)."""
        return _written_out(self.left[examples], self.right[examples], out)

    def weighted_sum(self, c: Tensor) -> Tensor:
        b, g, t, a, d = self.sizes
        c = in_type(c, self.left.dtype)
        if self._formed is not None:
            return (c @ self._formed.reshape(b, -1)).reshape(self.shape)
        thin = (self.left if a <= d else self.right) * c.view(-1, 1, 1, 1)
        left, right = (thin, self.right) if a <= d else (self.left, thin)
        if g == 1:
            if _time_first(left):
                left, right = left.transpose(0, 2), right.transpose(0, 2)
            return reshaped(left.reshape(b * t, a).t() @ right.reshape(b * t, d), self.shape)
        left = left.transpose(0, 1).reshape(g, b * t, a)
        right = right.transpose(0, 1).reshape(g, b * t, d)
        return (left.mT @ right).reshape(self.shape)

    def dot(self, direction: Tensor) -> Tensor:
        n, g, t, a, b = self.sizes
        direction = in_type(direction, self.left.dtype)
        if self._formed is not None:
            return self._formed.reshape(n, -1) @ direction.reshape(-1)
        matrix = reshaped(direction, (g, a, b) if g > 1 else (a, b))
        if g == 1 and FEW_ROWS * n * t <= a <= b and torch.get_num_threads() > 1:
            moved = (matrix @ self.right.reshape(n * t, b).t()).mul_(self.left.reshape(n * t, a).t())
            return moved.sum(0) if t == 1 else moved.view(a, n, t).sum((0, 2))
        wide, thin, matrix = (self.right, self.left, matrix.mT) if a < b else (self.left, self.right, matrix)
        many, few = max(a, b), min(a, b)
        if g > 1:
            moved = (wide.transpose(0, 1).reshape(g, n * t, many) @ matrix).reshape(g, n, t, few).transpose(0, 1)
        elif _time_first(wide):
            moved = (wide.transpose(0, 2).reshape(t * n, many) @ matrix).reshape(t, 1, n, few).transpose(0, 2)
        else:
            moved = (wide.reshape(n * t, many) @ matrix).reshape(n, 1, t, few)
        return moved.mul_(thin).sum((1, 2, 3))

    def dense(self) -> Tensor:
        return self.form().reshape(self.n_examples, *self.shape)

    def select(self, index: Tensor) -> Outer:
        return replace(
            self,
            left=self.left[index],
            right=self.right[index],
            positions=None if self.positions is None else self.positions[index],
            cotangent_gram=None,
            _formed=None,
        )

    def scaled(self, weights: Tensor) -> Outer:
        left, right = self.left, self.right
        if self.cotangent_left:
            left = left * _columns(weights, left)
        else:
            right = right * _columns(weights, right)
        return replace(self, left=left, right=right, cotangent_gram=None, _formed=None)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        h, zbar = (self.right, self.left) if self.cotangent_left else (self.left, self.right)
        b, g, t, _, _ = self.sizes
        owner = torch.arange(b, device=h.device).repeat_interleave(t)
        h, zbar = (side.transpose(1, 2).flatten(0, 1) for side in (h, zbar))
        if g == 1:
            h, zbar = h.squeeze(1), zbar.squeeze(1)
        if self.positions is not None:
            real = self.positions.reshape(-1)
            h, zbar, owner = h[real], zbar[real], owner[real]
        return h, zbar, owner

    def plain(self) -> Outer:
        return self

    def condensed(self) -> Outer | Dense:
        _, g, t, a, d = self.sizes
        n_cotangents = g * t * (a if self.cotangent_left else d)
        if g * a * d > n_cotangents or not self.is_formed_and_kept:
            return self
        return Dense(handed_out(self), is_own=True)

    def route(self) -> str:
        """How norms are taken and their multiply-adds."""
        b, g, t, a, d = self.sizes
        if t == 1:
            return f"T=1, {count(b * g * (a + d))} multiply-adds"
        if self.prefers_gram:
            return f"T={t} by Gram, {count(b * g * t * t * (a + d))} multiply-adds"
        return f"T={t} formed, {count(b * g * t * a * d)} multiply-adds"

    def with_cotangents(self, transform: Callable[[Tensor], Tensor]) -> Outer:
        old = self.left if self.cotangent_left else self.right
        b, g, t, p = old.shape
        _, given, _ = self.factors()
        found = transformed(given, transform).to(old.dtype).reshape(len(given), g, p)
        if self.positions is not None:
            whole = old.new_zeros(b * t, g, p)
            whole[self.positions.reshape(-1)] = found
            found = whole
        new = found.reshape(b, t, g, p).transpose(1, 2)
        left, right = (new, self.right) if self.cotangent_left else (self.left, new)
        return replace(self, left=left, right=right, cotangent_gram=None, _formed=None, _cancels=None)


def in_dtype(form: Form, dtype: torch.dtype) -> Form:
    """The same rows in another dtype, as one of the forms of this module."""
    form = form.plain()
    if isinstance(form, Dense):
        return Dense(form.values.to(dtype))
    if isinstance(form, Rows):
        return replace(form, rows=form.rows.to(dtype))
    if isinstance(form, Multiples):
        return Multiples(form.weights.to(dtype), form.direction.to(dtype))
    assert isinstance(form, Outer)
    return replace(form, left=form.left.to(dtype), right=form.right.to(dtype), cotangent_gram=None, _formed=None)


def formed(form: Form) -> Tensor | None:
    """Rows that a question formed and left for the next."""
    return getattr(form, "_formed", None)


def let_go(form: Form) -> None:
    """Keep no formed rows any longer."""
    if formed(form) is not None:
        form._formed = None  # pyright: ignore[reportAttributeAccessIssue]


def handed_out(form: Form) -> Tensor:
    """(B, *shape): rows written out for somebody who may write to them. Formed rows that were kept are so no longer."""
    rows = form.dense()
    if isinstance(form, Dense):
        return rows.clone()
    let_go(form)
    return rows


def _written_out(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left^T right for each example and group, written to (n, G, a, b)."""
    left = left.mT
    if left.shape[-1] == 1:  # a product over one position is slower as one
        return torch.mul(left, right, out=out)
    if left.shape[1] == 1:
        torch.bmm(left.squeeze(1), right.squeeze(1), out=out.squeeze(1))
        return out
    return torch.matmul(left, right, out=out)


def _energies_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum of squares of left^T right for each example, (n,)."""
    n, g, _, a = left.shape
    with memory.scratch((n, g, a, right.shape[3]), left) as piece:
        return energies(_written_out(left, right, piece))


def _grams(side: Tensor) -> Tensor:
    """(n G, T, T) from (n, G, T, a): of each example's positions, group by group."""
    side = side.flatten(0, 1)
    return torch.bmm(side, side.mT)


def _gram_in_parts(side: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Two parts of the Gram matrices of (n, T, a): early positions with early ones, (n, half, half), and all positions
    with late ones, (n, T, T - half). What is left out, late with early, mirrors the early with late.

    Many rows and few columns cost less than few rows and many columns.
    """
    turned = side.mT
    early = torch.bmm(side.narrow(1, 0, half), turned.narrow(2, 0, half))
    return early, torch.bmm(side, turned.narrow(2, half, side.shape[1] - half))


def _products_of_grams(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """For (n, G, T, a) and (n, G, T, b) the sum of the entries of both Gram matrices' product, and its bound, (n,)."""
    n_groups, half = left.shape[1], left.shape[2] // 2
    if half < SMALLEST_HALF:
        return _summed(_grams(left).mul_(_grams(right)), n_groups)
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    (early, late), of_right = _gram_in_parts(left, half), _gram_in_parts(right, half)
    early.mul_(of_right[0])
    late.mul_(of_right[1])
    found = early.sum((1, 2)) + late.sum((1, 2)) + late.narrow(1, 0, half).sum((1, 2))  # early with late twice
    sq_lengths = torch.cat([early.diagonal(0, 1, 2), late.diagonal(-half, 1, 2)], 1)
    return _over_groups(found, n_groups), _over_groups(_bound(sq_lengths), n_groups)


def _summed(product: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    found, bound = product.sum((1, 2)), _bound(product.diagonal(0, 1, 2))
    return _over_groups(found, n_groups), _over_groups(bound, n_groups)


def _over_groups(parts: Tensor, n_groups: int) -> Tensor:
    return parts if n_groups == 1 else parts.unflatten(0, (-1, n_groups)).sum(1)


def _bound(sq_lengths: Tensor) -> Tensor:
    """What the sum would be if no two positions canceled, from the squared lengths of the positions' products."""
    return sq_lengths.sqrt().sum(1).square_()


@dataclass
class Rows:
    """Row j of the Jacobian = zeros (V, d) with rows[j, t] added at ids[j, t]; absent positions hold zeros."""

    ids: Tensor  # (B, T)
    rows: Tensor  # (B, T, d)
    shape: torch.Size  # (V, d)
    sparse: bool = False
    positions: Tensor | None = None  # (B, T) True where a position is real, None: all are

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self.rows, self.ids

    @property
    def n_examples(self) -> int:
        return self.ids.shape[0]

    def _keys(self) -> Tensor:
        owner = torch.arange(self.n_examples, device=self.ids.device).unsqueeze(1)
        return (owner * self.shape[0] + self.ids).reshape(-1)

    def sq_norms(self, keep: bool = False) -> Tensor:
        """Rows at different ids are orthogonal: only examples that repeat an id need theirs added up first."""
        ids = self.ids.sort(1)[0]
        repeats = (ids[:, 1:] == ids[:, :-1]).any(1).nonzero().squeeze(1)
        found = energies(self.rows)
        if n := len(repeats):
            t, d = self.rows.shape[1:]
            ids, own = ids[repeats].contiguous(), self.ids[repeats].contiguous()
            place = torch.searchsorted(ids, own)  # of equal ids the first
            place += torch.arange(0, n * t, t, device=ids.device).unsqueeze(1)
            rows = self.rows[repeats].reshape(n * t, d)
            merged = torch.zeros_like(rows).index_add_(0, place.view(-1), rows)
            found[repeats] = energies(merged.view(n, t, d))
        return found

    def weighted_sum(self, c: Tensor) -> Tensor:
        rows = self.rows * c.to(self.rows.dtype).reshape(-1, 1, 1)
        flat_ids, flat_rows = self.ids.reshape(-1), rows.reshape(-1, rows.shape[2])
        if self.sparse:
            if self.positions is not None:  # an absent row must not count as touched
                real = self.positions.reshape(-1)
                flat_ids, flat_rows = flat_ids[real], flat_rows[real]
            return torch.sparse_coo_tensor(
                flat_ids.unsqueeze(0),
                flat_rows,
                tuple(self.shape),
                check_invariants=False,
            )
        return rows.new_zeros(tuple(self.shape)).index_add_(0, flat_ids, flat_rows)

    def dot(self, direction: Tensor) -> Tensor:
        return F.embedding(self.ids, direction.to(self.rows.dtype)).mul_(self.rows).sum((1, 2))

    def dense(self) -> Tensor:
        found = memory.zeros((self.n_examples, *self.shape), self.rows)
        self.add_to(found)
        return found

    def add_to(self, rows: Tensor) -> None:
        """Add these rows to others, (B, *shape), contiguous and of their dtype."""
        rows.view(-1, self.shape[1]).index_add_(0, self._keys(), self.rows.reshape(-1, self.shape[1]))

    def at(self, ids: Tensor) -> Tensor:
        """The rows of the table at `ids`, which are ascending, in each row of the Jacobian: (B, len(ids) * d)."""
        place = torch.searchsorted(ids, self.ids.contiguous()).clamp(max=len(ids) - 1)
        hit = (ids[place] == self.ids).reshape(-1)
        owner = torch.arange(self.n_examples, device=ids.device).unsqueeze(1)
        place = (owner * len(ids) + place).reshape(-1)[hit]
        found = self.rows.new_zeros(self.n_examples * len(ids), self.shape[1])
        found.index_add_(0, place, self.rows.reshape(-1, self.shape[1])[hit])
        return found.reshape(self.n_examples, -1)

    def select(self, index: Tensor) -> Rows:
        positions = None if self.positions is None else self.positions[index]
        return replace(self, ids=self.ids[index], rows=self.rows[index], positions=positions)

    def scaled(self, weights: Tensor) -> Rows:
        return replace(self, rows=self.rows * _columns(weights, self.rows))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        owner = torch.arange(self.n_examples, device=self.ids.device).repeat_interleave(self.ids.shape[1])
        ids, rows = self.ids.reshape(-1), self.rows.reshape(-1, self.rows.shape[2])
        if self.positions is not None:
            real = self.positions.reshape(-1)
            ids, rows, owner = ids[real], rows[real], owner[real]
        return ids, rows, owner

    def plain(self) -> Rows:
        return self

    def condensed(self) -> Rows:
        return self

    def route(self) -> str:
        return f"{count(self.rows.numel())} entries by id"

    def with_cotangents(self, transform: Callable[[Tensor], Tensor]) -> Rows:
        _, given, _ = self.factors()
        found = transformed(given, transform).to(self.rows.dtype)
        if self.positions is not None:
            whole = self.rows.new_zeros(self.ids.numel(), self.rows.shape[2])
            whole[self.positions.reshape(-1)] = found
            found = whole
        return replace(self, rows=found.reshape(self.rows.shape))


@dataclass
class Multiples:
    """Row j of the Jacobian = weights_j times `direction`."""

    weights: Tensor  # (B,)
    direction: Tensor  # of the parameter's shape

    @property
    def shape(self) -> torch.Size:
        return self.direction.shape

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self.weights, self.direction

    @property
    def n_examples(self) -> int:
        return len(self.weights)

    def sq_norms(self, keep: bool = False) -> Tensor:
        return self.weights.square() * self.direction.square().sum()

    def weighted_sum(self, c: Tensor) -> Tensor:
        return (c.to(self.weights.dtype) @ self.weights) * self.direction

    def dot(self, direction: Tensor) -> Tensor:
        return self.weights * (self.direction * direction.to(self.direction.dtype)).sum()

    def dense(self) -> Tensor:
        return self.weights.reshape(-1, *[1] * self.direction.ndim) * self.direction

    def select(self, index: Tensor) -> Multiples:
        return Multiples(self.weights[index], self.direction)

    def scaled(self, weights: Tensor) -> Multiples:
        return Multiples(self.weights * weights.to(self.weights.dtype), self.direction)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The direction is the same for all examples; the weights are its cotangents."""
        return self.direction, self.weights, torch.arange(self.n_examples, device=self.weights.device)

    def with_cotangents(self, transform: Callable[[Tensor], Tensor]) -> Multiples:
        return Multiples(transformed(self.weights, transform), self.direction)

    def plain(self) -> Multiples:
        return self

    def condensed(self) -> Multiples:
        return self

    def route(self) -> str:
        return "multiples of one gradient"
