"""Where drawing examples by their gradients pays, and where it does not: scikit-learn's digits, a small network.

    python examples/importance_sampling.py

For clean labels and for a share of wrong ones it prints, after some epochs, by what factor drawing by norms divides the
variance of a batch's gradient: at best (the norms of this moment), truly (the norms that `rg.NormSampler` has in its
table, against a pass over all data), and as the sampler measures it from the batches. Less variance is not less loss:
the last table compares what is learned with an ordinary shuffle.
"""

import argparse
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


@dataclass
class Row:
    """After `epoch`: ratios of variances, uniform to drawn by norms, and how well the network does."""

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
    sampler = rg.NormSampler(N, switch=switch, generator=torch.Generator().manual_seed(seed))
    loader = DataLoader(rg.Weighted(TensorDataset(x, y)), BATCH, sampler=sampler, generator=torch.Generator())
    rows = []
    for epoch in range(1, max(after) + 1):
        for (inputs, labels), draw in loader:
            losses = F.cross_entropy(model(inputs), labels, reduction="none")
            J = rg.jacobian(losses, model)
            norms, loss = J.norms(), J.loss(draw.weight / len(losses))
            optimizer.zero_grad()
            loss.backward()
            grad_norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
            sampler.update(draw, norms, grad_norm=grad_norm)
            optimizer.step()
        if epoch in after:
            best, true, loss = ratios(model, x, y, sampler.probabilities())
            accuracy = float((model(test_x).argmax(1) == test_y).float().mean())
            rows.append(Row(epoch, sampler.active, best, true, *sampler.gain, loss, accuracy))
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


def ratios(model: nn.Module, x: Tensor, y: Tensor, p: Tensor) -> tuple[float, float, float]:
    """Variance with uniform draws over that with the best probabilities and with p, by the closed form; mean loss."""
    losses = F.cross_entropy(model(x), y, reduction="none")
    J = rg.jacobian(losses, model)
    norms = J.norms().double()
    model.zero_grad()
    J.backward(c=1 / N)
    mean = sum(float(w.grad.double().square().sum()) for w in model.parameters() if w.grad is not None)
    uniform = float(norms.square().mean()) - mean
    return (
        uniform / (float(norms.mean()) ** 2 - mean),
        uniform / (float((norms.square() / p).sum()) / N**2 - mean),
        float(losses.detach().mean()),
    )


def show(title: str, rows: list[Row]) -> None:
    print(f"\n{title}\n{'epoch':>5} {'at best':>8} {'true':>6} {'measured':>14}  drawn by norms")
    for row in rows:
        measured = f"{row.measured:.2f} +- {row.error:.2f}"
        print(f"{row.epoch:>5} {row.best:>8.1f} {row.true:>6.2f} {measured:>14}  {'yes' if row.active else 'no'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="for the comparison of what is learned")
    seeds = range(parser.parse_args().seeds)
    learned = {}
    for name, flip in (("clean labels", 0.0), ("20% wrong labels", 0.2)):
        by_norms = [course(flip, seed) for seed in seeds]
        show(f"{name}: ratio of variances, seed 0", by_norms[0])
        show(f"{name}, never switched off, seed 0", course(flip, 0, None))
        learned[f"{name}, drawn by norms"] = by_norms
        learned[f"{name}, shuffled"] = [course(flip, seed, NEVER) for seed in seeds]
    title = f"mean of {len(seeds)} seeds, after the last epoch"
    print(f"\n{title:<40} {'training loss':>14} {'test accuracy':>14}")
    for name, runs in learned.items():
        last = [rows[-1] for rows in runs]
        loss, accuracy = sum(r.loss for r in last) / len(last), sum(r.accuracy for r in last) / len(last)
        print(f"{name:<40} {loss:>14.4f} {accuracy:>14.3f}")


if __name__ == "__main__":
    main()
