"""`rowgrad audit`, `train` and `predict` on sentences: what is found, shown, and done with words never seen."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import polars as pl
import pytest
from examples.against_cleanlab import sentences

from rowgrad.cli import main
from rowgrad.training.checkpoint import load_state, same

FEW = ("asyncio", "email", "tkinter")


@cache
def said() -> pl.DataFrame:
    pairs = [pair for pair in sentences() if pair[1] in FEW]
    return pl.DataFrame(pairs, schema=["body", "package"], orient="row")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sentences of docstrings with their packages, in said.csv."""
    monkeypatch.chdir(tmp_path)
    said().write_csv("said.csv")
    return tmp_path


def test_an_audit_finds_sentences_of_other_packages(capsys: pytest.CaptureFixture[str]) -> None:
    command = "audit said.csv --target package --flip 0.1 --epochs 10 --out found"
    assert main(command.split()) == 0
    assert "Text columns became bags of words: body (" in capsys.readouterr().out
    scores = pl.read_parquet("found/scores.parquet").sort("rank")
    assert scores.columns[:2] == ["index", "line"]
    n_planted = scores["is_planted"].sum()
    first = scores.head(n_planted)["is_planted"].mean()
    assert first is not None
    assert float(first) > 0.55  # pyright: ignore[reportArgumentType]  by chance a tenth


def test_the_page_shows_the_text_cut_and_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        f"Note {k}: <b>bold</b> &amp; {'red' if k % 2 else 'blue'} {'word ' * 300 * (k % 3 == 0)}" for k in range(60)
    ]
    labels = ["red" if k % 2 else "blue" for k in range(60)]
    pl.DataFrame({"said": lines, "size": range(60), "label": labels}).write_csv("marked.csv")
    assert main(["audit", "marked.csv", "--epochs", "2", "--hidden", "8", "--out", "found"]) == 0
    page = Path("found/report.html").read_text()
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold&lt;/b&gt; &amp;amp; " in page
    assert "said: word" not in page  # the bag
    shown = [part.split("</p>")[0] for part in page.split('<p class="text">')[1:]]
    assert len(shown) == page.count('<div class="suspect')
    assert all(len(text) < 450 for text in shown)
    assert any(text.endswith("…") for text in shown)
    assert page.count("<summary>Whole text</summary>") == sum(text.endswith("…") for text in shown)
    assert "<dt>size</dt>" in page
    assert "<dt>said</dt>" not in page


def test_a_trained_model_reads_words_it_never_saw(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["said.csv", "--target", "package", "--model", "mlp:16", "--audit"]
    assert main(["train", *options, "--epochs", "4", "--out", "whole"]) == 0
    assert "bags of words: body" in capsys.readouterr().out
    assert '<div style="white-space: normal; width: 18rem">' in Path("whole/report.html").read_text()
    new = [
        "Return the header of a message as a Zeppelin.",
        "Zeppelins rust quietly",
        "",
        "A widget in the window of a Tk application",
    ]
    pl.DataFrame({"body": new}).write_csv("new.csv", quote_style="always")
    assert main(["predict", "whole", "new.csv"]) == 0
    found = pl.read_csv("predictions.csv")
    assert found["prediction"].to_list()[::3] == ["email", "tkinter"]
    assert found.row(1)[1:] == found.row(2)[1:]  # no word is known
    pl.DataFrame({"text": new}).write_csv("other.csv")
    assert main(["predict", "whole", "other.csv"]) == 2
    assert "there is no column 'body', as there was in training" in capsys.readouterr().err
    for epochs, more in (("2", []), ("4", ["--resume"])):
        assert main(["train", *options, "--epochs", epochs, "--out", "parts", *more]) == 0
    assert same(*(load_state(folder / name / "model.safetensors") for name in ("whole", "parts")))


@pytest.mark.parametrize("command", ["audit", "train"])
def test_a_column_of_names_is_refused_unless_it_is_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"Anna{k % 4} Berg{k}" for k in range(60)]
    pl.DataFrame({"name": names, "label": ["x", "y"] * 30}).write_csv("names.csv")
    arguments = [command, "names.csv", "--epochs", "1"]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "leave it out with --drop name, or count its words with --text name" in err
    assert err.count("\n") == 1
    assert main([*arguments, "--text", "name"]) == 0
    assert "Text columns became bags of words: name (4 words)." in capsys.readouterr().out
    assert main([*arguments, "--text", "nosuch"]) == 2
    assert "--text nosuch: no such column; found name, label" in capsys.readouterr().err
