"""Whether a target is a class or a quantity, and its encoding."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from rowgrad.data.columns import missing, numbers
from rowgrad.data.raw import Raw
from rowgrad.errors import InputError

MAX_CLASSES = 50  # distinct whole numbers that are still read as classes
TARGET_NAMES = ("target", "label", "class", "y")


@dataclass(frozen=True)
class Target:
    """Encoded targets, the classes (None for regression) and the sentence that says what was chosen and why."""

    values: torch.Tensor
    classes: tuple[str, ...] | None
    note: str


def target_column(raw: Raw, asked: str | None) -> str:
    """The column asked for, or the only one that is called target, label, class or y."""
    names = raw.frame.columns
    if asked is not None:
        if asked not in names:
            raise InputError(f"{raw.name}: no column is called {asked!r}; found {_shortened(names)}")
        return asked
    likely = [name for name in names if name.lower() in TARGET_NAMES]
    if len(likely) != 1:
        found = f"{len(likely)} columns are called like one" if likely else "none is called target, label, class or y"
        raise InputError(
            f"{raw.name}: which column is the target? {found}; say --target with one of {_shortened(names)}"
        )
    return likely[0]


def read_target(raw: Raw, name: str, task: str | None) -> Target:
    """Classes for text, truth values and up to 50 distinct whole numbers, quantities otherwise; `task` overrides the choice.

    Raises:
        InputError: a target is missing, NaN or infinite, all are equal, a class has one member, or text was asked to be a quantity.
    """
    column = raw.frame[name]
    absent = missing(column)
    if len(absent):
        raise InputError(
            f"{raw.name}: the target {name!r} is missing in {raw.where(absent)}; give it a value or remove these examples"
        )
    values = None if task == "classification" and column.dtype == pl.String else numbers(raw, column)
    if task == "regression" and values is None:
        raise InputError(
            f"{raw.name}: the target {name!r} holds text ({column[0]!r}), which --task regression cannot fit"
        )
    if values is None:
        return _classes(
            raw, name, np.asarray(column.cast(pl.String).str.strip_chars().to_list()), "it holds text", task
        )
    n_distinct = len(np.unique(values))
    whole = bool((values == np.round(values)).all())
    if task == "classification" or (task is None and whole and n_distinct <= MAX_CLASSES):
        return _classes(
            raw, name, _as_labels(column, values, whole), f"it holds {n_distinct} distinct whole numbers", task
        )
    if n_distinct == 1:
        raise InputError(
            f"{raw.name}: the target {name!r} is {values[0]:g} for every example; there is nothing to learn"
        )
    kind = f"{n_distinct} distinct whole numbers" if whole else "numbers with a fraction"
    reason = "as asked" if task else f"it holds {kind}"
    return Target(
        torch.from_numpy(values), None, f"Regression on {name}: {reason} ({values.min():g} to {values.max():g})."
    )


def _as_labels(column: pl.Series, values: np.ndarray, whole: bool) -> np.ndarray:
    if column.dtype == pl.Boolean:
        return np.asarray([str(value).lower() for value in column])
    return values.astype(np.int64) if whole else values


def _classes(raw: Raw, name: str, labels: np.ndarray, reason: str, task: str | None) -> Target:
    distinct, positions, counts = np.unique(labels, return_inverse=True, return_counts=True)
    classes = tuple(str(label) for label in distinct)
    if len(classes) == 1:
        raise InputError(
            f"{raw.name}: the target {name!r} is {classes[0]!r} for every example; there is nothing to learn"
        )
    if counts.min() == 1:
        lonely = positions == np.argmin(counts)
        hint = ", or use --task regression if the target is a quantity" if labels.dtype.kind in "if" else ""
        raise InputError(
            f"{raw.name}: the class {classes[int(np.argmin(counts))]!r} of {name!r} has one member "
            f"({raw.where(np.flatnonzero(lonely))}); a class needs at least two, so remove it or merge it{hint}"
        )
    reason = "as asked" if task else reason
    return Target(
        torch.from_numpy(positions.astype(np.int64)),
        classes,
        f"Classification by {name}, {len(classes)} classes: {reason}.",
    )


def _shortened(names: list[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
