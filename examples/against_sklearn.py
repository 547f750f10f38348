"""`rowgrad.training.fit` and scikit-learn's perceptrons on the same splits of four data sets, over five seeds.

    python examples/against_sklearn.py [--seeds 5]

Both have two hidden layers of 64 units, standardized features and Adam. Ours stops early on a fifth of the training
part that it holds out itself; theirs does so too, or trains on all of it, whichever is better on a data set. A quarter
of each data set is for testing alone.
"""

import argparse
import time
import warnings
from dataclasses import dataclass, replace
from statistics import mean, stdev

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from rowgrad.data.readers import read_table
from rowgrad.data.table import Table
from rowgrad.training.fit import fit
from rowgrad.training.problem import outputs_of
from rowgrad.training.recipe import Recipe

DATA = ("digits", "breast_cancer", "wine", "diabetes")
EPOCHS = 200


@dataclass(frozen=True)
class Result:
    """Scores on the test part (accuracy, or R^2) and seconds of training, one for each seed."""

    ours: list[float]
    theirs: list[float]
    our_seconds: list[float]
    their_seconds: list[float]

    @property
    def gap(self) -> float:
        """Our mean score less theirs, in standard errors of the difference."""
        differences = [a - b for a, b in zip(self.ours, self.theirs, strict=True)]
        error = stdev(differences) / len(differences) ** 0.5
        return mean(differences) / error if error > 0 else 0.0


def compare(name: str, n_seeds: int) -> Result:
    """Train both on each split."""
    table, results = read_table(name), []
    for seed in range(n_seeds):
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
        train, test = order[len(table) // 4 :], order[: len(table) // 4]
        stopped, whole = (_theirs(table, train, test, seed, early) for early in (True, False))
        results.append((*_ours(table, train, test, seed), *stopped, *whole))
    ours, our_seconds, *theirs = (list(column) for column in zip(*results, strict=True))
    best = 0 if mean(theirs[0]) >= mean(theirs[2]) else 2
    return Result(ours, theirs[best], our_seconds, theirs[best + 1])


def _ours(table: Table, train: torch.Tensor, test: torch.Tensor, seed: int) -> tuple[float, float]:
    start = time.perf_counter()
    found = fit(replace(table, images=None).take(train), Recipe(epochs=EPOCHS, seed=seed))
    seconds = time.perf_counter() - start
    problem = found.problem
    outputs = outputs_of(found.model, problem.prepared(table.features[test]))
    targets = table.targets[test]
    if table.classes is None:
        targets = (targets - problem.center) / problem.scale
    return problem.score(outputs, targets), seconds


def _theirs(table: Table, train: torch.Tensor, test: torch.Tensor, seed: int, early: bool) -> tuple[float, float]:
    kind = MLPRegressor if table.classes is None else MLPClassifier
    model = kind(
        hidden_layer_sizes=(64, 64), early_stopping=early, validation_fraction=0.2, max_iter=EPOCHS, random_state=seed
    )
    pipeline = make_pipeline(StandardScaler(), model)
    x, y = table.features.numpy(), table.targets.numpy()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        pipeline.fit(x[train.numpy()], y[train.numpy()])
    seconds = time.perf_counter() - start
    return float(pipeline.score(x[test.numpy()], y[test.numpy()])), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    n_seeds = parser.parse_args().seeds
    print(f"{'data':14} {'rowgrad':>16} {'scikit-learn':>16} {'gap':>6} {'seconds':>8} {'theirs':>7}")
    for name in DATA:
        r = compare(name, n_seeds)
        ours, theirs = (f"{mean(s):.4f} ± {stdev(s):.4f}" for s in (r.ours, r.theirs))
        times = f"{mean(r.our_seconds):8.2f} {mean(r.their_seconds):7.2f}"
        print(f"{name:14} {ours:>16} {theirs:>16} {r.gap:>+6.1f} {times}")
    print("score on the test part: accuracy, for diabetes R^2; gap in standard errors of the difference")


if __name__ == "__main__":
    main()
