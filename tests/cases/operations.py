"""Operations between layers: normalizing, selecting, in-place, complex ones, and custom Functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.table import Apply, Make, Setup, case, energy, plain


def between(function, d: int = 5, p: int | None = None) -> nn.Module:
    """A function between two linear layers."""
    return nn.Sequential(nn.Linear(4, d), Apply(function), nn.Linear(p or d, 2))


def _at_most(function, k: int):
    return lambda h: function(h, k, dim=-1)[0]


plain("softmax inside the net", lambda: between(lambda h: h.softmax(-1)), 4)
plain("cumulative sum", lambda: between(lambda h: h.cumsum(1)), 3, 4)
plain("sorted features", lambda: between(lambda h: h.sort(-1)[0]), 4)
plain("top features", lambda: between(_at_most(torch.topk, 3), p=3), 4)
plain("features chosen by argmax", lambda: between(lambda h: h.gather(1, h.argsort(1)[:, :3]), p=3), 4)
plain("median over positions", lambda: between(lambda h: h.median(1)[0]), 5, 4)
plain(
    "maximum and minimum over positions", lambda: between(lambda h: torch.cat([h.max(1)[0], h.amin(1)], -1), p=10), 5, 4
)
plain("log-sum-exp over positions", lambda: between(lambda h: h.logsumexp(1)), 5, 4)
plain("standard deviation over positions", lambda: between(lambda h: h.std(1)), 5, 4)
plain("max pooling", lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2)), 1, 7, 7)
plain(
    "average and adaptive pooling",
    lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(2), nn.Conv2d(3, 2, 2)),
    1,
    7,
    7,
)
plain(
    "global average pooling",
    lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
    2,
    4,
    4,
)
plain(
    "unfolded patches", lambda: nn.Sequential(Apply(lambda x: F.unfold(x, 2).mT), nn.Linear(8, 3), nn.Tanh()), 2, 4, 4
)
plain(
    "windows by unfold of a dimension",
    lambda: nn.Sequential(Apply(lambda x: x.unfold(1, 3, 2).flatten(2)), nn.Linear(6, 3), nn.Tanh()),
    7,
    2,
)
plain("positions flipped and rolled", lambda: between(lambda h: h.flip(1) * h.roll(1, 1)), 5, 4)
plain("pixel shuffle", lambda: nn.Sequential(nn.Conv2d(2, 8, 2), nn.PixelShuffle(2), nn.Conv2d(2, 2, 2)), 2, 3, 3)
plain(
    "upsampling",
    lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(3, 2, 2)),
    2,
    3,
    3,
)
plain(
    "constant padding",
    lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.ConstantPad1d((2, 1), 0.5), nn.Conv1d(3, 2, 2)),
    2,
    4,
)
plain("gated linear unit", lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU(), nn.Linear(3, 2)), 4)
plain("maxout", lambda: between(lambda h: h.unflatten(-1, (3, 2)).amax(-1), 6, 3), 4)
plain("product of features", lambda: between(lambda h: h.unsqueeze(2) * h.unsqueeze(1), p=5), 4)
plain("gram matrix of positions", lambda: between(lambda h: h @ h.mT, p=3), 3, 4)
plain("fourier transform", lambda: between(lambda h: torch.fft.rfft(h).abs(), p=3), 4)
plain("complex values in between", lambda: between(lambda h: (torch.complex(h, h.sin()) * 1j).exp().real), 4)
plain(
    "inverse of a matrix for each example",
    lambda: between(lambda h: torch.linalg.inv(h.unsqueeze(2) * h.unsqueeze(1) + torch.eye(5, dtype=h.dtype))),
    4,
)
plain(
    "in-place activations",
    lambda: nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.ELU(inplace=True), nn.Linear(5, 2)
    ),
    4,
)
plain("in-place arithmetic", lambda: between(lambda h: h.mul(2).add_(1).sin_().clamp_(-0.5, 0.9)), 4)
plain("in-place arithmetic on parts", lambda: between(lambda h: _changed_in_parts(h)), 4)
plain("masked positions", lambda: between(lambda h: h.masked_fill(h < -0.5, 0.0).tril()), 5, 4)
plain(
    "values filled in by masked_scatter",
    lambda: between(lambda h: torch.zeros_like(h).masked_scatter(h > 0, h[h > 0])),
    4,
)
plain(
    "dropout",
    lambda: nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Dropout(0.4), nn.Linear(9, 2)),
    4,
    deterministic=False,
)
plain(
    "dropout of channels",
    lambda: nn.Sequential(nn.Conv2d(2, 6, 2), nn.Dropout2d(0.4), nn.Conv2d(6, 2, 2)),
    2,
    4,
    4,
    deterministic=False,
)
plain(
    "dropout and alpha dropout in place",
    lambda: nn.Sequential(
        nn.Linear(4, 9), nn.SELU(), nn.AlphaDropout(0.3), nn.Dropout(0.3, inplace=True), nn.Linear(9, 2)
    ),
    4,
    deterministic=False,
)
plain(
    "stack, cat, unbind, chunk",
    lambda: between(lambda h: torch.stack([h, h.sin()], 1).unbind(1)[1] * torch.cat(h.chunk(5, -1), -1)),
    4,
)
plain("repeat and interleave", lambda: between(lambda h: h.repeat_interleave(2, -1) * h.repeat(1, 2), p=10), 4)
plain(
    "trapezoid of activations",
    lambda: nn.Sequential(
        nn.Linear(4, 5),
        nn.Softplus(),
        nn.GELU("tanh"),
        nn.SiLU(),
        nn.Hardswish(),
        nn.Mish(),
        nn.LogSigmoid(),
        nn.Hardtanh(),
        nn.CELU(),
        nn.Softsign(),
        nn.LeakyReLU(0.2),
        nn.Linear(5, 2),
    ),
    4,
)
plain("no activation at all", lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), 4)


def _changed_in_parts(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, :2].mul_(2)
    h[:, 2] += h[:, 3].clone().cos()
    h[:, 3:].add_(1)
    return h


@case("tokens written back by index_put", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model[0](x)
        example, token = (h[..., 0] > 0).nonzero(as_tuple=True)
        h = h.index_put((example, token), model[1](h[example, token]).tanh())
        return energy(h)

    return make.setup(make.model(nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 3)])), make.x(5, 4), loss=loss)


@case("graph convolution over the atoms of each example", fast=True)
def _(make: Make) -> Setup:
    """One graph of all atoms of all examples, messages along its edges, read out by index_add."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        n, t, d = x.shape
        start = torch.arange(n * t)
        end = (start // t) * t + (start + 1) % t
        h = x.reshape(n * t, d)
        for layer in model:
            messages = layer(torch.cat([h[start], h[end]], 1)).tanh()
            h = torch.zeros_like(messages).index_add(0, end, messages)
        return energy(h.new_zeros(n, h.shape[1]).index_add(0, start // t, h))

    return make.setup(make.model(nn.ModuleList([nn.Linear(6, 4), nn.Linear(8, 4)])), make.x(5, 3), loss=loss)


@case("scatter_reduce of tokens", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, group: Tensor) -> Tensor:
        h = model(x)
        index = group.unsqueeze(2).expand_as(h)
        return energy(h.new_zeros(len(x), 2, h.shape[2]).scatter_reduce(1, index, h, "amax", include_self=False))

    return make.setup(make.model(nn.Linear(4, 3)), make.x(5, 4), make.ids(2, 5), loss=loss)


@case("spatial transformer", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        theta = model["where"](x.flatten(1)).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return energy(model["what"](F.grid_sample(x, grid, align_corners=False)))

    model = nn.ModuleDict({"where": nn.Linear(32, 6), "what": nn.Conv2d(2, 2, 2)})
    return make.setup(make.model(model), make.x(2, 4, 4), loss=loss)


class Cube(torch.autograd.Function):
    """x^3 with its own backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class ScaledMatmul(torch.autograd.Function):
    """alpha x W: a Function with a parameter among its inputs and one argument that has no gradient."""

    @staticmethod
    def forward(ctx, alpha: float, x: Tensor, weight: Tensor) -> Tensor:
        ctx.alpha = alpha
        ctx.save_for_backward(x, weight)
        return alpha * x @ weight

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return None, ctx.alpha * grad @ weight.T, ctx.alpha * x.flatten(0, -2).T @ grad.flatten(0, -2)


class Centered(torch.autograd.Function):
    """x minus its mean over the batch."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad - grad.mean(0)


class Halves(torch.autograd.Function):
    """Two outputs, of which a user may read one."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x[:, :2], 3 * x[:, 2:]

    @staticmethod
    def backward(ctx, left: Tensor, right: Tensor) -> Tensor:
        return torch.cat([2 * left, 3 * right], 1)


plain("custom function", lambda: between(Cube.apply), 4)
plain("custom function with two outputs, one read", lambda: between(lambda h: Halves.apply(h)[1], p=3), 4)


@case("custom function with a parameter")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(ScaledMatmul.apply(0.5, x.sin(), model.W).tanh() @ model.V)

    return make.setup(make.bag(W=(4, 3), V=(3, 2)), make.x(5, 4), loss=loss)


@case("custom function that mixes examples", independent=False, tags="coupled attack")
def _(make: Make) -> Setup:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Apply(Centered.apply), nn.Linear(3, 2))
    return make.setup(make.model(model), make.x(4), loss=lambda m, x: energy(m(x)))


@case("complex parameters viewed from real ones", fast=False)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy((torch.fft.fft(x) * torch.view_as_complex(model.filter)).abs())

    return make.setup(make.bag(filter=(5, 2)), make.x(5), loss=loss)


@case("spectral convolution", fast=False)
def _(make: Make) -> Setup:
    """Fourier neural operator: low frequencies mixed by a complex matrix made of real parameters."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        weight = torch.complex(model.real, model.imag)
        low = torch.einsum("bcf,cdf->bdf", torch.fft.rfft(x)[..., :3], weight)
        return energy(torch.fft.irfft(low, n=8).tanh())

    return make.setup(make.bag(real=(2, 3, 3), imag=(2, 3, 3)), make.x(2, 8), loss=loss)


@case("vmap over the examples", fast=False)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return torch.vmap(lambda x_j: model(x_j).square().sum())(x)

    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return make.setup(make.model(model), make.x(4), loss=loss)


@case("ensemble by stacked parameters", fast=True)
def _(make: Make) -> Setup:
    """Three members at once: examples along the second dimension."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = torch.einsum("bd,mdp->mbp", x, model.V) + model.b.unsqueeze(1)
        return energy((h.tanh() @ model.W).transpose(0, 1))

    return make.setup(make.bag(V=(3, 4, 5), b=(3, 5), W=(3, 5, 2)), make.x(4), loss=loss)
