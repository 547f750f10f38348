"""Levels of detail: a graph of whole vector variables, or of their scalar entries; the same code walks both."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from rowgrad.graph.sweep import Algebra, Cotangents, Net, Variable
from rowgrad.graph.variables import Variables
from rowgrad.graph.vertices import Edge, Vertex

S = TypeVar("S")


class Named(Variable, Protocol):
    """A variable that can be talked about: a `Vertex`, or one scalar unit of it."""

    @property
    def name(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def inferred(self) -> bool: ...
    @property
    def steps(self) -> int: ...
    @property
    def time(self) -> int: ...


class Level(Net[Named], Protocol[S]):
    """A graph at one level of detail: its variables, the values at its outputs, and its local derivatives."""

    @property
    def algebra(self) -> Algebra[Named, S]: ...

    def seeds(self) -> dict[Edge, S]:
        """S(o, o) = 1 at each loss."""
        ...

    def find(self, key: Any) -> Edge | None:
        """Where a variable stands, None for a parameter of the model that no path reaches."""
        ...

    def finished(self, value: S | None, edge: Edge) -> Tensor:
        """What a sweep found at a variable, as a tensor of its shape; None is zero."""
        ...


class Vectors:
    """Each output of each operation is one variable, each local derivative a matrix."""

    def __init__(self, graph: Variables) -> None:
        self.nodes: tuple[Vertex, ...] = graph.vertices
        self.algebra = Cotangents(graph.tape)
        self._graph = graph

    def seeds(self) -> dict[Edge, Tensor]:
        return {edge: self._graph.ones(edge) for edge in self._graph.outputs}

    def find(self, key: Any) -> Edge | None:
        return self._graph.find(key)

    def finished(self, value: Tensor | None, edge: Edge) -> Tensor:
        return torch.zeros_like(self._graph.ones(edge)) if value is None else value
