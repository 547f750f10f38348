"""Where the first NaN or infinity came into being: in the data, a parameter, an operation or its derivative."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rowgrad.diagnosis.findings import Finding
from rowgrad.diagnosis.layers import Layers
from rowgrad.diagnosis.reading import kept
from rowgrad.graph.flow import Flow
from rowgrad.graph.graph import Graph
from rowgrad.graph.vertices import Vertex

# Operations with a border to their domain: the names of the operand, how to tell what lies outside, what to do.
DOMAINS = {
    "log":   ("self", lambda x, tiny: x <= 0, "at or below 0", "Take log(x.clamp(min={tiny:.0e}))"),
    "sqrt":  ("result", lambda x, tiny: (x == 0) | x.isnan(), "0 or below", "Take sqrt(x.clamp(min=0) + {tiny:.0e})"),
    "rsqrt": ("result", lambda x, tiny: ~x.isfinite(), "0 or below", "Take rsqrt(x.clamp(min=0) + {tiny:.0e})"),
    "div":   ("other", lambda x, tiny: x == 0, "0", "Add {tiny:.0e} to the divisor"),
    "reciprocal": ("result", lambda x, tiny: ~x.isfinite(), "0", "Add {tiny:.0e} to the divisor"),
    "pow":   ("self", lambda x, tiny: x <= 0, "at or below 0", "Keep the base above {tiny:.0e}"),
    "exp":   ("result", lambda x, tiny: ~x.isfinite(), "too large", "Clamp its argument at {top:.0f}"),
}  # fmt: skip


def birthplace(graph: Graph, flow: Flow, layers: Layers) -> Iterator[Finding]:
    """The first place in the order of the computation: forward if a value is not finite, else backward."""
    found = _in_the_data(graph, layers) or _forward(graph) or _backward(graph, flow)
    if found is not None:
        yield found


def _in_the_data(graph: Graph, layers: Layers) -> Finding | None:
    for layer in layers.layers:
        data = kept(graph.tape, layer.node, layer.data[1]) if layer.inputs and layer.data is not None else None
        if data is not None and data.is_floating_point() and not _is_finite(data):
            bad = ~data.isfinite()
            return _finding(
                f"the input of {layer.name}",
                f"the data itself holds {_count(data)}, first at {bad.nonzero()[0].tolist()}",
                f"Drop or impute these {int(bad.sum())} entries",
            )
    return None


def _forward(graph: Graph) -> Finding | None:
    """The first value kept that is not finite, while those it was computed from are, as far as they were kept."""
    for v in reversed(graph.vertices):
        value = graph.value(v)
        if value is None or _is_finite(value):
            continue
        if v.is_leaf:
            return _finding(
                v.name,
                f"the parameter itself holds {_count(value)}: an earlier step put them there",
                "Go back to a checkpoint before that step, and clip the norm of the gradient at 1",
            )
        return _at_operation(graph, _culprit(graph, v), value)
    return _unkept(graph)


def _unkept(graph: Graph) -> Finding | None:
    """No operation kept the value that is not finite: one with a border to its domain, if its operand tells."""
    for v in reversed(graph.vertices):
        if _outside(graph, v) and v.op not in {"sqrt", "pow"}:
            return _at_operation(graph, v, None)
    return None


def _culprit(graph: Graph, v: Vertex) -> Vertex:
    """The operation itself, or before it, over results that nobody kept, one that was called outside its domain."""
    waiting, seen = [v], {v.index}
    while waiting:
        found = waiting.pop()
        if _outside(graph, found):
            return found
        unknown = [graph.vertices[t[0]] for t in found.inputs if t is not None and graph.value(t) is None]
        waiting += [u for u in unknown if u.index not in seen]
        seen |= {u.index for u in unknown}
    return v


def _backward(graph: Graph, flow: Flow) -> Finding | None:
    """The first cotangent in backward order that is not finite, and the operation whose derivative made it so."""
    for v in graph.vertices:
        for nr in range(len(v.shapes)):
            z = flow.cotangents.get((v.index, nr))
            if z is not None and not _is_finite(z):
                readers = [r for r, _ in graph.readers((v.index, nr))]
                source = next((r for r in readers if _outside(graph, r)), readers[0] if readers else v)
                return _at_operation(graph, source, z, derivative=True)
    return None


def _at_operation(graph: Graph, v: Vertex, found: Tensor | None, *, derivative: bool = False) -> Finding:
    what = "its derivative" if derivative else "its result"
    counted = "" if found is None else f": {what} holds {_count(found)}"
    outside = _outside(graph, v)
    if not outside:
        known = all(graph.value(t) is not None for t in v.inputs if t is not None)
        entered = "what enters is finite" if known or derivative else "the first value that was kept and is not finite"
        return _finding(v.name, f"{entered}{counted}", "Scale down what enters, or compute this operation in float64")
    dtype = graph.tape.nodes[v.index].dtype()
    tiny = torch.finfo(dtype).eps ** 1.5 if dtype.is_floating_point else 1e-12
    top = torch.tensor(torch.finfo(dtype).max, dtype=torch.float64).log().item() - 1
    _, _, border, remedy = DOMAINS[v.op]
    evidence = (
        f"{outside} entries of its {'divisor' if v.op in {'div', 'reciprocal'} else 'argument'} are {border}{counted}"
    )
    return _finding(v.name, evidence, remedy.format(tiny=tiny, top=top))


def _outside(graph: Graph, v: Vertex) -> int:
    """How many entries of an operand lie outside the domain of an operation or of its derivative."""
    if v.op not in DOMAINS:
        return 0
    name, is_outside, _, _ = DOMAINS[v.op]
    x = kept(graph.tape, v.index, name)
    return 0 if x is None else int(is_outside(x, 0).sum())


def _is_finite(t: Tensor) -> bool:
    return bool(t.isfinite().all())


def _count(t: Tensor) -> str:
    counts = {"NaN": int(t.isnan().sum()), "inf": int(t.isinf().sum())}
    return " and ".join(f"{n} {name}" for name, n in counts.items() if n) + f" in {t.numel()} entries"


def _finding(where: str, evidence: str, remedy: str) -> Finding:
    return Finding("not finite", where, evidence, remedy, "error")
