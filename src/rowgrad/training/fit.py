"""Train a model on a table by a recipe: held-out data, early stopping, checkpoints that go on bit for bit."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rowgrad.checking.gradients import check_gradients
from rowgrad.data.table import Table
from rowgrad.diagnosis.examine import diagnose
from rowgrad.diagnosis.history import Seen
from rowgrad.diagnosis.monitor import Monitor
from rowgrad.errors import DivergedError, InputError, NonFiniteError, RowgradError, RowgradWarning
from rowgrad.layers.batchnorm import population_statistics
from rowgrad.optim.clipping import GradientClip
from rowgrad.optim.factory import make
from rowgrad.optim.first_order import Marble
from rowgrad.optim.rates import decay, weight_groups
from rowgrad.rows.build import grad_norms
from rowgrad.training.checkpoint import load_state, save_state
from rowgrad.training.loop import Loop
from rowgrad.training.problem import EVALUATED, Problem, called, model_for, outputs_of, pose
from rowgrad.training.recipe import Recipe, differences
from rowgrad.uses.audit import Audit
from rowgrad.uses.scores import AuditScores

CHECKPOINT, MONITOR = "checkpoint.safetensors", "monitor.jsonl"
UNSAID = ("params", "weight_decay")  # weight decay is --l2, for weights alone
MATRICES = {
    "newton": 2_000,
    "bfgs": 10_000,
    "gauss-newton": 10_000,
}  # rows at most; Newton's is split into eigenvectors
LEARNED = 1e-4  # mean loss below which float32 leaves too few digits of a gradient to check
CHECKED, N_ENTRIES = 16, 20  # examples and entries of a gradient check


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training part came to.

    Attributes:
        number: from 1.
        train_loss: mean of the losses as they were when each example was used.
        val_loss, val_score: mean loss and accuracy (or R^2) on the part held out; None without one.
        lr: rate in this epoch; None where the optimizer has none.
        clipped: share of the steps so far in which the gradient was clipped; None without clipping.
        seconds: it took.
    """

    number: int
    train_loss: float
    val_loss: float | None
    val_score: float | None
    lr: float | None
    clipped: float | None
    seconds: float


Judge = Callable[[Epoch, tuple[Seen, ...]], str | None]


@dataclass
class Fitted:
    """A trained model with all that is needed to use it again.

    Attributes:
        recipe: as given.
        problem: the data as they were split and prepared.
        monitor: what watched the training, if asked for.
        model: with the weights of the best epoch on the part held out, or of the last without one; in evaluation mode.
        epochs: one for each pass, in order.
        best: number of the epoch whose weights the model has.
        stopped: why training ended.
        scores: of the training part in its order, where it was audited.
        checks: what each check of the gradients came to.
        resolved: what the recipe left open, as it was used: batch size, options of the optimizer, number of parameters.
    """

    recipe: Recipe
    problem: Problem
    model: nn.Module
    monitor: Monitor | None = None
    epochs: list[Epoch] = field(default_factory=list)
    best: int = 0
    stopped: str = ""
    resolved: dict[str, Any] = field(default_factory=dict)
    scores: AuditScores | None = None
    checks: tuple[str, ...] = ()


def fit(
    table: Table,
    recipe: Recipe | None = None,
    *,
    directory: Path | None = None,
    resume: bool = False,
    monitor: int = 0,
    check_grad: int = 0,
    audit: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    parts: tuple[Tensor, Tensor] | None = None,
    judge: Judge = lambda epoch, findings: None,
) -> Fitted:
    """Train on a table.

    The same table and recipe give the same weights, bit for bit, also if the run is stopped anywhere and resumed.

    Args:
        table: what to learn.
        recipe: how; default `Recipe()`.
        directory: where a checkpoint is kept, replaced whole after each epoch; None keeps none.
        resume: go on from the checkpoint in `directory`, if there is one.
        monitor: steps from one observation by `rowgrad.Monitor` to the next, logged to `directory`; 0 for none.
        check_grad: epochs before which gradients are compared with differences of the loss, spread over the training.
        audit: score the training examples by their course through this training, see `rowgrad.Audit`; the weights are
            the same without. It takes each example's gradient norm in every step.
        progress: called after every step with the steps done and the most there will be.
        parts: positions of the training part and of the part held out; None splits by the recipe.
        judge: called after every epoch with it and what the monitor has found so far; what it returns, if anything, is
            why training stops there.
    Raises:
        InputError: options that do not fit the data, or a checkpoint of another run.
        DivergedError: a loss that is not finite, with what `rowgrad.diagnose` finds; the checkpoint is that of the last
            good epoch, and `fitted` is what came of the good ones.
    Warns:
        RowgradWarning: an audit with batch normalization, which costs a backward pass for each example.
    """
    recipe = recipe or Recipe()
    problem = pose(table, recipe, parts)
    if check_grad > recipe.epochs:
        raise InputError(f"--check-grad {check_grad}: at most once before each of --epochs {recipe.epochs}")
    run = _Run(recipe, problem, directory)
    run.judge = judge
    run.checked = {round(k * recipe.epochs / check_grad) for k in range(check_grad)}
    if audit:
        run.follow()
    if resume and directory is not None and (directory / CHECKPOINT).exists():
        run.load(load_state(directory / CHECKPOINT))
    if monitor:
        run.watch(monitor)
    try:
        run.train(progress)
    except DivergedError as error:
        run.stopped = f"epoch {len(run.epochs) + 1} diverged"
        error.fitted = run.fitted() if run.epochs else None
        raise
    return run.fitted()


def digest(*tensors: Tensor) -> str:
    """What tells these values from others."""
    found = hashlib.blake2b(digest_size=16)
    for t in tensors:
        found.update(t.contiguous().numpy().tobytes())
    return found.hexdigest()


def optimizer_for(model: nn.Module, recipe: Recipe, batch_size: int) -> torch.optim.Optimizer:
    """The optimizer of a recipe.

    Raises:
        InputError: its options are not those it has, or it would need a matrix too large for this model or batch.
    """
    name, size = recipe.optimizer, sum(p.numel() for p in model.parameters())
    most = MATRICES.get(name, size)
    if name == "gauss-newton" and batch_size > most:
        raise InputError(
            f"--optimizer gauss-newton: a step of {batch_size:,} examples needs a matrix of their squared number, "
            f"which is formed for at most {most:,}; give --batch-size"
        )
    if name != "gauss-newton" and size > most:
        raise InputError(
            f"--optimizer {name}: the model has {size:,} parameters, and a matrix of their squared number is formed "
            f"for at most {most:,}; use --optimizer conjugate-gradient or lbfgs, which form none"
        )
    options = dict(recipe.optimizer_options)
    if name == "lbfgs":
        options = {"n": 1} | options  # an epoch is one step, as for the others
    if recipe.l2 and not recipe.is_second_order:
        options["weight_decay"] = recipe.l2
    return make(name, model, recipe.rate, **options)


class _Run:
    """One training, from the first step to the last."""

    def __init__(self, recipe: Recipe, problem: Problem, directory: Path | None) -> None:
        self.recipe, self.problem, self.directory = recipe, problem, directory
        self.model = model_for(problem, recipe)
        n = len(problem.train)
        size = recipe.batch_size_for(n)
        optimizer = optimizer_for(self.model, recipe, size)
        schedule = None if recipe.decay is None else decay(optimizer, recipe.decay, recipe.decay_rate)
        self.clips = [
            GradientClip(self.model, bound, mode)
            for bound, mode in ((recipe.clip_value, "value"), (recipe.clip_norm, recipe.clip_mode))
            if bound is not None
        ]
        self.loop = Loop(self.model, optimizer, self._losses, n, size, recipe.seed, schedule, between=self._clip)
        if recipe.is_second_order:
            self.loop.objective = self._objective
        self.data = digest(problem.inputs, problem.targets)
        self.epochs: list[Epoch] = []
        self.best: dict[str, Any] | None = None
        self.best_epoch, self.stopped = 0, ""
        self.checked: set[int] = set()
        self.checks: list[str] = []
        self.monitor: Monitor | None = None
        self.judge: Judge = lambda epoch, findings: None
        self.audit: Audit | None = None
        self.loop.before = self._observe
        self.seen: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def follow(self) -> None:
        classes = self.problem.classes
        self.audit = Audit(self.loop.n, None if classes is None else len(classes))
        if self.recipe.has_batch_norm:
            warnings.warn(
                f"--audit with --norm {self.recipe.norm}: the examples of a batch are coupled, so that each one's "
                "gradient is a backward pass of its own, exact and slow; --norm layer couples none",
                RowgradWarning,
                stacklevel=3,
            )

    def watch(self, every: int) -> None:
        log = None if self.directory is None else self.directory / MONITOR
        self.monitor = Monitor(self.model, self.loop.optimizer, every=every, log=log)
        self.monitor.step = self.loop.step
        self.loop.after = self.monitor.update

    def _observe(self, losses: Tensor) -> None:
        """Before a step: hand the audit and the monitor what there is to see; the graph stays for the step."""
        if self.audit is not None:
            index, outputs = self.seen
            rate = self.loop.optimizer.param_groups[0].get("lr", 1.0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RowgradWarning)  # told once, by `follow`
                norms = grad_norms(losses, self.model, retain_graph=True)
            labels = self.problem.targets[self.problem.train[index]]
            given = {} if self.problem.classes is None else {"logits": outputs, "labels": labels}
            self.audit.update(index, losses=losses, norms=norms, lr=float(rate), **given)
        if self.monitor is not None:
            self.monitor.observe(losses)

    def _losses(self, index: Tensor) -> Tensor:
        chosen = self.problem.train[index]
        outputs = called(self.model, self.problem.given(chosen))
        self.seen = index, outputs.detach()
        return self.problem.criterion(outputs, self.problem.targets[chosen])

    def _objective(self, index: Tensor) -> Tensor:
        """What an optimizer of second order makes small: the mean loss with the penalty, or for Gauss-Newton each
        example's."""
        losses, l2 = self._losses(index), self.recipe.l2
        for group in weight_groups(self.model, l2):
            for _, p in group["params"]:
                losses = losses + group["weight_decay"] / 2 * p.square().sum()
        return losses if self.recipe.optimizer == "gauss-newton" else losses.mean()

    def _clip(self) -> None:
        for clip in self.clips:
            clip()

    def train(self, progress: Callable[[int, int], None]) -> None:
        total = self.recipe.epochs * self.loop.steps_per_epoch
        while self.loop.epoch < self.recipe.epochs and not self.stopped:
            self._epoch(progress, total)
            self._keep_best()
            findings = () if self.monitor is None else self.monitor.findings
            self.stopped = self.judge(self.epochs[-1], findings) or self.stopped
            if self.directory is not None:
                save_state(self.directory / CHECKPOINT, self.state())
        self.stopped = self.stopped or f"all {self.recipe.epochs} epochs are done"

    def _epoch(self, progress: Callable[[int, int], None], total: int) -> None:
        if self.loop.epoch in self.checked:
            self._check()
        start, losses = time.perf_counter(), []
        rate = self.loop.optimizer.param_groups[0].get("lr")
        try:
            for found in self.loop.run(self.loop.epoch + 1):
                losses.append(found)
                progress(self.loop.step, total)
        except NonFiniteError as error:
            raise DivergedError(self._diverged(error)) from error
        with self._at_weights():
            if self.recipe.bn_statistics == "population":
                self._take_statistics()
            val_loss, val_score = self._validated()
        clipped = max((clip.share for clip in self.clips), default=None)
        mean = float(torch.cat(losses).double().mean())
        seconds = time.perf_counter() - start
        self.epochs.append(Epoch(self.loop.epoch, mean, val_loss, val_score, rate, clipped, seconds))

    def _at_weights(self) -> AbstractContextManager[None]:
        """The model at its weights, where Nesterov's momentum has it stand ahead of them between steps."""
        optimizer = self.loop.optimizer
        return optimizer.at_weights() if isinstance(optimizer, Marble) else nullcontext()

    def _weights(self) -> dict[str, Tensor]:
        with self._at_weights():
            return {name: t.clone() for name, t in self.model.state_dict().items()}

    def _take_statistics(self) -> None:
        """Give batch normalization the statistics of the whole training part."""
        problem = self.problem
        population_statistics(
            self.model, problem.train.split(EVALUATED), forward=lambda index: called(self.model, problem.given(index))
        )

    def _check(self) -> None:
        loop = self.loop
        index = loop.order(loop.epoch)[: min(loop.batch_size, CHECKED)]
        when = f"before epoch {loop.epoch + 1}"
        chosen = self.problem.train[index]
        outputs = outputs_of(self.model, *self.problem.given(chosen))
        loss = float(self.problem.criterion(outputs, self.problem.targets[chosen]).mean())
        if loss < LEARNED:
            self.checks.append(f"{when} not checked: with a loss of {loss:.2g} gradients are rounding")
            return
        report = check_gradients(lambda: self._losses(index), self.model, N_ENTRIES)
        if not report.ok:
            raise InputError(f"{when} the gradients are wrong:\n{report}")
        self.checks.append(f"{when} right")

    def _diverged(self, error: Exception) -> str:
        """The message, with what the diagnosis finds on the batch of the step that was not taken."""
        loop = self.loop
        index = loop.batch(loop.order(loop.epoch), loop.step % loop.steps_per_epoch)
        try:
            findings = diagnose(self._losses(index), self.model).findings
            said = "".join(f"{f.kind}, {f.where}: {f.evidence}. {f.remedy}." for f in findings[:1])
        except RowgradError:
            said = ""
        advice = "Lower --lr, or clip with --clip-norm." if not self.recipe.is_second_order else ""
        kept = "" if self.directory is None or loop.epoch == 0 else f" The checkpoint of epoch {loop.epoch} is kept."
        return " ".join(part for part in (f"training diverged: {error}.", advice, said, kept.strip()) if part)

    def _validated(self) -> tuple[float | None, float | None]:
        problem = self.problem
        if len(problem.val) == 0:
            return None, None
        outputs = outputs_of(self.model, *problem.given(problem.val))
        targets = problem.targets[problem.val]
        loss = float(problem.criterion(outputs, targets).double().mean())
        return loss, problem.score(outputs, targets)

    def _keep_best(self) -> None:
        """Keep the weights of the best epoch; stop after too many that are no better."""
        now = self.epochs[-1]
        if now.val_loss is None:
            return
        earlier = [e.val_loss for e in self.epochs[:-1] if e.val_loss is not None and isfinite(e.val_loss)]
        if now.val_loss < min(earlier, default=float("inf")):
            self.best = self._weights()
            self.best_epoch = now.number
        elif self.recipe.patience and now.number - self.best_epoch >= self.recipe.patience:
            self.stopped = f"no better validation loss in {self.recipe.patience} epochs"

    def fitted(self) -> Fitted:
        self.model.load_state_dict(self._weights() if self.best is None else self.best)
        best = self.best_epoch or self.loop.epoch
        model = self.model.eval()
        scores = None if self.audit is None else self.audit.compute()
        return Fitted(
            self.recipe,
            self.problem,
            model,
            self.monitor,
            self.epochs,
            best,
            self.stopped,
            self.resolved(),
            scores,
            tuple(self.checks),
        )

    def resolved(self) -> dict[str, Any]:
        optimizer = self.loop.optimizer
        return {
            "lr": self.epochs[0].lr,
            "batch_size": self.loop.batch_size,
            "full_batch": self.loop.batch_size == self.loop.n,
            "steps_per_epoch": self.loop.steps_per_epoch,
            "optimizer": type(optimizer).__name__,
            "optimizer_options": {name: value for name, value in optimizer.defaults.items() if name not in UNSAID},
            "n_parameters": sum(p.numel() for p in self.model.parameters()),
            "n_inputs": self.problem.prepared.n_outputs,
            "gradient_checks": self.checks,
        }

    def state(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_dict(),
            "loop": self.loop.state_dict(),
            "audit": None if self.audit is None else self.audit.state_dict(),
            "data": self.data,
            "clips": [clip.state_dict() for clip in self.clips],
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": self.best,
            "best_epoch": self.best_epoch,
            "stopped": self.stopped,
            "checks": self.checks,
        }

    def load(self, state: dict[str, Any]) -> None:
        before = Recipe(**state["recipe"])
        changed = [d for d in differences(before, self.recipe) if not d.startswith("--epochs ")]
        if (state["audit"] is None) is not (self.audit is None):
            changed.append("no --audit" if self.audit is None else "--audit instead of none")
        if changed:
            raise InputError(
                f"{(self.directory or Path()) / CHECKPOINT} is of another run: {', '.join(changed)}. Resume with the "
                "options of the first run (--epochs may grow), or choose another --out"
            )
        if len(state["epochs"]) > self.recipe.epochs:
            raise InputError(
                f"--epochs {self.recipe.epochs}: the run in {self.directory} has done {len(state['epochs'])}; name as "
                "many or more"
            )
        self.loop.load_state_dict(state["loop"])
        if state["data"] != self.data:
            raise InputError(
                f"the checkpoint in {self.directory} is of a run on other examples; resume with the data of the first "
                "run, or choose another --out"
            )
        if self.audit is not None:
            self.audit.load_state_dict(state["audit"])
        for clip, record in zip(self.clips, state["clips"], strict=True):
            clip.load_state_dict(record)
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self.best, self.best_epoch, self.stopped = state["best"], state["best_epoch"], state["stopped"]
        self.checks = list(state["checks"])
