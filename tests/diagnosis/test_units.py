"""Units that cannot learn: saturated, dead, or copies of each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rowgrad as rg

F64 = torch.float64
SQUASHING = {"sigmoid": (nn.Sigmoid, lambda o: o * (1 - o), 0.25), "tanh": (nn.Tanh, lambda o: 1 - o**2, 1.0)}


def data(n: int = 64) -> Tensor:
    return torch.randn(n, 5, dtype=F64)


def squashed(kind: str, factor: float) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 20), SQUASHING[kind][0](), nn.Linear(20, 1)).double()
    with torch.no_grad():
        model[0].weight *= factor
        model[0].bias *= factor
    return model


@pytest.mark.parametrize("kind", SQUASHING)
def test_saturation_is_measured_by_the_slope_in_terms_of_the_output(kind: str) -> None:
    model, x = squashed(kind, 50), data()
    finding = rg.diagnose(model(x).squeeze(1), model).of("saturated")[0]
    o = model[:2](x).detach()
    slope, largest = SQUASHING[kind][1](o), SQUASHING[kind][2]
    assert finding.value == pytest.approx(float((slope < 0.1 * largest).double().mean()))
    assert f"{'o(1-o)' if kind == 'sigmoid' else '1-o^2'} is {float(slope.mean()):.2g} in the mean" in finding.evidence
    assert f"at most {largest:g}" in finding.evidence


@pytest.mark.parametrize("kind", SQUASHING)
def test_the_remedy_for_saturation_works(kind: str) -> None:
    model, x = squashed(kind, 20), data()
    finding = rg.diagnose(model(x).squeeze(1), model).of("saturated")[0]
    factor = float(finding.remedy.split(" by ")[1].split(",")[0])
    with torch.no_grad():
        model[0].weight *= factor
        model[0].bias *= factor
    assert float(model[0](x).detach().square().mean().sqrt()) == pytest.approx(1, rel=0.2)
    assert not rg.diagnose(model(x).squeeze(1), model).of("saturated")


@pytest.mark.parametrize("kind", SQUASHING)
def test_default_weights_do_not_saturate(kind: str) -> None:
    model = squashed(kind, 1)
    assert not rg.diagnose(model(data()).squeeze(1), model).of("saturated")


def test_a_sigmoid_behind_the_last_layer_is_an_output_and_may_be_certain() -> None:
    model = nn.Linear(5, 1).double()
    with torch.no_grad():
        model.weight *= 1000
    assert not rg.diagnose(torch.sigmoid(model(data())).squeeze(1), model).of("saturated")


class Rectified(nn.Module):
    """A net that calls F.relu: no module that a hook could be set on."""

    def __init__(self, n_dead: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 20), nn.Linear(20, 1)
        with torch.no_grad():
            self.first.bias[:n_dead] = -100

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x))).squeeze(1)


def test_dead_rectifiers_are_counted_and_their_weights_do_not_move() -> None:
    model = Rectified(16).double()
    before = model.first.weight.detach().clone()
    losses = model(data()).square()
    finding = rg.diagnose(losses, model).of("dead")[0]
    assert finding.value == 16 / 20
    assert finding.evidence.startswith("16 of 20 units were 0 for each of 64 examples (0, 1, 2, 3, 4 and 11 more)")
    assert f"standard deviation {(2 / 5) ** 0.5:.2g}" in finding.remedy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses.mean().backward()
    optimizer.step()
    moved = (model.first.weight.detach() != before).any(1)
    assert moved.tolist() == [False] * 16 + [True] * 4


def test_a_unit_is_dead_only_if_no_batch_wakes_it() -> None:
    model = Rectified(0).double()
    with torch.no_grad():
        model.first.weight[:16] = torch.tensor([1.0, 0, 0, 0, 0])
        model.first.bias[:16] = -1
    asleep, awake = data(), data()
    asleep[:, 0], awake[:, 0] = 0, 2
    alone = rg.diagnose(model(asleep), model)
    assert alone.of("dead")[0].value == 0.8
    assert "dead" not in alone.not_looked_at
    assert "dead" in rg.diagnose(model(awake), model).not_looked_at
    both = rg.diagnose(model(asleep), model, batches=[model(awake)])
    assert not both.of("dead")
    assert "dead" not in both.not_looked_at
    again = rg.diagnose(model(asleep), model, batches=[model(asleep), model(asleep)])
    assert "192 examples" in again.of("dead")[0].evidence


def test_a_third_dead_on_the_whole_data_is_a_note() -> None:
    model = Rectified(0).double()
    with torch.no_grad():
        model.first.weight[:7], model.first.bias[:7] = 0, -1
    found = rg.diagnose(model(data()), model, batches=[model(data()) for _ in range(3)])
    assert [(f.severity, f.value) for f in found.of("dead")] == [("note", 0.35)]
    assert found.ok
    assert not rg.diagnose(model(data()), model).of("dead")  # one batch says too little


def test_all_dead_is_an_error() -> None:
    model = Rectified(20).double()
    assert rg.diagnose(model(data()).square(), model).of("dead")[0].severity == "error"


def test_channels_of_a_convolution_are_its_units() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 1)).double()
    with torch.no_grad():
        model[0].bias[:7] = -100
    finding = rg.diagnose(model(torch.randn(6, 1, 5, 5, dtype=F64)).squeeze(1), model).of("dead")[0]
    assert finding.value == 7 / 8


def test_units_with_the_same_weights_stay_the_same() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    for p in model.parameters():
        nn.init.constant_(p, 0.3)
    x, y = data(), torch.randn(64, dtype=F64)
    finding = rg.diagnose((model(x).squeeze(1) - y).square(), model).of("symmetric")[0]
    assert (finding.where, finding.severity) == ("0.weight", "error")
    assert "all of 6 units" in finding.evidence
    assert f"{5**-0.5:.2g} = sqrt(1/fan_in)" in finding.remedy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x).squeeze(1) - y).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(model[0].weight, model[0].weight[:1].expand(6, 5))


def test_a_single_pair_of_copies_is_found() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        for p in (model[0].weight, model[0].bias):
            p[4] = p[1]
        model[2].weight[0, 4] = model[2].weight[0, 1]
    finding = rg.diagnose(model(data()).square().squeeze(1), model).of("symmetric")[0]
    assert "2 of 6 units" in finding.evidence
    assert finding.value == pytest.approx(1 / 6)


def test_the_same_weights_with_different_gradients_part() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    nn.init.constant_(model[0].weight, 0.3)
    assert not rg.diagnose(model(data()).square().squeeze(1), model).of("symmetric")
