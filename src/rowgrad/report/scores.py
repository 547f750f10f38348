"""The scores of an audit as a table, one row per audited example."""

from pathlib import Path

import numpy as np
import polars as pl
import torch

from rowgrad.training.audited import AuditRun


def scores_frame(run: AuditRun) -> pl.DataFrame:
    """One row per audited example, in order of its position in the data.

    Columns: `index` (position in the data, from 0), `line` (for CSV files), `rank` (1 for the most suspicious) and
    `given`; for classification `suggested`, `suggested_probability`, `given_probability`, `flagged`, `mean_margin`;
    `mean_loss`, `final_loss`, `mean_norm`, `final_norm`, `peak_norm`, `peak_epoch`, `times_seen`; where errors were
    planted `is_planted` and the target before.
    """
    scores, table = run.scores, run.table
    columns: dict[str, np.ndarray | list] = {"index": run.rows.numpy()}
    if table.place == "line":
        columns["line"] = table.numbers[run.rows.numpy()]
    columns |= {"rank": scores.rank.numpy(), "given": targets_text(run, run.given)}
    if scores.suggested is not None:
        columns |= {
            "suggested": targets_text(run, scores.suggested),
            "suggested_probability": _array(scores.suggested_probability),
            "given_probability": _array(scores.given_probability),
            "flagged": _array(scores.flagged),
            "mean_margin": _array(scores.mean_margin),
        }
    columns |= {
        "mean_loss": _array(scores.mean_loss),
        "final_loss": _array(scores.final_loss),
        "mean_norm": _array(scores.mean_norm),
        "final_norm": _array(scores.final_norm),
        "peak_norm": _array(scores.peak_norm),
        "peak_epoch": _array(scores.peak_visit),
        "times_seen": _array(scores.times_seen),
    }
    if run.planted is not None:
        columns |= {"is_planted": _array(run.planted), "before": targets_text(run, table.targets[run.rows])}
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


def _array(values: torch.Tensor | None) -> np.ndarray:
    assert values is not None  # the audit of a table always has norms, and labels where it has suggestions
    return values.numpy()
