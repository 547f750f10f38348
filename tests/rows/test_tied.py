"""A table looked up and used as the head's weight: where the head's rows are written out, those of the lookups are
added to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.reference import assert_rows_close, assert_scaled_close, flat, rows_by_grad
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.rows import factors
from rowgrad.rows.block import Region
from rowgrad.rows.factors import Outer, Rows

B, T, V, D = 4, 30, 7, 5  # so many positions that Gram matrices cost more than the rows


class Tied(nn.Module):
    def __init__(self, sparse: bool = False, turned: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D, sparse=sparse)
        self.turned = turned

    def forward(self, ids: Tensor) -> Tensor:
        h, weight = self.table(ids).tanh(), self.table.weight
        return (weight @ h.mT).mT if self.turned else h @ weight.T


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).sin().square().sum((1, 2))


@pytest.fixture(params=["dense", "sparse", "weight first"])
def model(request: pytest.FixtureRequest) -> Tied:
    torch.manual_seed(0)
    return Tied(sparse=request.param == "sparse", turned=request.param == "weight first").double()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def rows(model: Tied, ids: Tensor) -> Tensor:
    """(B, P), one example at a time."""
    weight = model.table.weight
    found = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses_of(model, ids)]
    return torch.stack([g.to_dense() for g in found]).flatten(1)


def region_of(J: rg.Jacobian) -> Region:
    (region,) = J._live().by_name["table.weight"].regions
    return region


QUESTIONS: dict[str, Callable[[rg.Jacobian, Tensor], tuple[Tensor, Tensor]]] = {
    "norms": lambda J, A: (J.norms(), A.norm(dim=1)),
    "gram": lambda J, A: (J.gram(), A @ A.T),
    "diag_gram": lambda J, A: (J.diag_gram(J), A.square().sum(1)),
    "dot": lambda J, A: (J.dot({"table.weight": torch.arange(V * D).reshape(V, D)}), A @ torch.arange(V * D).double()),
    "weighted_sum": lambda J, A: (
        J.weighted_sum(torch.arange(B))["table.weight"].flatten(),
        torch.arange(B).double() @ A,
    ),
    "dense": lambda J, A: (J.dense(), A),
    "part": lambda J, A: (J[[2, 0]].norms(), A[[2, 0]].norm(dim=1)),
    "part with all": lambda J, A: (J[[2, 0]].gram(J), A[[2, 0]] @ A.T),
}


@pytest.mark.parametrize("first", QUESTIONS)
@pytest.mark.parametrize("max_bytes", [None, 0], ids=["kept", "not kept"])
def test_every_question_after_every_other(
    first: str, max_bytes: int | None, model: Tied, ids: Tensor, rows: Tensor
) -> None:
    for ask in QUESTIONS.values():
        J = rg.jacobian(losses_of(model, ids), model, max_bytes=max_bytes)
        for question in (QUESTIONS[first], ask):
            found, expected = question(J, rows)
            assert_scaled_close(found, expected, expected.abs().max())


def test_rows_are_written_out_once_and_let_go(model: Tied, ids: Tensor) -> None:
    J = rg.jacobian(losses_of(model, ids), model)
    J.dot({"table.weight": torch.ones(V, D)})
    assert region_of(J).formed_bytes == 0, "a product with a direction forms nothing"
    J.norms()
    assert region_of(J).formed_bytes == B * V * D * 8
    J.gram()
    assert region_of(J).formed_bytes == B * V * D * 8
    bounded = rg.jacobian(losses_of(model, ids), model, max_bytes=0)
    bounded.norms()
    assert region_of(bounded).formed_bytes == 0


def test_dense_rows_are_the_callers_own(model: Tied, ids: Tensor, rows: Tensor) -> None:
    J = rg.jacobian(losses_of(model, ids), model)
    J.norms()
    J.dense(as_dict=True)["table.weight"].zero_()
    assert_scaled_close(J.gram(), rows @ rows.T, rows.square().sum())


def test_clipped_gradients_and_norms_that_stream(model: Tied, ids: Tensor, rows: Tensor) -> None:
    norms = rows.norm(dim=1)
    assert_scaled_close(rg.grad_norms(losses_of(model, ids), model), norms, norms)
    bound = float(norms.median())
    rg.clipped_loss(losses_of(model, ids), model, bound, reduction="sum").backward()
    gradient = model.table.weight.grad
    assert gradient is not None
    assert_scaled_close(gradient.flatten(), (bound / norms).clamp(max=1) @ rows, norms.sum())


def test_transforms_still_see_the_factors(model: Tied, ids: Tensor, rows: Tensor) -> None:
    J = rg.jacobian(losses_of(model, ids), model)
    J.norms()
    J.backward(1.0, transform=lambda name, z: 3 * z)
    gradient = model.table.weight.grad
    assert gradient is not None
    assert_scaled_close(gradient.flatten(), 3 * rows.sum(0), rows.abs().sum())


@pytest.mark.parametrize("question", ["gram", "cosines", "diag_gram"])
def test_one_side_of_a_pair_may_be_written_out_and_the_other_not(question: str, model: Tied, ids: Tensor) -> None:
    parts = [ids, ids[:, :2]]  # of two positions Gram matrices cost less
    rows = [flat(rows_by_grad(losses_of(model, part), dict(model.named_parameters()))) for part in parts]
    for first, second in ((0, 1), (1, 0)):
        J, K = (rg.jacobian(losses_of(model, parts[i]), model) for i in (first, second))
        (A, C), found = (rows[first], rows[second]), getattr(J, question)(K)
        if question == "cosines":
            A, C = A / A.norm(dim=1, keepdim=True), C / C.norm(dim=1, keepdim=True)
        expected = (A * C).sum(1) if question == "diag_gram" else A @ C.T
        assert_scaled_close(found, expected, expected.abs().max())


def test_rows_too_large_to_be_kept_meet_few_that_are_not(
    model: Tied, ids: Tensor, rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors, "KEEP_BYTES", 2 * V * D * 8)
    J = rg.jacobian(losses_of(model, ids), model)
    assert [region_of(part).adds_up for part in (J, J[:2])] == [False, True]
    assert_scaled_close(J.gram(J[:2]), rows @ rows[:2].T, rows.square().sum())
    assert_scaled_close(J[:2].gram(J), rows[:2] @ rows.T, rows.square().sum())


def test_turned_rows_that_are_added_up_take_a_table_in() -> None:
    w = nn.Parameter(torch.randn(V, D, dtype=torch.float64))
    x, ids = torch.randn(B, D, V, dtype=torch.float64), torch.randint(V, (B, 6))

    def losses() -> Tensor:
        return (x * w.T).sin().sum((1, 2)) + (x + w.T).cos().sum((1, 2)) + w[ids].sin().sum((1, 2))

    A = flat(rows_by_grad(losses(), {"w": w}))
    norms = A.norm(dim=1)
    assert_scaled_close(rg.grad_norms(losses(), {"w": w}), norms, norms)
    assert_scaled_close(rg.jacobian(losses(), {"w": w}).gram(), A @ A.T, torch.outer(norms, norms))
    rg.clipped_loss(losses(), {"w": w}, 1.0, reduction="sum").backward()
    assert w.grad is not None
    assert_scaled_close(w.grad.flatten(), (1 / norms).clamp(max=1) @ A, norms.sum())


def test_two_heads_and_two_tables(ids: Tensor) -> None:
    """Lookups of two kinds go to one written-out head, or to two that are joined."""

    class Twice(nn.Module):
        def __init__(self, n_heads: int) -> None:
            super().__init__()
            self.n_heads = n_heads
            self.weight = nn.Parameter(torch.randn(V, D, dtype=torch.float64))

        def forward(self, ids: Tensor) -> Tensor:
            h = nn.functional.embedding(ids, self.weight) * nn.functional.embedding(ids.flip(1), self.weight)
            for _ in range(self.n_heads - 1):
                h = (h @ self.weight.T).tanh() @ self.weight
            return h @ self.weight.T

    for n_heads in (1, 2):
        model = Twice(n_heads)
        expected = rows_by_grad(losses_of(model, ids), dict(model.named_parameters()))
        norms = flat(expected).norm(dim=1)
        assert_scaled_close(rg.grad_norms(losses_of(model, ids), model), norms, norms)
        J = rg.jacobian(losses_of(model, ids), model)
        assert_scaled_close(J.norms(), norms, norms)
        assert_rows_close(J.dense(as_dict=True), expected)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_rows_of_another_dtype_are_not_added(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    head = Outer(torch.randn(B, 1, T, V, dtype=dtypes[0]), torch.randn(B, 1, T, D, dtype=dtypes[0]), torch.Size((V, D)),
                 cotangent_left=True)  # fmt: skip
    table = Rows(torch.randint(V, (B, T)), torch.randn(B, T, D, dtype=dtypes[1]), torch.Size((V, D)))
    region = Region([head, table], place=None)  # type: ignore[arg-type]
    assert not region.adds_up
    expected = (head.dense().double() + table.dense().double()).flatten(1).square().sum(1)
    torch.testing.assert_close(region.sq_norms(keep=False).double(), expected, rtol=1e-4, atol=0)
