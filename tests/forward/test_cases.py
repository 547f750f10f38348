"""The law of jvp on the table of cases: J v by the rows, or a refusal that tells what has no forward derivative."""

from __future__ import annotations

import pytest
import torch
from tests.cases import CASES
from tests.reference import flat, rows_by_grad

import rowgrad as rg
from rowgrad.errors import ForwardModeError, OpaqueGraphError

# What PyTorch cannot carry tangents through, and what the refusal names
REFUSED: dict[str, tuple[type[Exception], str]] = {
    "embedding bag, max": (ForwardModeError, "_embedding_bag"),
    "embedding bag of ragged bags, max": (ForwardModeError, "_embedding_bag"),
    "experts in a grouped product": (ForwardModeError, "_grouped_mm"),
    "losses of several kinds": (ForwardModeError, "multi_margin_loss"),
    "connectionist temporal classification": (ForwardModeError, "_ctc_loss"),
    "inner step of meta-learning, one for each example": (ForwardModeError, "takes gradients with respect to"),
    "inner step of meta-learning on the batch": (ForwardModeError, "takes gradients with respect to"),
    "spatial transformer": (ForwardModeError, "grid_sampler_2d"),
    "custom function": (ForwardModeError, "jvp function for custom autograd.Function"),
    "custom function with two outputs, one read": (ForwardModeError, "jvp function for custom autograd.Function"),
    "custom function with a parameter": (OpaqueGraphError, "W is used where no dual number"),
    "custom function that mixes examples": (ForwardModeError, "jvp function for custom autograd.Function"),
    "weight quantized by fake quantization": (ForwardModeError, "fake_quantize"),
    "sparse data times a weight": (ForwardModeError, "_sparse_addmm"),
    "distances to learned centers": (ForwardModeError, "_cdist_forward"),
}


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_the_rows_times_the_direction(name: str) -> None:
    case = CASES[name]
    setup = case.build()
    rows = rows_by_grad(setup.losses(), setup.params)
    v = {name: torch.randn(r.shape[1:], dtype=r.dtype) for name, r in rows.items()}
    if name in REFUSED:
        kind, named = REFUSED[name]
        with pytest.raises(kind, match=rf"{named}(.|\n)*Use rowgrad.jacobian\(losses, params\)\.dot"):
            rg.jvp(setup.losses, setup.params, v)
        return
    expected_losses = setup.losses().detach()
    losses, derivatives = rg.jvp(setup.losses, setup.params, v)
    A, u = flat(rows), torch.cat([t.double().flatten() for t in v.values()])
    assert not derivatives.requires_grad
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected_losses, rtol=max(case.rtol, 1e-12), atol=1e-12)
    errors = (derivatives.double() - A @ u).abs() / (A.norm(dim=1) * u.norm()).clamp(min=1e-300)
    assert float(errors.max()) < case.rtol
