"""Gauss-Newton in the space of the examples: a B x B system in place of a P x P one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rowgrad.curvature import flat
from rowgrad.errors import GraphError, NonFiniteError
from rowgrad.optim.second_order import (
    Closure,
    SecondOrder,
    Trial,
    checked,
    damped,
    loss_at_start,
    non_negative,
    relaxed,
)
from rowgrad.rows.build import jacobian


class GaussNewton(SecondOrder):
    """Gauss-Newton on the mean of B losses, each half the square of a residual r_j = sqrt(2 loss_j).

    With rows of derivatives of the residuals, K = dr/dW (B, P), the Gauss-Newton step -K^+ r is -K^T (K K^T)^+ r, and
    K K^T is the Gram matrix of the losses' gradients with rows and columns divided by r. So the system has the size of
    the batch, whatever P is, and K is never formed. Squared errors give the classical method: a linear model is fitted
    in one step. Where the mean loss does not fall, the step is solved anew with more and more damping (Levenberg).
    Near a minimum with small residuals it is as fast as Newton's method, with large ones its error falls by a constant
    factor a step. A penalty belongs in residuals of its own (`residuals=True`), not in every example's loss, where it
    keeps all residuals large.

    Args:
        params: one group of parameters.
        damping: least damping, in units of K K^T.
        residuals: the closure returns residuals of any sign, not losses; the loss is half the mean of their squares.
            Needed where a loss is exactly 0: its gradient no longer says which way its residual changes, so that such
            an example is left out of the step.
    `step(closure)` takes a function that computes the losses of the examples, (B,), not averaged and not negative, and
    does not call backward. Returns their mean before the step.
    Raises:
        NotAVectorError: the closure returned a mean.
        GraphError: a loss is below 0, or there is none.
        NonFiniteError, NoGraphError, ParameterError, InputError, TypeError: as `Newton`.
    Source: Gauss 1809; Levenberg 1944; the system in the space of the examples: Cai et al. 2019, "Gram-Gauss-Newton".

    >>> import torch
    >>> from rowgrad.optim import GaussNewton
    >>> model, x = torch.nn.Linear(1, 1).double(), torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    >>> loss = GaussNewton(model.parameters()).step(lambda: (model(x) - (3 * x + 1)).squeeze(1) ** 2)
    >>> round(model.weight.item(), 4), round(model.bias.item(), 4)
    (3.0, 1.0)
    """

    def __init__(self, params: Iterable[Any], *, damping: float = 0.0, residuals: bool = False) -> None:
        non_negative("GaussNewton", damping=damping)
        super().__init__(params, {"damping": damping, "residuals": residuals})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One update; returns the mean loss before it."""
        evaluate, is_residual = checked(self, closure), self.options["residuals"]
        values = loss_at_start(self, evaluate)
        if values.ndim and not len(values):
            raise GraphError("GaussNewton: the closure returned no losses; the batch is empty")
        J = jacobian(values, self.parameters)
        values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
        if not is_residual and bool((values < 0).any()):
            worst = int(values.argmin())
            raise GraphError(
                f"GaussNewton: loss {worst} is {float(values[worst]):.3g}, below 0 it is no square of a residual; use "
                "ConjugateGradient for such losses"
            )
        r = values if is_residual else (2 * values).sqrt()
        per_loss = torch.ones_like(r) if is_residual else torch.where(r > 0, 1 / r, 0.0)  # dr_j = dloss_j / r_j
        gram = J.gram().to(r) * per_loss * per_loss.unsqueeze(1)
        if not bool(gram.isfinite().all()):
            raise NonFiniteError(
                "GaussNewton: the losses are finite, but a gradient is not; the weights are left as they are"
            )
        sizes, vectors = (t.to(gram) for t in torch.linalg.eigh(gram.double()))  # in float32 it may not converge
        scale = float(sizes[-1]) if len(sizes) else 0.0
        used = sizes > len(sizes) * torch.finfo(sizes.dtype).eps * scale
        parts = vectors.T @ r
        before = float(r.square().mean() / 2)

        def solve(damping: float) -> Trial:
            share = torch.where(used, 1 / (sizes + damping), 0.0)
            weights = per_loss * (vectors @ (share * parts))
            left = 1 - share * sizes
            predicted = float((parts.square() * (1 - left.square())).mean() / 2)
            return Trial(-flat(J.weighted_sum(weights)), predicted, damping)

        def evaluate_mean() -> Tensor:
            there = evaluate().detach()
            return (there.square() / 2 if is_residual else there).mean()

        damping = self.memory.get("damping", self.options["damping"])
        trial = damped(solve, self.loss_after(evaluate_mean), before, scale, damping)
        self.advance(None if trial is None else trial.step)
        if trial is not None:
            self.memory["damping"] = relaxed(trial.damping, scale, self.options["damping"])
        return torch.as_tensor(before, dtype=r.dtype, device=r.device)
