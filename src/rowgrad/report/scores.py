"""The scores of an audit as a table, one row per audited example."""

from pathlib import Path

import numpy as np
import polars as pl
import torch

from rowgrad.data.table import Table
from rowgrad.training.audited import AuditRun
from rowgrad.uses.scores import AuditScores
from rowgrad.uses.tables import score_columns


def scores_frame(run: AuditRun) -> pl.DataFrame:
    """One row per audited example, in order of its position in the data.

    Columns: `index` (position in the data, from 0), `line` (for CSV files), then those of `Audit.table()`, with classes
    by their names and `peak_epoch` for `peak_visit`; where errors were planted `is_planted` and the target before,
    where labels were flipped to calibrate `planted` and the label before.
    """
    frame = frame_of(run.table, run.rows, run.given, run.scores)
    if run.planted is None:
        return frame
    before = targets_text(run, run.table.targets[run.rows])
    return frame.with_columns(pl.Series("is_planted", run.planted.numpy()), pl.Series("before", before))


def frame_of(table: Table, rows: torch.Tensor, given: torch.Tensor, scores: AuditScores) -> pl.DataFrame:
    """As `scores_frame`, of examples at the positions `rows` of a table, which were trained on the targets `given`."""
    columns: dict[str, np.ndarray | list] = {"index": rows.numpy()}
    if table.place == "line":
        columns["line"] = table.numbers[rows.numpy()]
    found = score_columns(scores, table.classes) | {"index": rows.tolist()}
    if table.target_name:
        found["given"] = text_of(table, given)
    if scores.suggested is not None:
        found["suggested"] = text_of(table, scores.suggested)
    if scores.before is not None:
        found["before"] = text_of(table, scores.before)
    names = {"peak_visit": "peak_epoch"}
    columns |= {names.get(name, name): values for name, values in found.items()}
    return pl.DataFrame(columns)


def write_scores(run: AuditRun, path: Path) -> None:
    """Write the table of scores as Parquet."""
    scores_frame(run).write_parquet(path)


def targets_text(run: AuditRun, targets: torch.Tensor) -> list:
    """Targets as the user knows them: names of classes, or values."""
    return text_of(run.table, targets)


def text_of(table: Table, targets: torch.Tensor) -> list:
    """As `targets_text`, of a table; None for the label -1 of an example that was never seen."""
    classes = table.classes
    if classes is None:
        return targets.tolist()
    return [None if position < 0 else classes[position] for position in targets.tolist()]
