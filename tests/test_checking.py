"""check_rows finds what is wrong with rows, and nothing where nothing is."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.rows.factors import Dense, Outer
from rowgrad.rows.site import Recipe, Site
from tests.leftovers import nothing_left_behind


def net(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).to(dtype)
    return model, torch.randn(5, 4, dtype=dtype)


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(len(x)) % 3, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_right_rows_pass(dtype: torch.dtype) -> None:
    model, x = net(dtype)
    report = rg.check_rows(lambda: losses_of(model, x), model)
    assert report.ok, str(report)
    assert [f.parameter for f in report.findings] == [name for name, _ in model.named_parameters()]
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True
    assert "0.weight" in str(report)


def test_examples_can_be_chosen() -> None:
    model, x = net()
    report = rg.check_rows(lambda: losses_of(model, x), model, examples=[3])
    assert report.ok
    assert {f.example for f in report.findings} <= {0, 3}


def test_mixing_examples_pass_too() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rg.RowgradWarning)
        assert rg.check_rows(lambda: model(x).squeeze(1), model).ok


def wrong_bias(site: Site) -> Recipe | None:
    right = rg.RULES["AddmmBackward0", 0](site)
    assert right is not None
    return Recipe(lambda cotangents: Dense(1.001 * right.build(cotangents).dense()), "wrong")


def wrong_weight(site: Site) -> Recipe | None:
    right = rg.RULES["AddmmBackward0", 2](site)
    assert right is not None

    def build(cotangents):
        form = right.build(cotangents)
        assert isinstance(form, Outer)
        return form.select(torch.arange(form.n_examples).flip(0))  # rows of the wrong examples

    return Recipe(build, "wrong")


@pytest.mark.parametrize(("slot", "rule", "name"), [(0, wrong_bias, "0.bias"), (2, wrong_weight, "0.weight")])
def test_a_planted_wrong_rule_is_caught_and_named(slot: int, rule, name: str) -> None:
    model, x = net()
    report = rg.check_rows(lambda: losses_of(model, x), model, rules=rg.RULES | {("AddmmBackward0", slot): rule})
    assert not report.ok
    failed = {f.parameter: f.how for f in report.findings if not f.ok}
    assert name in failed
    assert "AddmmBackward0" in failed[name]
    assert "wrong" in failed[name]
    assert "FAILED" in str(report)
    assert all("AddmmBackward0" in how for how in failed.values())


def test_rows_summed_right_but_given_to_the_wrong_examples_are_caught_by_the_backward_pass_alone() -> None:
    model, x = net()
    rules = rg.RULES | {("AddmmBackward0", 2): wrong_weight}
    report = rg.check_rows(lambda: losses_of(model, x), model, rules=rules, examples=[])
    assert any("0.weight" in note for note in report.notes)
    assert not report.ok


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
def test_a_hook_that_bends_gradients_on_their_way_is_noticed() -> None:
    """A clamp of the batch's gradient is no derivative of any one loss."""
    model = nn.Linear(4, 3).double()
    x = 10 * torch.randn(5, 4, dtype=torch.float64)

    def closure() -> Tensor:
        h = model(x)
        h.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        return h.square().sum(1)

    report = rg.check_rows(closure, model)
    assert not report.ok
    assert any("tensor hook" in note for note in report.notes)


def test_nothing_is_left_behind() -> None:
    model, x = net()
    losses = losses_of(model, x)
    with nothing_left_behind(model):
        rg.check_rows(lambda: losses, model)
