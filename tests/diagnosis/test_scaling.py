"""Features and weights of very different size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rowgrad as rg

F64 = torch.float64
SCALES = torch.tensor([1.0, 1000.0, 1.0, 1.0], dtype=F64)


def diagnosed(x: Tensor) -> rg.Diagnosis:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    return rg.diagnose((model(x).squeeze(1) - torch.randn(len(x), dtype=F64)).square(), model)


def data() -> Tensor:
    return torch.randn(200, 4, dtype=F64)


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


def test_gradient_ratios_before_and_after_standardizing() -> None:
    """A linear model: the gradient of a feature's weight is that feature times the error, so ratios are exact."""
    x, y = data(), torch.randn(200, dtype=F64)
    model = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(model.weight)

    def ratios(x: Tensor) -> Tensor:
        losses = (model(x).squeeze(1) - y).square()
        return rg.Graph(losses.mean(), model).backward().gradients["weight"].abs().squeeze(0)

    torch.testing.assert_close(ratios(x * SCALES) / ratios(x), SCALES)
    losses = (model(x * SCALES).squeeze(1) - y).square()
    finding = rg.diagnose(losses, model).of("ratios")[0]
    usual = ratios(x * SCALES).sort().values[0]  # the lower quartile of four
    assert finding.value == pytest.approx(float(ratios(x * SCALES).max() / usual))
    assert finding.value > 100
    assert not rg.diagnose((model(standardized(x * SCALES)).squeeze(1) - y).square(), model).of("ratios")


def test_features_of_different_size_are_found_and_standardizing_helps() -> None:
    x = data() * SCALES
    finding = diagnosed(x).of("inputs")[0]
    peak = x.abs().amax(0)
    assert finding.value == pytest.approx(float(peak[1] / peak.min()))
    assert "feature 1 reaches" in finding.evidence
    assert f"{float(x[:, 1].std()):.3g} for feature 1" in finding.remedy
    assert diagnosed(standardized(x)).ok


def test_a_feature_far_from_zero_is_found() -> None:
    x = standardized(data()) + torch.tensor([50.0, 0, 0, 0], dtype=F64)
    finding = diagnosed(x).of("inputs")[0]
    assert finding.value == pytest.approx(50)
    assert "mean 50" in finding.evidence
    assert diagnosed(x / 10).of("inputs")[0].value == pytest.approx(50)  # in standard deviations, whatever the unit


def test_a_feature_that_hardly_varies_is_no_offset() -> None:
    x = standardized(data())
    x[:, 0] = 0.8 + 1e-4 * x[:, 0]
    assert diagnosed(x).ok


def test_data_that_are_large_as_a_whole_are_found() -> None:
    finding = diagnosed(255 * standardized(data())).of("inputs")[0]
    assert finding.value == pytest.approx(255, rel=0.01)
    assert "Multiply the data by 0.0039" in finding.remedy
    small = diagnosed(standardized(data()) / 255).of("inputs")[0]
    assert (small.value, small.limit) == (pytest.approx(1 / 255, rel=0.01), pytest.approx(1 / 30))


def test_layers_with_gradients_of_different_size_are_found() -> None:
    """A gain moved from one layer to the other leaves the function as it is and the sizes of its gradients not."""
    model = nn.Sequential(nn.Linear(4, 16, bias=False), nn.Linear(16, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight *= 1e-2
        model[1].weight *= 1e2
    losses = model(data()).squeeze(1)
    found = rg.diagnose(losses, model)
    gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
    sizes = [float(g.norm() / p.detach().norm()) for g, p in zip(gradients, model.parameters(), strict=True)]
    assert [p.gradient for p in found.curves] == pytest.approx(sizes)
    finding = found.of("ratios")[0]
    assert finding.value == pytest.approx(sizes[0] / sizes[1])
    assert finding.where == "1.weight and 0.weight"
