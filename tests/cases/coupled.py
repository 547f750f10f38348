"""Examples that meet: rows are still the derivatives of each loss. Some are made to fool a proof of ownership."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.table import Make, Setup, case, energy


def net(d: int = 4, p: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 5), nn.Tanh(), nn.Linear(5, p))


def _coupled(name: str, *data: int, tags: str = "", fast: bool = False, **flags: object):
    def enter(loss):
        @case(name, independent=False, fast=fast, tags=f"coupled {tags}", **flags)
        def _(make: Make) -> Setup:
            return make.setup(make.model(net()), make.x(*data), loss=loss)

        return loss

    return enter


@case("contrastive loss within the batch", independent=False, tags="coupled")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        left, right = F.normalize(model(a), dim=1), F.normalize(model(b), dim=1)
        return F.cross_entropy(left @ right.T / 0.3, torch.arange(len(a)), reduction="none")

    return make.setup(make.model(net()), make.x(4), make.x(4), loss=loss)


@_coupled("distance to every other example", 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m(x)
    return (h.unsqueeze(0) - h.unsqueeze(1)).square().sum(2).exp().neg().sum(1)


@_coupled("distance to the next example", 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m(x)
    return (h - h.roll(1, 0)).square().sum(1)


@_coupled("distance to the nearest example", 4, tags="attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m(x)
    distance = (h.unsqueeze(0) - h.unsqueeze(1)).square().sum(2) + 1e3 * torch.eye(len(x), dtype=x.dtype)
    return (h - h[distance.argmin(1)]).square().sum(1)


@_coupled("relative to the maximum of the batch", 4, tags="attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m[0](x)
    return energy(m[2](h - h.max(0)[0]))


@_coupled("softmax over the batch", 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return energy(m[2](m[0](x).softmax(0)))


@_coupled("cumulative sum over the batch", 4, tags="attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    """The last example sees all, the first itself alone."""
    return energy(m[2](m[0](x).cumsum(0).tanh()))


@_coupled("whitened over the batch", 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m[0](x)
    centered = h - h.mean(0)
    return energy(m[2](centered / (centered.square().mean(0) + 0.1).sqrt()))


@_coupled("mixed by an adjacency matrix", 4, tags="attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    ring = torch.eye(len(x), dtype=x.dtype).roll(1, 0) + torch.eye(len(x), dtype=x.dtype)
    return energy(m[2]((ring @ m[0](x)).tanh()))


@_coupled("an adjacency matrix that is the identity", 4, tags="attack", fast=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return energy(m[2]((torch.eye(len(x), dtype=x.dtype) @ m[0](x)).tanh()))


@_coupled("only two of the examples meet", 4, tags="attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m[0](x)
    mixed = torch.cat([h[:1] + h[-1:], h[1:]])
    return energy(m[2](mixed.tanh()))


@_coupled("one column of the examples meets", 4, tags="attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m[0](x)
    return energy(m[2](torch.cat([h[:, :1] - h[:, :1].mean(), h[:, 1:]], 1).tanh()))


def _weak(strength: float) -> None:
    @_coupled(f"examples coupled by {strength:.0e}", 4, tags="attack weak")
    def _(m: nn.Module, x: Tensor) -> Tensor:
        h = m[0](x)
        return energy(m[2](h + strength * h.roll(1, 0)))


for _strength in (1e-3, 1e-6, 1e-10, 1e-14, 1e-17, 1e-20):
    _weak(_strength)


@_coupled("a weak part that is all there is", 4, tags="attack weak")
def _(m: nn.Module, x: Tensor) -> Tensor:
    """Example 0 reaches the net through 1e-18 of example 1 alone: its whole row is the weak part."""
    h = m[0](x)
    own = torch.ones(len(x), 1, dtype=x.dtype)
    own[0] = 0
    return energy(m[2](own * h + 1e-18 * h.roll(-1, 0)))


@_coupled("examples of very different scale meet", 4, tags="attack weak")
def _(m: nn.Module, x: Tensor) -> Tensor:
    scale = 10.0 ** (-6 * torch.arange(len(x), dtype=x.dtype))
    h = m[0](x)
    return energy(m[2](h + h.mean(0))) * scale


@_coupled("a gate that is closed", 4, tags="attack gate")
def _(m: nn.Module, x: Tensor) -> Tensor:
    """The coupling is multiplied by a parameter that is zero now: its own row mixes examples, no other does."""
    h = m[0](x)
    gate = m[2].bias[0] - m[2].bias[0].detach()
    return energy(m[2](h + gate * h.flip(0)))


@_coupled("a gate on the mean of the batch, closed by relu", 4, tags="attack gate")
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m[0](x)
    return energy(m[2](h + F.relu(h.mean(0) - 10.0)))


@_coupled("a coupling that cancels", 4, tags="attack", fast=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    """The mean is added and taken away again: examples are independent, the graph says otherwise."""
    h = m[0](x)
    return energy(m[2](((h + h.mean(0)) - h.mean(0)).tanh()))


@_coupled("two examples that are the same", 4, tags="attack", fast=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    x = torch.cat([x[:1], x[:-1]])
    h = m[0](x).tanh()
    return energy(m[2](h + h.mean(0)))


@_coupled("mutual information of the two halves of the batch", 4, tags="attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m(x)
    left, right = h.chunk(2)
    scores = left @ right.T
    return torch.cat([scores.logsumexp(1), scores.logsumexp(0)])


@_coupled("ghost batches", 4, tags="attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    """Normalized in groups of two examples."""
    h = m[0](x).unflatten(0, (-1, 2))
    return energy(m[2](((h - h.mean(1, keepdim=True)) / (1 + h.var(1, keepdim=True))).flatten(0, 1)))


@_coupled("memory of the examples before", 4, tags="attack")
def _(m: nn.Module, x: Tensor) -> Tensor:
    """A running state goes from example to example."""
    state, losses = x.new_zeros(5), []
    for x_j in x:
        state = (m[0](x_j) + 0.5 * state).tanh()
        losses.append(m[2](state).square().sum())
    return torch.stack(losses)


@_coupled("capacity of an expert shared by the batch", 4, tags="attack routed")
def _(m: nn.Module, x: Tensor) -> Tensor:
    """Only the two examples with the largest score pass the second layer; who they are depends on all."""
    h = m[0](x).tanh()
    score, chosen = h[:, 0].topk(2, dim=0)
    out = torch.cat([h[:, :3]]).index_add(0, chosen, score.sigmoid().unsqueeze(1) * m[2](h[chosen]))
    return energy(out)


@_coupled("examples exchange halves of their features", 4, tags="attack permuted")
def _(m: nn.Module, x: Tensor) -> Tensor:
    """Cut and mix: each row of the hidden layer belongs to two examples, each entry to one."""
    h = m[0](x).tanh()
    return energy(m[2](torch.cat([h[:, :2], h[:, 2:].roll(1, 0)], 1)))


@_coupled("mixup of inputs", 4, tags="attack", fast=True)
def _(m: nn.Module, x: Tensor) -> Tensor:
    """Inputs are mixed before any parameter: rows are those of the mixed inputs."""
    return energy(m(0.7 * x + 0.3 * x.flip(0)))
