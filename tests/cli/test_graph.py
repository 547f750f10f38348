"""`rowgrad graph`: the listing, paths to a weight, classes of paths, and the files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from rowgrad.cli import main

MODULE = """
import torch
from torch import nn
class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(5))
        self.idle = nn.Linear(4, 4)
    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        return h
def residual():
    torch.manual_seed(0)
    model = Blocks()
    return model, lambda: model(torch.ones(2, 3)).square().sum(1)
class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.RNNCell(3, 4)
    def forward(self, x):
        h = torch.zeros(2, 4)
        for t in range(6):
            h = self.cell(x, h)
        return h
def recurrent():
    model = Reader()
    return model, lambda: model(torch.ones(2, 3)).square().sum(1)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "users_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "users_nets", raising=False)
    return tmp_path


def test_the_graph_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "users_nets:residual"]) == 0
    out = capsys.readouterr().out
    assert re.match(r"\d+ variables, \d+ edges, 12 parameters: ", out)
    assert "stem: addmm" in out
    assert "path" not in out


def test_paths_to_a_weight_by_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "users_nets:residual", "--to", "stem.weight", "--by", "length"]) == 0
    out = capsys.readouterr().out
    assert "32 paths from stem.weight to the loss" in out
    table = out.split("gradient of stem.weight by the number of operations on a path\n")[1].splitlines()[1:]
    assert len(table) == 6  # as many lengths as blocks on a path, 0 to 5
    assert sum(float(line.split()[1].removesuffix("%")) for line in table) == pytest.approx(100, abs=0.5)


def test_time_maps_all_weights_that_are_used_again(capsys: pytest.CaptureFixture[str], module: Path) -> None:
    assert main(["graph", "users_nets:recurrent", "--by", "time", "--out", "map.html"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[2] for line in out.splitlines() if line.startswith("gradient of")] == [
        f"cell.{name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]
    page = (module / "map.html").read_text()
    assert page.count('class="cell"') >= 4 * 6


@pytest.mark.parametrize("kind", ["html", "svg", "txt", "json"])
def test_files(kind: str, module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["graph", "users_nets:residual", "--to", "stem.weight", "--by", "length"]
    assert main([*arguments, "--out", f"new/graph.{kind}"]) == 0
    text = (module / "new" / f"graph.{kind}").read_text()
    assert [p.name for p in (module / "new").iterdir()] == [f"graph.{kind}"]
    if kind == "json":
        plain = json.loads(text)
        assert plain["to"] == {"name": "stem.weight", "paths": 32, "longest": plain["to"]["longest"]}
        assert sum(part["share"] for part in plain["parts"]["stem.weight"].values()) == pytest.approx(1)
        assert len(plain["shares"]) > 10
    elif kind == "txt":
        assert text.rstrip() in capsys.readouterr().out
    else:
        assert re.findall(r"\d%</text>", text)
        assert (kind == "html") == ('class="bar' in text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["users_nets:residual", "--to", "stem.wait"], "near it: 'stem.weight'"),
        (["users_nets:residual", "--to", "idle.weight"], "--to idle.weight: no path leads there from the loss"),
        (["users_nets:residual", "--by", "length"], "--by length divides the gradient of one weight: add --to NAME"),
        (["users_nets:residual", "--by", "time"], "--by time: no weight is used more than once"),
        (["users_nets:residual", "--depth", "-1"], "--depth -1: 0 is one box in all"),
        (["users_nets:residual", "--max-boxes", "0"], "--max-boxes 0: at least 1"),
        (["users_nets:residual", "--out", "graph.png"], "a name ends in .html or .svg or .txt or .json"),
    ],
)
def test_errors_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
