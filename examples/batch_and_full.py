"""How well does a mini-batch point where all the data points? Early and late in a training on the digits.

    python examples/batch_and_full.py batch_and_full.png

Aggarwal 2018, section 3.3, "Why Does Mini-Batching Work?": at first the weights are poor and the data redundant, so a
small batch has the right direction; later its direction becomes less accurate. One Gram matrix of all N examples holds
every dot product this takes: for a batch, |g_B|^2 is the mean of its block, g_B . g the mean of its rows and |g|^2 the
mean of the whole. No gradient is written out, and no batch needs a pass of its own.

Of batches of B examples drawn without replacement, E g_B = g and E |g_B|^2 = |g|^2 + tr / B (N - B) / (N - 1), where
tr is the mean of |g_i - g|^2. Hence the cosine to be expected, sqrt(|g|^2 / E |g_B|^2). Late in training a few hard
examples hold most of the gradient; the cosines of very small batches then vary too much to have their mean there.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.preprocessing import scale
from torch import Tensor, nn

import rowgrad as rg

SIZES = (1, 8, 32, 128)
EPOCHS = (0, 1, 3, 10, 30)
N_BATCHES = 500


@dataclass(frozen=True)
class Cosines:
    """cos(g_B, g) over batches of one size: mean, standard deviation, and what |g|^2 and tr predict."""

    size: int
    mean: float
    spread: float
    predicted: float


@dataclass(frozen=True)
class Moment:
    """What is measured after some epochs: |g|, tr / |g|^2 (a batch of that size has as much noise as signal)."""

    epoch: int
    loss: float
    norm: float
    noise: float
    cosines: tuple[Cosines, ...]

    def of(self, size: int) -> Cosines:
        return next(c for c in self.cosines if c.size == size)


def cosine(gram: Tensor, batch: Tensor) -> Tensor:
    """Of the batches' mean gradients with that of all, from the Gram matrix (N, N); batch (..., B), result (...)."""
    own = gram[batch.unsqueeze(-1), batch.unsqueeze(-2)].mean((-2, -1))
    return gram.mean(1)[batch].mean(-1) / (own * gram.mean()).sqrt()


def predicted(gram: Tensor, size: int) -> float:
    """sqrt(|g|^2 / (|g|^2 + tr / B (N - B) / (N - 1)))."""
    n, square = len(gram), gram.mean()
    trace = gram.diagonal().mean() - square
    return float((square / (square + trace / size * (n - size) / (n - 1))).sqrt())


def measure(
    model: nn.Module, x: Tensor, y: Tensor, epoch: int, generator: torch.Generator, n_batches: int = N_BATCHES
) -> Moment:
    """The cosines of random batches of every size at the present weights."""
    losses = F.cross_entropy(model(x), y, reduction="none")
    gram = rg.jacobian(losses, model).gram()
    found = []
    for size in SIZES:
        batches = torch.stack([torch.randperm(len(x), generator=generator)[:size] for _ in range(n_batches)])
        c = cosine(gram, batches)
        found.append(Cosines(size, float(c.mean()), float(c.std()), predicted(gram, size)))
    square = float(gram.mean())
    noise = (float(gram.diagonal().mean()) - square) / square
    return Moment(epoch, float(losses.detach().mean()), square**0.5, noise, tuple(found))


def run(epochs: tuple[int, ...] = EPOCHS, *, seed: int = 0, n_batches: int = N_BATCHES) -> list[Moment]:
    """Train a small network by SGD in batches of 32 and measure after each of these epochs."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(scale(images)), torch.tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moments = []
    for epoch in range(max(epochs) + 1):
        if epoch in epochs:
            moments.append(measure(model, x, y, epoch, generator, n_batches))
        order = torch.randperm(len(x), generator=generator)[: len(x) // 32 * 32]  # a last batch of 5 would jump
        for index in order.split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return moments


def table(moments: list[Moment]) -> str:
    """One line for each moment and size."""
    lines = ["epoch   loss    |g|  tr/|g|^2  batch  cosine  spread  predicted"]
    for m in moments:
        for c in m.cosines:
            lines.append(
                f"{m.epoch:5} {m.loss:6.3f} {m.norm:6.3f} {m.noise:9.1f} "
                f"{c.size:6} {c.mean:7.3f} {c.spread:7.3f} {c.predicted:10.3f}"
            )
    return "\n".join(lines)


def draw(moments: list[Moment], target: Path) -> None:
    """Cosine against batch size, a curve for each moment: measured with its spread, and predicted."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for k, m in enumerate(moments):
        color = f"C{k}"
        sizes = [c.size * 1.03**k for c in m.cosines]  # side by side
        axes.errorbar(
            sizes, [c.mean for c in m.cosines], [c.spread for c in m.cosines],
            fmt="o", capsize=3, color=color, label=f"{m.epoch} epochs, loss {m.loss:.2g}",
        )  # fmt: skip
        axes.plot([c.size for c in m.cosines], [c.predicted for c in m.cosines], color=color, linewidth=1)
    axes.set(xscale="log", xlabel="examples in the batch", ylabel="cosine with the gradient of all", ylim=(-0.2, 1.05))
    axes.set_xticks(SIZES, [str(s) for s in SIZES])
    axes.minorticks_off()
    axes.legend(title="dots: mean and spread; lines: predicted", loc="upper left")
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path, default=Path("batch_and_full.png"), help="figure to be written")
    target = parser.parse_args().target
    moments = run()
    print(table(moments))
    draw(moments, target)
    print(target)


if __name__ == "__main__":
    main()
