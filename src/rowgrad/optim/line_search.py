"""How far to go along a direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

LEAST_FALL = 1e-4  # of the loss, as a share of what its slope promises
EVALUATIONS = 60
FURTHEST = 10.0  # times as far as before, while the loss still falls


@dataclass
class Place:
    """A place t along a direction: the loss, its slope along the direction, its gradient (P,)."""

    t: float
    loss: float
    slope: float
    gradient: Tensor


def wolfe(at: Callable[[float], Place], start: Place, t: float, *, curvature: float, rounding: float) -> Place | None:
    """A place where the loss has fallen enough and its slope is at most `curvature` times the first in size.

    Such a place lies between `low`, which has fallen enough but is still steep downwards, and `high`, which has not
    fallen enough or goes up. The next trial is where the slopes' line crosses 0, or the middle where that shrinks the
    bracket too slowly. A quadratic needs two trials for the exact minimum.

    Args:
        at: evaluates a place.
        start: the place t = 0, with a slope below 0.
        t: first trial.
        curvature: 0.9 is loose, near 0 is an exact line search.
        rounding: by so much the loss may rise and still count as equal.
    Returns:
        The place, or the best one seen that has fallen enough, or None.
    Source: Wolfe 1969; bracketing as in Nocedal and Wright 2006, section 3.5.
    """
    least_fall = min(LEAST_FALL, curvature / 2)
    low, high, width = start, None, float("inf")
    for _ in range(EVALUATIONS):
        found = at(t)
        is_high = not found.loss <= start.loss + least_fall * t * start.slope + rounding or not isfinite(found.slope)
        if not is_high and abs(found.slope) <= -curvature * start.slope:
            return found
        if is_high or found.slope > 0:
            high = found
        else:
            low = found
        if high is None:
            t = min(_crossing(start, low) or FURTHEST * t, FURTHEST * t)
            continue
        wanted, before, width = _crossing(low, high), width, abs(high.t - low.t)
        is_shrinking = width <= before / 2
        t = wanted if wanted is not None and wanted < high.t and is_shrinking else (low.t + high.t) / 2
    return low if low.t > 0 else None


def _crossing(low: Place, high: Place) -> float | None:
    """Where the line through two slopes is 0; None unless it lies beyond `low` and the slopes are finite and rise."""
    rise = high.slope - low.slope
    if not (isfinite(rise) and rise > 0):
        return None
    t = low.t - low.slope * (high.t - low.t) / rise
    return t if t > low.t else None
