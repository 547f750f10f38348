"""Layers whose inputs moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rowgrad as rg

F64 = torch.float64


def test_the_mean_of_a_layers_input_moved_by_standard_deviations() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 1)).double()
    x = torch.randn(50, 4, dtype=F64)
    then = rg.diagnose(model(x).squeeze(1), model)
    before = model[2](model[1](model[0](x))).detach()
    with torch.no_grad():
        model[2].bias += 100 * before.std()
    now = rg.diagnose(model(x).squeeze(1), model, earlier=then)
    finding = now.of("drift")[0]
    spread = float((before - before.mean(0)).square().mean().sqrt())
    assert finding.value == pytest.approx(100 * float(before.std()) / spread)
    assert finding.where == "the input of 3"
    assert "1 of 2 layers" in finding.evidence
    factor = float(finding.remedy.split(" by ")[1].split(",")[0])
    assert factor == pytest.approx(2 * finding.value / 20, rel=0.05)


def test_a_normalization_between_holds_the_inputs_where_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1)).double()
    x = torch.randn(50, 4, dtype=F64)
    then = rg.diagnose(model(x).squeeze(1), model)
    with torch.no_grad():
        model[0].bias += 100
    now = rg.diagnose(model(x).squeeze(1), model, earlier=then)
    assert not now.of("drift")
    assert "drift" not in now.not_looked_at
