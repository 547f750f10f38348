"""The gradient noise scale: how much examples disagree, against the gradient they agree on.

Note [averages before the ratio]: rows of B examples drawn independently have E|mean row|^2 = |G|^2 + trace / B and
E|row|^2 = |G|^2 + trace, with G the gradient over all data and `trace` that of the rows' covariance. Solved for the two
unknowns these give estimates that are unbiased for every B above 1 but very noisy: that of |G|^2 is often negative, and
their ratio has no useful mean. So both are averaged over many batches, and divided at the end.

Note [weighted draws]: examples drawn with probabilities p_i and weights w_i = 1 / (N p_i) have E[w |row|^2] = |G|^2 +
trace, and their weighted mean has E|mean of w row|^2 = |G|^2 (1 - 1/B) + E[w^2 |row|^2] / B, since two different draws
have the product |G|^2 in expectation. With weights of 1 these are the equations above.

Note [its error]: with u = trace_i - R sq_norm_i for each batch i and R the ratio, the error of R is to first order that
of the mean of u over the mean of sq_norm. It takes the batches as independent; if R drifts, the drift adds to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite, nan, sqrt
from typing import Any

import torch
from torch import Tensor

from rowgrad.errors import InputError
from rowgrad.rows.matrix import Jacobian
from rowgrad.uses import expected
from rowgrad.uses.expected import Expected, described
from rowgrad.uses.processes import gathered
from rowgrad.uses.telemetry import sq_norm_of_sum

logger = logging.getLogger("rowgrad")

DECAY = expected.number("a number of at least 0 and below 1", lambda v: 0 <= v < 1)
SUM = expected.number("a finite number", lambda v: isfinite(v))
POSITIVE_SUM = expected.number("a finite number, not negative", lambda v: 0 <= v < inf)


@dataclass(frozen=True)
class Noise:
    """An estimate of the noise scale.

    scale: trace / sq_norm, in examples; nan where sq_norm is not positive or nothing was measured.
    error: its standard error; nan with fewer than two batches, inf where sq_norm is within two errors of 0.
    sq_norm: |G|^2 of the gradient over all data, squared units of loss per parameter; may come out negative.
    trace: that of the rows' covariance, in the same units.
    """

    scale: float
    error: float
    sq_norm: float
    trace: float


@dataclass
class _Average:
    """Weighted sums over batches: batch i of n has weight decay^(n - i)."""

    decay: float
    weight: float = 0.0
    sq_weight: float = 0.0
    g: float = 0.0
    t: float = 0.0
    gg: float = 0.0
    gt: float = 0.0
    tt: float = 0.0

    def add(self, g: float, t: float) -> None:
        seen = {"weight": 1.0, "g": g, "t": t, "gg": g * g, "gt": g * t, "tt": t * t}
        for name, value in seen.items():
            setattr(self, name, self.decay * getattr(self, name) + value)
        self.sq_weight = self.decay**2 * self.sq_weight + 1.0

    def estimate(self) -> Noise:
        if not self.weight:
            return Noise(nan, nan, nan, nan)
        g, t = self.g / self.weight, self.t / self.weight
        if g <= 0:
            return Noise(nan, nan, g, t)
        scale = t / g
        far_from_zero = not 2 * self._error(0.0, 1.0) >= g
        return Noise(scale, self._error(1.0, -scale) / g if far_from_zero else inf, g, t)

    def _error(self, a: float, b: float) -> float:
        """Standard error of the mean of a t + b g; nan for a single batch."""
        share = self.sq_weight / self.weight**2
        if share >= 1:
            return nan
        mean = (a * self.t + b * self.g) / self.weight
        sq_mean = (a * a * self.tt + 2 * a * b * self.gt + b * b * self.gg) / self.weight
        return sqrt(max(0.0, sq_mean - mean * mean) * share / (1 - share))


STATE = {
    "kind": expected.same("NoiseScale"),
    "decay": DECAY,
    "updates": expected.whole(0),
    "skipped": expected.whole(0),
    "running": Expected("sums over batches, a dict", lambda v: isinstance(v, dict)),
    "total": Expected("sums over batches, a dict", lambda v: isinstance(v, dict)),
}
POSITIVE = ("decay", "weight", "sq_weight", "gg", "tt")
AVERAGE = dict.fromkeys(POSITIVE, POSITIVE_SUM) | dict.fromkeys(("g", "t", "gt"), SUM)


@dataclass(frozen=True)
class _Measured:
    """What one process has of a batch: norms and weights, (B,), in float64 on the CPU; the norm of the mean row."""

    norms: Tensor
    weights: Tensor
    mean_norm: float


class NoiseScale:
    """The gradient noise scale of a training: trace / |G|^2, in examples.

    G is the gradient over all data and `trace` that of the covariance of the rows: about as many examples must be
    averaged for the noise in their mean to be as long as G itself. It describes the data and the weights of the moment
    and grows as the gradient shrinks; it is a measurement, not advice about the size of your batches.

    Law: with n2 = mean_j |row_j|^2 and N2 = |mean_j row_j|^2 of a batch of B independent examples,
    (B N2 - n2) / (B - 1) and (n2 - N2) / (1 - 1/B) have the expectations |G|^2 and trace. Both are averaged over the
    batches before they are divided. Of draws with weights w (`NormSampler`), with N2 = |mean_j w_j row_j|^2, the first
    is (B N2 - mean_j w_j^2 |row_j|^2) / (B - 1), and the second mean_j w_j |row_j|^2 less that. The scale stays the
    same when examples are permuted, a batch is split into micro-batches, or all losses are multiplied by a number.

    | a batch                                                        | what happens                                 |
    |----------------------------------------------------------------|----------------------------------------------|
    | of fewer than 2 examples                                       | undefined: counted in `skipped`              |
    | with a norm that is inf or nan (a scaler's overflow)           | counted in `skipped`                         |
    | whose mean row is longer than the root mean square of its rows | InputError: the gradient is scaled or summed |
    | out of a pool of K (`PoolSampler`, while it is on)             | leave it out: |G|^2 is too large by trace/K  |

    Args:
        decay: of the running averages, at least 0 and below 1; .99 remembers about the last 100 updates.
        distributed: the norms of all processes count, as `.grad` of DistributedDataParallel does: each process calls
            `update` equally often and has the same result. Needs norms= and mean_norm=.
    Attributes:
        running: `Noise` of the running averages, their start corrected for.
        total: `Noise` of the plain averages over all updates.
        updates, skipped: batches taken in, and those that were not.
    Raises:
        InputError: decay is out of range.
    Source: McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162,
    appendix A, with batches of 1 and of B.

    >>> import torch, rowgrad
    >>> model, rng = torch.nn.Linear(1, 1, bias=False), torch.Generator().manual_seed(0)
    >>> noise = rowgrad.NoiseScale()
    >>> for _ in range(200):
    ...     x = 1 + 2 * torch.randn(32, 1, generator=rng)  # each its own row: |G|^2 = 1, trace = 4
    ...     noise.update(rowgrad.jacobian(model(x).squeeze(1), model))
    >>> noise
    NoiseScale(running 4.23 +- 0.29, 200 updates, 0 skipped)
    """

    def __init__(self, decay: float = 0.99, *, distributed: bool = False) -> None:
        given = {"decay": decay, "distributed": distributed}
        expected.check("NoiseScale", given, {"decay": DECAY, "distributed": expected.FLAG})
        self.decay, self.distributed = float(decay), distributed
        self.reset()

    def reset(self) -> None:
        """Forget every update."""
        self._running, self._total = _Average(self.decay), _Average(1.0)
        self.updates = self.skipped = 0

    def update(
        self,
        J: Jacobian | None = None,
        *,
        norms: Tensor | Iterable[Tensor] | None = None,
        mean_norm: float | Tensor | None = None,
        weights: Tensor | Iterable[Tensor] | None = None,
    ) -> None:
        """Take in one batch: everything that goes into one step of the optimizer.

        Args:
            J: rows of the batch; costs one weighted sum and leaves J as it is. Or, for nothing but the norms:
            norms: L2 norms of the rows, shape (B,), or one such tensor for each micro-batch.
            mean_norm: L2 norm of the mean of all these rows: that of `.grad` once every micro-batch is accumulated and
                before it is clipped, `torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])`. If the
                losses were multiplied for a GradScaler, after `unscale_`.
            weights: of the draws, `draw.weight` of a `NormSampler`, in the shapes of the norms; the mean row is then
                that of the weighted rows, as `.grad` is. The norms are not weighted.
        Raises:
            InputError: neither J nor both others, or see the table above; nothing is taken in. With distributed=True it
                is raised in all processes.
        """
        found = gathered(lambda: self._measured(J, norms, mean_norm, weights), self.distributed)
        sq_norms = torch.cat([part.norms for part in found]).square()
        w = torch.cat([part.weights for part in found])
        sq_mean = _agreed([part.mean_norm for part in found]) ** 2
        b = len(sq_norms)
        mean_sq, weighted_sq = (float((c * sq_norms).mean()) if b else nan for c in (w, w * w))
        if b < 2 or not (isfinite(weighted_sq) and isfinite(mean_sq) and isfinite(sq_mean)):
            self.skipped += 1
            logger.debug("noise scale: skipped a batch of %d examples, mean squared norm %g", b, mean_sq)
            return
        if sq_mean > 1.01 * weighted_sq:
            raise InputError(
                f"NoiseScale: the mean of {b} rows has norm {sqrt(sq_mean):g}, longer than the root mean square of "
                f"their norms, {sqrt(weighted_sq):g}. Pass the norm of the mean, before clipping: unscale a "
                "GradScaler's gradient, divide a sum by the number of examples, zero the gradient of earlier steps, "
                "with DistributedDataParallel set distributed=True, and of draws by norms pass weights=draw.weight"
            )
        g = (b * sq_mean - weighted_sq) / (b - 1)
        t = mean_sq - g
        self._running.add(g, t)
        self._total.add(g, t)
        self.updates += 1

    def _measured(self, J: Any, norms: Any, mean_norm: Any, weights: Any) -> _Measured:
        """What this process has of a batch."""
        if J is not None and norms is None and mean_norm is None and not self.distributed:
            if not isinstance(J, Jacobian):
                raise InputError(
                    f"NoiseScale.update was given {described(J)}; expected rowgrad.jacobian(losses, model), or norms= "
                    "and mean_norm= together"
                )
            lengths = J.norms()
            w = _weights(weights, len(J))
            c = 1 / max(1, len(J)) if weights is None else (w / len(w)).to(lengths)
            return _Measured(lengths.detach().cpu().double(), w, sqrt(sq_norm_of_sum(J, c)))
        if J is not None or norms is None or mean_norm is None:
            raise InputError(
                "NoiseScale.update takes a Jacobian, update(J), or norms= and mean_norm= together"
                + (
                    "; distributed=True needs the latter, with mean_norm of the reduced .grad"
                    if self.distributed
                    else ""
                )
            )
        found = _joined("norms", norms)
        return _Measured(found, _weights(weights, len(found)), expected.length("mean_norm", mean_norm))

    @property
    def running(self) -> Noise:
        return self._running.estimate()

    @property
    def total(self) -> Noise:
        return self._total.estimate()

    def compute(self) -> dict[str, float]:
        """For a logger: noise_scale and its error from the running averages, and from all updates."""
        running, total = self.running, self.total
        return {
            "noise_scale": running.scale,
            "noise_scale_error": running.error,
            "noise_scale_total": total.scale,
            "noise_scale_total_error": total.error,
            "sq_gradient_norm": running.sq_norm,
            "gradient_trace": running.trace,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; `torch.load` reads them with weights_only=True."""
        averages = {"running": asdict(self._running), "total": asdict(self._total)}
        plain = {"kind": "NoiseScale", "decay": self.decay, "updates": self.updates, "skipped": self.skipped}
        return plain | averages

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, its decay included.

        Raises:
            InputError: the state lacks an entry, or holds one that it cannot have; nothing was loaded.
        """
        found = expected.checked_state("NoiseScale", state, STATE)
        averages = [
            _Average(
                **expected.checked_state(f"NoiseScale, {name}", found[name], AVERAGE | {"decay": expected.same(d)})
            )
            for name, d in (("running", found["decay"]), ("total", 1.0))
        ]
        self.decay, self.updates, self.skipped = found["decay"], found["updates"], found["skipped"]
        self._running, self._total = averages

    def __repr__(self) -> str:
        now = self.running
        return f"NoiseScale(running {now.scale:.3g} +- {now.error:.2g}, {self.updates} updates, {self.skipped} skipped)"


def _joined(name: str, parts: Any) -> Tensor:
    """The numbers of all micro-batches."""
    if isinstance(parts, Tensor) or not isinstance(parts, Iterable):
        return expected.vector(name, parts)
    found = [expected.vector(name, part) for part in parts]
    if not found:
        raise InputError(f"{name} must be of shape (B,), or a sequence of such tensors; got an empty one")
    return torch.cat(found)


def _weights(weights: Any, b: int) -> Tensor:
    """Those of the draws, or ones."""
    found = torch.ones(b).double() if weights is None else _joined("weights", weights)
    if len(found) != b or not bool(found.isfinite().all()):
        raise InputError(f"weights={described(found)}; expected a finite one for each of {b} examples")
    return found


def _agreed(mean_norms: list[float]) -> float:
    """The norm of the one gradient that all processes have."""
    if all(map(isfinite, mean_norms)) and max(mean_norms) > 1.001 * min(mean_norms):
        raise InputError(
            f"NoiseScale: mean_norm runs from {min(mean_norms):g} to {max(mean_norms):g} over the processes; expected "
            "that of the .grad which they share, after DistributedDataParallel has reduced it"
        )
    return sum(mean_norms) / len(mean_norms)
