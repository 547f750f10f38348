"""One derivative along one direction: what backpropagation says against what differences of the loss say.

Note [when a difference may be believed]
    A central difference is wrong by its truncation, of order h^2, by noise / h, and by kinks and jumps of the loss
    between the two points. So where the two derivatives disagree at a step h, it is asked why before the gradient is
    blamed:
    - The pieces of piecewise functions differ between the points: a smaller step follows. What a smaller step says
      counts only if its noise is small beside the disagreement, so that no loose test excuses what a tight one found.
    - They do not: the difference at h/2 tells truncation (it falls to a quarter) from a wrong gradient (it stays).
    - They differ at every step: the kink lies at this very point, or kinks lie densely. The probe is repeated beside
      this point, where no kink lies exactly. If pieces differ there too, the jump of the derivative from the left to
      the right says how much of a disagreement they can explain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rowgrad.checking.kinks import crossed
from rowgrad.checking.landscape import ROUNDING, Landscape, Step, random_unit

STEPS = (1e-5, 1e-6, 1e-7)  # over the size of what is moved, at least 1
LONG_STEP = 1e-3  # where noise hides a derivative
NOISES = 8.0  # allowed, in standard deviations of the noise of a value, over h
OF_ROUNDING = 64  # units in the last place of a gradient's size that backpropagation may be off by
KINKS = 3.0  # disagreement that kinks may explain, over the difference of the one-sided derivatives
SHARP = 1e-3  # what is allowed for noise, over the derivative, up to which a probe tells something


@dataclass(frozen=True)
class Probe:
    """What was found along one direction of one parameter.

    Attributes:
        parameter: its name.
        place: the entry moved, as an index; None for a random direction in all of them.
        computed: derivative by backpropagation.
        estimated: derivative by differences.
        allowed: how far the two may be apart because of noise.
        verdict: "ok", "blind" (both below noise, or noise too large to tell), "kink" (the loss has a kink at this
            point, so that nothing can be told), "wrong", "lost" or "opposite".
        kinks: functions whose pieces differ between the two points, with the number of entries.
    """

    parameter: str
    place: tuple[int, ...] | None
    computed: float
    estimated: float
    allowed: float
    verdict: str
    kinks: tuple[tuple[str, int], ...] = ()

    @property
    def ok(self) -> bool:
        return self.verdict in {"ok", "blind", "kink"}

    @property
    def rho(self) -> float:
        """Aggarwal (2018), section 3.3, eq. 13: |difference| / |sum|; 0 where both derivatives are 0."""
        gap = abs(self.estimated - self.computed)
        total = abs(self.estimated + self.computed)
        return 0.0 if gap == 0 else gap / total if total > 0 else float("inf")


@dataclass(frozen=True)
class Prober:
    """Probes one landscape.

    Attributes:
        landscape: the loss.
        noise: standard deviation of the noise of one value.
        threshold: rho allowed.
        central: two-sided differences; else one-sided ones as in eq. 12.
        frozen: rows of parameters that have no gradient by intent; they stay where they are.
        beside: whether this point lies beside the one asked about, so that kinks are no reason to move once more.
    """

    landscape: Landscape
    noise: float
    threshold: float
    central: bool = True
    beside: bool = False
    frozen: Mapping[str, list[int]] = field(default_factory=dict)

    def along(self, name: str, gradient: Tensor, entries: int | range | None, generator: torch.Generator) -> Probe:
        """One probe of a parameter, at one of its entries or along a random direction in a range of them or in all."""
        p = self.landscape.parameters[name].detach()
        step = torch.zeros(p.shape, dtype=p.dtype, device=p.device)
        if isinstance(entries, int):
            place = tuple(int(i) for i in torch.unravel_index(torch.tensor(entries), p.shape))
            step[place], size = 1, float(p[place].abs())
        else:
            place, part = None, range(p.numel()) if entries is None else entries
            step.view(-1)[part.start : part.stop] = random_unit(len(part), generator).to(step)
            size = float(p.norm())
        if name in self.frozen:
            step[self.frozen[name]] = 0
        probe = Probe(name, place, float((gradient * step).sum()), 0.0, 0.0, "blind")
        return self(probe, {name: step}, size, OF_ROUNDING * ROUNDING * float(gradient.norm()))

    def __call__(self, probe: Probe, step: Step, size: float, rounding: float) -> Probe:
        """The probe with its verdict.

        Args:
            probe: names the parameter and place, and what backpropagation says.
            step: the direction, of length 1.
            size: of what is moved.
            rounding: how far backpropagation may be off by its own rounding.
        """
        gap = float("inf")  # at the step before
        for eps in STEPS:
            h = eps * max(1.0, size)
            probe = self._estimated(probe, step, h, rounding)
            if self._agrees(probe):
                sharp = SHARP * max(abs(probe.estimated), abs(probe.computed))
                told = probe.allowed <= min(sharp, 0.1 * gap)
                return replace(probe, verdict="ok") if told else self._farther(probe, step, size, rounding)
            gap = abs(probe.estimated - probe.computed)
            between = self._crossed(step, h)
            verdict = None if between else self._smooth(probe, step, h)
            if verdict is not None:
                return replace(probe, verdict=verdict)
            probe = replace(probe, kinks=tuple(between.items()))
        return replace(probe, verdict=self._among_kinks(probe, step, STEPS[-1] * max(1.0, size)))

    def _farther(self, probe: Probe, step: Step, size: float, rounding: float) -> Probe:
        """A probe that noise blinds, at a longer step: it may prove right there, and never wrong."""
        far = self._estimated(probe, step, LONG_STEP * max(1.0, size), rounding)
        sharp = far.allowed <= SHARP * max(abs(far.estimated), abs(far.computed))
        return replace(far, verdict="ok") if sharp and self._agrees(far) else replace(probe, verdict="blind")

    def _estimated(self, probe: Probe, step: Step, h: float, rounding: float) -> Probe:
        if self.central:
            estimate = self.landscape.rise_between(step, -h, h) / (2 * h)
        else:
            estimate = self.landscape.rise(step, h) / h
        return replace(probe, estimated=estimate, allowed=NOISES * self.noise / h + rounding)

    def _agrees(self, probe: Probe) -> bool:
        gap = abs(probe.estimated - probe.computed)
        return gap <= self.threshold * abs(probe.estimated + probe.computed) + probe.allowed

    def _crossed(self, step: Step, h: float) -> dict[str, int]:
        low = -h if self.central else 0.0
        return crossed(self.landscape.pieces(step, low), self.landscape.pieces(step, h))

    def _smooth(self, probe: Probe, step: Step, h: float) -> str | None:
        """The verdict where no kink lies between the points; None where only a smaller step can tell."""
        half = self._estimated(probe, step, h / 2, 0.0)
        gap = abs(probe.estimated - probe.computed)
        return _fault(probe) if abs(half.estimated - probe.estimated) <= 0.5 * gap else None

    def _among_kinks(self, probe: Probe, step: Step, h: float) -> str:
        if not self.beside:
            return "kink"
        right = self.landscape.rise(step, h) / h
        left = -self.landscape.rise(step, -h) / h
        explained = KINKS * abs(right - left) + 2 * probe.allowed
        return "kink" if abs(probe.estimated - probe.computed) <= explained else _fault(probe)


def _fault(probe: Probe) -> str:
    if probe.computed == 0:
        return "lost"
    ratio = probe.estimated / probe.computed
    return "opposite" if -2 < ratio < -0.5 else "wrong"
