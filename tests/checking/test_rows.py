"""check_rows finds what is wrong with rows, and nothing where nothing is."""

from __future__ import annotations

import json
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from tests.cases import CASES
from tests.leftovers import nothing_left_behind
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rowgrad as rg
from rowgrad.checking.report import Report
from rowgrad.checking.rows import RowFinding
from rowgrad.rows.factors import Dense, Outer
from rowgrad.rows.site import Recipe, Site

slow_is_fine = pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")


def net(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).to(dtype)
    return model, torch.randn(5, 4, dtype=dtype)


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(len(x)) % 3, reduction="none")


# What is right passes


@slow_is_fine
@pytest.mark.parametrize("name", CASES)
def test_right_rows_pass(name: str) -> None:
    setup = CASES[name].build()
    report = rg.check_rows(setup.losses, setup.model)
    assert report.ok, str(report)
    assert [f.parameter for f in report.findings] == list(setup.params)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_right_rows_pass_in_every_dtype(dtype: torch.dtype) -> None:
    model, x = net(dtype)
    x = torch.randn(64, 4, dtype=dtype)
    report = rg.check_rows(lambda: losses_of(model, x), model)
    assert report.ok, str(report)


def test_the_tolerance_is_that_of_the_narrowest_numbers_in_the_graph() -> None:
    model, x = net(torch.float32)

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses_of(model, x)

    report = rg.check_rows(closure, model)
    assert report.ok, str(report)
    assert report.allowed == "relative errors up to 5e-02 allowed"
    assert "5e-01" in rg.check_rows(lambda: losses_of(model, x), model, rtol=0.5).allowed


@slow_is_fine
def test_examples_that_meet_pass_too() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    report = rg.check_rows(lambda: model(x).squeeze(1), model)
    assert report.ok, str(report)
    assert "general path" in str(report)


def test_checkpointed_layers_pass() -> None:
    model, x = net()
    report = rg.check_rows(lambda: losses_of(lambda h: checkpoint(model, h, use_reentrant=False), x), model)
    assert report.ok, str(report)


@pytest.mark.parametrize("n", [0, 1])
def test_small_batches_pass(n: int) -> None:
    model, x = net()
    assert rg.check_rows(lambda: model(x[:n]).square().sum(1), model).ok


def test_examples_can_be_chosen() -> None:
    model, x = net()
    report = rg.check_rows(lambda: losses_of(model, x), model, examples=[3, -1])
    assert report.ok
    assert {f.example for f in report.findings} <= {3, 4}
    assert "2 of 5 rows" in str(report)


def test_works_where_gradients_are_off() -> None:
    model, x = net()
    with torch.no_grad():
        assert rg.check_rows(lambda: losses_of(model, x), model).ok


# What is wrong is found


def wrong_bias(site: Site) -> Recipe | None:
    """A thousandth too large."""
    right = rg.RULES["AddmmBackward0", 0](site)
    assert right is not None
    return Recipe(lambda *given: Dense(1.001 * right.build(*given).dense()), "wrong", right.saved)


def wrong_weight(site: Site) -> Recipe | None:
    """Right rows, each given to another example."""
    right = rg.RULES["AddmmBackward0", 2](site)
    assert right is not None

    def build(*given):
        form = right.build(*given)
        assert isinstance(form, Outer)
        return form.select(torch.arange(form.n_examples).flip(0))

    return Recipe(build, "wrong", right.saved)


@pytest.mark.parametrize(("slot", "rule", "name"), [(0, wrong_bias, "0.bias"), (2, wrong_weight, "0.weight")])
def test_a_planted_wrong_rule_is_caught_and_named(slot: int, rule, name: str) -> None:
    model, x = net()
    report = rg.check_rows(lambda: losses_of(model, x), model, rules=rg.RULES | {("AddmmBackward0", slot): rule})
    assert not report.ok
    failed = {f.parameter: f.how for f in report.findings if not f.ok}
    assert set(failed) == {name, name.replace("0", "4")}
    assert all("AddmmBackward0" in how and "wrong" in how for how in failed.values())
    assert f"FAILED  {name}" in str(report)
    assert not any("hook" in note for note in report.notes)


def test_rows_given_to_the_wrong_examples_are_caught_by_the_backward_pass_alone() -> None:
    """The sum of the rows is right."""
    model, x = net()
    rules = rg.RULES | {("AddmmBackward0", 2): wrong_weight}
    report = rg.check_rows(lambda: losses_of(model, x), model, rules=rules, examples=[])
    assert any("0.weight" in note and "J^T u" in note for note in report.notes)
    assert not report.ok


def hooked(model: nn.Sequential, x: Tensor, at: int, hook: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """The forward pass with a tensor hook on the output of one layer."""

    def closure() -> Tensor:
        h = x
        for i, layer in enumerate(model):
            h = layer(h)
            if i == at:
                h.register_hook(hook)
        return F.cross_entropy(h, torch.arange(len(x)) % 3, reduction="none")

    return closure


KINDS = ["AddmmBackward0", "NativeLayerNormBackward0", "TanhBackward0", "MulBackward0", "AddmmBackward0"]


@slow_is_fine
@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("hook", [lambda g: 2 * g, lambda g: g.clamp(-1e-3, 1e-3)], ids=["scaled", "clamped"])
def test_a_hook_that_changes_gradients_is_caught_and_its_place_named(at: int, hook) -> None:
    model, x = net()
    report = rg.check_rows(hooked(model, x, at, hook), model)
    assert not report.ok
    (note,) = report.notes
    assert "hook at an output of " + KINDS[at] in note


def test_a_hook_that_only_looks_is_none_of_our_business() -> None:
    model, x = net()
    seen = []
    assert rg.check_rows(hooked(model, x, 1, lambda g: seen.append(g.shape)), model).ok
    assert seen
    handle = model[4].register_full_backward_hook(lambda module, into, out: None)
    assert rg.check_rows(lambda: losses_of(model, x), model).ok
    handle.remove()


def test_a_hook_on_a_module_that_changes_gradients_is_caught() -> None:
    model, x = net()
    handle = model[4].register_full_backward_hook(lambda module, into, out: (into[0] / 2,))
    report = rg.check_rows(lambda: losses_of(model, x), model)
    assert "module hook" in report.notes[0]
    handle.remove()


# What cannot be compared is refused


def test_a_closure_is_needed() -> None:
    model, x = net()
    with pytest.raises(TypeError, match=r"closure is a Tensor, expected a function.* `lambda: losses_of\(batch\)`"):
        rg.check_rows(losses_of(model, x), model)  # type: ignore[arg-type]


def test_examples_are_among_the_losses() -> None:
    model, x = net()
    with pytest.raises(IndexError, match="5 is not among the 5 losses"):
        rg.check_rows(lambda: losses_of(model, x), model, examples=[0, 5])


def test_what_is_not_finite_is_refused_by_example() -> None:
    model, x = net()
    x[2] = float("nan")
    with pytest.raises(rg.RowgradError, match=r"1 of 5 examples is not finite \(first: example 2"):
        rg.check_rows(lambda: losses_of(model, x), model)


def test_scalar_losses_are_refused() -> None:
    model, x = net()
    with pytest.raises(rg.RowgradError, match='reduction="none"'):
        rg.check_rows(lambda: losses_of(model, x).mean(), model)


# What is left


def test_nothing_is_left_behind() -> None:
    model, x = net()
    calls = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    losses = losses_of(model, x)
    with nothing_left_behind(model):
        assert rg.check_rows(lambda: losses, model).ok
    assert not calls


def test_the_closure_is_called_once() -> None:
    """What it draws (here dropout) is drawn once, and nothing else is."""
    model, x = net()
    torch.manual_seed(1)
    losses_of(model, x)
    once = torch.get_rng_state()
    torch.manual_seed(1)
    rg.check_rows(lambda: losses_of(model, x), model)
    assert torch.equal(torch.get_rng_state(), once)


# The report


REPORT = Report(
    "2 of 2 rows, one backward pass each",
    "relative errors up to 1e-07 allowed",
    ("parameter", "worst error", "example", "how"),
    (RowFinding("a.weight", 1e-12, 1, "Mm#1 <x>", True), RowFinding("b", float("inf"), 0, "Add#2", False)),
    ("FAILED b: a note",),
    ("a remark",),
)


def test_a_report_is_a_table() -> None:
    assert str(REPORT).splitlines() == [
        "2 of 2 rows, one backward pass each: FAILED, relative errors up to 1e-07 allowed",
        "        parameter  worst error  example  how",
        "ok      a.weight   1.0e-12      1        Mm#1 <x>",
        "FAILED  b          inf          0        Add#2",
        "FAILED b: a note",
        "a remark",
    ]


def test_a_report_in_plain_values() -> None:
    plain = json.loads(json.dumps(REPORT.to_dict(), allow_nan=False))
    assert (plain["ok"], plain["notes"], plain["remarks"]) == (False, ["FAILED b: a note"], ["a remark"])
    assert [f["error"] for f in plain["findings"]] == [1e-12, "inf"]


def test_a_report_as_html() -> None:
    page = ElementTree.fromstring(f"<div>{REPORT.to_html()}</div>")
    assert [cell.text for cell in page.iter("td")][1:5] == ["a.weight", "1.0e-12", "1", "Mm#1 <x>"]
    assert [p.text for p in page.iter("p")][1] == "FAILED b: a note"
