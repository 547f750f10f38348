"""Digits with wrong labels: training on two fifths of the examples, chosen by an audit or at random.

    python examples/select_examples.py

audits one training on scikit-learn's digits with 0, 10 and 20% of the training labels changed, chooses 40% of the
examples (--keep) in several ways, trains a fresh network on them alone, and prints its accuracy on clean test data over
5 splits and starts (about two minutes). All ways train for the same number of steps.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rowgrad as rg

if __package__:
    from examples.robust_training import digits, shown
else:
    from robust_training import digits, shown

SHARES = (0.0, 0.1, 0.2)  # of the training labels, changed to another class
STEPS = 800


@dataclass(frozen=True)
class Way:
    name: str
    choose: Callable[[rg.Audit, int, float, torch.Generator], Tensor]  # given the examples, the share, and for draws


WAYS = (
    Way("all", lambda audit, n, keep, rng: torch.arange(n)),
    Way("all but the flagged", lambda audit, n, keep, rng: audit.select(1.0)),
    Way("share, at random", lambda audit, n, keep, rng: torch.randperm(n, generator=rng)[: round(keep * n)]),
    Way(
        "share, at random among the unflagged",
        lambda audit, n, keep, rng: audit.select(keep, prefer="random", generator=rng),
    ),
    Way("share, highest losses among the unflagged", lambda audit, n, keep, rng: audit.select(keep)),
    Way("share, lowest losses among the unflagged", lambda audit, n, keep, rng: audit.select(keep, prefer="low")),
    Way("share, highest losses", lambda audit, n, keep, rng: audit.select(keep, drop_top=0)),
)


def trained(x: Tensor, y: Tensor, chosen: Tensor, seed: int, audit: rg.Audit | None = None) -> nn.Module:
    """A network trained on the chosen examples; the audit sees each step."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rng, step = torch.Generator().manual_seed(seed), 0
    while step < STEPS:
        for index in chosen[torch.randperm(len(chosen), generator=rng)].split(64):
            logits = model(x[index])
            losses = F.cross_entropy(logits, y[index], reduction="none")
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            if audit is not None:
                audit.update(index, losses=losses, logits=logits, labels=y[index])
            step += 1
    return model


def accuracies(share: float, seed: int, keep: float = 0.4) -> list[float]:
    """On the test data, one for each way."""
    rng = torch.Generator().manual_seed(seed)
    x, y, x_test, y_test = digits(share, rng)
    audit = rg.Audit(len(y), n_classes=10)
    trained(x, y, torch.arange(len(y)), seed + 100, audit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rg.RowgradWarning)  # some ways are worse than random: that is the point
        chosen = [way.choose(audit, len(y), keep, rng) for way in WAYS]
    models = [trained(x, y, positions, seed) for positions in chosen]
    return [float((model(x_test).argmax(1) == y_test).double().mean()) for model in models]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=float, default=0.4)
    options = parser.parse_args(arguments)
    found = [[accuracies(share, seed, options.keep) for seed in range(options.seeds)] for share in SHARES]
    print(f"accuracy on clean test data, mean +- standard error of {options.seeds} seeds; share {options.keep:.0%}\n")
    print("| trained on | " + " | ".join(f"{share:.0%} wrong labels" for share in SHARES) + " |")
    print("|---" * (1 + len(SHARES)) + "|")
    for k, way in enumerate(WAYS):
        cells = [shown([run[k] for run in runs]) for runs in found]
        print(f"| {way.name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
