"""Where parameters meet data: the slots at which the examples' cotangents are still apart and below which they are not.

Note [taint]
    A node is tainted if a cotangent of one of its outputs mixes examples, if it is a leaf or a chain of views that
    leads only to a leaf, or if a tainted node sends it a cotangent. A use is a slot from an untainted node into a
    tainted one. Every path from the losses to a parameter crosses into the taint exactly once, so the gradients at the
    uses, pushed down through the tainted nodes, account for each path once. Status belongs to nodes, not to edges:
    read edge by edge, nodes with several outputs would be crossed twice or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rowgrad.rows.ownership import MIXED, Edge, Layout
from rowgrad.rows.placement import VIEWS
from rowgrad.tape import Node, Tape

# Kinds that read a tensor which is not among their differentiable inputs: ids, masks, targets.
_READS_MORE = re.compile("Index|Gather|Embedding|Scatter|Masked|Where|Take|Nll|Put")


class Use(NamedTuple):
    """A slot of an untainted node whose gradient goes to `target`, a tainted node or a leaf."""

    node: int
    slot: int
    target: Edge


@dataclass
class Frontier:
    """The uses, in topological order, and the nodes below them."""

    uses: list[Use]
    tainted: list[bool]
    needed: list[bool]
    couplings: tuple[int, ...]


def static_nodes(tape: Tape) -> list[bool]:
    """Leaves, and chains of views that lead only to a leaf."""
    static = [False] * len(tape)
    for node in reversed(tape.nodes):
        live = [t for t in node.slots if t is not None]
        is_view = node.kind in VIEWS and len(live) == 1 and static[live[0][0]] and node.index != tape.root_slot[0]
        static[node.index] = node.is_leaf or is_view
    return static


def needed_nodes(tape: Tape, leaves: Collection[int]) -> list[bool]:
    """Nodes from which a wanted parameter can be reached."""
    needed = [False] * len(tape)
    for node in reversed(tape.nodes):
        below = any(t is not None and needed[t[0]] for t in node.slots)
        needed[node.index] = below or node.index in leaves
    return needed


def edges_to_prove(
    tape: Tape, static: Sequence[bool], needed: Sequence[bool], settled: Collection[Edge] = ()
) -> list[Edge]:
    """Outputs on which the border of the taint depends.

    Those whose layout is not settled, and those of the nodes that send to one of them or to a parameter: the border
    can lie nowhere else, for a node that sends to settled ones alone has no use.
    """
    read = {tape.root_slot, *(t for node in tape.nodes for t in node.slots if t is not None)}
    edges = [
        (node.index, nr)
        for node in tape.nodes
        if needed[node.index] and not static[node.index]
        for nr in range(node.n_outputs)
        if (node.index, nr) in read and node.is_traced(nr)
    ]
    open_nodes = {i for i, nr in edges if (i, nr) not in settled}
    looked_at = open_nodes | {
        node.index
        for node in tape.nodes
        if any(t is not None and needed[t[0]] and (static[t[0]] or t[0] in open_nodes) for t in node.slots)
    }
    return [e for e in edges if e[0] in looked_at]


def find_uses(
    tape: Tape,
    layouts: Mapping[Edge, Layout],
    static: Sequence[bool],
    needed: Sequence[bool],
    n_examples: int,
) -> Frontier:
    """Close the taint downwards and read off its border. See Note [taint]."""
    tainted = list(static)
    for (index, _), layout in layouts.items():
        if layout is MIXED:
            tainted[index] = True
    for node in tape.nodes:
        if tainted[node.index]:
            for target in node.slots:
                if target is not None:
                    tainted[target[0]] = True
    uses = [
        Use(node.index, slot, target)
        for node in tape.nodes
        if needed[node.index] and not tainted[node.index]
        for slot, target in enumerate(node.slots)
        if target is not None and needed[target[0]] and tainted[target[0]]
    ]
    couplings: dict[int, None] = {}
    only_parameters = _only_parameters(tape, n_examples)
    for use in uses:
        if not only_parameters[use.target[0]] and not _is_broadcast_lookup(tape, use, only_parameters):
            couplings[use.node] = None
    return Frontier(uses, tainted, list(needed), tuple(couplings))


def _only_parameters(tape: Tape, n_examples: int) -> list[bool]:
    """Whether the value at a node is computed from parameters alone, as far as the graph tells."""
    found = [False] * len(tape)
    for node in reversed(tape.nodes):
        live = [t for t in node.slots if t is not None]
        below = bool(live) and all(found[t[0]] for t in live)
        found[node.index] = node.is_leaf or (below and _adds_no_data(tape, node, n_examples))
    return found


def _is_broadcast_lookup(tape: Tape, use: Use, only_parameters: Sequence[bool]) -> bool:
    """Whether entries of a table, only rearranged on the way, are used by all examples alike: a bias of positions."""
    node = tape.nodes[use.target[0]]
    if node.shape(use.target[1]).numel() >= tape.nodes[use.node].shape().numel():
        return False
    while not _READS_MORE.search(node.kind):
        live = [t for t in node.slots if t is not None]
        if len(live) != 1 or tape.nodes[live[0][0]].shape(live[0][1]).numel() != node.shape().numel():
            return False
        node = tape.nodes[live[0][0]]
    return all(t is None or only_parameters[t[0]] for t in node.slots)


def _adds_no_data(tape: Tape, node: Node, n_examples: int) -> bool:
    """Whether no batch can have entered at this node: all operands are seen, or the result has no room for one."""
    if node.kind in VIEWS:
        return True
    if node.kind == "EmbeddingBackward0" and (len(node.shape()) <= 2 or node.shape()[0] == 1):
        return True  # a table of positions, looked up once for all examples
    if not node.is_python and not _READS_MORE.search(node.kind) and _keeps_shape_or_sees_all(tape, node):
        return True
    return not any(size % n_examples == 0 for nr in range(node.n_outputs) for size in node.shape(nr))


def _keeps_shape_or_sees_all(tape: Tape, node: Node) -> bool:
    live = [t for t in node.slots if t is not None]
    if len(live) == len(node.slots):
        return True
    if node.kind in ("MmBackward0", "BmmBackward0", "AddmmBackward0", "ConvolutionBackward0"):
        return False
    return all(tape.nodes[i].shape(nr) == node.shape() for i, nr in live)
