"""What the rows cost, measured beside plain training."""

import copy
import statistics
import time
from dataclasses import dataclass

import torch

from rowgrad.training.step import Step, Trainee
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
    trainee: Trainee,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    n_classes: int | None,
    *,
    batch_size: int,
    generator: torch.Generator,
    n_steps: int = 40,
    n_warm: int = 5,
) -> Cost:
    """Time the three kinds of step in turn on the same random batches, each on its own copy of `trainee`."""
    audit = Audit(len(targets), n_classes)
    seconds: dict[str, list[float]] = {"plain": [], "rows": [], "audit": []}
    trainees = {kind: copy.deepcopy(trainee) for kind in seconds}  # the copy of the optimizer drives the copied model
    for trial in range(n_warm + n_steps):
        index = torch.randperm(len(targets), generator=generator)[:batch_size]
        for kind, copied in trainees.items():
            start = time.perf_counter()
            if kind == "plain":
                copied.plain_step(inputs[index], targets[index])
            else:
                step = copied.step_with_rows(inputs[index], targets[index])
                if kind == "audit":
                    update(audit, index, step, targets[index])
            if trial >= n_warm:
                seconds[kind].append(time.perf_counter() - start)
    plain, rows, audited = (statistics.median(times) for times in seconds.values())
    return Cost(plain, rows, audited, n_steps, batch_size)


def update(audit: Audit, index: torch.Tensor, step: Step, targets: torch.Tensor) -> None:
    """Hand what a step computed to the audit."""
    labels = {} if audit.n_classes is None else {"logits": step.outputs, "labels": targets}
    audit.update(index, losses=step.losses, norms=step.norms, **labels)
