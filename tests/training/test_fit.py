"""Training by a recipe: it learns, stops in time, and resumes bit for bit after a kill at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rowgrad
from rowgrad.data.corrupt import flip_labels
from rowgrad.data.readers import read_table
from rowgrad.errors import InputError
from rowgrad.layers import BatchNorm
from rowgrad.optim.factory import SECOND_ORDER
from rowgrad.optim.first_order import Momentum
from rowgrad.training import problem as problem_module
from rowgrad.training.checkpoint import load_state, same
from rowgrad.training.fit import CHECKPOINT, Fitted, fit
from rowgrad.training.loop import seed_of
from rowgrad.training.problem import SPLIT, model_for, outputs_of, pose
from rowgrad.training.recipe import Recipe
from rowgrad.training.saved import load_model, save_model
from rowgrad.uses.tables import score_columns

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
        ("digits", Recipe(model="autoencoder:32", epochs=20), 0.6),
        ("wine", Recipe(model="autoencoder:12,4", act="tanh", init="pretrain", lr=1e-2), 0.6),
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
    "recipe",
    [
        QUICK,
        replace(QUICK, optimizer="nesterov", decay="exponential", norm="batch-post", clip_norm=0.5, clip_value=0.1),
        replace(QUICK, norm="batch-pre", bn_statistics="population", optimizer_options={"betas": (0.8, 0.9)}),
        *(replace(QUICK, model="mlp:3", act="tanh", dropout=0.0, l2=1e-2, optimizer=name) for name in SECOND_ORDER),
        replace(QUICK, dropout=0.0, optimizer="gauss-newton", batch_size=50),
        replace(QUICK, model="autoencoder:4", optimizer_options={"amsgrad": True}),
    ],
    ids=lambda recipe: f"{recipe.model} {recipe.optimizer}",
)
@pytest.mark.parametrize("after", [1, 5])
def test_a_run_goes_on_where_it_was(recipe: Recipe, after: int, tmp_path: Path) -> None:
    table = read_table("wine")
    whole = fit(table, recipe)
    fit(table, replace(recipe, epochs=after), directory=tmp_path)
    found = fit(table, recipe, directory=tmp_path, resume=True)
    assert same(weights(found), weights(whole))
    assert [replace(e, seconds=0.0) for e in found.epochs] == [replace(e, seconds=0.0) for e in whole.epochs]


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
    with pytest.raises(InputError, match="whitened pixels are none"):
        fit(table, Recipe(model="cnn:8", prepare="whiten"))
    with pytest.raises(InputError, match="--init pretrain is for mlp and autoencoder, not for --model cnn:8"):
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


@pytest.mark.parametrize("val", [0.0, 0.3])
def test_nesterovs_marble_is_judged_and_kept_at_its_weights(val: float) -> None:
    """A loop by hand, with the same steps, gives the weights and their validation loss."""
    recipe = Recipe(
        model="mlp:4", optimizer="nesterov", lr=0.05, dropout=0.0, val=val, patience=0, epochs=1, batch_size=10**6
    )
    found = fit(read_table("wine"), recipe)
    problem = found.problem
    model = model_for(problem, recipe)
    optimizer = Momentum(model.parameters(), 0.05, nesterov=True)
    problem.criterion(model(problem.inputs[problem.train]), problem.targets[problem.train]).mean().backward()
    optimizer.step()
    ahead = {name: p.detach().clone() for name, p in model.named_parameters()}
    with optimizer.at_weights():
        expected = {name: t.clone() for name, t in model.state_dict().items()}
        losses = problem.criterion(model(problem.inputs[problem.val]), problem.targets[problem.val])
    for name, t in weights(found).items():
        torch.testing.assert_close(t, expected[name], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(t, ahead[name], rtol=1e-5, atol=1e-7)
    if val:
        assert found.epochs[0].val_loss == pytest.approx(float(losses.mean().detach()), rel=1e-5)


@pytest.mark.parametrize("optimizer", SECOND_ORDER)
def test_second_order_lowers_the_loss_with_its_penalty_in_every_step(optimizer: str) -> None:
    recipe = Recipe(model="mlp:4", act="tanh", optimizer=optimizer, l2=0.1, val=0.0, patience=0, epochs=8)
    table = read_table("wine")
    found = fit(table, recipe)
    assert found.resolved["full_batch"]
    assert found.resolved["batch_size"] == 178
    problem = found.problem

    def whole(model: torch.nn.Module) -> torch.Tensor:
        losses = problem.criterion(model(problem.inputs), problem.targets)
        weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
        return losses.mean() + 0.05 * torch.stack([w.square().sum() for w in weights]).sum()

    values = [float(whole(fit(table, replace(recipe, epochs=k)).model).detach()) for k in (1, 2, 4, 8)]
    assert all(b < a + 1e-6 for a, b in pairwise(values))
    assert values[-1] == pytest.approx(0.49, abs=0.02)  # where all five end
    if optimizer == "conjugate-gradient":  # it is at the minimum by then
        gradients = torch.autograd.grad(whole(found.model), list(found.model.parameters()))
        assert max(float(g.abs().max()) for g in gradients) < 1e-3


def test_normalized_gradients_and_options_reach_the_optimizer() -> None:
    table = read_table("wine")
    recipe = replace(QUICK, optimizer="sgd", lr=0.1, dropout=0.0, epochs=1, clip_norm=1e-4, batch_size=10**6)
    steps = {}
    for mode in ("norm", "normalize"):
        for bound in (1e-4, 1e4):
            found = fit(table, replace(recipe, clip_norm=bound, clip_mode=mode))
            start = model_for(found.problem, recipe).state_dict()
            steps[mode, bound] = torch.cat([(v - start[k]).flatten() for k, v in weights(found).items()]).norm().item()
    assert steps["norm", 1e-4] == pytest.approx(1e-5, rel=1e-2)
    assert steps["norm", 1e4] < 1
    assert steps["normalize", 1e-4] == pytest.approx(1e-5, rel=1e-2)
    assert steps["normalize", 1e4] == pytest.approx(1e3, rel=1e-4)
    found = fit(table, replace(QUICK, optimizer="rmsprop", optimizer_options={"eps_inside": True, "eps": 1e-6}))
    assert found.resolved["optimizer"] == "RMSProp"
    assert found.resolved["optimizer_options"]["eps_inside"] is True
    assert found.resolved["optimizer_options"]["eps"] == 1e-6


@pytest.mark.parametrize("norm", ["batch-pre", "batch-post"])
def test_population_statistics_are_those_of_the_training_part(norm: str, tmp_path: Path) -> None:
    table = read_table("wine")
    found = fit(table, replace(QUICK, norm=norm, bn_statistics="population"))
    problem, model = found.problem, found.model
    seen: list[torch.Tensor] = []
    (layer,) = (m for m in model.modules() if isinstance(m, BatchNorm))
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs = outputs_of(model, problem.inputs[problem.train])
    torch.testing.assert_close(layer.running_mean, seen[0].mean(0))
    torch.testing.assert_close(layer.running_var, seen[0].var(0, correction=0))
    model.train()
    for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.eval()
    torch.testing.assert_close(model(problem.inputs[problem.train]), outputs, rtol=1e-4, atol=1e-4)
    best = found.epochs[found.best - 1]
    model.eval()
    losses = problem.criterion(outputs_of(model, problem.inputs[problem.val]), problem.targets[problem.val])
    assert best.val_loss == pytest.approx(float(losses.mean()), rel=1e-6)


def test_a_saved_model_has_its_batch_normalization_folded(tmp_path: Path) -> None:
    table = read_table("wine")
    for norm in ("batch-pre", "batch-post"):
        found = fit(table, replace(QUICK, norm=norm, bn_statistics="population"))
        save_model(found, table, tmp_path / "model")
        predictor = load_model(tmp_path / "model")
        kinds = {type(m) for m in predictor.model.modules()}
        assert (BatchNorm in kinds) is (norm == "batch-post")
        expected = outputs_of(found.model, found.problem.inputs).softmax(1)
        torch.testing.assert_close(predictor.of_table(table), expected, rtol=1e-5, atol=1e-6)


def test_checks_of_gradients_leave_the_training_as_it_was() -> None:
    table, recipe = read_table("wine"), replace(QUICK, norm="batch-pre")
    assert same(weights(fit(table, recipe, check_grad=3, monitor=2)), weights(fit(table, recipe)))


def test_gradients_of_what_is_learned_are_not_checked() -> None:
    """They are rounding: a check would find them wrong."""
    recipe = Recipe(lr=0.05, patience=0, epochs=40)
    found = fit(read_table("wine"), recipe, check_grad=2)
    assert found.checks[0] == "before epoch 1 right"
    assert found.checks[1].startswith("before epoch 21 not checked: with a loss of ")
    assert found.resolved["gradient_checks"] == list(found.checks)
    with pytest.raises(InputError, match="--check-grad 3: at most once before each of --epochs 2"):
        fit(read_table("wine"), replace(recipe, epochs=2), check_grad=3)


def test_a_wrong_gradient_stops_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module.Problem, "criterion", property(lambda problem: wrong_losses))
    with pytest.raises(InputError, match="before epoch 1 the gradients are wrong"):
        fit(read_table("wine"), QUICK, check_grad=1)


def wrong_losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    losses = torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
    return losses.detach() + 1.5 * (losses - losses.detach())


def test_fewer_epochs_than_are_done_are_refused(tmp_path: Path) -> None:
    table = read_table("wine")
    fit(table, replace(QUICK, epochs=3, patience=0), directory=tmp_path)
    with pytest.raises(InputError, match=r"--epochs 2: the run in .* has done 3; name as many or more"):
        fit(table, replace(QUICK, epochs=2, patience=0), directory=tmp_path, resume=True)


def test_an_audit_only_watches_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    table, recipe = read_table("wine"), replace(QUICK, optimizer="momentum", clip_norm=0.5)
    whole = fit(table, recipe, audit=True)
    assert same(weights(whole), weights(fit(table, recipe)))
    fit(table, replace(recipe, epochs=3), directory=tmp_path, audit=True)
    found = fit(table, recipe, directory=tmp_path, resume=True, audit=True)
    assert found.scores is not None
    assert whole.scores is not None
    assert same(score_columns(found.scores), score_columns(whole.scores))
    assert found.scores.times_seen.tolist() == [6] * 142
    with pytest.raises(InputError, match="is of another run: no --audit"):
        fit(table, recipe, directory=tmp_path, resume=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "batch-pre", "optimizer": "gauss-newton", "bn_statistics": "population"},
        {"model": "autoencoder:5"},
        {"optimizer": "lbfgs"},
    ],
)
@pytest.mark.filterwarnings("ignore::rowgrad.errors.RowgradWarning")
def test_the_norms_of_an_audit_are_those_of_one_backward_pass_each(options: dict[str, Any]) -> None:
    table = read_table("wine")
    recipe = Recipe(**{"model": "mlp:4", "act": "tanh", "optimizer": "sgd", "epochs": 1, "val": 0.9} | options)
    found = fit(table, recipe, audit=True)
    problem, scores = found.problem, found.scores
    assert scores is not None
    model = model_for(problem, recipe).train()  # as it was in the only step
    losses = problem.criterion(model(problem.inputs[problem.train]), problem.targets[problem.train])
    for k, loss in enumerate(losses):
        gradient = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        torch.testing.assert_close(scores.final_norm[k], norm, rtol=1e-4, atol=1e-5)  # pyright: ignore[reportOptionalSubscript]
        torch.testing.assert_close(scores.final_loss[k], loss.detach(), rtol=1e-5, atol=1e-6)


def test_an_audit_finds_changed_labels_in_the_training_part() -> None:
    table = read_table("digits")
    generator = torch.Generator().manual_seed(0)
    targets, planted = flip_labels(table.targets, 10, 0.1, generator)
    found = fit(replace(table, targets=targets), Recipe(dropout=0.3), audit=True)
    assert found.scores is not None
    flagged, wrong = found.scores.flags["likely mislabelled"], planted[found.problem.train]
    assert float((flagged & wrong).sum() / wrong.sum()) > 0.85
    assert float((flagged & wrong).sum() / flagged.sum()) > 0.85


def test_a_single_example_left_joins_the_last_batch() -> None:
    found = fit(read_table("wine"), replace(QUICK, norm="batch-pre", batch_size=47, val=0.2))  # 142 = 3 * 47 + 1
    assert found.resolved["steps_per_epoch"] == 3


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
    with pytest.raises(InputError, match=r"training diverged: step \d+: the loss of example \d+ is (inf|nan)"):
        fit(table, recipe, directory=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept


def test_a_checkpoint_of_other_options_is_refused(tmp_path: Path) -> None:
    table = read_table("wine")
    fit(table, QUICK, directory=tmp_path)
    with pytest.raises(InputError, match=r"is of another run: --lr 0.1 instead of None, --seed 3 instead of 0"):
        fit(table, replace(QUICK, lr=0.1, seed=3), directory=tmp_path, resume=True)
    features = table.features.clone()
    features[7, 3] += 1
    with pytest.raises(InputError, match="is of a run on other examples; resume with the data of the first run"):
        fit(replace(table, features=features), QUICK, directory=tmp_path, resume=True)


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
        ({"decay": "linear"}, "--decay linear: there are exponential, inverse"),
        ({"decay_rate": 0.5}, "--decay-rate 0.5 needs --decay: one of exponential, inverse"),
        ({"clip_mode": "cap", "clip_norm": 1.0}, "--clip-mode cap: there are norm, normalize"),
        ({"optimizer": "adamm"}, "--optimizer adamm: there are sgd, momentum"),
        ({"act": "rely"}, "--act rely: there are .*maxout"),
        ({"alpha": 0.1}, "--alpha 0.1: is the slope of --act leaky_relu, not of relu"),
        ({"l2": -1.0}, "--l2 -1: expected a number of at least 0"),
        ({"clip_mode": "normalize"}, "--clip-mode normalize needs the norm: give --clip-norm"),
        ({"bn_statistics": "all"}, "--bn-statistics all: there are running, population"),
        ({"bn_statistics": "population"}, "needs batch normalization: give --norm batch-pre or batch-post"),
        ({"norm": "batch-pre", "batch_size": 1}, "one example has no variance"),
        ({"optimizer_options": {"lr": 1.0}}, "--optimizer-option lr: give it as --lr"),
        ({"optimizer_options": {"weight_decay": 1.0}}, "--optimizer-option weight_decay: give it as --l2"),
        ({"optimizer": "newton", "dropout": 0.5}, "newton needs a loss that is the same each time"),
        ({"optimizer": "bfgs", "clip_value": 1.0}, "--clip-value 1: bfgs sets the length of its steps itself"),
        ({"optimizer": "lbfgs", "decay": "inverse"}, "lbfgs has no rate that falls by the epoch"),
        ({"optimizer": "lbfgs", "batch_size": 32}, "--batch-size 32: lbfgs keeps what it learned of the curvature"),
        ({"optimizer": "newton", "norm": "batch-pre"}, "add --bn-statistics population, or use --norm layer"),
        ({"optimizer": "gauss-newton", "optimizer_options": {"residuals": True}}, "is given losses here"),
    ],
)
def test_bad_recipes(options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Recipe(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(optimizer="newton"), "the model has 5,251 parameters.* at most 2,000; use --optimizer conjugate-grad"),
        (
            Recipe(optimizer="bfgs", model="mlp:900"),
            "the model has 15,303 parameters.* at most 10,000; use --optimizer",
        ),
        (Recipe(optimizer="newton", lr=0.1, model="mlp:8"), "newton has no option 'lr'; it has: damping"),
        (Recipe(optimizer_options={"beta": 0.9}), "adam has no option 'beta'; it has: lr, betas"),
        (Recipe(optimizer_options={"betas": 0.9}), r"adam refuses .*betas=0\.9.*: 'float' object is not subscriptable"),
        (Recipe(optimizer="momentum", optimizer_options={"beta": 2.0}), "beta=2.0"),
        (Recipe(optimizer="lbfgs", optimizer_options={"line_search_fn": "armijo"}), "line_search_fn='armijo'"),
        (Recipe(model="cnn:8"), "needs images"),
        (Recipe(model="cnn:8", init="pretrain"), "needs images"),
        (Recipe(val=0.995), "examples are left to train on; lower --val"),
        (Recipe(val=0.001), "--val 0.001 of 178 examples is none; raise it, or set --val 0"),
    ],
)
def test_recipes_that_do_not_fit_the_data(recipe: Recipe, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fit(read_table("wine"), recipe)


def test_an_autoencoder_is_scored_by_what_it_gives_back(tmp_path: Path) -> None:
    table = read_table("digits")
    found = fit(table, replace(QUICK, model="autoencoder:16,4", dropout=0.0), directory=tmp_path)
    problem, best = found.problem, found.epochs[found.best - 1]
    x = problem.inputs[problem.val]
    assert x.shape[1:] == (1, 8, 8)
    with torch.no_grad():
        errors = (found.model(x) - x.flatten(1)).double()
    assert best.val_loss == pytest.approx(float(errors.square().mean() / 2), rel=1e-5)
    spread = (x.flatten(1).double() - x.flatten(1).double().mean(0)).square().sum()
    assert best.val_score == pytest.approx(1 - float(errors.square().sum() / spread), rel=1e-5)
    save_model(found, table, tmp_path / "model")
    predictor = load_model(tmp_path / "model")
    outputs = predictor.of_table(table)[problem.val]
    torch.testing.assert_close(outputs.double(), errors.square().mean(1) / 2, rtol=1e-5, atol=1e-6)
    assert predictor.codes(table.features).shape == (1797, 4)


# Sequences


def sequences(path: Path, n: int = 300, steps: int = 7) -> Path:
    """Whether the last step that is there is above 0; behind it stands what must not be looked at."""
    rng = np.random.default_rng(0)
    x, lengths = rng.normal(3, 5, (n, steps, 2)), rng.integers(1, steps + 1, n)
    y = (x[np.arange(n), lengths - 1, 0] > 3).astype(int)
    for k, length in enumerate(lengths):
        x[k, length:] = 1e6
    np.savez(path, X=x, y=y, lengths=lengths)
    return path


def test_sequences_are_read_to_their_ends(tmp_path: Path) -> None:
    table = read_table(sequences(tmp_path / "s.npz"))
    assert table.steps == (7, 2)
    found = fit(table, Recipe(model="lstm:16", epochs=60, lr=1e-2, patience=0))
    assert max(e.val_score or 0 for e in found.epochs) > 0.9
    problem, there = found.problem, torch.arange(7) < table.lengths[:, None]  # pyright: ignore[reportOptionalSubscript]
    assert float(problem.inputs.abs().max()) < 10
    assert float(problem.inputs[~there].abs().max()) == 0
    inside = problem.inputs[problem.train][there[problem.train]]
    torch.testing.assert_close(inside.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(inside.std(0, correction=0), torch.ones(2), atol=1e-5, rtol=0)
    save_model(found, table, tmp_path / "model")
    outputs = load_model(tmp_path / "model").of_table(table)
    torch.testing.assert_close(outputs, outputs_of(found.model, problem.inputs, problem.lengths).softmax(1))  # pyright: ignore[reportArgumentType]


def test_sequences_resume_and_suit_other_models_too(tmp_path: Path) -> None:
    table = read_table(sequences(tmp_path / "s.npz", 100))
    recipe = Recipe(model="lstm:8", epochs=4)
    fit(table, replace(recipe, epochs=2), directory=tmp_path)
    assert same(weights(fit(table, recipe, directory=tmp_path, resume=True)), weights(fit(table, recipe)))
    assert fit(table, Recipe(model="mlp:8", epochs=1)).epochs
    values = replace(table, classes=None, targets=torch.randn(100).double())
    assert fit(values, replace(recipe, epochs=1)).problem.lengths is not None
    with pytest.raises(InputError, match="would mix the steps of a sequence"):
        fit(table, Recipe(model="lstm:8", prepare="whiten"))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"lengths": np.array([1, 9, 2, 1])}, "row 1 has length 9; a sequence has 1 to 4 steps here"),
        ({"lengths": np.array([1, 0, 2, 1])}, "row 1 has length 0"),
        ({"lengths": np.array([1.5, 2, 2, 1])}, "expected a whole number for each of the 4 examples"),
        ({"lengths": np.array([1, 2])}, r"lengths has shape \(2,\)"),
        ({"lengths": np.array([1, 2, 3, 4]), "X": np.zeros((4, 4, 2, 2))}, "with lengths the examples are sequences"),
        ({"lengths": np.array([4, 2, 3, 1]), "X": np.full((4, 4), np.nan)}, "hold NaN or infinite values"),
    ],
)
def test_bad_sequences(arrays: dict[str, np.ndarray], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **{"X": np.zeros((4, 4)), "y": np.array([0, 1, 0, 1])} | arrays)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=said):
        read_table(tmp_path / "s.npz")


def test_missing_numbers_are_those_of_the_training_part(tmp_path: Path) -> None:
    """What stands in the part held out changes neither weights nor what a prediction fills in."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    recipe = Recipe(model="mlp:4", epochs=1)  # one, as the part held out chooses among more
    models = []
    for shift in (0.0, 100.0):
        path = tmp_path / "table.csv"
        values = x.copy()
        table_val = torch.randperm(60, generator=torch.Generator().manual_seed(seed_of(recipe.seed, SPLIT)))[:12]
        values[table_val.numpy(), 0] += shift
        lines = [f"{'' if k % 7 == 0 else a},{b},{k % 2}" for k, (a, b) in enumerate(values.tolist())]
        path.write_text("\n".join(["a,b,y", *lines]))
        table = read_table(str(path), target="y", task="classification")
        found = fit(table, recipe)
        save_model(found, table, tmp_path / "model.safetensors")
        models.append((found.model.state_dict(), load_model(tmp_path / "model.safetensors").columns))
    assert models[0][1] == models[1][1]
    assert same(dict(models[0][0]), dict(models[1][0]))
