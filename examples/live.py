"""A model and a forward pass for the command line: what `rowgrad graph`, `diagnose` and `check` are given.

    rowgrad graph examples.live:classifier --out graph.html
    rowgrad graph examples.live:residual --to stem.weight --by length --out graph.html
    rowgrad graph examples.live:recurrent --by time --out graph.html
    rowgrad diagnose examples.live:deep_sigmoids
    rowgrad check examples.live:classifier

Each function returns (model, closure); the closure runs the forward pass and returns the examples' losses, shape (B,).
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

Pair = tuple[nn.Module, "Closure"]


class Closure:
    """The forward pass on one batch of the digits."""

    def __init__(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.model, self.images, self.labels = model, images, labels

    def __call__(self) -> torch.Tensor:
        return F.cross_entropy(self.model(self.images), self.labels, reduction="none")


def classifier() -> Pair:
    """A small convolutional network with a residual block, healthy."""
    return _on_digits(ConvNet())


def deep_sigmoids() -> Pair:
    """Ten layers of sigmoids: the gradient vanishes on its way down."""
    layers = [nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid()]
    for _ in range(9):
        layers += [nn.Linear(32, 32), nn.Sigmoid()]
    return _on_digits(nn.Sequential(*layers, nn.Linear(32, 10)))


def residual() -> Pair:
    """Ten residual blocks: 1024 paths from the stem to the loss, of 11 lengths."""
    return _on_digits(ResidualNet())


def recurrent() -> Pair:
    """One cell that reads an image row by row: its weights are used eight times."""
    return _on_digits(RowReader())


class ResidualNet(nn.Module):
    """Blocks of two linear layers, each with a skip connection around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(10))
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        h = self.stem(images.flatten(1))
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


class RowReader(nn.Module):
    """A recurrent cell over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(8, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        h = images.new_zeros(len(images), 32)
        for row in images.squeeze(1).unbind(1):
            h = self.cell(row, h)
        return self.head(h)


class ConvNet(nn.Module):
    """Two convolutions, the second with a skip connection around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.conv1(images))
        h = F.relu(h + self.norm(self.conv2(h)))
        return self.head(F.max_pool2d(h, 2).flatten(1))


def _on_digits(model: nn.Module) -> Pair:
    """The first 64 digits."""
    digits = load_digits()
    images = torch.tensor(digits.images[:64], dtype=torch.float32).unsqueeze(1) / 16 - 0.3
    return model, Closure(model, images, torch.tensor(digits.target[:64]))
