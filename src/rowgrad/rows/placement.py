"""Where the tensor that a use sees lies inside its parameter.

A weight often reaches its use through views: transposed, sliced, split, reshaped, cast. The views are replayed on a
tensor without storage, whose shape, strides and offset then say which entries of the parameter the use sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowgrad.rows.factors import Dense, Form, Outer
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
    """A strided region of a parameter, by its logical (row-major) order."""

    leaf: int
    view: Tensor  # on the meta device

    @classmethod
    def whole(cls, leaf: int, shape: Sequence[int]) -> Place:
        return cls(leaf, torch.empty(tuple(shape), device="meta"))

    @property
    def key(self) -> tuple:
        kept = [(n, s) for n, s in zip(self.view.shape, self.view.stride(), strict=True) if n != 1]
        return (self.view.storage_offset(), tuple(kept))

    def span(self) -> tuple[int, int]:
        """First and last position touched."""
        start = int(self.view.storage_offset())
        return start, start + sum((n - 1) * int(s) for n, s in zip(self.view.shape, self.view.stride(), strict=True))


def place_of(tape: Tape, target: tuple[int, int]) -> Place | None:
    """The region of a parameter that `target` is a view of, or None if it is computed from parameters otherwise."""
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
    view = torch.empty(variable.shape, device="meta")
    for node, nr in reversed(chain):
        try:
            view = VIEWS[node.kind](node, nr, view)
        except RuntimeError:
            return None  # a reshape that copies: no strided region
    return Place(target[0], view)


def settle(form: Form, place: Place) -> tuple[Form, Place]:
    """The same rows with the form turned so that its memory order follows the parameter's, where it can be."""
    if isinstance(form, Outer) and form.sizes[1] == 1:
        matrix = _as_matrix(place.view, form.sizes[3], form.sizes[4])
        if matrix is not None and matrix.shape[0] > 1 and matrix.stride(0) < matrix.stride(1):
            turned = matrix.transpose(0, 1)
            flat = Outer(
                form.left,
                form.right,
                matrix.shape,
                form.cotangent_left,
                form.positions,
                form._formed,
            )
            return flat.transposed(), Place(place.leaf, turned)
    if isinstance(form, Outer) and form.sizes[1] > 1 and _is_turned_stack(place.view, form):
        return form.transposed(), Place(place.leaf, place.view.transpose(1, 2))
    if isinstance(form, Dense):
        return _settle_dense(form, place)
    return form, place


def _is_turned_stack(view: Tensor, form: Outer) -> bool:
    _, groups, _, a, b = form.sizes
    return view.shape == (groups, a, b) and view.stride(1) < view.stride(2)


def _as_matrix(view: Tensor, a: int, b: int) -> Tensor | None:
    kept = [d for d in range(view.ndim) if view.shape[d] != 1]
    if len(kept) == 2 and [view.shape[d] for d in kept] == [a, b]:
        return view.squeeze()
    return None


def _settle_dense(form: Dense, place: Place) -> tuple[Dense, Place]:
    order = sorted(range(place.view.ndim), key=lambda d: -place.view.stride(d))
    if order == list(range(place.view.ndim)):
        return form, place
    return Dense(form.values.permute(0, *(d + 1 for d in order))), Place(place.leaf, place.view.permute(order))
