"""The form of a convolution's weight: two images and a kernel that moves over them.

With x the side whose positions are counted and y the other, padded, row j of the Jacobian is, group by group,

    weight[a, b, k] = sum_t x[a, t] y[b, stride t + dilation k]

As an outer product the right side would hold, for each position, the patch of y under the kernel, k^n times y.

Note [images without patches]
    The weighted sum of rows is an ordinary backward of the weight with x scaled example by example, the product with a
    direction an ordinary forward. Norms take the cheaper of two routes:
    - The Gram matrix of the patches is the sum over k of the Gram matrix of y's pixels, shifted by k on both sides:
      <patch_t, patch_u> = sum_k <y[t + k], y[u + k]>. No patch is made, and the products shrink by k^n. With a stride,
      pixels meet only within their phase. Cost: positions^2 a + pixels^2 b / stride^n.
    - The rows are formed, a few examples at a time. On the CPU in float32 the examples are folded into the groups of
      one backward of the weight, which takes little more than the weighted sum, so the rows are not kept; elsewhere,
      and where a side has hardly any channels, patches are made, and the rows are kept for the next question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil, prod

import torch
from torch import Tensor

from rowgrad.rows import memory
from rowgrad.rows.factors import CANCELLATION, CHUNK_BYTES, KEEP_BYTES, Dense, Outer, count, energies, step_bytes
from rowgrad.rows.pairs import GRAM, gram, product_of_lent
from rowgrad.rows.sliding import Pixels, Sliding

CACHE_BYTES = 4 * 2**20  # temporaries of one step on a CPU, so that they stay near it
FOLDED_BYTES = 5 * 2**19  # rows formed by one backward of a weight; of twice as many it may take three times as long
# Measured on a CPU, in multiply-adds of a formed row: one of the Gram route, one added entry of a Gram matrix, one
# entry of a formed row besides its multiply-adds, and a multiply-add of the sum of rows.
GRAM_WEIGHT = 1.25
ADDED_WEIGHT = 24
ENTRY_WEIGHT = 50
SUM_WEIGHT = 0.85
FEW_POSITIONS = 64  # up to which rows are products with patches, written where they belong, unlike folded ones
FEW_CHANNELS = 4  # on either side, up to which patches are faster than folding: kernels are slow there
KEPT_POSITIONS = 128  # multiply-adds of an entry of the sum, from which an entry kept and read again is cheaper
CHANNELS = 32  # formed together; convolution kernels are slow at numbers that fill no vectors


@dataclass
class Convolved:
    """Row j = sum over images and positions of x_j times the patches of y_j. See Note [images without patches]."""

    x: Tensor  # (B, images, channels, *positions)
    y: Tensor  # (B, images, channels, *extent), not padded
    sliding: Sliding
    shape: torch.Size  # (groups * a, b, *kernel)
    cotangent_left: bool
    images: Tensor | None = None  # (B, images) True where an image is real, None: all are
    _formed: Tensor | None = field(default=None, repr=False)

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self.x, self.y

    @property
    def n_examples(self) -> int:
        return self.x.shape[0]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(B, groups, positions of all images, a, b with the kernel)."""
        groups = self.sliding.groups
        n_positions = self.x.shape[1] * prod(self.x.shape[3:])
        return self.n_examples, groups, n_positions, self.shape[0] // groups, prod(self.shape[1:])

    @property
    def _positions(self) -> tuple[int, ...]:
        return tuple(self.x.shape[3:])

    @property
    def formed_bytes(self) -> int:
        return self.n_examples * self.shape.numel() * self.x.element_size()

    @property
    def _phases(self) -> tuple[tuple[Pixels, ...], ...]:
        return self.sliding.phases(self._positions, tuple(self.y.shape[3:]))

    def _gram_count(self) -> int:
        """Multiply-adds of the Gram route for one example."""
        _, groups, t, a, _ = self.sizes
        pixels = sum((self.x.shape[1] * prod(along.n for along in phase)) ** 2 for phase in self._phases)
        return groups * (t * t * a + pixels * self.shape[1])

    def _added_count(self) -> int:
        """Entries of Gram matrices that the Gram route adds up for one example."""
        found, n_positions = 0, self._positions
        for phase in self._phases:
            sides = [along.n for along in phase]
            for d, along in enumerate(phase):
                sides[d] = n_positions[d]
                found += len(along.offsets) * prod(sides) ** 2
        return self.sliding.groups * self.x.shape[1] ** 2 * found

    @property
    def _gram_cost(self) -> float:
        return GRAM_WEIGHT * self._gram_count() + ADDED_WEIGHT * self._added_count()

    @property
    def _forming_cost(self) -> float:
        return (self.sizes[2] + ENTRY_WEIGHT) * self.shape.numel()

    @property
    def prefers_gram(self) -> bool:
        """For the norms alone."""
        return self._gram_cost < self._forming_cost

    def _pieces(self, bytes_per_example: int) -> Iterator[slice]:
        step_bytes = CACHE_BYTES if self.x.device.type == "cpu" else CHUNK_BYTES
        step = max(1, step_bytes // max(1, bytes_per_example))
        return (slice(i, i + step) for i in range(0, self.n_examples, step))

    def _folded_pieces(self) -> Iterator[slice]:
        """About equal ones that the threads can share evenly."""
        n, threads = self.n_examples, torch.get_num_threads()
        most = max(1, FOLDED_BYTES // max(1, self.shape.numel() * self.x.element_size()))
        n_pieces = max(1, ceil(n / most))
        step = max(1, ceil(n / n_pieces / threads) * threads)
        return (slice(i, i + step) for i in range(0, n, step))

    # -- norms --------------------------------------------------------------------------------------------------------

    def sq_norms(self, keep: bool = False) -> Tensor:
        if self._formed is not None or (keep and self._is_worth_keeping):
            return energies(self.form())
        if self.prefers_gram:
            found, bound = self._sq_norms_by_gram()
            if not bool((found < CANCELLATION * bound).any()):
                return found
        found = self.x.new_empty(self.n_examples)
        if self._folds:
            for s in self._folded_pieces():
                found[s] = energies(self._folded(self.x[s], self.y[s]))
            return found
        for s in self._pieces(self.shape.numel() * self.x.element_size()):
            with _written_out(replace(self, x=self.x[s], y=self.y[s])) as rows:
                found[s] = energies(rows)
        return found

    def _sq_norms_by_gram(self) -> tuple[Tensor, Tensor]:
        """Squared norms, and the bound they would have if no two positions canceled."""
        b, groups, t, _, _ = self.sizes
        found, bound = self.x.new_empty(b), self.x.new_empty(b)
        largest = max((prod(along.n for along in phase) for phase in self._phases), default=0)
        per_example = groups * ((self.x.shape[1] * largest) ** 2 + 2 * t * t) * self.x.element_size()
        for s in self._pieces(per_example):
            left = self._split(self.x[s]).flatten(3)
            gram_left = left.mT @ left
            gram_right = self._patch_gram(self.y[s])
            diagonals = gram_left.diagonal(dim1=-2, dim2=-1), gram_right.diagonal(dim1=-2, dim2=-1)
            bound[s] = (diagonals[0] * diagonals[1]).sqrt().sum(2).square().sum(1)
            found[s] = gram_left.mul_(gram_right).sum((1, 2, 3))
        return found, bound

    def _patch_gram(self, y: Tensor) -> Tensor:
        """(n, groups, T, T) from y (n, images, channels, *extent)."""
        n, images = y.shape[:2]
        groups, t = self.sizes[1:3]
        y, total = self._split(y), None
        for phase in self._phases:
            part = y[(..., *(along.of_all for along in phase))]
            extent = part.shape[4:]
            flat = part.flatten(3)  # (n, groups, b, images * pixels)
            found = (flat.mT @ flat).reshape(n, groups, images, *extent, images, *extent)
            for d, (along, n_positions) in enumerate(zip(phase, self._positions, strict=True)):
                found = _met(found, along, n_positions, 3 + d, 4 + d + len(phase))
            total = found if total is None else total.add_(found)
        return y.new_zeros(n, groups, t, t) if total is None else total.reshape(n, groups, t, t)

    def _split(self, t: Tensor) -> Tensor:
        """(n, images, channels, ...) to (n, groups, channels of the group, images, ...)."""
        return t.unflatten(2, (self.sliding.groups, -1)).movedim(1, 3)

    @property
    def _is_worth_keeping(self) -> bool:
        """Whether norms and a sum are cheaper by rows that are formed and kept than without, where the sum is one more
        backward of the weight."""
        t = self.sizes[2]
        if self.formed_bytes > KEEP_BYTES or (self._folds and t < KEPT_POSITIONS):
            return False
        return self._forming_cost < self._gram_cost + SUM_WEIGHT * t * self.shape.numel()

    # -- rows ---------------------------------------------------------------------------------------------------------

    def form(self) -> Tensor:
        """(B, *shape); kept for the next question while it is small enough."""
        if self._formed is not None:
            return self._formed
        formed = self.write_out(memory.empty((self.n_examples, *self.shape), self.x))
        if self.formed_bytes <= KEEP_BYTES:
            self._formed = formed
        return formed

    @property
    def _folds(self) -> bool:
        """Whether the examples are folded into the groups of one backward."""
        if self.x.device.type != "cpu" or self.x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            return False
        return self.sliding.groups > 1 or min(self.shape[:2]) > FEW_CHANNELS

    def write_out(self, found: Tensor) -> Tensor:
        """The rows, written to (B, *shape)."""
        _, groups, t, a, b = self.sizes
        if self._folds and t > FEW_POSITIONS:
            for s in self._folded_pieces():
                found[s] = self._folded(self.x[s], self.y[s])
            return found
        for s in self._pieces(groups * t * b * found.element_size()):
            left, right = self._split(self.x[s]).flatten(3), self._patches(self.y[s])
            rows = found[s].view(len(left), groups, a, b)
            if a <= b:
                torch.matmul(left, right.mT, out=rows)
            else:  # a product with more columns than rows is faster
                rows.copy_((right @ left.mT).mT)
        return found

    def _folded(self, x: Tensor, y: Tensor) -> Tensor:
        """One backward of a weight whose groups are those of all examples."""
        n = len(x)
        if not n:
            return x.new_empty(0, *self.shape)
        x, y = (t.transpose(0, 1).flatten(1, 2) for t in (x, y))
        return self._backward(x, y, n).reshape(n, *self.shape)

    def _backward(self, x: Tensor, y: Tensor, n_folded: int = 1) -> Tensor:
        """(n_folded * shape[0], *shape[1:]) from x and y as batches of images."""
        padding = self.sliding.padding
        if not self.sliding.fills(y, self._positions):
            y, padding = self.sliding.padded(y, self._positions), (0,) * len(padding)
        weight = x.new_empty(n_folded * self.shape[0], *self.shape[1:])
        nothing = [0] * len(padding)
        moves = (self.sliding.stride, padding, self.sliding.dilation, False, nothing)
        groups = n_folded * self.sliding.groups
        return torch.ops.aten.convolution_backward(x, y, weight, None, *moves, groups, [False, True, False])[1]

    def _patches(self, y: Tensor) -> Tensor:
        """(n, groups, b * kernel, images * positions): a view of padded y with the kernel's dimensions, then copied."""
        y = self._split(self.sliding.padded(y, self._positions)).contiguous()
        n, groups, b, images = y.shape[:4]
        outer, moves = y.stride()[:4], y.stride()[4:]
        steps = [m * s for m, s in zip(moves, self.sliding.stride, strict=True)]
        reach = [m * d for m, d in zip(moves, self.sliding.dilation, strict=True)]
        view = y.as_strided(
            (n, groups, b, *self.sliding.kernel, images, *self._positions), (*outer[:3], *reach, outer[3], *steps)
        )
        return view.reshape(n, groups, self.sizes[4], self.sizes[2])

    # -- products -----------------------------------------------------------------------------------------------------

    def weighted_sum(self, c: Tensor) -> Tensor:
        c = c.to(self.x.dtype)
        if self._formed is not None:
            return (c @ self._formed.flatten(1)).reshape(self.shape)
        scaled = self.x * c.reshape(-1, *[1] * (self.x.ndim - 1))
        return self._backward(scaled.flatten(0, 1), self.y.flatten(0, 1))

    def dot(self, direction: Tensor) -> Tensor:
        direction = direction.to(self.x.dtype).reshape(self.shape)
        if self._formed is not None:
            return self._formed.flatten(1) @ direction.reshape(-1)
        moves = (self.sliding.stride, self.sliding.padding, self.sliding.dilation)
        nothing = [0] * len(self.sliding.padding)
        y = self.y.flatten(0, 1)
        found = torch.ops.aten.convolution(y, direction, None, *moves, False, nothing, self.sliding.groups)
        found = found[(..., *(slice(n) for n in self._positions))].reshape(self.x.shape)
        return (found * self.x).flatten(1).sum(1)

    def dense(self) -> Tensor:
        return self.form()

    def channels(self, part: slice) -> Convolved:
        """The rows of some output channels; only without groups."""
        x = self.x[:, :, part]
        return replace(self, x=x, shape=torch.Size((x.shape[2], *self.shape[1:])), _formed=None)

    def select(self, index: Tensor) -> Convolved:
        return replace(
            self,
            x=self.x[index],
            y=self.y[index],
            images=None if self.images is None else self.images[index],
            _formed=None,
        )

    def scaled(self, weights: Tensor) -> Convolved:
        x, y = self.x, self.y
        side = x if self.cotangent_left else y
        side = side * weights.to(side.dtype).reshape(-1, *[1] * (side.ndim - 1))
        return replace(self, x=side if self.cotangent_left else x, y=y if self.cotangent_left else side, _formed=None)

    # -- other forms --------------------------------------------------------------------------------------------------

    def outer(self) -> Outer:
        """With patches written out."""
        left = self._split(self.x).flatten(3).mT
        real = self.images
        if real is not None:
            real = real.repeat_interleave(prod(self._positions), 1)
        return Outer(left, self._patches(self.y).mT, self.shape, self.cotangent_left, real)

    @property
    def has_small_patches(self) -> bool:
        """Whether the patches take no more than y: positions that do not overlap."""
        return prod(self._positions) * prod(self.sliding.kernel) <= prod(self.y.shape[3:])

    def plain(self) -> Outer | Dense:
        """The smaller of patches and formed rows."""
        _, _, t, a, b = self.sizes
        return self.outer() if t * (a + b) < a * b else Dense(self.form())

    def condensed(self) -> Convolved | Dense:
        cotangents = self.x if self.cotangent_left else self.y
        takes_more = self.n_examples * self.shape.numel() > cotangents.numel()
        if takes_more or not self._is_worth_keeping:
            return self
        return Dense(self.form())

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.outer().factors()

    def with_cotangents(self, transform: Callable[[Tensor], Tensor]) -> Outer:
        return self.outer().with_cotangents(transform)

    def route(self) -> str:
        """How norms are taken and their multiply-adds."""
        n, _, t, _, _ = self.sizes
        if self.prefers_gram:
            return f"T={t} by Gram of pixels, {count(n * self._gram_count())} multiply-adds"
        return f"T={t} formed, {count(n * t * self.shape.numel())} multiply-adds"


def _met(pixels: Tensor, along: Pixels, n_positions: int, left: int, right: int) -> Tensor:
    """Of products of pixels, along the dimensions `left` and `right`, those of positions: the sum over the places of
    the kernel, each of which moves both sides. The products may be written to."""

    def part(t: Tensor, first: int, n: int) -> Tensor:
        return t.narrow(left, first, n).narrow(right, first, n)

    offsets = sorted(along.offsets, key=lambda offset: along.met(offset, n_positions) != (0, n_positions))
    windows = [(*along.met(offset, n_positions), offset) for offset in offsets]
    if windows[0][:2] == (0, n_positions):
        found = part(pixels, windows[0][2], n_positions)
        found = found.clone(memory_format=torch.contiguous_format) if len(windows) > 1 else found
        windows = windows[1:]
    else:
        shape = [n_positions if d in (left, right) else n for d, n in enumerate(pixels.shape)]
        found = pixels.new_zeros(shape)
    for first, n, offset in windows:
        if n:
            part(found, first, n).add_(part(pixels, first + offset, n))
    return found


def _gram(f: Convolved, g: Convolved) -> Tensor:
    """From formed rows, all at once where they are few, or for some channels of x at a time; or by positions."""
    b, groups, t, a, d = f.sizes
    other, _, s, _, _ = g.sizes
    by_positions = b * t * other * s * (a + d)
    by_rows = (b * t + (0 if g is f else other * s) + b * other) * a * d
    if groups > 1 or f.shape != g.shape or f._formed is not None or by_positions < by_rows:
        left = f.plain()
        return gram(left, left if g is f else g.plain())
    n_bytes = max(b, other) * a * d * f.x.element_size()
    if n_bytes > CHUNK_BYTES and max(t, s) <= FEW_POSITIONS:
        left = f.outer()
        return gram(left, left if g is f else g.outer())
    step = a if n_bytes <= CHUNK_BYTES else max(1, a * step_bytes(f.x) // n_bytes // CHANNELS) * CHANNELS
    found = f.x.new_zeros(b, other)
    for i in range(0, a, step):
        part = slice(i, i + step)
        found += product_of_lent(_written_out(f.channels(part)), None if g is f else _written_out(g.channels(part)))
    return found


@contextmanager
def _written_out(f: Convolved) -> Iterator[Tensor]:
    """(B, entries), to be used up at once."""
    with memory.scratch((f.n_examples, *f.shape), f.x) as rows:
        yield f.write_out(rows).flatten(1)


GRAM[Convolved, Convolved] = _gram
