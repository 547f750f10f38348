"""What an audit adds to the time of a training step.

    python examples/audit_overhead.py [--steps 300]

times steps of plain training, of training with an audit of losses and outputs, and of training with gradient norms and
an audit of these too, in turn on the same batches and one thread, and prints medians of the processor time and ratios
to the plain step (about two minutes). Adam, float32.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.training.mlp import mlp

N, CLASSES = 4096, 10
MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "64-128-128-10, that of `rowgrad audit`": lambda: mlp(64, (128, 128), CLASSES, 0.5),
    "512-1024-1024-10": lambda: mlp(512, (1024, 1024), CLASSES, 0.0),
}
Step = Callable[[Tensor, Tensor, Tensor], None]  # positions, inputs, labels


def plain(model: nn.Sequential) -> Step:
    optimizer = torch.optim.Adam(model.parameters())

    def step(index: Tensor, x: Tensor, y: Tensor) -> None:
        losses = F.cross_entropy(model(x), y, reduction="none")
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()

    return step


def audited(model: nn.Sequential) -> Step:
    optimizer, audit = torch.optim.Adam(model.parameters()), rg.Audit(N, CLASSES)

    def step(index: Tensor, x: Tensor, y: Tensor) -> None:
        logits = model(x)
        losses = F.cross_entropy(logits, y, reduction="none")
        audit.update(index, losses=losses, logits=logits, labels=y)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()

    return step


def with_norms(model: nn.Sequential) -> Step:
    optimizer, audit = torch.optim.Adam(model.parameters()), rg.Audit(N, CLASSES)

    def step(index: Tensor, x: Tensor, y: Tensor) -> None:
        logits = model(x)
        J = rg.jacobian(F.cross_entropy(logits, y, reduction="none"), model)
        audit.update(index, losses=J.losses, norms=J.norms(), logits=logits, labels=y)
        optimizer.zero_grad()
        J.loss(1 / len(J)).backward()
        optimizer.step()

    return step


WAYS = {"plain": plain, "audited": audited, "audited, with norms": with_norms}


def times(make: Callable[[], nn.Sequential], batch_size: int, n_steps: int, n_warm: int = 10) -> dict[str, list[float]]:
    """Milliseconds of each step. The audit adds up its updates now and then, so that some steps cost more: see mean."""
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (N,), generator=rng)
    inputs = next(make().parameters()).shape[1]
    x = torch.randn(CLASSES, inputs, generator=rng)[y] + torch.randn(N, inputs, generator=rng)
    steps = {name: way(make()) for name, way in WAYS.items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    epochs = -(-(n_steps + n_warm) // (N // batch_size))
    batches = [b for _ in range(epochs) for b in torch.randperm(N, generator=rng).split(batch_size)]
    for trial, index in enumerate(batches[: n_steps + n_warm]):
        for name, step in steps.items():
            start = time.thread_time()
            step(index, x[index], y[index])
            if trial >= n_warm:
                found[name].append(1000 * (time.thread_time() - start))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(arguments)
    print("| network, batch | plain step, ms (middle half) | audited | by the mean | with norms | by the mean |")
    print("|---|---|---|---|---|---|")
    for name, make in MODELS.items():
        for batch_size in (64, 256):
            base, *others = times(make, batch_size, options.steps).values()
            low, middle, high = quantiles(base, n=4)
            cells = [f"{middle:.3g} ({low:.3g} to {high:.3g})"]
            for values in others:
                cells += [f"{median(values) / middle:.2f}", f"{sum(values) / sum(base):.2f}"]
            print(f"| {name}, {batch_size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
