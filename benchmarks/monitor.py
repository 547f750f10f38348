"""What `rowgrad.Monitor` adds to a training loop: `python -m benchmarks.monitor [cuda]`.

Steps of the same training without a monitor and with one that observes take turns in one process, so that both meet
the same machine. From the medians of their times, and that of a monitor's calls at steps that it does not observe,
follows what one adds that observes every 50th step. The time is the processor's on the CPU, on one thread, and the
clock's on a GPU. The first observation, which looks at more and proves where the examples lie, is outside of it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rowgrad as rg

EVERY = 50
ROUNDS = 40


class Transformer(nn.Module):
    """28 rows as positions, width 128, 4 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(28, 128), nn.Linear(128, 10)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True, norm_first=True) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.squeeze(1))
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(1))


def mlp(width: int, depth: int) -> nn.Sequential:
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), *hidden, nn.Linear(width, 10))


def cnn(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    def block(n_in: int, n_out: int) -> list[nn.Module]:
        return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), norm(n_out), nn.ReLU()]

    body = [*block(1, 16), *block(16, 16), nn.MaxPool2d(2), *block(16, 32), *block(32, 32)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "MLP 64 x 1": (lambda: mlp(64, 1), 64),
    "MLP 512 x 3": (lambda: mlp(512, 3), 128),
    "CNN, GroupNorm": (lambda: cnn(lambda c: nn.GroupNorm(4, c)), 64),
    "CNN, BatchNorm": (lambda: cnn(nn.BatchNorm2d), 64),
    "transformer": (Transformer, 64),
}


class Loop:
    """One training, with a monitor at every `every`th step, or without."""

    def __init__(self, build: Callable[[], nn.Module], batch: int, every: int | None, device: str) -> None:
        torch.manual_seed(0)
        self.model = build().to(device)
        self.x, self.y = torch.randn(batch, 1, 28, 28, device=device), torch.randint(10, (batch,), device=device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.monitor = None if every is None else rg.Monitor(self.model, self.optimizer, every=every)

    def step(self) -> None:
        losses = F.cross_entropy(self.model(self.x), self.y, reduction="none")
        if self.monitor is not None:
            self.monitor.observe(losses)
        self.optimizer.zero_grad()
        losses.mean().backward()
        self.optimizer.step()
        if self.monitor is not None:
            self.monitor.update()

    def seconds(self) -> float:
        """Of one step."""
        clock = time.perf_counter if self.x.is_cuda else time.process_time
        _wait(self.x)
        start = clock()
        self.step()
        _wait(self.x)
        return clock() - start


def _wait(t: Tensor) -> None:
    if t.is_cuda:
        torch.cuda.synchronize()


def measured(build: Callable[[], nn.Module], batch: int, device: str) -> tuple[float, float, float]:
    """Milliseconds of a step without a monitor, steps' worth of one observation, share that a monitor adds."""
    loops = [Loop(build, batch, every, device) for every in (None, 1)]
    for loop in loops * 4:
        loop.step()
    times = [[loop.seconds() for loop in loops] for _ in range(ROUNDS)]
    plain = statistics.median(row[0] for row in times)
    # Every fourth observation measures norms, too.
    observed = statistics.mean(statistics.median(row[1] for row in times[k::4]) for k in range(4))
    steps = observed / plain - 1
    return 1e3 * plain, steps, steps / EVERY + idle(build, batch, device) / plain


def idle(build: Callable[[], nn.Module], batch: int, device: str) -> float:
    """Seconds of a monitor's two calls at a step that is not observed."""
    loop, n = Loop(build, batch, 10**9, device), 1000
    loop.step()
    assert loop.monitor is not None
    losses = F.cross_entropy(loop.model(loop.x), loop.y, reduction="none")
    start = time.process_time()
    for _ in range(n):
        loop.monitor.observe(losses)
        loop.monitor.update()
    return (time.process_time() - start) / n


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    torch.set_num_threads(1)
    print(f"| model | batch | ms a step | an observation, in steps | added at every {EVERY}th step |")
    print("|---|---|---|---|---|")
    for name, (build, batch) in MODELS.items():
        plain, steps, added = measured(build, batch, device)
        print(f"| {name} | {batch} | {plain:.2f} | {steps:.2f} | {added:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
