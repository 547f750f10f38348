"""How much less the gradient of a batch varies when its examples are drawn by their norms."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Gain(NamedTuple):
    """Variance of a batch's gradient with uniform draws, divided by that with drawing by norms.

    ratio: the estimate; NaN before there is one. error: its standard error; inf for fewer than 8 batches.
    """

    ratio: float
    error: float


class GainMeter:
    """Estimates the ratio of variances from weighted draws, over the last batches.

    Law: draws i ~ q with weights w_i = 1 / (N q_i) make sum_i w_i f_i an unbiased estimate of B times the mean of f.
    The second moment of one draw's gradient is mean(||g||^2) with uniform draws and mean(v ||g||^2) with draws that
    would give weights v; both are estimated from the same batches, whatever q is. With the squared norm of the mean
    gradient known, it is subtracted from both; the error is the jackknife's, over batches.

    One draw alone does not tell its variance from its mean: batches of one example cannot be exact. They are left out
    where others are, and if all are of one example the ratio is that of the second moments.

    Source: Alain et al. 2015 (arXiv:1511.06481), who minimize the trace of the covariance.
    """

    LEAST = 8  # batches below which there is no error

    def __init__(self, window: int) -> None:
        self.window = window
        self.sums = torch.zeros(0, 4, dtype=torch.float64)  # two second moments, what to subtract

    def add(
        self,
        weights: Tensor,
        would: Tensor,
        norms: Tensor,
        grad_norm: float | None,
        *,
        per_pool: float = 0.0,
        out_of_pool: bool = False,
    ) -> None:
        """A batch of B draws: weights w, the weights v that norms would give, norms; all (B,), float64.

        `per_pool` is 1 / K where draws by norms come out of a pool of K uniform draws, one for the batch. Then they
        have the pool's mean in common: B times the variance of the batch is M_v - |G|^2 + (M - |G|^2) (B - 1) / K.
        `out_of_pool` says whether this batch came out of one.
        """
        size, squares = len(norms), norms.square()
        uniform, by_norms, realised = (float(w @ squares) for w in (weights, weights * would, weights.square()))
        mean = math.nan
        if grad_norm is not None and size > 1:
            pooled = per_pool if out_of_pool else 0.0
            rest = size * grad_norm**2 - realised / size - uniform * pooled * (1 - 1 / size)
            mean = rest / ((1 - 1 / size) * (1 - pooled))
        shared = (size - 1) * per_pool
        row = [uniform, by_norms + shared * uniform, mean, mean * (1 + shared)]
        self.sums = torch.cat([self.sums, torch.tensor([row], dtype=torch.float64)])[-self.window :]

    def estimate(self) -> Gain:
        sums, means = self.sums.split(2, dim=1)
        exact = means.isfinite().all(dim=1)
        if int(exact.sum()) >= min(self.LEAST, len(sums)):
            sums = sums[exact] - means[exact]
        total, n = sums.sum(0), len(sums)
        ratio = _ratio(total)
        if n < self.LEAST:
            return Gain(float(ratio), math.inf)
        left_out = _ratio(total - sums)
        error = ((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt()
        return Gain(float(ratio), float(error.nan_to_num(nan=math.inf)))


def _ratio(sums: Tensor) -> Tensor:
    uniform, by_norms = sums.unbind(-1)
    return torch.where(by_norms > 0, uniform / by_norms, torch.nan)
