"""Whether a target is a class or a quantity, and its encoding."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from rowgrad.data.columns import Advice, as_text, is_text, missing, numbers
from rowgrad.data.raw import TARGET_NAMES, Raw, shorten
from rowgrad.errors import InputError

MAX_CLASSES = 50  # distinct whole numbers that are still read as classes
TARGET = Advice(
    stray="mend these cells, or use --task classification",
    nan="give these examples a target or remove them",
    infinite="give these examples a target or remove them",
    neither="a target is numbers or text",
)


@dataclass(frozen=True)
class Target:
    """Encoded targets, the classes (None for regression) and the sentence that says what was chosen and why."""

    values: torch.Tensor
    classes: tuple[str, ...] | None
    note: str


def target_column(raw: Raw, asked: str | None) -> str:
    """The column asked for, or the only one whose name is among `TARGET_NAMES`."""
    names = raw.frame.columns
    if asked is not None:
        if asked not in names:
            raise InputError(f"{raw.name}: no column is called {asked!r}; found {shorten(names)}")
        return asked
    likely = likely_targets(raw)
    if len(likely) == 1:
        return likely[0]
    usual = f"{', '.join(TARGET_NAMES[:-1])} or {TARGET_NAMES[-1]}"
    found = f"{len(likely)} are called like one" if likely else f"none is called {usual}"
    raise InputError(f"{raw.name}: which column is the target? {found}; say --target with one of {shorten(names)}")


def likely_targets(raw: Raw) -> list[str]:
    """The columns whose names are among `TARGET_NAMES`."""
    return [name for name in raw.frame.columns if name.lower() in TARGET_NAMES]


def read_target(raw: Raw, name: str, task: str | None) -> Target:
    """Classes for text, truth values and up to 50 distinct whole numbers, quantities otherwise; `task` overrides.

    Raises:
        InputError: a target is missing, NaN or infinite, all are equal, a class has one member, or text was asked to be
            a quantity.
    """
    column = raw.frame[name]
    absent = missing(column)
    if len(absent):
        raise InputError(
            f"{raw.name}: the target {name!r} is missing in {raw.where(absent)}; give these examples one or remove them"
        )
    asked_classes = task == "classification"
    values = None if asked_classes and _holds_text(column) else numbers(raw, column, TARGET)
    if values is None and task == "regression":
        raise InputError(f"{raw.name}: the target {name!r} holds text ({column[0]!r}), not a quantity to regress on")
    if values is None:
        return _classes(raw, name, np.asarray(as_text(column).to_list()), "as asked" if task else "it holds text")
    n_distinct, whole = len(np.unique(values)), bool((values == np.round(values)).all())
    kind = f"{n_distinct} distinct whole numbers" if whole else "numbers with fractions"
    reason = "as asked" if task else f"it holds {kind}"
    if asked_classes or (task is None and whole and n_distinct <= MAX_CLASSES):
        return _classes(raw, name, _labels(column, values, whole), reason)
    if n_distinct == 1:
        raise _constant(raw, name, f"{values[0]:g}")
    span = f"from {values.min():g} to {values.max():g}"
    return Target(torch.from_numpy(values.copy()), None, f"Regression on {name}, {span}: {reason}.")


def _holds_text(column: pl.Series) -> bool:
    return is_text(column) and bool(as_text(column).cast(pl.Float64, strict=False).is_null().any())


def _labels(column: pl.Series, values: np.ndarray, whole: bool) -> np.ndarray:
    if column.dtype == pl.Boolean:
        return np.asarray([str(value).lower() for value in column])
    return values.astype(np.int64) if whole and np.abs(values).max() < 2**53 else values


def _classes(raw: Raw, name: str, labels: np.ndarray, reason: str) -> Target:
    distinct, positions, counts = np.unique(labels, return_inverse=True, return_counts=True)
    classes = tuple(str(label) for label in distinct)
    if len(classes) == 1:
        raise _constant(raw, name, classes[0])
    if counts.min() == 1:
        lonely = int(np.argmin(counts))
        hint = ", or use --task regression if the target is a quantity" if labels.dtype.kind in "if" else ""
        raise InputError(
            f"{raw.name}: the class {classes[lonely]!r} of {name!r} has one member "
            f"({raw.where(np.flatnonzero(positions == lonely))}) and needs two; remove or merge it{hint}"
        )
    note = f"Classification by {name}, {len(classes)} classes: {reason}."
    return Target(torch.from_numpy(positions.astype(np.int64)), classes, note)


def _constant(raw: Raw, name: str, value: str) -> InputError:
    return InputError(f"{raw.name}: the target {name!r} is {value} for every example; there is nothing to learn")
