"""The general path: row j of any graph, by pushing example j's part of the uses down through the tainted nodes.

Exact for everything, one sweep an example. At a use with a rule the example's gradient is read from the form; at any
other use the node's cotangents are masked to the example and the node is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rowgrad.answers import agree, answered_otherwise, fingerprint
from rowgrad.rows.factors import CHUNK_BYTES, Form, wide_dtype
from rowgrad.rows.ownership import Edge, Layout, mask
from rowgrad.tape import Node, Tape, may_run_python

# Kinds whose backward is known to take a batch of cotangents under torch.func.vmap, with the result of one at a time.
_BATCHED_NAMES = (
    "Add Sub Mul Div Neg Mm Bmm Addmm T Transpose Permute View UnsafeView ReshapeAlias Unsqueeze Squeeze Clone ToCopy"
    " Slice Select Split Cat Stack Expand Exp Log Sqrt Rsqrt Softplus Sigmoid Tanh Relu Softmax Sum Mean Pow"
    " LinalgVectorNorm Embedding Repeat Alias Var Unbind"
)
BATCHED = frozenset(f"{name}Backward{i}" for name in _BATCHED_NAMES.split() for i in range(3))


def _takes_batch(node: Node) -> bool:
    return node.kind in BATCHED and not (node.kind == "EmbeddingBackward0" and node.attribute("sparse"))


@dataclass
class GeneralPath:
    """Rows of the parameters that lie below uses without a simple form.

    `seeds`: where the gradient is known in factors; `masked`: nodes to be called with one example's cotangents.
    """

    tape: Tape
    examples: list[int]  # which example each row belongs to
    n_examples: int  # of the batch
    layouts: Mapping[Edge, Layout]
    needed: Sequence[bool]
    seeds: list[tuple[Edge, Form]]
    masked: dict[int, tuple[list[int], list[Tensor | None]]]  # node -> (slots, cotangents)
    names: dict[int, str]  # leaf -> parameter name
    scale: float  # the loss scale, to be divided out
    _first: dict[str, Tensor | None] | None = field(default=None, init=False, repr=False)  # row, its fingerprints

    def select(self, index: list[int]) -> GeneralPath:
        return replace(self, examples=[self.examples[i] for i in index])

    def reached(self) -> set[int]:
        """Leaves with a name that lie below these uses."""
        below = {edge[0] for edge, _ in self.seeds}
        for node, (slots, _) in self.masked.items():
            below |= {t[0] for t in (self.tape.nodes[node].slots[s] for s in slots) if t is not None}
        for node in self.tape.nodes:
            if node.index in below:
                below |= {t[0] for t in node.slots if t is not None}
        return {leaf for leaf in self.names if leaf in below}

    def bytes(self, parameters: Mapping[str, Tensor]) -> int:
        """What all these rows take when written out."""
        shapes = [parameters[self.names[leaf]] for leaf in self.reached()]
        return sum(len(self.examples) * p.numel() * max(4, p.element_size()) for p in shapes)

    def written_out(self) -> dict[int, Tensor]:
        """Leaf -> (B, *shape)."""
        leaf_of = {name: leaf for leaf, name in self.names.items()}
        rows: dict[int, Tensor] = {}
        for positions, found in self._in_chunks():
            for name, gradients in found.items():
                if leaf_of[name] not in rows:
                    rows[leaf_of[name]] = gradients.new_zeros(len(self.examples), *gradients.shape[1:])
                rows[leaf_of[name]][positions] = gradients
        return rows

    def _in_chunks(self) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Rows of several examples at a time where every gradient at the uses is known in factors."""
        n = len(self.examples)
        if self.masked or not self._takes_batches():
            for j in range(n):
                yield slice(j, j + 1), {name: g.unsqueeze(0) for name, g in self.row(j).items()}
            return
        n_bytes = sum(form.shape.numel() for _, form in self.seeds) * 8
        step = max(1, CHUNK_BYTES // max(1, n_bytes))
        for start in range(0, n, step):
            piece = slice(start, min(n, start + step))
            yield piece, self._pushed(piece)

    def _pushed(self, piece: slice) -> dict[str, Tensor]:
        index = torch.tensor(self.examples[piece], device=self.tape.output.device)
        gradients = [form.select(index).dense() for _, form in self.seeds]

        def push(*parts: Tensor) -> dict[str, Tensor]:
            inbox: dict[Edge, Tensor] = {}
            for (edge, _), part in zip(self.seeds, parts, strict=True):
                self._post(inbox, edge, part)
            return dict(self._sweep(inbox))

        # a checkpointed region is run again within: on one random state, for all rows at once
        found = torch.func.vmap(push, randomness="same")(*gradients)
        return {name: self._unscaled(g) for name, g in found.items()}

    def _takes_batches(self) -> bool:
        """Whether the nodes below the uses are all known to work on a batch of cotangents."""
        return all(_takes_batch(node) for node in self._below(edge for edge, _ in self.seeds))

    def runs_python(self, edge: Edge) -> bool:
        """Whether below it a node may do anything to a cotangent."""
        return any(may_run_python(node) for node in self._below([edge]))

    def _below(self, edges: Iterable[Edge]) -> Iterator[Node]:
        """The nodes there and below, but for leaves."""
        below = {edge[0] for edge in edges}
        for node in self.tape.nodes:
            if node.index in below and not node.is_leaf:
                yield node
                below |= {t[0] for t in node.slots if t is not None}

    def pushed_once(self, target: Edge) -> dict[int, Tensor]:
        """Leaf -> gradient of one tainted scalar, for rows that are multiples of it."""
        node = self.tape.nodes[target[0]]
        unit = torch.ones(node.shape(target[1]), dtype=node.dtype(target[1]), device=node.device(target[1]))
        leaf_of = {name: leaf for leaf, name in self.names.items()}
        return {leaf_of[name]: g.to(wide_dtype(g.dtype)) for name, g in self._sweep({target: unit})}

    def row(self, position: int) -> dict[str, Tensor]:
        """Gradient of one example's loss that passes these uses, by parameter name; absent where there is none.

        After the last one code of a user's is asked for the first again: see Note [one answer] of the tape.
        """
        found = self._row(position)
        if functions := self._functions():
            if position == 0:
                self._first = _fingerprints(found)
            if position == len(self.examples) - 1 and self._first is not None:
                again = _fingerprints(self._row(0))
                if not agree(self._first.values(), [again.get(name) for name in self._first]):
                    raise answered_otherwise(" or ".join(map(repr, functions)))
        return found

    def _functions(self) -> list[Node]:
        """Nodes that run code of a user's."""
        edges = [edge for edge, _ in self.seeds] + [(node, 0) for node in self.masked]
        return [node for node in self._below(edges) if node.is_python]

    def _row(self, position: int) -> dict[str, Tensor]:
        example = self.examples[position]
        inbox: dict[Edge, Tensor] = {}
        index = torch.tensor([example], device=self.tape.output.device)
        for edge, form in self.seeds:
            self._post(inbox, edge, form.select(index).dense()[0])
        for node_index, (slots, cotangents) in self.masked.items():
            node = self.tape.nodes[node_index]
            own = [
                None if z is None else mask(z, self.layouts[node_index, nr], example, self.n_examples)
                for nr, z in enumerate(cotangents)
            ]
            gradients = self.tape.local_gradients(node, own)
            for slot in slots:
                target, gradient = node.slots[slot], gradients[slot]
                if target is not None and gradient is not None:
                    self._post(inbox, target, gradient)
        return {name: self._unscaled(g) for name, g in self._sweep(inbox)}

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient.to(wide_dtype(gradient.dtype)) / self.scale

    def _post(self, inbox: dict[Edge, Tensor], target: Edge, gradient: Tensor) -> None:
        node = self.tape.nodes[target[0]]
        gradient = (gradient.to_dense() if gradient.is_sparse else gradient).to(node.dtype(target[1]))
        gradient = gradient.reshape(node.shape(target[1]))
        inbox[target] = inbox[target] + gradient if target in inbox else gradient

    def _sweep(self, inbox: dict[Edge, Tensor]) -> Iterator[tuple[str, Tensor]]:
        if not inbox:
            return
        for node in self.tape.nodes[min(edge[0] for edge in inbox) :]:
            cotangents = [inbox.pop((node.index, nr), None) for nr in range(node.n_outputs)]
            if all(c is None for c in cotangents):
                continue
            if node.is_leaf:
                if node.index in self.names:
                    assert cotangents[0] is not None
                    yield self.names[node.index], cotangents[0]
                continue
            for target, gradient in zip(node.slots, self.tape.local_gradients(node, cotangents), strict=True):
                if target is not None and gradient is not None and self.needed[target[0]]:
                    self._post(inbox, target, gradient)


def _fingerprints(row: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    return {name: fingerprint(gradient) for name, gradient in row.items()}
