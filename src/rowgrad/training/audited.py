"""Train a model on a table and audit its examples in that same training."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from rowgrad.data.corrupt import flip_labels, permute_targets
from rowgrad.data.split import split_rows
from rowgrad.data.table import Table, standardize
from rowgrad.errors import InputError, NonFiniteError
from rowgrad.training.cost import Cost, measure_cost
from rowgrad.training.mlp import mlp
from rowgrad.training.settings import Settings
from rowgrad.training.step import Criterion, label_losses, squared_losses, step_with_rows
from rowgrad.uses.audit import Audit, AuditScores


@dataclass(frozen=True)
class Epoch:
    """What one pass over the audited examples showed, each example measured just before the step that used it.

    accuracy: share whose most probable label is the given one; None for regression.
    """

    number: int
    mean_loss: float
    median_norm: float
    largest_norm: float
    accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class AuditRun:
    """An audited training run on n of a table's N rows.

    rows: positions in the table of the audited examples, ascending, shape (n,); all else of shape (n,) follows them.
    given: the targets that were trained on; `planted` marks those that were corrupted on purpose (None: none were).
    scores: as computed by the audit.
    losses, norms: each example's loss and gradient norm in each epoch, shape (epochs, n).
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
    norms: torch.Tensor
    epochs: tuple[Epoch, ...]
    held_out: float | None
    n_parameters: int
    cost: Cost
    seconds: float


@dataclass(frozen=True)
class _Problem:
    """Inputs and targets as the model takes them, of the audited rows."""

    inputs: torch.Tensor
    targets: torch.Tensor
    criterion: Criterion
    n_classes: int | None


def audit_table(
    table: Table,
    settings: Settings | None = None,
    *,
    flip: float = 0.0,
    rows: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AuditRun:
    """Train a multilayer perceptron on the table and score every audited example by its course through training.

    The same table, settings, flip and rows give the same scores. No global random state is changed.

    Args:
        settings: of the training; default `Settings()`.
        flip: share of the audited targets to corrupt before training, at most 0.5; 0 plants nothing.
        rows: share of the rows to audit, drawn at random; the others are held out and only measure the model.
        progress: called after every step with the steps done and the steps in all.

    Raises:
        InputError: too few rows are left to audit, or training diverged.
    """
    settings = settings or Settings()
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(settings.seed)
    chosen, held_out = split_rows(len(table), rows, generator)
    _check_chosen(table, chosen)
    given, planted = _plant(table, chosen, flip, generator)
    inputs, _, _ = standardize(table.features, chosen)
    problem, center, scale = _problem(table, inputs[chosen], given)
    model = mlp(inputs.shape[1], settings.hidden, table.n_outputs, settings.seed)
    batch_size = settings.batch_size_for(len(chosen))
    audit = Audit(len(chosen), problem.n_classes)
    losses, norms = torch.zeros(2, settings.epochs, len(chosen)).unbind()
    epochs = _train(model, problem, settings, batch_size, generator, audit, losses, norms, progress)
    cost = measure_cost(
        model,
        problem.criterion,
        problem.inputs,
        problem.targets,
        problem.n_classes,
        lr=settings.lr,
        batch_size=batch_size,
        generator=generator,
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
        losses=losses,
        norms=norms,
        epochs=tuple(epochs),
        held_out=_held_out_score(table, model, inputs, held_out, center, scale) if len(held_out) else None,
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        cost=cost,
        seconds=time.perf_counter() - start,
    )


def _check_chosen(table: Table, chosen: torch.Tensor) -> None:
    if len(chosen) < 2:
        raise InputError(f"{table.name}: {len(chosen)} of {len(table)} rows would be audited; raise --rows")
    if table.classes is None:
        return
    counts = torch.bincount(table.targets[chosen], minlength=len(table.classes))
    if counts.min() < 2:
        lonely = int(counts.argmin())
        raise InputError(
            f"{table.name}: of the class {table.classes[lonely]!r} {int(counts[lonely])} of {len(chosen)} audited rows "
            "are members and two are needed; raise --rows"
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


def _problem(table: Table, inputs: torch.Tensor, given: torch.Tensor) -> tuple[_Problem, float, float]:
    """The audited examples as the model takes them; quantities are centered and scaled by the audited ones."""
    if table.classes is not None:
        return _Problem(inputs, given, label_losses, len(table.classes)), 0.0, 1.0
    center, scale = float(given.mean()), float(given.std(correction=0))
    if scale == 0:
        raise InputError(
            f"{table.name}: the target {table.target_name!r} is {center:g} in every audited row; raise --rows"
        )
    return _Problem(inputs, ((given - center) / scale).float(), squared_losses, None), center, scale


def _train(
    model: nn.Module,
    problem: _Problem,
    settings: Settings,
    batch_size: int,
    generator: torch.Generator,
    audit: Audit,
    losses: torch.Tensor,
    norms: torch.Tensor,
    progress: Callable[[int, int], None],
) -> list[Epoch]:
    """Train in place, filling `losses` and `norms` and updating `audit`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    n, epochs, done = len(problem.targets), [], 0
    total = settings.epochs * -(-n // batch_size)
    for number in range(settings.epochs):
        start, n_correct = time.perf_counter(), 0
        for index in torch.randperm(n, generator=generator).split(batch_size):
            targets = problem.targets[index]
            step = step_with_rows(model, optimizer, problem.criterion, problem.inputs[index], targets)
            outputs = {} if problem.n_classes is None else {"logits": step.outputs, "labels": targets}
            try:
                audit.update(index, losses=step.losses, norms=step.norms, **outputs)
            except NonFiniteError as error:
                raise InputError(
                    f"training diverged in epoch {number + 1} at --lr {settings.lr:g} ({error}); use a smaller --lr"
                ) from error
            losses[number, index], norms[number, index] = step.losses, step.norms
            n_correct += int((step.outputs.argmax(dim=1) == targets).sum()) if outputs else 0
            done += 1
            progress(done, total)
        epochs.append(
            Epoch(
                number=number + 1,
                mean_loss=float(losses[number].double().mean()),
                median_norm=float(norms[number].median()),
                largest_norm=float(norms[number].max()),
                accuracy=None if problem.n_classes is None else n_correct / n,
                seconds=time.perf_counter() - start,
            )
        )
    return epochs


@torch.no_grad()
def _held_out_score(
    table: Table, model: nn.Module, inputs: torch.Tensor, held_out: torch.Tensor, center: float, scale: float
) -> float:
    """Accuracy on the rows that were not audited, or R^2, their variance taken around their own mean."""
    outputs, targets = model(inputs[held_out]), table.targets[held_out]
    if table.classes is not None:
        return float((outputs.argmax(dim=1) == targets).double().mean())
    residual = (targets - (outputs[:, 0].double() * scale + center)).square().sum()
    return float(1 - residual / (targets - targets.mean()).square().sum())
