"""torch.func: `vmap(grad)` over the examples, at once or in chunks, and `jvp` for the dot products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from benchmarks.rivals.torch_autograd import unfused
from benchmarks.task import Goal, Method, Step, Task, from_rows

CHUNK = 8  # examples

Params = dict[str, Tensor]


def _loss_of_one(task: Task) -> Callable[[Params, Tensor, Tensor], Tensor]:
    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return task.loss(functional_call(task.model, params, (x[None],)), y[None])[0]

    return loss


def _whole(task: Task, output: str, goal: Goal) -> Step:
    params = {name: p.detach() for name, p in task.params().items()}
    rows = vmap(grad(_loss_of_one(task)), in_dims=(None, 0, 0))
    return lambda: from_rows(rows(params, *task.batch), output, params, goal)


def _chunked(task: Task, output: str, goal: Goal) -> Step:
    """Only a chunk's rows are alive at a time, unless the rows are what is asked for."""
    params = {name: p.detach() for name, p in task.params().items()}
    one = grad(_loss_of_one(task))
    if output == "rows":
        every = vmap(one, in_dims=(None, 0, 0), chunk_size=CHUNK)
        return lambda: every(params, *task.batch)
    rows = vmap(one, in_dims=(None, 0, 0))

    def step() -> Any:
        chunks = zip(*(t.split(CHUNK) for t in task.batch), strict=True)
        parts = (from_rows(rows(params, x, y), output, params, goal) for x, y in chunks)
        if output == "norms":
            return torch.cat(list(parts))
        total = next(parts)
        for part in parts:
            for name, g in part.items():
                total[name] += g
        return total

    return step


def _jvp(task: Task, output: str, goal: Goal) -> Step:
    """One forward pass with tangents."""
    params = {name: p.detach() for name, p in task.params().items()}
    direction = goal.direction(params)
    inputs, targets = task.batch

    def losses(params: Params) -> Tensor:
        return task.loss(functional_call(task.model, params, (inputs,)), targets)

    def step() -> Tensor:
        with torch.no_grad(), unfused(task.model):
            return jvp(losses, (params,), (direction,))[1]

    return step


METHODS = [
    Method("vmap(grad)", ("norms", "clipped", "gram", "dot", "rows"), _whole),
    Method(f"vmap(grad), chunks of {CHUNK}", ("norms", "clipped", "rows"), _chunked),
    Method("jvp", ("dot",), _jvp),
]
