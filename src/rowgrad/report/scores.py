"""The scores of an audit as a table, one row per audited example."""

from pathlib import Path

import numpy as np
import polars as pl
import torch

from rowgrad.training.audited import AuditRun
from rowgrad.uses.tables import score_columns


def scores_frame(run: AuditRun) -> pl.DataFrame:
    """One row per audited example, in order of its position in the data.

    Columns: `index` (position in the data, from 0), `line` (for CSV files), then those of `Audit.table()`, with classes
    by their names and `peak_epoch` for `peak_visit`; where errors were planted `is_planted` and the target before.
    """
    scores, table = run.scores, run.table
    columns: dict[str, np.ndarray | list] = {"index": run.rows.numpy()}
    if table.place == "line":
        columns["line"] = table.numbers[run.rows.numpy()]
    found = score_columns(scores, table.classes) | {"index": run.rows.tolist()}
    found["given"] = targets_text(run, run.given)
    if scores.suggested is not None:
        found["suggested"] = targets_text(run, scores.suggested)
    names = {"peak_visit": "peak_epoch"}
    columns |= {names.get(name, name): values for name, values in found.items()}
    if run.planted is not None:
        columns |= {"is_planted": run.planted.numpy(), "before": targets_text(run, table.targets[run.rows])}
    return pl.DataFrame(columns)


def write_scores(run: AuditRun, path: Path) -> None:
    """Write the table of scores as Parquet."""
    scores_frame(run).write_parquet(path)


def targets_text(run: AuditRun, targets: torch.Tensor) -> list:
    """Targets as the user knows them: names of classes, or values."""
    classes = run.table.classes
    return targets.tolist() if classes is None else [classes[position] for position in targets.tolist()]


def readable(value: object) -> str:
    """A value of the data as text."""
    if value is None or value == "":
        return "(missing)"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
