"""Digits with wrong labels: what clipping each example's gradient does for the accuracy on clean test data.

    python examples/robust_training.py

trains the same small network on scikit-learn's digits with 0, 20 and 40% of the training labels changed, in several
ways, over 8 splits and starts each, and prints a table (about five minutes). No setting is chosen by its result on the
test data, and no training is stopped early; "best epoch" tells what stopping at the best moment would have given, were
it known.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import rowgrad as rg

SHARES = (0.0, 0.2, 0.4)  # of the training labels, changed to another class
Losses = Callable[[Tensor, nn.Module], Tensor]  # from the losses (B,) and the model to a scalar


@dataclass(frozen=True)
class Way:
    name: str
    make: Callable[[], Losses]  # anew for every training: a running quantile has a memory
    lr: float = 0.1


def plain() -> Losses:
    return lambda losses, model: losses.mean()


def clipped(max_norm: float, mode: str = "clip") -> Losses:
    return lambda losses, model: rg.clipped_loss(losses, model, max_norm, mode=mode)


def quantile(q: float) -> Losses:
    bound = rg.RunningQuantile(q)
    return lambda losses, model: rg.clipped_loss(losses, model, bound)


WAYS = (
    Way("plain", plain),
    Way("plain, a tenth of the learning rate", plain, lr=0.01),
    Way("clipped to 1", lambda: clipped(1.0)),
    Way("clipped to 0.5", lambda: clipped(0.5)),
    Way("normalized to 0.2", lambda: clipped(0.2, "normalize")),
    Way("clipped to the running median", lambda: quantile(0.5)),
    Way("clipped to the running quarter", lambda: quantile(0.25)),
)


def digits(share: float, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, `share` of the labels wrong, and clean ones to test on: 1257 and 540."""
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    train, test = train_test_split(torch.arange(len(y)), test_size=0.3, stratify=y, random_state=rng.initial_seed())
    labels = y[train].clone()
    wrong = torch.randperm(len(train), generator=rng)[: round(share * len(train))]
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=rng)) % 10
    return x[train].float() / 16, labels, x[test].float() / 16, y[test]


def accuracies(way: Way, share: float, seed: int, epochs: int = 50) -> list[float]:
    """On the test data after every epoch."""
    rng = torch.Generator().manual_seed(seed)
    x, y, x_test, y_test = digits(share, rng)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=way.lr, momentum=0.9)
    scalar, found = way.make(), []
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=rng).split(64):
            loss = scalar(F.cross_entropy(model(x[batch]), y[batch], reduction="none"), model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(float((model(x_test).argmax(1) == y_test).double().mean()))
    return found


def shown(values: Sequence[float]) -> str:
    """Mean and standard error over the seeds."""
    v = torch.tensor(values, dtype=torch.float64)
    error = float(v.std()) / math.sqrt(len(v)) if len(v) > 1 else math.nan
    return f"{float(v.mean()):.3f} +- {error:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=50)
    options = parser.parse_args(arguments)
    print(f"accuracy after {options.epochs} epochs, mean +- standard error of {options.seeds} seeds [best epoch]\n")
    print("| training | " + " | ".join(f"{share:.0%} wrong labels" for share in SHARES) + " |")
    print("|---" * (1 + len(SHARES)) + "|")
    for way in WAYS:
        cells = []
        for share in SHARES:
            runs = [accuracies(way, share, seed, options.epochs) for seed in range(options.seeds)]
            best = sum(map(max, runs)) / len(runs)
            cells.append(f"{shown([run[-1] for run in runs])} [{best:.3f}]")
        print(f"| {way.name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
