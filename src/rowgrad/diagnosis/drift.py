"""Drift: how far the inputs of layers have moved since an earlier time (Aggarwal 2018, section 3.6, input shift)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rowgrad.diagnosis.findings import Finding
from rowgrad.diagnosis.limits import Limits
from rowgrad.diagnosis.reading import Moments


def shift(now: Moments, then: Moments) -> float:
    """Root mean square of how far the means of the features moved, over the larger of the two spreads."""
    spread = max(now.std, then.std)
    return float((now.mean - then.mean.to(now.mean)).square().mean().sqrt()) / spread if spread > 0 else 0.0


def drift_findings(now: Mapping[str, Moments], then: Mapping[str, Moments], limits: Limits) -> Iterator[Finding]:
    """Layers whose input has moved far; the one that moved farthest speaks for those behind it."""
    shifts = {n: shift(now[n], then[n]) for n in now if n in then and now[n].mean.shape == then[n].mean.shape}
    far = [name for name, value in shifts.items() if value > limits.drift]
    if far:
        worst = max(far, key=lambda n: shifts[n])
        change = now[worst].std / max(then[worst].std, 1e-30)
        yield Finding(
            "drift",
            f"the input of {worst}",
            f"its mean moved by {shifts[worst]:.3g} standard deviations while its spread changed {change:.2g} times; "
            f"{len(far)} of {len(shifts)} layers see another distribution than before",
            f"Divide the rate by {shifts[worst] / limits.drift * 2:.2g}, or put a BatchNorm or LayerNorm before it",
            "warning",
            shifts[worst],
            limits.drift,
        )
