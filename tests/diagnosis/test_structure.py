"""What the structure alone tells: parameters without effect, and examples that meet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rowgrad as rg

F64 = torch.float64


class Forgotten(nn.Module):
    """`b` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).squeeze(1)


def test_parameters_that_no_path_reaches_are_unused() -> None:
    model = Forgotten().double()
    finding = rg.diagnose(model(torch.randn(6, 3, dtype=F64)).square(), model).of("unused")[0]
    assert (finding.where, finding.value) == ("b.weight, b.bias", 2)
    assert "16 numbers" in finding.evidence


def test_parameters_that_the_optimizer_does_not_hold_stay_as_they_are() -> None:
    model = Forgotten().double()
    optimizer = torch.optim.SGD([model.a.weight, *model.b.parameters()], lr=0.01)
    found = rg.diagnose(model(torch.randn(6, 3, dtype=F64)).square(), model, optimizer=optimizer)
    assert [f.where for f in found.of("unused")] == ["b.weight, b.bias", "a.bias"]


def test_a_frozen_parameter_is_not_unused() -> None:
    model = Forgotten().double()
    model.b.requires_grad_(False)
    assert not rg.diagnose(model(torch.randn(6, 3, dtype=F64)).square(), model).of("unused")


def normalized(bias: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 1)
    ).double()


def test_a_bias_before_batchnorm_has_no_gradient() -> None:
    model = normalized(bias=True)
    losses = model(torch.randn(8, 1, 5, 5, dtype=F64)).square().squeeze(1)
    found = rg.diagnose(losses, model)
    finding = found.of("bias before BatchNorm")[0]
    assert finding.where == "0.bias"
    assert finding.value < 1e-12
    assert finding.value == pytest.approx(float(torch.autograd.grad(losses.mean(), model[0].bias)[0].norm()), abs=1e-12)
    assert "saves 6 numbers" in finding.remedy
    assert found.ok  # a note


@pytest.mark.parametrize("evaluated", [False, True])
def test_no_bias_or_running_statistics_and_nothing_is_said(evaluated: bool) -> None:
    model = normalized(bias=evaluated)
    model.train(not evaluated)
    found = rg.diagnose(model(torch.randn(8, 1, 5, 5, dtype=F64)).square().squeeze(1), model)
    assert not found.of("bias before BatchNorm")


def test_a_bias_that_reaches_a_skip_connection_too_is_not_undone() -> None:
    conv, norm = nn.Conv2d(1, 6, 3).double(), nn.BatchNorm2d(6).double()
    h = conv(torch.randn(8, 1, 5, 5, dtype=F64))
    model = nn.ModuleList([conv, norm])
    assert not rg.diagnose((h + norm(h)).square().mean((1, 2, 3)), model).of("bias before BatchNorm")
    moved = h.transpose(2, 3)
    assert not rg.diagnose((moved + norm(moved)).square().mean((1, 2, 3)), model).of("bias before BatchNorm")
    assert rg.diagnose(norm(moved).square().mean((1, 2, 3)), model).of("bias before BatchNorm")


MIXING = {
    "linalg_vector_norm": lambda h: F.normalize(h, dim=0).sum(1),
    "softmax": lambda h: h.softmax(0).square().sum(1),
    "mean": lambda h: (h - h.mean(0)).square().sum(1),
    "mm": lambda h: F.cross_entropy(h @ h.T, torch.arange(len(h)), reduction="none"),
    "roll": lambda h: (h + h.roll(1, 0)).square().sum(1),
}


@pytest.mark.parametrize("op", MIXING)
def test_the_operation_at_which_examples_meet_is_named(op: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    finding = rg.diagnose(MIXING[op](model(torch.randn(7, 4, dtype=F64))), model).of("mixed")[0]
    assert finding.where == f"after 2: {op}"
    assert "batch of 7" in finding.evidence


def test_batchnorm_in_training_mixes_and_says_so_as_a_note() -> None:
    model = normalized(bias=False)
    x = torch.randn(8, 1, 5, 5, dtype=F64)
    finding = rg.diagnose(model(x).squeeze(1), model).of("mixed")[0]
    assert (finding.severity, finding.where) == ("note", "1: native_batch_norm")
    assert "GroupNorm with 6 groups" in finding.remedy
    assert not rg.diagnose(model.eval()(x).squeeze(1), model).of("mixed")


def test_a_scalar_loss_cannot_tell_examples_apart() -> None:
    model = normalized(bias=False)
    found = rg.diagnose(model(torch.randn(8, 1, 5, 5, dtype=F64)).mean(), model)
    assert "reduction" in found.not_looked_at["mixed"]
