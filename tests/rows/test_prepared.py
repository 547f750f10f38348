"""Norms of rows from cotangents that a sweep of the graph found, without an engine pass."""

from __future__ import annotations

import pytest
import torch
from tests.cases import CASES

import rowgrad as rg
from rowgrad.errors import NotAVectorError
from rowgrad.rows.build import Prepared


@pytest.mark.parametrize("name", CASES)
def test_the_norms_are_those_of_the_rows(name: str, leaves_nothing_behind) -> None:
    setup = CASES[name].build()
    losses = setup.losses()
    with leaves_nothing_behind(setup.model, losses):
        prepared = Prepared(losses, setup.params, 1 / len(losses))
        if prepared.edges is None:
            return
        seed = torch.full_like(losses.detach(), 1 / len(losses))
        flow = rg.Graph(losses, setup.params).backward({losses: seed})
        found = prepared.norms({e: flow.cotangents.get(e) for e in prepared.edges})
    rtol = 1e-10 if losses.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, rg.grad_norms(losses, setup.params, retain_graph=True), rtol=rtol, atol=1e-13)


def test_most_models_of_the_table_have_cheap_norms() -> None:
    cheap = []
    for case in CASES.values():
        setup = case.build()
        cheap.append(Prepared(setup.losses(), setup.params).edges is not None)
    assert sum(cheap) > 0.75 * len(cheap)


def test_where_examples_meet() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    x = torch.randn(5, 3)
    losses = model(x).squeeze(1)
    (node,) = Prepared(losses, model).meeting
    assert rg.Graph(losses, model).vertices[node].op == "native_batch_norm"
    assert Prepared(model.eval()(x).squeeze(1), model).meeting == ()


def test_a_scalar_is_refused() -> None:
    model = torch.nn.Linear(3, 1)
    with pytest.raises(NotAVectorError, match="losses is a scalar"):
        Prepared(model(torch.ones(2, 3)).mean(), model)
