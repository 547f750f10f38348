"""This library's methods."""

from __future__ import annotations

from typing import Any

import rowgrad as rg
from benchmarks.task import OURS, OUTPUTS, Goal, Method, Step, Task
from rowgrad.rows.plan import forget

FIRST = f"{OURS}, first call"
FORWARD = f"{OURS}, jvp"


def _make(task: Task, output: str, goal: Goal) -> Step:
    model, direction = task.model, goal.direction(task.params())

    def clipped() -> Any:
        rg.clipped_loss(task.losses(), model, goal.max_norm, reduction="sum").backward()
        return task.gradients()

    return {
        "norms": lambda: rg.grad_norms(task.losses(), model),
        "clipped": clipped,
        "gram": lambda: rg.jacobian(task.losses(), model).gram(),
        "dot": lambda: rg.jacobian(task.losses(), model).dot(direction),
        "rows": lambda: rg.grad_rows(task.losses(), model),
    }[output]


def _make_first(task: Task, output: str, goal: Goal) -> Step:
    """A call on a graph that was not seen before, which proves where the examples lie."""
    step = _make(task, output, goal)

    def first() -> Any:
        forget()
        return step()

    return first


def _make_forward(task: Task, output: str, goal: Goal) -> Step:
    """The direction is known beforehand, and goes along with the forward pass."""
    params = task.params()
    direction = goal.direction(params)
    return lambda: rg.jvp(task.losses, params, direction)[1]


METHODS = [
    Method(OURS, tuple(OUTPUTS), _make),
    Method(FIRST, ("norms",), _make_first),
    Method(FORWARD, ("dot",), _make_forward),
]
