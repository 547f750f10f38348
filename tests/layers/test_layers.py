"""Maxout, tied layers and activations by name (Aggarwal 2018, sections 3.2 and 3.4)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.reference import assert_rows_close, rows_by_loop
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import InputError
from rowgrad.layers import ACTIVATIONS, Maxout, TiedLinear, activation, autoencoder

F64 = torch.float64


# Maxout


@pytest.fixture
def maxout() -> Maxout:
    return Maxout(3, 4).double()


def test_maxout_is_the_largest_of_its_pieces() -> None:
    layer, x = Maxout(3, 4, pieces=3).double(), torch.randn(2, 5, 3, dtype=F64)
    b = layer.bias.unflatten(0, (3, 4))
    by_hand = torch.stack([x @ layer.piece(k).T + b[k] for k in range(3)]).amax(0)
    torch.testing.assert_close(layer(x), by_hand)
    assert layer(x).shape == (2, 5, 4)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_maxout_contains_relu_and_leaky_relu(maxout: Maxout, alpha: float) -> None:
    """W_2 = 0 gives the ReLU and W_2 = alpha W_1 the leaky one, in value and in the gradient of the input."""
    x = torch.randn(50, 3, dtype=F64, requires_grad=True)
    with torch.no_grad():
        maxout.piece(1).copy_(alpha * maxout.piece(0))
        maxout.bias[4:] = alpha * maxout.bias[:4]
    slope = activation("leaky_relu", alpha=alpha)
    by_hand = slope(x @ maxout.piece(0).T + maxout.bias[:4])
    torch.testing.assert_close(maxout(x), by_hand)
    found, expected = (torch.autograd.grad(h.exp().sum(), x)[0] for h in (maxout(x), by_hand))
    torch.testing.assert_close(found, expected)


def test_only_the_largest_piece_gets_a_gradient(maxout: Maxout) -> None:
    x = torch.randn(1, 3, dtype=F64)
    z = F.linear(x, maxout.weight, maxout.bias).reshape(2, 4)
    maxout(x).sum().backward()
    wins = (z == z.amax(0)).to(F64)
    torch.testing.assert_close(maxout.bias.grad.reshape(2, 4), wins)
    torch.testing.assert_close(maxout.weight.grad, wins.reshape(8, 1) * x)


def test_at_a_tie_one_piece_gets_all() -> None:
    layer = Maxout(3, 4, bias=False).double()
    nn.init.constant_(layer.weight, 0.5)
    layer(torch.ones(1, 3, dtype=F64)).sum().backward()
    of_pieces = layer.weight.grad.unflatten(0, (2, 4))
    torch.testing.assert_close(of_pieces.sum(0), torch.ones(4, 3, dtype=F64))
    assert set(of_pieces.unique().tolist()) == {0.0, 1.0}


def test_maxout_has_twice_the_parameters_of_a_linear_layer() -> None:
    found, linear = (sum(p.numel() for p in m.parameters()) for m in (Maxout(7, 5), nn.Linear(7, 5)))
    assert found == 2 * linear


def test_rows_through_maxout() -> None:
    model = nn.Sequential(Maxout(3, 6), Maxout(6, 2, pieces=3, bias=False)).double()
    batch = torch.randn(4, 3, dtype=F64), torch.tensor([0, 1, 1, 0])

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    found = rg.jacobian(loss_fn(model, *batch), model).dense(as_dict=True)
    assert_rows_close(found, rows_by_loop(model, batch, loss_fn))


def test_one_piece_is_refused() -> None:
    with pytest.raises(InputError, match=r"pieces=1: a maximum needs at least 2; for one use torch\.nn\.Linear"):
        Maxout(3, 4, pieces=1)


# Tied


@pytest.fixture
def small() -> nn.Sequential:
    encoder = nn.Linear(5, 2)
    decoder = TiedLinear(encoder)
    nn.init.normal_(decoder.bias)
    return nn.Sequential(encoder, nn.Tanh(), decoder).double()


def reconstruction(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x).square().sum(1)


def test_eq_7_pretend_the_copies_are_different_and_add(small: nn.Sequential) -> None:
    """dL/dw = dL/dw_1 + dL/dw_2, each from a net whose decoder has a weight of its own."""
    x = torch.randn(6, 5, dtype=F64)
    encoder, _, decoder = small
    W1, W2 = (encoder.weight.detach().clone().requires_grad_() for _ in range(2))
    apart = F.linear(F.linear(x, W1, encoder.bias).tanh(), W2.t(), decoder.bias)
    copies = torch.autograd.grad((apart - x).square().sum(), [W1, W2])
    losses = reconstruction(small, x)
    graph = rg.Graph(losses.sum(), small)
    for found, expected in zip(graph.decompose("0.weight", by="use").values(), copies, strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(rg.jacobian(losses, small).weighted_sum(1)["0.weight"], sum(copies))


def test_rows_of_a_tied_autoencoder(small: nn.Sequential) -> None:
    x = torch.randn(4, 5, dtype=F64)
    found = rg.jacobian(reconstruction(small, x), small).dense(as_dict=True)
    assert_rows_close(found, rows_by_loop(small, [x], reconstruction))


def test_the_weight_is_there_once_and_stays_tied(small: nn.Sequential) -> None:
    assert list(small.state_dict()) == ["0.weight", "0.bias", "2.bias"]
    x = torch.randn(3, 5, dtype=F64)
    copied = copy.deepcopy(small)
    assert copied[2].encoder is copied[0]
    assert copied[2].encoder is not small[0]
    for model in (small, copied):
        model[0].weight = nn.Parameter(torch.randn(2, 5, dtype=F64))
        torch.testing.assert_close(model(x), model[0](x).tanh() @ model[0].weight + model[2].bias)


def test_a_tied_layer_without_bias() -> None:
    encoder = nn.Linear(5, 2).double()
    decoder, h = TiedLinear(encoder, bias=False), torch.randn(3, 2, dtype=F64)
    torch.testing.assert_close(decoder(h), h @ encoder.weight)
    assert not list(decoder.parameters())


def test_only_a_linear_layer_can_be_tied() -> None:
    with pytest.raises(InputError, match=r"needs the torch\.nn\.Linear it undoes, found a Conv2d"):
        TiedLinear(nn.Conv2d(1, 2, 3))  # type: ignore[arg-type]


def test_a_layer_without_a_shape_cannot_be_tied() -> None:
    encoder = nn.LazyLinear(3)
    with pytest.raises(InputError, match="TiedLinear: the encoder has no shape yet: run it once"):
        TiedLinear(encoder)
    encoder(torch.ones(2, 5))
    assert TiedLinear(encoder)(torch.ones(2, 3)).shape == (2, 5)


def test_layers_are_made_where_and_as_they_are_asked_for() -> None:
    like = {"device": "meta", "dtype": torch.bfloat16}
    encoder = nn.Linear(5, 2, dtype=F64)
    for layer in (Maxout(5, 2, **like), TiedLinear(encoder, **like)):
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert TiedLinear(encoder).bias.dtype == F64
    assert Maxout(5, 2, dtype=F64)(torch.ones(3, 5, dtype=F64)).dtype == F64


def test_an_autoencoder_mirrors_its_layers() -> None:
    model, x = autoencoder((5, 4, 2), "leaky_relu", alpha=0.2).double(), torch.randn(3, 5, dtype=F64)
    phi = activation("leaky_relu", alpha=0.2)
    first, second = model.encoder[0], model.encoder[2]
    code = phi(second(phi(first(x))))
    torch.testing.assert_close(model.encoder(x), code)
    back = phi(code @ second.weight + model.decoder[0].bias)
    torch.testing.assert_close(model(x), back @ first.weight + model.decoder[2].bias)


def test_an_autoencoder_that_is_not_tied_has_twice_the_weights() -> None:
    def n_weights(*, tied: bool) -> int:
        return sum(p.numel() for p in autoencoder((5, 4, 2), tied=tied).parameters() if p.dim() == 2)

    assert n_weights(tied=False) == 2 * n_weights(tied=True) == 2 * (20 + 8)
    assert autoencoder((5, 4, 2), tied=False)(torch.ones(3, 5)).shape == (3, 5)


@pytest.mark.parametrize("widths", [(5,), (), (5, 0)])
def test_widths_that_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"widths \(.*, expected those of the input and of at least one layer"):
        autoencoder(widths)


# Activations


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_eq_14_alpha_is_the_slope_below_zero(alpha: float) -> None:
    v = torch.tensor([-2.0, -1e-300, 0.0, 3.0], dtype=F64, requires_grad=True)
    found = activation("leaky_relu", alpha=alpha)(v)
    torch.testing.assert_close(found, torch.where(v <= 0, alpha * v, v))
    (slope,) = torch.autograd.grad(found.sum(), v)
    torch.testing.assert_close(slope, torch.tensor([alpha, alpha, alpha, 1.0], dtype=F64))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_works_entry_by_entry(name: str) -> None:
    x = torch.linspace(-3, 3, 7, dtype=F64)
    h = activation(name)(x)
    assert (h.diff() >= -0.2).all()
    torch.testing.assert_close(h[3:4], activation(name)(x[3:4]))


@pytest.mark.parametrize(
    ("name", "alpha", "message"),
    [
        ("swich", None, r"activation 'swich': there are elu, gelu, .* leaky_relu, relu"),
        ("relu", 0.1, r"'relu' takes no alpha, found 0\.1: leave it out, or use 'leaky_relu'"),
        ("leaky_relu", float("nan"), "alpha=nan, expected a finite number"),
    ],
)
def test_refusals(name: str, alpha: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        activation(name, alpha=alpha)
