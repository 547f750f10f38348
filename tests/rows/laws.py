"""All products of the rows of one graph, held against gradients taken one loss at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from tests.reference import assert_rows_close, assert_scaled_close, flat, rows_by_grad
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.rows.build import condensed_jacobian
from rowgrad.tape import Tape

Params = Mapping[str, Tensor]


def energy(out: Tensor) -> Tensor:
    """(B, ...) -> (B,), with a gradient that no symmetry makes simple."""
    return (out.reshape(len(out), -1).sin() - 0.3).square().sum(1)


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def counted_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each engine pass taken from now on."""
    taken: list[int] = []
    original = Tape.cotangents

    def counted(self: Tape, edges: list, *args: Any, **options: Any) -> list[Tensor | None]:
        taken.extend([1] if edges else [])
        return original(self, edges, *args, **options)

    monkeypatch.setattr(Tape, "cotangents", counted)
    return taken


def assert_laws(
    losses: Tensor, params: Params, *, rtol: float = 1e-10, rows: Params | None = None, ruled: bool = True
) -> rg.Jacobian:
    """Dense rows, norms, weighted sum, direction and Gram matrix against `rows` (default: by autograd, loss by loss).

    `ruled`: every use takes a rule and nothing warns. The general path, forced, must agree as well.
    """
    rows = rows_by_grad(losses, params) if rows is None else rows
    with warnings.catch_warnings():
        warnings.simplefilter("error" if ruled else "ignore", rg.RowgradWarning)
        J = rg.jacobian(losses, params, retain_graph=True)
    if ruled and len(losses) > 1:
        assert J.explain().slow_uses() == []
    assert_products(J, rows, rtol)
    if ruled:
        assert_products(condensed_jacobian(losses, params, retain_graph=True), rows, rtol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rg.RowgradWarning)
        assert_rows_close(rg.grad_rows(losses, params, retain_graph=True), rows, rtol)
        assert_products(rg.jacobian(losses, params, rules={}, retain_graph=True), rows, rtol)
    return J


def assert_products(J: rg.Jacobian, rows: Params, rtol: float) -> None:
    A = flat(rows)
    norms = A.norm(dim=1)
    assert_scaled_close(J.norms(), norms, norms, rtol)
    assert_scaled_close(J.gram(), A @ A.T, torch.outer(norms, norms), rtol)
    c = torch.linspace(-1, 2, len(A), dtype=torch.float64)
    summed = torch.cat([t.to_dense().double().flatten() for t in J.weighted_sum(c).values()])
    assert_scaled_close(summed, c @ A, norms.sum().expand_as(summed), rtol)
    v = {name: torch.randn(r.shape[1:], dtype=r.dtype) for name, r in rows.items()}
    u = torch.cat([t.double().flatten() for t in v.values()])
    assert_scaled_close(J @ v, A @ u, norms * u.norm(), rtol)
    assert_rows_close(J.dense(), A, rtol)


def rows_in_double(module: nn.Module, losses_of: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Rows of the same module with every parameter in float64; `losses_of` follows the parameters' dtype."""
    twin = deepcopy(module).double()
    return rows_by_grad(losses_of(twin), trained(twin))
