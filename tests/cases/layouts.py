"""Where the examples lie: other dimensions, flattened, permuted, packed, in halves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.cases.table import Make, Setup, case, energy


def two_layers(d: int = 4, p: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 5), nn.Tanh(), nn.Linear(5, p))


def _layout(name: str, *data: int, fast: bool = True, d: int = 4, p: int = 2, **flags: object):
    """A case made of one function of (model, x) to losses, for a two-layer net."""

    def enter(loss):
        @case(name, fast=fast, **flags)
        def _(make: Make) -> Setup:
            return make.setup(make.model(two_layers(d, p)), make.x(*data), loss=loss)

        return loss

    return enter


@_layout("sequence first", 6, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return energy(m(x.transpose(0, 1)).transpose(0, 1))


@_layout("sequence first, as many steps as examples", 4, 4, tags="square")
def _(m: nn.Module, x: Tensor) -> Tensor:
    return energy(m(x.transpose(0, 1)).transpose(0, 1))


@_layout("batch first, as many steps as examples", 4, 4, tags="square")
def _(m: nn.Module, x: Tensor) -> Tensor:
    return energy(m(x))


@_layout("examples, steps and features all of one size", 4, 4, p=4, tags="square")
def _(m: nn.Module, x: Tensor) -> Tensor:
    return energy(m(x.transpose(0, 1)).permute(1, 2, 0))


@_layout("tokens flattened, batch first", 6, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m(x.flatten(0, 1)).square().mean(1).view(len(x), -1).sum(1)


@_layout("tokens flattened, sequence first", 6, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m(x.transpose(0, 1).flatten(0, 1)).square().mean(1).view(-1, len(x)).sum(0)


@_layout("tokens flattened in between two dimensions", 3, 2, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    """(T1, B, T2) flattened: each example's tokens come in runs."""
    out = m(x.transpose(0, 1).reshape(-1, 4))
    return energy(out.view(3, len(x), 2, -1).transpose(0, 1))


@_layout("examples in the middle", 3, 2, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return energy(m(x.permute(2, 0, 1, 3)).transpose(0, 1))


@_layout("examples last", 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    hidden = (m[0].weight @ x.T + m[0].bias.unsqueeze(1)).tanh()
    return (m[2].weight @ hidden + m[2].bias.unsqueeze(1)).square().sum(0)


@case("examples last, through layers", fast=True)
def _(make: Make) -> Setup:
    """Features (C, B): a convolution of width one over the batch as its length."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(model(x.T.unsqueeze(0)).squeeze(0).T)

    model = nn.Sequential(nn.Conv1d(4, 3, 1), nn.Tanh(), nn.Conv1d(3, 2, 1))
    return make.setup(make.model(model), make.x(4), loss=loss)


@case("packed tokens of ragged lengths", fast=True, tags="ragged")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(x.shape[1]) < lengths.unsqueeze(1)
        owner = real.nonzero()[:, 0]
        token_losses = model(x[real]).square().mean(1)
        return token_losses.new_zeros(len(x)).index_add(0, owner, token_losses)

    return make.setup(make.model(two_layers()), make.x(6, 4), 1 + make.ids(6), loss=loss)


@case("packed tokens, some examples empty", fast=True, tags="ragged")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(x.shape[1]) < lengths.unsqueeze(1)
        token_losses = torch.zeros_like(x[..., 0]).masked_scatter(real, model(x[real]).square().mean(1))
        return token_losses.sum(1)

    return make.setup(make.model(two_layers()), make.x(3, 4), make.ids(3), loss=loss)


@case("packed tokens with attention inside each example", fast=True, tags="ragged")
def _(make: Make) -> Setup:
    """All tokens in one row of attention, kept apart by a block-diagonal mask."""

    def loss(model: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(x.shape[1]) < lengths.unsqueeze(1)
        owner = real.nonzero()[:, 0]
        h = model(x[real])
        q, k, v = h.chunk(3, 1)
        apart = owner.unsqueeze(1) != owner
        out = (q @ k.T).masked_fill(apart, float("-inf")).softmax(1) @ v
        return out.new_zeros(len(x), out.shape[1]).index_add(0, owner, out.square()).sum(1)

    return make.setup(make.model(two_layers(p=6)), make.x(5, 4), 1 + make.ids(5), loss=loss)


@_layout("batch permuted on the way", 3, 4, independent=False, tags="permuted attack", n=5)
def _(m: nn.Module, x: Tensor) -> Tensor:
    """The second layer sees the examples in another order: rows are owned by position, not by index."""
    h = m[0](x).tanh()
    return energy(m[2](h[[2, 0, 4, 1, 3]]))


@_layout("batch permuted and permuted back", 3, 4, n=5, tags="permuted attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    return energy(m[2](m[0](x[order]).tanh())[order.argsort()])


@_layout("batch flipped", 4, independent=False, tags="permuted attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    return energy(m[2](m[0](x).tanh().flip(0)))


@_layout("batch rolled", 4, independent=False, tags="permuted attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    return energy(m[2](m[0](x).tanh().roll(1, 0)))


@_layout("batch rolled and added", 4, independent=False, fast=False, tags="coupled attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m[0](x).tanh()
    return energy(m[2](h + h.roll(1, 0)))


@_layout("batch and its flip, joined", 4, independent=False, fast=False, tags="coupled attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m[0](x).tanh()
    return energy(m[2](h)) + energy(m[2](h.flip(0)).sin())


@_layout("batch sorted by its content", 4, independent=False, tags="permuted attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m[0](x).tanh()
    return energy(m[2](h[h[:, 0].argsort()]))


@_layout("columns sorted over the batch", 4, fast=False, independent=False, tags="permuted attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    """Each column gets its own permutation of the examples: every entry is owned, no row is."""
    return energy(m[2](m[0](x).sort(0)[0]))


@_layout("batch in two halves, cat", 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    half = len(x) // 2
    return energy(torch.cat([m(x[:half]), m(x[half:])]))


@_layout("batch in two halves through two nets", 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    hidden = m[0](x)
    return energy(m[2](torch.where(x[:, :1] > 0, hidden.tanh(), hidden.sin())))


@_layout("even and odd examples, interleaved", 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), 2)
    out[::2], out[1::2] = m(x[::2]), m(x[1::2])
    return energy(out)


@_layout("each example several times", 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return energy(m(x.repeat_interleave(3, 0)).sin().unflatten(0, (len(x), 3)))


@_layout("the whole batch several times", 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return energy(m(x.repeat(3, 1)).sin().unflatten(0, (3, len(x))).transpose(0, 1))


@_layout("features and examples exchange places", 4, independent=False, tags="attack coupled square", fast=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    """h is read by rows and by columns: every entry belongs to two examples."""
    h = m[0](x)[:, : len(x)]
    return energy(h) + energy(h.tanh().T)


@_layout("losses of the first examples only", 4, n=5, independent=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return energy(m(x))[:3]


@_layout("losses put in another order", 4, independent=False, n=5, tags="permuted")
def _(m: nn.Module, x: Tensor) -> Tensor:
    return energy(m(x))[[3, 1, 0, 4, 2]]


@_layout("losses with repeats", 4, independent=False, n=5, fast=False, tags="attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    """Rows 0 and 1 are the same, so are 3 and 4."""
    return energy(m(x))[[0, 0, 1, 2, 2]]


@_layout("losses stacked one by one", 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    out = m(x)
    return torch.stack([out_j.square().sum() for out_j in out])


@_layout("losses from one forward pass each", 4, fast=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([energy(m(x[j : j + 1])) for j in range(len(x))])


@case("windows of one long series", independent=False, tags="attack coupled")
def _(make: Make) -> Setup:
    """Examples are overlapping windows: the first layer runs once over the series and its outputs are shared."""

    def loss(model: nn.Module, series: Tensor) -> Tensor:
        h = model[0](series).tanh()
        return energy(model[2](torch.cat([h, h[:1]]).unfold(0, 2, 1).mT))

    return make.setup(make.model(two_layers()), make.x(4), loss=loss)


@case("image patches as examples of a shared convolution", independent=False, tags="attack coupled")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        maps = model(x[:1].view(1, 1, 4, 4)).tanh()
        return maps.square().mean(1).flatten()[: len(x)]

    return make.setup(make.model(nn.Conv2d(1, 2, 2)), make.x(16), loss=loss)


@case("nested pairs: examples are pairs of a grid", independent=False, fast=False, tags="pairs")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model(x)
        return (h @ h.T).exp().flatten()

    return make.setup(make.model(two_layers()), make.x(4), loss=loss)
