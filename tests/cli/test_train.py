"""`rowgrad train` and `predict`: files, resumed runs, and predictions by the saved model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.datasets import load_diabetes, load_wine

from rowgrad.cli import main
from rowgrad.training.checkpoint import load_state, same
from rowgrad.training.loop import Loop

FILES = {"checkpoint.safetensors", "config.json", "history.parquet", "model.safetensors", "report.html"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_leaves_its_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "wine", "--epochs", "5", "--monitor", "2", "--check-grad", "2", "--clip-norm", "1"]) == 0
    out = folder / "rowgrad-train-wine"
    assert {p.name for p in out.iterdir()} == FILES | {"monitor.jsonl"}
    said = capsys.readouterr().out
    assert "Stopped after 5 epochs: all 5 epochs are done." in said
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"]["clip_norm"] == 1
    assert config["resolved"]["batch_size"] == 32
    assert len(config["split"]["train"]) + len(config["split"]["val"]) == 178
    history = pl.read_parquet(out / "history.parquet")
    assert history["number"].to_list() == [1, 2, 3, 4, 5]
    assert 0 <= history["clipped"][-1] <= 1
    page = (out / "report.html").read_text()
    assert "Loss by epoch" in page
    assert "rowgrad train wine --epochs 5" in page


def test_a_resumed_run_ends_with_the_same_bits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "wine", "--epochs", "6", "--out", "whole"]) == 0
    assert main(["train", "wine", "--epochs", "2", "--out", "parts"]) == 0
    assert main(["train", "wine", "--epochs", "6", "--out", "parts"]) == 2
    assert "--out parts: holds a run; go on with --resume" in capsys.readouterr().err
    assert main(["train", "wine", "--epochs", "6", "--out", "parts", "--resume"]) == 0
    states = [load_state(folder / name / "model.safetensors") for name in ("whole", "parts")]
    assert same(*states)


@pytest.mark.parametrize("options", [[], ["--whiten"], ["--no-standardize", "--norm", "batch-pre"]])
def test_predictions_are_the_models(options: list[str], folder: Path) -> None:
    assert main(["train", "wine", "--epochs", "40", "--out", "run", *options]) == 0
    assert main(["predict", "run", "wine", "--out", "p.parquet"]) == 0
    found = pl.read_parquet(folder / "p.parquet")
    given = [str(load_wine().target_names[k]) for k in load_wine().target]
    assert (found["prediction"] == pl.Series(given)).mean() > 0.9  # pyright: ignore[reportOperatorIssue]
    probabilities = found.select(pl.sum_horizontal(pl.selectors.starts_with("probability"))).to_series()
    assert probabilities.is_between(0.999, 1.001).all()


def test_images_and_values(folder: Path) -> None:
    assert main(["train", "digits", "--model", "cnn:4", "--epochs", "2", "--out", "images"]) == 0
    assert main(["predict", "images/model.safetensors", "digits"]) == 0
    assert len(pl.read_csv(folder / "predictions.csv")) == 1797
    assert main(["train", "diabetes", "--epochs", "60", "--out", "values"]) == 0
    assert main(["predict", "values", "diabetes", "--out", "values.csv"]) == 0
    found = pl.read_csv(folder / "values.csv")["prediction"].to_numpy()
    target = load_diabetes().target
    assert ((found - target) ** 2).mean() < 0.7 * target.var()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "wine", "--resume"], "--resume: there is no checkpoint.safetensors"),
        (["train", "wine", "--model", "cnn:8"], "needs images"),
        (["train", "wine", "--optimizer", "addam"], "--optimizer addam: there are sgd, momentum"),
        (["train", "wine", "--monitor", "-1"], "--monitor -1"),
        (["train", "wine", "--optimizer-option", "beta"], "--optimizer-option beta: expected NAME=VALUE, such as mom"),
        (["train", "wine", "--optimizer-option", "beta=1"], "adam has no option 'beta'; it has: lr, betas, eps"),
        (["train", "wine", "--optimizer", "sgd", "--lr", "1e9"], "training diverged: step"),
        (["train", "wines"], "wines: no such file"),
        (["predict", "nowhere.safetensors", "wine"], "no such checkpoint"),
        (["predict", "nowhere", "wine", "--out", "p.xlsx"], "a name ends in .csv or .parquet"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert not list(folder.iterdir())


def test_options_of_the_optimizer_are_saved_as_used(folder: Path) -> None:
    options = ["nesterov=true", "momentum=0.95", "foreach=none"]
    given = [part for option in options for part in ("--optimizer-option", option)]
    assert main(["train", "wine", "--epochs", "1", "--out", "sgd", "--optimizer", "sgd", *given]) == 0
    used = json.loads((folder / "sgd" / "config.json").read_text())["resolved"]
    assert used["optimizer"] == "SGD"
    assert (used["optimizer_options"]["nesterov"], used["optimizer_options"]["momentum"]) == (True, 0.95)
    given = ["--optimizer-option", "betas=0.8,0.9", "--clip-norm", "2", "--clip-mode", "normalize"]
    assert main(["train", "wine", "--epochs", "1", "--out", "adam", *given]) == 0
    config = json.loads((folder / "adam" / "config.json").read_text())
    assert config["resolved"]["optimizer_options"]["betas"] == [0.8, 0.9]
    assert (config["recipe"]["clip_mode"], config["recipe"]["clip_norm"]) == ("normalize", 2)
    assert pl.read_parquet(folder / "adam" / "history.parquet")["clipped"].to_list() == [1.0]


def test_an_interrupted_run_says_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Loop.run

    def interrupted(loop: Loop, epochs: int) -> Iterator[torch.Tensor]:
        if loop.epoch == 2:
            raise KeyboardInterrupt
        return whole(loop, epochs)

    monkeypatch.setattr(Loop, "run", interrupted)
    assert main(["train", "wine", "--epochs", "4", "--out", "run"]) == 130
    err = capsys.readouterr().err
    assert "rowgrad: the last whole epoch is kept in run; go on with --resume" in err
    assert "interrupted; no results were written" in err
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert main(["train", "wine", "--epochs", "4", "--out", "run", "--resume"]) == 0


def test_data_of_other_features_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "wine", "--epochs", "1", "--out", "run"]) == 0
    assert main(["predict", "run", "iris"]) == 2
    assert "iris: there is no column 'alcohol', as there was in training; found sepal length" in capsys.readouterr().err
    assert main(["predict", "run", "digits"]) == 2
    assert "its features, without 'alcohol', are not those the model was trained on" in capsys.readouterr().err
    assert main(["predict", "run", "wine", "--codes"]) == 2
    assert "codes are those of an autoencoder; train one with --model autoencoder:32,8" in capsys.readouterr().err
    assert main(["predict", "run/checkpoint.safetensors", "wine"]) == 2
    assert "a checkpoint of a training, not a model" in capsys.readouterr().err


HEADER, COLORS = "size,color,weight,price\n", ("red", "green", "blue")


def colors(path: Path, n: int = 60) -> Path:
    """A table with a category, missing numbers, a constant column and a target of numbers."""
    rows = [
        f"{k % 7 + k / 9},{COLORS[k % 3]},{'' if k % 10 == 3 else k % 5},{k % 7 + 2 * (k % 3) + k / 99}"
        for k in range(n)
    ]
    path.write_text(HEADER + "\n".join(rows) + "\n")
    return path


def test_predictions_need_no_target_and_one_example_at_a_time_will_do(folder: Path) -> None:
    assert main(["train", str(colors(folder / "t.csv")), "--target", "price", "--epochs", "3", "--out", "run"]) == 0
    assert main(["predict", "run", "t.csv", "--out", "all.parquet"]) == 0
    found = pl.read_parquet("all.parquet")["prediction"]
    lines = (folder / "t.csv").read_text().splitlines()
    for k in (0, 13, 59):
        size, color, weight, _ = lines[k + 1].split(",")
        (folder / "one.csv").write_text(f"color,extra,weight,size\n{color},7,{weight},{size}\n")
        assert main(["predict", "run", "one.csv", "--out", "one.parquet"]) == 0
        assert pl.read_parquet("one.parquet")["prediction"][0] == pytest.approx(found[k], rel=1e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "size,color,weight\n1,mauve,3\n",
            "column 'color' holds 'mauve' in line 2; in training it held blue, green, red",
        ),
        (
            "size,color,weight\n1,red,3\n,red,3\n",
            "column 'size' has no number in line 3; in training every example had",
        ),
        ("size,color,weight\nbig,red,3\n", "column 'size' holds text ('big'); in training it held numbers"),
        ("size,weight\n1,3\n", "there is no column 'color', as there was in training; found size, weight"),
        ("size,color,weight\n", "found no examples"),
    ],
)
def test_predictions_refuse_what_training_did_not_know(
    text: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(colors(folder / "t.csv")), "--target", "price", "--epochs", "1", "--out", "run"]) == 0
    (folder / "new.csv").write_text(text)
    assert main(["predict", "run", "new.csv"]) == 2
    assert said in capsys.readouterr().err


def test_an_autoencoder_needs_no_target(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "autoencoder:6,2", "--epochs", "3"]
    assert main(["train", str(colors(folder / "t.csv")), *options, "--drop", "price", "--out", "a"]) == 0
    assert "R² of the reconstruction" in capsys.readouterr().out
    (folder / "t2.csv").write_text((folder / "t.csv").read_text().replace("price", "target"))
    assert main(["train", "t2.csv", *options, "--out", "b"]) == 0
    states = [load_state(folder / name / "model.safetensors") for name in ("a", "b")]
    assert same(*states)
    assert main(["predict", "b", "t.csv", "--codes"]) == 0
    found = pl.read_csv("predictions.csv")
    assert found.columns == ["index", "reconstruction error", "code 0", "code 1"]
    assert (found["reconstruction error"] > 0).all()
    np.savez(folder / "i.npz", X=np.random.default_rng(0).normal(size=(40, 6, 6)))
    assert main(["train", "i.npz", *options, "--out", "images"]) == 0
    assert main(["predict", "images", "i.npz"]) == 0
    assert main(["predict", "images", "t.csv"]) == 2
    assert "a table, where images or sequences" in capsys.readouterr().err
    assert main(["train", "i.npz"]) == 2
    assert "no array of targets" in capsys.readouterr().err


@pytest.mark.filterwarnings("default::rowgrad.errors.RowgradWarning")
def test_an_audit_names_lines_and_shows_its_suspects(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["a,b,label"] + [f"{k % 5},{k % 3 + k / 50},{'high' if k % 5 > 2 else 'low'}" for k in range(60)]
    assert lines[18].endswith("low")
    lines[18] = lines[18].replace("low", "high")
    (folder / "t.csv").write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    options = ["--audit", "--norm", "batch-post", "--epochs", "30", "--patience", "0", "--val", "0"]
    assert main(["train", "t.csv", *options, "--out", "run"]) == 0
    out, err = capsys.readouterr()
    assert "Of 60 training examples: " in out
    assert err.count("rowgrad: --audit with --norm batch-post: the examples of a batch are coupled") == 1
    scores = pl.read_parquet(folder / "run" / "scores.parquet")
    assert scores["line"].to_list() == list(range(3, 63))
    assert set(scores["given"]) == {"high", "low"}
    first = scores.sort("rank").row(0, named=True)
    assert first["line"] == 20
    page = (folder / "run" / "report.html").read_text()
    assert f"<td>1</td><td>20</td><td>{first['given']}</td><td>{first['suggested']}" in page
    assert main(["train", "t.csv", *options[1:], "--out", "run", "--resume"]) == 2
    assert "is of another run: no --audit. Resume with" in capsys.readouterr().err
