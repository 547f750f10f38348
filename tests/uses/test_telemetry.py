"""Statistics of a batch against a loop over its rows, and their laws."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import InputError
from rowgrad.uses.telemetry import batch_statistics


def rows_as_data(rows: Tensor) -> rg.Jacobian:
    """Rows of our choice: each example's gradient is its input."""
    model = nn.Linear(rows.shape[1], 1, bias=False, dtype=rows.dtype)
    return rg.jacobian(model(rows).squeeze(1), model)


def network() -> rg.Jacobian:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    return rg.jacobian(nn.functional.cross_entropy(model(x), y, reduction="none"), model)


def test_they_are_those_of_a_loop_over_the_rows() -> None:
    J = network()
    rows = J.dense()
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in combinations(rows, 2)]
    norms = rows.norm(dim=1)
    expected = {
        "gradient_diversity": float(norms.square().sum() / rows.sum(0).square().sum()),
        "mean_cosine": sum(cosines) / len(cosines),
        "share_conflicting": sum(c < 0 for c in cosines) / len(cosines),
        "norm_mean": float(norms.mean()),
        "norm_q25": float(norms.quantile(0.25)),
        "norm_q100": float(norms.max()),
        "share_nonfinite": 0.0,
    }
    assert 0 < expected["share_conflicting"] < 1
    found = batch_statistics(J, quantiles=(0.25, 1))
    assert found == pytest.approx(expected, rel=1e-12)
    assert list(found) == list(expected)
    assert all(type(value) is float for value in found.values())


def test_without_conflicts_no_gram_matrix_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    J = network()
    found = batch_statistics(J)
    monkeypatch.setattr(rg.Jacobian, "gram", None)
    assert batch_statistics(J, conflicts=False) == {k: v for k, v in found.items() if k != "share_conflicting"}


def test_permuting_changes_nothing_and_scaling_only_the_norms() -> None:
    rows = torch.randn(8, 5, dtype=torch.float64)
    plain, permuted, scaled = (batch_statistics(rows_as_data(r)) for r in (rows, rows.flip(0), 64 * rows))
    assert permuted == pytest.approx(plain, rel=1e-12)
    assert scaled == pytest.approx({k: 64 * v if k.startswith("norm_") else v for k, v in plain.items()}, rel=1e-12)


@pytest.mark.parametrize(
    ("rows", "diversity", "cosine", "conflicting"),
    [
        ([[1.0, 2.0]] * 4, 0.25, 1.0, 0.0),
        ([[2.0, 0.0], [0.0, 3.0]], 1.0, 0.0, 0.0),
        ([[2.0, 0.0], [-2.0, 0.0]], math.inf, -1.0, 1.0),
        ([[2.0, 0.0], [0.0, 0.0]], 1.0, math.nan, math.nan),
        ([[0.0, 0.0], [0.0, 0.0]], math.nan, math.nan, math.nan),
        ([[2.0, 0.0], [2.0, 0.0], [math.inf, 1.0]], 0.5, 1.0, 0.0),
    ],
    ids=["equal", "orthogonal", "opposed", "one row of 0", "rows of 0", "one row not finite"],
)
def test_edges(rows: list[list[float]], diversity: float, cosine: float, conflicting: float) -> None:
    found = batch_statistics(rows_as_data(torch.tensor(rows, dtype=torch.float64)))
    shown = [found[k] for k in ("gradient_diversity", "mean_cosine", "share_conflicting")]
    assert shown == pytest.approx([diversity, cosine, conflicting], nan_ok=True, abs=1e-15)
    assert found["share_nonfinite"] == pytest.approx(1 / 3 if len(rows) == 3 else 0)


def test_no_example_at_all() -> None:
    assert all(map(math.isnan, batch_statistics(rows_as_data(torch.ones(0, 2))).values()))


def test_a_quantile_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match="expected numbers from 0 to 1"):
        batch_statistics(network(), quantiles=(0.5, 95))
    with pytest.raises(InputError, match="expected numbers from 0 to 1"):
        batch_statistics(network(), quantiles=("0.5",))  # type: ignore[arg-type]


def test_what_are_no_rows_is_refused() -> None:
    with pytest.raises(InputError, match=r"given a tensor of float32 .* expected rowgrad.jacobian\(losses, model\)"):
        batch_statistics(torch.ones(3))  # type: ignore[arg-type]


def test_the_rows_are_not_used_up(leaves_nothing_behind) -> None:
    J = network()
    with leaves_nothing_behind():
        batch_statistics(J)
    J.backward(1.0)
