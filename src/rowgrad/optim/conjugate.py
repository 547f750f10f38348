"""Conjugate gradients on the Taylor model of the loss, by products with the Hessian alone (Hessian-free)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rowgrad.curvature import Hessian, lanczos
from rowgrad.errors import InputError
from rowgrad.optim.second_order import (
    HALVINGS,
    LEAST_DAMPING,
    ROUNDING,
    Closure,
    SecondOrder,
    along,
    check_finite,
    checked,
    downhill,
    falls,
    is_at_rest,
    is_number,
    loss_at_start,
    relaxed,
)

GROWTH = 4.0  # of the damping after a step that fell short of its model
FIRST_DAMPING = 1e-3  # as a share of the curvature's scale
POOR, GOOD = 0.25, 0.75  # the loss's fall over the model's: below, the damping grows; above, it shrinks


@dataclass
class Stage:
    """What is known after a direction q of the conjugate gradient method.

    Attributes:
        direction: q, (P,).
        curvature: q^T H q; where it is not above 0 the method ends, and the next two are those before this direction.
        point: W - W0 at the best place along q.
        gradient: of the model there, orthogonal to this and all earlier directions.
    """

    direction: Tensor
    curvature: float
    point: Tensor
    gradient: Tensor


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], gradient: Tensor, *, n: int, tol: float = 1e-10
) -> Iterator[Stage]:
    """Minimize g^T p + p^T H p / 2 by at most n directions, each conjugate to those before.

    Law: after stage t the gradient is orthogonal to directions 1 to t; it is 0 after d stages at the latest.

    Args:
        product: from v to H v, (P,) each.
        gradient: g, (P,).
        n: most directions.
        tol: end where the gradient is this part of the first.
    Source: Aggarwal 2018, eqs. 21 and 22; the step along a direction by exact line search on the model.

    >>> import torch
    >>> H, g = torch.tensor([[2.0, 0.0], [0.0, 8.0]]), torch.tensor([2.0, 8.0])
    >>> stages = list(conjugate_gradient(lambda v: H @ v, g, n=2))
    >>> [round(float(stages[1].gradient @ s.direction), 4) for s in stages], stages[-1].point.round(decimals=4)
    ([0.0, 0.0], tensor([-1., -1.]))
    """
    point, first = torch.zeros_like(gradient), float(gradient.norm())
    q, eps = -gradient, torch.finfo(gradient.dtype).eps
    for _ in range(n):
        if float(gradient.norm()) <= max(tol, ROUNDING * eps) * first:
            return
        Hq = product(q)
        curvature = float(q @ Hq)
        if curvature <= eps * float(q.norm() * Hq.norm()):
            yield Stage(q, min(curvature, 0.0), point, gradient)
            return
        t = -float(q @ gradient) / curvature
        point = point + t * q
        gradient = gradient + t * Hq
        yield Stage(q, curvature, point, gradient)
        q = -gradient + float(Hq @ gradient) / curvature * q


class ConjugateGradient(SecondOrder):
    """Hessian-free optimization: conjugate gradients on the quadratic model, a step to its end, and again.

    Each step makes the model (eq. 19) at the present weights, minimizes it by up to `n` conjugate directions, which
    cost one product with the Hessian each (eq. 23) and no memory beyond a few flat vectors, and goes there. A quadratic
    in d parameters is solved in one step of n >= d; other losses need far fewer directions a step. Where a direction
    has negative curvature the model has no end: the step follows that direction down the loss itself. At rest the
    smallest eigenvalue is looked for, and a saddle is left along it. Where the loss falls by less than the model says,
    the damping grows (H + damping I), and shrinks where the two agree.

    Args:
        params: one group of parameters.
        n: most conjugate directions a step.
        damping: least damping, in units of the Hessian.
        tol: a step ends early where the model's gradient is this part of the first.
        delta: None for exact products, a number for differences of two gradients (eq. 23) with moves of that length,
            for models without second derivatives.
    `step(closure)` is as for `Newton`.
    Raises:
        InputError, ParameterError, NonFiniteError, GraphError, NoGraphError, TypeError: as `Newton`.
        RuntimeError, OpaqueGraphError: an operation has no second derivative: give `delta`.
    Source: Aggarwal 2018, eqs. 21 to 23; Martens 2010.

    >>> import torch
    >>> from rowgrad.optim import ConjugateGradient
    >>> w = torch.tensor([3.0, -1.0], requires_grad=True)
    >>> loss = ConjugateGradient([w], n=2).step(lambda: w[0] ** 2 + 4 * w[1] ** 2)
    >>> bool(w.abs().max() < 1e-6)
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        n: int = 50,
        damping: float = 0.0,
        tol: float = 1e-10,
        delta: float | None = None,
    ) -> None:
        options = {"n": n, "damping": damping, "tol": tol, "delta": delta}
        self.check(options)
        super().__init__(params, options)

    def check(self, options: dict[str, Any]) -> None:
        """Raise InputError for an option out of range, whichever of them are there."""
        super().check(options)
        delta = options.get("delta")
        if delta is not None and not (is_number(delta) and delta > 0):
            raise InputError(f"ConjugateGradient: delta={delta!r}, expected None or a positive number")

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One step to the end of the model, or down a direction of negative curvature; returns the loss before it."""
        evaluate = checked(self, closure)
        loss = loss_at_start(self, evaluate)
        delta = self.options["delta"]
        H = Hessian(loss if delta is None else evaluate, self.parameters, delta=delta)
        check_finite(self, H.split(H.gradient))
        after = self.loss_after(evaluate)
        damping = self.memory.get("damping", self.options["damping"])
        model = _minimized(H, damping, self.options["n"], self.options["tol"])
        exit_ = self._way_out(H) if model.bend is None and is_at_rest(model.point, self.weights()) else None
        found = self._towards(model, H, after, damping) if exit_ is None else along(after, exit_, H.value, 1.0)
        self.advance(found)
        return loss.detach()

    def _way_out(self, H: Hessian) -> Tensor | None:
        """The direction of the smallest eigenvalue if that is below 0, of length 1."""
        found = lanczos(H, self.options["n"], torch.Generator().manual_seed(0))
        is_bent = float(found.values[0]) < -LEAST_DAMPING * float(found.values.abs().max())
        return downhill(found.lowest(), H.gradient) if is_bent else None

    def _towards(self, model: _Model, H: Hessian, after: Callable[[Tensor], float], damping: float) -> Tensor | None:
        """The model's point, shortened until the loss falls, then down its negative curvature; sets the damping."""
        p, least = model.point, self.options["damping"]
        slope = float(H.gradient @ p)
        curvature = float(p @ (model.gradient - H.gradient)) - damping * float(p @ p)
        best, value, t = None, H.value, 1.0
        for _ in range(HALVINGS if float(p.norm()) > 0 else 0):
            found, predicted = after(t * p), -(t * slope + t * t * curvature / 2)
            if falls(H.value, found, predicted, torch.finfo(p.dtype).eps):
                best, value = t * p, found
                break
            t /= 2
        if float(p.norm()) > 0:
            predicted, rounding = -slope - curvature / 2, ROUNDING * torch.finfo(p.dtype).eps * abs(H.value)
            ratio = (H.value - value) / predicted if predicted > rounding else 1.0
            ratio = ratio if t == 1 else 0.0
            self.memory["damping"] = _next_damping(damping, ratio, model.scale, least)
        if model.bend is None:
            return best
        base = torch.zeros_like(p) if best is None else best
        unit = model.bend / model.bend.norm()
        further = along(lambda step: after(base + step), unit, value, float(base.norm()) or 1.0)
        return best if further is None else base + further


@dataclass
class _Model:
    """The end of conjugate gradients: the last point and gradient, the largest curvature seen, and the direction of
    negative curvature that ended it, if one did."""

    point: Tensor
    gradient: Tensor
    scale: float
    bend: Tensor | None


def _minimized(H: Hessian, damping: float, n: int, tol: float) -> _Model:
    model = _Model(torch.zeros_like(H.gradient), H.gradient, 0.0, None)
    for stage in conjugate_gradient(lambda v: H @ v + damping * v, H.gradient, n=n, tol=tol):
        q = stage.direction
        model.scale = max(model.scale, abs(stage.curvature) / float(q @ q))
        model.point, model.gradient = stage.point, stage.gradient
        if stage.curvature <= 0:
            model.bend = q
    return model


def _next_damping(damping: float, ratio: float, scale: float, least: float) -> float:
    if ratio < POOR:
        return max(GROWTH * damping, FIRST_DAMPING * scale)
    return relaxed(damping, scale, least) if ratio > GOOD else damping
