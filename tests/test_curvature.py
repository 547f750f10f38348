"""Products with the Hessian, and the quadratic model along a step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rowgrad.curvature import hvp, moved, quadratic_model
from rowgrad.errors import GraphError, NoGraphError

F64 = torch.float64


def regression() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(20, 3, dtype=F64), torch.randn(20, dtype=F64)
    return model, lambda: (model(x).squeeze(1) - y).square().mean()


def direction(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


def flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in parts.values()])


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
