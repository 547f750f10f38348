"""Searches: runs that are ended and replaced, winners, the test looked at once, and going on after a kill."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rowgrad
from rowgrad.data.readers import read_table
from rowgrad.errors import InputError
from rowgrad.training import search, tuning
from rowgrad.training.recipe import Recipe
from rowgrad.training.saved import Ensemble, load_model
from rowgrad.training.search import Plan
from rowgrad.training.tuning import Tuned, tune

IRIS = read_table("iris")
RECIPE = Recipe(model="mlp:8", epochs=8, patience=0)
SPACE = {"lr": {"exponent": [-3, -1], "points": 4}, "l2": {"exponent": [-6, -2], "points": 2}}
PLAN = Plan(trials=5, trial_epochs=3, winners=2, keep=1)


def same(a: Tuned, b: Tuned) -> bool:
    """Whether two searches came to the same, runs that a kill broke off aside."""
    runs = [[replace(t, number=0) for t in found.trials if t.state != "abandoned"] for found in (a, b)]
    winners = [[replace(w, number=0) for w in found.winners] for found in (a, b)]
    return runs[0] == runs[1] and winners[0] == winners[1] and (a.validation, a.test) == (b.validation, b.test)


@pytest.fixture(scope="module")
def found() -> Tuned:
    return tune(IRIS, SPACE, RECIPE, PLAN)


def test_the_best_are_trained_to_completion_and_nothing_else_is(found: Tuned) -> None:
    assert [t.state for t in found.trials] == ["completed"] * 5
    assert all(len(t.curve) == 3 for t in found.trials)
    assert all(t.loss == min(t.curve) for t in found.trials)
    ranked = sorted(found.trials, key=lambda t: t.loss)
    assert {w.number for w in found.winners} == {t.number for t in ranked[:2]}
    assert [w.n_epochs for w in found.winners] == [8, 8]
    assert found.winners[0].validation.loss <= found.winners[1].validation.loss
    assert found.best == ranked[0]
    trial = found.trials[found.winners[0].number]
    assert (found.winners[0].recipe.lr, found.winners[0].recipe.seed) == (trial.point["lr"], trial.seed)
    assert len({t.seed for t in found.trials}) == 5


def test_the_parts_are_apart(found: Tuned) -> None:
    parts = [set(found.split[name]) for name in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 150
    assert list(map(len, parts)) == [96, 24, 30]


def test_a_search_repeats(found: Tuned) -> None:
    assert same(found, tune(IRIS, SPACE, RECIPE, PLAN))
    assert not same(found, tune(IRIS, SPACE, replace(RECIPE, seed=1), PLAN))


def test_the_labels_of_the_test_shape_nothing(found: Tuned) -> None:
    targets = IRIS.targets.clone()
    test = torch.tensor(found.split["test"])
    targets[test] = (targets[test] + 1) % 3
    other = tune(replace(IRIS, targets=targets), SPACE, RECIPE, PLAN)
    assert other.test != found.test
    assert same(replace(other, test=found.test), found)


def test_the_test_is_looked_at_once(found: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run and no winner is given the test examples; the two models that are compared are, once each."""
    judged, given = [], []
    judge, fit = tuning.judged, tuning.fit

    def watched(by: Any, table: Any) -> Any:
        judged.append(len(table))
        return judge(by, table)

    def fitted(table: Any, *args: Any, **options: Any) -> Any:
        given.append(len(table))
        return fit(table, *args, **options)

    monkeypatch.setattr(tuning, "judged", watched)
    for module in (tuning, search):
        monkeypatch.setattr(module, "fit", fitted)
    tune(IRIS, SPACE, RECIPE, PLAN)
    assert judged.count(30) == 2
    assert given == [120] * 7


def test_without_a_test_there_is_none() -> None:
    assert tune(IRIS, SPACE, RECIPE, replace(PLAN, trials=2, test=0.0)).test is None


def test_a_grid_is_tried_whole_and_a_sample_of_it_once() -> None:
    whole = tune(IRIS, SPACE, RECIPE, replace(PLAN, search="grid", trials=None, trial_epochs=1))
    assert len({tuple(t.point.values()) for t in whole.trials}) == len(whole.trials) == 8
    part = tune(IRIS, SPACE, RECIPE, replace(PLAN, search="sample", trials=4, trial_epochs=1))
    assert len({tuple(t.point.values()) for t in part.trials}) == len(part.trials) == 4
    assert all(t.point in [w.point for w in whole.trials] for t in part.trials)


def test_a_second_round_searches_around_the_best_of_the_first() -> None:
    found = tune(IRIS, {"lr": {"exponent": [-4, 0]}}, RECIPE, replace(PLAN, rounds=2, trials=4))
    rounds = [[t for t in found.trials if t.round == k] for k in (1, 2)]
    assert [len(r) for r in rounds] == [4, 4]
    best = torch.tensor(min(rounds[0], key=lambda t: t.loss).point["lr"]).log10()
    assert all(abs(torch.tensor(t.point["lr"]).log10() - best) <= 1 + 1e-4 for t in rounds[1])


# Runs that are ended


def test_runs_that_diverge_are_replaced() -> None:
    plan = replace(PLAN, trials=4)
    found = tune(IRIS, {"lr": {"values": [0.05, 1e9]}}, replace(RECIPE, optimizer="sgd"), plan)
    states = [t.state for t in found.trials]
    assert states.count("completed") == 4
    assert "killed" in states
    killed = [t for t in found.trials if t.state == "killed"]
    assert all(t.point["lr"] == 1e9 and t.why and t.loss is None for t in killed)
    assert f"{len(states)} runs, 4 completed and {len(killed)} killed" in found.notes[0]


def test_no_more_than_three_times_as_many_are_started() -> None:
    with pytest.raises(InputError, match=r"none of 6 runs was completed. The first were killed for: .*diverged"):
        tune(IRIS, {"lr": {"values": [1e9, 1e10]}}, replace(RECIPE, optimizer="sgd"), replace(PLAN, trials=2))


def test_runs_that_stay_behind_are_ended_after_a_third_of_their_epochs() -> None:
    plan = replace(PLAN, trials=12, trial_epochs=6, keep=0.5)
    found = tune(IRIS, {"lr": {"exponent": [-5, -1]}}, RECIPE, plan)
    behind = [t for t in found.trials if "behind the better 50% of earlier runs" in t.why]
    assert all(t.state == "killed" and len(t.curve) == 2 for t in behind)
    for t in found.trials[4:]:
        earlier = sorted(min(e.curve[:2]) for e in found.trials[: t.number])
        assert (t in behind) is (min(t.curve[:2]) > earlier[-(-len(earlier) // 2) - 1])
    assert not any(t in behind for t in found.trials[:4])
    assert sum(t.state == "completed" for t in found.trials) == 12  # the bar does not rise from run to run
    assert 5 < len(behind) < 24


def test_runs_whose_gradients_vanish_are_ended_for_that() -> None:
    deep = "mlp:" + ",".join(["8"] * 12)
    space = {"model": {"values": ["mlp:8", deep]}, "lr": {"values": [0.01]}}
    recipe = replace(RECIPE, model=Recipe.model, act="sigmoid", optimizer="sgd")
    plan = replace(PLAN, search="grid", trials=None, trial_epochs=6, winners=1)
    found = tune(IRIS, space, recipe, plan)
    killed = [t for t in found.trials if t.state == "killed"]
    assert [t.point["model"] for t in killed] == [deep]
    assert "vanishing" in killed[0].why
    assert len(killed[0].curve) <= 3
    left = tune(IRIS, space, recipe, replace(plan, diagnose=False))
    assert [t.state for t in left.trials] == ["completed"] * 2


def test_runs_that_cannot_be_made_are_told_and_replaced() -> None:
    space = {"norm": {"values": ["none", "batch-pre"]}, "act": {"values": ["relu", "maxout"]}}
    found = tune(IRIS, space, RECIPE, replace(PLAN, search="grid", trials=None, trial_epochs=1))
    killed = [t for t in found.trials if t.state == "killed"]
    assert [t.point for t in killed] == [{"norm": "batch-pre", "act": "maxout"}] or not killed
    space = {"optimizer": {"values": ["adam", "newton"]}}
    found = tune(IRIS, space, replace(RECIPE, model="mlp:300"), replace(PLAN, trials=2, trial_epochs=1))
    killed = [t for t in found.trials if t.state == "killed"]
    assert all("cannot be made: --optimizer newton: the model has 2,403 parameters" in t.why for t in killed)
    assert sum(t.state == "completed" for t in found.trials) == 2


def test_a_search_that_fits_no_run_leaves_nothing(tmp_path: Path) -> None:
    recipe = replace(RECIPE, model="mlp:300", optimizer="newton")
    with pytest.raises(InputError, match=r"none of 15 runs was completed\. .*cannot be made"):
        tune(IRIS, {"l2": SPACE["l2"]}, recipe, PLAN, directory=tmp_path / "search")
    assert not (tmp_path / "search").exists()


# Files


def test_damaged_files_are_told(tmp_path: Path) -> None:
    plan, recipe = replace(PLAN, trials=1, trial_epochs=1, winners=1), replace(RECIPE, epochs=1)
    tune(IRIS, SPACE, recipe, plan, directory=tmp_path)
    (tmp_path / "study.db").write_text("no database, but long enough to have a header of its own" * 20)
    with pytest.raises(InputError, match=r"study.db: not a study, or a damaged one .*; name another --out"):
        tune(IRIS, SPACE, recipe, plan, directory=tmp_path, resume=True)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config.json: not the configuration of a search"):
        tune(IRIS, SPACE, recipe, plan, directory=tmp_path, resume=True)


def test_a_finished_search_is_read_and_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tune(IRIS, SPACE, RECIPE, PLAN, directory=tmp_path)

    def not_again(*args: object, **options: object) -> None:
        raise AssertionError("something was trained")

    for module in (tuning, search):
        monkeypatch.setattr(module, "fit", not_again)
    monkeypatch.setattr(tuning, "judged", not_again)
    again = tune(IRIS, SPACE, RECIPE, PLAN, directory=tmp_path, resume=True)
    assert again.was_finished
    assert not first.was_finished
    assert same(first, again)
    assert (again.warnings, again.notes) == (first.warnings, first.notes)


def test_the_file_is_the_mean_of_the_winners(tmp_path: Path) -> None:
    found = tune(IRIS, SPACE, RECIPE, PLAN, directory=tmp_path)
    model = load_model(tmp_path / "model.safetensors")
    assert isinstance(model, Ensemble)
    assert len(model.members) == 2
    mean = torch.stack([member.of_table(IRIS) for member in model.members]).mean(0)
    assert torch.equal(model.of_table(IRIS), mean)
    torch.testing.assert_close(found.model.of_table(IRIS), mean)
    winner = load_model(tmp_path / "winner.safetensors")
    assert torch.equal(winner.of_table(IRIS), model.members[0].of_table(IRIS))
    given = mean[torch.tensor(found.split["test"])]
    right = given.argmax(1) == IRIS.targets[torch.tensor(found.split["test"])]
    assert found.test is not None
    assert found.test.ensemble.score == float(right.double().mean())


def test_quantities_are_searched_too(tmp_path: Path) -> None:
    diabetes = read_table("diabetes")
    found = tune(diabetes, SPACE, RECIPE, replace(PLAN, trials=2), directory=tmp_path)
    model = load_model(tmp_path / "model.safetensors")
    assert model.of_table(diabetes).shape == (442,)
    assert found.test is not None
    assert -1 < found.test.ensemble.score < 1


def test_another_search_in_the_same_place_is_refused(tmp_path: Path) -> None:
    plan = replace(PLAN, trials=1, trial_epochs=1, winners=1)
    recipe = replace(RECIPE, epochs=1)
    with pytest.raises(InputError, match=r"--resume: there is no config.json of a search"):
        tune(IRIS, SPACE, recipe, plan, directory=tmp_path, resume=True)
    tune(IRIS, SPACE, recipe, plan, directory=tmp_path)
    with pytest.raises(InputError, match="holds a search; go on with --resume"):
        tune(IRIS, SPACE, recipe, plan, directory=tmp_path)
    features = IRIS.features.clone()
    features[0, 0] += 1
    for said, table, space, changed_recipe, changed_plan in (
        (r"--trials 2 instead of 1", IRIS, SPACE, recipe, replace(plan, trials=2)),
        (r"--act tanh instead of relu", IRIS, SPACE, replace(recipe, act="tanh"), plan),
        (r"space: lr ", IRIS, {"lr": {"values": [0.1]}}, recipe, plan),
        (r"data: digest ", replace(IRIS, features=features), SPACE, recipe, plan),
    ):
        with pytest.raises(InputError, match=f"is of another search: .*{said}"):
            tune(table, space, changed_recipe, changed_plan, directory=tmp_path, resume=True)


SCRIPT = """
import sys
from pathlib import Path
from tests.training.test_tuning import IRIS, PLAN, RECIPE, SPACE
from rowgrad.training.tuning import tune
tune(IRIS, SPACE, RECIPE, PLAN, directory=Path(sys.argv[1]), resume=(Path(sys.argv[1]) / "config.json").exists())
"""


def test_a_search_that_is_killed_goes_on(found: Tuned, tmp_path: Path) -> None:
    directory, waits = tmp_path / "search", random.Random(3)
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": f"{Path(rowgrad.__file__).parents[1]}:{root}", "OMP_NUM_THREADS": "1"}
    n_killed = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(directory)], env=environment, cwd=tmp_path)
        until = time.monotonic() + 60
        while not (directory / "study.db").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(waits.uniform(0.05, 0.8))
        process.send_signal(signal.SIGKILL)
        n_killed += process.wait() == -signal.SIGKILL
    assert n_killed > 0
    again = tune(IRIS, SPACE, RECIPE, PLAN, directory=directory, resume=True)
    assert same(found, again)


# What does not fit


@pytest.mark.parametrize(
    ("space", "recipe", "plan", "said"),
    [
        (SPACE, replace(RECIPE, lr=0.1), PLAN, "--lr 0.1 fixes what the space tries"),
        (SPACE, replace(RECIPE, model="autoencoder:2"), PLAN, "autoencoder:2 learns its inputs"),
        (None, replace(RECIPE, model="autoencoder:2"), PLAN, "autoencoder:2 learns its inputs"),
        ({"model": {"values": ["autoencoder:2"]}}, Recipe(), PLAN, "autoencoder:2 learns its inputs"),
        (
            {"optimizer": {"values": ["adam", "bfgs"]}, "dropout": {"values": [0.5]}},
            RECIPE,
            PLAN,
            r"the space has the point optimizer bfgs, dropout 0.5, which does not fit together: --dropout 0.5: bfgs",
        ),
        (SPACE, replace(RECIPE, val=0.0), PLAN, "--val 0: a search compares runs on examples held out"),
        (SPACE, RECIPE, replace(PLAN, test=0.001), "--test 0.001 of 150 examples is none"),
        (SPACE, RECIPE, replace(PLAN, test=0.995), "1 of 150 examples are left after the test"),
    ],
)
def test_what_does_not_fit_is_refused(space: Any, recipe: Recipe, plan: Plan, said: str) -> None:
    with pytest.raises(InputError, match=said):
        tune(IRIS, space, recipe, plan)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"search": "hill"}, "--search hill: there are random, sample, grid"),
        ({"search": "grid", "trials": 3}, "--trials 3: --search grid tries every point"),
        ({"trials": 0}, "--trials 0: at least 1"),
        ({"trial_epochs": 0}, "--trial-epochs 0: at least 1"),
        ({"test": 1.0}, "--test 1: a share"),
        ({"keep": 0.0}, "--keep 0: a share above 0"),
    ],
)
def test_plans_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Plan(**options)
