"""The scores of an audit as a data frame or a Parquet file."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowgrad.errors import InputError
from rowgrad.files import whole
from rowgrad.uses.scores import AuditScores

COLUMNS = (
    *("rank", "given", "suggested", "suggested_probability", "confidence", "variability", "mean_margin"),
    *("mean_loss", "final_loss", "times_forgotten", "first_learned"),
    *("mean_norm", "final_norm", "peak_norm", "peak_visit", "self_influence", "times_seen", "planted", "before"),
)
OF_ALL = ("rank", "times_seen", "planted")  # said of examples never seen, too
INSTALL = "install it with pip install 'rowgrad[app]'"


def score_columns(scores: AuditScores, classes: Sequence[str] | None = None) -> dict[str, list]:
    """{column: N values}: `index`, the scores that there are, a column for each flag, and `reason`.

    The columns of flags are `hard`, `redundant`, with norms `spiking`, with labels `likely_mislabelled` and
    `never_learned`. `reason` is empty where nothing is flagged; `classes` are the names of the labels in it. What is
    not known of an example never seen is None, a null in the tables.
    """
    found: dict[str, list] = {"index": list(range(len(scores.rank)))}
    values = {name: getattr(scores, name) for name in COLUMNS}
    found |= {name: _seen(scores, name, tensor) for name, tensor in values.items() if tensor is not None}
    found |= {name.replace(" ", "_"): mask.tolist() for name, mask in scores.flags.items()}
    found["reason"] = reasons(scores, classes)
    return found


def _seen(scores: AuditScores, name: str, tensor: Tensor) -> list:
    """The values, None for what is not known of an example never seen."""
    if name in OF_ALL:
        return tensor.tolist()
    return [value if n else None for value, n in zip(tensor.tolist(), scores.times_seen.tolist(), strict=True)]


def reasons(scores: AuditScores, classes: Sequence[str] | None = None) -> list[str]:
    """For each example why it is flagged, or nothing."""
    sentences = [""] * len(scores.rank)
    for position in torch.stack(list(scores.flags.values())).any(dim=0).nonzero()[:, 0].tolist():
        sentences[position] = scores.reason(position, classes)
    return sentences


def scores_table(scores: AuditScores, to: str | PathLike[str] = "polars") -> Any:
    """The columns of `score_columns` as a data frame of polars or pandas, or written to Parquet.

    Args:
        to: "polars", "pandas", or a path ending in .parquet.
    Returns:
        The data frame; the path where one was written.
    Raises:
        InputError: `to` is none of these, or what it needs is not installed.
    """
    if not isinstance(to, (str, PathLike)):
        raise InputError(f'table({to!r}): expected "polars", "pandas" or a path that ends in .parquet')
    if to == "pandas":
        try:
            import pandas as pd  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise InputError("a table of pandas needs pandas; install it with pip install pandas") from error
        return pd.DataFrame(score_columns(scores))
    if to != "polars" and Path(to).suffix != ".parquet":
        raise InputError(f'table({str(to)!r}): expected "polars", "pandas" or a path that ends in .parquet')
    try:
        import polars as pl
    except ModuleNotFoundError as error:
        raise InputError(f"a table needs polars; {INSTALL}") from error
    frame = pl.DataFrame(score_columns(scores))
    if to == "polars":
        return frame
    with whole(to) as stage:
        frame.write_parquet(stage)
    return Path(to)
