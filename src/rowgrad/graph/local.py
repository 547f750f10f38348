"""The Jacobian of one operation, written out: J of Aggarwal's eq. 10."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rowgrad.errors import GraphError
from rowgrad.graph.sweep import Cotangents
from rowgrad.graph.variables import Variables
from rowgrad.graph.vertices import MOVES, Edge, Vertex

Form = Literal["dense", "diagonal", "selection"]


@dataclass(frozen=True)
class LocalJacobian:
    """J of eq. 10: entry (k, r) is the derivative of the operation's k-th output entry in its r-th input entry.

    Attributes:
        matrix: (output entries, input entries), both in row-major order; Z of eq. 9 is its transpose.
        form: "diagonal" where each entry was changed by itself, as by an activation; "selection" where each output
            entry is an input entry or 0, as in a view or a maximum; "dense" else. Read off the entries; where a matrix
            is both, an operation that moves entries selects and any other is diagonal.
        vertex: the operation.
        source: the variable at its input.
    """

    matrix: Tensor
    form: Form
    vertex: Vertex
    source: Vertex

    def __repr__(self) -> str:
        rows, columns = self.matrix.shape
        return f"LocalJacobian({self.vertex.name} in {self.source.name}: {rows} x {columns}, {self.form})"


def local_jacobian(graph: Variables, vertex: Vertex, slot: int, output: int, limit: int) -> LocalJacobian:
    """One call of the operation per row, each with a basis vector as cotangent."""
    source = _source(vertex, slot, output)
    if (vertex.index, output) not in graph.outputs and not graph.readers((vertex.index, output)):
        raise GraphError(f"output {output} of {vertex.name}: no path leads from it to a loss")
    rows, columns = vertex.shapes[output], graph.vertices[source[0]].shapes[source[1]]
    if rows.numel() * columns.numel() > limit:
        raise GraphError(
            f"the Jacobian of {vertex.name} in input {slot} has {rows.numel()} x {columns.numel()} entries, more than "
            f"limit={limit}. Take a smaller batch, or multiply with it: graph.backward({{...: cotangent}})"
        )
    matrix = torch.stack(_rows(graph, vertex, slot, output)) if rows.numel() else torch.zeros(0, columns.numel())
    return LocalJacobian(matrix, _form(vertex.op, matrix), vertex, graph.vertices[source[0]])


def _source(vertex: Vertex, slot: int, output: int) -> Edge:
    live = [i for i, target in enumerate(vertex.inputs) if target is not None]
    if vertex.is_leaf:
        raise GraphError(f"{vertex.name} is a leaf: no operation computed it. Ask for one that reads it")
    if not 0 <= output < vertex.n_outputs:
        raise GraphError(f"output {output} of {vertex.name}: it has {vertex.n_outputs}")
    source = vertex.inputs[slot] if slot in live else None
    if source is None:
        raise GraphError(f"input {slot} of {vertex.name} has no derivative; those that have: {live}")
    return source


def _rows(graph: Variables, vertex: Vertex, slot: int, output: int) -> list[Tensor]:
    basis = torch.zeros_like(graph.ones((vertex.index, output)))
    source = vertex.inputs[slot]
    if basis.is_complex() or source is None or graph.ones(source).is_complex():
        raise GraphError(f"{vertex.name} is complex; its Jacobian takes two numbers an entry. Use view_as_real")
    algebra, own, found = Cotangents(graph.tape), [None] * vertex.n_outputs, []
    for k in range(basis.numel()):
        cotangent = basis.clone()
        cotangent.view(-1)[k] = 1
        row = algebra.send(vertex, [*own[:output], cotangent, *own[output + 1 :]])[slot]
        found.append((torch.zeros_like(graph.ones(source)) if row is None else row).reshape(-1))
    return found


def _form(op: str, matrix: Tensor) -> Form:
    selects = bool((((matrix == 0) | (matrix == 1)).all()) and (matrix.count_nonzero(1) <= 1).all())
    diagonal = matrix.shape[0] == matrix.shape[1] and not (matrix - matrix.diag().diag()).any()
    if selects and (op in MOVES or not diagonal):
        return "selection"
    return "diagonal" if diagonal else "dense"
