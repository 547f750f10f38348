"""Features as a model takes them: centered and scaled, or whitened, by what the training part alone says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowgrad.errors import InputError

KINDS = ("none", "center", "standardize", "whiten", "whiten-raw")
BLOCK = 4096  # examples that are scaled at a time, for little memory
LEAST_VARIANCE = 1e-6  # of a direction, over the largest, below which whitening drops it


@dataclass(frozen=True)
class Preparation:
    """(features - center) @ axes, in float32.

    Attributes:
        kind: "none", "center", "standardize", "whiten" or "whiten-raw".
        center: shape (d,).
        axes: shape (d,) to scale each feature by itself, or (d, k) to turn them into k directions.
    """

    kind: str
    center: Tensor
    axes: Tensor

    @property
    def n_outputs(self) -> int:
        """How many numbers the model gets for an example."""
        return self.axes.shape[-1]

    def __call__(self, features: Tensor) -> Tensor:
        """Of any number of examples, shape (N, d).

        Raises:
            InputError: another number of features.
        """
        if features.ndim != 2 or features.shape[1] != len(self.center):
            raise InputError(
                f"features of shape {tuple(features.shape)}; the model was made for (N, {len(self.center)})"
            )
        if self.axes.ndim == 2:
            return ((features.double() - self.center) @ self.axes).float()
        scaled = torch.empty(features.shape, dtype=torch.float32)
        for part, into in zip(features.split(BLOCK), scaled.split(BLOCK), strict=True):
            into.copy_((part.double() - self.center) * self.axes)
        return scaled

    def state_dict(self) -> dict[str, object]:
        """Tensors and plain values."""
        return {"kind": self.kind, "center": self.center, "axes": self.axes}


def prepare(
    features: Tensor, kind: str = "standardize", least_variance: float = LEAST_VARIANCE, spans: Sequence[slice] = ()
) -> Preparation:
    """What to do with features, from those of the training part (Aggarwal 2018, section 3.3).

    Args:
        features: of the training part, shape (N, d).
        kind: "none"; "center" (mean 0); "standardize" (mean 0, variance 1, by the population's deviation; a constant
            feature becomes 0); "whiten" (principal directions of the standardized features, each of variance 1);
            "whiten-raw" (of the features as they are, where those in small units are dropped).
        least_variance: directions of less variance over the largest are dropped by whitening: they are noise, and
            would be blown up.
        spans: features that are divided by one deviation, the root of the mean of the squares of theirs.
    Raises:
        InputError: an unknown kind, no examples, or nothing left after whitening.
    """
    if kind not in KINDS:
        raise InputError(f"preparation {kind!r}: expected {', '.join(KINDS)}")
    if len(features) == 0:
        raise InputError("there are no training examples to take means and deviations from")
    values = features.double()
    center = torch.zeros(values.shape[1], dtype=torch.float64) if kind == "none" else values.mean(0)
    ones = torch.ones_like(center)
    if kind in {"none", "center"}:
        return Preparation(kind, center, ones)
    deviation = values.std(0, correction=0)
    deviation[deviation <= 1e-12 * center.abs()] = 0  # a constant whose mean was rounded
    for span in spans:
        deviation[span] = torch.where(deviation[span] > 0, common_deviation(deviation[span]), 0)
    scales = torch.where(deviation > 0, 1 / deviation, 0)
    if kind == "standardize":
        return Preparation(kind, center, scales)
    scales = scales if kind == "whiten" else ones
    return Preparation(kind, center, scales[:, None] * _whitening((values - center) * scales, least_variance))


def common_deviation(deviations: Tensor) -> Tensor:
    """The root of the mean of their squares."""
    return deviations.square().mean().sqrt()


def prepare_steps(features: Tensor, steps: tuple[int, int], lengths: Tensor, kind: str) -> Preparation:
    """As `prepare`, of sequences laid out step by step: one center and one scale for each number of a step, from the
    steps that are there.

    Raises:
        InputError: as for `prepare`, or "whiten", which would mix steps.
    """
    if kind.startswith("whiten"):
        raise InputError("whitening turns all features together and would mix the steps of a sequence; standardize")
    there = torch.arange(steps[0]) < lengths[:, None]
    found = prepare(features.view(len(features), *steps)[there], kind)
    return Preparation(kind, found.center.repeat(steps[0]), found.axes.repeat(steps[0]))


def steps_of(prepared: Tensor, steps: tuple[int, int], lengths: Tensor) -> Tensor:
    """Prepared features as sequences, (N, steps, numbers), 0 behind their ends."""
    there = torch.arange(steps[0]) < lengths[:, None]
    return prepared.view(len(prepared), *steps) * there[:, :, None]


def _whitening(centered: Tensor, least_variance: float) -> Tensor:
    """Principal directions over their deviations, the largest variance first."""
    _, singular, directions = torch.linalg.svd(centered, full_matrices=False)
    variances = singular.square() / len(centered)
    kept = variances > least_variance * variances.max()
    if not bool(kept.any()):
        raise InputError("every feature is constant in the training part: whitening leaves nothing; use --standardize")
    return directions[kept].T / variances[kept].sqrt()
