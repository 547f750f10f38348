"""Newton, conjugate gradients, BFGS, L-BFGS and Gauss-Newton, against scipy and closed forms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from tests.optim.problems import F64, PROBLEMS, Problem, elliptical_bowl, quadratic, rosenbrock, small_net
from torch import Tensor, nn

from rowgrad.curvature import Hessian, critical_point
from rowgrad.errors import (
    FreedGraphError,
    GraphError,
    InputError,
    NoGraphError,
    NonFiniteError,
    NotAVectorError,
    ParameterError,
)
from rowgrad.optim import BFGS, LBFGS, ConjugateGradient, GaussNewton, Newton

METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "newton": Newton,
    "conjugate gradient": ConjugateGradient,
    "conjugate gradient, differences": lambda params: ConjugateGradient(params, delta=1e-6),
    "BFGS": BFGS,
    "L-BFGS": LBFGS,
    "Gauss-Newton": GaussNewton,
}


def closure_for(optimizer: torch.optim.Optimizer, problem: Problem) -> Callable[[], Tensor]:
    return problem.losses if isinstance(optimizer, GaussNewton) else problem.loss


def run(optimizer: Any, closure: Callable[[], Tensor], n: int) -> list[float]:
    return [float(optimizer.step(closure)) for _ in range(n)]


# Where they end


@pytest.mark.filterwarnings("ignore:.*no rule for how the examples meet:rowgrad.RowgradWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_each_reaches_the_optimum_of_scipy(name: str, method: str) -> None:
    problem = PROBLEMS[name]()
    expected = problem.optimum()
    optimizer = METHODS[method](problem.params)
    losses = run(optimizer, closure_for(optimizer, problem), 150)
    assert float(problem.loss().detach()) == pytest.approx(expected.fun, rel=1e-8, abs=1e-12)
    assert float(problem.gradient().abs().max()) < 1e-4
    if name != "small_net":  # whose units may trade places
        torch.testing.assert_close(problem.at(), torch.from_numpy(expected.x), rtol=1e-4, atol=1e-5)
    assert max(np.diff(losses)) <= 1e-12  # no step made it worse
