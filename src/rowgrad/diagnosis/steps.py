"""The optimizer's next step, taken on a copy: how large it is, and whether the loss does what its model promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from statistics import median

import torch
from torch import Tensor

from rowgrad.curvature import Quadratic, hvp, moved, quadratic_model
from rowgrad.diagnosis.findings import Finding, some
from rowgrad.diagnosis.limits import Limits
from rowgrad.errors import ParameterError
from rowgrad.repeat import Repeated

USUAL_UPDATE = 1e-3  # size of a step over the size of the weight (Bottou 2015)
ENOUGH = 0.1  # of the decrease that the slope promises, or of the loss if that is less
POINTS = 9  # of the curve along a step
HALVINGS = 12  # in search of a part of the step for which the model holds


def next_step(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What `optimizer.step()` would add to each parameter, found on a copy of the optimizer and of what it holds.

    Raises:
        ParameterError: no `torch.optim.Optimizer`, or one that calls a closure (LBFGS).
    """
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise ParameterError(
            f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer whose step() needs no closure"
        )
    held = [p for group in optimizer.param_groups for p in group["params"]]
    copies = {id(p): p.detach().clone().requires_grad_(p.requires_grad) for p in held}
    twin = deepcopy(optimizer, dict(copies))
    for name, p in parameters.items():
        if id(p) in copies:
            copies[id(p)].grad = gradients[name].detach().clone()
    twin.step()
    return {name: copies[id(p)].detach() - p.detach() for name, p in parameters.items() if id(p) in copies}


# Size


def update_ratios(step: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of the change over norm of the weight, for what has two dimensions or more."""
    sizes = {n: float(w.detach().double().norm()) for n, w in weights.items() if n in step and w.ndim >= 2}
    return {n: float(step[n].double().norm()) / size for n, size in sizes.items() if size > 0}


def update_findings(ratios: Mapping[str, float], limits: Limits, rate: float | None) -> Iterator[Finding]:
    """A step too large or too small for the median weight."""
    if not ratios:
        return
    low, high = limits.update
    middle = median(ratios.values())
    if not low <= middle <= high:
        yield _update(ratios, middle, high if middle > high else low, rate)


def _update(ratios: Mapping[str, float], middle: float, limit: float, rate: float | None) -> Finding:
    large = middle > limit
    wanted = USUAL_UPDATE / middle if middle > 0 else float("inf")
    change = f"by {wanted:.2g}" + ("" if rate is None else f", from {rate:.2g} to about {rate * wanted:.2g}")
    return Finding(
        "update",
        some(sorted(ratios, key=lambda k: ratios[k], reverse=large)),
        f"a step changes the median of {len(ratios)} weights by {middle:.1e} of its size; usual is 1e-4 to 1e-2",
        f"Multiply the rate {change}, for a change of {USUAL_UPDATE:.0e} a step"
        if middle > 0
        else "Nothing moves: look for a rate of 0 or a gradient of 0",
        "warning",
        middle,
        limit,
    )


# Cliffs


@dataclass(frozen=True)
class Along:
    """The loss along a step beside its quadratic model, at parts t of the step."""

    model: Quadratic
    points: tuple[tuple[float, float], ...]  # (t, loss)

    @property
    def error(self) -> float:
        """What the loss is too high by at the end, see `error_at`."""
        return self.error_at(*self.points[-1])

    def error_at(self, t: float, loss: float) -> float:
        """What a loss is too high by after a part of the step, over the loss or the decrease that the slope promises.

        Too high is above what the model says, or above where it started if the model itself says that it rises. A loss
        that falls by a good part of what the slope promises, or of itself, is not too high, whatever a model of
        negative curvature says (Armijo 1966).
        """
        value, fall = self.model.value, min(-t * self.model.slope, abs(self.model.value))
        if 0 < ENOUGH * fall <= value - loss:
            return 0.0
        promised = min(self.model(t), self.model.value)
        return (max(loss - promised, 0.0) if isfinite(loss) else float("inf")) / max(
            abs(t * self.model.slope), abs(self.model.value), 1e-300
        )


def repeated_mean(closure: Callable[[], Tensor], model: object) -> Callable[[], Tensor]:
    """The mean of a closure's losses, again and again as if for the first time."""
    run = Repeated(closure, model)
    return lambda: run().mean()


def along(closure: Callable[[], Tensor], parameters: Mapping[str, Tensor], step: Mapping[str, Tensor]) -> Along:
    """The loss at parts of a step, and the quadratic model at its beginning."""
    model = _model(closure, parameters, step)
    parts = [k / (POINTS - 1) for k in range(POINTS)]
    return Along(model, tuple((t, _loss_at(closure, parameters, step, t)) for t in parts))


def _model(closure: Callable[[], Tensor], parameters: Mapping[str, Tensor], step: Mapping[str, Tensor]) -> Quadratic:
    try:
        return quadratic_model(closure, parameters, step)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("not implemented", "double backward")):
            raise
        # Without a second derivative (a fused LSTM, a compiled region): a difference of gradients, eq. 23.
        loss = closure()
        slope = torch.autograd.grad(loss, [parameters[n] for n in step], allow_unused=True)
        product = hvp(closure, parameters, step, delta=1e-3)
        dot = lambda vs: sum(float((v.double() * d.double()).sum()) for v, d in vs if v is not None)  # noqa: E731
        return Quadratic(
            float(loss.detach()),
            dot(zip(slope, step.values(), strict=True)),
            dot((product[n], d) for n, d in step.items()),
        )


def _loss_at(
    closure: Callable[[], Tensor], parameters: Mapping[str, Tensor], step: Mapping[str, Tensor], t: float
) -> float:
    with moved(parameters, step, t), torch.no_grad():
        return float(closure().detach())


def cliff_findings(
    found: Along,
    closure: Callable[[], Tensor],
    parameters: Mapping[str, Tensor],
    step: Mapping[str, Tensor],
    rate: float | None,
    limits: Limits,
) -> Iterator[Finding]:
    """A step along which the loss does something else than its quadratic model says (Conn, Gould and Toint 2000)."""
    if not found.error > limits.cliff:
        return
    t = 1.0
    for _ in range(HALVINGS):
        t /= 2
        if found.error_at(t, _loss_at(closure, parameters, step, t)) <= 0.25:
            break
    end, model = found.points[-1][1], found.model
    size = sum(float(d.double().square().sum()) for d in step.values()) ** 0.5
    worst = max(step, key=lambda n: float(step[n].double().norm()))
    slower = "" if rate is None else f", a rate of {rate * t:.2g} for {rate:.2g}"
    yield Finding(
        "cliff",
        f"the next step, of norm {size:.2g}, most of it in {worst}",
        f"the quadratic model says the loss goes from {model.value:.3g} to {model(1):.3g}, in fact it goes to "
        f"{end:.3g}: too high by {found.error:.2g} times the loss or the decrease that the slope promises, the larger",
        f"Take {t:.2g} of this step{slower}, or clip the norm of the step at {size * t:.2g}: that far the model holds "
        "to a quarter",
        "warning",
        found.error,
        limits.cliff,
    )
