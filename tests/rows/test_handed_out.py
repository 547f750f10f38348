"""What is handed out is the caller's own, and selections may be empty."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rowgrad as rg

B = 4


class Biased(nn.Module):
    """A matrix plus rows of a table: the rows of both are those of their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.table = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.matrix + self.table[torch.tensor([0, 3, 3, 8, 1])]).T


class Tied(nn.Module):
    """A table that is looked up and multiplied with: two forms that are not joined."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).tanh() @ self.table.weight.T


# by name: a model and an input, (B, ...)
MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "matrix, one position": lambda: (nn.Linear(6, 5), torch.randn(B, 6)),
    "matrix, few positions": lambda: (nn.Linear(40, 40), torch.randn(B, 3, 40)),
    "matrix, many positions": lambda: (nn.Linear(3, 2), torch.randn(B, 20, 3)),
    "convolution": lambda: (nn.Conv2d(3, 8, 3), torch.randn(B, 3, 16, 16)),
    "scales and shifts": lambda: (nn.Sequential(nn.LayerNorm(6), nn.GroupNorm(3, 3)), torch.randn(B, 3, 6)),
    "tied": lambda: (Tied(), torch.randint(7, (B, 5))),
    "a matrix and looked-up rows": lambda: (Biased(), torch.randn(B, 7, 4)),
    "lookup": lambda: (nn.Embedding(7, 3), torch.randint(7, (B, 5))),
}


@pytest.fixture(params=MODELS)
def model_and_losses(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[request.param]()
    model, x = model.double(), x.double() if x.is_floating_point() else x
    return model, model(x).pow(3).flatten(1).sum(1)


Question = Callable[[rg.Jacobian], object]
QUESTIONS: dict[str, Question] = {
    "nothing": lambda J: None,
    "norms": lambda J: J.norms(),
    "Gram matrix": lambda J: J.gram(),
    "rows": lambda J: J.dense(),
}


@pytest.mark.parametrize("asked_before", QUESTIONS)
def test_rows_may_be_written_to(model_and_losses: tuple[nn.Module, Tensor], asked_before: str) -> None:
    model, losses = model_and_losses
    J = rg.jacobian(losses, model, retain_graph=True)
    QUESTIONS[asked_before](J)
    rows = J.dense()
    for t in J.dense(as_dict=True).values():
        t.zero_()
    torch.testing.assert_close(J.dense(), rows)
    torch.testing.assert_close(J.gram(), rows @ rows.T)
    torch.testing.assert_close(J.norms(), rows.norm(dim=1))
    total = torch.cat([g.flatten() for g in J.weighted_sum(1.0).values()])
    torch.testing.assert_close(total, rows.sum(0))


def test_rows_written_as_the_pass_comes_by_share_memory_with_nothing(
    model_and_losses: tuple[nn.Module, Tensor],
) -> None:
    """Neither with each other nor with what the pass handed on, which a hook still holds."""
    model, losses = model_and_losses
    expected = rg.jacobian(losses, model, retain_graph=True).dense(as_dict=True)
    rows = rg.grad_rows(losses, model, retain_graph=True)
    for name, t in rows.items():
        torch.testing.assert_close(t, expected[name])
        t.zero_()
    for name, t in rg.grad_rows(losses, model, retain_graph=True).items():
        torch.testing.assert_close(t, expected[name])


def test_rows_of_a_shift_are_not_the_gradient_that_a_hook_holds() -> None:
    layer, held = nn.Linear(6, 5).double(), []
    out = layer(torch.randn(B, 6, dtype=torch.float64))
    out.register_hook(lambda g: held.append(g))
    rows = rg.grad_rows(out.pow(3).sum(1), layer)
    torch.testing.assert_close(rows["bias"], held[0])
    rows["bias"].zero_()
    assert bool(held[0].any())


def test_rows_of_one_parameter_written_to_leave_those_of_another(
    model_and_losses: tuple[nn.Module, Tensor],
) -> None:
    model, losses = model_and_losses
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        J = rg.jacobian(losses, model, retain_graph=True)
        rows, norms = J.dense(as_dict=True), J.norms("parameter")
        J = rg.jacobian(losses, model, retain_graph=True)
        J[name].dense(as_dict=True)[name].zero_()
        for other in names:
            torch.testing.assert_close(J[other].dense(), rows[other].flatten(1))
            torch.testing.assert_close(J[other].norms(), norms[other])


def test_a_transform_may_write_to_the_cotangents(model_and_losses: tuple[nn.Module, Tensor]) -> None:
    model, losses = model_and_losses
    J = rg.jacobian(losses, model)
    expected = {n: 2 * g for n, g in J.weighted_sum(1.0).items()}
    for _ in range(2):
        model.zero_grad()
        J.backward(1.0, transform=lambda name, z: z.mul_(2), retain=True)
        torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, expected)


def test_a_selection_may_be_empty(model_and_losses: tuple[nn.Module, Tensor]) -> None:
    model, losses = model_and_losses
    J = rg.jacobian(losses, model)
    none = J[losses.detach() > float("inf")]
    assert none.gram().shape == (0, 0)
    assert none.gram(J).shape == (0, B)
    assert J.gram(none).shape == (B, 0)
    assert none.diag_gram(J[[]]).shape == (0,)
    assert none.norms().shape == (0,)
    assert none.dense().shape == (0, J.shape[1])
    assert (none @ {n: torch.ones_like(p) for n, p in model.named_parameters()}).shape == (0,)
    for n, g in none.weighted_sum(1.0).items():
        assert torch.equal(g, torch.zeros_like(model.get_parameter(n)))
