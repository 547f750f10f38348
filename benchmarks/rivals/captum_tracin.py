"""Captum's TracIn: the influence of an example on itself is its squared gradient norm, for one checkpoint of rate 1."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.task import Goal, Method, Step, Task


def _self_influence(task: Task, output: str, goal: Goal, *, by_layer: bool) -> Step:
    """`by_layer` reads the gradients of the examples off the layers, for linear layers and convolutions alone."""
    from captum.influence import TracInCP

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = task.loss(outputs, targets)
        return losses.sum() if by_layer else losses

    loss.reduction = "sum" if by_layer else "none"  # type: ignore[attr-defined]
    data = TensorDataset(*task.batch)
    tracin = TracInCP(
        task.model,
        DataLoader(data, batch_size=len(task)),
        ["as it is"],
        checkpoints_load_func=lambda model, checkpoint: 1.0,
        loss_fn=loss,
        sample_wise_grads_per_batch=by_layer,
    )
    return lambda: tracin.self_influence(DataLoader(data, batch_size=len(task))).sqrt()


METHODS = [
    Method("Captum self-influence", ("norms",), partial(_self_influence, by_layer=False), for_hooks=True),
    Method("Captum self-influence, by layer", ("norms",), partial(_self_influence, by_layer=True), for_hooks=True),
]
