"""Every route to the same numbers: Gram products or formed ones, in one piece or in many, kept or made anew."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from tests.cases import CASES
from tests.reference import assert_rows_close, assert_scaled_close, flat, rows_by_grad
from torch import nn

import rowgrad as rg
from rowgrad.rows import factors
from rowgrad.rows.factors import Outer

Patch = pytest.MonkeyPatch


def _in_pieces(patch: Patch) -> None:
    patch.setattr(factors, "CHUNK_BYTES", 1)
    patch.setattr(factors, "KEEP_BYTES", 0)


def _always_by_gram(patch: Patch) -> None:
    patch.setattr(Outer, "prefers_gram", True)
    patch.setattr(factors, "CANCELLATION", 0.0)


def _always_by_gram_in_pieces(patch: Patch) -> None:
    _always_by_gram(patch)
    _in_pieces(patch)


def _always_formed(patch: Patch) -> None:
    patch.setattr(Outer, "prefers_gram", False)


ROUTES: dict[str, Callable[[Patch], None]] = {
    "in pieces": _in_pieces,
    "by Gram": _always_by_gram,
    "by Gram, in pieces": _always_by_gram_in_pieces,
    "formed": _always_formed,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.fast and c.dtype == torch.float64])
def test_routes_agree(name: str, route: str, monkeypatch: Patch) -> None:
    ROUTES[route](monkeypatch)
    setup = CASES[name].build()
    losses = setup.losses()
    rows = rows_by_grad(losses, setup.params)
    A = flat(rows)
    norms = A.norm(dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rg.RowgradWarning)
        J = rg.jacobian(losses, setup.model, retain_graph=True)
        streamed = rg.grad_norms(losses, setup.model, by="parameter")
    assert_scaled_close(J.sq_norms(), norms.square(), norms.square())
    for p, found in streamed.items():
        expected = flat({p: rows[p]}).square().sum(1)
        assert_scaled_close(found.square(), expected, norms.square())
    assert_scaled_close(J.gram(), A @ A.T, torch.outer(norms, norms))
    v = {p: torch.randn_like(t) for p, t in setup.params.items()}
    u = torch.cat([t.flatten() for t in v.values()])
    assert_scaled_close(J @ v, A @ u, norms * u.norm())
    c = torch.linspace(-1, 1, len(norms), dtype=torch.float64)
    for p, found in J.weighted_sum(c).items():
        total = torch.einsum("b,b...->...", c, rows[p])
        assert_scaled_close(found.to_dense() if found.is_sparse else found, total, norms.sum())
    assert_rows_close(J.dense(as_dict=True), rows)
    assert_scaled_close(J.diag_gram(J), norms.square(), norms.square())


@pytest.mark.parametrize("by", ["norms", "gram", "diag_gram", "grad_norms"])
def test_positions_that_cancel_keep_their_digits(by: str) -> None:
    """Contributions of two positions cancel to 1e-7: a Gram route would keep two digits of the square."""
    layer = nn.Linear(40, 30, bias=False).double()
    h = torch.randn(3, 1, 40, dtype=torch.float64)
    x = torch.cat([h, -h * (1 - 1e-7)], 1)
    losses = layer(x).sum((1, 2))
    A = flat(rows_by_grad(losses, {"weight": layer.weight}))
    norms = A.norm(dim=1)
    if by == "grad_norms":
        assert_scaled_close(rg.grad_norms(losses, layer), norms, norms, 1e-8)
        return
    J = rg.jacobian(losses, layer)
    if by == "norms":
        assert_scaled_close(J.norms(), norms, norms, 1e-8)
    elif by == "gram":
        assert_scaled_close(J.gram(), A @ A.T, torch.outer(norms, norms), 1e-8)
    else:
        assert_scaled_close(J.diag_gram(J[[0, 1, 2]]), norms.square(), norms.square(), 1e-8)


@pytest.mark.parametrize("by", ["norms", "grad_norms"])
def test_uses_that_cancel_keep_their_digits(by: str) -> None:
    """One layer on two inputs that are almost the same, subtracted."""
    layer = nn.Linear(40, 30).double()
    x = torch.randn(3, 40, dtype=torch.float64)
    losses = (layer(x).sin() - layer(x * (1 + 1e-7)).sin()).sum(1)
    norms = flat(rows_by_grad(losses, dict(layer.named_parameters()))).norm(dim=1)
    found = rg.grad_norms(losses, layer) if by == "grad_norms" else rg.jacobian(losses, layer).norms()
    assert_scaled_close(found, norms, norms, 1e-8)


def test_norms_of_very_small_and_very_large_rows_in_single_precision() -> None:
    """Rows of norm 1e-15 and 1e+15 in one batch: squares of 1e-30 and 1e+30, still within float32."""
    layer = nn.Linear(6, 4)
    scale = torch.tensor([1e-15, 1.0, 1e15])
    losses = layer(torch.randn(3, 6)).square().sum(1) * scale
    norms = flat(rows_by_grad(losses, dict(layer.named_parameters()))).norm(dim=1)
    assert_scaled_close(rg.jacobian(losses, layer, retain_graph=True).norms(), norms, norms, 1e-4)
    assert_scaled_close(rg.grad_norms(losses, layer), norms, norms, 1e-4)
