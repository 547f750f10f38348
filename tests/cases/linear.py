"""Products with a weight matrix, in every way that PyTorch writes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.table import Make, Setup, case, energy, plain


def mlp(d: int, p: int, *, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 7, bias=bias), nn.Tanh(), nn.Linear(7, p, bias=bias))


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


@case("linear", fast=True, tags="smoke")
def _(make: Make) -> Setup:
    return make.setup(make.model(mlp(5, 3)), make.x(5), make.ids(3), loss=cross_entropy)


plain("linear without bias", lambda: mlp(5, 3, bias=False), 5)
plain("linear rank 3", lambda: mlp(5, 3), 6, 5)
plain("linear rank 4", lambda: mlp(5, 3), 2, 3, 5)
plain("linear long sequence", lambda: mlp(3, 2), 70, 3)
plain("linear single output", lambda: mlp(5, 1), 5)
plain("linear single input", lambda: mlp(1, 2), 1)
plain("linear relu with dead units", lambda: nn.Sequential(nn.Linear(5, 30), nn.ReLU(), nn.Linear(30, 2)), 5)
plain("linear over tokens, not features", lambda: TokenMixer(), 5, 3)


class TokenMixer(nn.Module):
    """Mixes the T = 5 positions of an example with one matrix, as in MLP-Mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.features = nn.Linear(5, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(self.tokens(x.mT).sin().mT)


@case("linear rank 1, example by example")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([model(x_j).square().sum() for x_j in x])

    return make.setup(make.model(mlp(5, 3)), make.x(5), loss=loss)


@case("mm, weight on the left", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy((model.V @ torch.tanh(model.W @ x.T)).T)

    return make.setup(make.bag(W=(6, 5), V=(3, 6)), make.x(5), loss=loss)


@case("mm, weight on the right", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(torch.mm(torch.mm(x, model.W).tanh(), model.V))

    return make.setup(make.bag(W=(5, 6), V=(6, 3)), make.x(5), loss=loss)


@case("addmm, weight on the left, scaled", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        hidden = torch.addmm(model.b, model.W, x.T, beta=2.0, alpha=0.5).tanh()
        return energy(torch.addmm(model.c, model.V, hidden, beta=-1.0, alpha=3.0).T)

    return make.setup(make.bag(W=(6, 5), b=(6, 1), V=(3, 6), c=(3, 1)), make.x(5), loss=loss)


@case("addmm, weight on the right, scaled", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        hidden = torch.addmm(model.b, x, model.W, beta=2.0, alpha=0.5).tanh()
        return energy(torch.addmm(model.c, hidden, model.V, beta=0.5, alpha=-2))

    return make.setup(make.bag(W=(5, 6), b=(6,), V=(6, 3), c=(1,)), make.x(5), loss=loss)


@case("addmm, data added to a product", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(torch.addmm(x, x.sin(), model.W, beta=0.7, alpha=1.3))

    return make.setup(make.bag(W=(5, 5)), make.x(5), loss=loss)


@case("matmul, weight first on sequences", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(torch.matmul(model.W, x).tanh() @ model.V)

    return make.setup(make.bag(W=(4, 3), V=(5, 2)), make.x(3, 5), loss=loss)


@case("matmul with a vector", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (x.tanh() @ model.w).square()

    return make.setup(make.bag(w=(5,)), make.x(5), loss=loss)


@case("matmul of sequences with a vector", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        scores = (x @ model.W).tanh() @ model.v
        return energy(scores.softmax(1).unsqueeze(2) * x)

    return make.setup(make.bag(W=(5, 3), v=(3,)), make.x(6, 5), loss=loss)


@case("mv, addmv and dot, example by example")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([_through_vectors(model, x_j) for x_j in x])

    return make.setup(make.bag(W=(6, 5), V=(6, 6), b=(6,), u=(6,)), make.x(5), loss=loss)


def _through_vectors(model: nn.Module, x_j: Tensor) -> Tensor:
    hidden = torch.addmv(model.b, model.V, torch.mv(model.W, x_j).tanh(), beta=2.0, alpha=0.5)
    return torch.dot(model.u, hidden.sin())


@case("outer product with a parameter", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(torch.outer(x, model.w).tanh())

    return make.setup(make.bag(w=(3,)), make.x(), loss=loss)


@case("bmm, weight on the left", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(torch.bmm(model.W, x.permute(1, 2, 0)).permute(2, 0, 1))

    return make.setup(make.bag(W=(3, 4, 5)), make.x(3, 5), loss=loss)


@case("bmm, weight on the right", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(torch.bmm(x.transpose(0, 1), model.W).transpose(0, 1))

    return make.setup(make.bag(W=(3, 5, 4)), make.x(3, 5), loss=loss)


@case("baddbmm, weight on the left", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = torch.baddbmm(model.b, model.W, x.permute(1, 2, 0), beta=2.0, alpha=0.5)
        return energy(out.tanh().permute(2, 0, 1))

    return make.setup(make.bag(W=(3, 4, 5), b=(3, 4, 1)), make.x(3, 5), loss=loss)


@case("baddbmm, weight on the right", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = torch.baddbmm(model.b, x.transpose(0, 1), model.W, beta=0.5, alpha=2.0)
        return energy(out.tanh().transpose(0, 1))

    return make.setup(make.bag(W=(3, 5, 4), b=(3, 1, 4)), make.x(3, 5), loss=loss)


@case("bmm with the weight expanded over the batch", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(torch.bmm(x, model.W.expand(len(x), -1, -1)).tanh())

    return make.setup(make.bag(W=(5, 3)), make.x(2, 5), loss=loss)


_EINSUMS = {
    "bd,pd->bp": ((5,), (3, 5)),
    "bd,dp->pb": ((5,), (5, 3)),
    "btd,dp->btp": ((6, 5), (5, 3)),
    "tbd,dhk->bthk": ((6, 5), (5, 2, 3)),
    "bhd,hdp->bhp": ((2, 5), (2, 5, 3)),
    "bthk,hkd->btd": ((6, 2, 3), (2, 3, 5)),
    "bcij,cd->bdij": ((3, 2, 2), (3, 4)),
    "bd,d->b": ((5,), (5,)),
    "bd,d->bd": ((5,), (5,)),
    "btd,t->bd": ((6, 5), (6,)),
}


def _einsum_case(equation: str, data: tuple[int, ...], weight: tuple[int, ...]) -> None:
    examples_first_in, examples_at = equation.startswith("b"), equation.split("->")[1].index("b")

    @case(f"einsum {equation}", fast=True)
    def _(make: Make) -> Setup:
        def loss(model: nn.Module, x: Tensor) -> Tensor:
            h = model.scale * x
            out = torch.einsum(equation, h if examples_first_in else h.transpose(0, 1), model.W)
            return energy(out.tanh().movedim(examples_at, 0))

        return make.setup(make.bag(W=weight, scale=data), make.x(*data), loss=loss)


for _equation, (_data, _weight) in _EINSUMS.items():
    _einsum_case(_equation, _data, _weight)


@case("bilinear", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return energy(model(x, y).tanh())

    return make.setup(make.model(nn.Bilinear(4, 5, 3)), make.x(4), make.x(5), loss=loss)


@case("bilinear on sequences", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return energy(model(x, y).tanh())

    return make.setup(make.model(nn.Bilinear(4, 5, 3, bias=False)), make.x(6, 4), make.x(6, 5), loss=loss)


@case("einsum bilinear form")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return energy(torch.einsum("bi,kij,bj->bk", x, model.W, y))

    return make.setup(make.bag(W=(3, 4, 5)), make.x(4), make.x(5), loss=loss)


@case("tensordot and kron")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = torch.tensordot(x, model.W, dims=([1, 2], [0, 1]))
        return energy(out @ torch.kron(model.A, model.C))

    return make.setup(make.bag(W=(3, 2, 4), A=(2, 2), C=(2, 3)), make.x(3, 2), loss=loss)


class Experts(nn.Module):
    """Top-1 routing of tokens; each expert's tokens padded to a capacity and multiplied in one bmm."""

    def __init__(self, d: int, hidden: int, n_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(d, n_experts)
        self.up = nn.Parameter(torch.randn(n_experts, d, hidden))
        self.down = nn.Parameter(torch.randn(n_experts, hidden, d))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        gate, expert = self.router(tokens).softmax(1).max(1)
        place = torch.zeros_like(expert)
        for e in range(len(self.up)):
            chosen = expert == e
            place[chosen] = torch.arange(int(chosen.sum()))
        buffer = tokens.new_zeros(len(self.up), len(tokens), tokens.shape[1]).index_put((expert, place), tokens)
        out = torch.bmm(torch.bmm(buffer, self.up).tanh(), self.down)[expert, place]
        return x + (gate.unsqueeze(1) * out).view_as(x)


@case("experts in a batched product", fast=True, tags="routed")
def _(make: Make) -> Setup:
    model = make.model(nn.Sequential(nn.Linear(5, 5), Experts(5, 6, 3), nn.Linear(5, 2)))
    return make.setup(model, make.x(4, 5), loss=lambda m, x: energy(m(x)))


class GroupedExperts(Experts):
    """The same routing with tokens sorted by expert and one grouped product."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        gate, expert = self.router(tokens).softmax(1).max(1)
        order = expert.argsort(stable=True)
        ends = torch.bincount(expert, minlength=len(self.up)).cumsum(0).int()
        hidden = torch._grouped_mm(tokens[order], self.up, offs=ends).tanh()
        out = torch._grouped_mm(hidden, self.down, offs=ends)
        return x + gate.unsqueeze(1).mul(torch.zeros_like(out).index_copy(0, order, out)).view_as(x)


@case("experts in a grouped product", fast=True, dtype=torch.float32, rtol=1e-5, tags="routed")
def _(make: Make) -> Setup:
    model = make.model(nn.Sequential(nn.Linear(8, 8), GroupedExperts(8, 16, 3), nn.Linear(8, 2)))
    return make.setup(model, make.x(4, 8), loss=lambda m, x: energy(m(x)))


@case("experts chosen by mask and index_add", fast=True, tags="routed")
def _(make: Make) -> Setup:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(5, 3)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 5)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(0, 1)
            gate, chosen = self.router(tokens).softmax(1).topk(2)
            out = torch.zeros_like(tokens)
            for e, expert in enumerate(self.experts):
                token, rank = (chosen == e).nonzero(as_tuple=True)
                out = out.index_add(0, token, gate[token, rank].unsqueeze(1) * expert(tokens[token]))
            return x + out.view_as(x)

    return make.setup(make.model(Routed()), make.x(4, 5), loss=lambda m, x: energy(m(x)))


@case("an expert that no token reaches", fast=True, tags="routed attack")
def _(make: Make) -> Setup:
    """Its product has no rows, and yet its parameters are in the graph."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen = tokens.square().sum(1) > 0
        out = torch.zeros_like(tokens).index_add(0, chosen.nonzero().squeeze(1), model[0](tokens[chosen]).tanh())
        out = out.index_add(0, (~chosen).nonzero().squeeze(1), model[1](tokens[~chosen]))
        return energy(out.view_as(x))

    return make.setup(make.model(nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])), make.x(4, 5), loss=loss)
