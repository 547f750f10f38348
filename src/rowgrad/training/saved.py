"""A trained model in one file: weights, how it is built, how features are prepared, what its outputs mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rowgrad.data.columns import Column
from rowgrad.data.preparation import Preparation, steps_of
from rowgrad.data.table import Table
from rowgrad.errors import InputError
from rowgrad.layers.batchnorm import BatchNorm
from rowgrad.layers.folding import fold
from rowgrad.training.architectures import Autoencoder, Form, build
from rowgrad.training.checkpoint import load_state, save_state
from rowgrad.training.fit import Fitted
from rowgrad.training.problem import outputs_of
from rowgrad.training.recipe import Recipe
from rowgrad.training.step import reconstruction_losses


@dataclass(frozen=True)
class Predictor:
    """A model that takes features as they are read.

    Attributes:
        model: in evaluation mode.
        prepared: what is done to features first.
        feature_names: of the data it was trained on, in order.
        columns: how they were made of a table's columns, see `rowgrad.data.table.Table`.
        shape: of one example as the model takes it.
        classes: what its outputs stand for; None for a regression.
        center, scale: of a regression's targets.
    """

    model: nn.Module
    prepared: Preparation
    feature_names: tuple[str, ...]
    shape: tuple[int, ...]
    classes: tuple[str, ...] | None
    center: float
    scale: float
    columns: tuple[Column, ...] = ()

    @property
    def reconstructs(self) -> bool:
        """Whether the model is an autoencoder."""
        return isinstance(self.model, Autoencoder)

    def outputs(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Of examples' features, shape (N, d): probabilities of the classes, shape (N, K), or values, shape (N,); of an
        autoencoder half the mean squared error of the reconstruction, shape (N,), of features as they are prepared.

        `lengths` are those of sequences.
        """
        given = self.given(features, lengths)
        found = outputs_of(self.model, *given)
        if self.reconstructs:
            return reconstruction_losses(found, given[0].flatten(1))
        return found[:, 0].double() * self.scale + self.center if self.classes is None else found.softmax(1)

    def codes(self, features: Tensor) -> Tensor:
        """What an autoencoder makes of examples' features, (N, d), at its narrowest: (N, units).

        Raises:
            InputError: the model is no autoencoder.
        """
        if not isinstance(self.model, Autoencoder):
            raise InputError("codes are those of an autoencoder; train one with --model autoencoder:32,8")
        return outputs_of(self.model.encoder, *self.given(features))

    def given(self, features: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, ...]:
        """What the model is called with: features prepared and shaped, and lengths of sequences."""
        inputs = self.prepared(features)
        if len(self.shape) == 2:
            lengths = torch.full((len(inputs),), self.shape[0]) if lengths is None else lengths
            return steps_of(inputs, (self.shape[0], self.shape[1]), lengths), lengths
        if len(self.shape) == 3:
            return (inputs.view(len(inputs), *self.shape[1:], self.shape[0]).movedim(-1, 1).contiguous(),)
        return (inputs,)

    def of_table(self, table: Table) -> Tensor:
        """As `outputs`, of a table with the same features, see `check`."""
        self.check(table)
        return self.outputs(table.features, table.lengths)

    def check(self, table: Table) -> None:
        """Refuse a table whose features are not those of the training.

        Raises:
            InputError: features are missing, or there are others.
        """
        if table.feature_names != self.feature_names:
            missing = [n for n in self.feature_names if n not in table.feature_names]
            extra = [n for n in table.feature_names if n not in self.feature_names]
            said = f"without {missing[0]!r}" if missing else f"with {extra[0]!r}" if extra else "in another order"
            raise InputError(
                f"{table.name}: its features, {said}, are not those the model was trained on: "
                f"{', '.join(self.feature_names[:8])}{' ...' if len(self.feature_names) > 8 else ''}"
            )


@dataclass(frozen=True)
class Ensemble:
    """Several models whose answers are averaged: probabilities, or values (Aggarwal 2018, section 3.3.1)."""

    members: tuple[Predictor, ...]

    @property
    def classes(self) -> tuple[str, ...] | None:
        """As of each member."""
        return self.members[0].classes

    @property
    def columns(self) -> tuple[Column, ...]:
        """As of each member."""
        return self.members[0].columns

    @property
    def reconstructs(self) -> bool:
        """Whether the members are autoencoders."""
        return self.members[0].reconstructs

    def codes(self, features: Tensor) -> Tensor:
        """Refused: each member has a code of its own."""
        raise InputError("an ensemble has no one hidden code; give one of its members, such as winner.safetensors")

    def of_table(self, table: Table) -> Tensor:
        """As `Predictor.of_table`."""
        return torch.stack([member.of_table(table) for member in self.members]).mean(0)


def predictor_of(fitted: Fitted, table: Table) -> Predictor:
    """A fitted model that takes features as they are read; `table` is what it was trained on."""
    p = fitted.problem
    return Predictor(fitted.model, p.prepared, table.feature_names, p.shape, p.classes, p.center, p.scale, p.columns)


def save_model(fitted: Fitted, table: Table, path: Path) -> None:
    """Write a fitted model; see `load_model`."""
    save_state(path, _state(fitted, table))


def save_ensemble(members: Sequence[Fitted], table: Table, path: Path) -> None:
    """Write several fitted models as one; see `load_model`."""
    save_state(path, {"members": [_state(fitted, table) for fitted in members]})


def _state(fitted: Fitted, table: Table) -> dict[str, Any]:
    problem = fitted.problem
    return {
        "recipe": fitted.recipe.to_dict(),
        "weights": dict(fitted.model.state_dict()),
        "prepared": problem.prepared.state_dict(),
        "feature_names": table.feature_names,
        "shape": problem.shape,
        "classes": problem.classes,
        "center": problem.center,
        "scale": problem.scale,
        "columns": [asdict(column) for column in problem.columns],
    }


def load_model(path: Path) -> Predictor | Ensemble:
    """Read what `save_model` or `save_ensemble` wrote; nothing is unpickled.

    Batch normalization before the activation is folded into the layer in front of it, which changes outputs by rounding
    alone (`rowgrad.layers.fold`); behind the activation it stays.

    Raises:
        InputError: no such file, or another kind of file.
    """
    state = load_state(path)
    if "members" in state:
        return Ensemble(tuple(map(_predictor, state["members"])))
    if "weights" not in state:
        raise InputError(f"{path}: a checkpoint of a training, not a model; take model.safetensors of the same folder")
    return _predictor(state)


def _predictor(state: dict[str, Any]) -> Predictor:
    recipe, classes = Recipe(**state["recipe"]), state["classes"]
    n_outputs = 1 if classes is None else len(classes)
    form = Form(state["shape"], n_outputs, recipe.act, recipe.alpha, recipe.norm, recipe.dropout)
    with torch.random.fork_rng(devices=[]):
        model = build(recipe.model, form)
    model.load_state_dict(state["weights"])
    if recipe.norm == "batch-pre" and any(isinstance(m, BatchNorm) for m in model.modules()):
        model = fold(model)
    return Predictor(
        model.eval(),
        Preparation(**state["prepared"]),
        state["feature_names"],
        state["shape"],
        classes,
        state["center"],
        state["scale"],
        tuple(Column(**column) for column in state["columns"]),
    )
