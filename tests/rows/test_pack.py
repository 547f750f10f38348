"""Rows of small parameters side by side: the same products, whatever is asked together or apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import StaleJacobianError
from rowgrad.rows.pack import FEWEST, SMALL

B = 5


def scales_and_shifts(n_layers: int = 3, width: int = 6) -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(n_layers) for layer in (nn.Linear(width, width), nn.LayerNorm(width))))


def losses_of(model: nn.Module, width: int = 6) -> Tensor:
    """(B,), several positions an example."""
    x = torch.randn(B, 3, width, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).dtype)
    return model(x).pow(3).sum((1, 2))


def packed_names(J: rg.Jacobian) -> list[str]:
    pack, _ = J._live().packed(J.names)
    return [] if pack is None else list(pack.shapes)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(1)
    return scales_and_shifts().double()


@pytest.fixture
def rows(model: nn.Sequential) -> dict[str, Tensor]:
    """By autograd, one example at a time."""
    losses, names = losses_of(model), [n for n, _ in model.named_parameters()]
    found = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    return {n: torch.stack(parts) for n, parts in zip(names, zip(*found, strict=True), strict=True)}


def test_biases_scales_and_shifts_are_packed_and_matrices_are_not(model: nn.Sequential) -> None:
    J = rg.jacobian(losses_of(model), model)
    assert packed_names(J) == [n for n, p in model.named_parameters() if p.ndim == 1]


def test_rows_that_are_large_or_few_are_not_packed() -> None:
    width = SMALL // B + 1
    large = nn.Sequential(*(nn.LayerNorm(width) for _ in range(FEWEST)))
    assert packed_names(rg.jacobian(losses_of(large, width), large)) == []
    few = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6))
    assert sum(p.ndim == 1 for p in few.parameters()) == FEWEST - 1
    assert packed_names(rg.jacobian(losses_of(few), few)) == []


def test_products_are_those_of_the_rows(model: nn.Sequential, rows: dict[str, Tensor]) -> None:
    J = rg.jacobian(losses_of(model), model)
    assert packed_names(J)
    flat = torch.cat([r.flatten(1) for r in rows.values()], 1)
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    c = torch.randn(B, dtype=torch.float64)
    torch.testing.assert_close(J.norms(), flat.norm(dim=1))
    torch.testing.assert_close(J.gram(), flat @ flat.T)
    torch.testing.assert_close(J @ v, flat @ torch.cat([t.flatten() for t in v.values()]))
    torch.testing.assert_close(J.weighted_sum(c), {n: torch.tensordot(c, r, 1) for n, r in rows.items()})
    torch.testing.assert_close(rg.grad_norms(losses_of(model), model), flat.norm(dim=1))


def test_what_cuts_through_the_pack_is_asked_one_by_one(model: nn.Sequential, rows: dict[str, Tensor]) -> None:
    J = rg.jacobian(losses_of(model), model)
    first, *others = packed_names(J)
    c = {n: torch.randn(B, dtype=torch.float64) for n in J.names}
    torch.testing.assert_close(J.weighted_sum(c), {n: torch.tensordot(c[n], r, 1) for n, r in rows.items()})
    c = torch.randn(B, dtype=torch.float64)
    torch.testing.assert_close(J.weighted_sum({"": c}), J.weighted_sum(c))
    v = {n: torch.randn_like(model.get_parameter(n)) for n in others}
    torch.testing.assert_close(J @ v, sum(rows[n].flatten(1) @ v[n].flatten() for n in others))
    norms = rg.grad_norms(losses_of(model), model, by="parameter")
    torch.testing.assert_close(norms, {n: r.flatten(1).norm(dim=1) for n, r in rows.items()})
    torch.testing.assert_close(norms, J.norms(by="parameter"))
    torch.testing.assert_close(J[others].norms(), torch.cat([rows[n].flatten(1) for n in others], 1).norm(dim=1))
    assert first not in J[others].names


def test_gram_of_two_jacobians_pairs_equal_parameters(model: nn.Sequential, rows: dict[str, Tensor]) -> None:
    J, flat = rg.jacobian(losses_of(model), model), torch.cat([r.flatten(1) for r in rows.values()], 1)
    torch.testing.assert_close(J.gram(J[[0, 2]]), flat @ flat[[0, 2]].T)


def test_gradients_handed_out_share_no_memory(model: nn.Sequential) -> None:
    J = rg.jacobian(losses_of(model), model)
    assert packed_names(J)
    J.backward(1.0)
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.untyped_storage().nbytes() == p.numel() * p.element_size()


@pytest.mark.parametrize(
    ("one", "n_packed"),
    [pytest.param(torch.bfloat16, 15, id="summed in one"), pytest.param(torch.float64, 9, id="two")],
)
def test_dtypes_are_kept(one: torch.dtype, n_packed: int) -> None:
    """Half precision is summed in float32 and packed with it; of two dtypes the one of more parameters is packed."""
    parts = scales_and_shifts(2).to(one), scales_and_shifts(3)
    model = nn.ModuleDict({"first": parts[0], "second": parts[1]})
    losses = losses_of(parts[0]).double() + losses_of(parts[1])
    J = rg.jacobian(losses, model)
    assert len(packed_names(J)) == n_packed
    found = J.weighted_sum(1.0)
    assert {n: g.dtype for n, g in found.items()} == {n: p.dtype for n, p in model.named_parameters()}
    torch.testing.assert_close(J.norms().double(), J.dense().double().norm(dim=1))


def test_one_parameter_changed_is_noticed_where_all_are_packed() -> None:
    model = nn.Sequential(*(nn.LayerNorm(6) for _ in range(FEWEST)))
    J = rg.jacobian(losses_of(model), model)
    assert packed_names(J) == list(J.names)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(StaleJacobianError, match="was changed"):
        J.norms()


def test_norms_outlive_the_factors_whichever_were_asked_before(model: nn.Sequential, rows: dict[str, Tensor]) -> None:
    apart = {n: r.flatten(1).square().sum(1) for n, r in rows.items()}
    for by in (None, "parameter"):
        J = rg.jacobian(losses_of(model), model)
        J.sq_norms(by=by)
        J.backward(1.0)
        torch.testing.assert_close(J.sq_norms(), sum(apart.values()))
        torch.testing.assert_close(J.sq_norms(by="parameter"), apart)


def test_small_parts_of_something_large_are_not_held() -> None:
    """The cotangents of tokens set before a sequence are a part of those of the whole sequence."""
    d, tokens = 4, nn.ParameterList(nn.Parameter(torch.randn(1, 1, 4)) for _ in range(FEWEST))
    x = torch.randn(B, SMALL // d, d)
    losses = torch.cat([*(t.expand(B, 1, d) for t in tokens), x], 1).pow(2).sum((1, 2))
    J = rg.jacobian(losses, tokens)
    assert packed_names(J) == []
    torch.testing.assert_close(J.norms(), J.dense().norm(dim=1))


def test_norms_by_parameter_have_the_parameters_dtype_however_they_are_asked() -> None:
    """Scales in single precision on activations in double precision."""
    scales = {str(i): nn.Parameter(torch.randn(6)) for i in range(FEWEST)}
    x = torch.randn(B, 3, 6, dtype=torch.float64)

    def losses() -> Tensor:
        return torch.stack([(x * scale).sin().sum((1, 2)) for scale in scales.values()]).sum(0)

    streamed = rg.grad_norms(losses(), scales, by="parameter")
    J = rg.jacobian(losses(), scales)
    J.norms()
    for found in (streamed, J.norms(by="parameter"), rg.jacobian(losses(), scales).norms(by="parameter")):
        assert {t.dtype for t in found.values()} == {torch.float32}
        torch.testing.assert_close(found, streamed)
