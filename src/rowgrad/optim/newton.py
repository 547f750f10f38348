"""Newton's method on the whole Hessian, away from saddle points."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rowgrad.curvature import Hessian
from rowgrad.errors import NonFiniteError, ParameterError
from rowgrad.optim.second_order import (
    Closure,
    SecondOrder,
    Trial,
    along,
    check_finite,
    checked,
    damped,
    downhill,
    is_at_rest,
    loss_at_start,
    relaxed,
)

MOST_PARAMETERS = 10_000


class Newton(SecondOrder):
    """Newton's update W - H^-1 grad L: a quadratic loss is solved in one step, without a step size.

    The Hessian is formed and split into eigenvectors. Along those of negative curvature the sign of the update is
    turned round, so that it goes down and not up to a saddle or a maximum; at rest beside a saddle the step is along
    the most negative one. Where the loss does not fall, the step is solved anew with more and more damping, as
    (|H| + damping I)^-1 grad L; that of a quadratic never is.

    Args:
        params: one group of P parameters, at most 10,000: memory grows with P^2, time with P^3 and P backward passes.
        damping: least damping, in units of the Hessian; 0 is the seed's update.
    `step(closure)` takes a function that computes the loss and does not call backward; it is called several times and
    must give the same loss for the same weights. Returns the loss before the step.
    Raises:
        ParameterError: more than one group, or too many parameters.
        NonFiniteError: the loss, its gradient or its Hessian is not finite; the weights are left as they are.
        GraphError, NoGraphError, TypeError: no closure, or one that does not return one number with its graph.
    Source: Aggarwal 2018, eq. 20; turned signs: Dauphin et al. 2014, "saddle-free Newton".

    >>> import torch
    >>> from rowgrad.optim import Newton
    >>> w = torch.tensor([3.0, -1.0], requires_grad=True)
    >>> loss = Newton([w]).step(lambda: w[0] ** 2 + 4 * w[1] ** 2)
    >>> loss, w
    (tensor(13.), tensor([0., 0.], requires_grad=True))
    """

    def __init__(self, params: Iterable[Any], *, damping: float = 0.0) -> None:
        self.check({"damping": damping})
        super().__init__(params, {"damping": damping})
        size = sum(p.numel() for p in self.parameters.values())
        if size > MOST_PARAMETERS:
            raise ParameterError(
                f"Newton: {size:,} parameters have a Hessian of {size * size * 8 / 2**30:.1f} GiB; use "
                "ConjugateGradient or LBFGS, which do not form it"
            )

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One update; returns the loss before it."""
        evaluate = checked(self, closure)
        loss = loss_at_start(self, evaluate)
        H = Hessian(loss, self.parameters)
        check_finite(self, H.split(H.gradient))
        dense = H.dense()
        if not bool(dense.isfinite().all()):
            raise NonFiniteError("Newton: the Hessian is not finite; the weights are left as they are")
        values, vectors = (t.to(dense) for t in torch.linalg.eigh(dense.double()))  # in float32 it may not converge
        scale = float(values.abs().max())
        after = self.loss_after(evaluate)

        def solve(damping: float) -> Trial:
            return _solved(values, vectors, vectors.T @ H.gradient, damping)

        damping = self.memory.get("damping", self.options["damping"])
        if _is_beside_a_saddle(values, solve(damping).step, self.weights()):
            found = along(after, downhill(vectors[:, 0], H.gradient), H.value, 1.0)
        else:
            trial = damped(solve, after, H.value, scale, damping)
            found = None if trial is None else trial.step
            if trial is not None:
                self.memory["damping"] = relaxed(trial.damping, scale, self.options["damping"])
        self.advance(found)
        return loss.detach()


def _solved(values: Tensor, vectors: Tensor, slopes: Tensor, damping: float) -> Trial:
    """-(|H| + damping)^-1 grad L; where the curvature is 0 to rounding, steepest descent with the rate of the largest
    curvature."""
    size, scale = values.abs(), values.abs().max()
    is_flat = size <= len(values) * torch.finfo(values.dtype).eps * scale
    size = torch.where(is_flat, scale if scale > 0 else torch.ones_like(scale), size)
    along = -slopes / (size + damping)
    predicted = -float(slopes @ along + (values * along.square()).sum() / 2)
    return Trial(vectors @ along, predicted, damping)


def _is_beside_a_saddle(values: Tensor, step: Tensor, origin: Tensor) -> bool:
    is_bent = values[0] < -(torch.finfo(values.dtype).eps ** 0.5) * values.abs().max()
    return bool(is_bent) and is_at_rest(step, origin)
