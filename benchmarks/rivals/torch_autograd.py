"""What PyTorch itself offers outside torch.func: a loop, batched cotangents, and the derivative of a derivative."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.task import OUTPUTS, Goal, Method, Step, Task, from_rows

Gradients = dict[str, Tensor]


def _loop(task: Task, output: str, goal: Goal) -> Step:
    """Forward and backward pass of one example at a time; rows are kept only where they are the output or needed."""
    params = task.params()
    direction = goal.direction(params)
    inputs, targets = task.batch

    def row(j: int) -> Gradients:
        losses = task.loss(task.model(inputs[j : j + 1]), targets[j : j + 1])
        return dict(zip(params, torch.autograd.grad(losses.sum(), list(params.values())), strict=True))

    def rows() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for j in range(len(task)):
            for name, g in row(j).items():
                found.setdefault(name, g.new_empty(len(task), *g.shape))[j] = g
        return found

    def clipped() -> Gradients:
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        for j in range(len(task)):
            gradients = row(j)
            weight = goal.weights(_dot(gradients, gradients))
            for name, g in gradients.items():
                total[name].add_(g * weight)
        return total

    def norms() -> Tensor:
        return torch.stack([_norm(row(j)) for j in range(len(task))])

    def dot() -> Tensor:
        return torch.stack([_dot(row(j), direction) for j in range(len(task))])

    steps: dict[str, Step] = {"norms": norms, "clipped": clipped, "dot": dot, "rows": rows}
    return steps.get(output, lambda: from_rows(rows(), output, params, goal))


def _norm(gradients: Gradients) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]).norm()


def _dot(a: Gradients, b: Gradients) -> Tensor:
    return torch.stack([g.flatten() @ b[name].flatten() for name, g in a.items()]).sum()


def _batched(task: Task, output: str, goal: Goal) -> Step:
    """All rows from `torch.autograd.grad(..., is_grads_batched=True)` with the unit vectors as cotangents."""
    params = task.params()

    def step() -> Any:
        losses = task.losses()
        units = torch.eye(len(losses), dtype=losses.dtype)
        rows = torch.autograd.grad(losses, list(params.values()), units, is_grads_batched=True)
        return from_rows(dict(zip(params, rows, strict=True)), output, params, goal)

    return step


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Kernels that have a second and a forward derivative: fused attention and oneDNN's LSTM have none."""
    is_recurrent = any(isinstance(m, nn.LSTM) for m in model.modules())
    with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=not is_recurrent):
        yield


def _double_backward(task: Task, output: str, goal: Goal) -> Step:
    """J v as the derivative in u of <J^T u, v>."""
    params = task.params()
    direction = list(goal.direction(params).values())

    def step() -> Tensor:
        with unfused(task.model):
            losses = task.losses()
            u = torch.zeros_like(losses, requires_grad=True)
            gradients = torch.autograd.grad(losses, list(params.values()), u, create_graph=True)
            return torch.autograd.grad(gradients, u, direction)[0]

    return step


METHODS = [
    Method("plain loop", tuple(OUTPUTS), _loop),
    Method("is_grads_batched", ("norms", "clipped", "gram", "rows"), _batched),
    Method("double backward", ("dot",), _double_backward),
]
