"""A scalar with a given value whose gradient is a weighted sum of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rowgrad.errors import NoGraphError

Gradients = Callable[[Tensor], Sequence[Tensor | None]]


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Gradients, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        found = ctx.gradients(upstream)
        if torch.is_grad_enabled():  # create_graph=True
            found = [None if g is None else _Once.apply(g.detach().requires_grad_()) for g in found]
        return None, None, *found


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated: without this, a second derivative would lack it without a word."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        raise NoGraphError(
            "the gradient of a clipped or reweighted loss cannot be differentiated again: rows have no graph. Take "
            "second derivatives of the losses themselves"
        )


def weighted_rows(gradients: Gradients, value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """A scalar equal to `value`; its gradient is `gradients(upstream)`, one tensor or None per parameter."""
    with torch.enable_grad():
        return _WeightedRows.apply(gradients, value, *parameters)
