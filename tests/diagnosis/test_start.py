"""The loss at initialization beside log K."""

from __future__ import annotations

from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rowgrad as rg

F64 = torch.float64


def classifier(n_classes: int, last: float) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, n_classes)).double()
    with torch.no_grad():
        model[2].weight *= last
    return model


@pytest.mark.parametrize("n_classes", [3, 10, 100])
def test_logits_that_are_too_large_cost_more_than_log_k(n_classes: int) -> None:
    model, x = classifier(n_classes, 50), torch.randn(80, 4, dtype=F64)
    losses = F.cross_entropy(model(x), torch.randint(n_classes, (80,)), reduction="none")
    finding = rg.diagnose(losses, model, initial=True).of("start")[0]
    assert finding.value == pytest.approx(float(losses.detach().mean()))
    assert finding.limit == pytest.approx(log(n_classes) + 1)
    assert f"log {n_classes} = {log(n_classes):.3g}" in finding.evidence
    assert f"standard deviation {float(model(x).detach().std(1, correction=0).mean()):.2g}" in finding.evidence


def test_the_remedy_brings_the_loss_to_log_k() -> None:
    model, x, y = classifier(10, 50), torch.randn(80, 4, dtype=F64), torch.randint(10, (80,))
    finding = rg.diagnose(F.cross_entropy(model(x), y, reduction="none"), model, initial=True).of("start")[0]
    assert "weights of 2 by" in finding.remedy
    with torch.no_grad():
        model[2].weight *= float(finding.remedy.split(" by ")[1].split(",")[0])
    assert float(F.cross_entropy(model(x), y).detach()) == pytest.approx(log(10), abs=0.1)


def test_two_classes_by_one_logit() -> None:
    model, x = classifier(1, 200), torch.randn(80, 4, dtype=F64)
    y = torch.randint(2, (80, 1)).double()
    losses = F.binary_cross_entropy_with_logits(model(x), y, reduction="none").squeeze(1)
    finding = rg.diagnose(losses, model, initial=True).of("start")[0]
    assert finding.value == pytest.approx(float(losses.detach().mean()))
    assert "log 2 = 0.693" in finding.evidence


def test_a_loss_far_below_log_k_means_that_the_label_is_told() -> None:
    model = classifier(10, 0)
    x, y = torch.randn(80, 4, dtype=F64), torch.randint(10, (80,))
    losses = F.cross_entropy(model(x) + 10 * F.one_hot(y, 10), y, reduction="none")
    finding = rg.diagnose(losses, model, initial=True).of("start")[0]
    assert finding.value < log(10) / 2
    assert "no input tells the label" in finding.remedy


def test_weighted_and_ignored_entries_do_not_count() -> None:
    model, x, y = classifier(10, 1), torch.randn(80, 4, dtype=F64), torch.randint(10, (80,))
    with torch.no_grad():
        model[2].bias[3] = -50  # class 3 would be a surprise
    heavy = 50 * torch.ones(10, dtype=F64)
    losses = F.cross_entropy(model(x), y, weight=heavy, ignore_index=3, reduction="none")
    assert not rg.diagnose(losses, model, initial=True).of("start")
    assert rg.diagnose(F.cross_entropy(model(x), y, reduction="none"), model, initial=True).of("start")


def test_it_is_not_looked_at_in_trained_nets_or_without_a_cross_entropy() -> None:
    model, x = classifier(10, 50), torch.randn(80, 4, dtype=F64)
    losses = F.cross_entropy(model(x), torch.randint(10, (80,)), reduction="none")
    assert "start" in rg.diagnose(losses, model).not_looked_at
    assert "start" in rg.diagnose(model(x).square().sum(1), model, initial=True).not_looked_at
