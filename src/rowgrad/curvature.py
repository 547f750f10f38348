"""Second derivatives of a loss along a direction: products with its Hessian, and its quadratic model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rowgrad.errors import GraphError, NoGraphError
from rowgrad.parameters import Params, named

Direction = Mapping[str, Tensor]


@dataclass(frozen=True)
class Quadratic:
    """L(w0) + t slope + t^2/2 curvature: the quadratic approximation along a step d (Aggarwal 2018, eq. 19).

    slope = d^T grad L and curvature = d^T H d at w0; t = 1 is the whole step.
    """

    value: float
    slope: float
    curvature: float

    def __call__(self, t: float) -> float:
        """The model's loss after a part t of the step."""
        return self.value + t * self.slope + t * t / 2 * self.curvature

    @property
    def best(self) -> float:
        """The part of the step at which the model is least; inf where it falls for ever."""
        return -self.slope / self.curvature if self.curvature > 0 else float("inf")


def hvp(
    loss: Tensor | Callable[[], Tensor], params: Params, v: Direction, *, delta: float | None = None
) -> dict[str, Tensor]:
    """Product of the Hessian of a loss with a direction, without forming the Hessian.

    Law: linear in v, and u . hvp(v) = v . hvp(u).

    Args:
        loss: a scalar with its graph, or a function that computes it. The graph is kept.
        params: as for `rowgrad.jacobian`.
        v: {parameter: tensor of its shape}; parameters left out count as 0.
        delta: None for the exact product, by differentiating the gradient again; a number for the difference of two
            gradients, (grad L(w + delta v) - grad L(w)) / delta (eq. 23), which needs a function.
    Returns:
        {parameter: tensor of its shape}, zeros where the gradient does not depend on it.
    Raises:
        GraphError: the loss is no scalar, a direction has a wrong shape, or `delta` came without a function.
        NoGraphError: the loss has no graph.
        RuntimeError: an operation has no second derivative in PyTorch (a fused LSTM): give `delta`.
    Source: Aggarwal 2018, part "Second-Order Gradient Descent Methods"; Pearlmutter 1994.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hvp((w**3).sum(), {"w": w}, {"w": torch.tensor([1.0, 1.0])})
    {'w': tensor([ 6., 12.])}
    """
    parameters = named(params).by_name
    direction = _direction(parameters, v)
    if delta is None:
        return _exact(parameters, _gradient(_scalar(loss), parameters, create_graph=True), direction)
    if not callable(loss):
        raise GraphError(f"delta={delta:g} needs a function that computes the loss anew, found a tensor")
    here = _gradient(_scalar(loss), parameters)
    with moved(parameters, direction, delta):
        there = _gradient(_scalar(loss), parameters)
    return {name: (there[name] - here[name]) / delta for name in parameters}


def quadratic_model(loss: Tensor | Callable[[], Tensor], params: Params, step: Direction) -> Quadratic:
    """The quadratic approximation of a loss along a step from the present weights (eq. 19).

    Args:
        loss, params: as for `hvp`.
        step: {parameter: change}; parameters left out stay where they are.
    Raises:
        GraphError, NoGraphError, RuntimeError: as `hvp`.
    """
    parameters = named(params).by_name
    direction = _direction(parameters, step)
    value = _scalar(loss)
    gradient = _gradient(value, parameters, create_graph=True)
    product = _exact(parameters, gradient, direction)
    return Quadratic(float(value.detach()), _dot(gradient, direction), _dot(product, direction))


@contextmanager
def moved(params: Mapping[str, Tensor], direction: Direction, t: float) -> Iterator[None]:
    """The parameters at w + t d while the block runs; then they are the same tensors with the same bits as before.

    Their data is exchanged, not written, so that graphs made before stay valid.
    """
    before = {name: p.data for name, p in params.items()}
    try:
        for name, p in params.items():
            if name in direction:
                p.data = torch.add(before[name], direction[name].to(before[name]), alpha=t)
        yield
    finally:
        for name, p in params.items():
            p.data = before[name]


def _scalar(loss: Tensor | Callable[[], Tensor]) -> Tensor:
    if callable(loss) and not isinstance(loss, Tensor):
        with torch.enable_grad():
            loss = loss()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise GraphError(f"a Hessian belongs to one number, found {found}: pass losses.mean()")
    if not loss.requires_grad:
        raise NoGraphError("loss has no graph: it was detached or made under no_grad()")
    return loss.reshape(())


def _direction(parameters: Mapping[str, Tensor], v: Direction) -> dict[str, Tensor]:
    for name, t in v.items():
        if name not in parameters:
            first = ", ".join(list(parameters)[:5])
            raise GraphError(f"direction: {name!r} is not among the {len(parameters)} parameters ({first}, ...)")
        if t.shape != parameters[name].shape:
            raise GraphError(
                f"direction at {name}: shape {tuple(t.shape)}, expected the parameter's, "
                f"{tuple(parameters[name].shape)}"
            )
    return {name: t.detach() for name, t in v.items()}


def _gradient(loss: Tensor, parameters: Mapping[str, Tensor], *, create_graph: bool = False) -> dict[str, Tensor]:
    with torch.enable_grad():
        found = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def _exact(parameters: Mapping[str, Tensor], gradient: Direction, direction: Direction) -> dict[str, Tensor]:
    live = [(g, direction[n]) for n, g in gradient.items() if n in direction and g.requires_grad]
    if not live:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    with torch.enable_grad():
        slope = torch.stack([(g * d).sum() for g, d in live]).sum()
    if not slope.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    return _gradient(slope, parameters)


def _dot(a: Direction, b: Direction) -> float:
    return sum(float((a[n].detach().double() * b[n].double()).sum()) for n in b)
