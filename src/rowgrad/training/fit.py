"""Train a model on a table by a recipe: held-out data, early stopping, checkpoints that go on bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowgrad.checking.gradients import check_gradients
from rowgrad.data.preparation import Preparation, prepare, prepare_steps, steps_of
from rowgrad.data.table import Table
from rowgrad.diagnosis.examine import diagnose
from rowgrad.diagnosis.history import Seen
from rowgrad.diagnosis.monitor import Monitor
from rowgrad.errors import DivergedError, InputError, NonFiniteError, RowgradError
from rowgrad.layers.initialization import initialize
from rowgrad.layers.pretraining import pretrain
from rowgrad.optim.clipping import GradientClip
from rowgrad.optim.factory import SECOND_ORDER, make
from rowgrad.optim.rates import decay
from rowgrad.training.architectures import Form, SequenceReader, build
from rowgrad.training.checkpoint import load_state, save_state
from rowgrad.training.loop import Loop, seed_of
from rowgrad.training.recipe import Recipe, differences
from rowgrad.training.step import Criterion, label_losses, squared_losses

CHECKPOINT, MONITOR = "checkpoint.safetensors", "monitor.jsonl"
CHECKED, N_ENTRIES = 16, 20  # examples and entries of a gradient check
EVALUATED = 4096  # examples at a time
SPLIT, WEIGHTS = 2, 3  # uses of the run's seed, beside the two of `Loop`


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training part came to.

    Attributes:
        number: from 1.
        train_loss: mean of the losses as they were when each example was used.
        val_loss, val_score: mean loss and accuracy (or R^2) on the part held out; None without one.
        lr: rate of the first group in this epoch.
        clipped: share of the steps so far in which the gradient was clipped; None without clipping.
        seconds: it took.
    """

    number: int
    train_loss: float
    val_loss: float | None
    val_score: float | None
    lr: float
    clipped: float | None
    seconds: float


@dataclass(frozen=True)
class Problem:
    """Examples as a model takes them, in two parts; targets of a regression are (target - center) / scale."""

    prepared: Preparation
    inputs: Tensor
    targets: Tensor
    train: Tensor
    val: Tensor
    shape: tuple[int, ...]
    classes: tuple[str, ...] | None
    center: float
    scale: float
    lengths: Tensor | None = None

    def given(self, index: Tensor) -> tuple[Tensor, ...]:
        """What a model gets for these examples: inputs, and lengths where they are sequences."""
        return (self.inputs[index],) if self.lengths is None else (self.inputs[index], self.lengths[index])

    @property
    def criterion(self) -> Criterion:
        return squared_losses if self.classes is None else label_losses


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
    """

    recipe: Recipe
    problem: Problem
    model: nn.Module
    monitor: Monitor | None = None
    epochs: list[Epoch] = field(default_factory=list)
    best: int = 0
    stopped: str = ""


def split(table: Table, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Positions of the training part and of the part held out, both ascending."""
    generator = torch.Generator().manual_seed(seed_of(recipe.seed, SPLIT))
    order = torch.randperm(len(table), generator=generator)
    n_val = round(recipe.val * len(table))
    if len(table) - n_val < 2:
        raise InputError(
            f"{table.name}: {len(table) - n_val} of {len(table)} examples are left to train on; lower --val"
        )
    return order[n_val:].sort().values, order[:n_val].sort().values


def pose(table: Table, recipe: Recipe, parts: tuple[Tensor, Tensor] | None = None) -> Problem:
    """Split, if the parts are not given, and prepare; everything fitted is fitted on the training part."""
    train, val = split(table, recipe) if parts is None else parts
    if table.steps is not None and table.lengths is not None:
        prepared = prepare_steps(table.features[train], table.steps, table.lengths[train], recipe.prepare)
        inputs = steps_of(prepared(table.features), table.steps, table.lengths)
        shape: tuple[int, ...] = table.steps
    else:
        prepared = prepare(table.features[train], recipe.prepare)
        inputs = prepared(table.features)
        shape = (inputs.shape[1],)
    if table.images is not None and recipe.prepare != "whiten":
        image = table.images[..., None] if table.images.ndim == 3 else table.images
        shape = (image.shape[3], image.shape[1], image.shape[2])
        inputs = inputs.view(len(inputs), *shape[1:], shape[0]).movedim(-1, 1).contiguous()
    if table.classes is not None:
        return Problem(prepared, inputs, table.targets, train, val, shape, table.classes, 0.0, 1.0, table.lengths)
    center, scale = float(table.targets[train].mean()), float(table.targets[train].std(correction=0))
    if scale == 0:
        raise InputError(
            f"{table.name}: the target is {center:g} in all of the training part; there is nothing to learn"
        )
    return Problem(prepared, inputs, ((table.targets - center) / scale).float(), train, val, shape, None, center, scale)


def model_for(problem: Problem, recipe: Recipe) -> nn.Module:
    """The model of a recipe, drawn by its seed; no global random state changes."""
    n_outputs = 1 if problem.classes is None else len(problem.classes)
    form = Form(problem.shape, n_outputs, recipe.act, recipe.alpha, recipe.norm, recipe.dropout)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(recipe.seed, WEIGHTS))
        model = build(recipe.model, form)
        if recipe.init == "pretrain":
            if not isinstance(model, nn.Sequential) or not recipe.model.startswith("mlp"):
                raise InputError(f"--init pretrain is for mlp, not for --model {recipe.model}")
            pretrain(model, problem.inputs[problem.train])
        elif recipe.init is not None:
            initialize(model, recipe.init)
    return model


def fit(
    table: Table,
    recipe: Recipe | None = None,
    *,
    directory: Path | None = None,
    resume: bool = False,
    monitor: int = 0,
    check_grad: int = 0,
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
        progress: called after every step with the steps done and the most there will be.
        parts: positions of the training part and of the part held out; None splits by the recipe.
        judge: called after every epoch with it and what the monitor has found so far; what it returns, if anything, is
            why training stops there.
    Raises:
        InputError: options that do not fit the data, or a checkpoint of another run.
        DivergedError: a loss that is not finite, with what `rowgrad.diagnose` finds; the checkpoint is that of the last
            good epoch.
    """
    recipe = recipe or Recipe()
    if recipe.optimizer in SECOND_ORDER:
        raise InputError(f"--optimizer {recipe.optimizer} takes the loss as a function; train with one of first order")
    if recipe.model.startswith("autoencoder"):
        raise InputError("--model autoencoder learns its inputs, not a target; use rowgrad.layers.pretrain")
    problem = pose(table, recipe, parts)
    run = _Run(recipe, problem, directory)
    run.judge = judge
    run.checked = {round(k * recipe.epochs / check_grad) for k in range(check_grad)}
    if resume and directory is not None and (directory / CHECKPOINT).exists():
        run.load(load_state(directory / CHECKPOINT))
    if monitor:
        run.watch(monitor)
    run.train(progress)
    return run.fitted()


class _Run:
    """One training, from the first step to the last."""

    def __init__(self, recipe: Recipe, problem: Problem, directory: Path | None) -> None:
        self.recipe, self.problem, self.directory = recipe, problem, directory
        self.model = model_for(problem, recipe)
        options = {} if recipe.l2 == 0 else {"weight_decay": recipe.l2}
        optimizer = make(recipe.optimizer, self.model, recipe.rate, **options)
        schedule = None if recipe.decay is None else decay(optimizer, recipe.decay, recipe.decay_rate)
        self.clips = [
            GradientClip(self.model, bound, mode)
            for bound, mode in ((recipe.clip_value, "value"), (recipe.clip_norm, "norm"))
            if bound is not None
        ]
        n = len(problem.train)
        size = recipe.batch_size_for(n)
        self.loop = Loop(self.model, optimizer, self._losses, n, size, recipe.seed, schedule, between=self._clip)
        self.epochs: list[Epoch] = []
        self.best: dict[str, Any] | None = None
        self.best_epoch, self.stopped = 0, ""
        self.checked: set[int] = set()
        self.monitor: Monitor | None = None
        self.judge: Judge = lambda epoch, findings: None

    def watch(self, every: int) -> None:
        log = None if self.directory is None else self.directory / MONITOR
        self.monitor = Monitor(self.model, self.loop.optimizer, every=every, log=log)
        self.monitor.step = self.loop.step
        self.loop.before, self.loop.after = self.monitor.observe, self.monitor.update

    def _losses(self, index: Tensor) -> Tensor:
        chosen = self.problem.train[index]
        outputs = called(self.model, self.problem.given(chosen))
        return self.problem.criterion(outputs, self.problem.targets[chosen])

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
        rate = float(self.loop.optimizer.param_groups[0]["lr"])
        try:
            for found in self.loop.run(self.loop.epoch + 1):
                losses.append(found)
                progress(self.loop.step, total)
        except NonFiniteError as error:
            raise DivergedError(self._diverged(error)) from error
        val_loss, val_score = self._validated()
        clipped = max((clip.share for clip in self.clips), default=None)
        mean = float(torch.cat(losses).double().mean())
        seconds = time.perf_counter() - start
        self.epochs.append(Epoch(self.loop.epoch, mean, val_loss, val_score, rate, clipped, seconds))

    def _check(self) -> None:
        loop = self.loop
        index = loop.order(loop.epoch)[: min(loop.batch_size, CHECKED)]
        report = check_gradients(lambda: self._losses(index), self.model, N_ENTRIES)
        if not report.ok:
            raise InputError(f"before epoch {loop.epoch + 1} the gradients are wrong: {report}")

    def _diverged(self, error: Exception) -> str:
        """The message, with what the diagnosis finds on the batch of the step that was not taken."""
        loop = self.loop
        k = loop.step % loop.steps_per_epoch
        index = loop.order(loop.epoch)[k * loop.batch_size : (k + 1) * loop.batch_size]
        try:
            findings = diagnose(self._losses(index), self.model).findings
            said = "; ".join(f"{f.kind} at {f.where}: {f.evidence}. {f.remedy}" for f in findings[:1])
        except RowgradError:
            said = ""
        kept = "" if self.directory is None else f" The checkpoint of epoch {loop.epoch} is kept."
        return f"training diverged at {error}. {said or 'Lower --lr, or clip with --clip-norm'}.{kept}"

    def _validated(self) -> tuple[float | None, float | None]:
        problem = self.problem
        if len(problem.val) == 0:
            return None, None
        outputs = outputs_of(self.model, *problem.given(problem.val))
        targets = problem.targets[problem.val]
        loss = float(problem.criterion(outputs, targets).double().mean())
        return loss, score(outputs, targets, problem.classes is not None)

    def _keep_best(self) -> None:
        """Keep the weights of the best epoch; stop after too many that are no better."""
        now = self.epochs[-1]
        if now.val_loss is None:
            return
        earlier = [e.val_loss for e in self.epochs[:-1] if e.val_loss is not None]
        if now.val_loss < min(earlier, default=float("inf")):
            self.best = {name: t.clone() for name, t in self.model.state_dict().items()}
            self.best_epoch = now.number
        elif self.recipe.patience and now.number - self.best_epoch >= self.recipe.patience:
            self.stopped = f"no better validation loss in {self.recipe.patience} epochs"

    def fitted(self) -> Fitted:
        if self.best is not None:
            self.model.load_state_dict(self.best)
        best = self.best_epoch or self.loop.epoch
        return Fitted(self.recipe, self.problem, self.model.eval(), self.monitor, self.epochs, best, self.stopped)

    def state(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_dict(),
            "loop": self.loop.state_dict(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": self.best,
            "best_epoch": self.best_epoch,
            "stopped": self.stopped,
        }

    def load(self, state: dict[str, Any]) -> None:
        before = Recipe(**state["recipe"])
        changed = [d for d in differences(before, self.recipe) if not d.startswith("--epochs ")]
        if changed:
            raise InputError(
                f"{(self.directory or Path()) / CHECKPOINT} is of another run: {', '.join(changed)}. Resume with the "
                "options of the first run (--epochs may grow), or choose another --out"
            )
        self.loop.load_state_dict(state["loop"])
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self.best, self.best_epoch, self.stopped = state["best"], state["best_epoch"], state["stopped"]


def called(model: nn.Module, given: Sequence[Tensor]) -> Tensor:
    """A model of inputs; only one that reads sequences is told their lengths."""
    return model(*given) if isinstance(model, SequenceReader) else model(given[0])


@torch.no_grad()
def outputs_of(model: nn.Module, *given: Tensor) -> Tensor:
    """In evaluation mode, some thousand examples at a time; the model's mode is put back."""
    was = model.training
    model.eval()
    try:
        return torch.cat([called(model, part) for part in zip(*(g.split(EVALUATED) for g in given), strict=True)])
    finally:
        model.train(was)


def score(outputs: Tensor, targets: Tensor, is_classes: bool) -> float:
    """Accuracy, or R^2 (nan where the targets are all equal)."""
    if is_classes:
        return float((outputs.argmax(1) == targets).double().mean())
    residual = F.mse_loss(outputs[:, 0].double(), targets.double(), reduction="sum")
    spread = (targets.double() - targets.double().mean()).square().sum()
    return float(1 - residual / spread) if float(spread) > 0 else float("nan")
