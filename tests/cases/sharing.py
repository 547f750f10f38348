"""One parameter in several places, in none, or frozen; checkpointed regions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.cases.table import Make, Setup, case, energy, plain


class TiedLanguageModel(nn.Module):
    """Embedding, a layer, and the embedding again as the output layer."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.table, self.body, self.transposed = nn.Embedding(7, 4), nn.Linear(4, 4), transposed

    def forward(self, ids: Tensor) -> Tensor:
        h = self.body(self.table(ids)).tanh()
        logits = h @ self.table.weight.T if self.transposed else F.linear(h, self.table.weight)
        return F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)


@case("embedding tied to the head", fast=True, tags="smoke")
def _(make: Make) -> Setup:
    return make.setup(make.model(TiedLanguageModel(transposed=False)), make.ids(7, 5), loss=lambda m, ids: m(ids))


@case("embedding tied to the head, transposed", fast=True)
def _(make: Make) -> Setup:
    return make.setup(make.model(TiedLanguageModel(transposed=True)), make.ids(7, 5), loss=lambda m, ids: m(ids))


@case("embedding tied to the head through a module", fast=True)
def _(make: Make) -> Setup:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids).sin())

    return make.setup(make.model(Tied()), make.ids(7, 5), loss=lambda m, ids: energy(m(ids)))


@case("two lookups in one table", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, left: Tensor, right: Tensor) -> Tensor:
        return -F.logsigmoid((model(left).tanh() * model(right)).sum((1, 2)))

    return make.setup(make.model(nn.Embedding(5, 4)), make.ids(5, 3), make.ids(5, 3), loss=loss)


@case("autoencoder with tied weights", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        code = (x @ model.W + model.b).sigmoid()
        return (code @ model.W.T + model.c - x).square().sum(1)

    return make.setup(make.bag(W=(5, 3), b=(3,), c=(5,)), make.x(5), loss=loss)


@case("module applied repeatedly", fast=True, tags="reused")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + model(x).tanh()
        return energy(x)

    return make.setup(make.model(nn.Linear(4, 4)), make.x(2, 4), loss=loss)


@case("module applied to vectors and to sequences", fast=True, tags="reused")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(model(x).tanh()) + energy(model(x.mean(1)).sin())

    return make.setup(make.model(nn.Linear(4, 4)), make.x(6, 4), loss=loss)


@case("module applied to batch-first and sequence-first data", fast=True, tags="reused")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model(x).tanh().transpose(0, 1)
        return energy(model(h).transpose(0, 1))

    return make.setup(make.model(nn.Linear(4, 4)), make.x(6, 4), loss=loss)


@case("siamese encoders", fast=True, tags="reused")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return F.pairwise_distance(model(a), model(b))

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return make.setup(make.model(model), make.x(4), make.x(4), loss=loss)


@case("siamese encoders in one forward pass", fast=True, tags="reused layout")
def _(make: Make) -> Setup:
    """Both views of all examples in one batch of 2 B, first all of one kind, then all of the other."""

    def loss(model: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        left, right = model(torch.cat([a, b])).chunk(2)
        return F.pairwise_distance(left, right)

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return make.setup(make.model(model), make.x(4), make.x(4), loss=loss)


@case("weight of one module used by a function", fast=True, tags="reused")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model[0](x).tanh()
        return energy(F.linear(h, model[0].weight.T, model[1].bias)) + energy(model[1](h))

    return make.setup(make.model(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))), make.x(4), loss=loss)


@case("one parameter as a matrix and as a vector", fast=True, tags="reused")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy((x @ model.W).tanh() * model.W.flatten()[:3]) + energy(x + model.W[:, 0])

    return make.setup(make.bag(W=(4, 3)), make.x(4), loss=loss)


@case("bias shared by two layers", fast=True, tags="reused")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy((x @ model.V + model.b).tanh() @ model.W + model.b)

    return make.setup(make.bag(V=(4, 4), W=(4, 4), b=(4,)), make.x(2, 4), loss=loss)


@case("one parameter under two names", fast=True)
def _(make: Make) -> Setup:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return make.setup(make.model(model), make.x(4), loss=lambda m, x: energy(m(x)))


@case("frozen parameters", fast=True)
def _(make: Make) -> Setup:
    model = make.model(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)))
    for p in (*model[1].parameters(), model[2].weight, model[4].bias):
        p.requires_grad_(False)
    return make.setup(model, make.x(4), loss=lambda m, x: energy(m(x)))


@case("frozen body, trained head", fast=True)
def _(make: Make) -> Setup:
    model = make.model(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    model[0].requires_grad_(False)
    return make.setup(model, make.x(4), loss=lambda m, x: energy(m(x)))


@case("unused parameters", fast=True)
def _(make: Make) -> Setup:
    model = make.model(nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(3, 3)]))
    return make.setup(model, make.x(4), loss=lambda m, x: energy(m[1](m[0](x).tanh())))


@case("parameters that only some examples use", fast=True)
def _(make: Make) -> Setup:
    """The sign of an input chooses the branch, by boolean indexing."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 2)
        positive = x[:, 0] > 0
        out[positive] = model[0](x[positive])
        out[~positive] = model[1](x[~positive].sin())
        return energy(out)

    return make.setup(make.model(nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])), make.x(4), loss=loss)


# -- parameters that belong to examples --------------------------------------------------------------------------------


def _per_example(name: str, losses, *, fast: bool = False, **shapes: tuple[int, ...]) -> None:
    """Parameters with as many entries as there are examples: position in the batch matters."""

    @case(name, independent=False, fast=fast, tags="attack square")
    def _(make: Make) -> Setup:
        return make.setup(make.bag(**shapes), make.x(3), loss=losses)


_per_example("a parameter with a row for each example", lambda m, x: energy((x + m.P).tanh() @ m.W), P=(4, 3), W=(3, 2))
_per_example(
    "a computed parameter with a row for each example",
    lambda m, x: energy((x * m.P.exp()).tanh() @ m.W),
    P=(4, 3),
    W=(3, 2),
)
_per_example(
    "a parameter with a column for each example",
    lambda m, x: energy((x.T * m.P.softmax(0)).tanh().T @ m.W),
    P=(3, 4),
    W=(3, 2),
)
_per_example("learned weights of the losses", lambda m, x: energy(x @ m.W) * m.w.softmax(0) * 4, w=(4,), W=(3, 2))
_per_example("learned mixing of the losses", lambda m, x: m.A.softmax(1) @ energy(x @ m.W), A=(4, 4), W=(3, 2))


@case("first state with a row for each example", independent=False, tags="recurrent square attack")
def _(make: Make) -> Setup:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.first = nn.GRU(3, 4, batch_first=True), nn.Parameter(torch.randn(1, make.n, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x, self.first)[0]

    return make.setup(make.model(Reader()), make.x(5, 3), loss=lambda m, x: energy(m(x)))


# -- checkpointing -----------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Modules in a row, each recomputed in the backward pass."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
            x = x[0] if isinstance(x, tuple) else x
        return x


def _block() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)


plain(
    "checkpointed linear layers",
    lambda: Checkpointed(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
    3,
    4,
    tags="checkpoint",
)
plain(
    "checkpointed lstm", lambda: Checkpointed(nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)), 5, 4, tags="checkpoint"
)
plain("checkpointed blocks", lambda: Checkpointed(_block(), _block()), 3, 4, tags="checkpoint")
plain(
    "checkpointed convolutions",
    lambda: Checkpointed(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 1, 2)),
    2,
    4,
    4,
    tags="checkpoint",
)
plain(
    "checkpointed dropout",
    lambda: Checkpointed(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU()), nn.Linear(8, 2)),
    4,
    deterministic=False,
    tags="checkpoint",
)
plain(
    "checkpoints in a checkpoint",
    lambda: Checkpointed(Checkpointed(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 2)),
    4,
    tags="checkpoint",
)
