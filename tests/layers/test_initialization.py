"""Initialization by the number of inputs, and what a constant one does (Aggarwal 2018, section 3.3)."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import InputError, ParameterError
from rowgrad.layers import Maxout, TiedLinear, initialize

F64 = torch.float64
DEPTH, WIDTH = 20, 512


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).double()


def mean_squares(model: nn.Sequential, x: Tensor) -> list[float]:
    """Mean square of every activation behind a linear layer or convolution; for a mean of 0 the variance."""
    found = []
    for layer in model:
        x = layer(x)
        if not isinstance(layer, nn.ReLU):
            found.append(float(x.detach().square().mean()))
    return found


def linear(_: int) -> list[nn.Module]:
    return [nn.Linear(WIDTH, WIDTH)]


def with_relu(_: int) -> list[nn.Module]:
    return [nn.Linear(WIDTH, WIDTH), nn.ReLU()]


def maxout(_: int) -> list[nn.Module]:
    return [Maxout(WIDTH, WIDTH)]


def convolution(_: int) -> list[nn.Module]:
    return [nn.Conv2d(256, 256, 3, padding=1, padding_mode="circular")]


def convolution_with_relu(i: int) -> list[nn.Module]:
    return [*convolution(i), nn.ReLU()]


@pytest.mark.parametrize(
    ("layers", "scheme", "shape"),
    [
        (linear, "lecun", (32, WIDTH)),
        (linear, "glorot", (32, WIDTH)),
        (with_relu, "he", (32, WIDTH)),
        (maxout, "lecun", (32, WIDTH)),
        (convolution_with_relu, "he", (8, 256, 4, 4)),
        (convolution, "lecun", (8, 256, 4, 4)),
        (convolution, "glorot", (8, 256, 4, 4)),
    ],
)
def test_the_variance_is_flat_over_20_layers(layers, scheme: str, shape: tuple[int, ...]) -> None:
    """Within what one draw allows: with n units its logarithm changes by about sqrt(5 / n) a layer behind a ReLU."""
    model = chain(*(m for i in range(DEPTH) for m in layers(i)))
    initialize(model, scheme)
    variances = mean_squares(model, torch.randn(shape, dtype=F64))
    assert len(variances) == DEPTH
    assert max(variances) / min(variances) < 3


@pytest.mark.parametrize(("scheme", "factor"), [("lecun", 1 / 2), ("he", 1)])
def test_a_relu_halves_the_mean_square_and_he_makes_up_for_it(scheme: str, factor: float) -> None:
    model = chain(*(m for i in range(DEPTH) for m in with_relu(i)))
    initialize(model, scheme)
    variances = mean_squares(model, torch.randn(32, WIDTH, dtype=F64))
    per_layer = (variances[-1] / variances[0]) ** (1 / (DEPTH - 1))
    assert per_layer == pytest.approx(factor, rel=0.05)


def test_weights_of_one_size_explode_by_the_number_of_inputs() -> None:
    """Standard deviation 1 in place of sqrt(1/r): each layer multiplies the variance by r."""
    model = chain(*linear(0), *linear(1), *linear(2))
    for layer in model:
        nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    variances = mean_squares(model, torch.randn(32, WIDTH, dtype=F64))
    assert variances[2] / variances[1] == pytest.approx(WIDTH, rel=0.2)


def test_glorot_shares_between_activations_and_gradients() -> None:
    """Through layers of r_in and r_out the two change by factors 2 r_in/(r_in + r_out) and 2 r_out/(r_in + r_out)."""
    layer = chain(nn.Linear(800, 200))
    initialize(layer, "glorot")
    x = torch.randn(400, 800, dtype=F64, requires_grad=True)
    z = layer(x)
    assert float(z.detach().square().mean()) == pytest.approx(2 * 800 / 1000, rel=0.05)
    (zbar,) = torch.autograd.grad(z, x, torch.randn_like(z))
    assert float(zbar.square().mean()) == pytest.approx(2 * 200 / 1000, rel=0.05)


# r of each kind of layer


@pytest.mark.parametrize(
    ("layer", "name", "r_in", "r_out"),
    [
        (nn.Linear(300, 200), "weight", 300, 200),
        (Maxout(300, 100), "weight", 300, 100),
        (nn.Conv1d(40, 60, 5), "weight", 5 * 40, 5 * 60),
        (nn.Conv2d(40, 60, 3), "weight", 9 * 40, 9 * 60),
        (nn.Conv2d(40, 60, (3, 5), groups=4), "weight", 15 * 10, 15 * 15),
        (nn.ConvTranspose2d(40, 60, 3), "weight", 9 * 40, 9 * 60),
        (nn.LSTM(200, 80), "weight_ih_l0", 200, 80),
        (nn.LSTM(200, 80), "weight_hh_l0", 80, 80),
        (nn.LSTM(100, 120, proj_size=90), "weight_hr_l0", 120, 90),
        (nn.GRUCell(200, 80), "weight_ih", 200, 80),
        (nn.MultiheadAttention(100, 4), "in_proj_weight", 100, 100),
        (nn.MultiheadAttention(100, 4, kdim=200), "k_proj_weight", 200, 100),
    ],
)
@pytest.mark.parametrize("scheme", ["lecun", "he", "glorot"])
def test_standard_deviations(layer: nn.Module, name: str, r_in: int, r_out: int, scheme: str) -> None:
    by_hand = {
        "lecun": math.sqrt(1 / r_in),
        "he": math.sqrt(2 / r_in),
        "glorot": math.sqrt(2 / (r_in + r_out)),
    }[scheme]
    assert initialize(layer, scheme)[name] == pytest.approx(by_hand, rel=1e-12)
    weight = layer.get_parameter(name).detach()
    assert float(weight.std()) == pytest.approx(by_hand, rel=0.05)
    assert abs(float(weight.mean())) < 4 * by_hand / math.sqrt(weight.numel())


def test_only_what_is_returned_changes_and_biases_are_0() -> None:
    encoder = nn.Linear(6, 4)
    model = nn.Sequential(nn.Embedding(9, 6), encoder, nn.LayerNorm(4), nn.LSTM(4, 4), TiedLinear(encoder))
    for p in model.parameters():
        nn.init.constant_(p, 7.0)
    found = initialize(model, "lecun")
    assert set(found) == {"1.weight", "3.weight_ih_l0", "3.weight_hh_l0"}
    for name, p in model.named_parameters():
        is_bias = name in {"1.bias", "4.bias", "3.bias_ih_l0", "3.bias_hh_l0"}
        assert (p == 7).any() == (name not in found and not is_bias), name
        assert (p == 0).all() == is_bias, name


def test_a_generator_repeats_the_draw_and_leaves_the_global_one_alone() -> None:
    model, before = nn.Linear(5, 4), torch.get_rng_state()
    drawn = []
    for _ in range(2):
        initialize(model, "he", generator=torch.Generator().manual_seed(3))
        drawn.append(model.weight.clone())
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_shared_weight_is_drawn_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert list(initialize(nn.Sequential(first, nn.Tanh(), second), "lecun")) == ["0.weight"]


# Symmetry


def net() -> nn.Sequential:
    return chain(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))


def test_constant_weights_move_in_lockstep() -> None:
    """The units learn, but stay one unit six times; `diagnose` finds them."""
    model, x = net(), torch.randn(64, 5, dtype=F64)
    y = (x[:, 0] * x[:, 1]).sin()
    assert initialize(model, "constant", value=0.3) == {"0.weight": 0.0, "2.weight": 0.0}

    def losses() -> Tensor:
        return (model(x).squeeze(1) - y).square()

    assert "all of 6 units" in rg.diagnose(losses(), model).of("symmetric")[0].evidence
    optimizer, begin = torch.optim.SGD(model.parameters(), lr=0.1), model[0].weight.detach().clone()
    for _ in range(30):
        optimizer.zero_grad()
        losses().mean().backward()
        optimizer.step()
    W1, W2 = model[0].weight.detach(), model[2].weight.detach()
    assert (W1 - begin).norm() > 0.1
    torch.testing.assert_close(W1, W1[:1].expand(6, 5), rtol=0, atol=1e-13)
    torch.testing.assert_close(W2, W2[:, :1].expand(1, 6), rtol=0, atol=1e-13)


def test_random_weights_break_the_symmetry() -> None:
    model, x = net(), torch.randn(64, 5, dtype=F64)
    initialize(model, "lecun")
    assert not rg.diagnose(model(x).square().squeeze(1), model).of("symmetric")


# Refusals


@pytest.mark.parametrize(
    ("scheme", "value", "message"),
    [
        ("xavier", None, "initialization 'xavier': there are lecun, he, glorot, constant"),
        ("constant", None, "value=None: give the number that every weight becomes"),
        ("constant", math.inf, "value=inf: give the number"),
        ("he", 0.1, r"'he' takes no value, found 0\.1"),
    ],
)
def test_schemes_that_are_refused(scheme: str, value: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        initialize(net(), scheme, value=value)


def empty() -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of a layer without entries
        return nn.Linear(0, 2)


def test_models_that_are_refused() -> None:
    with pytest.raises(InputError, match="no linear, convolutional or recurrent layer in the LayerNorm"):
        initialize(nn.LayerNorm(4), "he")
    with pytest.raises(ParameterError, match=r"1\.weight is parametrized .* initialize before"):
        initialize(nn.Sequential(nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))), "he")
    with pytest.raises(InputError, match=r"0\.weight has 0 inputs and 2 outputs, expected at least 1 of both"):
        initialize(nn.Sequential(empty()), "he")
    with pytest.raises(ParameterError, match="weight has no shape yet: run the model once"):
        initialize(nn.LazyLinear(3), "he")
