"""check_gradients finds what is wrong with gradients, says where, and raises no alarm where nothing is."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.cases import CASES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rowgrad as rg
from rowgrad.checking.landscape import Landscape
from rowgrad.checking.precision import in_float64
from rowgrad.errors import (
    GraphError,
    NoGraphError,
    NonFiniteError,
    OpaqueGraphError,
    ParameterError,
    WrongGradientError,
)
from rowgrad.repeat import Repeated

Losses = Callable[[], Tensor]

# What is right passes

# Operations whose gradient is another thing than the derivative, by intent.
OTHER_THAN_DERIVATIVES = {
    "embedding renormalized",
    "embedding scaled by the frequency of ids in the batch",
    "weight quantized by fake quantization",
}
IN_FEWER_DIGITS_ALONE = {"experts in a grouped product"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in CASES if name not in IN_FEWER_DIGITS_ALONE])
def test_only_what_is_no_derivative_fails(name: str) -> None:
    setup = CASES[name].build()
    report = rg.check_gradients(setup.losses, setup.model, n=8, hold_detached=True)
    assert report.ok == (name not in OTHER_THAN_DERIVATIVES), str(report)


def images(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 2, 8, 8, generator=g)
    x[:, :, :2] = 0  # a border, as digits have
    return x, torch.randint(4, (6,), generator=g)


def tokens(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(20, (5, 7), generator=g), torch.randint(4, (5,), generator=g)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Last(nn.Module):
    def forward(self, x: tuple[Tensor, Any]) -> Tensor:
        return x[0][:, -1]


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def conv(*rest: nn.Module, act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *rest, act or nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))


def text(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(20, 8, padding_idx=0), *layers, nn.Linear(8, 4))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")


HEALTHY: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    "mlp, relu": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4)), images),
    "mlp, maxima": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.MaxPool1d(2), nn.LazyLinear(4)), images),
    "cnn, relu, max pooling": (lambda: conv(nn.ReLU(), nn.MaxPool2d(2)), images),
    "cnn, zero biases on a black border": (lambda: conv(nn.MaxPool2d(2)), images),
    "cnn, batchnorm, dropout": (lambda: conv(nn.BatchNorm2d(4), nn.Dropout(0.3)), images),
    "cnn, groupnorm, residual": (
        lambda: conv(Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()))),
        images,
    ),
    "cnn, instance norm": (lambda: conv(nn.InstanceNorm2d(4, affine=True)), images),
    "cnn, average pooling": (lambda: conv(nn.AdaptiveAvgPool2d(3)), images),
    "cnn, transposed": (lambda: conv(nn.ConvTranspose2d(4, 3, 3, stride=2)), images),
    "cnn, leaky relu": (lambda: conv(act=nn.LeakyReLU(0.1)), images),
    "cnn, hard tanh": (lambda: conv(act=nn.Hardtanh()), images),
    "cnn, hard swish": (lambda: conv(act=nn.Hardswish()), images),
    "cnn, prelu": (lambda: conv(act=nn.PReLU(4)), images),
    "cnn, weight norm": (lambda: conv(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))), images),
    "checkpointed": (
        lambda: Checkpointed(nn.Flatten(), nn.LazyLinear(8), nn.Dropout(), nn.ReLU(), nn.LazyLinear(4)),
        images,
    ),
    "embedding, mean": (lambda: text(Mean()), tokens),
    "lstm": (lambda: text(nn.LSTM(8, 8, batch_first=True), Last()), tokens),
    "gru, two layers, dropout": (lambda: text(nn.GRU(8, 8, 2, dropout=0.2, batch_first=True), Last()), tokens),
    "rnn, relu": (lambda: text(nn.RNN(8, 8, nonlinearity="relu", batch_first=True), Last()), tokens),
    "transformer": (lambda: text(encoder(), encoder(), Mean()), tokens),
}


def healthy(name: str, seed: int) -> tuple[nn.Module, Losses]:
    build, data = HEALTHY[name]
    torch.manual_seed(seed)
    model = build()
    x, y = data(seed)
    model(x)  # lazy layers
    if "zero biases" in name:
        for key, p in model.named_parameters():
            nn.init.zeros_(p) if key.endswith("bias") else None

    def losses() -> Tensor:
        return F.cross_entropy(model(x).flatten(1)[:, :4], y, reduction="none")

    return model, losses


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", HEALTHY)
def test_no_false_alarm(name: str, seed: int) -> None:
    model, losses = healthy(name, seed)
    report = rg.check_gradients(losses, model, n=20, generator=torch.Generator().manual_seed(seed))
    assert report.ok, str(report)
    assert sum(f.counts["ok"] for f in report.findings) > sum(len(f.probes) for f in report.findings) / 2, str(report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_is_checked_in_float64_and_compared_with_it(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(5, 6, dtype=dtype), torch.arange(5) % 3
    report = rg.check_gradients(lambda: F.cross_entropy(model(x), y, reduction="none"), model)
    assert report.ok, str(report)
    assert max(f.worst.rho for f in report.findings) < 1e-7
    largest = max(f.own_error for f in report.findings)
    assert largest <= 30 * torch.finfo(dtype).eps
    assert largest >= 0.01 * torch.finfo(dtype).eps or dtype == torch.float64


@pytest.mark.parametrize("form", ["autocast", "compiled"])
def test_autocast_and_compiled_models_pass(form: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    run = torch.compile(model, backend="aot_eager") if form == "compiled" else model
    x, y = torch.randn(5, 6), torch.arange(5) % 3

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if form == "autocast" else nullcontext():
            return F.cross_entropy(run(x), y, reduction="none")

    report = rg.check_gradients(losses, model, n=20)
    assert report.ok, str(report)
    assert all(f.own_error < (0.1 if form == "autocast" else 1e-5) for f in report.findings)


def test_a_penalty_on_the_gradient_passes() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), torch.randn(5, 4, requires_grad=True)

    def losses() -> Tensor:
        y = model(x).squeeze(1)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.square() + slope.norm(dim=1)

    assert rg.check_gradients(losses, model, n=10).ok


# What is wrong is found


class Spoiled(torch.autograd.Function):
    """The identity, with a backward that is wrong in a way that `how` tells."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: str) -> Tensor:
        ctx.how = how
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, None]:
        (z,) = cotangents
        if ctx.how == "one entry":
            z = z.clone()
            z.view(-1)[1234] *= 1.5
        found = {"by 8e-4": z * (1 + 8e-4), "lost": torch.zeros_like(z), "none": None, "opposite": -z}
        return found.get(ctx.how, z), None


class Net(nn.Module):
    """Convolutions with ReLU and max pooling; the spoiled operation stands between the two."""

    def __init__(self, how: str = "", where: str = "activation") -> None:
        super().__init__()
        self.how, self.where = how, where
        self.conv1, self.conv2, self.fc = nn.Conv2d(2, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.conv1(x)), 2)
        if self.how and self.where == "activation":
            h = Spoiled.apply(h, self.how)
        weight = Spoiled.apply(self.conv2.weight, self.how) if self.where == "weight" else self.conv2.weight
        h = F.relu(F.conv2d(h, weight, self.conv2.bias))
        return self.fc(h.flatten(1))


def spoiled(how: str, where: str = "activation") -> tuple[Net, Losses]:
    torch.manual_seed(0)
    model, (x, y) = Net(how, where), images(0)
    return model, lambda: F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize(
    ("how", "verdict"), [("by 8e-4", "wrong"), ("lost", "lost"), ("none", "lost"), ("opposite", "opposite")]
)
def test_a_wrong_backward_is_found_and_located(how: str, verdict: str) -> None:
    model, losses = spoiled(how)
    report = rg.check_gradients(losses, model)
    assert not report.ok
    assert [f.parameter for f in report.findings if not f.ok] == ["conv1.weight", "conv1.bias"]
    assert {f.worst.verdict for f in report.findings if not f.ok} == {verdict}
    (place,) = [note for note in report.notes if note.startswith("The fault lies")]
    assert "'after conv1: max_pool2d_with_indices': 'after conv1: spoiled'," in place


def test_a_right_backward_of_the_same_kind_passes() -> None:
    model, losses = spoiled("right")
    assert rg.check_gradients(losses, model).ok


def test_the_seeds_bound_for_relu_can_be_chosen() -> None:
    """1e-3 passes what is wrong by 8e-4, and so does PyTorch's own gradcheck."""
    model, losses = spoiled("by 8e-4")
    report = rg.check_gradients(losses, model, threshold=1e-3)
    assert report.ok
    assert report.findings[0].worst.rho == pytest.approx(4e-4, rel=1e-2)  # |1.0008 - 1| / |1.0008 + 1|
    x = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: Spoiled.apply(t, "by 8e-4"), x)


def test_one_wrong_entry_among_thousands_is_found_and_named() -> None:
    model, losses = spoiled("one entry", "weight")
    report = rg.check_gradients(losses, model)
    (finding,) = [f for f in report.findings if not f.ok]
    assert finding.parameter == "conv2.weight"
    assert finding.counts["wrong"] == 1
    sampled = sum(p.place is not None for p in finding.probes)
    wrong = list(np.unravel_index(1234, (32, 16, 3, 3)))
    (note,) = [note for note in report.notes if note.startswith("conv2.weight")]
    assert f"sampling {sampled} of 4608 entries meets a single wrong one with probability" in note
    assert f"{sampled / 4608:.2g}. Wrong at {list(map(int, wrong))}" in note
    assert "'conv2.weight': 'conv2: spoiled'" in report.notes[-1]


def test_a_fault_behind_a_skip_connection_is_located() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Residual(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))) for _ in range(6))
    x = torch.randn(4, 6)

    def losses() -> Tensor:
        h = x
        for k, block in enumerate(blocks):
            h = h + Spoiled.apply(torch.sin(block.inner(h)), "by 8e-4") if k == 3 else block(h)
        return h.square().sum(1)

    report = rg.check_gradients(losses, blocks, n=20)
    assert [f.ok for f in report.findings] == [name >= "4" for name, _ in blocks.named_parameters()]
    assert "'after 3.inner.2: sin': 'after 3.inner.2: spoiled'" in report.notes[-1]


def test_a_fault_beside_the_longest_path_is_located() -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"in": nn.Linear(3, 4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}), torch.randn(5, 3)

    def losses() -> Tensor:
        h = model["in"](x)
        long = model["b"](model["a"](h).tanh()).tanh()
        return (long + Spoiled.apply(h.sin(), "by 8e-4")).square().sum(1)

    report = rg.check_gradients(losses, model, n=20)
    assert [f.parameter for f in report.findings if not f.ok] == ["in.weight", "in.bias"]
    assert "'after in: sin': 'after in: spoiled'," in report.notes[-1]


def test_a_path_cut_by_detach_is_found_unless_it_is_held() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    x = torch.randn(5, 4)

    def losses() -> Tensor:
        y = model(x).squeeze(1)
        return (y - 0.9 * y.roll(1).detach()).square()

    report = rg.check_gradients(losses, model, n=10)
    assert not report.ok
    assert "outside of the graph (detach()" in report.notes[-1]
    assert rg.check_gradients(losses, model, n=10, hold_detached=True).ok


def test_a_parameter_that_no_path_reaches_is_lost_if_the_loss_depends_on_it() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "cut": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    x = torch.randn(4, 3)

    def losses() -> Tensor:
        return (model["used"](x) * model["cut"](torch.ones(2)).detach()).square().sum(1)

    report = rg.check_gradients(losses, model, n=20)
    assert {f.parameter: f.worst.verdict for f in report.findings if "cut" in f.parameter or not f.ok} == {
        "cut.weight": "lost",
        "cut.bias": "lost",
    }
    assert "before cut.weight: it changes the loss, but no path leads there" in report.notes[-1]
    assert any(r.startswith("idle.weight, idle.bias: no probe tells anything") for r in report.remarks)


def test_a_hook_that_changes_gradients_is_found() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), torch.randn(5, 4)

    def losses() -> Tensor:
        h = model[0](x)
        h.register_hook(lambda z: 1.01 * z)
        return model[2](model[1](h)).square().squeeze(1)

    report = rg.check_gradients(losses, model, n=10)
    assert [f.parameter for f in report.findings if not f.ok] == ["0.weight", "0.bias"]


class WrongInFewDigits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0] * (1 if cotangents[0].dtype == torch.float64 else 1.1)


def test_a_gradient_wrong_only_as_it_is_written_is_found() -> None:
    model, x = nn.Linear(4, 2), torch.randn(5, 4)
    report = rg.check_gradients(lambda: WrongInFewDigits.apply(model(x)).square().sum(1), model, n=10)
    assert not report.ok
    assert [f.counts["ok"] == len(f.probes) for f in report.findings] == [True, True]
    assert all(f.own_error == pytest.approx(0.1, rel=1e-3) for f in report.findings)
    assert (
        "in float32 as it is written (dtype, autocast, compilation) the gradient is off by 1.0e-01" in report.notes[0]
    )


def test_forward_differences_are_the_seeds() -> None:
    """Their error falls with the step alone: 1e-3 is allowed."""
    model, losses = spoiled("right")
    report = rg.check_gradients(losses, model, scheme="forward")
    assert report.ok, str(report)
    assert "forward differences" in report.title
    assert "1e-03" in report.allowed
    model, losses = spoiled("opposite")
    assert not rg.check_gradients(losses, model, scheme="forward").ok


# Kinks are no excuse


def test_a_kink_at_the_very_point_is_passed_beside_it() -> None:
    """Zero weights: every rectifier stands at zero, and backpropagation says 0 where half the slope is right."""
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.randn(4, 3)
    report = rg.check_gradients(lambda: F.relu(model(x)).sum(1) + model(x).square().sum(1), model)
    assert report.ok
    assert report.findings[0].counts["ok"] == len(report.findings[0].probes)


def test_what_is_wrong_at_a_kink_is_found_beside_it() -> None:
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.randn(4, 3)
    report = rg.check_gradients(lambda: F.relu(Spoiled.apply(model(x), "by 8e-4")).sum(1), model)
    assert not report.ok


def test_kinks_between_the_points_lead_to_smaller_steps() -> None:
    """Rectifiers that switch within 1e-5 bend the difference; the gradient is right, or wrong by 8e-4, all the same."""
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    kinks = torch.linspace(-1e-5, 1e-5, 4, dtype=torch.float64) + 1e-7

    def losses(how: str) -> Tensor:
        return F.relu(Spoiled.apply(w, how) - 1 - kinks).sum() + w.sin()

    report = rg.check_gradients(lambda: losses("right"), {"w": w}, n=1)
    assert report.ok
    assert report.findings[0].counts["ok"] == 2, str(report)
    assert dict(report.findings[0].probes[0].kinks)["relu"] > 0
    assert not rg.check_gradients(lambda: losses("by 8e-4"), {"w": w}, n=1).ok


@pytest.mark.parametrize("how", ["right", "by 8e-4"])
def test_kinks_everywhere_hide_nothing(how: str) -> None:
    """A rectifier switches every 2e-8: there are some between any two points, here and beside this one."""
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    kinks = 1 + torch.linspace(-2e-2, 2e-2, 2_000_000, dtype=torch.float64)
    report = rg.check_gradients(lambda: F.relu(Spoiled.apply(w, how) - kinks).mean(), {"w": w}, n=1)
    assert report.ok == (how == "right"), str(report)


def test_a_sharply_curved_loss_is_no_fault() -> None:
    w = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    report = rg.check_gradients(lambda: (1e3 * w).sin(), {"w": w}, n=1)
    assert report.ok
    assert report.findings[0].counts["ok"] == 2, str(report)


# Noise


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e-6])
def test_noise_is_measured(scale: float) -> None:
    w = torch.ones(5, dtype=torch.float64, requires_grad=True)

    def losses() -> Tensor:
        key = float(w.detach().sum())
        rng = np.random.default_rng(abs(hash(key)))
        return w.square() + scale / 5**0.5 * torch.from_numpy(rng.standard_normal(5))

    with in_float64(None, [w]):
        landscape = Landscape(Repeated(losses, None), {"w": w})
        noise = landscape.noise({"w": torch.full((5,), 0.4, dtype=torch.float64)})
    assert scale / 3 < noise < 3 * scale


def test_where_noise_hides_the_gradient_nothing_is_claimed() -> None:
    w = torch.full((3,), 1e-8, dtype=torch.float64, requires_grad=True)
    report = rg.check_gradients(lambda: 1e6 + 0 * w.sum() + 1e-9 * w.sum(), {"w": w}, n=3)
    assert report.ok
    assert report.findings[0].counts["blind"] == 4
    assert "no probe tells anything" in report.remarks[0]


def test_a_small_gradient_is_told_by_a_longer_step() -> None:
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    report = rg.check_gradients(lambda: 100 + 1e-6 * w.square().sum(), {"w": w}, n=3)
    assert report.findings[0].counts["ok"] == 4, str(report)


# Nothing is left behind


def test_all_is_as_before_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 1))
    x = torch.randn(5, 4)
    model(x).sum().backward()
    fail = False

    def losses() -> Tensor:
        if fail and torch.get_default_dtype() == torch.float64:
            raise KeyError("from the user's code")
        np.random.rand()  # noqa: NPY002
        return model(x).squeeze(1).square() * (1 + random.random())

    def state() -> list[Any]:
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
        return [torch.get_default_dtype(), random.getstate(), numpy_state, torch.get_rng_state().tolist()] + [
            (id(t), t.dtype, t.data_ptr(), t.tolist()) for t in tensors
        ]

    before = state()
    rg.check_gradients(losses, model, n=10)
    assert state() == before
    fail = True
    with pytest.raises(GraphError, match=r"does not run in float64 \(KeyError: .*from the user's code"):
        rg.check_gradients(losses, model, n=10)
    assert state() == before


def test_the_loss_of_a_model_with_randomness_is_checked_and_its_own_dtype_is_not() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 1)), torch.randn(5, 4)
    report = rg.check_gradients(lambda: model(x).squeeze(1).square(), model)
    assert report.ok
    assert "the closure draws random numbers, other ones in float32" in report.remarks[-1]


# Bad input


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.ones(2, 3)).square().sum(1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n": 0}, "n=0"),
        ({"n_directions": -1}, "n_directions=-1"),
        ({"scheme": "backward"}, "scheme='backward': expected one of 'central', 'forward'"),
        ({"threshold": 0}, "threshold=0"),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=text):
        rg.check_gradients(lambda: loss_of(model), model, **options)


def test_bad_closures() -> None:
    model = nn.Linear(3, 2)
    steps = iter(range(100))
    with pytest.raises(TypeError, match="closure is a Tensor"):
        rg.check_gradients(loss_of(model), model)  # pyright: ignore[reportArgumentType]
    with pytest.raises(GraphError, match="closure returned a float"):
        rg.check_gradients(lambda: 1.0, model)  # pyright: ignore[reportArgumentType]
    with pytest.raises(GraphError, match="other losses when it is run again, by up to"):
        rg.check_gradients(lambda: loss_of(model) * next(steps), model)
    with pytest.raises(NonFiniteError, match="2 of 2 losses are not finite"):
        rg.check_gradients(lambda: loss_of(model) / 0, model)
    with pytest.raises(NoGraphError, match="have no graph"):
        rg.check_gradients(lambda: loss_of(model).detach(), model)
    with pytest.raises(ParameterError, match="no tensor that requires grad"):
        rg.check_gradients(lambda: loss_of(model), nn.ReLU())


def test_a_closure_that_does_not_run_the_forward_pass_is_refused() -> None:
    model = nn.Linear(3, 2)
    losses = loss_of(model)
    with pytest.raises(GraphError, match="the same tensor twice: it has to run the forward pass each time"):
        rg.check_gradients(lambda: losses, model)


def test_a_check_is_the_first_thing_in_a_process() -> None:
    """NumPy may be loaded by the very forward pass that is checked."""
    program = """
import torch, rowgrad
model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
def closure():
    import numpy.random
    return model(x).square().sum(1)
assert rowgrad.check_gradients(closure, model, 4).ok
"""
    environment = dict(os.environ, PYTHONPATH=str(Path(rg.__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_reentrant_checkpointing_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), torch.randn(4, 6, requires_grad=True)

    def closure() -> Tensor:
        return checkpoint(model, x, use_reentrant=True).square().sum(1)

    for call in (
        lambda: rg.check_gradients(closure, model),
        lambda: rg.Graph(closure(), model),
        lambda: rg.diagnose(closure(), model),
    ):
        with pytest.raises(OpaqueGraphError, match=r"reentrant checkpointing hides .*use_reentrant=False"):
            call()


# The report, and checks during training


def test_the_report_in_plain_values() -> None:
    model, losses = spoiled("lost")
    done: list[tuple[int, int]] = []
    report = rg.check_gradients(losses, model, n=12, progress=lambda k, n: done.append((k, n)))
    assert done == [(k, 18) for k in range(1, 19)]
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["findings"][0] == {
        "parameter": "conv1.weight",
        "shape": [16, 2, 3, 3],
        "rho": 1.0,
        "place": "a direction",
        "backpropagation": 0.0,
        "differences": plain["findings"][0]["differences"],
        "verdicts": {"lost": 3},
        "own_error": 0.0,
        "ok": False,
    }
    assert str(report).splitlines()[0] == (
        "12 entries and 6 directions, central differences in float64: FAILED, rho up to 1e-06 allowed"
    )


def test_checks_during_training() -> None:
    model, losses = spoiled("right")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    checks = rg.GradientChecks(model, at=(0, 3), n=6)
    for step in range(5):
        checks(step, losses)
        optimizer.zero_grad()
        losses().mean().backward()
        optimizer.step()
    assert sorted(checks.reports) == [0, 3]
    places = [{(f.parameter, p.place) for f in r.findings for p in f.probes} for r in checks.reports.values()]
    assert places[0] != places[1]
    model.how = "opposite"
    with pytest.raises(WrongGradientError, match=r"step 0: 6 entries[^$]*opposite sign"):
        checks(0, losses)
    with pytest.warns(rg.RowgradWarning, match="opposite sign"):
        rg.GradientChecks(model, at=(0,), on_failure="warn")(0, losses)
    kept = rg.GradientChecks(model, at=(0,), on_failure="keep")
    kept(0, losses)
    assert not kept.reports[0].ok
    with pytest.raises(ValueError, match="on_failure='cry'"):
        rg.GradientChecks(model, on_failure="cry")
