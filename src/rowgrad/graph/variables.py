"""The variables of a graph and how to find one: by name, index or live tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from rowgrad.errors import GraphError, NoGraphError
from rowgrad.graph.scopes import Scopes
from rowgrad.graph.sweep import above
from rowgrad.graph.values import Values
from rowgrad.graph.vertices import Edge, Vertex, vertices
from rowgrad.parameters import Params, named
from rowgrad.tape import Tape

Key = Vertex | str | int | Tensor


class Variables:
    """What `Graph` and `Flow` share: the tape behind the losses and the names of what is on it."""

    def __init__(
        self, loss: Tensor | Sequence[Tensor], model: Params | None = None, *, trace: Scopes | None = None
    ) -> None:
        losses = _losses(loss)
        self.tape = Tape(*losses)
        self.tape.refuse_hidden()
        self.scopes = trace
        found = {} if model is None else named(model, complex_too=True).by_name
        names = {self.tape.leaves[id(p)]: name for name, p in found.items() if id(p) in self.tape.leaves}
        self.vertices: tuple[Vertex, ...] = vertices(self.tape, names, trace)
        self.parameters: dict[str, Vertex] = {name: self.vertices[i] for i, name in names.items()}
        self.outputs: tuple[Edge, ...] = tuple((self.tape.edge_of(t) or (0, 0)) for t in losses)
        self.leaves: dict[str, Tensor] = {name: p.detach() for name, p in found.items()}
        self._absent = {name: p for name, p in found.items() if id(p) not in self.tape.leaves}
        self.values = Values(self.tape)
        self._by_name = {v.name: v for v in self.vertices}

    def __len__(self) -> int:
        return len(self.vertices)

    def __repr__(self) -> str:
        n_edges = sum(t is not None for v in self.vertices for t in v.inputs)
        return f"Graph({len(self)} variables, {n_edges} edges, {len(self.parameters)} parameters)"

    def __getitem__(self, key: Key) -> Vertex:
        """A variable by its name, its index, itself, or the live tensor it is."""
        return self.vertices[self.edge(key)[0]]

    def edge(self, key: Key | Edge) -> Edge:
        """(vertex index, output number) of a variable.

        Raises:
            KeyError: no such variable; names the nearest ones.
        """
        if isinstance(key, Tensor):
            found = self.tape.edge_of(key)
            if found is None:
                raise KeyError(f"a tensor of shape {tuple(key.shape)} is no variable of this graph; was it recomputed?")
            return found
        if isinstance(key, str):
            return self._named(key).index, 0
        index, nr = key if isinstance(key, tuple) else (key.index if isinstance(key, Vertex) else key, 0)
        if isinstance(index, bool) or not isinstance(index, int) or not isinstance(nr, int):
            raise KeyError(
                f"{key!r} is a {type(key).__name__}; a variable is named by its name, index, vertex or live tensor"
            )
        if not (0 <= index < len(self) and 0 <= nr < self.vertices[index].n_outputs):
            raise KeyError(f"variable {key!r}: this graph has {len(self)}, numbered from 0, and no such output")
        return index, nr

    def find(self, key: Key | Edge) -> Edge | None:
        """As `edge`, but None for a parameter of the model that no path reaches."""
        if isinstance(key, str) and key in self._absent and key not in self._by_name:
            return None
        if isinstance(key, Tensor) and any(key is p for p in self._absent.values()):
            return None
        return self.edge(key)

    def ones(self, edge: Edge) -> Tensor:
        """A cotangent of ones for this variable."""
        node = self.tape.nodes[edge[0]]
        return torch.ones(node.shape(edge[1]), dtype=node.dtype(edge[1]), device=node.device(edge[1]))

    def _named(self, name: str) -> Vertex:
        if name in self._by_name:
            return self._by_name[name]
        if name in self.leaves:
            raise KeyError(f"{name}: no path leads from the loss to this parameter")
        near = get_close_matches(name, self._by_name, 5, 0.3) or [*self.parameters, *self._by_name][:5]
        raise KeyError(f"{name!r} is no variable of this graph; near it: {', '.join(map(repr, near))}")

    def value(self, key: Key | Edge) -> Tensor | None:
        """A variable's value in the forward pass; None where no operation kept it."""
        return self.values.of(self.edge(key))

    def readers(self, key: Key | Edge) -> list[tuple[Vertex, int]]:
        """A(i): the variables computed directly from this one, and at which of their inputs."""
        return [(self.vertices[node.index], slot) for node, slot in self.values.readers(self.edge(key))]

    def between(self, key: Key) -> set[int]:
        """Indices of the variables on paths from this one to a loss."""
        return above(self.tape, [self.edge(key)[0]])


def _losses(loss: Any) -> list[Tensor]:
    if isinstance(loss, (Mapping, str)) or not isinstance(loss, Iterable):
        known = f" with the keys {', '.join(map(repr, loss))}" if isinstance(loss, Mapping) else ""
        raise GraphError(f"loss is a {type(loss).__name__}{known}, expected a tensor or a sequence of tensors")
    losses = [loss] if isinstance(loss, Tensor) else list(loss)
    if not losses:
        raise GraphError("Graph needs a loss, found an empty sequence")
    for loss in losses:
        if not isinstance(loss, Tensor):
            raise GraphError(f"loss is a {type(loss).__name__}, expected a tensor or a sequence of tensors")
        if loss.grad_fn is None:
            raise NoGraphError(
                f"loss of shape {tuple(loss.shape)} has no graph: it was detached, made under no_grad() or "
                "inference_mode(), or is a parameter itself. Pass the loss as the forward pass returned it"
            )
    return losses
