"""Hooks and custom Functions that write to the gradient they are given, which the engine gave to others, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.reference import assert_rows_close, rows_by_grad
from torch import Tensor, nn

import rowgrad as rg
from rowgrad import tape
from rowgrad.errors import OpaqueGraphError

B, T, D = 5, 7, 6


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream.mul_(2)


def by_function(h: Tensor) -> Tensor:
    return Doubled.apply(h)  # type: ignore[no-any-return]


def by_hook(h: Tensor) -> Tensor:
    h.register_hook(lambda z: z.mul_(2))
    return h


def by_clamping(h: Tensor) -> Tensor:
    h.register_hook(lambda z: z.clamp_(-0.1, 0.1))
    return h


QUESTIONS: dict[str, Callable[[Tensor, nn.Module], object]] = {
    "norms": rg.grad_norms,
    "rows": lambda losses, model: rg.jacobian(losses, model).dense(),
    "clipped": lambda losses, model: rg.clipped_loss(losses, model, 0.5).backward(),
}


@pytest.fixture
def model() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(D, D) for _ in range(3)).double()


def x() -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64)


@pytest.mark.parametrize("write", [by_function, by_hook, by_clamping])
@pytest.mark.parametrize(
    ("question", "waiting"),
    [*((question, tape.WAITING_BYTES) for question in QUESTIONS), ("rows", 0)],
)
def test_a_cotangent_that_is_no_longer_what_arrived_is_refused(
    question: str,
    waiting: int,
    write: Callable[[Tensor], Tensor],
    model: nn.ModuleList,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tape, "WAITING_BYTES", waiting)
    first, second, third = model
    data = x()
    for _ in range(2):
        losses = (write(first(data)) + third(second(data))).square().sum((1, 2))
        with pytest.raises(OpaqueGraphError, match=r"written to in the middle of the pass.*return a new tensor"):
            QUESTIONS[question](losses, model)


@pytest.mark.parametrize("waiting", [0, tape.WAITING_BYTES])
def test_sums_that_the_engine_takes_in_place_are_no_such_case(
    waiting: int, model: nn.ModuleList, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It adds what arrives by several ways to the first, where nobody else holds that."""
    monkeypatch.setattr(tape, "WAITING_BYTES", waiting)
    bias = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    params = {"bias": bias, **dict(model.named_parameters())}
    for _ in range(2):
        h = model[0](x())
        h = (h + bias) + model[1](h).tanh() + model[2](h).tanh() + h
        losses = (h + h.tanh()).square().sum((1, 2))
        expected = rows_by_grad(losses, params)
        norms = rg.grad_norms(losses, params, retain_graph=True)
        torch.testing.assert_close(norms, sum(r.flatten(1).square().sum(1) for r in expected.values()).sqrt())
        assert_rows_close(rg.jacobian(losses, params).dense(as_dict=True), expected)
