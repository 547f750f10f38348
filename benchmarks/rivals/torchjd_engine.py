"""TorchJD: the Gram matrix of the gradients, gathered layer by layer; norms are the root of its diagonal."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.task import Goal, Method, Step, Task


def _gram(task: Task, output: str, goal: Goal, *, batch_dim: int | None) -> Step:
    """The clipped gradient takes an ordinary backward pass with the weights, as in its own training loop."""
    from torchjd.autogram import Engine

    engine = Engine(task.model, batch_dim=batch_dim)

    def step() -> Any:
        losses = task.losses()
        gram = engine.compute_gramian(losses)
        if output == "gram":
            return gram
        sq_norms = gram.diagonal()
        if output == "norms":
            return sq_norms.sqrt()
        torch.dot(goal.weights(sq_norms), losses).backward()
        return task.gradients()

    return step


OUTPUTS = ("norms", "clipped", "gram")
METHODS = [
    Method("TorchJD", OUTPUTS, partial(_gram, batch_dim=0), for_hooks=True),
    Method("TorchJD, batch_dim=None", OUTPUTS, partial(_gram, batch_dim=None), for_hooks=True),
]
