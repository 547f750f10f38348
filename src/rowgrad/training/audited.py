"""Train a model on a table and audit its examples in that same training."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from rowgrad.data.corrupt import flip_labels, permute_targets
from rowgrad.data.split import split_rows
from rowgrad.data.table import Table, standardize
from rowgrad.errors import InputError, NonFiniteError
from rowgrad.rows.build import jacobian
from rowgrad.training.cost import Cost, measure_cost, update
from rowgrad.training.mlp import adam, mlp
from rowgrad.training.settings import Settings
from rowgrad.training.step import Criterion, Trainee, label_losses, squared_losses
from rowgrad.uses.audit import Audit
from rowgrad.uses.noise import Noise, NoiseScale
from rowgrad.uses.scores import AuditScores
from rowgrad.uses.sections import class_conflict

UNEXPLAINED = 0.9  # share of the targets' spread that a regression leaves from which it learned next to nothing
N_COMPARED = 500  # examples whose gradients are compared in pairs


@dataclass(frozen=True)
class Epoch:
    """What one pass over the audited examples showed, each example measured just before the step that used it.

    median_norm, largest_norm: of the gradient norms; None without norms.
    accuracy: share whose most probable label is the given one; None for regression.
    noise_scale: the gradient noise scale in examples, over about the last hundred steps, and its standard error; None
        where undefined and without norms.
    """

    number: int
    mean_loss: float
    median_norm: float | None
    largest_norm: float | None
    accuracy: float | None
    noise_scale: float | None
    noise_scale_error: float | None
    seconds: float


@dataclass(frozen=True)
class AuditRun:
    """An audited training run on n of a table's N rows.

    rows: positions in the table of the audited examples, ascending, shape (n,); all else of shape (n,) follows them.
    given: the targets that were trained on; `planted` marks those that were corrupted on purpose (None: none were).
    scores: as computed by the audit.
    losses, norms: each example's loss and gradient norm in each epoch, shape (epochs, n); no norms if so asked.
    conflict: mean cosine between the gradients of two classes after the training, (K, K); None for regression.
    held_out: score on the rows that were not audited: accuracy, or R^2 for regression; None where all were audited.
    """

    table: Table
    settings: Settings
    batch_size: int
    flip: float
    rows: torch.Tensor
    given: torch.Tensor
    planted: torch.Tensor | None
    scores: AuditScores
    losses: torch.Tensor
    norms: torch.Tensor | None
    conflict: torch.Tensor | None
    epochs: tuple[Epoch, ...]
    held_out: float | None
    n_parameters: int
    cost: Cost
    seconds: float

    @property
    def doubt(self) -> str:
        """Why this training says little about its examples, in plain sentences; empty where nothing speaks against it.

        Of a regression: its losses, half the squared errors of standardized targets, fell hardly below 1/2.
        """
        left = min(1.0, 2 * self.epochs[-1].mean_loss)
        if self.table.classes is not None or left < UNEXPLAINED:
            return self.scores.doubt
        return (
            f"In the last epoch {left:.0%} of the target's spread was left unexplained. The network learned next to "
            "nothing, and large losses are those of unusual targets: train longer, or change the model or the learning "
            "rate."
        )


@dataclass(frozen=True)
class _Problem:
    """Examples as the model takes them, audited and held out; quantities are (target - center) / scale."""

    inputs: torch.Tensor
    targets: torch.Tensor
    held_out_inputs: torch.Tensor
    held_out_targets: torch.Tensor
    n_classes: int | None
    center: float = 0.0
    scale: float = 1.0

    @property
    def criterion(self) -> Criterion:
        return squared_losses if self.n_classes is None else label_losses


@dataclass(frozen=True)
class _Record:
    """What the training run leaves behind; filled step by step."""

    losses: torch.Tensor
    norms: torch.Tensor | None
    epochs: list[Epoch]


def audit_table(
    table: Table,
    settings: Settings | None = None,
    *,
    flip: float = 0.0,
    calibrate: float = 0.0,
    rows: float = 1.0,
    norms: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AuditRun:
    """Train a multilayer perceptron on the table and score every audited example by its course through training.

    The same arguments give the same scores, apart from the time measured. No global random state is changed.

    Args:
        settings: of the training; default `Settings()`.
        flip: share of the audited targets to corrupt before training, at most 0.5; 0 plants nothing.
        calibrate: share of the audited labels to flip, at most 0.5, so that the audit estimates how many wrong labels
            it finds; these examples are not judged themselves.
        rows: share of the rows to audit, drawn at random; the others are held out and only measure the model.
        norms: whether to take each example's gradient norm at every step. Without, a step costs about as much as in
            plain training, and self-influence, spikes and the noise scale are missing.
        progress: called after every step with the steps done and the steps in all.

    Raises:
        InputError: too few rows are left to audit, `calibrate` for a regression, or training diverged.
    """
    settings = settings or Settings()
    with torch.random.fork_rng(devices=[]):  # initialization and dropout draw from the global generator
        torch.default_generator.manual_seed(settings.seed)
        return _audit(table, settings, flip, calibrate, rows, norms, progress)


def _audit(
    table: Table,
    settings: Settings,
    flip: float,
    calibrate: float,
    rows: float,
    norms: bool,
    progress: Callable[[int, int], None],
) -> AuditRun:
    if calibrate and table.classes is None:
        raise InputError(
            f"--calibrate {calibrate:g}: {table.name} has quantities to predict, and only labels can be flipped; leave "
            "it out, or measure the ranking with --flip"
        )
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(settings.seed)
    chosen, held_out = split_rows(len(table), rows, generator)
    _check_chosen(table, chosen)
    given, planted = _plant(table, chosen, flip, generator)
    n_classes = None if table.classes is None else len(table.classes)
    audit = Audit(len(chosen), n_classes, calibrate=calibrate, generator=generator)
    given = audit.plant(torch.arange(len(chosen)), given)
    problem = _problem(table, chosen, held_out, given)
    model = mlp(problem.inputs.shape[1], settings.hidden, table.n_outputs, settings.dropout)
    trainee = Trainee(model, adam(model, settings.lr), problem.criterion)
    batch_size = settings.batch_size_for(len(chosen))
    record = _train(audit, trainee, problem, settings, batch_size, norms, generator, progress)
    with _divergence_told("after the last epoch", settings):
        cost = measure_cost(
            trainee,
            problem.inputs,
            problem.targets,
            problem.n_classes,
            batch_size=batch_size,
            generator=generator,
            norms=norms,
        )
    return AuditRun(
        table=table,
        settings=settings,
        batch_size=batch_size,
        flip=flip,
        rows=chosen,
        given=given,
        planted=planted,
        scores=audit.compute(),
        losses=record.losses,
        norms=record.norms,
        conflict=_conflict(problem, model, generator),
        epochs=tuple(record.epochs),
        held_out=_held_out_score(problem, model),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        cost=cost,
        seconds=time.perf_counter() - start,
    )


def _check_chosen(table: Table, chosen: torch.Tensor) -> None:
    if len(chosen) < 2:
        raise InputError(f"{table.name}: {len(chosen)} of {len(table)} rows would be audited; raise --rows")
    targets = table.targets[chosen]
    if table.classes is None:
        if targets.min() == targets.max():
            raise InputError(f"{table.name}: the target is {targets[0]:g} in every audited row; raise --rows")
        return
    counts = torch.bincount(targets, minlength=len(table.classes))
    if counts.min() < 2:
        lonely = int(counts.argmin())
        raise InputError(
            f"{table.name}: the class {table.classes[lonely]!r} has {int(counts[lonely])} of the {len(chosen)} audited "
            "rows and needs two; raise --rows"
        )


def _plant(
    table: Table, chosen: torch.Tensor, flip: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    targets = table.targets[chosen]
    if flip == 0:
        return targets, None
    if table.classes is None:
        return permute_targets(targets, flip, generator)
    return flip_labels(targets, len(table.classes), flip, generator)


def _problem(table: Table, chosen: torch.Tensor, held_out: torch.Tensor, given: torch.Tensor) -> _Problem:
    """Inputs standardized by the audited rows; so are the targets of a regression."""
    inputs, _, _ = standardize(table.features, chosen, spans=table.spans)
    left = table.targets[held_out]
    if table.classes is not None:
        return _Problem(inputs[chosen], given, inputs[held_out], left, len(table.classes))
    center, scale = float(given.mean()), float(given.std(correction=0))
    targets = ((given - center) / scale).float()
    return _Problem(inputs[chosen], targets, inputs[held_out], left, None, center, scale)


def _train(
    audit: Audit,
    trainee: Trainee,
    problem: _Problem,
    settings: Settings,
    batch_size: int,
    norms: bool,
    generator: torch.Generator,
    progress: Callable[[int, int], None],
) -> _Record:
    n, done = len(problem.targets), 0
    n_epochs = settings.epochs_for(n)
    total = n_epochs * -(-n // batch_size)
    record = _Record(torch.zeros(n_epochs, n), torch.zeros(n_epochs, n) if norms else None, epochs=[])
    noise = NoiseScale()
    for epoch in range(n_epochs):
        start, n_correct = time.perf_counter(), 0
        for index in torch.randperm(n, generator=generator).split(batch_size):
            targets = problem.targets[index]
            step = trainee.seen_step(problem.inputs[index], targets, norms=norms)
            with _divergence_told(f"in epoch {epoch + 1}", settings):
                update(audit, index, step, targets, settings.lr)
            record.losses[epoch, index] = step.losses
            if record.norms is not None and step.norms is not None:
                record.norms[epoch, index] = step.norms
                noise.update(norms=step.norms, mean_norm=nn.utils.get_total_norm(_gradients(trainee.model)))
            n_correct += int((step.outputs.argmax(dim=1) == targets).sum())
            done += 1
            progress(done, total)
        accuracy = None if problem.n_classes is None else n_correct / n
        record.epochs.append(_summary(epoch, record, accuracy, noise.running, time.perf_counter() - start))
    return record


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@contextlib.contextmanager
def _divergence_told(when: str, settings: Settings) -> Iterator[None]:
    try:
        yield
    except NonFiniteError as error:
        raise InputError(f"training diverged {when} at --lr {settings.lr:g} ({error}); use a smaller --lr") from error


def _summary(epoch: int, record: _Record, accuracy: float | None, noise: Noise, seconds: float) -> Epoch:
    norms = None if record.norms is None else record.norms[epoch]
    return Epoch(
        number=epoch + 1,
        mean_loss=float(record.losses[epoch].double().mean()),
        median_norm=None if norms is None else float(norms.median()),
        largest_norm=None if norms is None else float(norms.max()),
        accuracy=accuracy,
        noise_scale=noise.scale if math.isfinite(noise.scale) else None,
        noise_scale_error=noise.error if math.isfinite(noise.error) else None,
        seconds=seconds,
    )


def _conflict(problem: _Problem, model: nn.Module, generator: torch.Generator) -> torch.Tensor | None:
    """Of at most `N_COMPARED` examples, drawn at random."""
    if problem.n_classes is None:
        return None
    shown = torch.randperm(len(problem.targets), generator=generator)[:N_COMPARED]
    losses = problem.criterion(model.eval()(problem.inputs[shown]), problem.targets[shown])
    cosines = cast(torch.Tensor, jacobian(losses, model).cosines())
    return class_conflict(cosines, problem.targets[shown], problem.n_classes)


@torch.no_grad()
def _held_out_score(problem: _Problem, model: nn.Module) -> float | None:
    """Accuracy on the rows that were not audited, or R^2; None where there are none or, for R^2, they are all equal."""
    targets = problem.held_out_targets
    if not len(targets):
        return None
    outputs = model.eval()(problem.held_out_inputs)
    if problem.n_classes is not None:
        return float((outputs.argmax(dim=1) == targets).double().mean())
    residual = (targets - (outputs[:, 0].double() * problem.scale + problem.center)).square().sum()
    spread = (targets - targets.mean()).square().sum()
    return float(1 - residual / spread) if spread > 0 else None
