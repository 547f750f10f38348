"""The audit in training: what it finds on digits, its course by hand, and that it repeats."""

from __future__ import annotations

import statistics

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from tests.leftovers import nothing_left_behind

from rowgrad.data.readers import read_table
from rowgrad.data.table import Table, standardize
from rowgrad.errors import InputError
from rowgrad.training.audited import AuditRun, audit_table
from rowgrad.training.cost import measure_cost
from rowgrad.training.mlp import adam, mlp
from rowgrad.training.settings import Settings
from rowgrad.training.step import Trainee, label_losses
from rowgrad.uses.planted import score_planted

SEEDS = range(5)


@pytest.fixture(scope="module")
def digits() -> Table:
    return read_table("digits")


def _small(task: str = "classification", n: int = 60) -> Table:
    """A table of four features, the target made of two of them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, 4, generator=generator, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 5])
    quantity = features[:, 0] + features[:, 1] / 10
    is_labels = task == "classification"
    return Table(
        name="small",
        features=features,
        feature_names=("a", "b", "c", "d"),
        targets=(quantity > 0).long() + (quantity > 1).long() if is_labels else quantity,
        target_name="target",
        classes=("low", "middle", "high") if is_labels else None,
        place="row",
        numbers=np.arange(n),
        frame=pl.DataFrame(features.numpy(), schema=["a", "b", "c", "d"]),
    )


def test_planted_label_errors_on_digits(digits: Table) -> None:
    runs = [audit_table(digits, Settings(seed=seed), flip=0.1, rows=0.7) for seed in SEEDS]
    found = [score_planted(run.scores, run.planted) for run in runs]
    assert {len(run.rows) for run in runs} == {1258}
    assert {planted.n_planted for planted in found} == {126}
    assert statistics.median(planted.average_precision for planted in found) >= 0.97
    assert statistics.median(planted.precision for planted in found) >= 0.93
    assert statistics.median(planted.recall for planted in found) >= 0.93
    assert statistics.median(_suggested_right(run) for run in runs) >= 0.93
    assert statistics.median(run.held_out for run in runs) >= 0.93


def _suggested_right(run: AuditRun) -> float:
    """Share of the found errors whose suggestion is the label before."""
    found = run.planted & run.scores.flagged
    return float((run.scores.suggested[found] == run.table.targets[run.rows][found]).double().mean())


def test_hard_examples_are_those_that_the_network_hardly_believed() -> None:
    """Nearly all of breast_cancer is fitted: a loss far above the others' alone is no sign of a hard example."""
    for name, most in (("breast_cancer", 10), ("digits", 60)):
        scores = audit_table(read_table(name)).scores
        hard = scores.flags["hard"]
        assert int(hard.sum()) <= most
        assert float(scores.confidence[hard].max()) < 2 / 3


def test_flags_on_clean_digits(digits: Table) -> None:
    runs = [audit_table(digits, Settings(seed=seed), rows=0.7) for seed in SEEDS]
    assert statistics.median(int(run.scores.flagged.sum()) for run in runs) <= 3


def test_many_features_do_not_hide_the_errors(digits: Table) -> None:
    """Digits enlarged to 32 x 32: without dropout no example is flagged."""
    images = digits.images.repeat(4, axis=1).repeat(4, axis=2)
    pixels = images.reshape(len(images), -1) + np.random.default_rng(0).normal(size=(len(images), 1024)) * 16
    wide = Table(
        name="wide",
        features=torch.from_numpy(pixels),
        feature_names=tuple(f"pixel {k}" for k in range(1024)),
        targets=digits.targets,
        target_name="digit",
        classes=digits.classes,
        place="row",
        numbers=digits.numbers,
        images=images,
    )
    run = audit_table(wide, flip=0.1)
    found = score_planted(run.scores, run.planted)
    assert found.recall >= 0.75
    assert found.precision >= 0.9


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_course_by_hand(task: str) -> None:
    """The same training written out with one backward pass per example gives the same losses and norms."""
    table, settings = _small(task), Settings(epochs=3, batch_size=16, hidden=(7,), dropout=0.0, seed=3)
    run = audit_table(table, settings, flip=0.1)

    generator = torch.Generator().manual_seed(3)
    torch.randperm(len(table), generator=generator)  # the split
    torch.randperm(len(table), generator=generator)  # whose targets change
    if task == "classification":
        torch.randint(1, 3, (6,), generator=generator)  # and to what
    inputs, _, _ = standardize(table.features, torch.arange(len(table)))
    given = run.given if table.classes else ((run.given - run.given.mean()) / run.given.std(correction=0)).float()
    torch.manual_seed(3)
    model = mlp(4, (7,), table.n_outputs, 0.0)
    optimizer, influence = adam(model, settings.lr), torch.zeros(60)
    for epoch in range(3):
        order = torch.randperm(len(table), generator=generator)
        for index in order.split(16):
            outputs = model(inputs[index])
            if table.classes:
                losses = F.cross_entropy(outputs, given[index], reduction="none")
            else:
                losses = (outputs[:, 0] - given[index]) ** 2 / 2
            for example, loss in zip(index.tolist(), losses, strict=True):
                gradient = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                norm = torch.cat([part.flatten() for part in gradient]).norm()
                torch.testing.assert_close(run.losses[epoch, example], loss.detach(), rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(run.norms[epoch, example], norm, rtol=1e-4, atol=1e-6)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
        share = settings.lr / torch.tensor([len(b) for b in torch.arange(60).split(16)]).repeat_interleave(
            torch.tensor([16, 16, 16, 12])
        )
        influence += torch.zeros(60).index_add_(0, order, share * run.norms[epoch, order].square())
    torch.testing.assert_close(run.scores.self_influence, influence, rtol=1e-4, atol=0)
    torch.testing.assert_close(run.scores.mean_loss, run.losses.mean(0))
    torch.testing.assert_close(run.scores.final_norm, run.norms[-1])
    assert [epoch.number for epoch in run.epochs] == [1, 2, 3]
    assert run.epochs[1].mean_loss == pytest.approx(float(run.losses[1].mean()), rel=1e-5)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_same_seed_gives_the_same_scores(task: str) -> None:
    table = _small(task)
    with nothing_left_behind():
        one = audit_table(table, Settings(epochs=3, seed=1), flip=0.2, rows=0.8)
    torch.rand(7)  # the state of the global generator plays no part
    other = audit_table(table, Settings(epochs=3, seed=1), flip=0.2, rows=0.8)
    third = audit_table(table, Settings(epochs=3, seed=2), flip=0.2, rows=0.8)
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(one.planted, other.planted)
    for name, values in vars(one.scores).items():
        again = getattr(other.scores, name)
        assert (values is None and again is None) or torch.equal(values, again), name
    assert not torch.equal(one.scores.mean_loss, third.scores.mean_loss)


def test_regression_ranks_and_suggests_nothing() -> None:
    table = _small("regression", n=200)
    run = audit_table(table, flip=0.1)
    assert run.scores.flagged is None
    assert run.scores.suggested is None
    assert torch.equal(run.scores.order(), run.scores.mean_loss.double().argsort(descending=True, stable=True))
    assert torch.equal(run.given.sort().values, table.targets.sort().values)
    assert score_planted(run.scores, run.planted).average_precision > 0.5  # at random: about 0.1


def test_held_out_rows_are_not_audited() -> None:
    table = _small(n=100)
    run = audit_table(table, Settings(epochs=2), rows=0.6)
    assert len(run.rows) == len(run.scores.rank) == len(run.given) == 60
    assert torch.equal(run.given, table.targets[run.rows])
    assert 0 <= run.held_out <= 1
    assert audit_table(table, Settings(epochs=1)).held_out is None


def test_cost_is_measured_and_the_model_untouched_by_it() -> None:
    run = audit_table(_small(), Settings(epochs=1))
    assert run.cost.n_steps == 40
    for low, median, high in (run.cost.plain_seconds, run.cost.rows_seconds, run.cost.audit_seconds):
        assert 0 < low <= median <= high
    assert run.cost.rows_ratio == run.cost.rows_seconds[1] / run.cost.plain_seconds[1] > 1
    assert run.scores.times_seen.tolist() == [1] * 60


def test_without_norms_the_training_is_the_same() -> None:
    one, other = (audit_table(_small(), Settings(epochs=3), flip=0.1, norms=norms) for norms in (True, False))
    torch.testing.assert_close(one.losses, other.losses, rtol=1e-4, atol=1e-6)
    assert other.norms is None
    assert other.scores.mean_norm is None
    assert (other.cost.rows_seconds, other.cost.rows_ratio) == (None, None)
    assert {(epoch.median_norm, epoch.noise_scale) for epoch in other.epochs} == {(None, None)}
    torch.testing.assert_close(one.conflict, other.conflict, rtol=1e-3, atol=1e-4)


def test_labels_flipped_to_calibrate_are_trained_on_and_not_judged() -> None:
    table = _small(n=200)
    run = audit_table(table, Settings(epochs=3), calibrate=0.1)
    assert int((run.given != table.targets).sum()) == run.scores.calibration.n_planted == 20
    assert torch.equal(run.scores.planted, run.given != table.targets)
    assert torch.equal(run.scores.given, run.given)
    with pytest.raises(InputError, match=r"--calibrate 0.1: small has quantities to predict, and only labels"):
        audit_table(_small("regression"), calibrate=0.1)


def test_timing_leaves_the_trained_model_alone() -> None:
    model = mlp(4, (8,), 3, 0.0)
    trainee = Trainee(model, adam(model, 1e-2), label_losses)
    before = [parameter.clone() for parameter in model.parameters()]
    inputs, labels = torch.randn(20, 4), torch.randint(3, (20,))
    cost = measure_cost(trainee, inputs, labels, 3, batch_size=5, generator=torch.Generator(), n_steps=4)
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))
    assert (cost.n_steps, cost.batch_size) == (4, 5)


@pytest.mark.parametrize(("n_inputs", "factor"), [(4, 1), (32, 1), (64, 0.5), (3200, 0.01)])
def test_a_first_layer_of_many_inputs_learns_more_slowly(n_inputs: int, factor: float) -> None:
    model = mlp(n_inputs, (8,), 3, 0.0)
    rates = {id(p): group["lr"] for group in adam(model, 0.1).param_groups for p in group["params"]}
    assert rates.pop(id(model[0].weight)) == pytest.approx(0.1 * factor)
    assert set(rates.values()) == {0.1}
    assert len(rates) == 3


def test_progress_counts_the_steps() -> None:
    seen = []
    audit_table(_small(), Settings(epochs=2, batch_size=25), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 6) for step in range(1, 7)]


def test_rows_too_few_to_audit() -> None:
    with pytest.raises(InputError, match="small: 1 of 60 rows would be audited; raise --rows"):
        audit_table(_small(), rows=0.01)
    with pytest.raises(InputError, match=r"the class '\w+' has [01] of the 3 audited rows and needs two; raise --rows"):
        audit_table(_small(), rows=0.05)
    constant = _small("regression")
    constant.targets[:] = 2
    with pytest.raises(InputError, match="the target is 2 in every audited row"):
        audit_table(constant)


def test_diverged_training_is_an_error() -> None:
    with pytest.raises(InputError, match=r"training diverged in epoch 1 at --lr 1e\+30 .*; use a smaller --lr"):
        audit_table(_small(), Settings(lr=1e30))


# fmt: off
SETTINGS = {
    "--epochs 0":      {"epochs": 0},
    "--batch-size 0":  {"batch_size": 0},
    "--lr 0":          {"lr": 0.0},
    "--lr nan":        {"lr": float("nan")},
    "--hidden 8,0":    {"hidden": (8, 0)},
    "--dropout 1":     {"dropout": 1.0},
    "--seed -1":       {"seed": -1},
}
# fmt: on


@pytest.mark.parametrize("option", SETTINGS)
def test_settings_that_cannot_be_used(option: str) -> None:
    with pytest.raises(InputError, match=f"^{option}: "):
        Settings(**SETTINGS[option])


@pytest.mark.parametrize(
    ("n", "size"), [(5, 5), (60, 16), (178, 16), (300, 32), (1258, 64), (50_000, 64), (1_000_000, 512), (10**7, 1024)]
)
def test_batch_size_by_the_size_of_the_data(n: int, size: int) -> None:
    assert Settings().batch_size_for(n) == size
    assert Settings(batch_size=48).batch_size_for(n) == min(48, n)


@pytest.mark.parametrize(("n", "epochs"), [(10, 40), (20_000, 40), (80_000, 20), (200_000, 13), (10**7, 8)])
def test_epochs_by_the_size_of_the_data(n: int, epochs: int) -> None:
    assert Settings().epochs_for(n) == epochs
    assert Settings(epochs=3).epochs_for(n) == 3


def test_no_hidden_layer_is_a_linear_model() -> None:
    run = audit_table(_small(), Settings(epochs=1, hidden=()))
    assert run.n_parameters == 4 * 3 + 3


def test_the_conflict_of_classes_is_that_of_their_gradients() -> None:
    run = audit_table(read_table("iris"), Settings(epochs=3))
    assert run.conflict is not None
    assert run.conflict.shape == (3, 3)
    torch.testing.assert_close(run.conflict, run.conflict.T)
    assert (run.conflict.diagonal() > run.conflict[0, 2]).all()  # flowers of a kind agree; the kinds apart do not
    assert audit_table(read_table("diabetes"), Settings(epochs=1)).conflict is None


def test_the_noise_scale_of_each_epoch_has_an_error_or_is_left_out() -> None:
    for epoch in audit_table(read_table("digits"), Settings(epochs=2, lr=1e-4, dropout=0)).epochs:
        assert epoch.noise_scale is not None
        assert epoch.noise_scale_error is not None
        assert 0 < epoch.noise_scale_error < epoch.noise_scale < 100  # hardly learned: examples still agree
    (alone,) = audit_table(read_table("iris"), Settings(epochs=1, batch_size=150)).epochs
    assert alone.noise_scale_error is None  # a single batch
