"""Parameters seen through something else: views, casts, reparametrizations, positions, broadcasting."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.cases.table import Make, Setup, case, energy, plain


def _function(name: str, shapes: dict[str, tuple[int, ...]], *data: int, fast: bool = True, **flags: object):
    """A case made of one function of (parameters, x) that returns outputs."""

    def enter(function):
        @case(name, fast=fast, **flags)
        def _(make: Make) -> Setup:
            return make.setup(make.bag(**shapes), make.x(*data), loss=lambda m, x: energy(function(m, x)))

        return function

    return enter


# -- views -------------------------------------------------------------------------------------------------------------


@_function("weight transposed", {"W": (3, 5)}, 5)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ m.W.T).tanh()


@_function("weights cut from one flat vector", {"flat": (40,)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    first, b, second = m.flat[:20].view(4, 5), m.flat[20:25], m.flat[25:40].view(5, 3)
    return (x @ first + b).tanh() @ second


@_function("packed projection, split by rows", {"W": (9, 4), "b": (9,)}, 2, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    (q, k, v), (a, b, c) = m.W.chunk(3), m.b.chunk(3)
    return F.linear(x, q, a).tanh() * F.linear(x, k, b) + F.linear(x, v, c)


@_function("packed projection, split by columns", {"W": (4, 9)}, 2, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.W.split([2, 3, 4], 1)
    return torch.cat([(x @ q).tanh(), (x @ k).sin(), x @ v], 2)


@_function("packed projection, unbound", {"W": (3, 4, 2)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.W.unbind(0)
    return (x @ q).tanh() * (x @ k) + x @ v


@_function("weight sliced with a step", {"W": (6, 8)}, 3)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ m.W[::2, 1::3]).tanh()


@_function("weight used whole and in part", {"W": (4, 4)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return ((x @ m.W).tanh()[:, :2] @ m.W[1:3]).sin()


@_function("overlapping slices of one weight", {"W": (3, 6)}, 3)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ m.W[:, :4]).tanh() * (x @ m.W[:, 2:]).sin()


@_function("weight permuted and reshaped", {"W": (2, 3, 4)}, 6)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ m.W.permute(1, 0, 2).reshape(6, 4)).tanh()


@_function("bias selected from a table of biases", {"b": (3, 4)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x.sin() + m.b[1]).tanh() * m.b[:, 2].sum()


@_function("weight with its rows permuted", {"W": (5, 3)}, 5, fast=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ m.W[[4, 2, 0, 1, 3]]).tanh()


@_function("two weights joined", {"V": (4, 2), "W": (4, 3)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ torch.cat([m.V, m.W], 1)).tanh()


# -- casts -------------------------------------------------------------------------------------------------------------


@case("weight cast to the data's dtype", fast=True, dtype=torch.float32, rtol=1e-5)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy((x.double() @ model.W.double() + model.b).tanh()).float()

    return make.setup(make.bag(W=(4, 3), b=(3,)), make.x(4), loss=loss)


@case("autocast to bfloat16", fast=True, dtype=torch.float32, rtol=3e-2, tags="autocast")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x), y, reduction="none")

    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))
    return make.setup(make.model(model), make.x(8), make.ids(4), loss=loss)


@case("autocast convolution and attention", fast=True, dtype=torch.float32, rtol=5e-2, tags="autocast")
def _(make: Make) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.attention = nn.Conv1d(3, 8, 2), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x).tanh().mT
            return self.attention(h, h, h, need_weights=False)[0]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        return energy(out.float())

    return make.setup(make.model(Net()), make.x(3, 6), loss=loss)


# -- reparametrizations ------------------------------------------------------------------------------------------------

plain(
    "weight norm",
    lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), parametrizations.weight_norm(nn.Linear(5, 2))
    ),
    4,
)
plain(
    "weight norm of a convolution",
    lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), nn.Tanh()),
    2,
    5,
)
plain(
    "spectral norm, eval",
    lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh()).eval(),
    4,
    fast=False,
)
plain(
    "orthogonal weight", lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(5, 5)), nn.Tanh()), 5, fast=False
)


@_function("weight norm, functional", {"v": (3, 4), "g": (3, 1)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, torch._weight_norm(m.v, m.g, 0)).tanh()


@_function("weight norm, written out", {"v": (3, 4), "g": (3, 1)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, m.g * m.v / m.v.norm(dim=1, keepdim=True)).tanh()


@_function("low-rank update, merged", {"W": (4, 3), "A": (4, 2), "B": (2, 3)}, 2, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ (m.W + 0.5 * m.A @ m.B)).tanh()


@_function("low-rank update, separate", {"W": (4, 3), "A": (4, 2), "B": (2, 3)}, 2, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ m.W + 0.5 * (x @ m.A) @ m.B).tanh()


@case("low-rank update of a frozen weight", fast=True)
def _(make: Make) -> Setup:
    model = make.bag(W=(4, 3), A=(4, 2), B=(2, 3))
    model.W.requires_grad_(False)
    return make.setup(model, make.x(4), loss=lambda m, x: energy((x @ (m.W + m.A @ m.B)).tanh()))


@_function("weight standardized", {"W": (3, 2, 2, 2)}, 2, 4, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, (m.W - m.W.mean((1, 2, 3), keepdim=True)) / m.W.std((1, 2, 3), keepdim=True)).tanh()


@_function("weight pruned by a mask", {"W": (4, 3)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    mask = (torch.arange(12).view(4, 3) % 3 > 0).to(x.dtype)
    return (x @ (m.W * mask)).tanh()


@_function("weight quantized straight through", {"W": (4, 3)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ (m.W + ((4 * m.W).round() / 4 - m.W).detach())).tanh()


@_function("symmetric weight", {"W": (4, 4)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ (m.W + m.W.T)).tanh()


@_function("diagonal and triangular weights", {"d": (4,), "L": (4, 4)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ torch.diag_embed(m.d.exp()) @ m.L.tril()).tanh()


@_function("circulant weight", {"w": (5,)}, 5, fast=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    index = (torch.arange(5).unsqueeze(1) - torch.arange(5)) % 5
    return (x @ m.w[index]).tanh()


@_function("matrix exponential of a skew matrix", {"S": (4, 4)}, 4, fast=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ torch.linalg.matrix_exp(m.S - m.S.T)).tanh()


@_function("solving with a parameter", {"A": (4, 4)}, 4, fast=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return torch.linalg.solve(m.A + 4 * torch.eye(4, dtype=x.dtype), x.T).T.tanh()


@_function("weights made by a network", {"z": (3,), "H": (3, 20), "c": (20,)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ (m.z @ m.H + m.c).tanh().view(4, 5)).sin()


@_function("weights made by a network from each example", {"H": (3, 20), "c": (20,)}, 7)
def _(m: nn.Module, x: Tensor) -> Tensor:
    weights = (x[:, :3] @ m.H + m.c).view(-1, 4, 5)
    return torch.einsum("bd,bdp->bp", x[:, 3:], weights).tanh()


@_function("weights drawn around a mean", {"mean": (4, 3), "log_std": (4, 3)}, 4, deterministic=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ (m.mean + m.log_std.exp() * torch.randn_like(m.mean))).tanh()


@_function("mixture of layers", {"W": (3, 4, 4), "mix": (3,)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    """Weights of the layers by a softmax over parameters."""
    layers = torch.stack([(x @ w).tanh() for w in m.W])
    return (m.mix.softmax(0).view(3, 1, 1) * layers).sum(0)


@_function("weight quantized by fake quantization", {"W": (4, 3)}, 4, fast=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x @ torch.fake_quantize_per_tensor_affine(m.W, 0.1, 0, -20, 20)).tanh()


@_function("sparse data times a weight", {"W": (4, 3)}, 4, fast=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return torch.sparse.mm(x.where(x > 0, 0.0).to_sparse(), m.W).tanh()


@case("weight norm of a fused lstm with as many gates as examples", n=8, dtype=torch.float32, rtol=2e-5, tags="square")
def _(make: Make) -> Setup:
    """B = 4 H: the computed weights of the fused node have a dimension as long as the batch."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.log_scale = nn.LSTM(3, 2, batch_first=True), nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            weights = {name: p * self.log_scale.exp() for name, p in self.lstm.named_parameters()}
            return torch.func.functional_call(self.lstm, weights, (x,))[0]

    return make.setup(make.model(Normed()), make.x(5, 3), loss=lambda m, x: energy(m(x)))


@case("embedding of a computed table", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return energy(F.embedding(ids, model.table @ model.up).tanh())

    return make.setup(make.bag(table=(6, 2), up=(2, 4)), make.ids(6, 5), loss=loss)


class _Positive(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return F.softplus(w)


@case("parametrized by a module of its own", fast=True)
def _(make: Make) -> Setup:
    model = nn.Linear(4, 3)
    parametrize.register_parametrization(model, "weight", _Positive())
    return make.setup(make.model(model), make.x(4), loss=lambda m, x: energy(m(x).sin()))


# -- positions and tokens shared by all examples -----------------------------------------------------------------------


@_function("positions of shape (1, T, d)", {"P": (1, 5, 3), "W": (3, 2)}, 5, 3)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return ((x + m.P).tanh() @ m.W).sin()


@_function("positions of shape (T, d)", {"P": (5, 3), "W": (3, 2)}, 5, 3)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return ((x + m.P).tanh() @ m.W).sin()


@_function("positions of shape (T, d), a shorter sequence", {"P": (9, 3), "W": (3, 2)}, 5, 3)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return ((x + m.P[: x.shape[1]]).tanh() @ m.W).sin()


@_function("positions of shape (T,)", {"P": (5,)}, 3, 5)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x + m.P).softmax(2)


@_function("positions, as many as examples", {"P": (4, 3), "W": (3, 2)}, 4, 3, tags="square")
def _(m: nn.Module, x: Tensor) -> Tensor:
    return ((x + m.P).tanh() @ m.W).sin()


@_function("positions, sequence first, as many as examples", {"P": (4, 1, 3), "W": (3, 2)}, 4, 3, tags="square")
def _(m: nn.Module, x: Tensor) -> Tensor:
    return ((x.transpose(0, 1) + m.P).tanh() @ m.W).sin().transpose(0, 1)


@_function("positions and tokens multiplied", {"P": (5, 3), "s": (5, 1)}, 5, 3)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x * m.P / (1 + m.s.square())).tanh()


@_function("class token", {"token": (1, 1, 3), "W": (3, 3)}, 4, 3)
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.cat([m.token.expand(len(x), -1, -1), x], 1)
    return ((h @ m.W) @ h.mT).softmax(2) @ h


@_function("prompt repeated for each example", {"prompt": (2, 3), "W": (3, 3)}, 4, 3)
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.cat([m.prompt.unsqueeze(0).repeat(len(x), 1, 1), x], 1)
    return (h @ m.W).tanh().cumsum(1)


@case("positions looked up by arange", fast=True)
def _(make: Make) -> Setup:
    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions, self.head = nn.Embedding(7, 4), nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
            return self.head(h.tanh())

    return make.setup(make.model(Positioned()), make.ids(7, 5), loss=lambda m, ids: energy(m(ids)))


@case("positions looked up by arange with a batch of one", fast=True)
def _(make: Make) -> Setup:
    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.positions(torch.arange(x.shape[1]).unsqueeze(0))).tanh())

    return make.setup(make.model(Positioned()), make.x(5, 4), loss=lambda m, x: energy(m(x)))


# -- scales, shifts, slopes --------------------------------------------------------------------------------------------

plain("prelu, one slope", lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 2)), 4)
plain("prelu, a slope per channel", lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 2)), 4)
plain("prelu after a convolution", lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.PReLU(3), nn.Conv2d(3, 2, 2)), 2, 4, 4)


@_function("scale and shift", {"s": (4,), "b": (4,), "W": (4, 3)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return ((m.s * x + m.b).tanh() @ m.W).sin()


@_function("scale and shift of channels", {"s": (3, 1, 1), "b": (1, 3, 1, 1)}, 3, 2, 2)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x * m.s - m.b).tanh()


@_function("scalar parameters", {"a": (), "b": (1,), "c": (1, 1)}, 2, 3)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (x * m.a + m.b).tanh() / (2 + m.c.cos())


@_function("temperature", {"W": (4, 3), "log_temperature": ()}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return ((x @ m.W) / m.log_temperature.exp()).softmax(1)


@_function("parameter as dividend", {"a": (3,)}, 3)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (m.a / (1.5 + x.sin())).tanh() - (m.a - x)


@_function("parameters in where, lerp, addcmul, maximum", {"a": (3,), "b": (3,), "c": (3,), "d": (3,)}, 3)
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.where(x > 0, x * m.a, m.b)
    h = torch.lerp(h, x.sin(), m.c.sigmoid())
    return torch.addcmul(m.d, h, x, value=0.5) + torch.maximum(x, m.a)


@_function("learned exponent", {"p": (3,)}, 3)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (0.1 + x.abs()).pow(m.p.exp())


@_function("learned base", {"a": (3,)}, 3, fast=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.a.exp().pow(x)


@_function("learned frequency", {"w": (6,), "shift": (6,)}, 1)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([(x * m.w + m.shift).sin(), (x * m.w + m.shift).cos()], 1)


@_function("layer scale around a residual", {"W": (4, 4), "gamma": (4,)}, 2, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return x + m.gamma * (x @ m.W).tanh()


@_function("radial basis functions", {"centers": (5, 3), "log_width": (5,), "w": (5, 2)}, 3)
def _(m: nn.Module, x: Tensor) -> Tensor:
    distance = (x.unsqueeze(1) - m.centers).square().sum(2)
    return (-distance * m.log_width.exp()).exp() @ m.w


@_function("distances to learned centers", {"centers": (5, 3)}, 3, fast=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cdist(x, m.centers)


@_function("mixture density", {"W": (4, 6), "log_std": (1,)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    logits, means = (x @ m.W).chunk(2, 1)
    log_p = -0.5 * ((means - 0.7) / m.log_std.exp()).square() - m.log_std - 0.5 * math.log(2 * math.pi)
    return (logits.log_softmax(1) + log_p).logsumexp(1, keepdim=True)


@_function("parameters expanded and repeated", {"a": (1, 4), "b": (2,), "W": (4, 3)}, 4)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return ((x + m.a.expand(len(x), 4)) * m.b.repeat(2)).tanh() @ m.W


@_function("parameter broadcast over the batch from nothing", {"a": (3,)}, 3, fast=False)
def _(m: nn.Module, x: Tensor) -> Tensor:
    """The data enter only later: the first operation sees parameters alone, at full batch size."""
    return (m.a.expand(len(x), 3).sin().exp() * x).tanh()
