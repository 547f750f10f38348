"""What PyTorch itself offers outside torch.func: a loop, batched cotangents, and the derivative of a derivative."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.task import OUTPUTS, Goal, Method, Step, Task, from_rows
from benchmarks.workloads import Block

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
        total = [torch.zeros_like(p) for p in params.values()]
        for j in range(len(task)):
            gradients = row(j)
            weight = float(goal.weights(_norm(gradients).square()))
            torch._foreach_add_(total, list(gradients.values()), alpha=weight)  # pyright: ignore[reportPrivateImportUsage]
        return dict(zip(params, total, strict=True))

    def norms() -> Tensor:
        return torch.stack([_norm(row(j)) for j in range(len(task))])

    def dot() -> Tensor:
        return torch.stack([_dot(row(j), direction) for j in range(len(task))])

    steps: dict[str, Step] = {"norms": norms, "clipped": clipped, "dot": dot, "rows": rows}
    return steps.get(output, lambda: from_rows(rows(), output, params, goal))


def _norm(gradients: Gradients) -> Tensor:
    norms = torch._foreach_norm(list(gradients.values()))  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).norm()


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
    with ExitStack() as stack:
        if any(isinstance(m, Block) for m in model.modules()):
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(m, nn.LSTM) for m in model.modules()):
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


def _forward_ad(task: Task, output: str, goal: Goal) -> Step:
    """J v by one forward pass with dual numbers for parameters."""
    direction = goal.direction(task.params())
    tangents = {p: direction[name] for name, p in task.model.named_parameters()}
    places = [(m, name, p) for m in task.model.modules() for name, p in m.named_parameters(recurse=False)]

    def step() -> Tensor | None:
        with torch.no_grad(), forward_ad.dual_level(), unfused(task.model):
            duals = {p: forward_ad.make_dual(p.detach(), tangent) for p, tangent in tangents.items()}
            for module, name, p in places:
                del module._parameters[name]
                setattr(module, name, duals[p])
            try:
                return forward_ad.unpack_dual(task.losses()).tangent
            finally:
                for module, name, p in places:
                    delattr(module, name)
                    module._parameters[name] = p

    return step


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
    Method("forward AD", ("dot",), _forward_ad),
]
