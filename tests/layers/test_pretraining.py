"""Pretraining by autoencoders, layer by layer (Aggarwal 2018, sections 3.3 and 3.4; Bengio et al. 2007)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowgrad.errors import InputError, NonFiniteError
from rowgrad.layers import BatchNorm, Maxout, hidden_layer, initialize, pretrain

F64 = torch.float64


def correlated(n: int = 256, d: int = 8, rank: int = 3) -> Tensor:
    """Examples near a plane of few dimensions."""
    return torch.randn(n, rank, dtype=F64) @ torch.randn(rank, d, dtype=F64) + 0.1 * torch.randn(n, d, dtype=F64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_linear_autoencoder_finds_the_principal_components() -> None:
    """The best linear reconstruction from k units leaves the variance of the other d - k directions."""
    x = correlated()
    model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 2)).double()
    errors = pretrain(model, x, epochs=150, lr=0.01, generator=generator())["0"]
    directions = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    optimum = float(directions[:5].sum() / 8)
    assert optimum * (1 - 1e-9) < errors[-1] < 1.05 * optimum
    assert errors[0] > 20 * optimum


def deep(depth: int = 5) -> nn.Sequential:
    layers = [hidden_layer(8 if i == 0 else 16, 16, "tanh") for i in range(depth)]
    return nn.Sequential(*layers, nn.Linear(16, 1)).double()


def test_each_hidden_layer_learns_to_describe_the_one_before() -> None:
    model, x = deep(3), correlated()
    before = copy.deepcopy(model.state_dict())
    errors = pretrain(model, x, epochs=15, lr=0.01, generator=generator())
    assert list(errors) == ["0.0", "1.0", "2.0"]
    for of_layer in errors.values():
        assert len(of_layer) == 16
        assert of_layer[-1] < of_layer[0] / 4
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {f"{i}.0.{p}" for i in range(3) for p in ("weight", "bias")}
    assert list(model.state_dict()) == list(before)
    assert all(p.grad is None for p in model.parameters())


def test_a_pretrained_net_learns_faster() -> None:
    """Six layers that start so small that the gradient vanishes in them: a partial fix is a stronger start."""
    x = correlated()
    y = x[:, :1].sin()
    losses = {}
    for name in ("small", "pretrained"):
        torch.manual_seed(1)
        model = deep(6)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.3)
        if name == "pretrained":
            pretrain(model, x, epochs=15, lr=0.01, generator=generator())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        losses[name] = float(loss.detach())
    assert losses["small"] > 0.9 * float(y.var())
    assert losses["pretrained"] < 0.5 * losses["small"]


def robustness(noise: float) -> float:
    """How far a layer's units move when a third of their inputs is lost, over how far they are apart."""
    torch.manual_seed(2)
    x = correlated(512)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    pretrain(model, x, epochs=60, lr=0.01, noise=noise, generator=generator())
    h = model[:2](x).detach()
    lost = model[:2](x * (torch.rand(x.shape, generator=generator(1)) >= 0.33)).detach()
    return float((lost - h).norm() / (h - h.mean(0)).norm())


def test_denoising_makes_units_robust() -> None:
    assert robustness(0.4) < 0.9 * robustness(0.0)


def test_norms_dropout_and_images_take_part() -> None:
    model = nn.Sequential(nn.Flatten(), hidden_layer(8, 6, norm="batch-pre"), nn.Dropout(0.2), nn.Linear(6, 2)).double()
    x = correlated().reshape(-1, 2, 4)
    before = model[1][1].weight.detach().clone()
    errors = pretrain(model, x, epochs=30, lr=0.01, generator=generator())
    assert list(errors) == ["1.0"]
    assert errors["1.0"][-1] < errors["1.0"][0] / 2
    assert not torch.equal(before, model[1][1].weight)
    assert int(model[1][1].num_batches_tracked) == 30 * 4


@pytest.mark.parametrize(("n", "sizes"), [(129, (64, 65)), (65, (65,)), (66, (64, 2)), (3, (3,))])
def test_a_single_example_left_joins_the_last_batch(n: int, sizes: tuple[int, ...]) -> None:
    model = nn.Sequential(hidden_layer(8, 6, norm="batch-pre"), nn.Linear(6, 2)).double()
    seen: list[int] = []
    with model[0][0].register_forward_pre_hook(lambda m, args: seen.append(len(args[0])) if m.training else None):
        pretrain(model, correlated(n), epochs=1, generator=generator())
    assert tuple(seen) == sizes


def test_batches_of_one_stay_batches_of_one() -> None:
    model, sizes = deep(1), list[int]()
    with model[0][0].register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])) if m.training else None):
        pretrain(model, correlated(3), epochs=1, batch_size=1)
    assert sizes == [1, 1, 1]


def test_the_same_generator_gives_the_same_layers() -> None:
    x, before = correlated(), torch.get_rng_state()
    first = nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    models = [copy.deepcopy(first) for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        pretrain(model, x, epochs=2, noise=0.3, generator=generator(seed))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(state, before)
    assert torch.equal(models[0][0].weight, models[1][0].weight)
    assert not torch.equal(models[0][0].weight, models[2][0].weight)


def test_modes_stay_and_progress_is_told() -> None:
    model, told = deep(2), []
    model[1].eval()
    modes = [module.training for module in model.modules()]
    pretrain(model, correlated(), epochs=2, progress=lambda done, total: told.append((done, total)))
    assert [module.training for module in model.modules()] == modes
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_one_activation_used_twice_counts_twice() -> None:
    relu = nn.ReLU()
    first = nn.Sequential(nn.Linear(8, 6), relu, nn.Linear(6, 4), relu, nn.Linear(4, 1)).double()
    second = nn.Sequential(*(nn.ReLU() if m is relu else copy.deepcopy(m) for m in first))
    x = correlated()
    errors = [pretrain(m, x, epochs=2, generator=generator()) for m in (first, second)]
    assert errors[0] == errors[1]


def test_a_frozen_layer_stays_as_it_is() -> None:
    model = deep(2)
    model[0].requires_grad_(False)
    before = model[0][0].weight.clone()
    errors = pretrain(model, correlated(), epochs=5, lr=0.01)
    assert torch.equal(model[0][0].weight, before)
    assert errors["0.0"][-1] < errors["0.0"][0]  # the decoder has a bias to learn
    assert errors["1.0"][-1] < errors["1.0"][0] / 2


class Other(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) + 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(8, 2), "goes through an nn.Sequential layer by layer, found a Linear"),
        (Other(nn.Linear(8, 2)), "found a Other"),
        (nn.Sequential(nn.Linear(8, 2), nn.Tanh()), "found 1 linear layers; it takes a hidden one and the output's"),
        (nn.Sequential(nn.Sequential(Maxout(8, 4)), nn.Linear(4, 2)), r"0\.0 is a Maxout; only nn\.Linear layers"),
    ],
)
def test_models_that_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pretrain(model, torch.ones(4, 8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0, expected at least 1"),
        ({"lr": 0.0}, r"lr=0\.0, expected a positive number"),
        ({"lr": float("nan")}, "lr=nan, expected"),
        ({"batch_size": 0}, "batch_size=0, expected at least 1"),
        ({"noise": 1.0}, r"noise=1\.0, expected the share of inputs to set to 0"),
    ],
)
def test_options_that_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pretrain(deep(1), correlated(), **options)


def test_no_examples_and_divergence_are_told() -> None:
    with pytest.raises(InputError, match="pretrain: no examples"):
        pretrain(deep(1), torch.ones(0, 8, dtype=F64))
    with pytest.raises(NonFiniteError, match=r"error of 0\.0 is nan at lr=1e\+200; use a smaller lr"):
        pretrain(model := deep(1), correlated(), lr=1e200)
    assert all(module.training for module in model.modules())


def test_inputs_that_are_not_finite_are_named() -> None:
    x = correlated(9)
    x[4, 1] = torch.nan
    with pytest.raises(InputError, match="pretrain: example 4 of the inputs holds inf or nan"):
        pretrain(deep(1), x)


def test_it_learns_under_no_grad_too() -> None:
    first = deep(2)
    second, x = copy.deepcopy(first), correlated()
    errors = pretrain(first, x, epochs=2, generator=generator())
    with torch.no_grad():
        assert pretrain(second, x, epochs=2, generator=generator()) == errors


def test_initialize_then_pretrain_with_batch_norm_before_the_output() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), BatchNorm(6), nn.Linear(6, 1)).double()
    initialize(model, "he", generator=generator())
    errors = pretrain(model, correlated(), epochs=30, lr=0.01, generator=generator())
    assert errors["0"][-1] < errors["0"][0] / 2
