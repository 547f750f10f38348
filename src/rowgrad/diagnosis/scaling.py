"""Features and weights of very different size, for which one learning rate cannot be right (Aggarwal 2018, 3.4)."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite, sqrt

import torch
from torch import Tensor

from rowgrad.diagnosis.findings import Finding, some
from rowgrad.diagnosis.layers import Layer
from rowgrad.diagnosis.limits import Limits
from rowgrad.diagnosis.reading import Reading, features


def input_findings(reading: Reading, limits: Limits) -> Iterator[Finding]:
    """Data of which features differ in size, lie far from 0, or are large or small as a whole."""
    for layer in reading.layers.layers:
        x = features(layer, reading.data[layer.name]) if layer.inputs else None
        if x is not None and len(x) > 1 and bool(x.isfinite().all()):
            yield from _of_one_input(layer, x.double(), limits)


def _of_one_input(layer: Layer, x: Tensor, limits: Limits) -> Iterator[Finding]:
    peak, std, mean = x.abs().amax(0), x.std(0), x.mean(0).abs()
    varied = (std > 0).nonzero().flatten()
    if not len(varied):
        return
    where = f"the input of {layer.name}"
    low, high = (int(varied[i]) for i in (peak[varied].argmin(), peak[varied].argmax()))
    spread = float(peak[high] / peak[low])
    if spread > limits.input_spread:
        yield _spread(where, low, high, peak, std, limits)
    usual, far = float(std.square().mean().sqrt()), int(mean.argmax())
    if float(mean[far]) > limits.input_offset * usual:
        yield _offset(where, far, float(mean[far]), usual, limits)
    size = float(x.square().mean().sqrt())
    if spread <= limits.input_spread and not 1 / limits.input_size < size < limits.input_size:
        yield _size(where, size, limits)


def _spread(where: str, low: int, high: int, peak: Tensor, std: Tensor, limits: Limits) -> Finding:
    return Finding(
        "inputs",
        where,
        f"feature {high} reaches {float(peak[high]):.3g}, feature {low} only {float(peak[low]):.3g}; gradients of "
        "their weights differ as much",
        f"Standardize each feature: subtract its mean and divide by its standard deviation ({float(std[high]):.3g} for "
        f"feature {high}, {float(std[low]):.3g} for feature {low})",
        "warning",
        float(peak[high] / peak[low]),
        limits.input_spread,
    )


def _offset(where: str, feature: int, mean: float, std: float, limits: Limits) -> Finding:
    return Finding(
        "inputs",
        where,
        f"feature {feature} has mean {mean:.3g} in absolute value while features vary by {std:.3g}: it acts as a "
        "second bias, with a gradient that drowns the others",
        f"Subtract its mean, {mean:.3g}, and that of each other feature",
        "warning",
        mean / std,
        limits.input_offset,
    )


def _size(where: str, size: float, limits: Limits) -> Finding:
    return Finding(
        "inputs",
        where,
        f"root mean square {size:.3g}; initial weights are drawn for inputs of about 1",
        f"Multiply the data by {1 / size:.2g}, or standardize each feature",
        "warning",
        size,
        limits.input_size if size > 1 else 1 / limits.input_size,
    )


# Gradient ratios


def ratio_findings(reading: Reading, limits: Limits) -> Iterator[Finding]:
    """Gradients of very different size: between the features of one weight, and between weights."""
    for layer in reading.layers.layers:
        if layer.inputs and layer.op != "embedding":
            yield from _between_features(layer, reading, limits)
    yield from _between_weights(reading, limits)


def column_sizes(gradient: Tensor) -> Tensor:
    """Root mean square of the gradient of each feature's weights."""
    others = [d for d in range(gradient.ndim) if d != 1]
    dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    sizes = torch.linalg.vector_norm(gradient.detach(), dim=others, dtype=dtype).double()
    return sizes / sqrt(gradient.numel() / gradient.shape[1])


def _between_features(layer: Layer, reading: Reading, limits: Limits) -> Iterator[Finding]:
    gradient = reading.gradients.get(layer.weights[0])
    if gradient is None or gradient.ndim < 2:
        return
    sizes = column_sizes(gradient)
    live = sizes[(sizes > 0) & sizes.isfinite()]
    if len(live) < 2:
        return
    usual = float(torch.quantile(live, 0.25, interpolation="lower"))
    ratio, largest = float(live.max()) / usual, int(sizes.argmax())
    if ratio > limits.column_ratio:
        yield Finding(
            "ratios",
            layer.weights[0],
            f"the gradient of the weights of feature {largest} is {ratio:.3g} times that of a small one (lower "
            "quartile): a rate for one is wrong for the other",
            f"Standardize the features, or give these weights a rate each (Adam, RMSprop); feature {largest} alone "
            f"needs a rate {1 / ratio:.2g} times that of the small ones",
            "warning",
            ratio,
            limits.column_ratio,
        )


def _between_weights(reading: Reading, limits: Limits) -> Iterator[Finding]:
    sizes = {p.layer.weights: p.gradient for p in reading.points if isfinite(p.gradient) and p.gradient > 0}
    if len(sizes) < 2:
        return
    low, high = min(sizes, key=lambda k: sizes[k]), max(sizes, key=lambda k: sizes[k])
    ratio = sizes[high] / sizes[low]
    if ratio > limits.weight_ratio:
        yield Finding(
            "ratios",
            f"{some(low, 1)} and {some(high, 1)}",
            f"gradient over weight is {sizes[low]:.1e} at one and {sizes[high]:.1e} at the other, {ratio:.1e} times as "
            "much",
            f"Give {some(low, 1)} a rate up to {ratio:.1e} times that of {some(high, 1)}, or rates of their own (Adam, "
            f"RMSprop); a step of plain descent suits both only within a factor of {sqrt(limits.weight_ratio):.0f}",
            "warning",
            ratio,
            limits.weight_ratio,
        )
