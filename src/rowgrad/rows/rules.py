"""The table of rules: for a kind of node and one of its inputs, the rows in factors instead of one by one.

A rule looks at a use before the cotangents exist: it reads what the node saved, once, and returns a `Recipe`, or None
where the examples lie in a way it does not know. The recipe turns the node's cotangents into a form. What no rule takes
goes the general path. A rule's form has the shape of the input it speaks of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rowgrad.rows.factors import Dense, Form, Outer, wide
from rowgrad.rows.ownership import Axis, Edge, Grouping, Layout
from rowgrad.tape import Node, Tape

Cotangents = Sequence[Tensor | None]


@dataclass(frozen=True)
class Recipe:
    """How to make a form from the cotangents of the node's outputs."""

    build: Callable[[Cotangents], Form]
    route: str  # one word for `explain`
    needs_graph: bool = False  # calls the node, so its saved tensors must outlive the pass


@dataclass(frozen=True)
class Site:
    """A use as a rule sees it."""

    tape: Tape
    node: Node
    slot: int
    layouts: Mapping[Edge, Layout]
    n_examples: int

    @property
    def target_shape(self) -> torch.Size:
        target = self.node.slots[self.slot]
        assert target is not None
        return self.tape.nodes[target[0]].shape(target[1])

    def layout(self, output_nr: int = 0) -> Layout:
        return self.layouts[self.node.index, output_nr]

    def grouping(self, n_positions: int, order: Sequence[int] | None = None, output_nr: int = 0) -> Grouping | None:
        """By example, for tensors whose leading dimensions are those of the cotangent (permuted by `order`)."""
        layout, shape = self.layout(output_nr), self.node.shape(output_nr)
        if order is not None:
            shape = torch.Size(shape[d] for d in order)
            if isinstance(layout, Axis):
                layout = Axis(list(order).index(layout.dim), layout.inner)
            elif hasattr(layout, "owner"):
                layout = type(layout)(layout.owner.permute(*order))
        return Grouping.of(layout, shape, n_positions, self.n_examples)


Rule = Callable[[Site], Recipe | None]


def only(cotangents: Cotangents) -> Tensor:
    """The cotangent of a node with one output."""
    (z,) = cotangents
    assert z is not None
    return z


def _outer(
    site: Site,
    group: Grouping,
    data: Tensor,
    *,
    data_left: bool,
    transposed: bool,
    scale: float = 1,
) -> Recipe:
    """For z = h W (positions in rows), or z = W h with `transposed`, whose positions are columns."""
    h = data.mT if transposed else data
    shape = site.target_shape

    def build(cotangents: Cotangents) -> Form:
        z = only(cotangents)
        z = z.mT if transposed else z
        sides = [wide(group(t)).unsqueeze(1) for t in (h, z)]
        if scale != 1:
            sides[1] = sides[1] * scale
        left, right = sides if data_left else sides[::-1]
        return Outer(left, right, shape, cotangent_left=not data_left, positions=group.positions)

    return Recipe(build, "outer product")


def _scalar(value: object) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]


def matrix_second(site: Site, saved: str = "self", scale: str | None = None) -> Recipe | None:
    """z = h W: the weight is the second operand, positions are the rows of z."""
    group = site.grouping(1)
    if group is None:
        return None
    factor = _scalar(site.node.attribute(scale)) if scale else 1
    return _outer(
        site,
        group,
        site.node.saved(saved),
        data_left=True,
        transposed=False,
        scale=factor,
    )


def matrix_first(site: Site, saved: str = "mat2", scale: str | None = None) -> Recipe | None:
    """z = W h: the weight is the first operand, positions are the columns of z."""
    group = site.grouping(1, order=(1, 0))
    if group is None:
        return None
    factor = _scalar(site.node.attribute(scale)) if scale else 1
    return _outer(
        site,
        group,
        site.node.saved(saved),
        data_left=False,
        transposed=True,
        scale=factor,
    )


def batched(site: Site, *, weight_first: bool, saved: str, scale: str | None = None) -> Recipe | None:
    """z_g = h_g W_g or W_g h_g for a stack of matrices: examples along the positions, never along the stack."""
    order = (2, 0, 1) if weight_first else (1, 0, 2)
    group = site.grouping(1, order=order)
    if group is None:
        return None
    data = site.node.saved(saved)
    factor = _scalar(site.node.attribute(scale)) if scale else 1
    shape = site.target_shape

    def build(cotangents: Cotangents) -> Form:
        z = only(cotangents).permute(order)  # (positions, G, p)
        h = data.permute(order)
        sides = [wide(group(t)).transpose(1, 2) for t in (h, z)]  # (B, G, T, .)
        if factor != 1:
            sides[1] = sides[1] * factor
        left, right = sides[::-1] if weight_first else sides
        return Outer(left, right, shape, cotangent_left=weight_first, positions=group.positions)

    return Recipe(build, "outer product")


def elementwise(site: Site) -> Recipe | None:
    """A parameter broadcast over the examples: the node's own gradient before the broadcast is summed away."""
    z_shape, shape = site.node.shape(), site.target_shape
    reduce = reduce_broadcast(site, z_shape, shape)
    if reduce is None:
        return None

    def build(cotangents: Cotangents) -> Form:
        raw = site.tape.raw_local_gradients(site.node, cotangents)[site.slot]
        assert raw is not None
        target = site.node.slots[site.slot]
        assert target is not None
        if raw.is_complex() and not site.tape.nodes[target[0]].dtype(target[1]).is_complex:
            raw = raw.real
        return Dense(reduce(wide(raw.expand(z_shape))))

    return Recipe(build, "elementwise", needs_graph=True)


def reduce_broadcast(site: Site, z_shape: torch.Size, shape: torch.Size) -> Callable[[Tensor], Tensor] | None:
    """Sum (z_shape) to (B, *shape), each example by itself; None where `shape` itself runs along the examples."""
    n = site.n_examples
    layout = site.layout()
    padded = (1,) * (len(z_shape) - len(shape)) + tuple(shape)
    if n == 1:
        return lambda t: t.sum_to_size(shape).unsqueeze(0)
    if isinstance(layout, Axis) and padded[layout.dim] == 1:
        dim, inner = layout.dim, layout.inner
        outer = z_shape[dim] // (n * inner)
        summed = [d for d in range(len(z_shape)) if d != dim and padded[d] == 1 and z_shape[d] != 1]

        def reduce(t: Tensor) -> Tensor:
            t = t.sum(summed, keepdim=True) if summed else t
            t = t.reshape(*t.shape[:dim], outer, n, inner, *t.shape[dim + 1 :]).sum((dim, dim + 2))
            return t.movedim(dim, 0).reshape(n, *shape)

        return reduce
    n_features = 0
    while n_features < len(z_shape) and padded[len(z_shape) - 1 - n_features] != 1:
        n_features += 1
    while n_features > 0 and (group := site.grouping(len(z_shape) - n_features)) is None:
        n_features -= 1
    group = site.grouping(len(z_shape) - n_features)
    if group is None or any(s != 1 for s in padded[: len(z_shape) - n_features]):
        return None
    return lambda t: group(t).sum(1).reshape(n, *shape)


RULES: Mapping[tuple[str, int], Rule] = {}

# fmt: off
# (node kind, slot): rule                                             # what it is                    source
_TABLE: dict[tuple[str, int], Rule] = {
    ("MmBackward0", 1):       matrix_second,                            # z = h W                       Goodfellow 2015, section 4
    ("MmBackward0", 0):       matrix_first,                             # z = W h
    ("AddmmBackward0", 0):    elementwise,                              # bias of a linear layer
    ("AddmmBackward0", 1):    partial(matrix_first, saved="mat2", scale="alpha"),
    ("AddmmBackward0", 2):    partial(matrix_second, saved="mat1", scale="alpha"),
    ("BmmBackward0", 0):      partial(batched, weight_first=True, saved="mat2"),
    ("BmmBackward0", 1):      partial(batched, weight_first=False, saved="self"),
    ("BaddbmmBackward0", 0):  elementwise,
    ("BaddbmmBackward0", 1):  partial(batched, weight_first=True, saved="batch2", scale="alpha"),
    ("BaddbmmBackward0", 2):  partial(batched, weight_first=False, saved="batch1", scale="alpha"),
}
# fmt: on

_BROADCASTING = {
    "Add": 2, "Sub": 2, "Rsub": 2, "Mul": 2, "Div": 2, "Addcmul": 3, "Addcdiv": 3, "Where": 3, "Maximum": 2, "Minimum": 2,
    "Lerp": 3, "Expand": 1, "Pow": 2, "PreluKernel": 2, "Atan2": 2,
}  # fmt: skip
_TABLE |= {
    (f"{name}Backward{i}", slot): elementwise
    for name, n_slots in _BROADCASTING.items()
    for slot in range(n_slots)
    for i in range(2)
}
RULES = _TABLE
