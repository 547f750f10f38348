"""What the rows cost, measured beside plain training."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from rowgrad.training.step import Criterion, plain_step, step_with_rows
from rowgrad.uses.audit import Audit


@dataclass(frozen=True)
class Cost:
    """Median seconds of a training step: plain, with rows, and with rows and the audit's bookkeeping.

    n_steps: timed steps of each kind, alternating on the same batches.
    """

    plain_seconds: float
    rows_seconds: float
    audit_seconds: float
    n_steps: int
    batch_size: int

    @property
    def rows_ratio(self) -> float:
        """Time of a step with rows over that of a plain step."""
        return self.rows_seconds / self.plain_seconds

    @property
    def audit_ratio(self) -> float:
        """Time of an audited step over that of a plain step."""
        return self.audit_seconds / self.plain_seconds


def measure_cost(
    model: nn.Module,
    criterion: Criterion,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    n_classes: int | None,
    *,
    lr: float,
    batch_size: int,
    generator: torch.Generator,
    n_steps: int = 40,
    n_warm: int = 5,
) -> Cost:
    """Time the three kinds of step in turn on the same random batches, each on its own copy of `model`."""
    audit = Audit(len(targets), n_classes)

    def audited(model, optimizer, criterion, batch_inputs, batch_targets) -> None:
        step = step_with_rows(model, optimizer, criterion, batch_inputs, batch_targets)
        outputs = {"logits": step.outputs, "labels": batch_targets} if n_classes is not None else {}
        audit.update(index, losses=step.losses, norms=step.norms, **outputs)

    kinds: list[Callable] = [plain_step, step_with_rows, audited]
    copies = [copy.deepcopy(model) for _ in kinds]
    optimizers = [torch.optim.Adam(copied.parameters(), lr=lr) for copied in copies]
    seconds: list[list[float]] = [[] for _ in kinds]
    for trial in range(n_warm + n_steps):
        index = torch.randperm(len(targets), generator=generator)[:batch_size]
        batch = inputs[index], targets[index]
        for kind, copied, optimizer, times in zip(kinds, copies, optimizers, seconds, strict=True):
            start = time.perf_counter()
            kind(copied, optimizer, criterion, *batch)
            if trial >= n_warm:
                times.append(time.perf_counter() - start)
    plain, rows, audited_seconds = (statistics.median(times) for times in seconds)
    return Cost(plain, rows, audited_seconds, n_steps, batch_size)
