"""Where the tensor that a use sees lies inside its parameter.

A weight often reaches its use through views: transposed, sliced, split, reshaped, cast. The views are replayed on a
tensor without storage, whose shape, strides and offset then say which entries of the parameter the use sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from rowgrad.rows.factors import Dense, Form, Outer
from rowgrad.rows.hadamard import Hadamard
from rowgrad.tape import Node, Tape, signed


def _same_order(node: Node, nr: int, t: Tensor) -> Tensor:
    return t.view(node.shape(nr))


def _identity(node: Node, nr: int, t: Tensor) -> Tensor:
    return t


def _slice(node: Node, nr: int, t: Tensor) -> Tensor:
    dim, step = node.dim("dim", t.ndim), signed(node.attribute("step"))
    start, end = signed(node.attribute("start")), signed(node.attribute("end"))
    return t[(slice(None),) * dim + (slice(start, end, step),)]


def _split(node: Node, nr: int, t: Tensor) -> Tensor:
    size = node.attribute("split_size")
    return t.split(size, node.dim("dim", t.ndim))[nr]


def _split_with_sizes(node: Node, nr: int, t: Tensor) -> Tensor:
    return t.split(list(node.attribute("split_sizes")), node.dim("dim", t.ndim))[nr]


# fmt: off
# kind of a view or cast               -> the forward operation again, on any tensor
VIEWS: dict[str, Callable[[Node, int, Tensor], Tensor]] = {
    "TBackward0":               lambda n, nr, t: t.t(),
    "TransposeBackward0":       lambda n, nr, t: t.transpose(n.dim("dim0", t.ndim), n.dim("dim1", t.ndim)),
    "PermuteBackward0":         lambda n, nr, t: t.permute([signed(d) for d in n.attribute("dims")]),
    "NumpyTBackward0":          lambda n, nr, t: t.permute(*reversed(range(t.ndim))),
    "ViewBackward0":            _same_order,
    "UnsafeViewBackward0":      _same_order,
    "ReshapeAliasBackward0":    _same_order,
    "UnsqueezeBackward0":       _same_order,
    "SqueezeBackward0":         _same_order,
    "SqueezeBackward1":         _same_order,
    "SqueezeBackward2":         _same_order,
    "AliasBackward0":           _identity,
    "CloneBackward0":           _identity,
    "ToCopyBackward0":          _identity,
    "SliceBackward0":           _slice,
    "SelectBackward0":          lambda n, nr, t: t.select(n.dim("dim", t.ndim), signed(n.attribute("index"))),
    "SplitBackward0":           _split,
    "UnsafeSplitBackward0":     _split,
    "SplitWithSizesBackward0":  _split_with_sizes,
    "UnsafeSplitWithSizesBackward0": _split_with_sizes,
    "UnbindBackward0":          lambda n, nr, t: t.unbind(n.dim("dim", t.ndim))[nr],
}
# fmt: on


@dataclass(frozen=True)
class Place:
    """A strided region of a parameter, by its logical (row-major) order.

    Places are kept with the layouts of a graph, so that what follows from one is worked out once.
    """

    leaf: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @classmethod
    def whole(cls, leaf: int, shape: Sequence[int]) -> Place:
        return cls(leaf, tuple(shape), row_major(shape))

    @cached_property
    def key(self) -> tuple:
        """Equal for places that see the same entries in the same order."""
        kept = [(n, s) for n, s in zip(self.shape, self.stride, strict=True) if n != 1]
        return (self.offset, *kept)

    @cached_property
    def numel(self) -> int:
        return prod(self.shape)

    @cached_property
    def is_contiguous(self) -> bool:
        expected = row_major(self.shape)
        return all(n == 1 or s == e for n, s, e in zip(self.shape, self.stride, expected, strict=True))

    def covers(self, numel: int) -> bool:
        """Whether it is all of a parameter with so many entries, in its own order."""
        return self.offset == 0 and self.numel == numel and self.is_contiguous

    def span(self) -> tuple[int, int]:
        """First and last position touched."""
        return self.offset, self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    def permuted(self, order: Sequence[int]) -> Place:
        shape, stride = (tuple(of[d] for d in order) for of in (self.shape, self.stride))
        return Place(self.leaf, shape, stride, self.offset)

    @cached_property
    def reorder(self) -> tuple[list[int], Place] | None:
        """The dimensions in the order of memory and the place so turned; None where they are."""
        order = sorted(range(len(self.shape)), key=lambda d: -self.stride[d])
        return None if order == list(range(len(order))) else (order, self.permuted(order))

    @cached_property
    def turned(self) -> tuple[torch.Size, Place] | None:
        """For a matrix seen transposed: its sizes as seen, and the place turned back."""
        kept = [d for d, n in enumerate(self.shape) if n != 1]
        if not kept or self.stride[kept[-2:][0]] >= self.stride[kept[-1]]:
            return None
        if len(kept) == 2:
            return torch.Size(self.shape[d] for d in kept), self.permuted((kept[1], kept[0]))
        return torch.Size(self.shape), self.permuted((0, 2, 1)) if len(self.shape) == 3 else self


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides, behind = [], 1
    for size in reversed(shape):
        strides.append(behind)
        behind *= max(1, size)
    return tuple(reversed(strides))


def place_of(tape: Tape, target: tuple[int, int]) -> Place | None:
    """The region of a parameter that `target` is a view of, or None if it is computed from parameters otherwise.

    A complex number made of a real parameter is computed from it: of its gradient the real part counts.
    """
    if tape.nodes[target[0]].dtype(target[1]).is_complex:
        return None
    chain = []
    while not tape.nodes[target[0]].is_leaf:
        node = tape.nodes[target[0]]
        live = [t for t in node.slots if t is not None]
        if node.kind not in VIEWS or len(live) != 1:
            return None
        chain.append((node, target[1]))
        target = live[0]
    variable = tape.nodes[target[0]].variable
    assert variable is not None
    if not chain:
        return Place.whole(target[0], variable.shape)
    view = torch.empty(variable.shape, device="meta")
    for node, nr in reversed(chain):
        try:
            view = VIEWS[node.kind](node, nr, view)
        except RuntimeError:
            return None  # a reshape that copies: no strided region
    return Place(target[0], tuple(view.shape), view.stride(), int(view.storage_offset()))


def settle(form: Form, place: Place) -> tuple[Form, Place]:
    """The same rows with the form turned so that its memory order follows the parameter's, where it can be."""
    if isinstance(form, Outer):
        return _settle_outer(form, place)
    if isinstance(form, Hadamard) and isinstance(form.whole, Outer):
        whole, turned = _settle_outer(form.whole, place)
        if whole is not form.whole:
            form = Hadamard(whole, form.factor.reshape((*whole.shape[:-2], whole.shape[-1], whole.shape[-2])).mT)
        return form, turned
    if isinstance(form, Dense) and place.reorder is not None:
        order, reordered = place.reorder
        return Dense(form.values.permute(0, *(d + 1 for d in order))), reordered
    return form, place


def _settle_outer(form: Outer, place: Place) -> tuple[Outer, Place]:
    if place.turned is None:
        return form, place
    seen, turned = place.turned
    _, groups, _, a, b = form.sizes
    if groups == 1 and seen == (a, b):
        return form.transposed(seen), turned
    if groups > 1 and seen == (groups, a, b):
        return form.transposed(), turned
    return form, place
