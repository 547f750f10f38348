"""The form of a weight that is computed entry by entry: masked, scaled, squashed, quantized.

Row j of the Jacobian is that at the computed weight times a tensor, entry by entry: the mask, the noise, the derivative
of the function. Sums and directions need no rows written out, nor do norms where each example has one position:
||F * (l r^T)||^2 = <l^2, F^2 r^2>. Of more positions they are written out, few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rowgrad.rows import memory
from rowgrad.rows.factors import KEEP_BYTES, Dense, Form, Outer, Rows, energies, formed, step_bytes
from rowgrad.rows.pairs import GRAM, INNER, formed_part, gram, lines_at_once, product_of_lent
from rowgrad.rows.patches import Convolved


def times(form: Form, factor: Tensor) -> Form:
    """The rows of `form`, each times `factor`, of their shape."""
    factor = factor.to(form.held[0].dtype)
    if isinstance(form, Dense):
        return Dense(form.values * factor)
    if isinstance(form, Rows):
        return replace(form, rows=form.rows * F.embedding(form.ids, factor))
    if isinstance(form, Hadamard):
        return Hadamard(form.whole, form.factor * factor)
    return Hadamard(form, factor)


@dataclass
class Hadamard:
    """The rows of `whole`, each times `factor`."""

    whole: Form
    factor: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.whole.shape

    @property
    def held(self) -> tuple[Tensor, ...]:
        return (*self.whole.held, self.factor)

    @property
    def n_examples(self) -> int:
        return self.whole.n_examples

    @property
    def _formed(self) -> Tensor | None:
        return formed(self.whole)

    @_formed.setter
    def _formed(self, rows: Tensor | None) -> None:
        self.whole._formed = rows  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def _is_of_vectors(self) -> bool:
        """Whether each row is that of one position."""
        return isinstance(self.whole, Outer) and self.whole.sizes[2] == 1

    def sq_norms(self, keep: bool = False) -> Tensor:
        if self._is_of_vectors:
            return self._sq_norms_of_vectors()
        found = self.factor.new_empty(self.n_examples)
        if self._formed is not None or (keep and self._is_worth_keeping):
            rows = self.whole.dense()
            for piece in self._pieces():
                found[piece] = energies(rows[piece] * self.factor)
            return found
        for piece in self._pieces():
            with self._lent(piece) as rows:
                found[piece] = energies(rows)
        return found

    @contextmanager
    def _lent(self, piece: slice) -> Iterator[Tensor]:
        """Rows of some examples, to be used up at once."""
        if not isinstance(self.whole, Outer):
            yield self.select(torch.arange(self.n_examples, device=self.factor.device)[piece]).dense()
            return
        _, groups, _, a, b = self.whole.sizes
        with memory.scratch((len(self.whole.left[piece]), groups, a, b), self.factor) as rows:
            yield self.whole.write_out(piece, rows).view(-1, *self.shape).mul_(self.factor)

    @property
    def _is_worth_keeping(self) -> bool:
        """Whether a sum of rows that were written out is cheaper than the product that gives it without them."""
        whole = self.whole
        return isinstance(whole, (Outer, Convolved)) and not whole.prefers_gram and whole.formed_bytes <= KEEP_BYTES

    def _sq_norms_of_vectors(self) -> Tensor:
        """Each side is divided by its largest entry first: the square of each may be out of range where that of their
        product is not."""
        assert isinstance(self.whole, Outer)
        if not self.whole.left.numel() or not self.whole.right.numel():
            return self.factor.new_zeros(self.n_examples)
        _, groups, _, a, b = self.whole.sizes
        factor, largest = _in_range(self.factor.reshape(groups, a, b), (0, 1, 2))
        left, of_left = _in_range(self.whole.left[:, :, 0], (1, 2))
        right, of_right = _in_range(self.whole.right[:, :, 0], (1, 2))
        left, right = (side.transpose(0, 1).square() for side in (left, right))
        found = (left @ factor.square()).mul_(right).sum((0, 2))
        sizes = [size.reshape(-1).expand(self.n_examples) for size in (of_left, of_right, largest)]
        least, middle, most = torch.stack(sizes).sort(0)[0]  # a product of all three is in range if it can be
        return found.sqrt_().mul_(least * most * middle).square_()

    def _pieces(self) -> Iterator[slice]:
        """Examples, so few at a time that their rows may be written out."""
        n_bytes = self.factor.numel() * self.factor.element_size()
        step = max(1, step_bytes(self.factor) // max(1, n_bytes))
        return (slice(i, i + step) for i in range(0, self.n_examples, step))

    def weighted_sum(self, c: Tensor) -> Tensor:
        return self.whole.weighted_sum(c).reshape(self.shape) * self.factor

    def dot(self, direction: Tensor) -> Tensor:
        return self.whole.dot(self.factor * direction.to(self.factor.dtype).reshape(self.shape))

    def dense(self) -> Tensor:
        return self.whole.dense() * self.factor

    def select(self, index: Tensor) -> Hadamard:
        return replace(self, whole=self.whole.select(index))

    def scaled(self, weights: Tensor) -> Hadamard:
        return replace(self, whole=self.whole.scaled(weights))

    def factors(self) -> tuple[Tensor | None, Tensor, Tensor]:
        return self.plain().factors()

    def with_cotangents(self, transform: Callable[[Tensor], Tensor]) -> Hadamard:
        return replace(self, whole=self.whole.with_cotangents(transform))

    def plain(self) -> Dense:
        return Dense(self.dense())

    def condensed(self) -> Hadamard:
        return self

    def route(self) -> str:
        return f"{self.whole.route()}, times a tensor"


def _in_range(t: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Divided by the largest magnitude along some dimensions, and that."""
    largest = t.abs().amax(dims, keepdim=True).clamp(min=torch.finfo(t.dtype).tiny)
    return t / largest, largest


def _inner(f: Hadamard, g: Hadamard) -> Tensor:
    index = torch.arange(f.n_examples, device=f.factor.device)
    parts = [(f.select(index[s]).dense() * g.select(index[s]).dense()).flatten(1).sum(1) for s in f._pieces()]
    return torch.cat(parts)


def _gram(f: Hadamard, g: Hadamard) -> Tensor:
    """From a few rows of the matrices at a time, where they are outer products."""
    one, other = f.whole, g.whole
    if not (isinstance(one, Outer) and isinstance(other, Outer)) or (one.sizes[1], *one.sizes[3:]) != (
        1,
        *other.sizes[3:],
    ):
        left = f.plain()
        return gram(left, left if g is f else g.plain())
    a, b = one.sizes[3:]
    n_largest = max(f.n_examples, g.n_examples)
    step = lines_at_once(n_largest, b, f.factor)
    found = f.factor.new_zeros(f.n_examples, g.n_examples)
    for i in range(0, a, step):
        found += product_of_lent(_part(f, one, i, step), None if g is f else _part(g, other, i, step))
    return found


@contextmanager
def _part(f: Hadamard, whole: Outer, start: int, step: int) -> Iterator[Tensor]:
    """Some rows of each row's matrix, written out: (B, step * b)."""
    factor = f.factor.reshape(*whole.sizes[3:])[start : start + step]
    with formed_part(whole, start, step) as rows:
        yield rows.mul_(factor.reshape(-1))


INNER[Hadamard, Hadamard] = _inner
GRAM[Hadamard, Hadamard] = _gram
