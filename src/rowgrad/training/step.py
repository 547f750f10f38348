"""One training step, with and without the rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from rowgrad.rows.build import jacobian

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """What one step computed, detached: outputs (B, K), losses (B,) and gradient norms (B,)."""

    outputs: torch.Tensor
    losses: torch.Tensor
    norms: torch.Tensor


def label_losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each example, in nats."""
    return F.cross_entropy(outputs, targets, reduction="none")


def squared_losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Half the squared error of each example."""
    return 0.5 * (outputs[:, 0] - targets).square()


def plain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: Criterion,
    inputs: torch.Tensor,
    targets: torch.Tensor,
) -> None:
    """A step of ordinary training on the mean loss."""
    optimizer.zero_grad(set_to_none=True)
    criterion(model(inputs), targets).mean().backward()
    optimizer.step()


def step_with_rows(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: Criterion,
    inputs: torch.Tensor,
    targets: torch.Tensor,
) -> Step:
    """The same step, which also gives each example's gradient norm before the update."""
    optimizer.zero_grad(set_to_none=True)
    outputs = model(inputs)
    losses = criterion(outputs, targets)
    rows = jacobian(losses, model)
    norms = rows.norms()
    rows.loss(1 / len(losses)).backward()
    optimizer.step()
    return Step(outputs.detach(), losses.detach(), norms)
