"""A data set ready for training: features, targets, and what a report shows of each example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import polars as pl
import torch

from rowgrad.data.columns import Column
from rowgrad.data.preparation import common_deviation


@dataclass(frozen=True)
class Table:
    """N examples with d numeric features and one target each.

    features: shape (N, d), as read; `standardize` makes the model's input of them.
    targets: shape (N,); int64 positions in `classes`, or float64 values; 0 where the data were read without a target,
        whose name is empty then.
    classes: the labels, for classification; None for regression.
    frame: the columns as they stood in the source, for display; None where the examples are images.
    images: uint8, (N, height, width) or (N, height, width, channels); None for tables.
    steps: (steps, numbers) of an example that is a sequence, laid out step by step in its features; None for others.
    lengths: how many steps each sequence has, int64, (N,); the features behind them are 0. None for others.
    place, numbers: the word for where an example stands in the source ("line" or "row"), and its number there.
    notes: what was decided about the columns and the target, one sentence each.
    columns: how the features were made of the source's columns, in order; empty for images and sequences.
    """

    name: str
    features: torch.Tensor
    feature_names: tuple[str, ...]
    targets: torch.Tensor
    target_name: str
    classes: tuple[str, ...] | None
    place: str
    numbers: np.ndarray
    frame: pl.DataFrame | None = None
    images: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    steps: tuple[int, int] | None = None
    lengths: torch.Tensor | None = None
    columns: tuple[Column, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def task(self) -> str:
        """`classification` or `regression`."""
        return "regression" if self.classes is None else "classification"

    @property
    def n_outputs(self) -> int:
        """Outputs a model needs: one per class, or one."""
        return 1 if self.classes is None else len(self.classes)

    @property
    def texts(self) -> tuple[str, ...]:
        """The source's columns that became bags of words."""
        return tuple(column.name for column in self.columns if column.words is not None)

    @property
    def spans(self) -> tuple[slice, ...]:
        """The features of each of them, which have one scale: how rare a word is says how much it tells."""
        ends = accumulate(column.width for column in self.columns)
        return tuple(
            slice(end - column.width, end)
            for column, end in zip(self.columns, ends, strict=True)
            if column.words is not None
        )

    def take(self, index: torch.Tensor) -> Table:
        """The examples at these positions alone, in this order; classes stay as they are."""
        at = index.numpy()
        return replace(
            self,
            features=self.features[index],
            targets=self.targets[index],
            numbers=self.numbers[at],
            frame=None if self.frame is None else self.frame[at],
            images=None if self.images is None else self.images[at],
            lengths=None if self.lengths is None else self.lengths[index],
        )

    def with_medians_of(self, rows: torch.Tensor) -> Table:
        """Missing numbers as the medians over these examples alone, which a part that is held out cannot have shaped.

        A column without any number among these examples keeps the median of all.
        """
        if all(column.median is None for column in self.columns):
            return self
        features, columns, start = self.features.clone(), [], 0
        for column in self.columns:
            if column.median is not None:
                values, absent = features[:, start], features[:, start + 1] == 1
                there = values[rows][~absent[rows]]
                median = float(np.median(there.numpy())) if len(there) else column.median
                features[absent, start] = median
                column = replace(column, median=median)
            columns.append(column)
            start += column.width
        return replace(self, features=features, columns=tuple(columns))


def standardize(
    features: torch.Tensor, rows: torch.Tensor, block: int = 256, spans: Sequence[slice] = ()
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(features - mean) / deviation in float32, by the mean and the population deviation of `rows`.

    A constant column becomes 0. The columns of a span are divided by one deviation, the root of the mean of the squares
    of theirs. Statistics are taken in float64, a block of columns at a time. Returns the standardized
    features of all examples, the means and the deviations, shape (d,).
    """
    standardized = torch.empty(features.shape, dtype=torch.float32)
    means, deviations = (torch.empty(features.shape[1], dtype=torch.float64) for _ in range(2))
    for start in range(0, features.shape[1], block):
        columns = slice(start, start + block)
        values = features[:, columns].double()
        deviation, mean = torch.std_mean(values[rows], dim=0, correction=0)
        deviation[deviation <= 1e-12 * mean.abs()] = 0  # a constant whose mean was rounded
        standardized[:, columns] = torch.where(deviation > 0, (values - mean) / deviation, 0).float()
        means[columns], deviations[columns] = mean, deviation
    for span in spans:
        common = common_deviation(deviations[span])
        standardized[:, span] *= torch.where(common > 0, deviations[span] / common, 0).float()
        deviations[span] = common
    return standardized, means, deviations
