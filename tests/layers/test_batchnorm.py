"""Batch normalization: node, gradients, statistics, folding and noise (Aggarwal 2018, section 3.6)."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.seeds.hand import assert_same, plain
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import InputError
from rowgrad.layers import BatchNorm, TiedLinear, batch_norm_gradients, fold, hidden_layer, population_statistics

F64 = torch.float64


def randomized(model: nn.Module) -> nn.Module:
    """All parameters away from their first values, so that gamma, beta and biases show."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.double()


def by_hand(v: np.ndarray, gamma: np.ndarray, beta: np.ndarray, eps: float) -> np.ndarray:
    """The four lines of the text, unit by unit."""
    a = np.empty_like(v)
    m = len(v)
    for i in range(v.shape[1]):
        mu = sum(v[r, i] for r in range(m)) / m
        variance = sum((v[r, i] - mu) ** 2 for r in range(m)) / m + eps
        for r in range(m):
            a[r, i] = gamma[i] * (v[r, i] - mu) / np.sqrt(variance) + beta[i]
    return a


# The node


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_the_node_is_that_of_the_text(eps: float) -> None:
    """Biased, and with epsilon inside the variance: 0.5 would show it anywhere else."""
    norm, v = randomized(BatchNorm(3, eps=eps)), torch.randn(6, 3, dtype=F64)
    assert_same(norm(v), by_hand(plain(v), plain(norm.weight), plain(norm.bias), eps))


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 4, 5)])
def test_in_training_it_is_pytorchs(shape: tuple[int, ...]) -> None:
    norm, v = randomized(BatchNorm(3)), torch.randn(shape, dtype=F64)
    assert torch.equal(norm(v), F.batch_norm(v, None, None, norm.weight, norm.bias, training=True))


def test_the_running_variance_is_the_biased_one_where_pytorch_has_the_unbiased() -> None:
    ours, theirs = BatchNorm(3, momentum=0.2).double(), nn.BatchNorm1d(3, momentum=0.2).double()
    mean, biased, unbiased = np.zeros(3), np.ones(3), np.ones(3)
    for _ in range(4):
        v = torch.randn(5, 3, dtype=F64)
        ours(v), theirs(v)
        mean = 0.8 * mean + 0.2 * plain(v).mean(0)
        biased = 0.8 * biased + 0.2 * plain(v).var(0)
        unbiased = 0.8 * unbiased + 0.2 * plain(v).var(0, ddof=1)
    for norm, variance in ((ours, biased), (theirs, unbiased)):
        assert_same(norm.running_mean, mean)
        assert_same(norm.running_var, variance)


def test_without_momentum_all_batches_count_the_same() -> None:
    norm, batches = BatchNorm(3, momentum=None).double(), torch.randn(4, 5, 3, dtype=F64)
    for v in batches:
        norm(v)
    assert_same(norm.running_mean, plain(batches).mean((0, 1)))
    assert_same(norm.running_var, plain(batches).var(1).mean(0))


def test_in_inference_the_statistics_are_constants() -> None:
    norm, v = randomized(BatchNorm(3)), torch.randn(6, 3, dtype=F64)
    norm(v + 1)
    norm.eval()
    sigma = np.sqrt(plain(norm.running_var) + 1e-5)
    expected = plain(norm.weight) * (plain(v) - plain(norm.running_mean)) / sigma + plain(norm.bias)
    before = copy.deepcopy(norm.state_dict())
    assert_same(norm(v), expected)
    assert_same(norm(v[:1]), expected[:1])
    assert all(torch.equal(before[name], t) for name, t in norm.state_dict().items())


@pytest.mark.parametrize("shape", [(6, 2), (6,)])
def test_an_input_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"BatchNorm\(3\): input of shape .*expected \(examples, 3, \.\.\.\)"):
        BatchNorm(3)(torch.ones(shape))


def test_an_empty_batch_counts_for_nothing() -> None:
    norm = BatchNorm(3)
    before = copy.deepcopy(norm.state_dict())
    assert norm(torch.ones(0, 3)).shape == (0, 3)
    assert all(torch.equal(before[name], t) for name, t in norm.state_dict().items())


# Gradients


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 2, 2)])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_closed_form_gradients_are_those_of_autograd(shape: tuple[int, ...], eps: float) -> None:
    norm = randomized(BatchNorm(3, eps=eps))
    v, g = torch.randn(shape, dtype=F64, requires_grad=True), torch.randn(shape, dtype=F64)
    expected = torch.autograd.grad(norm(v), [v, norm.weight, norm.bias], g)
    found = batch_norm_gradients(g, v.detach(), norm.weight.detach(), eps=eps)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_gradients_of_other_shapes_are_refused() -> None:
    v, gamma = torch.ones(4, 3), torch.ones(3)
    with pytest.raises(InputError, match=r"g of shape \(1, 3\), expected that of v, \(4, 3\)"):
        batch_norm_gradients(torch.ones(1, 3), v, gamma)
    with pytest.raises(InputError, match=r"gamma of shape \(1,\), expected one for each unit, \(3,\)"):
        batch_norm_gradients(torch.ones(4, 3), v, gamma[:1])


def test_closed_form_gradients_are_those_of_the_four_lines() -> None:
    """By the unfused operations, and by the sweep over their graph."""
    v, gamma = torch.randn(6, 3, dtype=F64, requires_grad=True), torch.randn(3, dtype=F64, requires_grad=True)
    beta = torch.randn(3, dtype=F64, requires_grad=True)
    mu = v.sum(0) / 6
    v_hat = (v - mu) / ((v - mu).square().sum(0) / 6 + 0.1).sqrt()
    a = gamma * v_hat + beta
    flow = rg.Graph(a.exp().sum(), {"v": v, "gamma": gamma, "beta": beta}).backward()
    found = batch_norm_gradients(flow[a], v.detach(), gamma.detach(), eps=0.1)
    for ours, name in zip(found, ("v", "gamma", "beta"), strict=True):
        assert_same(ours, flow[name])


def test_nothing_that_shifts_or_scales_the_batch_goes_back() -> None:
    v, g = torch.randn(6, 3, dtype=F64), torch.randn(6, 3, dtype=F64)
    g_v = batch_norm_gradients(g, v, torch.ones(3, dtype=F64), eps=0.0)[0]
    torch.testing.assert_close(g_v.sum(0), torch.zeros(3, dtype=F64), atol=1e-12, rtol=0)
    torch.testing.assert_close((g_v * v).sum(0), torch.zeros(3, dtype=F64), atol=1e-12, rtol=0)


# The population


def network() -> nn.Sequential:
    layers = hidden_layer(4, 6, norm="batch-pre"), hidden_layer(6, 5, "tanh", norm="batch-post"), nn.Dropout(0.5)
    return randomized(nn.Sequential(*layers, hidden_layer(5, 3, norm="batch-pre"), nn.Linear(3, 2)))


@pytest.mark.parametrize("sizes", [[40], [1, 39], [13, 14, 13], [0, 40]])
def test_population_statistics_are_those_of_one_batch_of_everything(sizes: list[int]) -> None:
    model, x = network(), 3 * torch.randn(40, 4, dtype=F64) + 5
    found = population_statistics(model, x.split(sizes))
    assert list(found) == ["0.1", "1.2", "3.1"]
    assert all(module.training for module in model.modules())
    everything = copy.deepcopy(model)
    everything[2].eval()
    expected = everything(x)
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-10, atol=1e-12)
    v = plain(model[0][0](x))
    assert_same(found["0.1"][0], v.mean(0))
    assert_same(found["0.1"][1], v.var(0))
    assert_same(model[0][1].running_var, v.var(0))


def test_population_statistics_of_positions() -> None:
    """Channels of images: every position counts."""
    model, x = nn.Sequential(nn.BatchNorm2d(3)).double(), torch.randn(10, 3, 4, 4, dtype=F64)
    mean, variance = population_statistics(model, x.split(4))["0"]
    assert_same(mean, plain(x).mean((0, 2, 3)))
    assert_same(variance, plain(x).var((0, 2, 3)))


def test_population_statistics_do_not_cancel() -> None:
    x = 1e6 + torch.randn(64, 1, dtype=F64)
    variance = population_statistics(nn.Sequential(nn.BatchNorm1d(1)).double(), x.split(7))["0"][1]
    assert_same(variance, plain(x).var(0))


def test_what_population_statistics_leave_behind(leaves_nothing_behind) -> None:
    model, x = network(), torch.randn(12, 4, dtype=F64)
    model[3].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    population_statistics(model, x.split(5))
    assert [module.training for module in model.modules()] == modes
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var"}


def test_batches_of_a_loader_and_a_forward_pass_of_ones_own() -> None:
    x, y = torch.randn(12, 4, dtype=F64), torch.zeros(12)
    pairs = [(x[:7], y[:7]), (x[7:], y[7:])]
    first = population_statistics(model := network(), pairs)
    second = population_statistics(model, [{"x": x}], forward=lambda batch: model(batch["x"]))
    for name in first:
        for a, b in zip(first[name], second[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def twice() -> nn.Sequential:
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(norm, nn.ReLU(), norm)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x


def stream() -> Iterator[Tensor]:
    yield torch.ones(5, 4)


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.Linear(4, 4), [torch.ones(5, 4)], "no batch normalization in the Linear"),
        (nn.BatchNorm1d(4), stream(), "once for each layer: pass a list or a DataLoader"),
        (nn.BatchNorm1d(4), [], "no batches"),
        (nn.BatchNorm1d(4), [torch.ones(0, 4)], "no examples in the batches"),
        (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), [torch.ones(5, 4)], "0 keeps no statistics"),
        (twice(), [torch.ones(5, 4)], "0 runs several times in a forward pass"),
        (Unused(), [torch.ones(5, 4)], "no batch normalization ran"),
    ],
)
def test_populations_that_are_refused(model: nn.Module, batches: list[Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        population_statistics(model, batches)
    assert all(module.training for module in model.modules())


# Folding


def images() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.BatchNorm2d(6, affine=False),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, 3),
        nn.BatchNorm1d(3, affine=False),
    )


FOLDED = {
    "pre-activation": (lambda: nn.Sequential(hidden_layer(4, 6, norm="batch-pre"), nn.Linear(6, 2)), (4,)),
    "post-activation": (
        lambda: nn.Sequential(hidden_layer(4, 6, norm="batch-post"), nn.Dropout(0.5), nn.Linear(6, 2, bias=False)),
        (4,),
    ),
    "both": (network, (4,)),
    "images": (images, (2, 8, 8)),
    "two in a row": (lambda: nn.Sequential(nn.Linear(4, 3), BatchNorm(3), BatchNorm(3)), (4,)),
    "sequences": (lambda: nn.Sequential(nn.Conv1d(4, 3, 2, stride=2), BatchNorm(3)), (4, 6)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folded_networks_have_equal_outputs(name: str) -> None:
    make, shape = FOLDED[name]
    model, x = randomized(make()), torch.randn(20, *shape, dtype=F64) + 1
    population_statistics(model, x.split(6))
    folded = fold(model)
    assert not [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-11, atol=1e-11)


def test_the_model_itself_stays_as_it_is() -> None:
    model = network()
    before, shown = copy.deepcopy(model.state_dict()), str(model)
    fold(model)
    assert str(model) == shown
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_pytorch_folds_pre_activation_to_the_same_weights() -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 3), BatchNorm(3)))
    model(torch.randn(9, 4, dtype=F64))
    ours, theirs = fold(model)[0], nn.utils.fuse_linear_bn_eval(*model.eval())
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


class Block(nn.Sequential):
    """As torchvision makes them: a sequence under another name."""


class Skip(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return input + super().forward(input)


def skipping() -> nn.Sequential:
    """Only the block is one layer after the other all the way."""
    linear, norm = nn.Linear(4, 4), BatchNorm(4)
    return nn.Sequential(Block(nn.Linear(4, 4), BatchNorm(4)), Skip(BatchNorm(4), nn.ReLU(), linear), norm)


def padded() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1)
    )


def tied() -> nn.Sequential:
    encoder = nn.Linear(4, 3)
    return nn.Sequential(encoder, BatchNorm(3), nn.Tanh(), TiedLinear(encoder))


def shared() -> nn.Sequential:
    linear = nn.Linear(4, 4)
    return nn.Sequential(linear, nn.Tanh(), linear, BatchNorm(4))


def repeated() -> nn.Sequential:
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), BatchNorm(4))
    return nn.Sequential(nn.Linear(4, 4), BatchNorm(4), block, block)


@pytest.mark.parametrize(
    ("make", "shape", "left"),
    [(padded, (2, 5, 5), 1), (tied, (4,), 0), (shared, (4,), 0), (repeated, (4,), 1), (skipping, (4,), 2)],
)
def test_what_cannot_be_folded_stays_and_outputs_are_equal(make, shape: tuple[int, ...], left: int) -> None:
    """A border of zeros would not be shifted; a layer used elsewhere too keeps its weight there."""
    model, x = randomized(make()), torch.randn(20, *shape, dtype=F64)
    model(x)
    folded = fold(model)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-11, atol=1e-11)
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules()) == left


def doubled(*args: object) -> Tensor:
    """A hook, of either kind, that changes what passes."""
    found = args[-1]
    return 2 * (found[0] if isinstance(found, tuple) else found)


@pytest.mark.parametrize("on", [0, 1, 2, 3])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_beside_a_hook_nothing_is_folded(on: int, register: str) -> None:
    """On a layer, on what is between, on the normalization, on the sequence that holds it."""
    inner = nn.Sequential(nn.Dropout(0.2), BatchNorm(4))
    model = randomized(nn.Sequential(nn.Linear(4, 4), inner, nn.Tanh(), nn.Linear(4, 4), BatchNorm(4)))
    x = torch.randn(20, 4, dtype=F64)
    model(x)
    getattr([model[0], inner[0], inner[1], inner][on], register)(doubled)
    folded = fold(model)
    assert isinstance(folded[1][1], BatchNorm)
    assert isinstance(folded[4], nn.Identity)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 3),
        nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3)),
        nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3)),
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(3), nn.Linear(6, 4)),  # of (examples, 3, 4)
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)),
    ],
)
def test_nothing_to_fold_is_an_error(model: nn.Module) -> None:
    with pytest.raises(InputError, match="stands beside a linear layer or convolution within an"):
        fold(model)


# Before and after the activation


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_pre_and_post_activation(name: str) -> None:
    x, phi = torch.randn(8, 4, dtype=F64), {"relu": torch.relu, "tanh": torch.tanh}[name]
    for norm in ("batch-pre", "batch-post"):
        layer = randomized(hidden_layer(4, 3, name, norm=norm))
        linear, gamma, beta = layer[0], *(list(layer.parameters())[-2:])
        z = linear(x)
        if norm == "batch-pre":
            expected = phi(torch.tensor(by_hand(plain(z), plain(gamma), plain(beta), 1e-5)))
        else:
            expected = by_hand(plain(phi(z)), plain(gamma), plain(beta), 1e-5)
        assert_same(layer(x), expected)


@pytest.mark.parametrize(
    ("name", "norm", "alpha", "expected"),
    [
        ("relu", "none", None, ["Linear", "ReLU"]),
        ("leaky_relu", "layer", 0.2, ["Linear", "LayerNorm", "LeakyReLU"]),
        ("maxout", "batch-post", None, ["Maxout", "BatchNorm"]),
        ("maxout", "none", None, ["Maxout"]),
    ],
)
def test_hidden_layers(name: str, norm: str, alpha: float | None, expected: list[str]) -> None:
    layer = hidden_layer(4, 3, name, norm=norm, alpha=alpha)
    assert [type(m).__name__ for m in layer] == expected
    assert layer(torch.randn(5, 4)).shape == (5, 3)
    assert alpha is None or layer[-1].negative_slope == alpha


@pytest.mark.parametrize(
    ("name", "norm", "alpha", "message"),
    [
        ("relu", "batch", None, "norm 'batch': there are batch-pre, batch-post, layer, none"),
        ("maxout", "batch-pre", None, "maxout has no single pre-activation; use batch-post or none"),
        ("maxout", "none", 0.1, "'maxout' takes no alpha"),
        ("swich", "none", None, "there are elu"),
    ],
)
def test_hidden_layers_that_are_refused(name: str, norm: str, alpha: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hidden_layer(4, 3, name, norm=norm, alpha=alpha)


def test_no_bias_is_lost_before_batch_normalization() -> None:
    """Its gradient would be zero: the mean takes it out; beta stands in for it."""
    assert hidden_layer(4, 3, norm="batch-pre")[0].bias is None
    layer = randomized(nn.Sequential(nn.Linear(4, 3), BatchNorm(3)))
    layer(torch.randn(8, 4, dtype=F64)).exp().sum().backward()
    torch.testing.assert_close(layer[0].bias.grad, torch.zeros(3, dtype=F64), atol=1e-12, rtol=0)
    assert layer[1].bias.grad.abs().min() > 0.1


# Noise


def classifier(norm: str) -> nn.Module:
    return randomized(nn.Sequential(hidden_layer(4, 6, "tanh", norm=norm), nn.Linear(6, 3)))


def first_rows(norm: str, n_batches: int = 100, batch_size: int = 16) -> Tensor:
    """The row of one example in each of many batches that it is in, (n_batches, P); the weights never change."""
    model, data = (
        randomized(nn.Sequential(hidden_layer(4, 6, "tanh", norm=norm), nn.Linear(6, 3))),
        torch.randn(200, 4, dtype=F64),
    )
    labels = torch.randint(3, (200,))
    found = []
    for _ in range(n_batches):
        batch = torch.cat([torch.tensor([0]), 1 + torch.randperm(199)[: batch_size - 1]])
        losses = F.cross_entropy(model(data[batch]), labels[batch], reduction="none")
        row = torch.autograd.grad(losses[0], list(model.parameters()))
        found.append(torch.cat([g.flatten() for g in row]))
    return torch.stack(found)


def spread(rows: Tensor) -> float:
    """Root mean square distance of the rows from their mean, over the norm of the mean."""
    return float((rows - rows.mean(0)).norm() / rows.mean(0).norm() / len(rows) ** 0.5)


@pytest.mark.parametrize("norm", ["batch-pre", "batch-post"])
def test_one_example_has_another_row_in_each_of_100_batches(norm: str) -> None:
    assert 0.1 < spread(first_rows(norm)) < 2


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_without_batch_normalization_its_row_is_always_the_same(norm: str) -> None:
    assert spread(first_rows(norm)) < 1e-14


def test_the_noise_is_milder_in_larger_batches() -> None:
    """About as 1 / sqrt(batch size)."""
    small, large = (spread(first_rows("batch-pre", batch_size=size)) for size in (8, 128))
    assert large < small / 2


@pytest.mark.filterwarnings("ignore::rowgrad.errors.RowgradWarning")
def test_rowgrad_finds_the_same_row_and_the_coupling() -> None:
    model, x = (
        randomized(nn.Sequential(hidden_layer(4, 6, "tanh", norm="batch-pre"), nn.Linear(6, 3))),
        torch.randn(8, 4, dtype=F64),
    )
    losses = F.cross_entropy(model(x), torch.arange(8) % 3, reduction="none")
    J = rg.jacobian(losses, model, retain_graph=True)
    assert len(J.couplings) > 0
    expected = torch.autograd.grad(losses[0], list(model.parameters()))
    assert_same(J.dense()[0], torch.cat([g.flatten() for g in expected]))
