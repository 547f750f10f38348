"""The law of jvp on the table of cases: J v by the rows, with a warning where forward mode does not do."""

from __future__ import annotations

import warnings

import pytest
import torch
from tests.cases import CASES
from tests.reference import flat, rows_by_grad

import rowgrad as rg

# What PyTorch cannot carry tangents through, and what the warning names
BY_ROWS = {
    "embedding bag, max": "_embedding_bag",
    "embedding bag of ragged bags, max": "_embedding_bag",
    "experts in a grouped product": "_grouped_mm",
    "losses of several kinds": "multi_margin_loss",
    "connectionist temporal classification": "_ctc_loss",
    "inner step of meta-learning, one for each example": "does not require grad",
    "inner step of meta-learning on the batch": "does not require grad",
    "spatial transformer": "grid_sampler_2d",
    "custom function": "jvp function for custom autograd.Function",
    "custom function with two outputs, one read": "jvp function for custom autograd.Function",
    "custom function with a parameter": "not those of a backward pass",
    "custom function that mixes examples": "jvp function for custom autograd.Function",
    "weight quantized by fake quantization": "fake_quantize",
    "sparse data times a weight": "_sparse_addmm",
    "distances to learned centers": "_cdist_forward",
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("verify", ["cached", "always"])
def test_derivatives_are_the_rows_times_the_direction(name: str, verify: str) -> None:
    case = CASES[name]
    setup = case.build()
    rows, expected = rows_by_grad(setup.losses(), setup.params), setup.losses().detach()
    A = flat(rows)
    for call in range(3):
        v = {name: torch.randn(r.shape[1:], dtype=r.dtype) for name, r in rows.items()}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            losses, derivatives = rg.jvp(setup.losses, setup.params, v, verify=verify)
        forward = [str(w.message) for w in told if "rows of a second pass are used" in str(w.message)]
        assert len(forward) == (name in BY_ROWS and call == 0), forward
        assert not forward or BY_ROWS[name] in forward[0]
        assert not derivatives.requires_grad
        assert not losses.requires_grad
        torch.testing.assert_close(losses, expected, rtol=max(case.rtol, 1e-12), atol=1e-12)
        u = torch.cat([t.double().flatten() for t in v.values()])
        errors = (derivatives.double() - A @ u).abs() / (A.norm(dim=1) * u.norm()).clamp(min=1e-300)
        assert float(errors.max()) < case.rtol
