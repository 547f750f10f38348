"""Are these gradients the derivatives of the loss? Backpropagation against differences (Aggarwal 2018, section 3.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rowgrad.checking.landscape import Landscape, gradient_of, random_unit
from rowgrad.checking.locate import locate, wrong_entry
from rowgrad.checking.precision import in_float64, narrowest
from rowgrad.checking.probe import Probe, Prober
from rowgrad.checking.report import Report
from rowgrad.errors import ParameterError
from rowgrad.parameters import Params, named
from rowgrad.repeat import Repeated
from rowgrad.tape import Tape, signed

THRESHOLDS = {"central": 1e-6, "forward": 1e-3}  # the seed's, for smooth losses and where ReLU is used
OWN_ERRORS = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.2}
BESIDE = 1e-3  # how far parameters are moved, each as a vector, where the loss has a kink
SMALL_PART = 1e-2  # of the whole gradient: below it a parameter's gradient is not compared relative to itself

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class GradientFinding:
    """All probes of one parameter.

    Attributes:
        parameter: its name.
        shape: its shape.
        probes: random directions first, then sampled entries.
        own_error: distance of the gradient in the dtype and form the closure is written in from the one in float64,
            over that one's norm; nan where it could not be compared.
        ok: whether no probe and not the own precision is at fault.
    """

    parameter: str
    shape: tuple[int, ...]
    probes: tuple[Probe, ...]
    own_error: float
    ok: bool

    @property
    def worst(self) -> Probe:
        """A fault before anything else, then by rho among those that tell something."""
        return max(self.probes, key=lambda p: (not p.ok, p.verdict == "ok", p.rho))

    @property
    def counts(self) -> Counter[str]:
        """How many probes came to each verdict."""
        return Counter(p.verdict for p in self.probes)

    def cells(self) -> tuple[str, ...]:
        worst = self.worst
        told = not worst.ok or worst.verdict == "ok"
        return (
            self.parameter,
            f"{worst.rho:.1e}" if told else "-",
            _place(worst) if told else "-",
            f"{worst.computed:.6g}",
            f"{worst.estimated:.6g}",
            ", ".join(f"{n} {verdict}" for verdict, n in self.counts.most_common()),
            f"{self.own_error:.0e}" if isfinite(self.own_error) else "-",
        )

    def to_dict(self) -> dict[str, Any]:
        worst = self.worst
        return {
            "parameter": self.parameter,
            "shape": list(self.shape),
            "rho": worst.rho,
            "place": _place(worst),
            "backpropagation": worst.computed,
            "differences": worst.estimated,
            "verdicts": dict(self.counts),
            "own_error": self.own_error,
            "ok": self.ok,
        }


def _place(probe: Probe) -> str:
    return "a direction" if probe.place is None else str(list(probe.place))


COLUMNS = ("parameter", "worst rho", "at", "backpropagation", "differences", "probes", "own dtype")


def check_gradients(
    closure: Callable[[], Tensor],
    model: Params,
    n: int = 100,
    *,
    n_directions: int = 1,
    scheme: str = "central",
    threshold: float | None = None,
    hold_detached: bool = False,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Report[GradientFinding]:
    """Compare backpropagation with differences of the loss, at sampled entries and along random directions.

    In every parameter some entries are moved one at a time, and all of them at once along a random direction: a
    single wrong entry among a million shows in the direction, which sampling would hardly meet. All is done in
    float64, whatever the model is written in, with the same random numbers (dropout) and buffers (BatchNorm) in every
    run; then the gradient as it is written (float32, autocast, compiled) is compared with that one. Kinks (ReLU, max
    pooling) are found and told apart from faults, and nothing else is excused: see Note [when a difference may be
    believed]. The row of an embedding's `padding_idx` stays where it is. A fault is followed to the operation that
    causes it.

    Parameters, buffers, `.grad` and random states are afterwards what they were. Costs about 3 forward passes a probe.

    Args:
        closure: the forward pass; returns the losses, of any shape; their sum is differentiated. Must give the same
            losses when it is run again.
        model: whose parameters are checked: a module, its parameters, `optimizer.param_groups`, or names and tensors.
        n: entries to move, over all parameters; each has at least one.
        n_directions: random directions for each parameter.
        scheme: "central", (L(w + h) - L(w - h)) / 2h, or "forward", (L(w + h) - L(w)) / h (eq. 12).
        threshold: of rho = |a - b| / |a + b| (eq. 13); default 1e-6 for central differences, 1e-3 for forward ones.
        hold_detached: take what `detach()` returns for a constant, where gradients are stopped on purpose (targets,
            straight-through estimators, truncation). By default that is a gradient lost.
        generator: for entries and directions, on the CPU; default one of its own, seeded.
        progress: called with the number of probes done and of all.
    Returns:
        A `Report`: `ok`, a table as its `str`, `to_dict()`, `to_html()`, and for each parameter its `probes`.
    Raises:
        TypeError: `closure` cannot be called.
        ValueError: a number that cannot be, or an unknown scheme.
        ParameterError: no parameters, DistributedDataParallel, or a device without float64.
        NonFiniteError: a loss is not finite.
        GraphError: two runs give different losses, the pass does not run in float64, or there is no graph.

    >>> import torch, rowgrad
    >>> model = torch.nn.Linear(3, 2)
    >>> x = torch.tensor([[1.0, 2.0, 3.0]])
    >>> report = rowgrad.check_gradients(lambda: model(x).tanh().square().sum(), model, n=4)
    >>> report.ok
    True
    """
    _check_options(n, n_directions, scheme, threshold)
    if isinstance(model, DistributedDataParallel):
        raise ParameterError("model is DistributedDataParallel: pass model.module, and a closure that calls it")
    parameters = {name: p for name, p in named(model).by_name.items() if p.numel() > 0}
    run = Repeated(closure, model)
    generator = generator or torch.Generator().manual_seed(0)
    rho = THRESHOLDS[scheme] if threshold is None else threshold
    own, own_dtype = _own_gradient(run, parameters)
    with in_float64(model, parameters.values()):
        landscape = Landscape(run, parameters, hold_detached)
        gradient = landscape.gradient()
        tape = Tape(landscape.losses())
        noise = landscape.noise(_everywhere(parameters, generator))
        prober = Prober(landscape, noise, rho, scheme == "central", frozen=_padding(tape, parameters))
        probes = _probes(prober, gradient, n, n_directions, generator, progress)
        probes = _beside_kinks(prober, probes, generator)
        own_errors = _own_errors(own, gradient) if not run.draws else {}
        findings = tuple(
            _finding(name, p, probes[name], own_errors.get(name, float("nan")), OWN_ERRORS.get(own_dtype, 1e-3))
            for name, p in parameters.items()
        )
        notes = tuple(_notes(findings, prober, gradient, model, generator, own_dtype))
        remarks = tuple(_remarks(findings, own_dtype, narrowest(tape), run.draws))
    n_entries = sum(p.place is not None for f in findings for p in f.probes)
    return Report(
        f"{n_entries} entries and {n_directions * len(parameters)} directions, {scheme} differences in float64",
        f"rho up to {rho:.0e} allowed",
        COLUMNS,
        findings,
        notes,
        remarks,
    )


def _check_options(n: int, n_directions: int, scheme: str, threshold: float | None) -> None:
    if n < 1 or n_directions < 0:
        raise ValueError(f"n={n}, n_directions={n_directions}: expected at least 1 entry and no negative number")
    if scheme not in THRESHOLDS:
        raise ValueError(f"scheme={scheme!r}: expected one of {', '.join(map(repr, THRESHOLDS))}")
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold}: expected a number between 0 and 1")


def _everywhere(parameters: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    return {name: random_unit(p.numel(), generator).view(p.shape).to(p) for name, p in parameters.items()}


# Probes


def _probes(
    prober: Prober,
    gradient: Mapping[str, Tensor],
    n: int,
    n_directions: int,
    generator: torch.Generator,
    progress: Progress | None,
) -> dict[str, tuple[Probe, ...]]:
    entries = _sampled(gradient, n, generator)
    total, done = sum(map(len, entries.values())) + n_directions * len(entries), 0
    found: dict[str, tuple[Probe, ...]] = {}
    for name, chosen in entries.items():
        made: list[Probe] = []
        for entry in [None] * n_directions + chosen:
            made.append(prober.along(name, gradient[name], entry, generator))
            done += 1
            if progress is not None:
                progress(done, total)
        found[name] = tuple(made)
    return found


def _beside_kinks(
    prober: Prober, probes: Mapping[str, tuple[Probe, ...]], generator: torch.Generator
) -> dict[str, tuple[Probe, ...]]:
    """Those that met a kink at this point, repeated at a point beside it."""
    if not any(probe.verdict == "kink" for found in probes.values() for probe in found):
        return dict(probes)
    landscape = prober.landscape
    with landscape.moved(_everywhere(landscape.parameters, generator), BESIDE):
        beside = replace(
            prober, landscape=Landscape(landscape.run, landscape.parameters, landscape.held is not None), beside=True
        )
        gradient = beside.landscape.gradient()
        return {
            name: tuple(
                p if p.verdict != "kink" else beside.along(name, gradient[name], _flat(p, gradient[name]), generator)
                for p in found
            )
            for name, found in probes.items()
        }


def _flat(probe: Probe, like: Tensor) -> int | None:
    """The place of a probe in the parameter laid out as a vector."""
    if probe.place is None:
        return None
    flat = 0
    for i, size in zip(probe.place, like.shape, strict=True):
        flat = flat * size + i
    return flat


def _sampled(gradient: Mapping[str, Tensor], n: int, generator: torch.Generator) -> dict[str, list[int]]:
    """Entries of each parameter: an equal number for each as far as it has that many, the rest where there are more."""
    sizes = {name: g.numel() for name, g in gradient.items()}
    counts = dict.fromkeys(sizes, 0)
    for _ in range(max(n, len(sizes))):
        name = min(sizes, key=lambda k: (counts[k] >= sizes[k], counts[k], -sizes[k]))
        counts[name] += counts[name] < sizes[name]
    return {name: _distinct(sizes[name], counts[name], generator) for name in sizes}


def _distinct(size: int, n: int, generator: torch.Generator) -> list[int]:
    if size <= 4 * n:
        return torch.randperm(size, generator=generator)[:n].tolist()
    found: dict[int, None] = {}
    while len(found) < n:
        found[int(torch.randint(size, (), generator=generator))] = None
    return list(found)


def _padding(tape: Tape, parameters: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Rows of parameters that an embedding was told to leave alone."""
    names = {tape.leaves[id(p)]: name for name, p in parameters.items() if id(p) in tape.leaves}
    found: dict[str, list[int]] = {}
    for node in tape.nodes:
        table = node.slots[0] if node.slots else None
        if table is not None and table[0] in names and node.has_saved("padding_idx"):
            row = signed(node.attribute("padding_idx"))
            if row >= 0:
                found.setdefault(names[table[0]], []).append(row)
    return found


# The gradient as it is written


def _own_gradient(run: Repeated, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.dtype]:
    with _on_copies(parameters):
        losses = run()
        if losses.grad_fn is None:
            return {}, torch.float64
        tape = Tape(losses)
        tape.refuse_hidden()
        return gradient_of(losses, parameters), narrowest(tape)


@contextmanager
def _on_copies(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Some forward passes write into their parameters: the norm of an embedding's rows."""
    before = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.data = before[name].clone()
        yield
    finally:
        for name, p in parameters.items():
            p.data = before[name]


def _own_errors(own: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    whole = sum(float(g.square().sum()) for g in exact.values()) ** 0.5
    errors = {}
    for name, g in own.items():
        size = max(float(exact[name].norm()), SMALL_PART * whole)
        error = float((g - exact[name]).norm())
        errors[name] = 0.0 if error == 0 else error / size if size > 0 else float("inf")
    return errors


# What is said


def _finding(name: str, p: Tensor, probes: tuple[Probe, ...], own_error: float, allowed: float) -> GradientFinding:
    ok = all(probe.ok for probe in probes) and not own_error > allowed
    return GradientFinding(name, tuple(p.shape), probes, own_error, ok)


SAID = {
    "wrong": "is wrong",
    "lost": "is lost: backpropagation says 0, while the loss changes",
    "opposite": "has the opposite sign",
}


def _notes(
    findings: Sequence[GradientFinding],
    prober: Prober,
    gradient: Mapping[str, Tensor],
    model: Params,
    generator: torch.Generator,
    own_dtype: torch.dtype,
) -> Iterator[str]:
    wrong = [f for f in findings if not f.worst.ok]
    for verdict, words in SAID.items():
        names = [f.parameter for f in wrong if f.worst.verdict == verdict]
        if names:
            yield f"FAILED {_some(names)}: the gradient {words}"
    for finding in wrong:
        if all(p.ok for p in finding.probes if p.place is not None):
            yield _seen_by_direction(finding, prober, gradient[finding.parameter], generator)
    if wrong:
        yield f"The fault lies {locate(prober, [f.parameter for f in wrong], model, generator)}"
    for finding in findings:
        if finding.worst.ok and not finding.ok:
            yield (
                f"FAILED {finding.parameter}: in {_short(own_dtype)} as it is written (dtype, autocast, compilation) "
                f"the gradient is off by {finding.own_error:.1e} from the one in float64, which the differences "
                f"confirm; {OWN_ERRORS.get(own_dtype, 1e-3):.0e} is allowed"
            )


def _seen_by_direction(finding: GradientFinding, prober: Prober, gradient: Tensor, generator: torch.Generator) -> str:
    """What sampling alone would have told of a fault that only random directions show, and where it is."""
    n, size = sum(p.place is not None for p in finding.probes), prod(finding.shape)
    entry = wrong_entry(prober, finding.parameter, gradient, generator)
    return (
        f"{finding.parameter}: seen along a random direction alone; sampling {n} of {size} entries meets a single "
        f"wrong one with probability {n / size:.2g}" + ("" if entry is None else f". Wrong at {list(entry)}")
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _remarks(
    findings: Sequence[GradientFinding], own_dtype: torch.dtype, narrow: torch.dtype, draws: bool
) -> Iterator[str]:
    untold = [f.parameter for f in findings if f.counts["blind"] == len(f.probes)]
    if untold:
        yield (
            f"{_some(untold)}: no probe tells anything, derivative and differences are below the noise of the loss, as "
            "with a bias before BatchNorm or weights of dead units"
        )
    kinks = Counter(name for f in findings for p in f.probes if p.verdict == "kink" for name, _ in p.kinks)
    if kinks:
        yield (
            f"{sum(f.counts['kink'] for f in findings)} of the probes meet kinks of {', '.join(kinks)} however small "
            "the step, here and beside this point; they tell nothing finer than these"
        )
    if narrow != torch.float64:
        yield f"part of the forward pass stays in {_short(narrow)}; its noise was measured and allowed for"
    if draws:
        yield f"the closure draws random numbers, other ones in {_short(own_dtype)}: that gradient was not compared"


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
