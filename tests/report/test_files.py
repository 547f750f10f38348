"""The table of scores and the log."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from tests.report.runs import digits_run, words_run

from rowgrad.report.metrics import metrics, write_metrics
from rowgrad.report.scores import scores_frame, write_scores
from rowgrad.training.audited import AuditRun
from rowgrad.uses.gallery import readable


@pytest.fixture(scope="module")
def digits() -> AuditRun:
    return digits_run()


def test_scores_of_labels(digits: AuditRun, tmp_path: Path) -> None:
    write_scores(digits, tmp_path / "scores.parquet")
    frame = pl.read_parquet(tmp_path / "scores.parquet")
    assert frame.columns == [
        *("index", "rank", "given", "suggested", "suggested_probability", "confidence", "variability", "mean_margin"),
        *("mean_loss", "final_loss", "times_forgotten", "first_learned"),
        *("mean_norm", "final_norm", "peak_norm", "peak_epoch", "self_influence", "times_seen"),
        *("likely_mislabelled", "hard", "never_learned", "redundant", "spiking", "reason", "is_planted", "before"),
    ]
    assert frame.height == len(digits.rows)
    assert frame["index"].to_list() == digits.rows.tolist()
    assert sorted(frame["rank"]) == list(range(1, frame.height + 1))
    assert frame.sort("rank")["mean_loss"].is_sorted(descending=True)
    assert frame.filter(pl.col("likely_mislabelled") != (pl.col("given") != pl.col("suggested"))).is_empty()
    assert frame.filter(pl.col("is_planted") != (pl.col("given") != pl.col("before"))).is_empty()
    assert frame.filter(pl.col("likely_mislabelled"))["suggested_probability"].min() > 0
    first = frame.filter("likely_mislabelled").row(0, named=True)
    assert f"the network gave {first['suggested']} a mean" in first["reason"]
    assert frame["peak_epoch"].is_between(1, 6).all()
    assert frame["times_seen"].unique().to_list() == [6]
    original = digits.table.targets[digits.rows].tolist()
    assert frame["before"].to_list() == [digits.table.classes[label] for label in original]


def test_scores_of_quantities() -> None:
    frame = scores_frame(words_run("regression"))
    assert not {"suggested", "likely_mislabelled", "mean_margin"} & set(frame.columns)
    assert frame["given"].dtype == pl.Float64
    assert frame["line"].to_list() == list(range(2, 122))
    assert frame.filter(pl.col("is_planted") != (pl.col("given") != pl.col("before"))).is_empty()


def test_scores_of_labels_flipped_to_calibrate() -> None:
    run = words_run(flip=0, calibrate=0.1)
    frame, classes = scores_frame(run), run.table.classes
    assert frame["planted"].sum() == 12
    assert frame.filter(pl.col("planted") != (pl.col("given") != pl.col("before"))).is_empty()
    assert frame["before"].to_list() == [classes[label] for label in run.table.targets.tolist()]
    assert frame["given"].to_list() == [classes[label] for label in run.given.tolist()]
    summary = metrics(run)[-1]
    assert summary["calibration"]["n_planted"] == 12
    json.dumps(summary, allow_nan=False)


def test_a_log_without_norms() -> None:
    *epochs, summary = metrics(words_run(norms=False))
    assert {epoch["median_norm"] for epoch in epochs} == {None}
    assert summary["cost"]["rows_ratio"] is None
    assert summary["calibration"] is None
    json.dumps(summary, allow_nan=False)


def test_scores_without_planted_errors_do_not_speak_of_them() -> None:
    assert not {"is_planted", "before"} & set(scores_frame(words_run(flip=0)).columns)


def test_log(digits: AuditRun, tmp_path: Path) -> None:
    write_metrics(digits, tmp_path / "metrics.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    *epochs, summary = lines
    assert [line["number"] for line in epochs] == [1, 2, 3, 4, 5, 6]
    assert {line["kind"] for line in epochs} == {"epoch"}
    assert epochs[-1]["mean_loss"] < epochs[0]["mean_loss"]
    assert 0 < epochs[-1]["accuracy"] <= 1
    assert summary["kind"] == "summary"
    assert summary["n_audited"] == len(digits.rows)
    assert summary["n_flagged"] == int(digits.scores.flagged.sum())
    assert summary["planted"]["n_planted"] == int(digits.planted.sum())
    assert summary["settings"]["seed"] == 0
    assert summary["settings"]["epochs"] == 6
    assert summary["settings"]["batch_size"] == digits.batch_size
    assert {"rowgrad", "torch", "python"} <= set(summary["versions"])
    assert summary["cost"]["rows_ratio"] == pytest.approx(digits.cost.rows_ratio)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "(missing)"), ("", "(missing)"), (0.1, "0.1"), (1 / 3, "0.333333"), ("a", "a"), (3, "3")]
)
def test_values_for_readers(value: object, text: str) -> None:
    assert readable(value) == text
