"""Names for what is on a tape: parameters exactly, operations after the nearest parameter before them.

Note [names of operations]
    Autograd's graph knows no modules. An operation is named after the parameter from which it is reached in the fewest
    steps, the latest of several: `fc1: addmm` where that parameter enters, `after fc1: relu` behind it. Such a name is
    a guess and marked `inferred`. Where the forward pass ran under `rowgrad.trace`, the module an operation ran in is
    known, and its name is exact; one that ran in the model itself keeps such a name and belongs to no module.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import torch

from rowgrad.graph.scopes import Scopes
from rowgrad.tape import Node, Tape

Edge = tuple[int, int]  # a node's index and the number of one of its outputs

# Operations that move or copy entries and compute nothing: no steps of a path's length.
MOVES = frozenset(
    {
        "alias", "as_strided", "cat", "clone", "contiguous", "copy", "detach", "diagonal", "expand", "flatten", "flip",
        "movedim", "narrow", "permute", "repeat", "reshape", "reshape_alias", "roll", "select", "slice", "split",
        "split_with_sizes", "squeeze", "stack", "swapaxes", "t", "to_copy", "transpose", "unbind", "unfold",
        "unsafe_split", "unsafe_split_with_sizes", "unsafe_view", "unsqueeze", "view", "view_as", "view_as_complex",
        "view_as_real",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Vertex:
    """One vector variable of the graph: what an operation returned, or a leaf.

    Attributes:
        index: position on the tape; the loss comes first, each variable before those it was computed from.
        name: unique in its graph; a parameter's name, `after fc1: relu`, or under `trace` `fc1: addmm`.
        op: the operation in autograd's words, `parameter` or `leaf`.
        module: name of the module it belongs to, as far as known; "" outside of all.
        inferred: whether `module` is a guess, see Note [names of operations].
        shapes: of the operation's outputs.
        inputs: for each input of the operation (vertex index, output number), None for a constant.
        steps: 0 for operations that only move entries and for leaves, else 1.
        time: when the operation was recorded, a count within its thread; leaves carry the largest number.
    """

    index: int
    name: str
    op: str
    module: str
    inferred: bool
    shapes: tuple[torch.Size, ...]
    inputs: tuple[Edge | None, ...]
    steps: int
    time: int = 0

    @property
    def is_leaf(self) -> bool:
        return self.op in {"parameter", "leaf"}

    @property
    def slots(self) -> tuple[Edge | None, ...]:
        return self.inputs

    @property
    def n_outputs(self) -> int:
        return len(self.shapes)

    def __str__(self) -> str:
        shape = ", ".join(str(tuple(s)) for s in self.shapes)
        return f"{self.name} {shape}"


def operation(node: Node) -> str:
    """`AddmmBackward0` is addmm, `MaxPool2DWithIndicesBackward0` is max_pool2d_with_indices."""
    bare = re.sub(r"Backward\d*$", "", node.kind.rsplit(":", 1)[-1]) or node.kind
    bare = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])", "_", bare)
    return bare.lower().strip("_")


def vertices(tape: Tape, parameters: Mapping[int, str], scopes: Scopes | None) -> tuple[Vertex, ...]:
    """All of a tape, named; `parameters` maps a leaf's index to its name."""
    owners = _owners(tape, parameters)
    labels = [_label(node, parameters, owners[node.index], scopes) for node in tape.nodes]
    names = _unique([label.name for label in labels])
    return tuple(
        Vertex(
            node.index,
            name,
            label.op,
            label.module,
            label.inferred,
            tuple(node.shape(nr) for nr in range(node.n_outputs)),
            node.slots,
            0 if node.is_leaf or label.op in MOVES else 1,
            node.time,
        )
        for node, label, name in zip(tape.nodes, labels, names, strict=True)
    )


class _Label(NamedTuple):
    name: str
    op: str
    module: str
    inferred: bool


class _Owner(NamedTuple):
    """The nearest parameter before a node and how many steps away it is; 0 for views of the parameter itself."""

    parameter: str | None
    steps: float


def _owners(tape: Tape, parameters: Mapping[int, str]) -> list[_Owner]:
    found = [_Owner(None, inf)] * len(tape)
    for node in reversed(tape.nodes):
        if node.index in parameters:
            found[node.index] = _Owner(parameters[node.index], 0)
            continue
        live = [t[0] for t in node.slots if t is not None]
        if live:
            nearest = min(live, key=lambda i: (found[i].steps, i))
            is_view = len(live) == 1 and operation(node) in MOVES and found[nearest].steps == 0
            found[node.index] = _Owner(found[nearest].parameter, found[nearest].steps + (0 if is_view else 1))
    return found


def _label(node: Node, parameters: Mapping[int, str], owner: _Owner, scopes: Scopes | None) -> _Label:
    if node.index in parameters:
        name = parameters[node.index]
        return _Label(name, "parameter", module_of(name), False)
    if node.is_leaf:
        return _Label("leaf", "leaf", "", False)
    op = operation(node)
    scope = None if scopes is None else scopes.of(node.time)
    if scope:
        return _Label(f"{scope}: {op}", op, scope, False)
    module, name = _nearest(op, owner)
    return _Label(name, op, module if scope is None else "", scope is None)


def _nearest(op: str, owner: _Owner) -> tuple[str, str]:
    """Module and name of an operation after the nearest parameter before it."""
    if owner.parameter is None:
        return "", op
    if owner.steps == 0:
        return module_of(owner.parameter), f"{owner.parameter}: {op}"
    module = module_of(owner.parameter) or owner.parameter
    return module, f"{module}: {op}" if owner.steps == 1 else f"after {module}: {op}"


def module_of(parameter: str) -> str:
    """`fc1.weight` belongs to `fc1`."""
    return parameter.rpartition(".")[0]


def _unique(names: Sequence[str]) -> list[str]:
    """Numbered in the order of the forward pass where one name stands for several."""
    total, seen, found = Counter(names), Counter[str](), list(names)
    for i in reversed(range(len(names))):
        name = names[i]
        seen[name] += 1
        if total[name] > 1:
            found[i] = f"{name} #{seen[name]}"
    return found
