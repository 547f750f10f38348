"""One training step, with and without the rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from rowgrad.rows.build import jacobian

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """What one step computed, detached: outputs (B, K), losses (B,) and, where asked for, gradient norms (B,)."""

    outputs: torch.Tensor
    losses: torch.Tensor
    norms: torch.Tensor | None


def label_losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each example, in nats."""
    return F.cross_entropy(outputs, targets, reduction="none")


def squared_losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Half the squared error of each example."""
    return 0.5 * (outputs[:, 0] - targets).square()


def reconstruction_losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Half the mean squared error of each example over its features."""
    return 0.5 * (outputs - targets).square().mean(1)


@dataclass(frozen=True)
class Trainee:
    """A model with its optimizer and its loss per example."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    criterion: Criterion

    def plain_step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """A step of ordinary training on the mean loss."""
        self.optimizer.zero_grad()
        self.criterion(self.model(inputs), targets).mean().backward()
        self.optimizer.step()

    def seen_step(self, inputs: torch.Tensor, targets: torch.Tensor, *, norms: bool) -> Step:
        """The same step, which also gives what it computed before the update, and each example's gradient norm."""
        self.optimizer.zero_grad()
        outputs = self.model(inputs)
        losses = self.criterion(outputs, targets)
        found = None
        if norms:
            rows = jacobian(losses, self.model)
            found = cast(torch.Tensor, rows.norms())
            rows.loss(1 / len(losses)).backward()
        else:
            losses.mean().backward()
        self.optimizer.step()
        return Step(outputs.detach(), losses.detach(), found)
