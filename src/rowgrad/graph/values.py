"""Values of the forward pass, as far as some operation kept them for its backward pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rowgrad.errors import FreedGraphError
from rowgrad.graph.vertices import Edge, operation
from rowgrad.tape import Node, Tape

RESULTS = ("result", "output", "out")  # names under which an operation keeps what it returned
# Names under which an operation keeps what it was given, by the slot of that input; looked up in order.
INPUTS: dict[str, tuple[tuple[str, int], ...]] = {
    "addmm":   (("mat1", 1), ("mat2", 2)),
    "addmv":   (("vec", 2), ("self", 1)),
    "addbmm":  (("batch1", 1), ("batch2", 2)),
    "baddbmm": (("batch1", 1), ("batch2", 2)),
    "bmm":     (("self", 0), ("mat2", 1)),
    "mm":      (("self", 0), ("mat2", 1)),
    "mv":      (("self", 0), ("vec", 1)),
    "dot":     (("self", 0), ("tensor", 1)),
    "linear":  (("input", 0), ("weight", 1)),
    "addcmul": (("tensor1", 1), ("tensor2", 2)),
    "lerp":    (("self", 0), ("end", 1)),
    "where":   (),
    "scaled_dot_product_flash_attention_for_cpu": (("query", 0), ("key", 1), ("value", 2)),
    "scaled_dot_product_flash_attention": (("query", 0), ("key", 1), ("value", 2)),
    "scaled_dot_product_efficient_attention": (("query", 0), ("key", 1), ("value", 2)),
}  # fmt: skip
COMMON = (("self", 0), ("input", 0), ("other", 1), ("weight", 1))
# Operations with one input whose entries they keep in order.
SAME_ORDER = {"alias", "clone", "reshape_alias", "squeeze", "unsafe_view", "unsqueeze", "view"}


class Values:
    """Looks values up on a tape; each saved tensor is read once and kept."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self._kept: dict[Edge, Tensor] = {}
        self._readers: dict[Edge, list[tuple[Node, int]]] = {}
        for node in tape.nodes:
            for slot, target in enumerate(node.slots):
                if target is not None:
                    self._readers.setdefault(target, []).append((node, slot))

    def of(self, edge: Edge) -> Tensor | None:
        """The value of one output, from its own operation or one that read it; None where nobody kept it."""
        if edge not in self._kept:
            found = self._look(edge)
            if found is None:
                return None
            self._kept[edge] = found
        return self._kept[edge]

    def readers(self, edge: Edge) -> list[tuple[Node, int]]:
        """Operations that read this output, and as which of their inputs."""
        return self._readers.get(edge, [])

    def _look(self, edge: Edge) -> Tensor | None:
        node, nr = self.tape.nodes[edge[0]], edge[1]
        found = self._by_its_operation(edge)
        found = self._by_a_reader(edge) if found is None else found
        return None if found is None else found.reshape(node.shape(nr))

    def _by_its_operation(self, edge: Edge) -> Tensor | None:
        """Kept by the operation that made it; a view is looked for in what it is a view of."""
        node, nr = self.tape.nodes[edge[0]], edge[1]
        if node.variable is not None:
            return node.variable.detach()
        if operation(node) in SAME_ORDER and node.slots[0] is not None:
            return self._by_its_operation(node.slots[0])
        return _saved(node, RESULTS, node.shape(nr)) if nr == 0 else None

    def _by_a_reader(self, edge: Edge) -> Tensor | None:
        """Kept by an operation it went into, or one that a view of it went into."""
        shape = self.tape.nodes[edge[0]].shape(edge[1])
        for reader, slot in self._readers.get(edge, ()):
            op = operation(reader)
            if op in SAME_ORDER:
                found = self._by_a_reader((reader.index, 0))
            else:
                found = _saved(reader, [name for name, s in INPUTS.get(op, COMMON) if s == slot], shape)
            if found is not None:
                return found
        return None


def _saved(node: Node, names: Iterable[str], shape: torch.Size) -> Tensor | None:
    for name in names:
        found = _read(node, name)
        if isinstance(found, Tensor) and found.shape == shape:
            return found
    return None


def _read(node: Node, name: str) -> object:
    try:
        return node.saved(name) if node.has_saved(name) else None
    except FreedGraphError:
        return None
