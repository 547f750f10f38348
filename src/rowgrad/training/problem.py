"""The examples as a model takes them, split and prepared, and what a model's outputs are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rowgrad.data.columns import Column
from rowgrad.data.preparation import Preparation, prepare, prepare_steps, steps_of
from rowgrad.data.table import Table
from rowgrad.errors import InputError
from rowgrad.layers.initialization import initialize
from rowgrad.layers.pretraining import pretrain
from rowgrad.training.architectures import Form, SequenceReader, build
from rowgrad.training.loop import seed_of
from rowgrad.training.recipe import Recipe
from rowgrad.training.step import Criterion, label_losses, reconstruction_losses, squared_losses

EVALUATED = 4096  # examples at a time
PRETRAINED = ("mlp", "autoencoder")
SPLIT, WEIGHTS = 2, 3  # uses of the run's seed, beside the two of `Loop`


@dataclass(frozen=True)
class Problem:
    """Examples as a model takes them, in two parts.

    Targets are positions among the classes, or (target - center) / scale, or where a model `reconstructs` its inputs,
    laid out flat, (N, d). `columns` are the table's, with medians of the training part.
    """

    prepared: Preparation
    inputs: Tensor
    targets: Tensor
    train: Tensor
    val: Tensor
    shape: tuple[int, ...]
    classes: tuple[str, ...] | None = None
    center: float = 0.0
    scale: float = 1.0
    lengths: Tensor | None = None
    reconstructs: bool = False
    columns: tuple[Column, ...] = ()

    def given(self, index: Tensor) -> tuple[Tensor, ...]:
        """What a model gets for these examples: inputs, and lengths where they are sequences."""
        return (self.inputs[index],) if self.lengths is None else (self.inputs[index], self.lengths[index])

    @property
    def criterion(self) -> Criterion:
        if self.reconstructs:
            return reconstruction_losses
        return squared_losses if self.classes is None else label_losses

    @property
    def score_name(self) -> str:
        """What `score` is called."""
        return "accuracy" if self.classes is not None else "R² of the reconstruction" if self.reconstructs else "R²"

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """See `score`."""
        is_classes = self.classes is not None
        return score(outputs if is_classes or self.reconstructs else outputs[:, 0], targets, is_classes)


def score(outputs: Tensor, targets: Tensor, is_classes: bool) -> float:
    """Accuracy of logits or probabilities, or R^2 of values (nan where the targets are all equal)."""
    if is_classes:
        return float((outputs.argmax(1) == targets).double().mean())
    outputs, targets = outputs.double(), targets.double()
    residual = (outputs - targets).square().sum()
    spread = (targets - targets.mean(0)).square().sum()
    return float(1 - residual / spread) if float(spread) > 0 else float("nan")


def constant_loss(problem: Problem) -> float:
    """Validation loss of answering every example alike, by the training part's frequencies or mean."""
    train, val = problem.targets[problem.train], problem.targets[problem.val]
    if problem.classes is None:
        return float(0.5 * (val - train.mean(0)).square().mean())
    shares = torch.bincount(train, minlength=len(problem.classes)).double().clamp_min(1) / len(train)
    return float(-shares.log()[val].mean())


def split(table: Table, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Positions of the training part and of the part held out, both ascending."""
    generator = torch.Generator().manual_seed(seed_of(recipe.seed, SPLIT))
    order = torch.randperm(len(table), generator=generator)
    n_val = round(recipe.val * len(table))
    if len(table) - n_val < 2:
        raise InputError(
            f"{table.name}: {len(table) - n_val} of {len(table)} examples are left to train on; lower --val"
        )
    if recipe.val and n_val == 0:
        raise InputError(
            f"{table.name}: --val {recipe.val:g} of {len(table)} examples is none; raise it, or set --val 0"
        )
    return order[n_val:].sort().values, order[:n_val].sort().values


def pose(table: Table, recipe: Recipe, parts: tuple[Tensor, Tensor] | None = None) -> Problem:
    """Split, if the parts are not given, and prepare; everything fitted is fitted on the training part."""
    train, val = split(table, recipe) if parts is None else parts
    table = table.with_medians_of(train)
    if table.images is not None and recipe.kind == "cnn" and recipe.prepare.startswith("whiten"):
        raise InputError("--model cnn needs images, and whitened pixels are none; leave out --whiten, or use mlp")
    if table.steps is not None and table.lengths is not None:
        prepared = prepare_steps(table.features[train], table.steps, table.lengths[train], recipe.prepare)
        inputs = steps_of(prepared(table.features), table.steps, table.lengths)
        shape: tuple[int, ...] = table.steps
    else:
        prepared = prepare(table.features[train], recipe.prepare, spans=table.spans)
        inputs = prepared(table.features)
        shape = (inputs.shape[1],)
    if table.images is not None and not recipe.prepare.startswith("whiten"):
        image = table.images[..., None] if table.images.ndim == 3 else table.images
        shape = (image.shape[3], image.shape[1], image.shape[2])
        inputs = inputs.view(len(inputs), *shape[1:], shape[0]).movedim(-1, 1).contiguous()
    posed = Problem(
        prepared, inputs, table.targets, train, val, shape, table.classes, lengths=table.lengths, columns=table.columns
    )
    if recipe.kind == "autoencoder":
        return replace(posed, targets=inputs.flatten(1), classes=None, reconstructs=True)
    if table.classes is not None:
        return posed
    center, scale = float(table.targets[train].mean()), float(table.targets[train].std(correction=0))
    if scale == 0:
        raise InputError(
            f"{table.name}: the target is {center:g} in all of the training part; there is nothing to learn"
        )
    return replace(posed, targets=((table.targets - center) / scale).float(), center=center, scale=scale)


def model_for(problem: Problem, recipe: Recipe) -> nn.Module:
    """The model of a recipe, drawn by its seed; no global random state changes."""
    n_outputs = 1 if problem.classes is None else len(problem.classes)
    form = Form(problem.shape, n_outputs, recipe.act, recipe.alpha, recipe.norm, recipe.dropout)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(recipe.seed, WEIGHTS))
        model = build(recipe.model, form)
        if recipe.init == "pretrain":
            if not isinstance(model, nn.Sequential) or recipe.kind not in PRETRAINED:
                raise InputError(f"--init pretrain is for {' and '.join(PRETRAINED)}, not for --model {recipe.model}")
            pretrain(model, problem.inputs[problem.train])
        elif recipe.init is not None:
            initialize(model, recipe.init)
    return model


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
