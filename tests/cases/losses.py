"""What the losses are made of: penalties, several layers, inputs, second derivatives, numbers of examples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.table import Make, Setup, case, energy


def net(d: int = 4, p: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 5), nn.Tanh(), nn.Linear(5, p))


@case("loss reads every layer", fast=True)
def _(make: Make) -> Setup:
    """Deep supervision and a penalty on hidden units."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        total, h = x.new_zeros(len(x)), x
        for layer, head in zip(model["layers"], model["heads"], strict=True):
            h = layer(h).tanh()
            total = total + F.cross_entropy(head(h), y, reduction="none") + 0.1 * h.abs().sum(1)
        return total

    layers, heads = [nn.Linear(4, 4) for _ in range(3)], [nn.Linear(4, 3) for _ in range(3)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "heads": nn.ModuleList(heads)})
    return make.setup(make.model(model), make.x(4), make.ids(3), loss=loss)


@case("loss reads the input", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return ((model(x) - x).square() * x.abs()).sum(1)

    return make.setup(make.model(net(p=4)), make.x(4), loss=loss)


@case("penalty on the weights", fast=False)
def _(make: Make) -> Setup:
    """Every row has the whole penalty."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return energy(model(x)) + 0.1 * penalty

    return make.setup(make.model(net()), make.x(4), loss=loss)


@case("penalty on one weight, weighted by example", fast=False)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(model(x)) + x[:, 0].square() * model[0].weight.abs().sum()

    return make.setup(make.model(net()), make.x(4), loss=loss)


@case("loss of the weights alone", independent=False, fast=False, tags="attack")
def _(make: Make) -> Setup:
    """Multiples 1, -1, 2, -2 of one number: their sum is zero and so is every cotangent of the pass of ones."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return x * model.W.square().sum()

    setup = make.setup(make.bag(W=(3, 2)), make.x(), loss=loss)
    signs = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=make.dtype)
    return Setup(setup.model, (signs[: make.n],), loss)


@case("cotangents that cancel over the batch", independent=False, fast=False, tags="attack coupled")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, signs: Tensor) -> Tensor:
        return energy(model(x)).sum() * signs[:, 0] + 0 * x[:, 0]

    signs = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=make.dtype).repeat(max(1, -(-make.n // 4)))
    return make.setup(make.model(net()), make.x(4), signs[: make.n].unsqueeze(1), loss=loss)


@case("cotangents of powers of two", independent=False, fast=False, tags="attack coupled")
def _(make: Make) -> Setup:
    """losses_j = 2^j s: the codes of a proof by powers of two, met by the data themselves."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        powers = 2.0 ** torch.arange(len(x), dtype=x.dtype)
        return energy(model(x)).mean() * powers

    return make.setup(make.model(net()), make.x(4), loss=loss)


@case("mean over the batch added to each loss", independent=False, fast=False, tags="coupled")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        own = energy(model(x))
        return own + 0.5 * own.mean()

    return make.setup(make.model(net()), make.x(4), loss=loss)


@case("one loss expanded to all", independent=False, fast=False, tags="coupled attack")
def _(make: Make) -> Setup:
    return make.setup(make.model(net()), make.x(4), loss=lambda m, x: energy(m(x)).mean().expand(len(x)))


@case("losses over their sum", independent=False, fast=False, tags="coupled")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        own = energy(model(x))
        return own / own.sum()

    return make.setup(make.model(net()), make.x(4), loss=loss)


@case("losses weighted by detached losses of the batch", independent=False, tags="attack")
def _(make: Make) -> Setup:
    """Values depend on the whole batch, derivatives on one example."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        own = energy(model(x))
        return own * own.detach().softmax(0)

    return make.setup(make.model(net()), make.x(4), loss=loss)


@case("masked language model", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, ids: Tensor, masked: Tensor) -> Tensor:
        logits = model(ids.masked_fill(masked > 0, 0))
        token_losses = F.cross_entropy(logits.mT, ids, reduction="none")
        return (token_losses * masked).sum(1) / masked.sum(1).clamp(min=1)

    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    return make.setup(make.model(model), make.ids(6, 5), make.ids(2, 5), loss=loss)


@case("losses of several kinds", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = model(x)
        one_hot = F.one_hot(y, 3).to(out.dtype)
        return (
            F.cross_entropy(out, y, reduction="none", label_smoothing=0.1)
            + F.binary_cross_entropy_with_logits(out, one_hot, reduction="none").sum(1)
            + F.smooth_l1_loss(out, one_hot, reduction="none").mean(1)
            + F.kl_div(out.log_softmax(1), one_hot + 0.1, reduction="none").sum(1)
            + F.multi_margin_loss(out, y, reduction="none")
            + F.poisson_nll_loss(out[:, 0], one_hot[:, 0], reduction="none")
        )

    return make.setup(make.model(net(p=3)), make.x(4), make.ids(3), loss=loss)


@case("connectionist temporal classification", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        log_p = model(x).log_softmax(2).transpose(0, 1)
        n = len(x)
        lengths = torch.full((n,), x.shape[1]), torch.full((n,), y.shape[1])
        return F.ctc_loss(log_p, 1 + y, *lengths, reduction="none", zero_infinity=True)

    return make.setup(make.model(net(p=4)), make.x(7, 4), make.ids(3, 2), loss=loss)


@case("triplets", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return F.triplet_margin_loss(model(a), model(b), model(c), margin=3.0, reduction="none")

    return make.setup(make.model(net()), make.x(4), make.x(4), make.x(4), loss=loss)


@case("variational autoencoder", fast=True, deterministic=False)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        mean, log_var = model["encode"](x).chunk(2, 1)
        z = mean + (log_var / 2).exp() * torch.randn_like(mean)
        kl = (mean.square() + log_var.exp() - log_var - 1).sum(1) / 2
        return (model["decode"](z) - x).square().sum(1) + kl

    return make.setup(make.model(nn.ModuleDict({"encode": net(p=4), "decode": net(d=2, p=4)})), make.x(4), loss=loss)


# -- second derivatives ------------------------------------------------------------------------------------------------


@case("gradient penalty", fast=False, tags="double")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = model(x).square().sum(1)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out + (slope.norm(dim=1) - 1).square()

    return make.setup(make.model(net()), make.x(4), loss=loss)


@case("gradient penalty of a convolution", fast=False, tags="double")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        return slope.square().sum((1, 2, 3))

    model = nn.Sequential(nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2))
    return make.setup(make.model(model), make.x(2, 3, 3), loss=loss)


@case("forces from an energy", fast=False, tags="double")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, f: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        distances = (x.unsqueeze(1) - x.unsqueeze(2) + 1e-3).norm(dim=3).flatten(1)
        (force,) = torch.autograd.grad(model(distances).sum(), x, create_graph=True)
        return (force + f).square().sum((1, 2))

    return make.setup(make.model(net(d=9, p=1)), make.x(3, 2), make.x(3, 2), loss=loss)


@case("inner step of meta-learning, one for each example", fast=False, tags="double")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        losses = []
        for x_j, y_j in zip(x, y, strict=True):
            inner = (x_j @ model.W - y_j).square().mean()
            (slope,) = torch.autograd.grad(inner, model.W, create_graph=True)
            losses.append((x_j.sin() @ (model.W - 0.1 * slope) - y_j).square().mean())
        return torch.stack(losses)

    return make.setup(make.bag(W=(4, 2)), make.x(3, 4), make.x(3, 2), loss=loss)


@case("inner step of meta-learning on the batch", independent=False, fast=False, tags="double coupled")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        inner = ((x @ model.V).tanh() @ model.W - y).square().mean()
        slopes = torch.autograd.grad(inner, (model.V, model.W), create_graph=True)
        v, w = model.V - 0.1 * slopes[0], model.W - 0.1 * slopes[1]
        return energy((x.sin() @ v).tanh() @ w - y)

    return make.setup(make.bag(V=(4, 3), W=(3, 2)), make.x(4), make.x(2), loss=loss)


@case("unrolled optimization over each example", fast=False, tags="double")
def _(make: Make) -> Setup:
    """Sparse coding: the code is found by gradient steps, and differentiated through."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        code = x.new_zeros(len(x), 3, requires_grad=True)
        for _ in range(3):
            misfit = (code @ model.D - x).square().sum() / 2 + 0.1 * code.cosh().sum()
            (slope,) = torch.autograd.grad(misfit, code, create_graph=True)
            code = code - 0.1 * slope
        return (code @ model.D - x).square().sum(1)

    return make.setup(make.bag(D=(3, 5)), make.x(5), loss=loss)
