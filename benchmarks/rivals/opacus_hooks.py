"""Opacus: per-example gradients from hooks on layers, by formula or by functorch, and norms without them ("ghost")."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.task import Goal, Method, Step, Task, from_rows
from benchmarks.workloads import Recurrent


def _with_its_layers(model: nn.Module) -> nn.Module:
    """nn.LSTM hides its steps from hooks; Opacus has one of its own, with the same parameters."""
    from opacus.layers import DPLSTM

    if isinstance(model, Recurrent):
        lstm = model.lstm
        model.lstm = DPLSTM(lstm.input_size, lstm.hidden_size, batch_first=True)  # type: ignore[assignment]
        model.lstm.load_state_dict(lstm.state_dict())
    return model


def _rows(task: Task, output: str, goal: Goal, *, functorch: bool) -> Step:
    from opacus.grad_sample import GradSampleModule

    task.model = _with_its_layers(task.model)
    wrapped = GradSampleModule(task.model, loss_reduction="sum", force_functorch=functorch)
    params = task.params()
    inputs, targets = task.batch

    def step() -> Any:
        task.loss(wrapped(inputs), targets).sum().backward()
        rows: dict[str, Tensor] = {name: p.grad_sample for name, p in params.items()}  # type: ignore[attr-defined]
        for p in params.values():
            p.grad_sample = None  # type: ignore[attr-defined]
        return from_rows(rows, output, params, goal)

    return step


def _norms(task: Task, output: str, goal: Goal, *, ghost: bool) -> Step:
    """The clipped gradient takes a second backward pass with weighted losses, as in its own training loop."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    task.model = _with_its_layers(task.model)
    wrapped = GradSampleModuleFastGradientClipping(
        task.model, loss_reduction="sum", max_grad_norm=goal.max_norm, use_ghost_clipping=ghost
    )
    inputs, targets = task.batch

    def step() -> Any:
        losses = task.loss(wrapped(inputs), targets)
        torch.autograd.grad(losses.sum(), task.lowest(), retain_graph=output == "clipped")  # norms need no more
        if output == "norms":
            return wrapped.get_norm_sample()
        weights = wrapped.get_clipping_coef()
        wrapped.disable_hooks()
        torch.dot(weights, losses).backward()
        wrapped.enable_hooks()
        return task.gradients()

    return step


ROWS = ("norms", "clipped", "gram", "dot", "rows")
NORMS = ("norms", "clipped")
METHODS = [
    Method("Opacus hooks", ROWS, partial(_rows, functorch=False), for_hooks=True),
    Method("Opacus functorch", ("norms", "clipped", "rows"), partial(_rows, functorch=True), for_hooks=True),
    Method("Opacus ghost", NORMS, partial(_norms, ghost=True), for_hooks=True),
    Method("Opacus fast clipping", NORMS, partial(_norms, ghost=False), for_hooks=True),
]
