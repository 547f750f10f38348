"""`rowgrad diagnose`: exit codes, findings, and the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rowgrad.cli import main

MODULE = """
import torch
from torch import nn
def deep():
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(11) for m in (nn.Linear(8, 8), nn.Sigmoid())))
    return model, lambda: model(torch.ones(4, 8)).sum(1)
def nan():
    model = nn.Linear(3, 1)
    return model, lambda: (model(torch.ones(4, 3)).square() * -1).log().squeeze(1)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "users_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "users_nets", raising=False)
    return tmp_path


def test_a_healthy_net_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "digits", "--optimizer", "adam"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "diagnosis of 3 layers: ok"
    assert lines[1].split() == ["layer", "activation", "cotangent", "gradient/weight"]
    assert [line.split(":")[1].split()[0] for line in lines if line.startswith("not looked at")] == ["dead", "drift"]


def test_findings_exit_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "users_nets:deep"]) == 1
    out = capsys.readouterr().out
    assert "warning: vanishing at 20 to 0" in out
    assert "not looked at: cliff (needs --optimizer)" in out
    assert main(["diagnose", "users_nets:nan"]) == 1
    assert "log" in capsys.readouterr().out


def test_a_step_too_long_is_a_cliff(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "wine", "--optimizer", "sgd", "--lr", "1000"]) == 1
    assert "cliff at the next step" in capsys.readouterr().out


def test_the_page_and_the_numbers_are_written(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "users_nets:deep", "--out", "new/deep.html"]) == 1
    page = (module / "new" / "deep.html").read_text()
    assert "<svg" in page
    assert "vanishing" in page
    assert main(["diagnose", "users_nets:deep", "--out", "deep.json"]) == 1
    plain = json.loads((module / "deep.json").read_text())
    assert plain["findings"][0]["kind"] == "vanishing"
    assert len(plain["curves"]) == 11


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digits", "--lr", "1"], "--lr 1 belongs to an optimizer: add --optimizer"),
        (["digits", "--lr", "-1", "--optimizer", "sgd"], "--lr -1: a learning rate is positive"),
        (["digits", "--optimizer", "sdg"], "'sdg' is not one of 'sgd'"),
        (["digits", "--out", "x.pdf"], "--out x.pdf: a name ends in .html or .json"),
        (["digits", "--out", "users_nets.py/x.html"], "cannot be written"),
    ],
)
def test_errors_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
