"""Layers that normalize, with their scales and shifts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.table import Apply, Make, Setup, case, energy, plain

plain("layer norm", lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)), 4)
plain("layer norm on sequences", lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh()), 6, 4)
plain("layer norm without bias", lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5, bias=False), nn.Tanh()), 3, 4)
plain("layer norm of two dimensions", lambda: nn.Sequential(nn.LayerNorm((3, 4)), nn.Tanh(), nn.Linear(4, 2)), 2, 3, 4)
plain(
    "layer norm without parameters",
    lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 2)),
    4,
)
plain("rms norm", lambda: nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), nn.Tanh(), nn.Linear(5, 2)), 3, 4)
plain("group norm", lambda: nn.Sequential(nn.Conv2d(2, 6, 2), nn.GroupNorm(3, 6), nn.Tanh()), 2, 4, 4)
plain("group norm of vectors", lambda: nn.Sequential(nn.Linear(3, 6), nn.GroupNorm(2, 6), nn.Tanh()), 3)
plain("instance norm 1d", lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Tanh()), 2, 7)
plain(
    "instance norm 2d", lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, affine=True), nn.Tanh()), 2, 4, 4
)
plain("instance norm 3d", lambda: nn.Sequential(nn.InstanceNorm3d(2, affine=True), nn.Tanh()), 2, 2, 3, 2)
plain("batch norm 1d, eval", lambda: nn.Sequential(nn.Linear(3, 5), seen(nn.BatchNorm1d(5), 3.0), nn.Tanh()).eval(), 3)
plain("batch norm 1d on sequences, eval", lambda: nn.Sequential(seen(nn.BatchNorm1d(5), 3.0), nn.Tanh()).eval(), 5, 6)
plain(
    "batch norm 2d, eval",
    lambda: nn.Sequential(nn.Conv2d(2, 3, 2), seen(nn.BatchNorm2d(3), 2.0), nn.ReLU(), nn.Conv2d(3, 2, 2)).eval(),
    2,
    5,
    5,
)
plain("batch norm 3d, eval", lambda: nn.Sequential(seen(nn.BatchNorm3d(2), 2.0), nn.Tanh()).eval(), 2, 2, 2, 3)
plain(
    "instance norm 1d, eval with running statistics",
    lambda: nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Tanh()
    ).eval(),
    2,
    7,
)
plain(
    "local response norm",
    lambda: nn.Sequential(nn.Conv2d(2, 6, 2), nn.LocalResponseNorm(3), nn.Conv2d(6, 2, 2)),
    2,
    4,
    4,
)
plain(
    "normalization inside the net",
    lambda: nn.Sequential(nn.Linear(4, 5), Apply(lambda h: F.normalize(h, dim=-1)), nn.Linear(5, 2)),
    4,
)
plain(
    "centering over positions",
    lambda: nn.Sequential(nn.Linear(4, 5), Apply(lambda h: h - h.mean(1, keepdim=True)), nn.Linear(5, 2)),
    3,
    4,
)


def seen(norm: nn.Module, scale: float) -> nn.Module:
    """Batch norm with running statistics away from 0 and 1."""
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, scale)
    return norm


@case("rms norm, functional", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(F.rms_norm(x @ model.W, (5,), model.scale, eps=1e-3).tanh())

    return make.setup(make.bag(W=(4, 5), scale=(5,)), make.x(3, 4), loss=loss)


@case("rms norm, written out", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = x @ model.W
        return energy((model.scale * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6))).tanh())

    return make.setup(make.bag(W=(4, 5), scale=(5,)), make.x(3, 4), loss=loss)


@case("layer norm, sequence first", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(model(x.transpose(0, 1)).transpose(0, 1))

    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh())
    return make.setup(make.model(model), make.x(6, 4), loss=loss)


@case("one layer norm used in two places", fast=True)
def _(make: Make) -> Setup:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.second(self.norm(self.first(x)).tanh()))

    return make.setup(make.model(Twice()), make.x(3, 4), loss=lambda m, x: energy(m(x)))


plain(
    "batch norm 1d, training",
    lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)),
    3,
    fast=False,
    independent=False,
    tags="coupled",
)
plain(
    "batch norm 1d on sequences, training",
    lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Tanh()),
    2,
    5,
    fast=False,
    independent=False,
    tags="coupled",
)
plain(
    "batch norm 2d, training",
    lambda: nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 2), nn.BatchNorm2d(3), nn.Sigmoid()
    ),
    2,
    4,
    4,
    fast=False,
    independent=False,
    tags="coupled",
)
plain(
    "batch norm without running statistics",
    lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh()).eval(),
    3,
    fast=False,
    independent=False,
    tags="coupled",
)


@case("batch norm on half of the columns, then cat", independent=False, tags="coupled attack")
def _(make: Make) -> Setup:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            own, shared = self.body(x).chunk(2, 1)
            return self.head(torch.cat([own.tanh(), self.norm(shared)], 1).sin())

    return make.setup(make.model(Half()), make.x(4), loss=lambda m, x: energy(m(x)))


@case("chunk with one half centered over the batch", independent=False, tags="coupled attack")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        own, shared = model(x).chunk(2, 1)
        return energy(own.tanh()) + energy((shared - shared.mean(0)).sin())

    return make.setup(make.model(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6))), make.x(4), loss=loss)
