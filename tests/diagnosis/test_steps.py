"""The optimizer's next step: its size, and the loss along it beside the quadratic model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.diagnosis.healthy import batches, losses_of, made
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.curvature import Quadratic
from rowgrad.diagnosis.steps import Along
from rowgrad.errors import GraphError, ParameterError

F64 = torch.float64


def regression() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x, y = torch.randn(50, 4, dtype=F64), torch.randn(50, dtype=F64)
    return model, lambda: (model(x).squeeze(1) - y).square()


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_update_ratios_are_those_of_the_step_that_then_happens(kind: str) -> None:
    model, losses = regression()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(3):  # so that there is a state
        optimizer.zero_grad()
        losses().mean().backward()
        optimizer.step()
    found = rg.diagnose(losses(), model, optimizer=optimizer).updates
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    losses().mean().backward()
    optimizer.step()
    expected = {n: float((p.detach() - before[n]).norm() / before[n].norm()) for n, p in model.named_parameters()}
    assert found == pytest.approx({n: v for n, v in expected.items() if n.endswith("weight")})


@pytest.mark.parametrize(("rate", "limit"), [(1e-7, 1e-5), (100.0, 0.3)])
def test_a_rate_too_small_or_too_large(rate: float, limit: float) -> None:
    model, losses = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    finding = rg.diagnose(losses(), model, optimizer=optimizer).of("update")[0]
    assert finding.limit == limit
    assert (finding.value < limit) == (rate < 1)
    better = float(finding.remedy.split("about ")[1].split(",")[0])
    good = rg.diagnose(losses(), model, optimizer=torch.optim.SGD(model.parameters(), lr=better))
    assert sorted(good.updates.values())[0] < 1e-3 < sorted(good.updates.values())[-1]
    assert not good.of("update")


class Cliff(nn.Module):
    """L(w) = w^2 / 2 up to 1, behind it a wall: + 1e4 (|w| - 1)^2."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=F64))

    def forward(self) -> Tensor:
        return self.w.square() / 2 + 1e4 * (self.w.abs() - 1).relu().square()


def test_a_cliff_along_the_step_is_seen_on_its_curve() -> None:
    """From w = 0.9 the rate 2.5 leads to -1.35, over the wall at -1; the model is the parabola it started on."""
    model = Cliff(0.9)
    found = rg.diagnose(model(), model, optimizer=torch.optim.SGD(model.parameters(), lr=2.5), closure=model)
    along = found.along
    assert along.model.slope == pytest.approx(-2.5 * 0.9**2)
    assert along.model.curvature == pytest.approx((2.5 * 0.9) ** 2)
    for t, loss in along.points:
        w = 0.9 - t * 2.5 * 0.9
        assert loss == pytest.approx(w**2 / 2 + (1e4 * (abs(w) - 1) ** 2 if abs(w) > 1 else 0))
        assert along.model(t) == pytest.approx(w**2 / 2)
    finding = found.of("cliff")[0]
    w = 0.9 - 2.5 * 0.9
    end = w**2 / 2 + 1e4 * (abs(w) - 1) ** 2
    assert finding.value == pytest.approx((end - 0.9**2 / 2) / (2.5 * 0.9**2))
    assert "Take 0.5 of this step, a rate of 1.2 for 2.5" in finding.remedy
    half = rg.diagnose(model(), model, optimizer=torch.optim.SGD(model.parameters(), lr=1.25), closure=model)
    assert not half.of("cliff")


def test_a_loss_that_falls_more_than_its_model_is_no_cliff() -> None:
    """From -3, where |w|^3 / 6 bends most, to 0: the parabola there says that the loss rises again."""
    w = nn.Parameter(torch.tensor([-3.0], dtype=F64))
    closure = lambda: w.abs() ** 3 / 6  # noqa: E731
    rate = 3 / 4.5  # the slope is -4.5
    found = rg.diagnose(closure(), [w], optimizer=torch.optim.SGD([w], lr=rate), closure=closure)
    assert found.along.points[-1][1] == pytest.approx(0)
    assert found.along.model(1) == pytest.approx(4.5)  # where it started
    assert found.along.error == 0
    assert found.along.error_at(1.0, 6.75) == pytest.approx((6.75 - 4.5) / 13.5)


def test_near_a_minimum_a_promise_of_nothing_is_not_a_cliff() -> None:
    """The slope promises 2e-6 and the step costs 0.06; beside a loss of 1 that is no cliff."""
    w = nn.Parameter(torch.tensor([0.01], dtype=F64))
    closure = lambda: 1 + w**4  # noqa: E731
    found = rg.diagnose(closure(), [w], optimizer=torch.optim.SGD([w], lr=1.3e5), closure=closure)
    assert abs(found.along.points[-1][1] - found.along.model(1)) > 1e4 * abs(found.along.model.slope)
    assert not found.of("cliff")


def test_a_loss_that_falls_is_no_cliff_whatever_a_model_of_negative_curvature_says() -> None:
    model = Quadratic(value=2.66, slope=-1.2, curvature=-530.0)
    assert model(1) < -200
    assert Along(model, ((0.0, 2.66), (1.0, 2.22))).error == 0
    assert Along(model, ((0.0, 2.66), (1.0, 2.65))).error > 4  # a tenth of what the slope promises is asked for
    steep = Quadratic(value=2.66, slope=-45.0, curvature=-440.0)  # promises more than there is
    assert Along(steep, ((0.0, 2.66), (1.0, 2.22))).error == 0


def test_a_compiled_model_has_a_difference_in_place_of_its_second_derivative() -> None:
    model = nn.Linear(4, 3)
    compiled = torch.compile(model, backend="aot_eager")
    x, y = torch.randn(10, 4), torch.arange(10) % 3

    def closure() -> Tensor:
        return nn.functional.cross_entropy(compiled(x), y, reduction="none")

    found = rg.diagnose(closure(), model, optimizer=torch.optim.SGD(model.parameters(), 0.1), closure=closure)
    plain = rg.diagnose(
        nn.functional.cross_entropy(model(x), y, reduction="none"),
        model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        closure=lambda: nn.functional.cross_entropy(model(x), y, reduction="none"),
    )
    assert found.along is not None
    assert plain.along is not None
    assert found.along.model.curvature == pytest.approx(plain.along.model.curvature, rel=1e-2)


def test_an_empty_batch_has_no_step_to_look_at() -> None:
    model, x = nn.Linear(4, 1), torch.randn(0, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = rg.diagnose(model(x).squeeze(1), model, optimizer=optimizer, closure=lambda: model(x).squeeze(1))
    assert not found.of("cliff")
    assert found.not_looked_at["cliff"] == "at least one example"


def test_a_step_that_ends_in_nan_is_a_cliff() -> None:
    w = nn.Parameter(torch.tensor([2.0], dtype=F64))
    closure = lambda: w.sqrt() + w  # noqa: E731
    found = rg.diagnose(closure(), [w], optimizer=torch.optim.SGD([w], lr=10), closure=closure)
    assert found.of("cliff")[0].value == float("inf")


def test_a_fused_lstm_has_no_second_derivative_and_a_difference_takes_its_place() -> None:
    torch.manual_seed(0)
    model, optimizer = made("LSTM", 0)
    model.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = next(batches(0))
    found = rg.diagnose(
        losses_of(model, x.float(), y), model, optimizer=optimizer, closure=lambda: losses_of(model, x.float(), y)
    )
    model.double()
    exact = rg.diagnose(
        losses_of(model, x, y),
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        closure=lambda: losses_of(model, x, y),
    )
    assert found.along.model.slope == pytest.approx(exact.along.model.slope, rel=1e-3)
    assert found.along.model.curvature == pytest.approx(exact.along.model.curvature, rel=0.05)


def test_the_closure_runs_as_if_for_the_first_time(leaves_nothing_behind) -> None:
    """Dropout draws the same, running statistics stay where they were, nothing moves."""
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 1)).double()
    x = torch.randn(50, 4, dtype=F64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = model(x).square().squeeze(1)
    held = {id(p): dict(s) for p, s in optimizer.state.items()}
    with leaves_nothing_behind(model, losses):
        found = rg.diagnose(losses, model, optimizer=optimizer, closure=lambda: model(x).square().squeeze(1))
    assert {id(p): dict(s) for p, s in optimizer.state.items()} == held
    assert found.along.points[0][1] == found.along.model.value


def test_what_cannot_be_taken_as_optimizer_or_closure() -> None:
    model, losses = regression()
    with pytest.raises(ParameterError, match=r"is a LBFGS, expected a torch.optim.Optimizer whose step"):
        rg.diagnose(losses(), model, optimizer=torch.optim.LBFGS(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="closure is a Tensor"):
        rg.diagnose(losses(), model, optimizer=optimizer, closure=losses())
    with pytest.raises(GraphError, match="closure returned a float"):
        rg.diagnose(losses(), model, optimizer=optimizer, closure=lambda: 1.0)
