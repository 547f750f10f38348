"""A graph of scalar units: every entry of every variable by itself (Aggarwal 2018, eqs. 1 to 4)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rowgrad.errors import GraphError
from rowgrad.graph.levels import Named
from rowgrad.graph.reads import MOVED, Call, Reads, reads_of
from rowgrad.graph.sweep import Cotangents
from rowgrad.graph.variables import Variables
from rowgrad.graph.vertices import Edge, Vertex

MOST = 2_000_000  # units and edges between them
_ADDRESS = re.compile(r"(.+?)(?: \(output (\d+)\))?(?:\[(-?\d+(?:, *-?\d+)*)\])?")


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """One scalar variable: an entry of what an operation returned, or of a leaf.

    Attributes:
        index: position among the units; each stands before those it was computed from.
        vertex: the vector variable it is an entry of.
        output: of which of the operation's outputs.
        entry: at which place, counted in row-major order.
        slots: for each unit it reads (that unit's index, 0).
    """

    index: int
    vertex: Vertex
    output: int
    entry: int
    slots: tuple[Edge, ...]

    n_outputs = 1

    @property
    def name(self) -> str:
        """`0.weight[2,0]`, or without brackets where the variable is a scalar."""
        shape = self.vertex.shapes[self.output]
        place = ",".join(str(int(i)) for i in torch.unravel_index(torch.tensor(self.entry), shape)) if shape else ""
        nr = f" (output {self.output})" if self.vertex.n_outputs > 1 else ""
        return f"{self.vertex.name}{nr}" + (f"[{place}]" if place else "")

    @property
    def op(self) -> str:
        return self.vertex.op

    @property
    def module(self) -> str:
        return self.vertex.module

    @property
    def inferred(self) -> bool:
        return self.vertex.inferred

    @property
    def steps(self) -> int:
        return self.vertex.steps

    @property
    def time(self) -> int:
        return self.vertex.time

    @property
    def is_leaf(self) -> bool:
        return self.vertex.is_leaf

    def __repr__(self) -> str:
        return f"<unit {self.name}>"


class Units:
    """The level of detail at which each variable is a number, and each local derivative z(i, j) one, too."""

    def __init__(self, graph: Variables) -> None:
        self._graph = graph
        self._sizes = {e: graph.tape.nodes[e[0]].shape(e[1]).numel() for e in _variables(graph)}
        n_units = sum(self._sizes.values())
        _check_size(n_units, 0)
        self._first = dict(zip(self._sizes, accumulate(self._sizes.values(), initial=0), strict=False))
        reads = {e: reads_of(_call(graph, e), graph.vertices[e[0]].name) for e in self._operations()}
        _check_size(n_units, sum(lines.numel() for of_each in reads.values() for lines in of_each.values()))
        flat = {e: {slot: lines.reshape(self._sizes[e], -1) for slot, lines in r.items()} for e, r in reads.items()}
        self.nodes: tuple[Unit, ...] = tuple(self._made(flat, [(i, 0) for i in range(n_units)]))
        self.algebra = Derivatives(graph, flat, self.nodes)

    def _operations(self) -> Iterator[Edge]:
        return (e for e in self._sizes if not self._graph.vertices[e[0]].is_leaf)

    def _made(self, reads: Mapping[Edge, Reads], edges: Sequence[Edge]) -> Iterator[Unit]:
        for edge, size in self._sizes.items():
            vertex, first = self._graph.vertices[edge[0]], self._first[edge]
            lines = [
                torch.where(r < 0, r, r + self._first[vertex.inputs[slot] or (0, 0)])
                for slot, r in reads.get(edge, {}).items()
            ]
            sources = torch.cat(lines, 1).tolist() if lines else [()] * size
            for entry, of_entry in enumerate(sources):
                yield Unit(first + entry, vertex, edge[1], entry, tuple([edges[i] for i in of_entry if i >= 0]))

    def seeds(self) -> dict[Edge, float]:
        return {(self._first[e] + k, 0): 1.0 for e in self._graph.outputs for k in range(self._sizes[e])}

    def finished(self, value: float | None, edge: Edge) -> Tensor:
        unit = self.nodes[edge[0]]
        node = self._graph.tape.nodes[unit.vertex.index]
        return torch.tensor(value or 0.0, dtype=node.dtype(unit.output), device=node.device(unit.output))

    def find(self, key: Any) -> Edge | None:
        """Where a unit stands: by itself, by its address, or the only one of a variable.

        Raises:
            KeyError: no such variable, or no such entry of it.
            GraphError: a variable of several units.
        """
        if isinstance(key, tuple):
            return key
        if isinstance(key, Unit):
            if key.index >= len(self.nodes) or self.nodes[key.index] is not key:
                raise KeyError(f"{key.name}: a unit of another graph")
            return key.index, 0
        name, output, place = _address(key) if isinstance(key, str) and not self._is_known(key) else (key, None, None)
        edge = self._graph.find(name)
        if edge is None:
            shape = self._graph.leaves[name].shape if isinstance(name, str) else name.shape
        else:
            edge = edge if output is None else (edge[0], output)
            shape = self._graph.vertices[edge[0]].shapes[edge[1]]
        entry = _entry(place, shape, name)
        return None if edge is None else (self._first[edge] + entry, 0)

    def _is_known(self, name: str) -> bool:
        return name in self._graph.leaves or any(v.name == name for v in self._graph.vertices)


def _variables(graph: Variables) -> list[Edge]:
    """The outputs of operations that something reads, and the losses, in the order of the graph."""
    all_of_them = ((v.index, nr) for v in graph.vertices for nr in range(v.n_outputs))
    return [edge for edge in all_of_them if edge in graph.outputs or graph.readers(edge)]


def _call(graph: Variables, edge: Edge) -> Call:
    return Call(graph.tape, graph.tape.nodes[edge[0]], edge[1])


def _check_size(n_units: int, n_edges: int) -> None:
    if n_units + n_edges > MOST:
        edges = f" and {n_edges} edges" if n_edges else ""
        raise GraphError(
            f'level="unit" of this graph has {n_units} units{edges}, more than the {MOST} it is meant for. Take a '
            'smaller net or batch, or level="vector"'
        )


def _address(key: str) -> tuple[str, int | None, tuple[int, ...] | None]:
    """Variable, output and place of `unbind (output 1)[2,0]`."""
    found = _ADDRESS.fullmatch(key)
    if found is None:
        return key, None, None
    name, output, place = found.groups()
    at = None if place is None else tuple(int(i) for i in place.split(","))
    return name, None if output is None else int(output), at


def _entry(place: tuple[int, ...] | None, shape: torch.Size, name: Any) -> int:
    shown = name if isinstance(name, str) else f"a tensor of shape {tuple(shape)}"
    if place is None:
        if shape.numel() != 1:
            raise GraphError(
                f"{shown} has {shape.numel()} units, shape {tuple(shape)}; name one of them: "
                f"'{name if isinstance(name, str) else 'name'}[{','.join('0' * len(shape))}]', or hand over one of "
                "graph.units"
            )
        return 0
    if len(place) != len(shape) or not all(-n <= i < n for i, n in zip(place, shape, strict=True)):
        raise KeyError(f"{shown}{list(place)}: {shown} has shape {tuple(shape)}")
    return int(torch.arange(shape.numel()).view(shape)[place])


class Derivatives:
    """Backpropagation through units, in double precision: S(i) = sum of z(i, j) S(j) (eq. 4)."""

    def __init__(self, graph: Variables, reads: Mapping[Edge, Reads], units: Sequence[Unit]) -> None:
        self._graph = graph
        self._reads = reads
        self._units = units
        self._found: dict[Edge, list[list[float]]] = {}

    def add(self, a: float, b: float) -> float:
        return a + b

    def send(self, node: Named, own: Sequence[float | None]) -> list[float]:
        return [sum(s for s in own if s is not None) * z for z in self.of(self._units[node.index])]

    def of(self, unit: Unit) -> list[float]:
        """z(i, j) of a unit j, for each unit i that it reads."""
        edge = (unit.vertex.index, unit.output)
        if edge not in self._found:
            self._found[edge] = self._rows(edge)
        return self._found[edge][unit.entry]

    def _rows(self, edge: Edge) -> list[list[float]]:
        reads = self._reads[edge]
        if self._graph.vertices[edge[0]].op in MOVED:
            z = {slot: torch.ones_like(lines, dtype=torch.float64) for slot, lines in reads.items()}
        elif all(_is_read_once(lines) for lines in reads.values()):
            z = self._at(edge, reads, _call(self._graph, edge).ones())
        else:
            n = next(len(lines) for lines in reads.values())
            rows = [self._at(edge, {s: lines[k] for s, lines in reads.items()}, self._unit(edge, k)) for k in range(n)]
            z = {slot: torch.stack([row[slot] for row in rows]) for slot in reads}
        both, kept = torch.cat(list(z.values()), 1), torch.cat(list(reads.values()), 1) >= 0
        return [row[mask].tolist() for row, mask in zip(both, kept, strict=True)]

    def _at(self, edge: Edge, reads: Reads, own: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """What one call of the operation sends to the entries that are read."""
        sent = Cotangents(self._graph.tape).send(self._graph.vertices[edge[0]], own)
        flat = {slot: sent[slot] for slot in reads}
        return {
            slot: torch.zeros(reads[slot].shape, dtype=torch.float64)
            if t is None
            else t.reshape(-1).double().cpu()[reads[slot]]
            for slot, t in flat.items()
        }

    def _unit(self, edge: Edge, k: int) -> list[Tensor | None]:
        own, basis = _call(self._graph, edge).ones(), torch.zeros_like(self._graph.ones(edge))
        basis.view(-1)[k] = 1
        return [None if ones is None else basis for ones in own]


def _is_read_once(lines: Tensor) -> bool:
    counts = lines[lines >= 0].bincount()
    return not len(counts) or int(counts.max()) <= 1
