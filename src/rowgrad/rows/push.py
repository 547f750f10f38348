"""Forms pushed through the nodes between parameters and a weight computed from them.

Where a weight is computed (a merged low-rank update, a scaled or normalized weight) a rule knows its rows at the
weight. Every node below is linear in the cotangent and the same for all examples, and some turn factors into factors:
a product multiplies one side of an outer product, a scale along the rows or columns one side of it, and a mask or a
function of single entries all entries (rows/hadamard.py). What a node does not take in factors is left for the general
path, from that node on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from rowgrad.rows.block import joined_outers
from rowgrad.rows.factors import Dense, Form, Outer, Rows, handed_out, in_type, let_go, wide
from rowgrad.rows.hadamard import times
from rowgrad.rows.lookup import NO_PADDING, flat_ids, leading_ids
from rowgrad.rows.ownership import Edge
from rowgrad.rows.placement import Place, place_of
from rowgrad.rows.projected import Projected
from rowgrad.rows.structure import ELEMENTWISE
from rowgrad.tape import Node, Tape, signed


@dataclass(frozen=True)
class Arrival:
    """A form at the output of one node, about to pass it."""

    tape: Tape
    node: Node
    form: Form
    max_bytes: int  # rows written out on the way take no more

    def target(self, slot: int) -> Node:
        return self.tape.nodes[self._edge(slot)[0]]

    def target_shape(self, slot: int) -> torch.Size:
        return self.target(slot).shape(self._edge(slot)[1])

    def _edge(self, slot: int) -> Edge:
        edge = self.node.slots[slot]
        assert edge is not None
        return edge


Push = Callable[[Arrival, int], Form | None]  # (arrival, slot); None: not in factors


def push(
    tape: Tape, seeds: Iterable[tuple[Edge, Form]], needed: Sequence[bool], max_bytes: int
) -> tuple[list[tuple[Place, Form]], list[tuple[Edge, Form]]]:
    """The forms that reach a parameter or a strided part of one, and those that some node does not take in factors.

    max_bytes: what those that arrive written out may take in all.
    """
    inbox: dict[Edge, list[Form]] = {}
    for edge, form in seeds:
        inbox.setdefault(edge, []).append(form)
    placed: list[tuple[Place, Form]] = []
    left: list[tuple[Edge, Form]] = []
    while inbox:
        edge = min(inbox)
        forms, place = joined_outers(inbox.pop(edge)), place_of(tape, edge)
        for form in forms:
            if place is not None:
                placed.append((place, form))
                max_bytes -= written_out_bytes(form)
                continue
            arrival = Arrival(tape, tape.nodes[edge[0]], form, max_bytes)
            arrival = _in_shape(arrival, arrival.node.shape(edge[1]))
            pushed = None if arrival is None else _through(arrival, needed)
            let_go(form)  # rows that were formed on the way are held by what came of them
            if pushed is None:
                left.append((edge, form))
                continue
            for target, part in pushed.items():
                inbox.setdefault(target, []).append(part)
    return placed, left


def _in_shape(arrival: Arrival, shape: torch.Size) -> Arrival | None:
    """Looked-up rows of a table with several leading dimensions come flat: written out, in the table's shape."""
    if arrival.form.shape == shape:
        return arrival
    rows = _written_out(arrival)
    return None if rows is None else replace(arrival, form=Dense(rows.reshape(-1, *shape)))


def _through(arrival: Arrival, needed: Sequence[bool]) -> dict[Edge, Form] | None:
    """Form by edge below the node; None where it cannot answer for every one of them."""
    node, tape = arrival.node, arrival.tape
    slots = [(slot, t) for slot, t in enumerate(node.slots) if t is not None and needed[t[0]]]
    outputs = [nr for nr in range(node.n_outputs) if node.is_traced(nr)]
    edges = [*((node.index, nr) for nr in outputs), *(target for _, target in slots)]
    if any(tape.nodes[i].dtype(nr).is_complex for i, nr in edges):
        return None  # the rules below are those of real numbers
    found: dict[Edge, Form] = {}
    for slot, target in slots:
        rule = PUSHES.get((node.kind, slot), _entrywise if node.kind in ELEMENTWISE else None)
        part = rule(arrival, slot) if rule is not None and target not in found else None
        if part is None:
            return None
        found[target] = part
    return found


def _as_outer(arrival: Arrival) -> Form:
    """The form as an outer product, or written out where that is smaller and fits."""
    return arrival.form.plain() if isinstance(arrival.form, Outer) or _fits(arrival) else arrival.form


def written_out_bytes(form: Form) -> int:
    """Of rows that the form holds as such."""
    return form.values.nbytes if isinstance(form, Dense) else 0


def _transposed(arrival: Arrival, slot: int) -> Form | None:
    """A matrix with its two dimensions exchanged."""
    form = _as_outer(arrival)
    if arrival.node.kind == "PermuteBackward0" and [signed(d) % 2 for d in arrival.node.attribute("dims")] != [1, 0]:
        return None
    if arrival.node.kind == "TransposeBackward0":
        first, second = (arrival.node.dim(name, len(form.shape)) for name in ("dim0", "dim1"))
        if first == second:
            return form
    if isinstance(form, Outer) and form.shape == form.sizes[3:]:
        return form.transposed()
    return None


def _same_order(arrival: Arrival, slot: int) -> Form | None:
    form, shape = _as_outer(arrival), arrival.target_shape(slot)
    if isinstance(form, Outer) and form.shape.numel() == shape.numel():
        return replace(form, shape=shape)
    return form if form.shape == shape else None


def _term(sign: int = 1, scale: str | None = None) -> Push:
    """One side of a sum."""

    def through(arrival: Arrival, slot: int) -> Form | None:
        if arrival.target_shape(slot) != arrival.form.shape:
            return None
        alpha = float(arrival.node.attribute(scale)) if scale else 1.0
        return _times(arrival.form, sign * alpha)

    return through


def _times(form: Form, number: float | Tensor) -> Form:
    if isinstance(number, float) and number == 1:
        return form
    like = form.held[0]
    return form.scaled(torch.as_tensor(number, dtype=like.dtype, device=like.device).expand(form.n_examples))


def _factor(arrival: Arrival, slot: int) -> Form | None:
    """One side of an elementwise product: a mask, a scale of all, of the rows or of the columns."""
    node, shape = arrival.node, arrival.target_shape(slot)
    other = wide(node.saved("self" if slot else "other"))
    if shape.numel() == 1 and arrival.form.shape.numel() != 1:
        return Dense(arrival.form.dot(other.expand(arrival.form.shape)).reshape(-1, *shape))
    if shape != arrival.form.shape:
        return _contracted(arrival, other, shape)
    return _along(arrival, other)


def _along(arrival: Arrival, other: Tensor) -> Form:
    form, shape = arrival.form, arrival.form.shape
    if other.numel() == 1:
        return _times(form, other.reshape(()))
    if isinstance(form, Outer) and shape == form.sizes[3:]:
        other = other.reshape((1,) * (2 - other.ndim) + tuple(other.shape))
        if other.shape[1] == 1:
            return replace(form, left=form.left * other.T, _formed=None, _cancels=None)
        if other.shape[0] == 1:
            return replace(form, right=form.right * other, _formed=None, _cancels=None)
    return times(form, other.expand(shape))


def _contracted(arrival: Arrival, other: Tensor, shape: torch.Size) -> Form | None:
    """Gradient of a scale of the rows (a, 1) or of the columns (b,) or (1, b)."""
    form = _as_outer(arrival)
    if not isinstance(form, Outer) or not form.shape == form.sizes[3:] == other.shape:
        return None
    a, b = form.shape
    matrix = other.to(form.left.dtype)
    if tuple(shape) == (a, 1):
        return Dense((form.left[:, 0] * (form.right[:, 0] @ matrix.T)).sum(1).reshape(-1, *shape))
    if tuple(shape) in ((b,), (1, b)):
        return Dense((form.right[:, 0] * (form.left[:, 0] @ matrix)).sum(1).reshape(-1, *shape))
    return None


def _entrywise(arrival: Arrival, slot: int) -> Form | None:
    """An input of a function of single entries: times its derivative there."""
    node, shape = arrival.node, arrival.form.shape
    traced = [node.is_traced(nr) for nr in range(node.n_outputs)]  # others are masks for the node itself
    if traced.count(True) != 1 or arrival.target_shape(slot) != shape:
        return None
    dtype = node.dtype(traced.index(True))
    if dtype not in (torch.float32, torch.float64):
        return None  # the derivative may be out of range where its product with a cotangent is not
    ones = torch.ones(shape, dtype=dtype, device=arrival.form.held[0].device)
    derivative = arrival.tape.raw_local_gradients(node, [ones if is_traced else None for is_traced in traced])[slot]
    return None if derivative is None else times(arrival.form, wide(derivative))


def _numerator(arrival: Arrival, slot: int) -> Form | None:
    other = wide(arrival.node.saved("other"))
    if arrival.target_shape(slot) != arrival.form.shape:
        return None
    if other.numel() == 1:
        other = other.reshape(())  # no Python number any longer, of which the reciprocal is in the default dtype
    return _along(arrival, _as_wide(other, arrival.form).reciprocal())


def _as_wide(other: Tensor, form: Form) -> Tensor:
    """In the dtype of the rows at least: what divides a tensor may be narrower than it."""
    return other.to(torch.promote_types(other.dtype, form.held[0].dtype))


def _denominator(arrival: Arrival, slot: int) -> Form | None:
    """Of a division by one number."""
    shape = arrival.target_shape(slot)
    if shape.numel() != 1:
        return None
    top, bottom = (wide(arrival.node.saved(name)) for name in ("self", "other"))
    direction = -top / _as_wide(bottom.reshape(()), arrival.form).square()
    return Dense(arrival.form.dot(direction.expand(arrival.form.shape)).reshape(-1, *shape))


def _first_of_product(arrival: Arrival, slot: int) -> Form | None:
    """W = X Y: the rows of X are those of W times Y^T."""
    form, shape = _as_outer(arrival), arrival.target_shape(slot)
    y = in_type(wide(arrival.node.saved("mat2")), form.held[0].dtype)
    if isinstance(form, Outer) and _is_stack(form):
        return replace(form, right=form.right @ y.mT, shape=shape, _formed=None, _cancels=None)
    if isinstance(form, Rows):
        return replace(form, rows=form.rows @ y.mT, shape=shape)
    rows = _written_out(arrival)
    return None if rows is None else Dense(rows @ y.mT)


def _second_of_product(arrival: Arrival, slot: int) -> Form | None:
    """W = X Y: the rows of Y are X^T times those of W."""
    form, shape = _as_outer(arrival), arrival.target_shape(slot)
    x = in_type(wide(arrival.node.saved("self")), form.held[0].dtype)
    if isinstance(form, Outer) and _is_stack(form):
        return replace(form, left=form.left @ x, shape=shape, _formed=None, _cancels=None)
    if isinstance(form, Rows):
        left, right = x[form.ids].unsqueeze(1), form.rows.unsqueeze(1)
        return Outer(left, right, shape, cotangent_left=False, positions=form.positions)
    rows = _written_out(arrival)
    return None if rows is None else Dense(x.mT @ rows)


def _is_stack(form: Outer) -> bool:
    """Whether the groups are a leading dimension, or there is only one."""
    _, g, _, a, b = form.sizes
    return tuple(form.shape) in ((a, b), (g, a, b)) and (g == 1 or len(form.shape) == 3)


def _direction(arrival: Arrival, slot: int) -> Form | None:
    """W = g v / |v| along one dimension: the rows of v lose their part along v."""
    unit, scale, form = _weight_norm(arrival)
    if isinstance(form, Outer) and form.shape == (form.sizes[3], form.sizes[4]) == unit.shape:
        scaled = replace(form, left=form.left * scale.T, _formed=None, _cancels=None)
        return Projected(scaled, unit)
    rows = _written_out(arrival)
    if rows is None:
        return None
    dims = [d for d in range(1, rows.ndim) if scale.shape[d - 1] == 1]
    return Dense(scale * (rows - _summed(rows * unit, dims) * unit))


def _length(arrival: Arrival, slot: int) -> Form | None:
    """W = g v / |v|: the rows of g are those of W along v."""
    unit, scale, form = _weight_norm(arrival)
    if isinstance(form, Outer) and form.shape == (form.sizes[3], form.sizes[4]) == unit.shape:
        return _contracted(arrival, unit, arrival.target_shape(slot))
    rows = _written_out(arrival)
    if rows is None:
        return None
    dims = [d for d in range(1, rows.ndim) if scale.shape[d - 1] == 1]
    return Dense(_summed(rows * unit, dims))


def _summed(rows: Tensor, dims: list[int]) -> Tensor:
    return rows.sum(dims, keepdim=True) if dims else rows


def _weight_norm(arrival: Arrival) -> tuple[Tensor, Tensor, Form | None]:
    """v / |v|, g / |v|, and the form where the norm is taken along the rows of a matrix."""
    v, g, norm = (wide(arrival.node.saved(name)) for name in ("v", "g", "result1"))
    along_rows = v.ndim == 2 and arrival.node.dim("dim", 2) == 0
    return v / norm.to(v.dtype), g / norm.to(v.dtype), _as_outer(arrival) if along_rows else None


def _embedded(arrival: Arrival, slot: int) -> Form | None:
    """Rows of a table looked up once for all examples: positions, for the most part."""
    node = arrival.node
    if node.attribute("scale_grad_by_freq"):
        return None
    padding = signed(node.attribute("padding_idx"))
    return _looked_up(arrival, slot, node.saved("indices"), 1, padding, node.attribute("sparse"))


def _indexed(arrival: Arrival, slot: int) -> Form | None:
    """Likewise by indexing the leading dimensions of a table: relative positions."""
    shape = arrival.target_shape(slot)
    indices = leading_ids(arrival.node)
    return None if indices is None else _looked_up(arrival, slot, flat_ids(indices, shape), len(indices))


def _looked_up(
    arrival: Arrival, slot: int, ids: Tensor, n_leading: int, padding: int = NO_PADDING, sparse: bool = False
) -> Form | None:
    shape = arrival.target_shape(slot)
    if not _fits(arrival):
        return None
    rows = handed_out(arrival.form)  # which may go to another parameter as well
    table = torch.Size((prod(shape[:n_leading]), prod(shape[n_leading:])))
    ids = ids.reshape(1, -1).long().expand(len(rows), -1)
    rows = rows.reshape(*ids.shape, table[1])
    real = None if padding == NO_PADDING else ids != padding
    return Rows(ids, rows if real is None else torch.where(real.unsqueeze(-1), rows, 0.0), table, sparse, real)


def _written_out(arrival: Arrival) -> Tensor | None:
    return arrival.form.dense() if _fits(arrival) else None


def _fits(arrival: Arrival) -> bool:
    return arrival.form.n_examples * arrival.form.shape.numel() * 8 <= arrival.max_bytes


# fmt: off
# (kind of node, input)            -> the form at the input
PUSHES: Mapping[tuple[str, int], Push] = {
    ("TBackward0", 0):                  _transposed,
    ("TransposeBackward0", 0):          _transposed,
    ("PermuteBackward0", 0):            _transposed,
    ("NumpyTBackward0", 0):             _transposed,
    ("ViewBackward0", 0):               _same_order,
    ("UnsafeViewBackward0", 0):         _same_order,
    ("ReshapeAliasBackward0", 0):       _same_order,
    ("UnsqueezeBackward0", 0):          _same_order,
    ("SqueezeBackward0", 0):            _same_order,
    ("SqueezeBackward1", 0):            _same_order,
    ("SqueezeBackward2", 0):            _same_order,
    ("AliasBackward0", 0):              _same_order,
    ("CloneBackward0", 0):              _same_order,
    ("ToCopyBackward0", 0):             _same_order,
    ("NegBackward0", 0):                _term(-1),
    ("AddBackward0", 0):                _term(),
    ("AddBackward0", 1):                _term(scale="alpha"),
    ("SubBackward0", 0):                _term(),
    ("SubBackward0", 1):                _term(-1, scale="alpha"),
    ("MulBackward0", 0):                _factor,
    ("MulBackward0", 1):                _factor,
    ("DivBackward0", 0):                _numerator,
    ("DivBackward0", 1):                _denominator,
    ("MmBackward0", 0):                 _first_of_product,
    ("MmBackward0", 1):                 _second_of_product,
    ("BmmBackward0", 0):                _first_of_product,
    ("BmmBackward0", 1):                _second_of_product,
    ("EmbeddingBackward0", 0):          _embedded,
    ("IndexBackward0", 0):              _indexed,
    ("WeightNormInterfaceBackward0", 0): _direction,
    ("WeightNormInterfaceBackward0", 1): _length,
}
# fmt: on
