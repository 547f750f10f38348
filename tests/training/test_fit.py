"""Training by a recipe: it learns, stops in time, and resumes bit for bit after a kill at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rowgrad
from rowgrad.data.readers import read_table
from rowgrad.errors import InputError
from rowgrad.training.checkpoint import load_state, same
from rowgrad.training.fit import CHECKPOINT, Fitted, fit, pose
from rowgrad.training.recipe import Recipe

QUICK = Recipe(model="mlp:16", epochs=6, dropout=0.2)


def weights(fitted: Fitted) -> dict[str, torch.Tensor]:
    return dict(fitted.model.state_dict())


@pytest.mark.parametrize(
    ("data", "recipe", "least"),
    [
        ("digits", Recipe(epochs=15), 0.95),
        ("digits", Recipe(model="cnn:8,16", epochs=20), 0.95),
        ("wine", Recipe(), 0.9),
        ("breast_cancer", Recipe(prepare="whiten"), 0.9),
        ("diabetes", Recipe(), 0.3),
        ("digits", Recipe(epochs=15, norm="batch-pre", act="leaky_relu", alpha=0.1, init="he"), 0.95),
        ("digits", Recipe(epochs=10, init="pretrain"), 0.95),
        ("digits", Recipe(epochs=15, optimizer="momentum", decay="inverse", decay_rate=0.1, clip_norm=1.0), 0.93),
    ],
)
def test_it_learns(data: str, recipe: Recipe, least: float) -> None:
    found = fit(read_table(data), recipe)
    best = found.epochs[found.best - 1]
    assert best.val_score is not None
    assert best.val_score > least
    assert best.val_loss == min(e.val_loss for e in found.epochs if e.val_loss is not None)


def test_the_same_recipe_gives_the_same_bits_and_another_seed_others() -> None:
    table = read_table("wine")
    state = torch.get_rng_state()
    first = fit(table, QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert same(weights(fit(table, QUICK)), weights(first))
    assert not same(weights(fit(table, replace(QUICK, seed=1))), weights(first))


@pytest.mark.parametrize(
    "recipe", [QUICK, replace(QUICK, optimizer="nesterov", decay="exponential", norm="batch-post")]
)
@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_run_goes_on_where_it_was(recipe: Recipe, after: int, tmp_path: Path) -> None:
    table = read_table("wine")
    whole = fit(table, recipe)
    fit(table, replace(recipe, epochs=after), directory=tmp_path)
    found = fit(table, recipe, directory=tmp_path, resume=True)
    assert same(weights(found), weights(whole))
    assert [(e.number, e.train_loss, e.val_loss) for e in found.epochs] == [
        (e.number, e.train_loss, e.val_loss) for e in whole.epochs
    ]


PROGRAM = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from rowgrad.data.readers import read_table
from rowgrad.training.fit import fit
from rowgrad.training.recipe import Recipe
recipe = Recipe(model="mlp:16", epochs=60, dropout=0.2, patience=0)
fit(read_table("wine"), recipe, directory=Path(sys.argv[1]), resume=True)
"""


def test_a_run_killed_at_random_moments_ends_the_same(tmp_path: Path) -> None:
    folders = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    environment = dict(os.environ, PYTHONPATH=str(Path(rowgrad.__file__).parents[1]))

    def start(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)], env=environment)

    assert start(folders[0]).wait() == 0
    n_killed = 0
    for _ in range(3):
        process = start(folders[1])
        while not (folders[1] / CHECKPOINT).exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        n_killed += process.wait() == -signal.SIGKILL
    assert start(folders[1]).wait() == 0
    assert n_killed > 0
    whole, killed = (load_state(folder / CHECKPOINT) for folder in folders)
    assert same(whole["loop"], killed["loop"])
    assert same(whole["best"], killed["best"])


def test_pretraining_repeats_bit_for_bit() -> None:
    table = read_table("digits")
    recipe = Recipe(model="mlp:64", epochs=1, init="pretrain")
    first = fit(table, recipe)
    assert same(weights(fit(table, recipe)), weights(first))
    with pytest.raises(InputError, match="--init pretrain is for mlp, not for --model cnn:8"):
        fit(table, replace(recipe, model="cnn:8"))


def test_training_stops_when_it_gets_no_better() -> None:
    found = fit(read_table("wine"), Recipe(epochs=400, patience=3))
    assert len(found.epochs) < 400
    assert found.stopped == "no better validation loss in 3 epochs"
    assert found.best == len(found.epochs) - 3


def test_without_held_out_examples_the_last_epoch_counts() -> None:
    found = fit(read_table("wine"), replace(QUICK, val=0.0, patience=0))
    assert found.epochs[-1].val_loss is None
    assert (found.best, found.stopped) == (6, "all 6 epochs are done")


def test_preparation_sees_the_training_part_alone() -> None:
    table = read_table("wine")
    problem = pose(table, QUICK)
    assert sorted([*problem.train.tolist(), *problem.val.tolist()]) == list(range(len(table)))
    torch.testing.assert_close(problem.prepared.center, table.features[problem.train].double().mean(0))
    assert abs(float(problem.inputs[problem.train].mean())) < 1e-6


def test_divergence_is_told_with_a_finding_and_the_good_checkpoint_stays(tmp_path: Path) -> None:
    table = read_table("diabetes")
    recipe = replace(QUICK, optimizer="sgd", lr=1e4, dropout=0.0)
    fit(table, replace(recipe, lr=1e-2, epochs=2), directory=tmp_path)
    kept = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(InputError, match=r"training diverged at step \d+: the loss of example \d+ is (inf|nan)"):
        fit(table, recipe, directory=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept


def test_a_checkpoint_of_other_options_is_refused(tmp_path: Path) -> None:
    table = read_table("wine")
    fit(table, QUICK, directory=tmp_path)
    with pytest.raises(InputError, match=r"is of another run: --lr 0.1 instead of None, --seed 3 instead of 0"):
        fit(table, replace(QUICK, lr=0.1, seed=3), directory=tmp_path, resume=True)


@pytest.mark.parametrize(("n", "size"), [(50, 32), (639, 32), (1280, 64), (5000, 128), (10**6, 256), (20, 20)])
def test_the_default_batch_is_a_power_of_two_by_the_number_of_examples(n: int, size: int) -> None:
    assert Recipe().batch_size_for(n) == size


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"val": 1.0}, "--val 1: a share"),
        ({"lr": -1.0}, "--lr -1: expected a positive number"),
        ({"clip_norm": 0.0}, "--clip-norm 0: expected a positive number"),
        ({"l2": float("nan")}, "--l2 nan"),
        ({"epochs": 0}, "--epochs 0: at least 1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"norm": "group"}, "--norm group: there are batch-pre"),
        ({"init": "xavier"}, "--init xavier: there are lecun"),
        ({"val": 0.0}, "--patience needs examples held out"),
    ],
)
def test_bad_recipes(options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Recipe(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(optimizer="newton"), "--optimizer newton takes the loss as a function"),
        (Recipe(optimizer="adamm"), "optimizer 'adamm': expected one of"),
        (Recipe(model="cnn:8"), "needs images"),
        (Recipe(model="cnn:8", init="pretrain"), "needs images"),
        (Recipe(val=0.995), "examples are left to train on; lower --val"),
        (Recipe(decay="linear"), "decay: kind='linear'"),
    ],
)
def test_recipes_that_do_not_fit_the_data(recipe: Recipe, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fit(read_table("wine"), recipe)
