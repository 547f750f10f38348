"""A scalar with a given value whose gradient is a weighted sum of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradients = Callable[[Tensor], Sequence[Tensor | None]]


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Gradients, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable  # rows have no graph
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, None, *ctx.gradients(upstream)


def weighted_rows(gradients: Gradients, value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """A scalar equal to `value`; its gradient is `gradients(upstream)`, one tensor or None per parameter."""
    with torch.enable_grad():
        return _WeightedRows.apply(gradients, value, *parameters)
