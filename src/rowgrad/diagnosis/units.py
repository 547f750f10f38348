"""Units that cannot learn: saturated, dead, or copies of each other (Aggarwal 2018, sections 3.3 and 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from rowgrad.diagnosis.findings import Finding, some
from rowgrad.diagnosis.layers import SQUASHING, Layer, Unit
from rowgrad.diagnosis.limits import Limits
from rowgrad.diagnosis.reading import Reading


def by_function(reading: Reading) -> dict[tuple[str, str], list[Unit]]:
    """Activation functions by (weights of the layer before, operation): one used at several times is one."""
    found: dict[tuple[str, str], list[Unit]] = {}
    for unit in reading.layers.units:
        found.setdefault((unit.layer.weights[0], unit.op), []).append(unit)
    return found


# Saturation

# The slope of an activation function over its largest, from what it returned.
SLOPES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda o: 4 * o * (1 - o),
    "tanh": lambda o: 1 - o.square(),
}
INVERSES: Mapping[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.logit, "tanh": torch.atanh}


def saturated_findings(reading: Reading, limits: Limits) -> Iterator[Finding]:
    """Sigmoids and tanhs most of whose entries lie where the function is flat."""
    for (_, op), units in by_function(reading).items():
        values = [v.flatten() for v in map(reading.unit, units) if v is not None] if op in SQUASHING else []
        if not values:
            continue
        o = torch.cat(values)
        slope = SLOPES[op](o)
        share = float((slope < limits.slope).double().mean())
        if share > limits.saturated:
            yield _saturated(units, op, share, float(slope.double().mean()) * SQUASHING[op], o, limits)


def _saturated(units: list[Unit], op: str, share: float, slope: float, o: Tensor, limits: Limits) -> Finding:
    formula = "o(1-o)" if op == "sigmoid" else "1-o^2"
    size = float(_argument(o, op).square().mean().sqrt())
    layer = units[0].layer
    return Finding(
        "saturated",
        _where(units),
        f"{share:.0%} of its entries are where {op} is flat; {formula} is {slope:.2g} in the mean, at most "
        f"{SQUASHING[op]:g}, and multiplies what passes backward",
        f"Multiply the weights and the bias of {layer.name} by {1 / size:.2g}, which brings the root mean square of "
        f"what enters {op} from {size:.2g} or more to 1",
        "warning",
        share,
        limits.saturated,
    )


def _argument(o: Tensor, op: str) -> Tensor:
    """What went into the function; entries rounded to its ends count as the last number before them."""
    edge = torch.finfo(o.dtype).eps
    low = edge if op == "sigmoid" else edge - 1
    return INVERSES[op](o.double().clamp(low, 1 - edge))


def _where(units: list[Unit]) -> str:
    more = f" and {len(units) - 1} more uses" if len(units) > 1 else ""
    return units[0].name + more


# Dead rectifiers


@dataclass
class Silence:
    """Which units of one rectifier were 0 for every example so far."""

    units: list[Unit]
    silent: Tensor
    examples: int


class Silences:
    """Watches rectifiers over several batches."""

    def __init__(self) -> None:
        self.batches = 0
        self.found: dict[tuple[str, str], Silence] = {}

    def add(self, reading: Reading) -> None:
        """One more batch."""
        self.batches += 1
        for key, units in by_function(reading).items():
            for unit in units if key[1] == "relu" else ():
                self._add(key, units, unit, reading.unit(unit))

    def _add(self, key: tuple[str, str], units: list[Unit], unit: Unit, value: Tensor | None) -> None:
        if value is None or not value.numel():
            return
        others = [d for d in range(value.ndim) if d != unit.dim]
        silent, examples = (value.amax(others) if others else value) == 0, value.shape[0]
        if key not in self.found:
            self.found[key] = Silence(units, silent, examples)
        elif self.found[key].silent.shape == silent.shape:
            known = self.found[key]
            known.silent, known.examples = known.silent & silent, known.examples + examples


def dead_findings(silences: Silences, reading: Reading, limits: Limits) -> Iterator[Finding]:
    """Layers with many units that were 0 throughout: nothing passes back through them, so nothing revives them."""
    for silence in silences.found.values():
        share = float(silence.silent.double().mean())
        if share > limits.dead:
            yield _dead(silence, share, reading, limits)
        elif silences.batches > 1 and share > limits.dead_note:
            yield replace(_dead(silence, share, reading, limits), severity="note", limit=limits.dead_note)


def _dead(silence: Silence, share: float, reading: Reading, limits: Limits) -> Finding:
    dead, layer = silence.silent.nonzero().flatten().tolist(), silence.units[0].layer
    weight = reading.weights[layer.weights[0]]
    std = sqrt(2 / max(weight[0].numel(), 1))
    every = "all" if len(dead) == len(silence.silent) else f"{len(dead)} of {len(silence.silent)}"
    return Finding(
        "dead",
        _where(silence.units),
        f"{every} units were 0 for each of {silence.examples} examples ({some(list(map(str, dead)), 5)}); no gradient "
        f"reaches their weights in {layer.name}",
        f"Draw these {len(dead)} rows of {layer.weights[0]} anew with standard deviation {std:.2g} = sqrt(2/fan_in) "
        "and set their biases to 0; against a relapse divide the rate by 10 or use leaky ReLU (slope 0.01)",
        "error" if share == 1 else "warning",
        share,
        limits.dead,
    )


def still_findings(
    silences: Silences, still: Mapping[str, Tensor], reading: Reading, limits: Limits
) -> Iterator[Finding]:
    """Layers with many units that were 0 throughout and whose weights stayed where they were: dead for good.

    `still` maps the weights of layers to a mask of their rows.
    """
    for silence in silences.found.values():
        mask = still.get(silence.units[0].layer.weights[0])
        if mask is not None and mask.shape == silence.silent.shape:
            dead = replace(silence, silent=silence.silent & mask)
            share = float(dead.silent.double().mean())
            if share > limits.dead_still:
                found = _dead(dead, share, reading, limits)
                moved = "and whose weights have not moved since the first of them"
                yield replace(found, evidence=f"{found.evidence}, {moved}", limit=limits.dead_still)


# Copies


def symmetric_findings(reading: Reading, limits: Limits) -> Iterator[Finding]:
    """Hidden units that have the same weights and the same gradient, so that no step will ever tell them apart."""
    hidden = {w: p.layer for p in reading.points for w in p.layer.weights if _is_hidden(p.layer, reading)}
    for name, layer in hidden.items():
        weight, gradient = reading.weights[name], reading.gradients.get(name)
        if gradient is not None and len(weight) > 1:
            n = _n_copies(weight, gradient, limits.copies)
            if n > 0:
                yield _symmetric(name, layer, n, weight, limits)


def _is_hidden(layer: Layer, reading: Reading) -> bool:
    return layer.level < reading.layers.depth and layer.op != "embedding"


def _n_copies(weight: Tensor, gradient: Tensor, tolerance: float) -> int:
    """How many units equal another one; those without weights and gradient (pruned) only where all are so.

    Units that are the same have the same product with any one direction, so only neighbors by that are compared.
    """
    weight, gradient = _scaled(weight), _scaled(gradient)
    direction = torch.linspace(1, 2, weight.shape[1], dtype=weight.dtype, device=weight.device).sin()
    mixed, order = (weight @ direction + 2 * (gradient @ direction)).sort()
    size = (weight.square().sum(1) + gradient.square().sum(1)).sqrt()[order]
    near = (mixed[1:] - mixed[:-1]).abs() <= (tolerance * size[1:] * direction.norm() * 3)
    near &= (size[1:] > 0) if bool((size > 0).any()) else near
    one, other = order[1:][near], order[:-1][near]
    gap = torch.cat([weight[one] - weight[other], gradient[one] - gradient[other]], 1).norm(dim=1)
    return int((gap <= tolerance * size[1:][near]).sum())


def _scaled(t: Tensor) -> Tensor:
    """Rows of units, over the size of the whole."""
    t = t.detach().flatten(1)
    t = t if t.dtype == torch.float64 else t.float()
    return t / t.abs().max().clamp(min=torch.finfo(t.dtype).tiny)


def _symmetric(name: str, layer: Layer, n: int, weight: Tensor, limits: Limits) -> Finding:
    units, fan_in = len(weight), weight[0].numel()
    return Finding(
        "symmetric",
        name,
        f"{n + 1 if n < units - 1 else 'all'} of {units} units in {layer.name} have the same weights and the same "
        "gradient: they will stay copies of each other",
        f"Draw the weights at random with standard deviation {sqrt(1 / fan_in):.2g} = sqrt(1/fan_in), or "
        f"{sqrt(2 / fan_in):.2g} before a ReLU",
        "error" if n == units - 1 else "warning",
        n / units,
        0.0,
    )
