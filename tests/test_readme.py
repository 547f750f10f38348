"""The README's code runs from top to bottom, and the pages made from the code are up to date."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rowgrad

ROOT = Path(__file__).parents[1]


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_code_of_the_readme_runs() -> None:
    found = blocks("python")
    assert len(found) >= 4
    names: dict[str, object] = {}
    for block in found:
        exec(compile(block, "README.md", "exec"), names)
    gradients = [p.grad for p in names["model"].parameters()]  # type: ignore[attr-defined]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    assert names["hardest"].shape == (5,)  # type: ignore[attr-defined]
    assert names["losses"].shape == (32,)  # type: ignore[attr-defined]


def test_the_code_of_the_page_on_seeing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks("python", "docs/seeing.md")
    assert len(found) >= 6
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for block in found:
            exec(compile(block, "seeing.md", "exec"), names)
    written = {"graph.html", "diagnosis.html", "run.jsonl", "monitor.html"}
    assert {p.name for p in tmp_path.iterdir()} == written


def test_the_code_of_the_page_on_clipping_and_noise_runs() -> None:
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for block in blocks("python", "docs/clipping-and-noise.md"):
            exec(compile(block, "clipping-and-noise.md", "exec"), names)
            assert block.count("# +") <= 5, f"more than five lines added:\n{block}"
    assert names["noise"].updates == 8  # type: ignore[attr-defined]
    gradients = [p.grad for p in names["model"].parameters()]  # type: ignore[attr-defined]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)


def test_the_code_of_the_page_on_sampling_runs() -> None:
    found = blocks("python", "docs/sampling.md")
    assert len(found) >= 5
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for block in found:
            exec(compile(block, "sampling.md", "exec"), names)
    assert bool(names["draw"].weight.isfinite().all())  # type: ignore[attr-defined]


def test_the_code_of_the_page_on_auditing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for block in blocks("python", "docs/auditing.md"):
            exec(compile(block, "auditing.md", "exec"), names)
            assert block.count("# +") <= 5, f"more than five lines added:\n{block}"
            if "print(scores.order" in block:
                assert {*range(6)} <= {*names["scores"].order()[:12].tolist()}
    assert names["audit"].compute().times_seen.tolist() == [5] * 96
    assert {p.name for p in tmp_path.iterdir()} == {"audit.html"}


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"


def test_the_support_table_is_that_of_the_rules() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "support_table.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def without_words(site):
    return None


def from_elsewhere(site):
    """A rule of no family."""


@pytest.mark.parametrize(
    ("rule", "message"), [(without_words, "has no docstring"), (from_elsewhere, "is not among the families")]
)
def test_a_rule_cannot_be_half_added(rule, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(ROOT / "tools" / "support_table.py"))["about"](rule)


MODULES = [found.name for found in pkgutil.walk_packages(rowgrad.__path__, "rowgrad.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    assert not doctest.testmod(importlib.import_module(name)).failed


@pytest.mark.parametrize("name", rowgrad.__all__)
def test_what_is_called_has_an_example(name: str) -> None:
    exported = getattr(rowgrad, name)
    if callable(exported) and not (inspect.isclass(exported) and issubclass(exported, BaseException | Warning)):
        assert ">>> " in (exported.__doc__ or ""), f"rowgrad.{name} has no example in its docstring"
