"""Small versions of whole networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.attention import Causal
from tests.cases.table import Make, Setup, case, energy


class Residual(nn.Module):
    """x + f(norm(x))."""

    def __init__(self, norm: nn.Module, *layers: nn.Module) -> None:
        super().__init__()
        self.norm, self.layers = norm, nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(self.norm(x))


class TinyGPT(nn.Module):
    """Two blocks, learned positions, output layer tied to the embedding."""

    def __init__(self, n_ids: int = 9, d: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(n_ids, d), nn.Embedding(8, d)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(
            layer
            for _ in range(2)
            for layer in (
                Residual(nn.LayerNorm(d), Causal(d, 2)),
                Residual(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)),
            )
        ))  # fmt: skip
        self.norm = nn.LayerNorm(d)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.drop(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        return F.linear(self.norm(self.blocks(h)), self.tokens.weight)


def next_token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:], reduction="none").mean(1)


@case("language model", fast=True, tags="smoke")
def _(make: Make) -> Setup:
    return make.setup(make.model(TinyGPT()), make.ids(9, 6), loss=next_token_losses)


@case("language model, dropout", fast=True, deterministic=False)
def _(make: Make) -> Setup:
    return make.setup(make.model(TinyGPT(dropout=0.2)), make.ids(9, 6), loss=next_token_losses)


@case("vision transformer", fast=True)
def _(make: Make) -> Setup:
    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, 4, 2, stride=2)
            self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 5, 4))
            self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.patches(x).flatten(2).mT
            h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.positions
            return self.head(self.block(h)[:, 0])

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    return make.setup(make.model(Vision()), make.x(1, 4, 4), make.ids(3), loss=loss)


@case("residual network", fast=True)
def _(make: Make) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
            self.one, self.two = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
            self.shortcut, self.head = nn.Conv2d(4, 4, 1, stride=2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            h = F.relu(self.norms[0](self.one(x)))
            x = F.relu(self.norms[1](self.two(h)) + x, inplace=True)
            return self.head(self.shortcut(x).mean((2, 3)))

    return make.setup(make.model(Net()).eval(), make.x(2, 4, 4), loss=lambda m, x: energy(m(x)))


@case("u-net", fast=True)
def _(make: Make) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.middle = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
            self.up, self.out = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(6, 1, 3, padding=1)
            self.norm = nn.GroupNorm(1, 4)

        def forward(self, x: Tensor) -> Tensor:
            skip = F.silu(self.down(x))
            h = F.silu(self.norm(self.middle(F.max_pool2d(skip, 2))))
            return self.out(torch.cat([skip, self.up(h)], 1))

    return make.setup(make.model(Net()), make.x(1, 4, 4), loss=lambda m, x: energy(m(x)))


@case("squeeze and excitation", fast=True)
def _(make: Make) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.squeeze, self.excite = nn.Conv2d(2, 4, 2), nn.Linear(4, 2), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            gate = self.excite(self.squeeze(h.mean((2, 3))).relu()).sigmoid()
            return h * gate[:, :, None, None]

    return make.setup(make.model(Net()), make.x(2, 4, 4), loss=lambda m, x: energy(m(x)))


@case("selective state space", fast=True)
def _(make: Make) -> Setup:
    """A Mamba-like scan: gates, step sizes and projections from the input, diagonal states of size 3."""

    class Scan(nn.Module):
        def __init__(self, d: int = 4, n: int = 3) -> None:
            super().__init__()
            self.into, self.conv = nn.Linear(d, 2 * d), nn.Conv1d(d, d, 2, groups=d, padding=1)
            self.project, self.step = nn.Linear(d, 1 + 2 * n, bias=False), nn.Linear(1, d)
            self.log_a, self.skip = nn.Parameter(torch.randn(d, n)), nn.Parameter(torch.ones(d))
            self.out, self.n = nn.Linear(d, d, bias=False), n

        def forward(self, x: Tensor) -> Tensor:
            h, gate = self.into(x).chunk(2, 2)
            h = F.silu(self.conv(h.mT)[..., : x.shape[1]].mT)
            step, b, c = self.project(h).split([1, self.n, self.n], 2)
            step = F.softplus(self.step(step))
            decay = torch.exp(step.unsqueeze(3) * -self.log_a.exp())
            fed = (step * h).unsqueeze(3) * b.unsqueeze(2)
            state, outs = torch.zeros_like(fed[:, 0]), []
            for t in range(x.shape[1]):
                state = decay[:, t] * state + fed[:, t]
                outs.append((state * c[:, t].unsqueeze(1)).sum(2))
            return self.out((torch.stack(outs, 1) + self.skip * h) * F.silu(gate))

    return make.setup(make.model(Scan()), make.x(4, 4), loss=lambda m, x: energy(m(x)))


@case("convolutional autoencoder", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - x).square().mean((1, 2, 3))

    model = nn.Sequential(
        nn.Conv2d(1, 3, 2, stride=2), nn.ELU(), nn.Flatten(), nn.Linear(12, 3), nn.Tanh(),
        nn.Linear(3, 12), nn.Unflatten(1, (3, 2, 2)), nn.ConvTranspose2d(3, 1, 2, stride=2),
    )  # fmt: skip
    return make.setup(make.model(model), make.x(1, 4, 4), loss=loss)


@case("densely connected network", fast=True)
def _(make: Make) -> Setup:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4 + 3 * i, 3) for i in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.cat([x, layer(x).relu()], 1)
            return x

    return make.setup(make.model(Dense()), make.x(4), loss=lambda m, x: energy(m(x)))


@case("diffusion step with a time embedding", fast=True, deterministic=False)
def _(make: Make) -> Setup:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.conv, self.norm = nn.Linear(4, 6), nn.Conv2d(1, 3, 3, padding=1), nn.GroupNorm(1, 3)
            self.out = nn.Conv2d(3, 1, 3, padding=1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            angle = t.to(x.dtype).unsqueeze(1) * torch.tensor([1.0, 0.1], dtype=x.dtype)
            scale, shift = self.time(torch.cat([angle.sin(), angle.cos()], 1)).chunk(2, 1)
            h = self.norm(self.conv(x)) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
            return self.out(F.silu(h))

    def loss(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        return (model(x + noise, t) - noise).square().mean((1, 2, 3))

    return make.setup(make.model(Denoiser()), make.x(1, 4, 4), make.ids(10), loss=loss)


@case("policy and value of an actor and critic", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, action: Tensor, reward: Tensor) -> Tensor:
        h = model["body"](x).tanh()
        log_p, value = model["policy"](h).log_softmax(1), model["value"](h).squeeze(1)
        chosen = log_p.gather(1, action.unsqueeze(1)).squeeze(1)
        entropy = -(log_p.exp() * log_p).sum(1)
        return -(reward - value).detach() * chosen + (reward - value).square() - 0.01 * entropy

    model = nn.ModuleDict({"body": nn.Linear(4, 5), "policy": nn.Linear(5, 3), "value": nn.Linear(5, 1)})
    return make.setup(make.model(model), make.x(4), make.ids(3), make.x(), loss=loss)


@case("neural ordinary differential equation", fast=True, tags="reused")
def _(make: Make) -> Setup:
    """Four steps of the midpoint rule with one vector field."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + 0.25 * model(x + 0.125 * model(x))
        return energy(x)

    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    return make.setup(make.model(model), make.x(3), loss=loss)


@case("equivariant sets", fast=True)
def _(make: Make) -> Setup:
    """Deep sets: elements encoded alike, summed, decoded."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(model["decode"](model["encode"](x).relu().sum(1)))

    model = nn.ModuleDict({"encode": nn.Linear(3, 6), "decode": nn.Linear(6, 2)})
    return make.setup(make.model(model), make.x(5, 3), loss=loss)
