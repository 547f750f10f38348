"""The README's code runs from top to bottom, and the pages made from the code are up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_code_of_the_readme_runs() -> None:
    found = blocks("python")
    assert len(found) >= 4
    names: dict[str, object] = {}
    for block in found:
        exec(compile(block, "README.md", "exec"), names)
    gradients = [p.grad for p in names["model"].parameters()]  # type: ignore[attr-defined]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    assert names["hardest"].shape == (5,)  # type: ignore[attr-defined]


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"


def test_the_support_table_is_that_of_the_rules() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "support_table.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["rowgrad", "rowgrad.rows.build", "rowgrad.checking"])
def test_examples_in_docstrings(name: str) -> None:
    import doctest
    import importlib

    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0
    assert found.attempted > 0 or name == "rowgrad"
