"""A monitor's records drawn over the steps of a training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import nan

from rowgrad.diagnosis.drawing import STYLES, Band, Series, chart
from rowgrad.diagnosis.history import Record

USUAL_UPDATES = Band(1e-4, 1e-2)
MOST_LINES = len(STYLES)


def over_time(records: Sequence[Record]) -> list[str]:
    """The loss, the curves of each layer, the sizes of the steps, the norms of the examples' gradients."""
    if not records:
        return []
    layers = list(dict.fromkeys(name for r in records for name in r["layers"]))
    weights = list(dict.fromkeys(name for r in records for name in r["updates"]))
    parts = ["<h2>Loss</h2>", _chart(records, ["loss"], lambda r, _: r["loss"])]
    for what, title in (("cotangent", "Cotangent at each layer"), ("activation", "What enters each layer")):
        parts += [f"<h2>{title}</h2>", _chart(records, layers, lambda r, n, w=what: r["layers"].get(n, {}).get(w))]
    if weights:
        parts += ["<h2>Change of each weight in a step, over the weight</h2>"]
        parts += ['<p class="soft">The band is what is usual: 1e-4 to 1e-2.</p>']
        parts += [_chart(records, weights, lambda r, n: r["updates"].get(n), USUAL_UPDATES)]
    return parts + _of_examples([r for r in records if r["norms"]])


def _of_examples(records: Sequence[Record]) -> list[str]:
    if not records:
        return []
    noise = '<p class="soft">The batch size at which noise and signal of the gradient are alike.</p>'
    return [
        "<h2>Norms of the examples' gradients</h2>",
        _chart(records, ["max", "q95", "q75", "median", "q25", "min"], lambda r, name: r["norms"][name]),
        "<h2>Noise scale</h2>",
        noise,
        _chart(records, ["tr(Sigma) / |G|^2"], lambda r, _: r["noise_scale"]),
    ]


def _chart(
    records: Sequence[Record],
    names: Sequence[str],
    value: Callable[[Record, str], float | None],
    band: Band | None = None,
) -> str:
    """One line for each name; of many names, some at equal distances, first and last among them."""
    n = min(len(names), MOST_LINES)
    chosen = [names[round(k * (len(names) - 1) / max(n - 1, 1))] for k in range(n)]
    steps = [r["step"] for r in records]
    series = [Series(name, steps, [_number(value(r, name)) for r in records]) for name in chosen]
    return chart(series, "step", is_log=True, band=band)


def _number(value: float | None) -> float:
    return nan if value is None else float(value)
