"""Uses of one parameter that all but cancel: products of the uses alone would be left with rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.reference import assert_scaled_close, flat, rows_by_grad
from tests.rows.sizes import Largest
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.rows import block

B, V, D = 5, 6, 20


def looked_up_and_multiplied(E: Tensor, x: Tensor, gap: Tensor) -> Tensor:
    ids = torch.arange(B)
    return (E[ids] * x).sum(1) - ((x + gap) @ E.T)[ids, ids]


def added_and_multiplied(E: Tensor, x: Tensor, gap: Tensor) -> Tensor:
    ids = torch.arange(B)
    return (E * x.unsqueeze(1)).sum(2)[ids, ids] - ((x + gap) @ E.T)[ids, ids]


def penalized(E: Tensor, x: Tensor, gap: Tensor) -> Tensor:
    """Close to where a linear model with weight decay is at rest."""
    row = E.detach()
    return 0.5 * E.square().sum() - ((row + gap.unsqueeze(1) * torch.ones_like(row)) * E).sum((1, 2))


USES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "lookup and product": looked_up_and_multiplied,
    "rows and product": added_and_multiplied,
    "penalty and product": penalized,
}


def made(name: str, size: float, seed: int = 0) -> tuple[rg.Jacobian, Tensor]:
    """In float32, with the rows in float64; the first two examples cancel, the others do not."""
    generator = torch.Generator().manual_seed(seed)
    E, x, gap = (torch.randn(n, D, generator=generator) for n in (V, B, B))
    gap *= torch.tensor([size, size, 1.0, 1.0, 2.0]).unsqueeze(1)
    exact = nn.Parameter(E.double())
    rows = flat(rows_by_grad(USES[name](exact, x.double(), gap.double()), {"E": exact}))
    given = nn.Parameter(E)
    return rg.jacobian(USES[name](given, x, gap), {"E": given}), rows


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
@pytest.mark.parametrize("asked", ["norms", "gram"])
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("name", USES)
def test_the_digits_that_are_left_are_right(name: str, size: float, asked: str) -> None:
    """Rows are rounded where they are formed: relative to the uses, 1 / `size` of them are lost."""
    tolerance = max(3e-6 / size, 1e-4)  # the squared norms, of up to a thousandth of their terms
    J, A = made(name, size)
    other, C = made(name, size, seed=1)
    norms, others = A.norm(dim=1), C.norm(dim=1)
    if asked == "norms":
        assert_scaled_close(J.norms(), norms, norms, tolerance)
    assert_scaled_close(J.gram(), A @ A.T, torch.outer(norms, norms), tolerance)
    assert_scaled_close(J.gram(other), A @ C.T, torch.outer(norms, others), tolerance)
    assert_scaled_close(other.gram(J), C @ A.T, torch.outer(others, norms), tolerance)
    assert_scaled_close(J.diag_gram(other), (A * C).sum(1), norms * others, tolerance)
    assert_scaled_close(J[[1, 3]].norms(), norms[[1, 3]], norms[[1, 3]], tolerance)


def test_rows_that_cancel_are_written_out_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    J, A = made("lookup and product", 1e-3)
    monkeypatch.setattr(block, "CHUNK_BYTES", 1)
    norms = A.norm(dim=1)
    with Largest() as largest:
        assert_scaled_close(J.norms(), norms, norms, 1e-2)
    assert largest.bytes < 2 * V * D * 8
    assert_scaled_close(J.gram(), A @ A.T, torch.outer(norms, norms), 1e-2)


def test_each_row_of_a_normalized_loss_has_the_length_asked_for() -> None:
    E, x = nn.Parameter(torch.randn(V, D)), torch.randn(B, D)
    losses = looked_up_and_multiplied(E, x, 1e-4 * torch.randn(B, D))
    rg.clipped_loss(losses, {"E": E}, 1e-4, mode="normalize", reduction="sum").backward()
    torch.testing.assert_close(E.grad[:B].norm(dim=1), torch.full((B,), 1e-4), rtol=1e-2, atol=0)
