"""The models that are measured, each with a batch of random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.task import Task

SEED = 0


@dataclass(frozen=True)
class Workload:
    """A task that can be built any number of times, always the same; `tiny` has the same structure for tests.

    `for_hooks` asks for what rivals with hooks on layers need, with the same parameters and losses.
    """

    title: str
    make: Callable[..., Task]
    tiny: Callable[..., Task]

    def task(self, *, for_hooks: bool = False, tiny: bool = False) -> Task:
        torch.manual_seed(SEED)
        task = (self.tiny if tiny else self.make)()
        return seen_by_hooks(task) if for_hooks else task


def seen_by_hooks(task: Task) -> Task:
    """The form of the model in which the input of each layer with parameters has the examples first."""
    if isinstance(task.model, GPT):
        task.model.expand_positions = True
    return task


def perceptron(b: int, widths: tuple[int, ...] = (512, 1024, 1024, 1024, 10)) -> Task:
    layers = [layer for d, p in pairwise(widths) for layer in (nn.Linear(d, p), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    return Task(model, (torch.randn(b, widths[0]), torch.randint(widths[-1], (b,))), classification)


def convolutional(b: int, channels: tuple[int, ...] = (3, 32, 64, 64, 128, 128), side: int = 32) -> Task:
    layers: list[nn.Module] = []
    for i, (d, p) in enumerate(pairwise(channels)):
        layers += [nn.Conv2d(d, p, 3, stride=1 + i % 2, padding=1), nn.GroupNorm(8, p), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))
    return Task(model, images(b, side), classification)


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, d: int, p: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(d, p, 3, stride, 1, bias=False), nn.GroupNorm(8, p)
        self.conv2, self.norm2 = nn.Conv2d(p, p, 3, 1, 1, bias=False), nn.GroupNorm(8, p)
        self.shortcut = nn.Sequential()
        if stride > 1 or d != p:
            self.shortcut = nn.Sequential(nn.Conv2d(d, p, 1, stride, bias=False), nn.GroupNorm(8, p))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def residual(b: int, width: int = 64, n_blocks: int = 2, side: int = 32) -> Task:
    """ResNet-18 with its stem for small pictures; GroupNorm instead of BatchNorm."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
    d = width
    for stage in range(4):
        for block in range(n_blocks):
            p = width * 2**stage
            layers.append(Residual(d, p, 2 if stage and not block else 1))
            d = p
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d, 10))
    return Task(model, images(b, side), classification)


class Block(nn.Module):
    """One block of a small GPT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small GPT whose head is tied to the embedding."""

    expand_positions = False  # the position's number for every example, so that hooks see the examples there

    def __init__(self, vocabulary: int, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(places.expand_as(ids) if self.expand_positions else places)
        return self.head(self.norm(self.blocks(x)))


def language(b: int, t: int, vocabulary: int = 2000, width: int = 256, depth: int = 4) -> Task:
    ids = torch.randint(vocabulary, (b, t + 1))
    return Task(GPT(vocabulary, t, width, depth), (ids[:, :-1], ids[:, 1:]), next_token)


class Recurrent(nn.Module):
    """An LSTM that gives the hidden states alone."""

    def __init__(self, d: int, p: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d, p, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def recurrent(b: int, t: int, d: int = 128, p: int = 256) -> Task:
    return Task(Recurrent(d, p), (torch.randn(b, t, d), torch.randn(b, t, p)), squared_error)


def lookup(b: int, t: int, vocabulary: int = 100_000, width: int = 64) -> Task:
    model = nn.Sequential(nn.Embedding(vocabulary, width), nn.Flatten(), nn.Linear(width * t, 10))
    return Task(model, (torch.randint(vocabulary, (b, t)), torch.randint(10, (b,))), classification)


def images(b: int, side: int) -> tuple[Tensor, Tensor]:
    return torch.randn(b, 3, side, side), torch.randint(10, (b,))


def classification(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def next_token(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the tokens of each example."""
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean((1, 2))


TINY_PERCEPTRON = partial(perceptron, 5, (6, 7, 8, 6, 4))
TINY_LANGUAGE = partial(language, 3, 5, vocabulary=11, width=8)
# fmt: off
WORKLOADS = {
    "mlp-256":   Workload("MLP 512-1024-1024-1024-10, B=256", partial(perceptron, 256), TINY_PERCEPTRON),
    "mlp-32":    Workload("MLP 512-1024-1024-1024-10, B=32", partial(perceptron, 32), TINY_PERCEPTRON),
    "cnn":       Workload("CNN, five 3x3 convolutions, B=64", partial(convolutional, 64),
                          partial(convolutional, 3, (3, 8, 16, 8, 16, 8), side=6)),
    "resnet":    Workload("ResNet-18 with GroupNorm, B=16", partial(residual, 16),
                          partial(residual, 2, width=8, side=16)),
    "gpt-64":    Workload("GPT, 4 blocks, width 256, B=16, T=64", partial(language, 16, 64), TINY_LANGUAGE),
    "gpt-128":   Workload("GPT, 4 blocks, width 256, B=16, T=128", partial(language, 16, 128), TINY_LANGUAGE),
    "gpt-512":   Workload("GPT, 4 blocks, width 256, B=4, T=512", partial(language, 4, 512), TINY_LANGUAGE),
    "lstm":      Workload("LSTM 128 -> 256, B=32, T=64", partial(recurrent, 32, 64), partial(recurrent, 3, 64, 4, 6)),
    "embedding": Workload("Embedding of 100,000, B=256, T=32", partial(lookup, 256, 32),
                          partial(lookup, 4, 3, vocabulary=20, width=5)),
}
# fmt: on
