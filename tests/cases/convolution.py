"""Convolutions in one to three dimensions, straight and transposed."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.table import Apply, Make, Setup, case, energy, plain


def two(first: nn.Module, second: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.Tanh(), second)


plain("conv1d", lambda: two(nn.Conv1d(2, 3, 3), nn.Conv1d(3, 2, 2, stride=2, bias=False)), 2, 9)
plain(
    "conv1d same padding, dilated",
    lambda: two(nn.Conv1d(2, 4, 3, padding="same", dilation=2), nn.Conv1d(4, 2, 4, padding="same", dilation=2)),
    2,
    7,
)
plain("conv1d circular", lambda: two(nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), nn.Conv1d(3, 2, 1)), 2, 6)
plain(
    "conv1d depthwise",
    lambda: two(nn.Conv1d(4, 4, 3, groups=4, padding=1), nn.Conv1d(4, 8, 2, groups=4, bias=False)),
    4,
    6,
)
plain("conv1d with one output position", lambda: two(nn.Conv1d(2, 3, 6), nn.Conv1d(3, 2, 1)), 2, 6)
plain("conv2d", lambda: two(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 2)), 2, 6, 6, tags="smoke")
plain(
    "conv2d strided, padded, dilated",
    lambda: two(nn.Conv2d(2, 3, 3, stride=(2, 1), padding=(1, 2)), nn.Conv2d(3, 2, (2, 3), dilation=(1, 2))),
    2,
    6,
    7,
)
plain("conv2d with an unused border", lambda: two(nn.Conv2d(2, 3, 3, stride=2), nn.Conv2d(3, 2, 2, stride=3)), 2, 8, 8)
plain("conv2d grouped", lambda: two(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 3, 2, groups=3, stride=2)), 4, 6, 6)
plain(
    "conv2d depthwise separable", lambda: two(nn.Conv2d(3, 6, 3, groups=3, padding="same"), nn.Conv2d(6, 2, 1)), 3, 5, 5
)
plain("conv2d padding valid", lambda: two(nn.Conv2d(2, 3, 3, padding="valid"), nn.Conv2d(3, 2, 1)), 2, 4, 4)
plain("conv2d reflect", lambda: two(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Conv2d(3, 2, 1)), 2, 5, 5)
plain(
    "conv2d replicate",
    lambda: two(nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), nn.Conv2d(3, 2, 1)),
    2,
    5,
    5,
)
plain(
    "conv2d circular", lambda: two(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Conv2d(3, 2, 1)), 2, 5, 5
)
plain(
    "conv2d channels last",
    lambda: two(nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.Conv2d(3, 2, 2)),
    2,
    6,
    6,
)
plain("conv3d", lambda: two(nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), nn.Conv3d(3, 2, (1, 2, 2), padding=1)), 2, 3, 4, 4)
plain(
    "conv3d grouped, dilated",
    lambda: two(nn.Conv3d(2, 4, 2, groups=2, dilation=(1, 2, 1)), nn.Conv3d(4, 2, 1)),
    2,
    3,
    4,
    3,
)
plain(
    "conv1d transposed",
    lambda: two(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), nn.Conv1d(3, 2, 2)),
    2,
    4,
)
plain(
    "conv2d transposed",
    lambda: two(nn.ConvTranspose2d(2, 3, 3, stride=2), nn.ConvTranspose2d(3, 2, 2, bias=False)),
    2,
    3,
    3,
)
plain(
    "conv2d transposed, output padding",
    lambda: two(nn.ConvTranspose2d(2, 3, 3, stride=(2, 3), padding=1, output_padding=(1, 2)), nn.Conv2d(3, 1, 2)),
    2,
    3,
    3,
)
plain(
    "conv2d transposed, grouped, dilated",
    lambda: two(nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2), nn.Conv2d(6, 2, 2)),
    4,
    3,
    3,
)
plain("conv3d transposed", lambda: two(nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 1)), nn.Conv3d(3, 2, 1)), 2, 2, 2, 3)
plain(
    "convolutions and a linear head",
    lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)),
    1,
    6,
    6,
)
plain(
    "conv1d over a sequence of vectors",
    lambda: nn.Sequential(nn.Linear(3, 4), Apply(lambda x: x.mT), nn.Conv1d(4, 2, 3), nn.Tanh()),
    6,
    3,
)


@case("conv2d same padding, even kernel", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with warnings.catch_warnings():  # PyTorch remarks, once a process, that it copies the input
            warnings.simplefilter("ignore")
            return energy(model(x))

    model = two(nn.Conv2d(2, 3, 2, padding="same"), nn.Conv2d(3, 2, (4, 3), padding="same"))
    return make.setup(make.model(model), make.x(2, 5, 5), loss=loss)


@case("conv2d without a batch dimension")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([model(x_j).square().mean() for x_j in x])

    return make.setup(make.model(two(nn.Conv2d(2, 3, 2), nn.Conv2d(3, 1, 2))), make.x(2, 4, 4), loss=loss)


@case("convolution and linear layer share a weight", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        maps = F.conv2d(x, model.W.view(3, 2, 2, 2)).tanh()
        return energy(maps) + energy(F.linear(x.flatten(1)[:, :8], model.W))

    return make.setup(make.bag(W=(3, 8)), make.x(2, 4, 4), loss=loss)


@case("convolution kernels shared by two scales", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(model(x).tanh()) + energy(model(F.avg_pool2d(x, 2)).sin())

    return make.setup(make.model(nn.Conv2d(2, 3, 2)), make.x(2, 6, 6), loss=loss)


@case("kernels computed for each example", tags="attack layout")
def _(make: Make) -> Setup:
    """Each example's kernel comes from a network; the batch is folded into groups."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        kernels = model(x.mean((2, 3))).view(n * 3, c, 2, 2)
        out = F.conv2d(x.reshape(1, n * c, height, width), kernels, groups=n)
        return energy(out.view(n, 3, height - 1, width - 1).tanh())

    return make.setup(make.model(nn.Linear(2, 3 * 2 * 4)), make.x(2, 4, 4), loss=loss)


@case("examples as channels of a depthwise convolution", tags="attack layout")
def _(make: Make) -> Setup:
    """One kernel per position of the batch: owned, but by a dimension that is not the first."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = F.conv1d(x.unsqueeze(0), model.kernel.expand(len(x), 1, 3), groups=len(x))
        return energy(out.squeeze(0).tanh())

    return make.setup(make.bag(kernel=(1, 1, 3)), make.x(6), loss=loss)


@case("convolution along the batch", independent=False, tags="attack mixed")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = model.conv(model.encode(x).T.unsqueeze(0)).squeeze(0).T
        return energy(out)

    modules = nn.ModuleDict({"encode": nn.Linear(3, 2), "conv": nn.Conv1d(2, 2, 3, padding=1)})
    model = make.model(modules)
    model.encode, model.conv = modules["encode"], modules["conv"]
    return make.setup(model, make.x(3), loss=loss)
