"""Products with the Hessian, and the quadratic model along a step."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowgrad.curvature import Hessian, critical_point, flat, hvp, moved, quadratic_model, spectrum
from rowgrad.errors import GraphError, InputError, NoGraphError, NonFiniteError

F64 = torch.float64


def regression() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(20, 3, dtype=F64), torch.randn(20, dtype=F64)
    return model, lambda: (model(x).squeeze(1) - y).square().mean()


def direction(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


def hessian(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    params = list(model.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), params, create_graph=True)])
    rows = [torch.autograd.grad(g, params, retain_graph=True, allow_unused=True) for g in gradient]
    zeros = [torch.zeros_like(p) for p in params]
    return torch.stack(
        [torch.cat([(z if g is None else g).flatten() for g, z in zip(row, zeros, strict=True)]) for row in rows]
    )


def test_the_product_is_that_with_the_hessian() -> None:
    model, loss = regression()
    v = direction(model)
    expected = hessian(model, loss) @ flat(v)
    torch.testing.assert_close(flat(hvp(loss, model, v)), expected)
    torch.testing.assert_close(flat(hvp(loss(), model, v)), expected)
    torch.testing.assert_close(flat(hvp(loss, model, v, delta=1e-5)), expected, rtol=1e-4, atol=1e-5)


def test_it_is_symmetric() -> None:
    model, loss = regression()
    u, v = direction(model), direction(model)
    torch.testing.assert_close(flat(u) @ flat(hvp(loss, model, v)), flat(v) @ flat(hvp(loss, model, u)))


def test_a_linear_loss_has_no_curvature() -> None:
    w = torch.ones(3, requires_grad=True)
    assert hvp((2 * w).sum(), {"w": w}, {"w": torch.ones(3)})["w"].tolist() == [0, 0, 0]


def test_the_quadratic_model_is_the_taylor_polynomial() -> None:
    model, loss = regression()
    step = {name: 1e-3 * d for name, d in direction(model).items()}
    found = quadratic_model(loss, model, step)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), list(model.parameters()))])
    assert found.slope == pytest.approx(float(gradient @ flat(step)))
    assert found.curvature == pytest.approx(float(flat(step) @ hessian(model, loss) @ flat(step)))
    with moved(dict(model.named_parameters()), step, 1.0):
        there = float(loss().detach())
    assert found(1) == pytest.approx(there, rel=1e-7)
    assert found(0) == float(loss().detach())


def test_eq_19_the_error_falls_as_the_cube_of_the_step() -> None:
    model, loss = regression()
    params, step, errors = dict(model.named_parameters()), direction(model), []
    found = quadratic_model(loss, model, step)
    for t in (8e-4, 4e-4, 2e-4):
        with moved(params, step, t):
            errors.append(abs(found(t) - float(loss().detach())))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(8, rel=0.1)


def test_eq_23_the_error_falls_with_delta() -> None:
    model, loss = regression()
    v = direction(model)
    exact = flat(hvp(loss, model, v))
    errors = [float((flat(hvp(loss, model, v, delta=d)) - exact).norm()) for d in (1e-3, 5e-4)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)


def test_the_best_part_of_a_step_on_a_parabola() -> None:
    w = torch.tensor([3.0], dtype=F64, requires_grad=True)
    found = quadratic_model((2 * w.square()).sum(), {"w": w}, {"w": torch.tensor([-12.0], dtype=F64)})
    assert found.best == pytest.approx(0.25)  # from 3 by -12 / 4 to 0
    assert quadratic_model(w.sum(), {"w": w}, {"w": torch.tensor([-1.0])}).best == float("inf")


def test_parameters_come_back_with_the_same_bits(leaves_nothing_behind) -> None:
    model, loss = regression()
    value, d = loss(), direction(model)
    with leaves_nothing_behind(model, value):
        hvp(loss, model, d, delta=0.1)
        quadratic_model(loss, model, d)
        with pytest.raises(ZeroDivisionError), moved(dict(model.named_parameters()), d, 0.3):
            raise ZeroDivisionError
    value.backward()


def test_errors_say_what_was_found() -> None:
    model, loss = regression()
    with pytest.raises(GraphError, match=r"belongs to one number, found shape \(4,\): pass losses.mean"):
        hvp(torch.ones(4, requires_grad=True) * 2, model, {})
    with pytest.raises(GraphError, match=r"direction at 0.bias: shape \(1,\), expected the parameter's, \(4,\)"):
        hvp(loss, model, {"0.bias": torch.ones(1)})
    with pytest.raises(GraphError, match="'bias' is not among the 4 parameters"):
        hvp(loss, model, {"bias": torch.ones(1)})
    with pytest.raises(GraphError, match=r"delta=0\.1 needs a function"):
        hvp(loss(), model, {}, delta=0.1)
    with pytest.raises(NoGraphError, match="loss has no graph"):
        hvp(loss().detach(), model, {})


# The Hessian, its spectrum, critical points


def test_the_hessian_as_products_and_dense() -> None:
    model, loss = regression()
    expected, v = hessian(model, loss), torch.randn(21, dtype=F64)
    H = Hessian(loss, model)
    torch.testing.assert_close(H.dense(), expected)
    torch.testing.assert_close(H @ v, expected @ v)
    torch.testing.assert_close(
        H.gradient, torch.cat([g.flatten() for g in torch.autograd.grad(loss(), list(model.parameters()))])
    )
    torch.testing.assert_close(Hessian(loss, model, delta=1e-6) @ v, expected @ v, rtol=1e-5, atol=1e-5)
    assert (Hessian(loss, model, delta=1e-6) @ torch.zeros_like(v)).tolist() == [0] * 21


def diagonal(values: list[float]) -> tuple[Tensor, Tensor]:
    w = torch.zeros(len(values), dtype=F64, requires_grad=True)
    return w, (torch.tensor(values, dtype=F64) * w.square()).sum() / 2


def test_all_steps_give_the_spectrum_itself() -> None:
    model, loss = regression()
    expected = torch.linalg.eigvalsh(hessian(model, loss))
    found = spectrum(loss, model, n=21, probes=1)
    torch.testing.assert_close(found.nodes, expected)
    assert found.error < 1e-12
    assert float(found.weights.sum()) == pytest.approx(1)
    lowest = flat(found.lowest)
    torch.testing.assert_close(hessian(model, loss) @ lowest, expected[0] * lowest)


def test_few_steps_give_the_extremes() -> None:
    values = [-5.0, *torch.linspace(0, 1, 300).tolist(), 9.0]
    w, loss = diagonal(values)
    found = spectrum(loss, {"w": w}, n=25)
    assert found.smallest == pytest.approx(-5, abs=found.error + 1e-9)
    assert found.largest == pytest.approx(9, abs=found.error + 1e-9)
    assert found.error < 1e-6
    rough = spectrum(loss, {"w": w}, n=4)
    assert rough.smallest == float(rough.nodes.min())
    assert rough.largest == float(rough.nodes.max())
    assert -5 - 1e-9 <= rough.smallest <= -5 + rough.error
    assert 9 - rough.error <= rough.largest <= 9 + 1e-9


def test_the_density_is_that_of_the_eigenvalues() -> None:
    """Half of 1000 eigenvalues at 1, half at 3: two equal hills; the mean of the nodes is the mean eigenvalue."""
    w, loss = diagonal([1.0, 3.0] * 500)
    found = spectrum(loss, {"w": w}, n=20, probes=8)
    hills = found.density(torch.tensor([1.0, 2.0, 3.0], dtype=F64), width=0.1)
    top = 0.5 / (0.1 * math.sqrt(2 * math.pi))
    assert hills.tolist() == pytest.approx([top, 0, top], abs=0.04 * top)
    assert float(found.weights @ found.nodes) == pytest.approx(2, rel=0.03)
    grid = torch.linspace(0, 4, 4001, dtype=F64)
    assert float(found.density(grid, 0.1).sum() * 0.001) == pytest.approx(1, rel=1e-6)


def test_the_spectrum_draws_from_its_own_generator() -> None:
    w, loss = diagonal([1.0, 2.0, 3.0])
    before = torch.get_rng_state()
    first, second = (spectrum(loss, {"w": w}, n=2) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.nodes, second.nodes)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], "minimum"),
        ([-1, -2], "maximum"),
        ([1, -1e-3], "saddle"),
        ([1, 0], "degenerate"),
        ([-1, 0], "degenerate"),
        ([1, -1e-9], "degenerate"),
        ([-1, 1e-9], "degenerate"),
        ([0, 0], "degenerate"),
        ([*range(1, 301)], "minimum"),
        ([*range(-300, 0)], "maximum"),
        ([*range(1, 300), -1], "saddle"),
    ],
)
def test_the_kind_of_a_critical_point(values: list[float], kind: str) -> None:
    w, loss = diagonal(values)
    found = critical_point(loss, {"w": w})
    assert found.kind == kind
    assert found.grad_norm == 0
    assert found.smallest == pytest.approx(min(values), abs=1e-9)
    assert found.largest == pytest.approx(max(values), abs=1e-9)


def test_where_the_gradient_is_not_0_there_is_no_critical_point() -> None:
    w, _ = diagonal([1.0, 2.0])
    assert critical_point((w + 1).square().sum(), {"w": w}).kind == "none"
    assert critical_point((w + 1e-7).square().sum(), {"w": w}).kind == "minimum"
    assert critical_point(w.sum(), {"w": w}).kind == "none"


def test_a_minimum_of_a_trained_net_and_its_mirror() -> None:
    """Where scipy found a minimum of a regularized loss there is one; there its negative has a maximum."""
    w = torch.zeros(3, dtype=F64, requires_grad=True)
    x, y = torch.randn(30, 3, dtype=F64), torch.randint(2, (30,)).double()

    def loss() -> Tensor:
        return F.binary_cross_entropy_with_logits(x @ w, y) + 0.01 * w.square().sum()

    def on_array(at: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.no_grad():
            w.copy_(torch.from_numpy(at))
        value = loss()
        return float(value.detach()), torch.autograd.grad(value, w)[0].numpy()

    on_array(scipy.optimize.minimize(on_array, np.zeros(3), jac=True, options={"gtol": 1e-10}).x)
    assert critical_point(loss, {"w": w}).kind == "minimum"
    assert critical_point(lambda: -loss(), {"w": w}).kind == "maximum"


def test_spectra_of_what_is_not_finite_or_not_asked_for() -> None:
    w = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    with pytest.raises(NonFiniteError, match="product with the Hessian holds inf or nan"):
        spectrum(w.sqrt().sum(), {"w": w})
    with pytest.raises(NonFiniteError, match="the Hessian holds inf or nan"):
        critical_point(w.sqrt().sum(), {"w": w})
    with pytest.raises(InputError, match="n=0, probes=2; both must be at least 1"):
        spectrum(w.sum(), {"w": w}, n=0)


class Tied(nn.Module):
    """One weight with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False).double(), nn.Linear(3, 3, bias=False).double()
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


def test_a_shared_tensor_goes_by_any_of_its_names() -> None:
    model, x, v = Tied(), torch.randn(5, 3, dtype=F64), torch.randn(3, 3, dtype=F64)
    loss = model(x).square().mean()
    expected = hvp(loss, model, {"a.weight": v})["a.weight"]
    assert float(expected.norm()) > 0
    assert torch.equal(hvp(loss, model, {"b.weight": v})["a.weight"], expected)
    with pytest.raises(GraphError, match=r"'b\.weight' and 'a\.weight' are one tensor"):
        hvp(loss, model, {"a.weight": v, "b.weight": v})


@pytest.mark.parametrize(
    ("v", "said"),
    [
        ([torch.ones(2)], "direction: a list, expected {name of a parameter: tensor"),
        (torch.ones(2), "direction: a Tensor, expected"),
        ({"w": 1.0}, r"direction at w: a float, expected the parameter's, \(2,\)"),
    ],
)
def test_directions_that_are_none(v: object, said: str) -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(GraphError, match=said):
        hvp(w.square().sum(), {"w": w}, v)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match=said):
        quadratic_model(w.square().sum(), {"w": w}, v)  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, math.nan, math.inf, "a"])
def test_a_difference_needs_a_length(delta: float) -> None:
    w = torch.ones(2, requires_grad=True)
    said = f"delta={delta!r}, expected None or a finite number other than 0"
    with pytest.raises(InputError, match=said):
        hvp(lambda: w.square().sum(), {"w": w}, {"w": torch.ones(2)}, delta=delta)
    with pytest.raises(InputError, match=said):
        Hessian(lambda: w.square().sum(), {"w": w}, delta=delta)


@pytest.mark.parametrize("options", [{"n": 0}, {"tol": math.nan}, {"tol": -1.0}])
def test_critical_points_ask_for_a_step_and_a_tolerance(options: dict[str, float]) -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(InputError, match=r"critical_point: n=.* expected n of at least 1 and a finite tol"):
        critical_point(w.square().sum(), {"w": w}, **options)  # type: ignore[arg-type]
