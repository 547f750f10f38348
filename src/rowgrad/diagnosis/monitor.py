"""`Monitor`: a diagnosis every few steps of a training, cheap enough to be left on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from html import escape
from math import nan
from os import PathLike
from pathlib import Path
from statistics import median
from time import time

import torch
from torch import Tensor

from rowgrad.diagnosis.depth import depth_findings
from rowgrad.diagnosis.drawing import findings_list, fragment, write_page
from rowgrad.diagnosis.drift import drift_findings
from rowgrad.diagnosis.examine import LIMITS, mean_seed, rate_of, read_graph
from rowgrad.diagnosis.findings import Finding, by_severity
from rowgrad.diagnosis.history import Record, Seen, Writer, quantiles, read_log, write_line, write_scalars
from rowgrad.diagnosis.layers import Layers, find_layers
from rowgrad.diagnosis.limits import Limits
from rowgrad.diagnosis.nonfinite import birthplace
from rowgrad.diagnosis.reading import Reading, norms
from rowgrad.diagnosis.records import over_time
from rowgrad.diagnosis.scaling import input_findings, ratio_findings
from rowgrad.diagnosis.start import start_findings
from rowgrad.diagnosis.steps import update_findings
from rowgrad.diagnosis.structure import bias_findings, mixed_findings, unused_findings
from rowgrad.diagnosis.units import Silences, saturated_findings, still_findings, symmetric_findings
from rowgrad.errors import ParameterError, RowgradError
from rowgrad.graph.graph import Graph
from rowgrad.graph.sweep import Cotangents, sweep
from rowgrad.graph.vertices import Edge
from rowgrad.parameters import Params, named
from rowgrad.rows.build import Prepared
from rowgrad.tape import Node

SMOOTHED = 0.9  # weight of the past in the two averages of the noise scale
N_UPDATES = 5  # steps whose median size is compared with the limits, so that a warm-up or one odd batch is no finding
STILL = 1e-5  # change of a row's direction below which it has not moved: rounding of 1000 steps in float32


class Monitor:
    """Watches a training: what `diagnose` finds, every so many steps, and what only time can tell.

    Call `observe(losses)` before any backward pass, and `update()` after `optimizer.step()`:

        monitor = rowgrad.Monitor(model, optimizer, every=50, log="run.jsonl")
        for x, y in loader:
            losses = F.cross_entropy(model(x), y, reduction="none")
            monitor.observe(losses)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            monitor.update()

    An observation sweeps the graph once, with no hook and no engine pass, and takes about one step's time; in
    between, the losses are looked at for NaN. Findings that need time: units that were 0 and whose weights stood
    still over a window of observations, inputs of layers that drift from window to window, sizes of the real steps.

    Args:
        model: as for `rowgrad.jacobian`.
        optimizer: the one that is stepped.
        every: steps from one observation to the next; the first step is observed.
        norms_every: observations from one with norms of the examples' gradients to the next; they cost about half as
            much again.
        window: observations after which what needs time is judged, best an epoch's worth.
        log: file of JSON lines, one for each observation, to which is appended; what it holds already is kept in
            `records`.
        writer: a TensorBoard `SummaryWriter`, or anything with its `add_scalar` and `add_text`.
        initial: whether the weights are as they were drawn; then a cross-entropy is compared with log K.
        limits: where healthy ends.
    Attributes:
        step: number of the next observation's step; set it after loading a checkpoint.
        records: one for each observation: step, loss, sizes by layer, quantiles of the norms of the examples'
            gradients, noise scale, sizes of the steps, findings.
        no_norms: why there are no norms of the examples' gradients, None as long as there are. They need losses as a
            vector, and rules for all operations.
    Raises:
        ParameterError: nothing to train, or no optimizer.
        ValueError: `every`, `norms_every` or `window` below 1.
    Source: Aggarwal 2018, sections 3.3 to 3.6; noise scale: McCandlish et al. 2018, appendix A.1.

    >>> import torch, rowgrad
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> monitor = rowgrad.Monitor(model, optimizer, every=1)
    >>> losses = model(torch.eye(2)).log().squeeze(1) * float("nan")
    >>> [finding.kind for finding in monitor.observe(losses)]
    ['not finite']
    """

    def __init__(
        self,
        model: Params,
        optimizer: torch.optim.Optimizer,
        *,
        every: int = 50,
        norms_every: int = 4,
        window: int = 20,
        log: str | PathLike[str] | None = None,
        writer: Writer | None = None,
        initial: bool = False,
        limits: Limits = LIMITS,
    ) -> None:
        if min(every, norms_every, window) < 1:
            raise ValueError(
                f"every={every}, norms_every={norms_every}, window={window}: expected whole numbers from 1 up"
            )
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ParameterError(f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise ParameterError(f"writer is a {type(writer).__name__}, expected a TensorBoard SummaryWriter")
        self.model, self.optimizer = model, optimizer
        self.every, self.norms_every, self.window = every, norms_every, window
        self.parameters = named(model).by_name
        self.log, self.writer, self.initial, self.limits = None if log is None else Path(log), writer, initial, limits
        self.step = 0
        self.records: list[Record] = read_log(self.log) if self.log is not None and self.log.exists() else []
        self.no_norms: str | None = None
        self._seen: dict[tuple[str, str], Seen] = {}
        self._pending: Record | None = None
        self._before: dict[str, Tensor] = {}
        self._updates: deque[dict[str, float]] = deque(maxlen=N_UPDATES)
        self._noise: tuple[float, float] | None = None
        self._past: _Window | None = None
        self._broken = False
        self._n_observed = 0

    # What the training loop calls

    def observe(self, losses: Tensor) -> tuple[Finding, ...]:
        """Look at the losses of this step, before any backward pass.

        Args:
            losses: one loss per example, shape (B,), or a scalar, with its graph.
        Returns:
            What was found at this step. Where the losses or their gradients are not finite, the place where that
            began, at the first of such steps, whether an observation was due or not.
        Raises:
            NotAVectorError, NoGraphError, FreedGraphError, ParameterError: as `diagnose`, at steps that are observed.
        """
        self._write()
        step, is_due = self.step, self.step % self.every == 0
        self.step += 1
        if not bool(losses.detach().isfinite().all()):
            return self._not_finite(losses, step)
        if not is_due:
            self._broken = False
            return ()
        return self._observed(losses, step)

    def update(self) -> tuple[Finding, ...]:
        """Measure the step that the optimizer has just taken, where `observe` looked at its losses.

        Returns:
            What was found.
        """
        found: tuple[Finding, ...] = ()
        if self._before and self._pending is not None:
            ratios = _sizes_of_changes(self.parameters, self._before)
            self._pending["updates"] = ratios
            self._updates.append(ratios)
            found = self._note(self._pending, self._sizes_of_steps())
        self._before = {}
        self._write()
        return found

    # What came of it

    @property
    def findings(self) -> tuple[Seen, ...]:
        """All findings so far, each kind at each place once, by the step at which it was first made."""
        return tuple(self._seen.values())

    @property
    def ok(self) -> bool:
        """Whether nothing was found but notes."""
        return all(seen.finding.severity == "note" for seen in self.findings)

    @property
    def noise_scale(self) -> float:
        """tr(Sigma) / |G|^2: the batch size at which noise and signal of the gradient are alike; nan if not known.

        Sigma is the covariance of the examples' gradients and G the true gradient; both are averaged over the past
        observations before they are divided.
        """
        if self._noise is None or self._noise[1] <= 0:
            return nan
        return self._noise[0] / self._noise[1]

    def __str__(self) -> str:
        n = sum(seen.finding.severity != "note" for seen in self.findings)
        head = f"{len(self.records)} observations up to step {self.step - 1}: {n or 'no'} finding{'s' * (n != 1)}"
        return "\n".join([head, *map(str, self.findings)])

    def to_html(self, path: str | PathLike[str] | None = None) -> str:
        """The findings and the records over time as HTML; nothing is loaded.

        Args:
            path: a file to which it is written as a page.
        """
        title = str(self).partition("\n")[0]
        body = fragment([f"<h1>{escape(title)}</h1>", findings_list(self._dated()), *over_time(self.records)])
        if path is not None:
            write_page(path, title, body)
        return body

    def _repr_html_(self) -> str:
        return self.to_html()

    def _dated(self) -> list[tuple[Finding, str]]:
        return [(seen.finding, seen.when) for seen in self.findings]

    # One observation

    def _observed(self, losses: Tensor, step: int) -> tuple[Finding, ...]:
        prepared = self._prepared(losses)
        graph = read_graph(losses, self.model)
        layers = find_layers(graph)
        wanted = {(layer.node, 0) for layer in layers.layers} | {(v.index, 0) for v in graph.parameters.values()}
        edges = [] if prepared is None or self.no_norms is not None else prepared.edges or []
        kept = _swept(graph, losses, wanted.union(edges))
        reading = _read(graph, layers, kept)
        if not reading.is_finite():
            return self._not_finite(losses, step)
        self._broken = False
        per_example = None if prepared is None or not edges else prepared.norms(kept)
        record = self._record(losses, step, reading, per_example)
        found = self._note(record, self._look(graph, reading, prepared, len(losses) if losses.ndim else 1))
        self._before = {n: p.detach().clone() for n, p in self.parameters.items() if p.ndim >= 2}
        self._n_observed += 1
        self._pending = record
        return found

    def _prepared(self, losses: Tensor) -> Prepared | None:
        """For norms of the examples' gradients; None where they cannot be had, or not cheaply."""
        if self.no_norms is None and losses.ndim != 1:
            self.no_norms = "the losses are a scalar; they have to be a vector, one for each example"
        if self.no_norms is not None or self._n_observed % self.norms_every:
            return None
        try:
            prepared = Prepared(losses, self.model, 1 / max(len(losses), 1))
        except RowgradError as error:
            self.no_norms = str(error)
            return None
        if prepared.meeting:
            self.no_norms = "the loss of one example depends on others, so that there is no gradient of one alone"
        elif prepared.edges is None:
            self.no_norms = "an operation has no rule, so that each example would need a pass of its own"
        return prepared

    def _look(self, graph: Graph, reading: Reading, prepared: Prepared | None, n_examples: int) -> Iterator[Finding]:
        if self._n_observed == 0:
            yield from unused_findings(graph, self.optimizer)
            yield from bias_findings(graph, reading)
            yield from input_findings(reading, self.limits)
            yield from symmetric_findings(reading, self.limits)
            if prepared is not None:
                yield from mixed_findings(graph, prepared.meeting, n_examples)
            if self.initial:
                yield from start_findings(graph, reading, self.limits)
        yield from depth_findings(reading, self.limits)
        yield from saturated_findings(reading, self.limits)
        yield from ratio_findings(reading, self.limits)
        yield from self._over_time(reading)

    def _over_time(self, reading: Reading) -> Iterator[Finding]:
        if self._past is None:
            self._past = _Window(reading)
        self._past.silences.add(reading)
        if self._past.silences.batches > self.window:
            yield from still_findings(self._past.silences, self._past.still(reading), reading, self.limits)
            yield from drift_findings(reading.moments(), self._past.moments, self.limits)
            self._past = _Window(reading)

    def _record(self, losses: Tensor, step: int, reading: Reading, per_example: Tensor | None) -> Record:
        noise = None
        if per_example is not None and len(per_example) > 1:
            self._average_noise(per_example, sum(size**2 for size in reading.gradient_norms.values()))
            noise = self.noise_scale
        return {
            "step": step,
            "time": time(),
            "loss": float(losses.detach().double().mean()),
            "layers": {
                p.layer.name: {"activation": p.activation, "cotangent": p.cotangent, "gradient": p.gradient}
                for p in reading.points
            },
            "norms": None if per_example is None else quantiles(per_example),
            "noise_scale": noise,
            "updates": {},
            "findings": [],
        }

    def _average_noise(self, per_example: Tensor, sq_mean: float) -> None:
        """Unbiased estimates of tr(Sigma) and |G|^2 from one batch, into the averages."""
        n = len(per_example)
        trace = (float(per_example.double().square().sum()) - n * sq_mean) / (n - 1)
        new = trace, sq_mean - trace / n
        old = new if self._noise is None else self._noise
        self._noise = (
            SMOOTHED * old[0] + (1 - SMOOTHED) * new[0],
            SMOOTHED * old[1] + (1 - SMOOTHED) * new[1],
        )

    def _sizes_of_steps(self) -> Iterator[Finding]:
        """The median step of late against the limits."""
        if len(self._updates) == N_UPDATES:
            usual = {n: median(u[n] for u in self._updates if n in u) for n in self._updates[-1]}
            yield from update_findings(usual, self.limits, rate_of(self.optimizer))

    def _not_finite(self, losses: Tensor, step: int) -> tuple[Finding, ...]:
        """The birthplace, once for a run of such steps."""
        if self._broken:
            return ()
        self._broken = True
        graph = read_graph(losses, self.model)
        layers = find_layers(graph)
        record = self._record(losses, step, _read(graph, layers, {}), None)
        flow = graph.backward({losses: mean_seed(losses)})
        found = self._note(record, birthplace(graph, flow, layers))
        self._pending = record
        self._write()
        return found

    # Keeping it

    def _note(self, record: Record, findings: Iterator[Finding]) -> tuple[Finding, ...]:
        found = by_severity(findings)
        for f in found:
            step = record["step"]
            key = f.kind, "" if f.kind == "update" else f.where  # which weights are the worst changes from step to step
            self._seen[key] = self._seen[key].again(f, step) if key in self._seen else Seen(f, step, step)
        record["findings"] += [f.to_dict() for f in found]
        return found

    def _write(self) -> None:
        """The pending record, now that nothing more comes to it."""
        record, self._pending = self._pending, None
        if record is None:
            return
        self.records.append(record)
        if self.log is not None:
            write_line(self.log, record)
        if self.writer is not None:
            write_scalars(self.writer, record)


class _Window:
    """Where things stood at one time, and what was silent since."""

    def __init__(self, reading: Reading) -> None:
        self.silences, self.moments = Silences(), reading.moments()
        names = {unit.layer.weights[0] for unit in reading.layers.units if unit.op == "relu"}
        self.rows = {name: _directions(reading.weights[name]) for name in names}

    def still(self, reading: Reading) -> dict[str, Tensor]:
        """For each weight before a rectifier, which rows point where they did."""
        return {n: (_directions(reading.weights[n]) - then).norm(dim=1) < STILL for n, then in self.rows.items()}


def _directions(weight: Tensor) -> Tensor:
    """Rows of length 1: weight decay shortens dead ones, too."""
    return torch.nn.functional.normalize(weight.detach().flatten(1), dim=1)


def _swept(graph: Graph, losses: Tensor, wanted: set[Edge]) -> dict[Edge, Tensor]:
    """The wanted cotangents; the others are let go as soon as they were sent on."""
    found: dict[Edge, Tensor] = {}

    def arrived(node: Node, own: list[Tensor | None]) -> None:
        found.update({(node.index, nr): z for nr, z in enumerate(own) if z is not None and (node.index, nr) in wanted})

    sweep(graph.tape, {graph.outputs[0]: mean_seed(losses)}, Cotangents(graph.tape), arrived)
    return found


def _read(graph: Graph, layers: Layers, cotangents: Mapping[Edge, Tensor]) -> Reading:
    gradients = {name: cotangents.get((v.index, 0)) for name, v in graph.parameters.items()}
    return Reading(graph.tape, layers, cotangents, gradients, graph.leaves)


def _sizes_of_changes(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of the change over norm of the weight, for weights that are not 0."""
    changes = norms([after[name].detach() - then for name, then in before.items()])
    sizes = norms(list(before.values()))
    return {name: c / size for name, c, size in zip(before, changes, sizes, strict=True) if size > 0}
