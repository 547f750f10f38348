"""`rowgrad tune`: what it says, what it leaves behind, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import polars as pl
import pytest

from rowgrad.cli import main

FILES = {
    *("config.json", "model.safetensors", "report.html", "result.json"),
    *("study.db", "trials.parquet", "winner.safetensors", "winners"),
}
QUICK = ["--trial-epochs", "2", "--epochs", "4", "--winners", "2"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_search_leaves_its_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "space.toml").write_text('lr = {exponent = [-3, -1], points = 2}\nact = {values = ["relu", "tanh"]}\n')
    options = ["tune", "iris", "--space", "space.toml", "--search", "grid", "--keep", "1", *QUICK]
    assert main(options) == 0
    out = folder / "rowgrad-tune-iris"
    assert {p.name for p in out.iterdir()} == FILES
    said = capsys.readouterr().out
    assert said.startswith("The grid has 4 points: 2 of lr x 2 of act.\n")
    assert re.search(r"On 30 test examples, looked at once: ensemble of 2: loss \S+ accuracy", said)
    assert "lies on the" in said  # the rate, of two alone
    trials = pl.read_parquet(out / "trials.parquet")
    assert set(zip(trials["lr"], trials["act"], strict=True)) == {
        (lr, a) for lr in (1e-3, 0.1) for a in ("relu", "tanh")
    }
    config, result = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "result"))
    assert {name: len(part) for name, part in config["split"].items()} == {"train": 96, "val": 24, "test": 30}
    assert result["test"]["ensemble"]["score"] > 0.3
    page = (out / "report.html").read_text()
    assert "rowgrad tune iris --space space.toml" in page
    assert main([*options, "--resume"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert main(["predict", str(out), "iris", "--out", "p.csv"]) == 0
    assert len(pl.read_csv(folder / "p.csv")) == 150


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--space", "none.toml"], "--space none.toml: cannot be read"),
        (["--search", "hill"], "--search hill: there are random, sample, grid"),
        (["--act", "rely"], "--act rely: there are "),
        (["--optimizer", "adma"], "--optimizer adma: there are sgd, momentum"),
        (["--model", "mpl:8"], "--model mpl:8: 'mpl' is no kind of model; there are mlp, cnn"),
        (["--alpha", "0.1"], "--alpha 0.1: is the slope of --act leaky_relu, not of relu"),
        (["--frobnicate"], "No such option: --frobnicate"),
        (["--frobnicate"], "There are --act, --alpha, --batch-size"),
        (["--resume"], "--resume: there is no config.json of a search in rowgrad-tune-iris"),
        (["--lr", "0.1", "--l2", "0.1", "--model", "mlp:4"], "every hyperparameter of the default space is fixed"),
        (["--target", "none"], "iris"),
    ],
)
def test_what_does_not_fit_is_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "iris", *QUICK, "--trials", "1", *options]) == 2
    assert said in capsys.readouterr().err
