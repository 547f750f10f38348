"""`rowgrad check`: exit codes, table, and report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rowgrad.cli import main

MODULE = """
import torch
from torch import nn
class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.sin()
    @staticmethod
    def backward(ctx, z): return z
def right():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return model, lambda: model(torch.ones(5, 3)).square().squeeze(1)
def scalar():
    model, closure = right()
    return model, lambda: closure().mean()
def wrong():
    model = nn.Linear(3, 1)
    return model, lambda: Wrong.apply(model(torch.ones(5, 3))).squeeze(1)
def infinite():
    model = nn.Linear(3, 1)
    return model, lambda: model(torch.ones(5, 3)).squeeze(1) / 0
def broken():
    model = nn.Linear(3, 1)
    return model, lambda: model(torch.ones(5, 4))
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "users_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "users_nets", raising=False)
    return tmp_path


def test_right_gradients_exit_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "users_nets:right", "--n", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "10 entries and 4 directions, central differences in float64: ok, rho up to 1e-06 allowed"
    assert lines[6] == "5 of 5 rows, one backward pass each: ok, relative errors up to 1e-04 allowed"


def test_a_single_loss_has_no_rows_to_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "users_nets:scalar", "--n", "10", "--scheme", "forward"]) == 0
    assert "rows" not in capsys.readouterr().out
    assert main(["check", "users_nets:right", "--n", "10", "--no-rows"]) == 0
    assert "rows" not in capsys.readouterr().out


def test_wrong_gradients_exit_with_1_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "users_nets:wrong"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert "FAILED  weight" in out
    assert "The fault lies in what is computed from 'weight: addmm': 'after weight: wrong'," in out


@pytest.mark.parametrize("kind", ["html", "json"])
def test_the_report_is_written(module: Path, kind: str) -> None:
    path = module / "new" / f"report.{kind}"
    assert main(["check", "users_nets:wrong", "--out", str(path)]) == 1
    text = path.read_text()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    if kind == "json":
        plain = json.loads(text)
        assert (plain["gradients"]["ok"], plain["rows"]["ok"]) == (False, True)
    else:
        assert "rowgrad check users_nets:wrong --out" in text
        assert "<td>FAILED</td><td>weight</td>" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["users_nets:right", "--n", "0"], "rowgrad: --n 0 --directions 1: at least 1 entry"),
        (["users_nets:right", "--threshold", "2"], "rowgrad: --threshold 2: a relative difference lies between"),
        (["users_nets:right", "--out", "x.txt"], "rowgrad: --out x.txt: a name ends in .html or .json"),
        (["users_nets:right", "--out", "users_nets.py/x.html"], "cannot be written"),
        (["users_nets:infinite"], "rowgrad: 5 of 5 losses are not finite"),
        (["users_nets:nothing"], "rowgrad: users_nets has no function 'nothing'"),
    ],
)
def test_errors_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_an_error_of_the_users_code_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "users_nets:broken"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("rowgrad: the closure of users_nets:broken raised RuntimeError: mat1 and mat2")
    assert any("users_nets.py" in line for line in err[1:])
