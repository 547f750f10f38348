"""Where drawing examples by their gradients pays, and where it does not: scikit-learn's digits, a small network.

    python examples/importance_sampling.py

For clean labels and for a share of wrong ones it prints, after some epochs, by what factor drawing by norms divides the
variance of a batch's gradient, over the last 64 batches: at best (the norms of each moment), truly (the norms that
`rg.NormSampler` had in its table, against a pass over all data before each step), and as the sampler measures it from
the batches. Less variance is not less loss: the last table compares what is learned with an ordinary shuffle.

It takes about two minutes, on one thread: sums in another order change the figures, as a training amplifies rounding.
"""

import argparse
import time
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rowgrad as rg

AFTER = (1, 2, 3, 5, 10, 20, 30, 50)  # epochs
N, BATCH, CLASSES = 1258, 32, 10
NEVER = (float("inf"), 0.0)
WINDOW = 64  # batches, over which the sampler measures, and what it measures is worked out


@dataclass
class Row:
    """After `epoch`: ratios of variances in the last batches, uniform to drawn by norms; how well the network does."""

    epoch: int
    active: bool
    best: float
    true: float
    measured: float
    error: float
    loss: float
    accuracy: float


def course(
    flip: float, seed: int, switch: tuple[float, float] | None = (1.2, 1.0), after: tuple[int, ...] = AFTER
) -> list[Row]:
    """Train with a share `flip` of wrong labels; `NEVER` as the switch makes it an ordinary shuffle."""
    x, y, test_x, test_y = digits(flip, seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sampler = rg.NormSampler(N, switch=switch, window=WINDOW, generator=torch.Generator().manual_seed(seed))
    loader = DataLoader(rg.Weighted(TensorDataset(x, y)), BATCH, sampler=sampler, generator=torch.Generator())
    rows: list[Row] = []
    last: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)
    for epoch in range(1, max(after) + 1):
        for (inputs, labels), draw in loader:
            if any(epoch <= shown <= epoch + WINDOW // len(loader) for shown in after):
                last.append(variances(model, x, y, sampler.probabilities()))
            losses = F.cross_entropy(model(inputs), labels, reduction="none")
            J = rg.jacobian(losses, model)
            norms, loss = J.norms(), J.loss(draw.weight / len(losses))
            optimizer.zero_grad()
            loss.backward()
            grad_norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
            sampler.update(draw, norms, grad_norm=grad_norm)
            optimizer.step()
        if epoch in after:
            uniform, least, by_table = (sum(parts) for parts in zip(*last, strict=True))
            with torch.no_grad():
                loss = float(F.cross_entropy(model(x), y))
                accuracy = float((model(test_x).argmax(1) == test_y).float().mean())
            rows.append(Row(epoch, sampler.active, uniform / least, uniform / by_table, *sampler.gain, loss, accuracy))
    return rows


def digits(flip: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test set, in an order of the seed; seeds the weights of the network, too."""
    torch.manual_seed(seed)
    bunch = load_digits()
    order = torch.randperm(len(bunch.target))
    x, y = torch.tensor(bunch.data / 16, dtype=torch.float32)[order], torch.tensor(bunch.target)[order]
    wrong = torch.randperm(N)[: round(flip * N)]
    given = y[:N].clone()
    given[wrong] = (given[wrong] + torch.randint(1, CLASSES, (len(wrong),))) % CLASSES
    return x[:N], given, x[N:], y[N:]


def variances(model: nn.Module, x: Tensor, y: Tensor, p: Tensor) -> tuple[float, float, float]:
    """Of one draw's gradient: uniform, with the best probabilities, and with p; by the closed form."""
    J = rg.jacobian(F.cross_entropy(model(x), y, reduction="none"), model)
    norms = J.norms().double()
    mean = sum(float(part.double().square().sum()) for part in J.weighted_sum(1 / N).values())
    moments = norms.square().mean(), norms.mean() ** 2, (norms.square() / p).sum() / N**2
    uniform, least, by_table = (float(moment) - mean for moment in moments)
    return uniform, least, by_table


def show(title: str, rows: list[Row]) -> None:
    print(f"\n{title}\n{'epoch':>5} {'at best':>8} {'true':>6} {'measured':>14}  drawn by norms")
    for row in rows:
        measured = f"{row.measured:.2f} +- {row.error:.2f}"
        print(f"{row.epoch:>5} {row.best:>8.1f} {row.true:>6.2f} {measured:>14}  {'yes' if row.active else 'no'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="for the comparison of what is learned")
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    begun = time.perf_counter()
    learned = {}
    for name, flip in (("clean labels", 0.0), ("20% wrong labels", 0.2)):
        by_norms = [course(flip, seed, after=AFTER if seed == 0 else AFTER[-1:]) for seed in seeds]
        show(f"{name}: ratio of variances, seed 0", by_norms[0])
        show(f"{name}, never switched off, seed 0", course(flip, 0, None))
        learned[f"{name}, drawn by norms"] = by_norms
        learned[f"{name}, shuffled"] = [course(flip, seed, NEVER, AFTER[-1:]) for seed in seeds]
    title = f"mean of {len(seeds)} seeds, after the last epoch"
    print(f"\n{title:<40} {'training loss':>14} {'test accuracy':>14}")
    for name, runs in learned.items():
        last = [rows[-1] for rows in runs]
        loss, accuracy = sum(r.loss for r in last) / len(last), sum(r.accuracy for r in last) / len(last)
        print(f"{name:<40} {loss:>14.4f} {accuracy:>14.3f}")
    print(f"\n{time.perf_counter() - begun:.0f} seconds")


if __name__ == "__main__":
    main()
