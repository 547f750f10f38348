"""Mini-batch training that can be stopped anywhere and goes on bit for bit.

Note [no state of random numbers]
    Every step draws from a generator seeded by the run's seed and the step's number, every epoch orders the examples
    by one seeded by the epoch's. So the state of a run is its model, its optimizer, its schedule and the number of the
    step: nothing else has to be saved for a run that goes on to give the numbers it would have given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rowgrad.errors import InputError, NonFiniteError


def seed_of(*numbers: int) -> int:
    """A seed for one use among many of one run: the run's own, what it is for, and which of them."""
    digest = hashlib.blake2b(b"".join(n.to_bytes(8, "little") for n in numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63


@dataclass
class Loop:
    """Steps through the examples in batches, epoch after epoch.

    Attributes:
        model: in training mode during a step.
        optimizer: its `step()` needs no closure, unless there is an `objective`.
        losses: from the examples' positions, shape (B,), to their losses, shape (B,); the mean is descended.
        n: how many examples there are.
        batch_size: examples in a step; the last of an epoch may have fewer. A single one that would be left joins the
            batch before, since batch normalization has no variance of one.
        seed: of everything random.
        scheduler: stepped once at the end of each epoch, if there is one.
        before: called with the losses and their graph, before `backward()`.
        between: called after `backward()`, before the optimizer's step: clipping, for instance.
        after: called after the optimizer's step.
        objective: for an optimizer of second order: from the examples' positions to what its closure returns. Nothing
            is called `between` then.
        step: how many steps have been taken.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: Callable[[Tensor], Tensor]
    n: int
    batch_size: int
    seed: int = 0
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    before: Callable[[Tensor], object] = lambda losses: None
    between: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    objective: Callable[[Tensor], Tensor] | None = None
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch_size < 1:
            raise ValueError(f"n={self.n}, batch_size={self.batch_size}: expected at least 1 of both")

    @property
    def steps_per_epoch(self) -> int:
        left = self.n % self.batch_size
        return max(1, self.n // self.batch_size + (left > 1))

    @property
    def epoch(self) -> int:
        """How many epochs are complete."""
        return self.step // self.steps_per_epoch

    def order(self, epoch: int) -> Tensor:
        """The examples' positions in the order of this epoch."""
        return torch.randperm(self.n, generator=torch.Generator().manual_seed(seed_of(self.seed, 0, epoch)))

    def run(self, epochs: int) -> Iterator[Tensor]:
        """Take steps until this many epochs are complete; yields each step's losses, detached, in the batch's order.

        Raises:
            NonFiniteError: a loss is not finite; the step is not taken, so that the state is the one before it.
        """
        while self.epoch < epochs:
            order = self.order(self.epoch)
            for k in range(self.step % self.steps_per_epoch, self.steps_per_epoch):
                yield self._step(self.batch(order, k))

    def batch(self, order: Tensor, k: int) -> Tensor:
        """The positions in batch k of an epoch of this order."""
        end = self.n if k + 1 == self.steps_per_epoch else (k + 1) * self.batch_size
        return order[k * self.batch_size : end]

    def _step(self, index: Tensor) -> Tensor:
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed_of(self.seed, 1, self.step))
            self.model.train()
            losses = self.losses(index)
            found = losses.detach()
            if not found.isfinite().all():
                bad = int((~found.isfinite()).nonzero()[0])
                raise NonFiniteError(
                    f"step {self.step}: the loss of example {int(index[bad])} is {float(found[bad]):g}; the step was "
                    "not taken"
                )
            self.before(losses)
            if self.objective is None:
                self.optimizer.zero_grad()
                losses.mean().backward()
                self.between()
                self.optimizer.step()
            else:
                self._second_order(index, self.objective)
            self.after()
        self.step += 1
        if self.scheduler is not None and self.step % self.steps_per_epoch == 0:
            self.scheduler.step()
        return found

    def _second_order(self, index: Tensor, objective: Callable[[Tensor], Tensor]) -> None:
        try:
            self.optimizer.step(lambda: objective(index))  # type: ignore[arg-type]  a tensor, not a float
        except NonFiniteError as error:
            raise NonFiniteError(f"step {self.step}: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on, for `checkpoint.save_state`."""
        return {
            "step": self.step,
            "n": self.n,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            InputError: the state is of a run on other data, with another batch size or seed.
        """
        for name in ("n", "batch_size", "seed"):
            if state[name] != getattr(self, name):
                raise InputError(
                    f"the checkpoint is of a run with {name} {state[name]}, this one has {getattr(self, name)}; resume "
                    "with the data and settings of the first run"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]
