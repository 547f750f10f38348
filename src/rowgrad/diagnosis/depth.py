"""Vanishing and exploding: what activations and cotangents do from layer to layer (Aggarwal 2018, section 3.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, isfinite

from rowgrad.diagnosis.findings import Finding
from rowgrad.diagnosis.limits import Limits
from rowgrad.diagnosis.reading import Point, Reading

UNDERFLOW = 1e-20  # of what set out; nothing that falls to 0 at once comes near


@dataclass(frozen=True)
class Trend:
    """A size followed through the levels of a network, in the direction in which it travels."""

    what: str
    start: str  # layer at which it sets out
    end: str
    total: float  # size at the end over size at the start
    steps: int

    @property
    def per_layer(self) -> float:
        """Geometric mean of the factors of the layers."""
        return self.total ** (1 / self.steps)


def trends(reading: Reading) -> list[Trend]:
    """Cotangents from the last layer to the first, activations from the second to the last.

    At each level the largest counts: what arrives there by one way is there. The inputs of the first layer are the
    data, whose size is a matter of its own. In a recurrent net the uses of the shared weight are the levels; the inputs
    of all times may have met their weight at once.
    """
    shared = _shared(reading)
    points = [p for p in reading.points if shared is None or shared[0] in p.layer.weights]
    backward = _sizes(points, lambda p: p.cotangent)[::-1]
    forward = [s for s in _sizes(points, lambda p: p.activation) if s[0] > 1]
    return [
        Trend(what, sizes[0][1], sizes[-1][1], sizes[-1][2] / sizes[0][2], len(sizes) - 1)
        for what, sizes in (
            ("the cotangent", _until_underflow(backward)),
            ("the activation", _until_underflow(forward)),
        )
        if len(sizes) > 1 and sizes[0][2] > 0
    ]


def _sizes(points: list[Point], size: Callable[[Point], float]) -> list[tuple[int, str, float]]:
    """(level, layer, size) of the largest at each level, by level."""
    found: dict[int, tuple[str, float]] = {}
    for p in points:
        if isfinite(size(p)) and size(p) > found.get(p.layer.level, ("", -inf))[1]:
            found[p.layer.level] = p.layer.name, size(p)
    return [(level, *found[level]) for level in sorted(found)]


def _until_underflow(sizes: list[tuple[int, str, float]]) -> list[tuple[int, str, float]]:
    """Without the zeros at the end, if what shrank before them had become too small to be held."""
    n = next((k for k, (_, _, size) in enumerate(sizes) if size == 0), len(sizes))
    return sizes[:n] if n > 1 and sizes[n - 1][2] < UNDERFLOW * sizes[0][2] else sizes


def depth_findings(reading: Reading, limits: Limits) -> Iterator[Finding]:
    """Where a size falls or grows beyond the limits, over all layers and in their mean."""
    for trend in trends(reading):
        limit = limits.fall if not limits.per_layer <= trend.per_layer <= 1 / limits.per_layer else limits.far
        if trend.total < limit:
            yield _finding("vanishing", trend, reading, limit)
        elif trend.total > 1 / limit:
            yield _finding("exploding", trend, reading, 1 / limit)


def _finding(kind: str, trend: Trend, reading: Reading, limit: float) -> Finding:
    change = f"{trend.total:.1e} of its size" if kind == "vanishing" else f"{trend.total:.1e} times its size"
    shared = _shared(reading)
    through = f"through {shared[1]} uses of {shared[0]}" if shared else f"over {trend.steps} layers"
    return Finding(
        kind,
        f"{trend.start} to {trend.end}",
        f"{trend.what} arrives with {change} {through}, a factor of {trend.per_layer:.2g} for each",
        _remedy(trend, reading, shared),
        "error" if trend.total == 0 else "warning",
        trend.total,
        limit,
    )


def _shared(reading: Reading) -> tuple[str, int] | None:
    """The weight that most levels share, and how often: a recurrent net unrolled in time."""
    uses = {(w, p.layer.level) for p in reading.points for w in p.layer.weights}
    levels = Counter(sorted(w for w, _ in uses))
    if not levels:
        return None
    name, n = levels.most_common(1)[0]
    return (name, n) if n > 2 and n >= 0.6 * reading.layers.depth else None


def _remedy(trend: Trend, reading: Reading, shared: tuple[str, int] | None) -> str:
    gain = trend.per_layer
    if gain == 0:
        return "Nothing passes: look for dead units or a product with 0 between them"
    if shared:
        how = "clip the norm of the gradient at 1" if gain > 1 else "use gates, with the forget gate's bias at 1"
        return f"Multiply {shared[0]} by {1 / gain:.2g} (an orthogonal matrix neither grows nor shrinks), or {how}"
    if gain < 1 and any(u.op == "sigmoid" for u in reading.layers.units):
        return (
            f"A sigmoid passes at most 1/4: put ReLU in its place with weights of variance 2/fan_in, or multiply the "
            f"weights by {1 / gain:.2g} and watch for saturation"
        )
    layer = reading.points[len(reading.points) // 2].layer
    std = reading.weight_norms[layer.weights[0]] / reading.weights[layer.weights[0]].numel() ** 0.5
    return (
        f"Multiply the weights of these layers by {1 / gain:.2g} (at {layer.name} their root mean square goes from "
        f"{std:.2g} to {std / gain:.2g}), or normalize between the layers"
    )
