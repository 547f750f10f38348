"""`rowgrad train` beside scikit-learn's perceptrons: within noise, here on the two small sets and few seeds."""

from __future__ import annotations

import importlib
from pathlib import Path
from statistics import mean

import pytest
from examples.against_sklearn import compare

import examples

NAMES = sorted(path.stem for path in Path(examples.__path__[0]).glob("[!_]*.py"))


@pytest.mark.parametrize(("name", "least"), [("wine", 0.9), ("diabetes", 0.2)])
def test_scores_are_within_noise_of_scikit_learns(name: str, least: float) -> None:
    found = compare(name, 2)
    assert mean(found.ours) > least
    assert mean(found.ours) > mean(found.theirs) - 0.06


@pytest.mark.parametrize("name", NAMES)
def test_an_example_can_be_imported_and_says_what_it_is(name: str) -> None:
    assert importlib.import_module(f"examples.{name}").__doc__
