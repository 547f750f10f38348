"""The loss at initialization: a classifier that knows nothing loses log K."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log

import torch.nn.functional as F

from rowgrad.diagnosis.findings import Finding
from rowgrad.diagnosis.limits import Limits
from rowgrad.diagnosis.reading import Reading, kept
from rowgrad.graph.graph import Graph
from rowgrad.graph.vertices import Vertex
from rowgrad.tape import signed


@dataclass(frozen=True)
class Classified:
    """A cross-entropy in the graph: its mean, the number of classes, the spread of the logits."""

    vertex: Vertex
    loss: float
    n_classes: int
    spread: float


def cross_entropies(graph: Graph) -> Iterator[Classified]:
    """Every cross-entropy, read from the log-probabilities and targets that it kept."""
    for v in graph.vertices:
        if v.op in {"nll_loss", "nll_loss2_d", "nll_loss_nd"}:
            yield from _softmax(graph, v)
        elif v.op == "binary_cross_entropy_with_logits":
            yield from _binary(graph, v)


def _softmax(graph: Graph, v: Vertex) -> Iterator[Classified]:
    log_p, target = kept(graph.tape, v.index, "self"), kept(graph.tape, v.index, "target")
    if log_p is None or target is None or not target.numel():
        return
    classes = 1 if log_p.ndim > 1 else 0
    ignored = signed(graph.tape.nodes[v.index].attribute("ignore_index"))
    loss = F.nll_loss(log_p.double(), target, ignore_index=ignored)
    spread = log_p.double().std(classes, correction=0).mean()
    yield Classified(v, float(loss), log_p.shape[classes], float(spread))


def _binary(graph: Graph, v: Vertex) -> Iterator[Classified]:
    logits, target = kept(graph.tape, v.index, "self"), kept(graph.tape, v.index, "target")
    if logits is not None and target is not None and target.numel():
        loss = F.binary_cross_entropy_with_logits(logits.double(), target.double())
        yield Classified(v, float(loss), 2, float(logits.double().square().mean().sqrt()))


def start_findings(graph: Graph, reading: Reading, limits: Limits) -> Iterator[Finding]:
    """Cross-entropies at initialization that are far from log K."""
    for found in cross_entropies(graph):
        blind = log(found.n_classes)
        if found.n_classes > 1 and not blind / 2 < found.loss < blind + limits.start:
            yield _finding(found, blind, reading, limits)


def _finding(found: Classified, blind: float, reading: Reading, limits: Limits) -> Finding:
    last = max(reading.points, key=lambda p: p.layer.level).layer.name if reading.points else "the last layer"
    confident = found.loss > blind
    smaller = min(0.1, 0.1 / max(found.spread, 1e-30))
    return Finding(
        "start",
        found.vertex.name,
        f"the loss is {found.loss:.3g} before any training; knowing nothing of {found.n_classes} classes costs log "
        f"{found.n_classes} = {blind:.3g}. The logits have standard deviation {found.spread:.2g}",
        f"Multiply the weights of {last} by {smaller:.1g}, so that all classes start alike"
        if confident
        else f"Check that no input tells the label and that there are {found.n_classes} classes",
        "warning",
        found.loss,
        blind + limits.start if confident else blind / 2,
    )
