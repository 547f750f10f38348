"""Sizes read off a graph after one backward pass: at each layer the activation, the cotangent and the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, nan, sqrt
from typing import Any

import torch
from torch import Tensor

from rowgrad.diagnosis.findings import plain
from rowgrad.diagnosis.layers import Layer, Layers, Unit
from rowgrad.errors import FreedGraphError
from rowgrad.graph.vertices import Edge
from rowgrad.tape import Tape


@dataclass(frozen=True)
class Point:
    """One layer on the three curves.

    Attributes:
        activation: root mean square of the data that enters; nan where the operation kept none, or indices.
        cotangent: norm of the derivative of the mean loss at the layer's output. A norm, not a root mean square: with
            weights of variance 1/fan_in it stays the same from layer to layer whatever their widths.
        gradient: norm of the weights' gradient over the norm of the weights; nan for weights that are 0.
    """

    layer: Layer
    activation: float
    cotangent: float
    gradient: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        numbers = {k: plain(getattr(self, k)) for k in ("activation", "cotangent", "gradient")}
        return {"layer": self.layer.name, "level": self.layer.level, "weights": list(self.layer.weights)} | numbers


@dataclass(frozen=True)
class Moments:
    """A layer's input: the mean of each feature, and one standard deviation for all."""

    mean: Tensor
    std: float


class Reading:
    """One backward pass, as the rules of a diagnosis need it: values, cotangents, gradients, and the three curves."""

    def __init__(
        self,
        tape: Tape,
        layers: Layers,
        cotangents: Mapping[Edge, Tensor | None],
        gradients: Mapping[str, Tensor | None],
        weights: Mapping[str, Tensor],
    ) -> None:
        self.tape, self.layers, self.cotangents = tape, layers, cotangents
        self.gradients, self.weights = gradients, weights
        self.data = {x.name: None if x.data is None else kept(tape, x.node, x.data[1]) for x in layers.layers}
        self.weight_norms, self.gradient_norms = _sizes(weights, gradients)
        self.points = self._points()

    def is_finite(self) -> bool:
        """Whether all gradients are."""
        suspects = [g for name, g in self.gradients.items() if not isfinite(self.gradient_norms[name])]
        return all(g is None or bool(g.isfinite().all()) for g in suspects)

    def unit(self, unit: Unit) -> Tensor | None:
        """What an activation function returned; None where it was overwritten or freed."""
        return kept(self.tape, unit.node, "result")

    def relative_gradient(self, names: tuple[str, ...]) -> float:
        """Norm of a gradient over the norm of its weights."""
        size = sqrt(sum(self.weight_norms[n] ** 2 for n in names))
        return sqrt(sum(self.gradient_norms[n] ** 2 for n in names)) / size if size > 0 else nan

    def moments(self) -> dict[str, Moments]:
        """Mean and spread of what enters each layer, for comparison with a later time."""
        found = {}
        for layer in self.layers.layers:
            h = features(layer, self.data[layer.name])
            if h is not None and not layer.inputs:
                mean = h.mean(0)
                found[layer.name] = Moments(mean, float((h - mean).square().mean().sqrt()))
        return found

    def _points(self) -> tuple[Point, ...]:
        layers = self.layers.layers
        data = [h if h is not None and (h.is_floating_point() or h.is_complex()) else None for h in self.data.values()]
        activations = norms(data)
        entries = [1 if h is None else max(h.numel(), 1) for h in data]
        cotangents = norms([self.cotangents.get((layer.node, 0)) for layer in layers])
        return tuple(
            Point(layer, a / sqrt(n), z, self.relative_gradient(layer.weights))
            for layer, a, n, z in zip(layers, activations, entries, cotangents, strict=True)
        )


def features(layer: Layer, data: Tensor | None) -> Tensor | None:
    """The data of a layer as (examples and positions, features); None where there is none."""
    if data is None or data.ndim < 2 or not data.is_floating_point():
        return None
    if "convolution" in layer.op:
        data = data.movedim(1, -1)
    return data.reshape(-1, data.shape[-1])


def _sizes(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
) -> tuple[dict[str, float], dict[str, float]]:
    names = list(weights)
    found = norms([*weights.values(), *(gradients.get(n) for n in names)])
    zero = [0.0 if gradients.get(n) is None else size for n, size in zip(names, found[len(names) :], strict=True)]
    return dict(zip(names, found, strict=False)), dict(zip(names, zero, strict=True))


def norms(tensors: list[Tensor | None]) -> list[float]:
    """L2 norms, in one transfer to the host; nan for None. Those whose squares leave float32 are taken in float64."""
    given = [t for t in tensors if t is not None]
    if not given:
        return [nan] * len(tensors)
    found = torch.stack([_norm(t, torch.float32).to(given[0].device) for t in given]).tolist()
    exact = (n if 1e-15 < n < 1e15 else float(_norm(t, torch.float64)) for t, n in zip(given, found, strict=True))
    return [nan if t is None else next(exact) for t in tensors]


def _norm(t: Tensor, least: torch.dtype) -> Tensor:
    t = torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t.detach()
    return torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, least)).double()


def kept(tape: Tape, node: int, name: str) -> Tensor | None:
    """What an operation keeps under a name; None where it keeps no such tensor, or it was overwritten or freed."""
    try:
        found = tape.nodes[node].saved(name) if tape.nodes[node].has_saved(name) else None
    except FreedGraphError:
        return None
    return found if isinstance(found, Tensor) else None
