"""`diagnose`: every kind of finding, as far as what was given allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rowgrad.diagnosis.depth import depth_findings
from rowgrad.diagnosis.drift import drift_findings
from rowgrad.diagnosis.findings import KINDS, Finding, by_severity
from rowgrad.diagnosis.layers import find_layers
from rowgrad.diagnosis.limits import Limits
from rowgrad.diagnosis.nonfinite import birthplace
from rowgrad.diagnosis.reading import Moments, Reading
from rowgrad.diagnosis.result import Diagnosis
from rowgrad.diagnosis.scaling import input_findings, ratio_findings
from rowgrad.diagnosis.start import cross_entropies, start_findings
from rowgrad.diagnosis.steps import (
    Along,
    along,
    cliff_findings,
    next_step,
    repeated_mean,
    update_findings,
    update_ratios,
)
from rowgrad.diagnosis.structure import bias_findings, mixed_findings, unused_findings
from rowgrad.diagnosis.units import Silences, dead_findings, saturated_findings, symmetric_findings
from rowgrad.errors import NoGraphError, NotAVectorError, RowgradError
from rowgrad.graph.flow import Flow
from rowgrad.graph.graph import Graph
from rowgrad.graph.scopes import Scopes
from rowgrad.parameters import Params, named
from rowgrad.rows.build import Prepared

LIMITS = Limits()
FUSED_IN_TIME = ("mkldnn_rnn", "cudnn_rnn", "miopen_rnn")  # operations that hold all steps of a recurrence


def diagnose(
    losses: Tensor,
    model: Params,
    *,
    trace: Scopes | None = None,
    batches: Iterable[Tensor] = (),
    optimizer: torch.optim.Optimizer | None = None,
    closure: Callable[[], Tensor] | None = None,
    initial: bool = False,
    earlier: Diagnosis | None = None,
    limits: Limits = LIMITS,
) -> Diagnosis:
    """What is wrong with the gradients of a network: where, by which evidence, and what to do, with a number.

    Reads the graph of live losses by one sweep of its own: no hook is set and none runs, so `F.relu` is seen like
    `nn.ReLU`; nothing is freed or changed, and `losses.mean().backward()` works afterwards. The gradient meant is that
    of the mean of the losses.

    Args:
        losses: one loss per example, shape (B,), or a scalar, with its graph.
        model: as for `rowgrad.jacobian`.
        trace: what `rowgrad.trace` yielded for this forward pass, for exact names of operations.
        batches: losses of further batches, best as a generator over the data set: a rectifier is dead if it is 0 for
            every example of all of them. Each is read and let go.
        optimizer: its next step is taken on a copy: its size against the weights, and parameters it does not hold.
        closure: runs the forward pass anew and returns the losses. With `optimizer`, the loss along the step is
            compared with its quadratic model. Random numbers are repeated and buffers put back.
        initial: whether the weights are as they were drawn; then a cross-entropy is compared with log K.
        earlier: a former diagnosis of the same model; the inputs of its layers are compared.
        limits: where healthy ends.
    Returns:
        A `Diagnosis`: `ok`, `findings`, the three `curves`, `not_looked_at`, `str`, `to_html()`, `to_dict()`. If a
        value or a gradient is not finite, its birthplace is the only finding beside those of the structure.
    Raises:
        NotAVectorError: losses of two dimensions or more.
        NoGraphError: losses without a graph.
        FreedGraphError: a backward pass freed the graph before.
        ParameterError: nothing to train, or none of it is in the graph.
    Source: Aggarwal 2018, sections 3.3 to 3.6, for what can go wrong; the limits are in `Limits`.

    >>> import torch, rowgrad
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(*(m for _ in range(11) for m in (torch.nn.Linear(8, 8), torch.nn.Sigmoid())))
    >>> print(rowgrad.diagnose(model(torch.randn(4, 8)).sum(1), model).findings[0].evidence)
    the cotangent arrives with 3.6e-09 of its size over 10 layers, a factor of 0.14 for each
    """
    found = _Examination(losses, model, trace, limits)
    found.structure(optimizer)
    if found.is_finite():
        found.curves(initial, earlier)
        found.data_set(batches)
        found.step(optimizer, closure)
    return found.diagnosis()


@dataclass
class _Examination:
    """One graph, its flow, and what has been found so far."""

    losses: Tensor
    model: Params
    trace: Scopes | None
    limits: Limits
    findings: list[Finding] = field(default_factory=list)
    unseen: dict[str, str] = field(default_factory=lambda: {k: needs for k, needs in KINDS.items() if needs})
    updates: Mapping[str, float] = field(default_factory=dict)
    along: Along | None = None
    moments: Mapping[str, Moments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = named(self.model).by_name
        self.graph = read_graph(self.losses, self.model, self.trace)
        self.flow = self.graph.backward({self.losses: mean_seed(self.losses)})
        self.reading = _read(self.graph, self.flow)

    def add(self, findings: Iterator[Finding], *seen: str) -> None:
        self.findings += findings
        for kind in seen:
            self.unseen.pop(kind, None)

    def structure(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.add(unused_findings(self.graph, optimizer))
        self.add(bias_findings(self.graph, self.reading))
        if self.losses.ndim == 1 and len(self.losses) > 1:
            try:
                meeting = Prepared(self.losses, self.model).meeting
            except RowgradError as error:
                self.unseen["mixed"] = f"a graph whose examples can be told apart: {error}"
            else:
                self.add(mixed_findings(self.graph, meeting, len(self.losses)), "mixed")

    def is_finite(self) -> bool:
        if bool(self.losses.detach().isfinite().all()) and self.reading.is_finite():
            return True
        self.add(birthplace(self.graph, self.flow, self.reading.layers))
        return False

    def curves(self, initial: bool, earlier: Diagnosis | None) -> None:
        for look in (depth_findings, saturated_findings, symmetric_findings, input_findings, ratio_findings):
            self.add(look(self.reading, self.limits))
        if initial and any(cross_entropies(self.graph)):
            self.add(start_findings(self.graph, self.reading, self.limits), "start")
        elif initial:
            self.unseen["start"] = "a loss that is a cross-entropy"
        if any(v.op.startswith(FUSED_IN_TIME) for v in self.graph.vertices):
            self.unseen["time"] = "the steps of a recurrence one by one: nn.LSTMCell in place of the fused nn.LSTM"
        self.moments = self.reading.moments()
        if earlier is not None:
            self.add(drift_findings(self.moments, earlier.moments, self.limits), "drift")

    def data_set(self, batches: Iterable[Tensor]) -> None:
        silences = Silences()
        silences.add(self.reading)
        for losses in batches:
            graph = read_graph(losses, self.model)
            silences.add(_read(graph, Flow(graph, {})))
        found = list(dead_findings(silences, self.reading, self.limits))
        self.add(iter(found), *(["dead"] if found or silences.batches > 1 else []))

    def step(self, optimizer: torch.optim.Optimizer | None, closure: Callable[[], Tensor] | None) -> None:
        if optimizer is None:
            return
        if not self.losses.numel():
            self.unseen |= dict.fromkeys(("update", "cliff"), "at least one example")
            return
        step = next_step(optimizer, self.parameters, self.flow.gradients)
        rate = rate_of(optimizer)
        self.updates = update_ratios(step, self.reading.weights)
        self.add(update_findings(self.updates, self.limits, rate), "update")
        if closure is not None:
            again = repeated_mean(closure, self.model)
            self.along = along(again, self.parameters, step)
            self.add(cliff_findings(self.along, again, self.parameters, step, rate, self.limits), "cliff")

    def diagnosis(self) -> Diagnosis:
        return Diagnosis(
            by_severity(iter(self.findings)),
            self.reading.points,
            self.unseen,
            self.updates,
            self.along,
            self.moments,
        )


def read_graph(losses: Tensor, model: Params, trace: Scopes | None = None) -> Graph:
    """The graph of losses, refused where there is nothing to diagnose."""
    if not isinstance(losses, Tensor) or losses.ndim > 1:
        found = f"has shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"is a {type(losses).__name__}"
        raise NotAVectorError(
            f"losses {found}, expected one loss per example, (B,), or a scalar; rowgrad.per_example reduces tokens"
        )
    graph = Graph(losses, model, trace=trace)
    if not graph.parameters:
        raise NoGraphError(
            f"none of the {len(graph.leaves)} parameters is in the graph of the losses (first: "
            f"{next(iter(graph.leaves))}). Is this the model the losses came from, and not a copy of it?"
        )
    return graph


def mean_seed(losses: Tensor) -> Tensor:
    """What the sweep starts from, so that it yields the gradient of the mean."""
    return torch.full_like(losses.detach(), 1 / max(losses.numel(), 1))


def _read(graph: Graph, flow: Flow) -> Reading:
    gradients: Mapping[str, Any] = flow.gradients
    return Reading(graph.tape, find_layers(graph), flow.cotangents, gradients, graph.leaves)


def rate_of(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate, None where groups have different ones."""
    rates = {float(group["lr"]) for group in optimizer.param_groups if "lr" in group}
    return rates.pop() if len(rates) == 1 else None
