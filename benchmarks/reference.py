"""The truth, from a loop over the examples in float64, and how far a result is from it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.task import Goal, Task

# Relative; more is no rounding of float32: the method is wrong. A unit of a ReLU that float32 puts on the other side of
# zero than float64 moves a dot product by 1e-3, in every method alike; smaller faults show on the tiny model.
TOLERANCE = 5e-3
TINY_TOLERANCE = 1e-4  # the same on a tiny model

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """Every norm, dot product and the clipped gradient; the first and last row and their columns of the Gram matrix."""

    goal: Goal
    norms: Tensor
    dot: Tensor
    clipped: Gradients
    sampled: tuple[int, ...]
    rows: Sequence[Gradients]
    gram: Tensor  # (B, sampled)

    def save(self, path: Path) -> None:
        torch.save(vars(self) | {"goal": vars(self.goal)}, path)

    @classmethod
    def load(cls, path: Path) -> Reference:
        found = torch.load(path, mmap=True)
        return cls(**found | {"goal": Goal(**found["goal"])})

    def error(self, output: str, result: Any) -> float:
        """Largest error relative to the norms of the rows concerned; nan counts as wrong."""
        if output in ("clipped", "rows"):
            missing = self.clipped.keys() - result.keys()
            if missing:
                raise ValueError(f"{len(missing)} of {len(self.clipped)} parameters are missing: {min(missing)}")
        return float(getattr(self, f"_error_of_{output}")(result))

    def _error_of_norms(self, result: Tensor) -> Tensor:
        return ((result.double() - self.norms).abs() / self.norms).max()

    def _error_of_dot(self, result: Tensor) -> Tensor:
        """The direction's entries have size 1, so a dot product has the size of the row's norm."""
        return ((result.double() - self.dot).abs() / self.norms).max()

    def _error_of_clipped(self, result: Gradients) -> Tensor:
        return _distance(result, self.clipped)

    def _error_of_gram(self, result: Tensor) -> Tensor:
        scale = self.norms[:, None] * self.norms[list(self.sampled)]
        return ((result.double()[:, list(self.sampled)] - self.gram).abs() / scale).max()

    def _error_of_rows(self, result: Gradients) -> Tensor:
        """The sampled rows in full, and the norm of every row."""
        sq_norms = torch.stack([torch.linalg.vector_norm(r.flatten(1), dim=1).double() ** 2 for r in result.values()])
        errors = [self._error_of_norms(sq_norms.sum(0).sqrt())]
        for j, row in zip(self.sampled, self.rows, strict=True):
            errors.append(_distance({name: r[j] for name, r in result.items()}, row))
        return torch.stack(errors).max()


def _distance(found: Gradients, true: Gradients) -> Tensor:
    off = torch.stack([torch.linalg.vector_norm(found[name].double() - g) for name, g in true.items()]).norm()
    return off / torch.stack([torch.linalg.vector_norm(g) for g in true.values()]).norm()


def make_reference(task: Task) -> Reference:
    """Clipping is at the median norm, so that it matters for half of the examples."""
    task = copy.deepcopy(task).to(torch.float64)
    model, params, (inputs, targets) = task.model, task.params(), task.batch

    def row(j: int) -> dict[str, Tensor]:
        losses = task.loss(model(inputs[j : j + 1]), targets[j : j + 1])
        return dict(zip(params, torch.autograd.grad(losses.sum(), list(params.values())), strict=True))

    sampled = tuple(sorted({0, len(task) - 1}))
    rows = [row(j) for j in sampled]
    direction = Goal(1.0).direction(params)
    norms = torch.stack([_dot(r, r).sqrt() for r in map(row, range(len(task)))])
    goal = Goal(float(norms.median()))
    dots, columns = [], []
    clipped = {name: torch.zeros_like(p) for name, p in params.items()}
    for j, weight in enumerate(goal.weights(norms.square())):
        gradients = row(j)
        dots.append(_dot(gradients, direction))
        columns.append(torch.stack([_dot(gradients, r) for r in rows]))
        for name, g in gradients.items():
            clipped[name].add_(g, alpha=float(weight))
    return Reference(goal, norms, torch.stack(dots), clipped, sampled, rows, torch.stack(columns))


def _dot(a: Gradients, b: Gradients) -> Tensor:
    return torch.stack([g.flatten() @ b[name].flatten() for name, g in a.items()]).sum()
