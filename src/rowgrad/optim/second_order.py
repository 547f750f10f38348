"""What the second-order methods share: a closure's loss, a flat vector of weights, and when a step is good enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import isfinite
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from rowgrad.curvature import flat, moved, split
from rowgrad.errors import GraphError, InputError, NonFiniteError, ParameterError
from rowgrad.parameters import named

Closure = Callable[[], Tensor]

ENOUGH = 1e-4  # share of the predicted fall of the loss with which a step is content
ROUNDING = 16  # units of rounding by which a loss may rise and still count as equal
GROWTH = 10.0  # of the damping from one trial to the next
LEAST_DAMPING = 1e-6  # as a share of the curvature's scale; below it damping is 0
TRIALS = 16
HALVINGS = 40
DOUBLINGS = 10
STANDSTILL = 1e-6  # a step shorter than this, relative to the weights, does not leave a saddle


class SecondOrder(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose step is given a closure that computes the loss and calls no `backward`."""

    def __init__(self, params: Iterable[Any], options: dict[str, Any]) -> None:
        super().__init__(params, options)
        named(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the one group of parameters, with options of its own."""
        if self.param_groups:
            raise ParameterError(
                f"{type(self).__name__}: a second group of parameters, expected one: its curvature belongs to all "
                "parameters together"
            )
        self.check(param_group)
        super().add_param_group(param_group)

    def check(self, options: dict[str, Any]) -> None:
        """Raise InputError for an option out of range, whichever of them are there."""
        name = type(self).__name__
        non_negative(name, **{option: options[option] for option in ("damping", "tol") if option in options})
        at_least_1(name, n=options.get("n"))

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return named(self.param_groups).by_name

    @property
    def options(self) -> dict[str, Any]:
        """The options, as in `param_groups`."""
        return self.param_groups[0]

    @property
    def memory(self) -> dict[str, Any]:
        """What is kept between steps, as in `state`."""
        return self.state[self.param_groups[0]["params"][0]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's, but what is kept between steps stays in its own dtype, not the parameter's."""
        super().load_state_dict(state_dict)
        given = state_dict["state"].get(state_dict["param_groups"][0]["params"][0], {})
        kept = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        self.memory.update({name: value.detach().to(self.memory[name].device).clone() for name, value in kept.items()})

    def weights(self) -> Tensor:
        """All weights as a flat vector (P,)."""
        return flat(self.parameters)

    def advance(self, step: Tensor | None) -> None:
        """Add a flat vector to the weights; None adds nothing."""
        if step is None:
            return
        parameters = self.parameters
        with torch.no_grad():
            for name, part in split(step, parameters).items():
                parameters[name].add_(part)

    def moved(self, step: Tensor) -> AbstractContextManager[None]:
        """The weights after a flat step while the block runs; then they are as before."""
        parameters = self.parameters
        return moved(parameters, split(step, parameters), 1.0)

    def loss_after(self, evaluate: Closure) -> Callable[[Tensor], float]:
        """From a step to the loss there, which may be nan."""

        def after(step: Tensor) -> float:
            with self.moved(step):
                return float(evaluate().detach())

        return after


def checked(optimizer: torch.optim.Optimizer, closure: Closure | None) -> Closure:
    """The closure, run with gradients on."""
    if closure is None or not callable(closure):
        found = "none" if closure is None else type(closure).__name__
        raise TypeError(
            f"{type(optimizer).__name__}.step needs a closure, found {found}: a function that computes the loss anew, "
            "as in optimizer.step(lambda: F.mse_loss(model(x), y))"
        )

    def evaluate() -> Tensor:
        with torch.enable_grad():
            return closure()

    return evaluate


def loss_at_start(optimizer: torch.optim.Optimizer, evaluate: Closure) -> Tensor:
    """The loss at the present weights, with its graph, finite."""
    loss = evaluate()
    name = type(optimizer).__name__
    if not isinstance(loss, Tensor):
        raise GraphError(f"{name}: the closure returned {type(loss).__name__}, expected the loss with its graph")
    if not bool(loss.detach().isfinite().all()):
        raise NonFiniteError(
            f"{name}: the loss is {_shown(loss)} at the present weights, which are left as they are; rowgrad.diagnose "
            "finds where it was born (a mean over no examples is nan, too)"
        )
    return loss


def check_finite(optimizer: torch.optim.Optimizer, gradient: Mapping[str, Tensor]) -> None:
    """Raise where a gradient {parameter: tensor} is not finite."""
    bad = [name for name, part in gradient.items() if not bool(part.isfinite().all())]
    if bad:
        raise NonFiniteError(
            f"{type(optimizer).__name__}: the loss is finite, but its gradient at {bad[0]} is not"
            + (f" (and at {len(bad) - 1} more)" if len(bad) > 1 else "")
            + "; the weights are left as they are"
        )


def _shown(loss: Tensor) -> str:
    values = loss.detach().flatten()
    bad = values[~values.isfinite()]
    return f"{float(bad[0])}" + (f" for {len(bad)} of {len(values)} examples" if len(values) > 1 else "")


def is_number(value: object) -> bool:
    """Whether it is a finite number, or a tensor of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(value.isfinite().all())
    return isinstance(value, Real) and isfinite(value)


def non_negative(name: str, **options: Any) -> None:
    """Raise InputError for an option that is no finite number or below 0."""
    for option, value in options.items():
        if not (is_number(value) and value >= 0):
            raise InputError(f"{name}: {option}={value!r}, expected a number of at least 0")


def at_least_1(name: str, **options: Any) -> None:
    """Raise InputError for a count that is no whole number or below 1; None is let through."""
    for option, value in options.items():
        if value is not None and not (isinstance(value, Integral) and int(value) >= 1):
            raise InputError(f"{name}: {option}={value!r}, expected at least 1")


def falls(before: float, after: float, predicted: float, eps: float) -> bool:
    """Whether the loss fell by a part of what was predicted, up to rounding; False for nan."""
    return before - after >= ENOUGH * predicted - ROUNDING * eps * max(abs(before), abs(after))


@dataclass
class Trial:
    """A step, the fall of the loss that the model predicts, and the damping with which it was found."""

    step: Tensor
    predicted: float
    damping: float


def damped(
    solve: Callable[[float], Trial], loss_after: Callable[[Tensor], float], before: float, scale: float, damping: float
) -> Trial | None:
    """The step of least damping after which the loss has fallen: the present damping, then ten times more and so on.

    None where no trial makes it fall. `scale` is the largest curvature.
    Source: Levenberg 1944, Marquardt 1963.
    """
    for _ in range(TRIALS):
        trial = solve(damping)
        eps = torch.finfo(trial.step.dtype).eps
        if falls(before, loss_after(trial.step), trial.predicted, eps):
            return trial
        damping = max(GROWTH * damping, LEAST_DAMPING * scale)
    return None


def relaxed(damping: float, scale: float, least: float) -> float:
    """The damping to try first at the next step."""
    lower = damping / GROWTH
    return max(least, lower if lower > LEAST_DAMPING * scale else 0.0)


def along(loss_after: Callable[[Tensor], float], direction: Tensor, before: float, t: float) -> Tensor | None:
    """A multiple of a direction of negative curvature that lowers the loss: t halved until it does, or doubled while it
    goes on falling. None where it does not fall."""
    best, at = loss_after(t * direction), t
    for _ in range(HALVINGS):
        if best < before:
            break
        at /= 2
        best = loss_after(at * direction)
    if not best < before:
        return None
    if at == t:
        for _ in range(DOUBLINGS):
            further = loss_after(2 * at * direction)
            if not further < best:
                break
            best, at = further, 2 * at
    return at * direction


def downhill(direction: Tensor, gradient: Tensor) -> Tensor:
    """The direction or its opposite, whichever does not go up."""
    return -direction if float(direction @ gradient) > 0 else direction


def is_at_rest(step: Tensor, origin: Tensor) -> bool:
    """Whether a step is too short to leave a saddle."""
    return float(step.norm()) <= STANDSTILL * (1 + float(origin.norm()))
