"""The birthplace of what is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rowgrad as rg

F64 = torch.float64
NAN, INF = float("nan"), float("inf")


def born(losses: Tensor, model: nn.Module) -> rg.Finding:
    found = rg.diagnose(losses, model)
    assert not found.ok
    return found.of("not finite")[0]


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(4, 4).double()


X = torch.linspace(-1, 1, 40, dtype=F64).reshape(10, 4).sin()

# name of the operation, the computation, what is counted in the evidence, a word of the remedy
BIRTHS = {
    "log": (lambda h: h.log().sum(1), lambda h: int((h <= 0).sum()), "clamp(min="),
    "sqrt": (lambda h: (h * 0).sqrt().sum(1), lambda h: h.numel(), "sqrt(x.clamp(min=0) +"),
    "div": (lambda h: (h / (h - h.detach())).sum(1), lambda h: h.numel(), "to the divisor"),
    "reciprocal": (lambda h: (1 / (h - h.detach())).sum(1), lambda h: h.numel(), "to the divisor"),
    "exp": (
        lambda h: (1e4 * h).exp().sum(1),
        lambda h: int((1e4 * h).exp().isinf().sum()),
        "Clamp its argument at 709",
    ),
    "pow": (lambda h: h.pow(0.5).sum(1), lambda h: int((h <= 0).sum()), "Keep the base above"),
}


@pytest.mark.parametrize("op", BIRTHS)
def test_the_operation_is_named_with_what_lies_outside_its_domain(op: str, layer: nn.Linear) -> None:
    compute, outside, remedy = BIRTHS[op]
    h = layer(X)
    finding = born(compute(h), layer)
    assert finding.where == f"after weight: {op}"
    assert f"{outside(h.detach())} entries of its" in finding.evidence
    assert remedy in finding.remedy
    assert finding.severity == "error"


def test_what_comes_behind_the_birthplace_is_not_blamed(layer: nn.Linear) -> None:
    """A NaN made in the middle of a net whose later layers keep it, too."""
    last = nn.Linear(4, 1).double()
    losses = last(layer(X).log().tanh()).squeeze(1)
    finding = born(losses, nn.ModuleDict({"first": layer, "last": last}))
    assert finding.where == "after first: log"


def test_data_that_are_not_finite_are_found_first(layer: nn.Linear) -> None:
    x = X.clone()
    x[3, 2], x[4, 1] = NAN, INF
    finding = born(layer(x).sum(1), layer)
    assert "1 NaN and 1 inf in 40 entries, first at [3, 2]" in finding.evidence


def test_a_parameter_that_is_not_finite_is_named(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight[1, 1] = INF
    assert born(layer(X).sum(1), layer).where == "weight"


def test_a_derivative_may_be_infinite_where_the_value_is_finite(layer: nn.Linear) -> None:
    """sqrt at 0: the loss is finite and the gradient is not."""
    losses = (layer(X) * 0).sqrt().sum(1)
    assert bool(losses.detach().isfinite().all())
    assert "its derivative holds" in born(losses, layer).evidence


def test_the_number_in_the_remedy_works(layer: nn.Linear) -> None:
    h = layer(X)
    smallest = float(born(h.log().sum(1), layer).remedy.split("min=")[1].split(")")[0])
    assert not rg.diagnose(layer(X).clamp(min=smallest).log().sum(1), layer).of("not finite")


def test_mean_of_a_masked_row_without_entries(layer: nn.Linear) -> None:
    """0 / 0, where a mask has left an example nothing."""
    mask = torch.ones(10, 4, dtype=F64)
    mask[5] = 0
    finding = born((layer(X) * mask).sum(1) / mask.sum(1), layer)
    assert finding.where.endswith(": div")
    assert "1 entries of its divisor are 0" in finding.evidence


def test_nothing_is_said_of_finite_nets(layer: nn.Linear) -> None:
    assert not rg.diagnose(layer(X).clamp(min=-700, max=700).exp().log().sum(1), layer).of("not finite")
