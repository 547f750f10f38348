"""Losses to minimize, and where scipy finds their minimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

F64 = torch.float64


@dataclass
class Problem:
    """Parameters at their start, and a function of the losses to be averaged, (B,)."""

    params: list[nn.Parameter]
    losses: Callable[[], Tensor]

    def loss(self) -> Tensor:
        return self.losses().mean()

    def at(self) -> Tensor:
        return parameters_to_vector(self.params).detach().clone()

    def put(self, at: Tensor) -> None:
        vector_to_parameters(at.clone(), self.params)

    def gradient(self) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(self.loss(), self.params)])

    def on_array(self, at: np.ndarray) -> tuple[float, np.ndarray]:
        self.put(torch.from_numpy(at))
        return float(self.loss().detach()), self.gradient().numpy()

    def optimum(self) -> scipy.optimize.OptimizeResult:
        """Where scipy ends from the present weights, which stay."""
        start = self.at()
        found = scipy.optimize.minimize(
            self.on_array, start.numpy().copy(), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 2000}
        )
        self.put(start)
        return found


def in_the_plane(start: tuple[float, float], losses: Callable[[Tensor, Tensor], list[Tensor]]) -> Problem:
    w = nn.Parameter(torch.tensor(start, dtype=F64))
    return Problem([w], lambda: torch.stack(losses(*w.unbind())))


def circular_bowl() -> Problem:
    return in_the_plane((3.0, -2.0), lambda x, y: [2 * x**2, 2 * y**2])


def elliptical_bowl() -> Problem:
    return in_the_plane((3.0, -2.0), lambda x, y: [2 * x**2, 8 * y**2])


def rosenbrock() -> Problem:
    return in_the_plane((-1.2, 1.0), lambda x, y: [200 * (y - x**2) ** 2, 2 * (1 - x) ** 2])


def logistic_regression() -> Problem:
    model = nn.Linear(5, 1).double()
    x = torch.randn(60, 5, dtype=F64)
    y = (x[:, 0] - x[:, 1] + torch.randn(60, dtype=F64) > 0).double()
    return Problem(
        list(model.parameters()), lambda: F.binary_cross_entropy_with_logits(model(x).squeeze(1), y, reduction="none")
    )


def small_net() -> Problem:
    """Two inputs, three tanh units; noise and a penalty make its minimum a point."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(40, 2, dtype=F64)
    y = x[:, 0].sin() + 0.5 * x[:, 1] + 0.1 * torch.randn(40, dtype=F64)
    params = list(model.parameters())

    def losses() -> Tensor:
        penalty = 1e-2 * sum((p.square().sum() for p in params), torch.zeros((), dtype=F64))
        return (model(x).squeeze(1) - y).square() + penalty

    return Problem(params, losses)


PROBLEMS = {f.__name__: f for f in (circular_bowl, elliptical_bowl, rosenbrock, logistic_regression, small_net)}


def quadratic(d: int, condition: float) -> tuple[Problem, Tensor, Tensor]:
    """w^T H w / 2 - b^T w with eigenvalues from 1 to `condition`: the problem, H and its minimum."""
    Q = torch.linalg.qr(torch.randn(d, d, dtype=F64)).Q
    H = Q @ torch.diag(torch.linspace(1, condition, d, dtype=F64)) @ Q.T
    b = torch.randn(d, dtype=F64)
    w = nn.Parameter(torch.randn(d, dtype=F64))
    return Problem([w], lambda: (w @ H @ w / 2 - b @ w).reshape(1)), H, torch.linalg.solve(H, b)
