"""How much of a gradient comes along each edge: one backward and one forward-mode sweep.

Note [shares of a gradient]
    Eq. 3 makes the gradient g of a variable w a sum over paths, so it is a sum over the edges of any cut between w and
    the losses: g = sum of g_e, where g_e holds the paths through edge e. The share of e is <g_e, g> / |g|^2, negative
    where these paths work against the others. Let w move along g: t, the tangent that this brings to the variable e
    comes from, and c, the cotangent that e sends to it, give <g_e, g> = <c, t>. Cutting e leaves g' = g - g_e, so
    that the share is also 1 - <g', g> / |g|^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rowgrad.errors import GraphError, NonFiniteError
from rowgrad.graph.sweep import Cotangents, above, sweep
from rowgrad.graph.tangents import push
from rowgrad.graph.variables import Key, Variables
from rowgrad.graph.vertices import Edge, Vertex
from rowgrad.tape import Node


class Input(NamedTuple):
    """An edge of the graph: the operation that reads a variable, and at which of its inputs."""

    vertex: Vertex
    slot: int


class Shares(Mapping[Input, float]):
    """Of every edge between a variable and the losses, its share of the variable's gradient; in graph order, losses
    first.

    Attributes:
        variable: whose gradient it is.
        norm: length of that gradient.
    """

    def __init__(self, graph: Variables, variable: Vertex, norm: float, found: Mapping[tuple[int, int], float]) -> None:
        self.variable = variable
        self.norm = norm
        self._graph = graph
        self._found = dict(sorted(found.items()))

    def __getitem__(self, key: tuple[Key, int]) -> float:
        """The share of an edge, by its reader (an operation's name, index, vertex or tensor) and input."""
        vertex, slot = self._graph[key[0]], key[1]
        if (vertex.index, slot) not in self._found:
            known = [i for index, i in self._found if index == vertex.index]
            raise KeyError(
                f"input {slot} of {vertex.name} is on no path from {self.variable.name}; inputs that are: {known}"
            )
        return self._found[vertex.index, slot]

    def __iter__(self) -> Iterator[Input]:
        return (Input(self._graph.vertices[index], slot) for index, slot in self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        return f"<shares of {len(self)} edges in the gradient of {self.variable.name}>"

    def __str__(self) -> str:
        """A table in the order of the forward pass."""
        rows = [(_percent(share), self._shown(*edge)) for edge, share in reversed(self._found.items())]
        width = max(len(percent) for percent, _ in rows)
        lines = [f"{percent:>{width}}  {edge}" for percent, edge in rows]
        return "\n".join([f"shares of |dO/d {self.variable.name}|^2 = {self.norm**2:.4g}", *lines])

    def _shown(self, index: int, slot: int) -> str:
        vertex = self._graph.vertices[index]
        source, _ = vertex.inputs[slot] or (index, 0)
        several = sum(i == index for i, _ in self._found) > 1
        return f"{self._graph.vertices[source].name} -> {vertex.name}" + (f" (input {slot})" if several else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def shares(graph: Variables, key: Key | Edge) -> Shares:
    """See `Graph.shares`."""
    edge = graph.find(key)
    if edge is None:
        raise GraphError(f"shares of {key}: no path leads from it to a loss, so there is no gradient to share out")
    needed = above(graph.tape, [edge[0]])
    cotangents = _cotangents(graph, needed)
    vertex, gradient = graph.vertices[edge[0]], cotangents[edge[0]][edge[1]]
    norm = 0.0 if gradient is None else _norm(gradient)
    if gradient is None or norm == 0:
        raise GraphError(f"shares of {vertex.name}: its gradient is zero, so there is nothing to share out")
    if norm != norm or norm == float("inf"):
        raise NonFiniteError(f"shares of {vertex.name}: its gradient holds inf or nan")
    found: dict[tuple[int, int], float] = {}
    tangents: dict[Edge, Tensor] = {edge: (gradient / norm).to(gradient.dtype)}
    for index in sorted(needed - {edge[0]}, reverse=True):
        if index in cotangents:
            _through(graph, graph.tape.nodes[index], cotangents[index], tangents, found)
    return Shares(graph, vertex, norm, {read: flow / norm for read, flow in found.items()})


def _cotangents(graph: Variables, needed: set[int]) -> dict[int, list[Tensor | None]]:
    found: dict[int, list[Tensor | None]] = {}

    def arrived(node: Node, own: list[Tensor | None]) -> None:
        found[node.index] = own

    seeds = {end: graph.ones(end) for end in graph.outputs}
    sweep(graph.tape, seeds, Cotangents(graph.tape), arrived, needed=needed)
    return found


def _through(
    graph: Variables,
    node: Node,
    cotangents: list[Tensor | None],
    tangents: dict[Edge, Tensor],
    found: dict[tuple[int, int], float],
) -> None:
    """One operation: what comes along each of its inputs, and the tangents of its outputs."""
    moved = [None if target is None else tangents.get(target) for target in node.slots]
    pushed = push(graph.tape, node, cotangents, moved)
    found.update({(node.index, i): pushed.flows[i] for i, t in enumerate(moved) if t is not None})
    tangents.update({(node.index, nr): t for nr, t in enumerate(pushed.tangents) if t is not None})


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.complex128 if t.is_complex() else torch.float64))
