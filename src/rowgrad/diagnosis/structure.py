"""What the structure alone tells: parameters without effect, and examples that meet."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rowgrad.diagnosis.findings import Finding, some
from rowgrad.diagnosis.reading import Reading
from rowgrad.graph.flow import ELEMENTWISE
from rowgrad.graph.graph import Graph
from rowgrad.graph.vertices import MOVES, Edge, Vertex

ENTRY_BY_ENTRY = ELEMENTWISE | {"add", "sub", "mul", "div", "neg", "clone", "alias"}
BATCH_NORMS = frozenset({"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm_with_update"})


def unused_findings(graph: Graph, optimizer: torch.optim.Optimizer | None) -> Iterator[Finding]:
    """Parameters that no path reaches, and those that are reached but that the optimizer does not hold."""
    absent = [name for name in graph.leaves if name not in graph.parameters]
    if absent:
        n = sum(graph.leaves[name].numel() for name in absent)
        yield Finding(
            "unused",
            some(absent),
            f"no path leads from the loss to {len(absent)} of {len(graph.leaves)} parameters, {n:,} numbers in all: "
            "their gradient is None",
            f"Use them in forward(), remove the {n:,} numbers, or freeze them with requires_grad_(False)",
            "warning",
            len(absent),
            0.0,
        )
    held = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    live = {name: graph.tape.nodes[v.index].variable for name, v in graph.parameters.items()}
    left = [] if held is None else [name for name, p in live.items() if id(p) not in held]
    if left:
        yield Finding(
            "unused",
            some(left),
            f"{len(left)} of {len(graph.parameters)} parameters have a gradient but are not in the optimizer: they "
            "stay as they are",
            f"Add them with optimizer.add_param_group, all {len(left)} of them, or freeze them",
            "warning",
            len(left),
            0.0,
        )


def bias_findings(graph: Graph, reading: Reading) -> Iterator[Finding]:
    """Biases that a BatchNorm in training mode subtracts again: gradient 0 but for rounding."""
    for v in graph.vertices:
        if v.op in BATCH_NORMS and _uses_the_batch(graph, v):
            for name in _biases_before(graph, v):
                yield _bias(name, v, graph, reading)


def _uses_the_batch(graph: Graph, v: Vertex) -> bool:
    node = graph.tape.nodes[v.index]
    return not node.has_saved("training") or bool(node.attribute("training"))


def _biases_before(graph: Graph, v: Vertex) -> Iterator[str]:
    """Parameters of one dimension that enter the operation just before, over moves, if nothing else reads it."""
    source = v.inputs[0]
    while source is not None and graph.vertices[source[0]].op in MOVES and len(graph.readers(source)) == 1:
        source = graph.vertices[source[0]].inputs[0]
    names = {p.index: name for name, p in graph.parameters.items()}
    entering = () if source is None or len(graph.readers(source)) > 1 else graph.vertices[source[0]].inputs
    for t in entering:
        if t is not None and t[0] in names and graph.leaves[names[t[0]]].ndim == 1:
            yield names[t[0]]


def _bias(name: str, norm: Vertex, graph: Graph, reading: Reading) -> Finding:
    gradient, n = reading.gradients.get(name), graph.leaves[name].numel()
    size = 0.0 if gradient is None else float(gradient.double().norm())
    return Finding(
        "bias before BatchNorm",
        name,
        f"{norm.name} subtracts the mean of the batch and with it this bias; its gradient, of norm {size:.1e}, is "
        "rounding",
        f"Build the layer with bias=False, which saves {n} numbers; the BatchNorm's own bias does the work",
        "note",
        size,
        0.0,
    )


def mixed_findings(graph: Graph, meeting: tuple[int, ...], n_examples: int) -> Iterator[Finding]:
    """Operations at which one example's loss comes to depend on another's input."""
    found = [graph.vertices[i] for i in meeting]
    found = [v for v in found if not _works_entry_by_entry(graph, v)] or found
    found = list(dict.fromkeys(_reduced(graph, v) for v in found))
    norms = [v for v in found if v.op in BATCH_NORMS]
    others = [v for v in found if v.op not in BATCH_NORMS]
    if norms:
        instead = f"GroupNorm with {_groups(norms[0])} groups"
        yield _mixed(
            norms, n_examples, "BatchNorm in training mode", f"Where each is to count alone: {instead}", "note"
        )
    if others:
        remedy = (
            f"If it is not meant to, compute it for each of the {n_examples} alone, or look for a mistaken dimension"
        )
        yield _mixed(others, n_examples, "no BatchNorm", remedy, "warning")


def _works_entry_by_entry(graph: Graph, v: Vertex) -> bool:
    """Whether an operation only hands on what meets below it: a residual addition above a BatchNorm."""
    shapes = [graph.vertices[t[0]].shapes[t[1]] for t in v.inputs if t is not None]
    return v.op in ENTRY_BY_ENTRY and all(shape == v.shapes[0] for shape in shapes)


def _reduced(graph: Graph, v: Vertex) -> Vertex:
    """Where examples meet because something small was spread over all of them: the operation that made it small."""
    spread = [graph.vertices[t[0]] for t in v.inputs if t is not None and _size(graph, t) < v.shapes[0].numel()]
    spread = [u for u in spread if not u.is_leaf] if v.op in ENTRY_BY_ENTRY | MOVES else []
    if not spread:
        return v
    found = spread[0]
    while found.op in ENTRY_BY_ENTRY | MOVES and len(sources := [t for t in found.inputs if t is not None]) == 1:
        found = graph.vertices[sources[0][0]]
    return found


def _size(graph: Graph, edge: Edge) -> int:
    return graph.vertices[edge[0]].shapes[edge[1]].numel()


def _groups(norm: Vertex) -> int:
    channels = norm.shapes[0][1] if len(norm.shapes[0]) > 1 else 1
    return max(g for g in range(1, 33) if channels % g == 0)


def _mixed(found: list[Vertex], n_examples: int, what: str, remedy: str, severity: str) -> Finding:
    return Finding(
        "mixed",
        some([v.name for v in found]),
        f"the loss of one example depends on the others of the batch of {n_examples} ({what})",
        remedy,
        severity,
        len(found),
        0.0,
    )
