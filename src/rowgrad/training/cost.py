"""What an audit costs, measured beside plain training."""

import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from rowgrad.errors import NonFiniteError
from rowgrad.training.step import Step, Trainee
from rowgrad.uses.audit import Audit


@dataclass(frozen=True)
class Cost:
    """Seconds of a training step: plain, with each example's gradient norm (None without), and with the audit too.

    Each is the lower quartile, the median and the upper quartile of n_steps steps; the kinds alternate on the same
    batches. It is processor time of the training thread: on a busy machine the time on the clock grows for long steps
    more than for short ones, and its ratio says little.
    """

    plain_seconds: tuple[float, ...]
    rows_seconds: tuple[float, ...] | None
    audit_seconds: tuple[float, ...]
    n_steps: int
    batch_size: int

    @property
    def rows_ratio(self) -> float | None:
        """Median time of a step with norms over that of a plain step."""
        return None if self.rows_seconds is None else self.rows_seconds[1] / self.plain_seconds[1]

    @property
    def audit_ratio(self) -> float:
        """Median time of an audited step over that of a plain step."""
        return self.audit_seconds[1] / self.plain_seconds[1]


def measure_cost(
    trainee: Trainee,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    n_classes: int | None,
    *,
    batch_size: int,
    generator: torch.Generator,
    norms: bool = True,
    n_steps: int = 40,
    n_warm: int = 5,
) -> Cost:
    """Time the kinds of step in turn on the same random batches, each on its own copy of `trainee`."""
    audit = Audit(len(targets), n_classes)
    fine = time.get_clock_info("thread_time").resolution < 1e-5  # on Windows it is a sixtieth of a second
    clock = time.thread_time if fine else time.perf_counter
    kinds = ("plain", "rows", "audit") if norms else ("plain", "audit")
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    trainees = {kind: copy.deepcopy(trainee) for kind in seconds}  # the copy of the optimizer drives the copied model
    for trial, index in enumerate(islice(_batches(len(targets), batch_size, generator), n_warm + n_steps)):
        for kind, copied in trainees.items():
            start = clock()
            if kind == "plain":
                copied.plain_step(inputs[index], targets[index])
            else:
                step = copied.seen_step(inputs[index], targets[index], norms=norms)
                if kind == "audit":
                    update(audit, index, step, targets[index])
            if trial >= n_warm:
                seconds[kind].append(clock() - start)
    quartiles = {kind: tuple(statistics.quantiles(times, n=4)) for kind, times in seconds.items()}
    return Cost(quartiles["plain"], quartiles.get("rows"), quartiles["audit"], n_steps, batch_size)


def _batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Full batches of epoch after epoch, each in a new order."""
    while True:
        yield from torch.randperm(n, generator=generator)[: n - n % batch_size].split(batch_size)


def update(audit: Audit, index: torch.Tensor, step: Step, targets: torch.Tensor, lr: float = 1.0) -> None:
    """Hand what a step computed to the audit.

    Raises:
        NonFiniteError: a loss or norm is inf or nan.
    """
    for name, values in (("loss", step.losses), ("gradient norm", step.norms)):
        if values is not None and not values.isfinite().all():
            raise NonFiniteError(f"a {name} is {float(values[~values.isfinite()][0]):g}")
    labels: dict[str, Any] = {} if audit.n_classes is None else {"logits": step.outputs, "labels": targets}
    audit.update(index, losses=step.losses, norms=step.norms, lr=lr, **labels)
