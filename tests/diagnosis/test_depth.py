"""Vanishing and exploding: sizes followed from layer to layer, by the numbers of Aggarwal 2018, section 3.4."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import rowgrad as rg

F64 = torch.float64


class Chain(nn.Module):
    """One unit per layer: h <- sigmoid(w_k h), without biases; the last layer is linear."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(torch.tensor([[w]], dtype=F64)) for w in weights])

    def forward(self, x: Tensor) -> tuple[Tensor, list[float]]:
        """The output, and what enters each layer."""
        entering = []
        for w in self.layers[:-1]:
            entering.append(float(x.detach()))
            x = torch.sigmoid(x @ w)
        return x @ self.layers[-1], [*entering, float(x.detach())]


def test_one_unit_per_layer_the_measured_factor_is_the_product_of_weights_and_slopes() -> None:
    weights = [0.9, -1.3, 2.1, 0.7, -0.4, 1.1, 1.9, 0.8]
    model = Chain(weights)
    out, entering = model(torch.tensor([[0.6]], dtype=F64))
    found = rg.diagnose(out.sum(), model)
    expected = 1.0
    for w, o in zip(weights[1:], entering[1:], strict=True):
        expected *= abs(w) * o * (1 - o)
    finding = found.of("vanishing")[0]
    assert finding.value == pytest.approx(expected, rel=1e-12)
    assert finding.where == "layers.7 to layers.0"
    assert f"a factor of {expected ** (1 / 7):.2g} for each" in finding.evidence
    # The curve says the same layer by layer.
    cotangents = [p.cotangent for p in found.curves]
    factors = [a / b for a, b in pairwise(cotangents)]
    slopes = [abs(w) * o * (1 - o) for w, o in zip(weights[1:], entering[1:], strict=True)]
    assert factors == pytest.approx(slopes, rel=1e-12)
    assert [p.activation for p in found.curves] == pytest.approx(entering)


def test_ten_sigmoids_alone_shrink_below_a_quarter_to_the_tenth() -> None:
    model = Chain([1.0] * 11)
    out, _ = model(torch.tensor([[0.3]], dtype=F64))
    finding = rg.diagnose(out.sum(), model).of("vanishing")[0]
    assert 0 < finding.value < 0.25**10
    assert "ReLU" in finding.remedy


def test_weights_of_four_undo_the_quarter_and_nothing_vanishes() -> None:
    """At o = 1/2 a sigmoid passes exactly 1/4; sigmoid(4 (o - 1/2)) keeps it there."""
    layers = [layer for _ in range(10) for layer in (nn.Linear(1, 1), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(1, 1)).double()
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 4.0)
            nn.init.constant_(module.bias, -2.0)
    found = rg.diagnose(model(torch.tensor([[0.5]], dtype=F64)).sum(), model)
    assert not found.of("vanishing")
    assert found.curves[0].cotangent == pytest.approx(found.curves[-1].cotangent)


def relu_net(depth: int, gain: float, width: int = 64) -> nn.Module:
    """Weights of variance gain^2 * 2/fan_in, biases of 0."""
    model = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU()))).double()
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=gain * (2 / width) ** 0.5)
            nn.init.zeros_(module.bias)
    return model


def test_halved_weights_vanish_while_the_weight_gradients_look_flat() -> None:
    model, x = relu_net(16, 0.5), torch.randn(32, 64, dtype=F64)
    found = rg.diagnose(model(x).square().sum(1), model)
    backward, forward = found.of("vanishing")
    assert backward.value == pytest.approx(0.5**15, rel=3)
    assert "cotangent" in backward.evidence
    assert "activation" in forward.evidence
    weights = [
        float(g.norm())
        for g in torch.autograd.grad(model(x).square().sum(1).mean(), [model[0].weight, model[30].weight])
    ]
    assert max(weights) / min(weights) < 10  # which alone would say that all is well
    assert "Multiply the weights of these layers by" in backward.remedy


def test_the_remedy_works() -> None:
    """The number in the remedy, applied, leaves nothing to find."""
    model, x = relu_net(16, 0.5), torch.randn(32, 64, dtype=F64)
    finding = rg.diagnose(model(x).square().sum(1), model).of("vanishing")[0]
    factor = float(finding.remedy.split(" by ")[1].split()[0])
    assert factor == pytest.approx(2, rel=0.1)
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Linear):
                module.weight *= factor
    assert not rg.diagnose(model(x).square().sum(1), model).of("vanishing")


def test_large_weights_explode() -> None:
    model = relu_net(16, 2.0)
    found = rg.diagnose(model(torch.randn(32, 64, dtype=F64)).sum(1), model)
    backward, forward = found.of("exploding")
    assert 2**13 < backward.value < 2**17
    assert backward.limit == pytest.approx(1000)
    assert forward.value > 2**12


class Unrolled(nn.Module):
    """h <- h U + x V over time: one matrix used at every step."""

    def __init__(self, radius: float) -> None:
        super().__init__()
        q = torch.linalg.qr(torch.randn(6, 6, dtype=F64))[0]
        self.recurrent = nn.Parameter(radius * q)
        self.enter = nn.Parameter(torch.randn(3, 6, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 6, dtype=F64)
        for t in range(x.shape[1]):
            h = h @ self.recurrent + x[:, t] @ self.enter
        return h.sum(1)


def test_a_recurrent_net_explodes_by_sharing() -> None:
    """A multiple r of an orthogonal matrix, used T times: the cotangent grows by exactly r^(T - 1)."""
    model = Unrolled(1.5)
    finding = rg.diagnose(model(torch.randn(4, 25, 3, dtype=F64)), model).of("exploding")[0]
    assert "25 uses of recurrent" in finding.evidence
    assert finding.value == pytest.approx(1.5**24)
    assert finding.remedy.startswith("Multiply recurrent by 0.67")


def test_an_orthogonal_recurrent_net_does_not() -> None:
    model = Unrolled(1.0)
    found = rg.diagnose(model(torch.randn(4, 25, 3, dtype=F64)), model)
    assert not found.of("exploding")
    assert not found.of("vanishing")


def test_the_usual_recurrent_layer_forgets() -> None:
    """PyTorch's RNN with tanh at small weights: what arrives at the first step of 40 has vanished."""
    rnn = nn.RNN(3, 8, batch_first=True).double()
    with torch.no_grad():
        rnn.weight_hh_l0 *= 0.5
    finding = rg.diagnose(rnn(torch.randn(4, 40, 3, dtype=F64))[0][:, -1].sum(1), rnn).of("vanishing")[0]
    assert "weight_hh_l0" in finding.evidence
    assert finding.value < 1e-6
    assert "forget gate" in finding.remedy


def test_what_shrank_until_it_underflowed_is_followed_that_far() -> None:
    layers = [layer for _ in range(400) for layer in (nn.Linear(4, 4), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(4, 1))  # float32 ends at 1e-45
    found = rg.diagnose(model(torch.randn(9, 4)).squeeze(1), model)
    finding = found.of("vanishing")[0]
    assert found.curves[0].cotangent == 0
    assert 0 < finding.value < 1e-30
    assert 0.4 < float(finding.evidence.split("a factor of ")[1].split()[0]) < 0.7


def test_a_product_with_zero_lets_nothing_pass() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    nn.init.constant_(model[2].bias, -1e3)
    finding = rg.diagnose(model(torch.randn(5, 3, dtype=F64)).squeeze(1), model).of("vanishing")[0]
    assert (finding.value, finding.severity) == (0.0, "error")


@pytest.mark.parametrize(
    ("gain", "n", "kind"), [(1.4, 60, "exploding"), (1.4, 100, "exploding"), (0.75, 60, "vanishing")]
)
def test_a_slow_change_over_many_uses_is_reported(gain: float, n: int, kind: str) -> None:
    """Each step alone is within the limit of a layer; all together are not."""
    w = nn.Parameter(torch.eye(16, dtype=F64) * gain)
    out = nn.Linear(16, 5).double()
    h = torch.randn(32, 16, dtype=F64)
    for _ in range(n):
        h = h @ w
    found = rg.diagnose(out(h).logsumexp(1), {"w": w, "out.weight": out.weight, "out.bias": out.bias})
    finding = found.of(kind)[0]
    assert finding.value == pytest.approx(gain ** (n - 1), rel=0.5)
    assert f"through {n} uses of w" in finding.evidence


@pytest.mark.parametrize(("gain", "kind"), [(1.4, "exploding"), (0.72, "vanishing")])
def test_a_slow_change_over_forty_layers_is_reported(gain: float, kind: str) -> None:
    layers = [nn.Linear(16, 16, bias=False) for _ in range(40)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain)
    model = nn.Sequential(*layers).double()
    found = rg.diagnose(model(torch.randn(8, 16, dtype=F64)).sum(1), model)
    assert found.of(kind)
    assert found.of(kind)[0].value == pytest.approx(gain**39, rel=1e-5)  # orthogonal in float32


def test_a_fused_recurrence_says_that_its_steps_are_not_seen() -> None:
    x = torch.randn(3, 20, 4)
    for dtype, seen in ((torch.float32, False), (F64, True)):
        model = nn.LSTM(4, 8, batch_first=True).to(dtype)
        found = rg.diagnose(model(x.to(dtype))[0][:, -1].sum(1), model)
        assert ("time" not in found.not_looked_at) == seen
