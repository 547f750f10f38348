"""Newton, conjugate gradients, BFGS, L-BFGS and Gauss-Newton, against scipy and closed forms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from tests.optim.problems import F64, PROBLEMS, Problem, elliptical_bowl, quadratic, rosenbrock, small_net
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rowgrad.curvature import Hessian, critical_point
from rowgrad.errors import (
    FreedGraphError,
    GraphError,
    InputError,
    NoGraphError,
    NonFiniteError,
    NotAVectorError,
    OpaqueGraphError,
    ParameterError,
)
from rowgrad.optim import BFGS, LBFGS, ConjugateGradient, GaussNewton, Newton
from rowgrad.optim.conjugate import conjugate_gradient
from rowgrad.optim.line_search import Place, wolfe
from rowgrad.optim.second_order import along

pytestmark = pytest.mark.filterwarnings("ignore:.*no rule for how the examples meet:rowgrad.RowgradWarning")

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
    """The losses before each of n steps, or until three times the same."""
    losses: list[float] = []
    while len(losses) < n and not (len(losses) > 3 and losses[-1] == losses[-2] == losses[-3]):
        losses.append(float(optimizer.step(closure)))
    return losses


# Where they end


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


# Quadratic losses


def test_eq_20_newton_solves_a_quadratic_in_one_step() -> None:
    problem, _, minimum = quadratic(12, 1e4)
    run(Newton(problem.params), problem.loss, 1)
    torch.testing.assert_close(problem.at(), minimum)


def test_eq_20_the_step_is_the_gradient_over_the_curvature() -> None:
    """On a loss that is no quadratic, W0 - H^-1 grad L of a NumPy solver."""
    problem = PROBLEMS["logistic_regression"]()
    H, before = Hessian(problem.loss, problem.params), problem.at()
    expected = before.numpy() - np.linalg.solve(H.dense().numpy(), H.gradient.numpy())
    run(Newton(problem.params), problem.loss, 1)
    np.testing.assert_allclose(problem.at().numpy(), expected, rtol=1e-10)


def test_eqs_21_and_22_a_new_gradient_is_orthogonal_to_all_earlier_directions() -> None:
    """And a new direction is conjugate to them: q^T H q' = 0; the gradient is that of the model at the point."""
    d = 8
    _, H, _ = quadratic(d, 50)
    g = torch.randn(d, dtype=F64)
    stages = list(conjugate_gradient(lambda v: H @ v, g, n=d))
    assert len(stages) == d
    for k, stage in enumerate(stages):
        torch.testing.assert_close(stage.gradient, g + H @ stage.point)
        for earlier in stages[: k + 1]:
            assert abs(float(stage.gradient @ earlier.direction)) < 1e-9
        for earlier in stages[:k]:
            assert abs(float(stage.direction @ H @ earlier.direction)) < 1e-9
    assert float(stages[-2].gradient.norm()) > 1e-3
    assert float(stages[-1].gradient.norm()) < 1e-9
    torch.testing.assert_close(stages[-1].point, -torch.linalg.solve(H, g))


def test_eq_21_as_it_is_printed() -> None:
    _, H, _ = quadratic(5, 20)
    stages = list(conjugate_gradient(lambda v: H @ v, torch.randn(5, dtype=F64), n=5))
    for this, following in pairwise(stages):
        q, gradient = this.direction, this.gradient
        expected = -gradient + (q @ H @ gradient) / (q @ H @ q) * q
        torch.testing.assert_close(following.direction, expected)


def test_conjugate_gradients_take_d_directions_on_a_quadratic_and_no_fewer() -> None:
    problem, _, minimum = quadratic(10, 30)
    start = problem.at()
    run(ConjugateGradient(problem.params, n=10), problem.loss, 1)
    torch.testing.assert_close(problem.at(), minimum)
    problem.put(start)
    run(ConjugateGradient(problem.params, n=9), problem.loss, 1)
    assert float((problem.at() - minimum).norm()) > 1e-4


def test_far_fewer_directions_suffice_elsewhere() -> None:
    """A net of 481 parameters: 15 directions a step bring the loss down to a hundredth in 40 steps."""
    model = nn.Sequential(nn.Linear(10, 40), nn.Tanh(), nn.Linear(40, 1)).double()
    x = torch.randn(200, 10, dtype=F64)
    y = (x[:, 0] * x[:, 1]).tanh()
    losses = run(ConjugateGradient(model.parameters(), n=15), lambda: (model(x).squeeze(1) - y).square().mean(), 40)
    assert losses[-1] < 0.01 * losses[0]


def test_the_matrix_of_bfgs_is_the_inverse_hessian_after_d_exact_line_searches() -> None:
    d = 8
    problem, H, minimum = quadratic(d, 50)
    optimizer = BFGS(problem.params, curvature=1e-10)
    errors = []
    for _ in range(d):
        optimizer.step(problem.loss)
        errors.append(float((optimizer.inverse_hessian - torch.linalg.inv(H)).norm()))
    torch.testing.assert_close(problem.at(), minimum)
    assert errors[-1] < 1e-6
    assert errors[0] > 0.1
    assert max(np.diff(errors)) < 1e-9  # ever nearer


@pytest.mark.parametrize(("curvature", "near"), [(1e-10, 1e-10), (0.9, 0.1)])
def test_the_matrix_of_bfgs_stays_the_inverse_hessian_at_the_minimum(curvature: float, near: float) -> None:
    """Changes of the gradient that are rounding teach it nothing."""
    problem, H, minimum = quadratic(8, 50)
    optimizer = BFGS(problem.params, curvature=curvature)
    expected = torch.linalg.inv(H)
    for _ in range(200):
        optimizer.step(problem.loss)
    torch.testing.assert_close(problem.at(), minimum)
    assert float((optimizer.inverse_hessian - expected).norm() / expected.norm()) < near


def test_the_matrix_of_bfgs_is_made_anew_when_a_parameter_is_frozen() -> None:
    w, v = nn.Parameter(torch.tensor([3.0], dtype=F64)), nn.Parameter(torch.tensor([2.0], dtype=F64))
    optimizer = BFGS([w, v])
    optimizer.step(lambda: (w**2 + 3 * v**2).sum())
    v.requires_grad_(False)
    run(optimizer, lambda: (w**2 + 3 * v**2).sum(), 20)
    assert optimizer.inverse_hessian.shape == (1, 1)
    assert abs(float(w.detach())) < 1e-8


def test_the_matrix_of_bfgs_maps_the_last_change_of_the_gradient_to_the_last_step() -> None:
    problem = rosenbrock()
    optimizer = BFGS(problem.params)
    for _ in range(5):
        w, g = problem.at(), problem.gradient()
        optimizer.step(problem.loss)
        torch.testing.assert_close(optimizer.inverse_hessian @ (problem.gradient() - g), problem.at() - w)


def test_gauss_newton_fits_a_linear_model_in_one_step() -> None:
    for n, d in ((30, 4), (3, 6)):  # more examples than weights, and fewer: then the shortest step
        x, y = torch.randn(n, d, dtype=F64), torch.randn(n, dtype=F64)
        w = nn.Parameter(torch.randn(d, dtype=F64))
        start = w.detach().clone()
        GaussNewton([w]).step(lambda x=x, y=y, w=w: (x @ w - y).square())
        expected = start.numpy() + np.linalg.lstsq(x.numpy(), (y - x @ start).numpy(), rcond=None)[0]
        np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-8)


def test_gauss_newton_takes_the_step_of_the_jacobian() -> None:
    """-K^+ r with K = dr/dW from autograd, on a net and with damping."""
    problem = small_net()
    model = problem.params
    x, y = torch.randn(30, 2, dtype=F64), torch.randn(30, dtype=F64)

    def residuals() -> Tensor:
        return (x @ model[0].T + model[1]).tanh() @ model[2][0] + model[3] - y

    r = residuals()
    K = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(e, model, retain_graph=True)]) for e in r])
    r, start = r.detach(), problem.at()
    expected = start - torch.linalg.solve(K.T @ K + 0.5 * torch.eye(K.shape[1], dtype=F64), K.T @ r)
    GaussNewton(model, damping=0.5).step(lambda: residuals().square() / 2)
    torch.testing.assert_close(problem.at(), expected)
    problem.put(start)
    GaussNewton(model, damping=0.5, residuals=True).step(residuals)
    torch.testing.assert_close(problem.at(), expected)


def test_gauss_newton_reaches_the_least_squares_of_scipy() -> None:
    t = torch.linspace(0, 3, 20, dtype=F64)
    y = 2 * (-0.7 * t).exp() + 0.05 * torch.randn(20, dtype=F64)
    w = nn.Parameter(torch.tensor([1.0, 0.1], dtype=F64))
    expected = scipy.optimize.least_squares(
        lambda a: a[0] * np.exp(-a[1] * t.numpy()) - y.numpy(), [1, 0.1], xtol=1e-12
    )
    optimizer = GaussNewton([w], residuals=True)
    losses = run(optimizer, lambda: w[0] * (-w[1] * t).exp() - y, 15)
    np.testing.assert_allclose(w.detach().numpy(), expected.x, rtol=1e-7)
    assert losses[-1] == pytest.approx(expected.cost / 20, rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_gauss_newton_with_a_penalty_among_the_residuals(seed: int) -> None:
    """A penalty of its own leaves the other residuals small; in every loss it keeps them all large."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(40, 2, dtype=F64)
    y, n = x[:, 0].sin() + 0.5 * x[:, 1] + 0.1 * torch.randn(40, dtype=F64), 40

    def residuals() -> Tensor:
        weights = torch.cat([p.flatten() for p in model.parameters()])
        return torch.cat([model(x).squeeze(1) - y, (n * 1e-2) ** 0.5 * weights])

    problem = Problem(list(model.parameters()), lambda: residuals().square() / 2)
    optimizer = GaussNewton(problem.params, residuals=True)
    run(optimizer, residuals, 100)
    assert float(problem.gradient().abs().max()) < 1e-5
    assert np.linalg.eigvalsh(Hessian(problem.loss(), problem.params).dense().numpy())[0] > 0  # a minimum


# Negative curvature


def saddle(x: float, y: float) -> tuple[nn.Parameter, Callable[[], Tensor]]:
    """x^2 - y^2 + y^4/4: a saddle at 0, minima of -1 at y = +-sqrt 2."""
    w = nn.Parameter(torch.tensor([x, y], dtype=F64))
    return w, lambda: w[0] ** 2 - w[1] ** 2 + w[1] ** 4 / 4


@pytest.mark.parametrize("method", ["newton", "conjugate gradient", "conjugate gradient, differences"])
@pytest.mark.parametrize("start", [(0.0, 0.0), (1.0, 0.0), (1.0, 1e-9), (-0.5, -0.1)])
def test_saddles_are_left(start: tuple[float, float], method: str) -> None:
    w, loss = saddle(*start)
    run(METHODS[method]([w]), loss, 12)
    assert abs(float(w[1].detach())) == pytest.approx(math.sqrt(2))
    assert abs(float(w[0].detach())) < 1e-6
    assert critical_point(loss, [w]).kind == "minimum"


def test_plain_newton_would_be_caught() -> None:
    """What turning the signs is for: W - H^-1 grad L goes to the saddle from (1, 0.1)."""
    w, loss = saddle(1.0, 0.1)
    H = Hessian(loss, [w])
    plain = w.detach() - torch.linalg.solve(H.dense(), H.gradient)
    turned = w.detach() - H.gradient / H.dense().diag().abs()
    run(Newton([w]), loss, 1)
    assert abs(float(plain[1])) < 0.1 < abs(float(w[1].detach()))
    torch.testing.assert_close(w.detach(), turned)


def test_conjugate_gradients_go_down_negative_curvature_in_the_same_step() -> None:
    w, loss = saddle(1.0, 0.1)
    run(ConjugateGradient([w]), loss, 1)
    assert abs(float(w[1].detach())) > 0.5


@pytest.mark.parametrize(("first", "expected"), [(1.0, 8.0), (100.0, 12.5), (8.0, 8.0)])
def test_a_direction_is_followed_by_doubling_or_halving(first: float, expected: float) -> None:
    """The loss falls to t = 10 and is above its start from 20 on."""
    found = along(lambda step: float((step - 10).abs().sum()), torch.ones(1), 10.0, first)
    assert found is not None
    assert found.tolist() == [expected]
    assert along(lambda step: 10.0, torch.ones(1), 10.0, first) is None


def test_a_maximum_is_left_too() -> None:
    w = nn.Parameter(torch.zeros(2, dtype=F64))
    for method in (Newton, ConjugateGradient):
        with torch.no_grad():
            w.zero_()
        run(method([w]), lambda: w.cos().sum(), 20)
        assert float(w.cos().sum().detach()) == pytest.approx(-2)


def test_a_minimum_is_kept() -> None:
    for method in METHODS.values():
        problem = elliptical_bowl()
        with torch.no_grad():
            problem.params[0].zero_()
        optimizer = method(problem.params)
        losses = problem.losses
        run(optimizer, losses if isinstance(optimizer, GaussNewton) else problem.loss, 3)
        assert problem.at().tolist() == [0, 0]


def test_flat_directions_take_the_step_of_the_steepest() -> None:
    """w0^2 + w1: no curvature along w1, so the rate of the largest one, 1/2."""
    w = nn.Parameter(torch.tensor([3.0, 1.0], dtype=F64))
    Newton([w]).step(lambda: w[0] ** 2 + w[1])
    assert w.tolist() == pytest.approx([0, 0.5])


# Damping


def test_damping_is_added_to_the_hessian() -> None:
    problem, H, minimum = quadratic(6, 10)
    start = problem.at()
    expected = start - torch.linalg.solve(H + 3 * torch.eye(6, dtype=F64), H @ (start - minimum))
    for optimizer in (Newton(problem.params, damping=3), ConjugateGradient(problem.params, damping=3)):
        problem.put(start)
        optimizer.step(problem.loss)
        torch.testing.assert_close(problem.at(), expected)


@pytest.mark.parametrize("method", ["newton", "conjugate gradient", "Gauss-Newton"])
def test_damping_grows_where_the_model_is_wrong_and_goes_again(method: str) -> None:
    w = nn.Parameter(torch.tensor([4.0], dtype=F64))
    optimizer = METHODS[method]([w])
    seen = []
    for _ in range(25):
        optimizer.step(lambda: w.atan() ** 2 if method == "Gauss-Newton" else (1 + w**2).sqrt().sum())
        seen.append(optimizer.memory.get("damping", 0.0))
    assert max(seen) > 0
    assert abs(float(w.detach())) < 1e-6
    assert seen[-1] == 0


class Once(torch.autograd.Function):
    """The square, without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * cotangent * ctx.saved_tensors[0]


def test_differences_serve_where_there_is_no_second_derivative() -> None:
    w = nn.Parameter(torch.tensor([3.0, -2.0], dtype=F64))
    with pytest.raises(OpaqueGraphError, match=r"marked once_differentiable.* Give delta for"):
        ConjugateGradient([w]).step(lambda: Once.apply(w).square().sum())
    run(ConjugateGradient([w], delta=1e-3), lambda: Once.apply(w).sum(), 1)
    assert float(w.detach().abs().max()) < 1e-9


# A closure, and what is kept


@pytest.mark.parametrize("method", METHODS)
def test_a_step_returns_the_loss_before_it_and_works_under_no_grad(method: str) -> None:
    problem = rosenbrock()
    before = float(problem.loss().detach())
    optimizer = METHODS[method](problem.params)
    with torch.no_grad():
        found = optimizer.step(closure_for(optimizer, problem))
    assert float(found) == pytest.approx(before)
    assert not found.requires_grad
    assert float(problem.loss().detach()) < before
    if method != "L-BFGS":
        assert problem.params[0].grad is None


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_its_state_dict_as_if_it_had_not_stopped(method: str) -> None:
    ends = []
    for is_stopped in (False, True):
        torch.manual_seed(3)
        problem = small_net()
        optimizer = METHODS[method](problem.params)
        closure = closure_for(optimizer, problem)
        run(optimizer, closure, 3)
        if is_stopped:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = METHODS[method](problem.params)
            optimizer.load_state_dict(state)
        run(optimizer, closure, 4)
        ends.append(problem.at())
    assert torch.equal(*ends)


def test_what_is_kept_matters() -> None:
    """The same without the state: the check above would see it."""
    ends = []
    for is_stopped in (False, True):
        torch.manual_seed(3)
        problem = small_net()
        optimizer = BFGS(problem.params)
        run(optimizer, problem.loss, 3)
        if is_stopped:
            optimizer = BFGS(problem.params)
        run(optimizer, problem.loss, 4)
        ends.append(problem.at())
    assert not torch.equal(*ends)


def test_an_optimizer_can_be_copied_with_its_weights() -> None:
    for method in (Newton, ConjugateGradient, BFGS):
        w = nn.Parameter(torch.tensor([3.0, -2.0], dtype=F64))
        optimizer = method([w])
        run(optimizer, lambda w=w: (1 + w**2).sqrt().sum(), 2)
        other_w, other = copy.deepcopy((w, optimizer))
        for which, weights in ((optimizer, w), (other, other_w)):
            run(which, lambda weights=weights: (1 + weights**2).sqrt().sum(), 2)
        assert torch.equal(w, other_w)


def test_float32_weights() -> None:
    for method in METHODS.values():
        w = nn.Parameter(torch.tensor([3.0, -2.0]))
        optimizer = method([w])
        is_vector = isinstance(optimizer, GaussNewton)
        run(optimizer, lambda w=w, v=is_vector: w.square() if v else (w.square() * torch.tensor([1.0, 4.0])).sum(), 20)
        assert float(w.detach().abs().max()) < 1e-3


# Errors


@pytest.mark.parametrize("method", METHODS)
def test_a_step_needs_a_closure(method: str) -> None:
    problem = rosenbrock()
    optimizer = METHODS[method](problem.params)
    with pytest.raises(TypeError, match=r"step needs a closure, found none: .* as in optimizer.step\(lambda"):
        optimizer.step()
    with pytest.raises(TypeError, match="step needs a closure, found Tensor"):
        optimizer.step(problem.loss())


@pytest.mark.parametrize("method", METHODS)
def test_nan_is_refused_and_the_weights_stay(method: str) -> None:
    w = nn.Parameter(torch.tensor([-1.0, 2.0], dtype=F64))
    optimizer = METHODS[method]([w])
    is_vector = isinstance(optimizer, GaussNewton)
    with pytest.raises(NonFiniteError, match=r"the loss is nan .*at the present weights, which are left"):
        optimizer.step(lambda: w.sqrt() if is_vector else w.sqrt().sum())
    with pytest.raises(NonFiniteError, match=r"gradient.* is not"):
        optimizer.step(lambda: (w + 1).sqrt() if is_vector else (w + 1).sqrt().sum())
    assert w.tolist() == [-1, 2]


@pytest.mark.parametrize("method", ["newton", "conjugate gradient", "BFGS", "L-BFGS", "Gauss-Newton"])
def test_places_without_a_loss_are_avoided(method: str) -> None:
    """A first step over the edge, into nan, is shortened: w - log w from 5 by Newton goes to -15."""
    w = nn.Parameter(torch.tensor([5.0], dtype=F64))
    optimizer = METHODS[method]([w])
    run(optimizer, lambda: w - w.log() if method == "Gauss-Newton" else (w - w.log()).sum(), 60)
    assert float(w.detach()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_an_error_in_the_closure_leaves_the_weights(method: str) -> None:
    w, calls = nn.Parameter(torch.tensor([2.0, 3.0], dtype=F64)), []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("batch")
        return w.square() if method == "Gauss-Newton" else w.square().sum()

    with pytest.raises(KeyError, match="batch"):
        METHODS[method]([w]).step(closure)
    assert w.tolist() == [2, 3]


@pytest.mark.parametrize("seed", range(3))
def test_l_bfgs_fits_a_normal_distribution_whose_deviation_could_go_below_0(seed: int) -> None:
    torch.manual_seed(seed)
    data = 1 + 0.3 * torch.randn(40, dtype=F64)
    w = nn.Parameter(torch.tensor([3.0, 2.0], dtype=F64))
    run(LBFGS([w]), lambda: (w[1].log() + ((data - w[0]) / w[1]).square() / 2).mean(), 10)
    assert w.tolist() == pytest.approx([float(data.mean()), float(data.std(correction=0))], rel=1e-6)


def test_l_bfgs_forgets_what_leads_nowhere() -> None:
    w, closure = saddle(1.0, 1e-9)
    optimizer = LBFGS([w])
    for _ in range(30):
        optimizer.step(closure)
    assert float(closure().detach()) == pytest.approx(-1, abs=1e-10)
    assert abs(float(w.detach()[1])) == pytest.approx(math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_kept_has_its_own_dtype_in_a_run_that_goes_on(method: str, dtype: torch.dtype) -> None:
    def made() -> tuple[nn.Parameter, Any, Callable[[], Tensor]]:
        w = nn.Parameter(torch.tensor([3.0, -1.0], dtype=dtype))
        optimizer = METHODS[method]([w])
        is_vector = isinstance(optimizer, GaussNewton)
        return w, optimizer, lambda: (1 + (w - 1) ** 2).log() if is_vector else (1 + (w - 1) ** 2).log().sum()

    w, optimizer, closure = made()
    for _ in range(2):
        optimizer.step(closure)
    v, again, other = made()
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        v.copy_(w)
    for _ in range(2):
        optimizer.step(closure)
        again.step(other)
    assert torch.equal(v, w)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_closure_returns_is_checked(method: str) -> None:
    problem = small_net()
    optimizer = METHODS[method](problem.params)
    step: Any = optimizer.step
    with pytest.raises(GraphError, match="the closure returned float, expected the loss with its graph"):
        step(lambda: 1.0)
    with pytest.raises(NoGraphError, match="no graph"):
        step(lambda: closure_for(optimizer, problem)().detach())
    with pytest.raises(ParameterError, match=r"none of the .* parameters is in the graph"):
        step(lambda: torch.ones(3 if method == "Gauss-Newton" else (), requires_grad=True) * 2)
    if method == "Gauss-Newton":
        with pytest.raises(NotAVectorError, match='reduction="none"'):
            step(problem.loss)
        with pytest.raises(GraphError, match=r"loss \d+ is -.*, below 0 it is no square"):
            step(lambda: problem.losses() - 10)
    else:
        with pytest.raises(GraphError, match=r"belongs to one number, found shape \(40,\)"):
            step(problem.losses)


@pytest.mark.parametrize("method", METHODS)
def test_a_closure_must_not_call_backward(method: str) -> None:
    problem = small_net()
    optimizer = METHODS[method](problem.params)

    def closure() -> Tensor:
        losses = closure_for(optimizer, problem)()
        losses.sum().backward()
        return losses

    with pytest.raises(FreedGraphError, match="already freed"):
        optimizer.step(closure)


def test_options_are_checked() -> None:
    w = nn.Parameter(torch.zeros(2))
    with pytest.raises(InputError, match=r"Newton: damping=-1, expected a number of at least 0"):
        Newton([w], damping=-1)
    with pytest.raises(InputError, match="ConjugateGradient: tol=nan"):
        ConjugateGradient([w], tol=math.nan)
    with pytest.raises(InputError, match="ConjugateGradient: n=0, expected at least 1"):
        ConjugateGradient([w], n=0)
    with pytest.raises(InputError, match="BFGS: curvature=1, expected a number between 0 and 1"):
        BFGS([w], curvature=1)
    with pytest.raises(InputError, match="LBFGS: max_iter is called n here"):
        LBFGS([w], n=5, max_iter=3)
    with pytest.raises(ParameterError, match=r"is of float16, .* use bfloat16"):
        LBFGS([nn.Parameter(torch.ones(2, dtype=torch.float16))])
    with pytest.raises(ParameterError):
        LBFGS([nn.Parameter(torch.ones(2), requires_grad=False)])
    with pytest.raises(GraphError, match="returned no losses; the batch is empty"):
        GaussNewton([w]).step(lambda: w.square()[:0])
    with pytest.raises(InputError, match="LBFGS: history=0, expected at least 1"):
        LBFGS([w], history=0)
    with pytest.raises(ParameterError, match="Newton: a second group of parameters, expected one"):
        Newton([{"params": [w]}, {"params": [nn.Parameter(torch.zeros(1))]}])


@pytest.mark.parametrize("method", [Newton, BFGS])
def test_too_many_parameters_for_a_matrix(method: Callable[..., Any]) -> None:
    with pytest.raises(ParameterError, match=r"100,000 parameters have a .* of 74.5 GiB; use .*LBFGS"):
        method([nn.Parameter(torch.zeros(100_000))])


# The line search


@pytest.mark.parametrize("curvature", [0.9, 0.1, 1e-8])
@pytest.mark.parametrize("first", [1e-6, 1.0, 1e4])
def test_the_wolfe_conditions_hold_where_the_line_search_ends(first: float, curvature: float) -> None:
    """Along functions with a narrow, a flat and a far minimum, one that is nan from 3 on, and one with a kink."""
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda t: (t - 1e-3).square(),
        lambda t: -t / (t.square() + 2),
        lambda t: (t - 200).square().log1p(),
        lambda t: (t - 2).square() - (3 - t).sqrt(),
        lambda t: (t - 1).pow(4) + 0.1 * (7 * t).sin(),
    ]
    for f in functions:

        def at(t: float, f: Callable[[Tensor], Tensor] = f) -> Place:
            x = torch.tensor(t, dtype=F64, requires_grad=True)
            y = f(x)
            slope = torch.autograd.grad(y, x)[0]
            return Place(t, float(y.detach()), float(slope), slope)

        start = at(0.0)
        found = wolfe(at, start, first, curvature=curvature, rounding=0.0)
        assert start.slope < 0
        assert found is not None
        assert found.loss <= start.loss + min(1e-4, curvature / 2) * found.t * start.slope
        assert abs(found.slope) <= curvature * abs(start.slope)


def test_a_direction_that_only_rises_has_no_place() -> None:
    start = Place(0.0, 1.0, -1.0, torch.zeros(1))
    assert wolfe(lambda t: Place(t, 2.0, 1.0, torch.zeros(1)), start, 1.0, curvature=0.9, rounding=0.0) is None
