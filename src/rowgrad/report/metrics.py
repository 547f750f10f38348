"""The log of an audit: one JSON line per epoch and one that sums up."""

import dataclasses
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rowgrad import __version__
from rowgrad.training.audited import AuditRun
from rowgrad.uses.planted import score_planted

PACKAGES = ("torch", "numpy", "polars", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of what the scores depend on."""
    return {"rowgrad": __version__, "python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def metrics(run: AuditRun) -> list[dict[str, Any]]:
    """The lines of the log: `{"kind": "epoch", ...}` for each epoch, then `{"kind": "summary", ...}`."""
    lines: list[dict[str, Any]] = [{"kind": "epoch", **dataclasses.asdict(epoch)} for epoch in run.epochs]
    calibration = run.scores.calibration
    planted = None if run.planted is None else dataclasses.asdict(score_planted(run.scores, run.planted))
    table = run.table
    lines.append(
        {
            "kind": "summary",
            "data": table.name,
            "task": table.task,
            "target": table.target_name,
            "classes": table.classes,
            "notes": table.notes,
            "n_examples": len(table),
            "n_audited": len(run.rows),
            "n_features": len(table.feature_names),
            "n_flagged": None if run.scores.flagged is None else int(run.scores.flagged.sum()),
            "flip": run.flip,
            "planted": planted,
            "calibration": None if calibration is None else _finite(dataclasses.asdict(calibration)),
            "held_out_score": run.held_out,
            "settings": dataclasses.asdict(run.settings) | {"batch_size": run.batch_size, "epochs": len(run.epochs)},
            "n_parameters": run.n_parameters,
            "cost": dataclasses.asdict(run.cost)
            | {"rows_ratio": run.cost.rows_ratio, "audit_ratio": run.cost.audit_ratio},
            "seconds": run.seconds,
            "versions": versions(),
        }
    )
    return lines


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """None for NaN, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def write_metrics(run: AuditRun, path: Path) -> None:
    """Write the log as JSON lines."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in metrics(run))
    path.write_text(text, encoding="utf-8")
