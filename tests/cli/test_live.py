"""What the command makes of `package.module:function`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rowgrad.cli.live import load
from rowgrad.errors import InputError, UserCodeError

GOOD = """
import torch
from torch import nn
def make():
    model = nn.Linear(3, 1)
    return model, lambda: model(torch.ones(4, 3)).square().squeeze(1)
def wrong_pair(): return 3
def wrong_triple(): return 1, 2, 3
def wrong_model(): return 3, lambda: 0
def wrong_closure(): return nn.Linear(1, 1), 5
def raises(): raise ValueError("the data\\nare gone")
def late():
    def closure():
        return helper()
    return nn.Linear(1, 1), closure
def helper(): raise KeyError("batch")
def nothing():
    return nn.Linear(1, 1), lambda: None
def leaves():
    raise SystemExit(5)
constant = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_module.py").write_text(GOOD)
    (tmp_path / "users_broken.py").write_text("import torch\nimport not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("users_module", "users_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "users_module"


def test_a_function_in_the_current_directory_is_found(module: str) -> None:
    live = load(f"{module}:make")
    assert live.closure().shape == (4,)
    assert sum(p.numel() for p in live.model.parameters()) == 4


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine", "iris", "diabetes"])
def test_a_bundled_set_comes_with_a_perceptron(name: str) -> None:
    state = torch.random.get_rng_state()
    live = load(name)
    losses = live.closure()
    assert losses.shape == (64,)
    assert losses.isfinite().all()
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(losses, load(name).closure())


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nothing", r"name a function as package.module:function, or one of the data sets digits"),
        ("users_module:", "name a function as"),
        ("no_such_module:f", "no_such_module: no module of this name, looked for in"),
        ("users_module:absent", "users_module has no function 'absent'; found make, wrong_pair"),
        ("users_module:constant", "has no function 'constant'"),
        ("users_module:wrong_pair", r"returned a value of type int, expected a pair \(model, closure\)"),
        ("users_module:wrong_triple", "returned a value of type tuple and length 3, expected a pair"),
        ("users_module:wrong_model", "the model is a value of type int, expected a torch.nn.Module"),
        ("users_module:wrong_closure", "the closure is a value of type int, expected a function"),
    ],
)
def test_what_cannot_be_used_is_named(module: str, source: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load(source)


def test_an_error_of_the_users_code_shows_the_users_frames_alone(module: str) -> None:
    with pytest.raises(UserCodeError, match=r"users_module:raises\(\) raised ValueError: the data") as caught:
        load(f"{module}:raises")
    text = caught.value.traceback
    assert "users_module.py" in text
    assert text.endswith("ValueError: the data\nare gone")
    assert "live.py" not in text
    assert "importlib" not in text


def test_an_error_of_the_closure_is_told_apart(module: str) -> None:
    live = load(f"{module}:late")
    with pytest.raises(UserCodeError, match=r"the closure of users_module:late raised KeyError: 'batch'") as caught:
        live.closure()
    assert "in helper" in caught.value.traceback


def test_a_missing_import_of_the_users_module_is_theirs(module: str) -> None:
    with pytest.raises(UserCodeError, match=r"importing users_broken raised ModuleNotFoundError: .*not_installed"):
        load("users_broken:f")


def test_a_closure_without_a_loss_is_named(module: str) -> None:
    with pytest.raises(InputError, match="the closure of users_module:nothing returned a value of type NoneType"):
        load(f"{module}:nothing").closure()


def test_a_function_that_leaves_the_process_is_told(module: str) -> None:
    with pytest.raises(UserCodeError, match=r"users_module:leaves\(\) raised SystemExit: 5"):
        load(f"{module}:leaves")


def test_a_path_is_no_module_name(module: str) -> None:
    with pytest.raises(InputError, match=r"name a function as package\.module:function"):
        load("./users_module:make")
