"""Measure what rows cost: norms and the clipped gradient against the plain step, interleaved in one process.

    OMP_NUM_THREADS=2 python tools/figures.py [--repeats 15]

The plain step is the forward pass and the backward pass of the summed losses; every other step has a forward pass of
its own, too. Prints a markdown table: medians of the ratios to the plain step of the same round, with quartiles. The
first call is `grad_norms` on a graph that was not seen before, which proves where the examples lie.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.rows.plan import forget

WARM_UP = 2  # rounds that are not counted
Workload = tuple[str, nn.Module, Callable[[], Tensor]]


class Block(nn.Module):
    """One block of a small GPT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """Four blocks, embedding tied to the head."""

    def __init__(self, vocabulary: int, length: int, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def perceptron(b: int) -> Workload:
    widths = (512, 1024, 1024, 1024)
    layers = [layer for d, p in pairwise(widths) for layer in (nn.Linear(d, p), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(1024, 10))
    x, y = torch.randn(b, 512), torch.randint(10, (b,))
    return f"MLP 512-1024-1024-1024-10, B={b}", model, lambda: F.cross_entropy(model(x), y, reduction="none")


def convolutional(b: int) -> Workload:
    channels = (3, 32, 64, 64, 128, 128)
    layers: list[nn.Module] = []
    for i, (d, p) in enumerate(pairwise(channels)):
        layers += [nn.Conv2d(d, p, 3, stride=1 + i % 2, padding=1), nn.GroupNorm(8, p), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    x, y = torch.randn(b, 3, 32, 32), torch.randint(10, (b,))
    return f"CNN, five 3x3 convolutions, B={b}", model, lambda: F.cross_entropy(model(x), y, reduction="none")


def language(b: int, t: int) -> Workload:
    model, ids = GPT(2000, t), torch.randint(2000, (b, t + 1))

    def losses() -> Tensor:
        logits = model(ids[:, :-1])
        return rg.per_example(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"))

    return f"GPT, 4 blocks, width 256, B={b}, T={t}", model, losses


def recurrent(b: int, t: int) -> Workload:
    model, x = nn.LSTM(128, 256, batch_first=True), torch.randn(b, t, 128)
    return f"LSTM 128 -> 256, B={b}, T={t}", model, lambda: model(x)[0].square().mean((1, 2))


def lookup(b: int, t: int) -> Workload:
    model = nn.Sequential(nn.Embedding(100_000, 64), nn.Flatten(), nn.Linear(64 * t, 10))
    ids, y = torch.randint(100_000, (b, t)), torch.randint(10, (b,))
    return f"Embedding of 100,000, B={b}, T={t}", model, lambda: F.cross_entropy(model(ids), y, reduction="none")


def measure(model: nn.Module, losses: Callable[[], Tensor], repeats: int) -> dict[str, list[float]]:
    """Seconds of each kind of step, one of each in every round."""

    def plain() -> None:
        losses().sum().backward()

    def norms() -> None:
        rg.grad_norms(losses(), model)

    def clipped() -> None:
        rg.clipped_loss(losses(), model, 1.0).backward()

    def first() -> None:
        forget()
        norms()

    seconds: dict[str, list[float]] = {}
    for i in range(repeats + WARM_UP):
        for step in (plain, norms, clipped, *([first] if i % 3 == 0 else [])):  # `first` leaves its proof behind
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            step()
            if i >= WARM_UP:
                seconds.setdefault(step.__name__, []).append(time.perf_counter() - start)
    return seconds


def line(name: str, seconds: dict[str, list[float]]) -> str:
    """Milliseconds of the plain step, and for the others the ratio to it with its quartiles over the rounds."""
    plain = seconds["plain"]
    cells = [f"{1000 * median(plain):.1f}"]
    for step in ("norms", "clipped"):
        low, middle, high = quantiles([a / b for a, b in zip(seconds[step], plain, strict=True)], n=4)
        cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    cells.append(f"{median(seconds['first']) / median(plain):.1f}")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {repeats} rounds\n")
    print("| workload | plain step, ms | norms | clipped gradient | first call |\n|---|---|---|---|---|")
    for name, model, losses in (
        perceptron(256), perceptron(32), convolutional(64), language(16, 64), language(4, 512), recurrent(32, 64),
        lookup(256, 32),
    ):  # fmt: skip
        print(line(name, measure(model, losses, repeats)), flush=True)


if __name__ == "__main__":
    main()
