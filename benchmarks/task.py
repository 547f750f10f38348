"""What is measured: a task, the outputs asked of it, and what a method is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

OUTPUTS = {
    "norms": "norms",
    "clipped": "clipped gradient",
    "gram": "Gram matrix",
    "dot": "dot with a direction",
    "rows": "all per-example gradients",
}
PLAIN = "plain step"
OURS = "rowgrad"

Step = Callable[[], Any]


@dataclass
class Task:
    """A model with a batch, (inputs, targets) with the examples first, and the loss of each example, (B,)."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]

    def to(self, dtype: torch.dtype) -> Task:
        """This task with its numbers in another type; the model is changed in place."""
        inputs, targets = (t.to(dtype) if t.is_floating_point() else t for t in self.batch)
        return Task(self.model.to(dtype), (inputs, targets), self.loss)

    def losses(self) -> Tensor:
        inputs, targets = self.batch
        return self.loss(self.model(inputs), targets)

    def params(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def plain(self) -> None:
        """Forward pass and backward pass of the summed losses."""
        self.losses().sum().backward()

    def lowest(self) -> list[Tensor]:
        """Few parameters to which a backward pass goes through every layer: the tables, or a layer's before which there
        is none; all where neither is told by the model's form."""
        tables = [m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)]
        if tables:
            return tables
        if isinstance(self.model, nn.Sequential):
            return [list(self.model[0].parameters())[-1]]
        return [*self.model.parameters()]

    def gradients(self) -> dict[str, Tensor]:
        """What is in `.grad`."""
        return {name: p.grad for name, p in self.params().items() if p.grad is not None}

    def __len__(self) -> int:
        return len(self.batch[0])


@dataclass(frozen=True)
class Goal:
    """What the outputs depend on besides the task: the bound of clipping, and the direction of the dot products."""

    max_norm: float
    seed: int = 1
    _drawn: dict[tuple, dict[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def direction(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Standard normal numbers for each parameter, the same whatever its dtype; drawn once."""
        key = tuple([(name, p.dtype, p.shape) for name, p in params.items()])
        if key not in self._drawn:
            generator = torch.Generator().manual_seed(self.seed)
            drawn = {name: torch.randn(params[name].shape, generator=generator) for name in sorted(params)}
            self._drawn[key] = {name: drawn[name].to(p.dtype) for name, p in params.items()}
        return self._drawn[key]

    def weights(self, sq_norms: Tensor) -> Tensor:
        """What each row is multiplied by so that none is longer than the bound."""
        return (self.max_norm / sq_norms.sqrt()).clamp(max=1.0)


@dataclass(frozen=True)
class Method:
    """One way to an output; `make(task, output, goal)` prepares what a user would keep between steps.

    The step that it returns includes a forward pass. Its result is (B,) for norms and dot, (B, B) for gram, a gradient
    or (B, *shape) rows by name of the parameter for clipped and rows.
    """

    name: str
    outputs: tuple[str, ...]
    make: Callable[[Task, str, Goal], Step]
    for_hooks: bool = False  # takes the form of the model in which a layer's hook sees every use of a parameter


def from_rows(rows: Mapping[str, Tensor], output: str, params: Mapping[str, Tensor], goal: Goal) -> Any:
    """An output by plain algebra on all per-example gradients."""
    if output == "rows":
        return rows
    flat = {name: r.flatten(1) for name, r in rows.items()}
    if output == "gram":
        return torch.stack([r @ r.T for r in flat.values()]).sum(0)
    if output == "dot":
        direction = goal.direction(params)
        return torch.stack([r @ direction[name].flatten() for name, r in flat.items()]).sum(0)
    sq_norms = torch.stack([torch.linalg.vector_norm(r, dim=1).square() for r in flat.values()]).sum(0)
    if output == "norms":
        return sq_norms.sqrt()
    weights = goal.weights(sq_norms)
    return {name: torch.tensordot(weights, r, 1) for name, r in rows.items()}
