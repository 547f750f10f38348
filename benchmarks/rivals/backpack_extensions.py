"""BackPACK: extensions of the backward pass of layers, for norms (BatchL2Grad) and for all gradients (BatchGrad)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.task import Goal, Method, Step, Task, from_rows


def _taken(params: Mapping[str, Tensor], attribute: str) -> dict[str, Tensor]:
    """What BackPACK left on the parameters, which is taken away again."""
    missing = [name for name, p in params.items() if not hasattr(p, attribute)]
    if missing:
        raise NotImplementedError(
            f"BackPACK gives no {attribute} for {len(missing)} of {len(params)} parameters: {missing[0]}"
        )
    found = {name: getattr(p, attribute) for name, p in params.items()}
    for p in params.values():
        delattr(p, attribute)
    return found


def _norms(task: Task, output: str, goal: Goal) -> Step:
    """The clipped gradient takes a second backward pass with weighted losses."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    extend(task.model)
    params = task.params()

    def step() -> Any:
        losses = task.losses()
        with backpack(BatchL2Grad()):
            torch.autograd.grad(losses.sum(), task.lowest(), retain_graph=output == "clipped")  # norms need no more
        sq_norms = torch.stack(list(_taken(params, "batch_l2").values())).sum(0)
        if output == "norms":
            return sq_norms.sqrt()
        torch.dot(goal.weights(sq_norms), losses).backward()
        return task.gradients()

    return step


def _rows(task: Task, output: str, goal: Goal) -> Step:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    extend(task.model)
    params = task.params()

    def step() -> Any:
        with backpack(BatchGrad()):
            task.losses().sum().backward()
        return from_rows(_taken(params, "grad_batch"), output, params, goal)

    return step


METHODS = [
    Method("BackPACK BatchL2Grad", ("norms", "clipped"), _norms, for_hooks=True),
    Method("BackPACK BatchGrad", ("clipped", "gram", "dot", "rows"), _rows, for_hooks=True),
]
