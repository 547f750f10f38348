"""Graphs whose structure stays the same from call to call while what happens to the examples changes.

With the first seed examples are kept apart by values that happen to be zero or one; with the second they meet. A record
of the first call, found again by kinds, shapes and edges, would give wrong rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.cases.table import Make, Setup, case, energy


def _attack(name: str, **flags: object):
    return case(name, **{"independent": False, "tags": "attack changing", **flags})


def net(d: int = 4, p: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 5), nn.Tanh(), nn.Linear(5, p))


def mixing_weights(make: Make) -> Tensor:
    """(B, B): the identity with the first seed, dense with the others."""
    eye = torch.eye(make.n, dtype=make.dtype)
    return eye if make.seed == 0 else eye + 0.5 * torch.randn_like(eye)


@_attack("layer over the batch, the identity for now")
def _(make: Make) -> Setup:
    """A weight that multiplies along the examples, initialized to the identity."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model.body[0](x).tanh()
        return energy(model.body[2]((h.T @ model.across).T))

    model = make.bag(across=(make.n, make.n))
    model.body = make.model(net())
    model.across.data.copy_(mixing_weights(make))
    return make.setup(model, make.x(4), loss=loss)


@_attack("convolution along the batch, the identity for now")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model[0](x).tanh()
        return energy(model[2](model[1](h.T.unsqueeze(0)).squeeze(0).T))

    model = make.model(nn.Sequential(nn.Linear(4, 3), nn.Conv1d(3, 3, 3, padding=1), nn.Linear(3, 2)))
    if make.seed == 0:
        with torch.no_grad():
            model[1].weight[..., [0, 2]] = 0
    return make.setup(model, make.x(4), loss=loss)


@_attack("depthwise convolution along the batch, the identity for now")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model[0](x).tanh()
        return energy(model[2](model[1](h.T.unsqueeze(0)).squeeze(0).T))

    model = nn.Sequential(nn.Linear(4, 3), nn.Conv1d(3, 3, 3, padding=1, groups=3, bias=False), nn.Linear(3, 2))
    if make.seed == 0:
        model[1] = nn.utils.skip_init(nn.Conv1d, 3, 3, 3, padding=1, groups=3, bias=False)
    model = make.model(model)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.0, 1, 0] if make.seed == 0 else [0.3, 1, -0.4]))
    return make.setup(model, make.x(4), loss=loss)


def _by_matrix(name: str, mix) -> None:
    """`mix(A, h)` with A (B, B) part of the data: the identity with the first seed."""

    @_attack(name)
    def _(make: Make) -> Setup:
        def loss(model: nn.Module, x: Tensor, A: Tensor) -> Tensor:
            return energy(model[2](mix(A, model[0](x).tanh()).tanh()))

        return make.setup(make.model(net()), make.x(4), mixing_weights(make), loss=loss)


_by_matrix("adjacency by a product", lambda A, h: A @ h)
_by_matrix("adjacency by a product from the right", lambda A, h: (h.T @ A.T).T)
_by_matrix("adjacency by broadcasting", lambda A, h: (A.unsqueeze(2) * h.unsqueeze(0)).sum(1))
_by_matrix("adjacency by broadcasting, features first", lambda A, h: (A * h.T.unsqueeze(1)).sum(2).T)
_by_matrix("adjacency by where", lambda A, h: torch.where(A.unsqueeze(2) != 0, h.unsqueeze(0), 0.0).mean(1))
_by_matrix(
    "adjacency by masked_fill", lambda A, h: h.expand(len(h), -1, -1).masked_fill(A.unsqueeze(2) == 0, 0.0).sum(1)
)
_by_matrix("adjacency by einsum", lambda A, h: torch.einsum("jk,kd->jd", A, h))
_by_matrix(
    "adjacency by addcmul", lambda A, h: torch.addcmul(h.unsqueeze(0) * 0, A.unsqueeze(2), h.unsqueeze(0)).sum(1)
)
_by_matrix("adjacency by lerp", lambda A, h: torch.lerp(h * 0, h.expand(len(h), -1, -1), A.unsqueeze(2)).sum(1))
_by_matrix(
    "adjacency by a batched product", lambda A, h: torch.bmm(A.expand(2, -1, -1), torch.stack([h, h.sin()])).sum(0)
)
_by_matrix("adjacency by a linear layer", lambda A, h: F.linear(h.T, A).T)
_by_matrix("adjacency by attention", lambda A, h: F.scaled_dot_product_attention(
    h, h, h, attn_mask=torch.where(A != 0, 0.0, float("-inf")).to(h.dtype)))  # fmt: skip
_by_matrix("adjacency by a softmax over the batch", lambda A, h: (40 * A).softmax(1) @ h)


def _by_order(name: str, move) -> None:
    """`move(order, h)` with a permutation of the examples among the data: in order with the first seed."""

    @_attack(name)
    def _(make: Make) -> Setup:
        def loss(model: nn.Module, x: Tensor, order: Tensor) -> Tensor:
            return energy(model[2](move(order, model[0](x).tanh())))

        order = torch.arange(make.n) if make.seed == 0 else torch.randperm(make.n).roll(1)
        return make.setup(make.model(net()), make.x(4), order, loss=loss)


_by_order("order by indexing", lambda order, h: h[order])
_by_order("order by index_select", lambda order, h: h.index_select(0, order))
_by_order("order by gather", lambda order, h: h.gather(0, order.unsqueeze(1).expand_as(h)))
_by_order("order by scatter", lambda order, h: torch.zeros_like(h).scatter(0, order.unsqueeze(1).expand_as(h), h))
_by_order("order by index_put", lambda order, h: torch.zeros_like(h).index_put((order,), h))
_by_order("order by index_add", lambda order, h: torch.zeros_like(h).index_add(0, order, h))
_by_order("order by index_copy", lambda order, h: torch.zeros_like(h).index_copy(0, order, h))
_by_order("order by take_along_dim", lambda order, h: h.take_along_dim(order.unsqueeze(1), 0))
_by_order("order by take", lambda order, h: h.take(order.unsqueeze(1) * h.shape[1] + torch.arange(h.shape[1])))
_by_order("order by an embedding", lambda order, h: F.embedding(order, h))
_by_order("order by a one-hot product", lambda order, h: F.one_hot(order, len(h)).to(h.dtype) @ h)
_by_order("order by roll", lambda order, h: h.roll(int(order[0]), 0))
_by_order("order by a choice of two views", lambda order, h: h.flip(0) if order[0] > 0 else h.flip(1))
_by_order("order by masked_scatter", lambda order, h: torch.zeros_like(h).masked_scatter(
    torch.ones_like(h, dtype=torch.bool), h[order]))  # fmt: skip
_by_order("order by as_strided", lambda order, h: h.contiguous().as_strided(h.shape, h.stride()) if order[0] == 0
          else h.T.contiguous().as_strided(h.shape, (1, len(h))).flip(0))  # fmt: skip


@_attack("columns taken from the flipped batch")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, own: Tensor) -> Tensor:
        h = model[0](x).tanh()
        return energy(model[2](torch.where(own, h, h.flip(0))))

    columns = torch.rand(1, 5) < 0.5
    columns[0, make.seed % 5] ^= True
    return make.setup(make.model(net()), make.x(4), columns.expand(make.n, 5), loss=loss)


@_attack("columns taken from the flipped batch by products")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, own: Tensor) -> Tensor:
        h = model[0](x).tanh()
        return energy(model[2](own * h + (1 - own) * h.flip(0)))

    columns = torch.ones(1, 5, dtype=make.dtype)
    columns[0, make.seed % 5] = 0
    return make.setup(make.model(net()), make.x(4), columns.expand(make.n, 5), loss=loss)


@_attack("owned by sign")
def _(make: Make) -> Setup:
    """Positive entries go to their own example, negative ones to another: each entry has one owner, by its value."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model[0](x)
        return energy(model[2](h.relu() + (-h.flip(0)).relu()))

    return make.setup(make.model(net()), make.x(4), loss=loss)


@_attack("maximum over pairs of examples, pooled")
def _(make: Make) -> Setup:
    """Windows of two examples; with the first seed the first of each window always wins."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model[0](x)
        h = h + (100 - 50 * torch.arange(len(h)).unsqueeze(1)) * (x[:, :1].sum() > -1e9) * x[:1, -1:].sign()
        pooled = F.max_pool1d(F.pad(h.T.unsqueeze(0), (0, 1), value=-1e9), 2, stride=1).squeeze(0).T
        return energy(model[2](pooled.tanh() + 1e-2 * pooled))

    setup = make.setup(make.model(net()), make.x(4), loss=loss)
    setup.batch[0][0, -1] = 1.0 if make.seed == 0 else -1.0
    return setup


@_attack("a coupling behind a closed gate")
def _(make: Make) -> Setup:
    """A learned gate starts at exactly zero, as in ReZero."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model.body[0](x).tanh()
        return energy(model.body[2](h + model.gate * h.mean(0)))

    model = make.bag(gate=())
    model.body = make.model(net())
    if make.seed == 0:
        nn.init.zeros_(model.gate)
    return make.setup(model, make.x(4), loss=loss)


@_attack("a coupling behind a gate that is almost closed")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model.body[0](x).tanh()
        return energy(model.body[2](h + model.gate * h.flip(0)))

    model = make.bag(gate=(5,))
    model.body = make.model(net())
    with torch.no_grad():
        model.gate.mul_(1e-200 if make.seed == 0 else 1.0)
    return make.setup(model, make.x(4), loss=loss)


@_attack("a coupling through units that are dead")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model[0](x).tanh()
        message = (h.mean(0) - (2.0 if x[0, 0] > 0 else -2.0)).relu()
        return energy(model[2](h + message * torch.ones_like(h)))

    setup = make.setup(make.model(net()), make.x(4), loss=loss)
    setup.batch[0][0, 0] = 1.0 if make.seed == 0 else -1.0
    return setup


@_attack("a coupling in one column that the head ignores")
def _(make: Make) -> Setup:
    """The head's weights for the coupled column are zero with the first seed."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model[0](x).tanh()
        return energy(model[2](torch.cat([h[:, :4], h[:, 4:] - h[:, 4:].mean(0)], 1)))

    model = make.model(net())
    if make.seed == 0:
        with torch.no_grad():
            model[2].weight[:, 4] = 0
    return make.setup(model, make.x(4), loss=loss)


def _lengths(make: Make) -> Tensor:
    """Lengths of one sum, in an order that depends on the seed: the packed sizes are the same, the owners are not."""
    lengths = (torch.arange(make.n) % 3) * 2 + 1
    return lengths.roll(make.seed)


@_attack("packed lstm at equal total length", independent=True, fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return energy(pad_packed_sequence(model(packed)[0], batch_first=True, total_length=5)[0].sin())

    return make.setup(make.model(nn.LSTM(3, 4, batch_first=True)), make.x(5, 3), _lengths(make), loss=loss)


@_attack("packed tokens at equal total length", independent=True, fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(5) < lengths.unsqueeze(1)
        token_losses = model(x[real]).square().mean(1)
        return token_losses.new_zeros(len(x)).index_add(0, real.nonzero()[:, 0], token_losses)

    return make.setup(make.model(net()), make.x(5, 4), _lengths(make), loss=loss)


@_attack("packed tokens, split by lengths", independent=True, fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        tokens = torch.cat([x_j[:n] for x_j, n in zip(x, lengths.tolist(), strict=True)])
        return torch.stack([out.square().mean() for out in model(tokens).split(lengths.tolist())])

    return make.setup(make.model(net()), make.x(5, 4), _lengths(make), loss=loss)


@_attack("bags at equal total length", independent=True, fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
        flat = torch.cat([row[:n] for row, n in zip(ids, lengths.tolist(), strict=True)])
        return energy(model(flat, lengths.cumsum(0) - lengths).tanh())

    return make.setup(make.model(nn.EmbeddingBag(6, 4, mode="mean")), make.ids(6, 5), _lengths(make), loss=loss)


@_attack("tokens routed to experts of fixed capacity")
def _(make: Make) -> Setup:
    """Each expert takes half of the tokens: the shapes never change, the owners do."""

    def loss(model: nn.Module, x: Tensor, score: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        order = score.flatten().argsort()
        halves = [expert(t).tanh() for expert, t in zip(model, tokens[order].chunk(2), strict=True)]
        out = torch.zeros_like(tokens).index_copy(0, order, torch.cat(halves))
        return energy((tokens + out).view_as(x))

    setup = make.setup(
        make.model(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])), make.x(2, 4), make.x(2), loss=loss
    )
    setup.batch[1].sub_(setup.batch[1].flatten().median())
    return setup


@_attack("batch first or sequence first by the data")
def _(make: Make) -> Setup:
    """T = B: the same operations on a batch in either layout."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model(x)
        return energy(h if x[0, 0, 0] > 0 else h.transpose(0, 1))

    setup = make.setup(make.model(net()), make.x(make.n, 4), loss=loss)
    setup.batch[0][0, 0, 0] = 1.0 if make.seed == 0 else -1.0
    return setup
