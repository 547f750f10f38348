"""Spaces of hyperparameters: what is drawn from them, how they narrow, where they warn, and what they refuse."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from rowgrad.errors import InputError
from rowgrad.training.recipe import Recipe
from rowgrad.training.search import Plan, points_of
from rowgrad.training.space import DEFAULT, Space, default_space, read_space, recipe_at

SPACE = Space.of(
    {
        "lr": {"exponent": [-3, -1], "points": 5},
        "dropout": {"low": 0.0, "high": 0.5, "points": 3},
        "units": {"low": 4, "high": 12, "points": 3},
        "layers": {"values": [1, 2, 3]},
        "act": {"values": ["relu", "tanh"]},
    }
)


def drawn(space: Space, n: int, **options: Any) -> list[dict[str, Any]]:
    return list(islice(points_of(space, Plan(**options), 0, 1), n))


# What is drawn


def test_the_grid_has_every_point_once() -> None:
    assert SPACE.size == 5 * 3 * 3 * 3 * 2
    points = [tuple(SPACE.point(k).values()) for k in range(SPACE.size)]
    assert len(set(points)) == SPACE.size
    assert {p[0] for p in points} == set(10 ** np.linspace(-3, -1, 5))
    assert {p[1] for p in points} == {0, 0.25, 0.5}
    assert {p[2] for p in points} == {4, 8, 12}


def test_rates_are_uniform_in_the_exponent() -> None:
    rates = [p["lr"] for p in drawn(SPACE, 2000)]
    assert min(rates) >= 1e-3
    assert max(rates) <= 1e-1
    assert scipy.stats.kstest(np.log10(rates), scipy.stats.uniform(-3, 2).cdf).pvalue > 0.01
    assert scipy.stats.kstest(rates, scipy.stats.uniform(1e-3, 0.099).cdf).pvalue < 1e-6  # and not in themselves


def test_other_values_are_uniform_too() -> None:
    points = drawn(SPACE, 2000)
    assert scipy.stats.kstest([p["dropout"] for p in points], scipy.stats.uniform(0, 0.5).cdf).pvalue > 0.01
    for name, values in (("units", range(4, 13)), ("layers", (1, 2, 3)), ("act", ("relu", "tanh"))):
        counts = Counter(p[name] for p in points)
        assert set(counts) == set(values)
        assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.01


def test_a_sample_of_the_grid_has_no_point_twice() -> None:
    points = drawn(SPACE, 30, search="sample", trials=10)
    assert len(points) == 30  # three times as many as are to be completed
    assert len({tuple(p.values()) for p in points}) == 30
    grid = [SPACE.point(k) for k in range(SPACE.size)]
    assert all(p in grid for p in points)
    assert points != grid[:30]


def test_draws_repeat_and_rounds_differ() -> None:
    for search in ("random", "sample"):
        plan = Plan(search=search, trials=5)
        first, again, other = (list(islice(points_of(SPACE, plan, 0, k), 5)) for k in (1, 1, 2))
        assert first == again != other
        assert first != list(islice(points_of(SPACE, plan, 1, 1), 5))


def test_no_global_random_state_is_drawn_from() -> None:
    before = random.getstate()
    drawn(SPACE, 5)
    assert random.getstate() == before


# Coarse to fine


def test_a_space_narrows_to_half_around_a_point_and_stays_inside() -> None:
    point = {"lr": 1e-2, "dropout": 0.5, "units": 8, "layers": 3, "act": "tanh"}
    fine = SPACE.narrowed(point, SPACE)
    lr, dropout, units, layers, act = fine.axes
    assert (lr.low, lr.high) == (-2.5, -1.5)
    assert (dropout.low, dropout.high) == (0.375, 0.5)
    assert (units.low, units.high) == (6, 10)
    assert layers.values == (2, 3)
    assert act.values == ("tanh",)
    finer = fine.narrowed(point, SPACE)
    assert finer.axes[0].low == pytest.approx(-2.25)
    assert finer.axes[2].low < 8 < finer.axes[2].high


# The border


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ({"lr": 0.0999}, "upper border of the space; raise its second exponent from -1, to 0"),
        ({"lr": 0.001}, "lower border of the space; lower its first exponent from -3, to -4"),
        ({"dropout": 0.5}, "upper border of the space; raise its high from 0.5, to 0.75"),
        ({"units": 4}, "lower border of the space; lower its low from 4, to 0"),
        ({"layers": 3}, "upper border of the space; add larger values than 3"),
    ],
)
def test_a_winner_on_the_border_is_told(point: dict[str, Any], said: str) -> None:
    inside = {"lr": 0.01, "dropout": 0.2, "units": 8, "layers": 2, "act": "tanh"}
    assert SPACE.borders(inside) == []
    (sentence,) = SPACE.borders(inside | point)
    assert said in sentence
    assert sentence.startswith(next(iter(point)))


@pytest.mark.parametrize("point", [{"dropout": 0.0}, {"layers": 1}, {"act": "relu"}])
def test_where_nothing_lies_beyond_there_is_no_border(point: dict[str, Any]) -> None:
    assert SPACE.borders({"lr": 0.01, "dropout": 0.2, "units": 8, "layers": 2, "act": "tanh"} | point) == []


# Recipes


def test_layers_and_units_make_up_the_model() -> None:
    assert recipe_at(Recipe(), {"layers": 2, "units": 7, "lr": 0.5}) == Recipe(model="mlp:7,7", lr=0.5)
    assert recipe_at(Recipe(model="mlp:5,5,5"), {"units": 9}).model == "mlp:9,9,9"
    assert recipe_at(Recipe(model="mlp:5"), {"layers": 2}).model == "mlp:5,5"
    with pytest.raises(InputError, match="layers and units make up mlp, not --model cnn:8"):
        recipe_at(Recipe(model="cnn:8"), {"units": 9})


def test_the_default_space_leaves_out_what_is_fixed() -> None:
    assert default_space(Recipe()).names == tuple(DEFAULT)
    assert default_space(Recipe(lr=0.1)).names == ("layers", "units", "l2")
    assert default_space(Recipe(model="mlp:9")).names == ("lr", "l2")
    with pytest.raises(InputError, match="every hyperparameter of the default space is fixed"):
        default_space(Recipe(model="mlp:9", lr=0.1, l2=0.1))


# Files


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(
        'lr = {exponent = [-4, -2], points = 2}\nact = {values = ["relu", "maxout"]}\n'
        'decay = {values = ["none", "inverse"]}\nl2 = {low = 0, high = 1}\n'
    )
    found = read_space(path)
    assert found.names == ("lr", "act", "decay", "l2")
    assert found.axes[0].grid() == (1e-4, 1e-2)
    assert found.axes[2].values == (None, "inverse")
    assert Space.of(found.to_dict()) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the space is empty; it may have layers, units, model, act"),
        ("rate = {values = [1]}", "rate is no hyperparameter; there are layers, units, model"),
        ("epochs = {values = [1]}", "epochs is not searched: every run gets the same number of them"),
        ("lr = [0.1]", r"lr = \[0.1\]: expected {values"),
        ("lr = {values = []}", "lr: values = .*at least one value"),
        ("lr = {values = [0.1, 0.1]}", "lr: 0.1 stands there twice"),
        ('lr = {values = ["fast"]}', "lr: 'fast' is of type str, expected a number"),
        ("lr = {values = [true]}", "lr: True is of type bool"),
        ("lr = {values = [-1]}", "lr: --lr -1: expected a positive number"),
        ("lr = {exponent = [-1, -3]}", "lr: from -1 to -3: the first has to be the smaller"),
        ("lr = {exponent = [-1, -3, 2]}", "expected two numbers"),
        ("lr = {exponent = [0, 999]}", "exponents from 0 to 999"),
        ("lr = {low = 0.1}", "expected {values"),
        ("lr = {low = 0.1, high = 0.2, points = 1}", "points = 1: expected a whole number from 2"),
        ("units = {low = 1.5, high = 3}", "units is a whole number, and so are its ends"),
        ("units = {values = [0]}", "units: 0: at least 1"),
        ("act = {low = 1, high = 2}", "low and high are for numbers; act is text"),
        ('norm = {values = ["group"]}', "norm: --norm group: there are"),
        ('model = {values = ["mlp:8"]}\nunits = {values = [3]}', "layers and units make up the model"),
        ("lr = {", "not TOML"),
    ],
)
def test_a_file_that_is_no_space_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as told:
        read_space(path)
    assert str(path) in str(told.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--space .*none.toml: cannot be read \(No such file"):
        read_space(tmp_path / "none.toml")
