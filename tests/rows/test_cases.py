"""The table of cases and the references themselves: what the laws stand on."""

from __future__ import annotations

import pytest
import torch
from tests.cases import CASES
from tests.reference import assert_rows_close, flat, relative_errors, rows_by_grad, rows_by_loop
from torch import nn


@pytest.mark.parametrize("name", CASES)
def test_a_case_gives_the_same_finite_losses_each_time(name: str) -> None:
    setup = CASES[name].build()
    losses = setup.losses()
    assert losses.ndim == 1
    assert losses.requires_grad
    assert losses.isfinite().all()
    assert torch.equal(losses, setup.losses())


@pytest.mark.parametrize("name", CASES)
def test_two_seeds_give_the_same_names_and_other_values(name: str) -> None:
    one, two = (CASES[name].build(seed) for seed in (0, 1))
    assert list(one.params) == list(two.params)
    assert not torch.equal(one.losses(), two.losses())


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.independent and c.deterministic])
def test_the_two_references_agree_where_examples_are_independent(name: str) -> None:
    case = CASES[name]
    setup = case.build()
    by_loop = rows_by_loop(setup.model, setup.batch, setup.loss_fn)
    assert_rows_close(by_loop, rows_by_grad(setup.losses(), setup.params), case.rtol)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if "coupled" in c.tags and "attack" not in c.tags])
def test_a_row_changes_with_its_company_where_examples_are_coupled(name: str) -> None:
    setup = CASES[name].build()
    pair = setup.take([0, 1])
    together, with_one = (flat(rows_by_grad(s.losses(), s.params))[:1] for s in (setup, pair))
    assert float(relative_errors(with_one, together)) > 1e-3


def test_the_reference_on_a_model_whose_gradient_is_known() -> None:
    """d(w x)^2/dw = 2 w x^2."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    x = torch.tensor([[1.0], [2.0], [0.0]], dtype=torch.float64)
    rows = rows_by_grad(model(x).squeeze(1).square(), dict(model.named_parameters()))
    w = model.weight.item()
    assert_rows_close(rows, {"weight": torch.tensor([2 * w, 8 * w, 0.0], dtype=torch.float64).reshape(3, 1, 1)})


def test_each_row_is_judged_by_its_own_norm() -> None:
    expected = torch.tensor([[1e6, 0.0], [1e-6, 0.0], [0.0, 0.0]])
    assert relative_errors(expected, expected).tolist() == [0, 0, 0]
    found = expected + torch.tensor([[0.0, 1e-3], [0.0, 1e-3], [0.0, 1e-12]])
    errors = relative_errors(found, expected)
    assert errors[:2].tolist() == pytest.approx([1e-9, 1e3], rel=1e-4)
    assert errors[2] == float("inf")
    with pytest.raises(AssertionError, match="row 2 is off"):
        assert_rows_close(found, expected)


def test_rows_that_are_not_finite_must_be_so_in_both() -> None:
    one = torch.tensor([[1.0, float("nan")]])
    assert_rows_close(one, one)
    with pytest.raises(AssertionError, match="finite in one"):
        assert_rows_close(torch.ones(1, 2), one)
