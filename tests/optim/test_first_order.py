"""Momentum, AdaGrad, RMSProp and decay as Aggarwal 2018 prints them, by hand and against PyTorch's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.optim.problems import F64
from torch import Tensor, nn

from rowgrad.errors import GraphError, InputError
from rowgrad.optim import AdaGrad, ConjugateGradient, Momentum, Newton, RMSProp, decay, make, weight_groups
from rowgrad.optim.factory import OPTIMIZERS, SECOND_ORDER

Array = np.ndarray
START = np.array([1.0, -2.0, 0.5])
SCALES = np.array([1.0, 4.0, 0.1])


def gradient(w: Array) -> Array:
    """Of the sum of s w^2 + w^4 / 4."""
    return 2 * SCALES * w + w**3


def trained(
    make_optimizer: Callable[[list[nn.Parameter]], Any],
    n: int,
    rate: Callable[[int], float] | None = None,
) -> tuple[Tensor, Any]:
    w = nn.Parameter(torch.from_numpy(START.copy()))
    optimizer = make_optimizer([w])
    for t in range(n):
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate(t)
        w.grad = torch.from_numpy(gradient(w.detach().numpy()))
        optimizer.step()
    return w.detach(), optimizer


def at_weights(w: Tensor, optimizer: Any) -> Array:
    with optimizer.at_weights():
        return w.numpy().copy()


def falling(t: int) -> float:
    return 0.05 / (1 + 0.3 * t)


# The equations, step by step in NumPy


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_momentum_as_it_is_printed(beta: float) -> None:
    """V <- beta V - alpha grad L(W), W <- W + V, with a rate that changes."""
    W, V = START.copy(), np.zeros(3)
    for t in range(12):
        V = beta * V - falling(t) * gradient(W)
        W = W + V
    w, _ = trained(lambda params: Momentum(params, beta=beta), 12, falling)
    np.testing.assert_allclose(w.numpy(), W, rtol=1e-12)


def test_nesterov_momentum_as_it_is_printed() -> None:
    """V <- beta V - alpha grad L(W + beta V), W <- W + V; between steps the parameters stand at W + beta V."""
    W, V, beta = START.copy(), np.zeros(3), 0.9
    for t in range(12):
        V = beta * V - falling(t) * gradient(W + beta * V)
        W = W + V
    w, optimizer = trained(lambda params: Momentum(params, beta=beta, nesterov=True), 12, falling)
    np.testing.assert_allclose(at_weights(w, optimizer), W, rtol=1e-12)
    np.testing.assert_allclose(w.numpy(), W + beta * V, rtol=1e-12)


@pytest.mark.parametrize("eps_inside", [True, False])
def test_eqs_15_and_16_adagrad(eps_inside: bool) -> None:
    W, A, eps = START.copy(), np.zeros(3), 0.1
    for _ in range(12):
        g = gradient(W)
        A = A + g**2  # (15)
        W = W - 0.3 * g / (np.sqrt(A + eps) if eps_inside else np.sqrt(A) + eps)  # (16)
    w, _ = trained(lambda params: AdaGrad(params, 0.3, eps=eps, eps_inside=eps_inside), 12)
    np.testing.assert_allclose(w.numpy(), W, rtol=1e-12)


@pytest.mark.parametrize("eps_inside", [True, False])
def test_eq_17_rmsprop(eps_inside: bool) -> None:
    W, A, eps, rho = START.copy(), np.zeros(3), 0.1, 0.8
    for _ in range(12):
        g = gradient(W)
        A = rho * A + (1 - rho) * g**2  # (17)
        W = W - 0.1 * g / (np.sqrt(A + eps) if eps_inside else np.sqrt(A) + eps)
    w, _ = trained(lambda params: RMSProp(params, 0.1, rho=rho, eps=eps, eps_inside=eps_inside), 12)
    np.testing.assert_allclose(w.numpy(), W, rtol=1e-12)


def test_eq_18_rmsprop_with_nesterov_momentum() -> None:
    """Both v and A take the gradient at W + beta V."""
    W, V, A, eps, rho, beta = START.copy(), np.zeros(3), np.zeros(3), 1e-8, 0.8, 0.7
    with_own_gradient = np.zeros(3)  # what A would be from gradients at W
    for _ in range(12):
        with_own_gradient = rho * with_own_gradient + (1 - rho) * gradient(W) ** 2
        g = gradient(W + beta * V)
        A = rho * A + (1 - rho) * g**2  # (18)
        V = beta * V - 0.1 * g / np.sqrt(A + eps)
        W = W + V
    w, optimizer = trained(lambda params: RMSProp(params, 0.1, rho=rho, beta=beta), 12)
    np.testing.assert_allclose(at_weights(w, optimizer), W, rtol=1e-12)
    state = next(iter(optimizer.state.values()))
    np.testing.assert_allclose(state["A"].numpy(), A, rtol=1e-12)
    assert np.abs(A / with_own_gradient - 1).max() > 0.1


# Against PyTorch's


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_equals_that_of_torch_at_a_constant_rate_only(nesterov: bool) -> None:
    ours, theirs = (
        lambda params: Momentum(params, 0.05, beta=0.9, nesterov=nesterov),
        lambda params: torch.optim.SGD(params, 0.05, momentum=0.9, nesterov=nesterov),
    )
    torch.testing.assert_close(trained(ours, 20)[0], trained(theirs, 20)[0], rtol=1e-10, atol=1e-12)
    apart = trained(ours, 20, falling)[0] - trained(theirs, 20, falling)[0]
    assert float(apart.abs().max()) > 1e-2


def test_epsilon_outside_is_that_of_torch() -> None:
    pairs: list[tuple[Any, Any]] = [
        (
            lambda p: AdaGrad(p, 0.3, eps=0.1, eps_inside=False),
            lambda p: torch.optim.Adagrad(p, 0.3, eps=0.1),
        ),
        (
            lambda p: RMSProp(p, 0.1, rho=0.8, eps=0.1, eps_inside=False),
            lambda p: torch.optim.RMSprop(p, 0.1, alpha=0.8, eps=0.1),
        ),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(trained(ours, 12)[0], trained(theirs, 12)[0])


def test_weight_decay_is_that_of_torch() -> None:
    for nesterov in (False, True):
        ours = trained(lambda p, n=nesterov: Momentum(p, 0.05, beta=0.9, nesterov=n, weight_decay=0.3), 9)[0]
        theirs = trained(lambda p, n=nesterov: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=n, weight_decay=0.3), 9)[
            0
        ]
        torch.testing.assert_close(ours, theirs)


# The shifted place


def test_the_weights_come_back_bit_for_bit() -> None:
    w, optimizer = trained(lambda params: Momentum(params, 0.05, nesterov=True), 3)
    before = w.clone()
    with optimizer.at_weights():
        assert not torch.equal(w, before)
        once = w.clone()
        with optimizer.at_weights():  # twice does no more
            assert torch.equal(w, once)
    assert torch.equal(w, before)
    with pytest.raises(ZeroDivisionError), optimizer.at_weights():
        raise ZeroDivisionError
    assert torch.equal(w, before)


def test_a_look_at_the_weights_changes_no_later_step() -> None:
    ends = []
    for is_looked_at in (False, True):
        w, optimizer = trained(lambda params: Momentum(params, 0.05, nesterov=True), 3)
        if is_looked_at:
            at_weights(w, optimizer)
        optimizer.step()
        ends.append(w.clone())
    assert torch.equal(*ends)


def test_no_step_is_taken_where_it_would_be_undone() -> None:
    w, optimizer = trained(lambda params: Momentum(params, 0.05, nesterov=True), 3)
    with optimizer.at_weights():
        with optimizer.at_weights():
            pass
        with pytest.raises(InputError, match=r"Momentum.step inside at_weights\(\), .* take steps outside the block"):
            optimizer.step()
    before = w.clone()
    optimizer.step()
    assert not torch.equal(w, before)


@pytest.mark.parametrize("set_later", [False, True], ids=["by group", "set later"])
def test_friction_of_a_group_or_a_schedule_is_nesterovs(set_later: bool) -> None:
    """As with the friction given at the start."""
    expected, _ = trained(lambda params: RMSProp(params, 0.1, beta=0.7), 6)

    def method(params: list[nn.Parameter]) -> RMSProp:
        if not set_later:
            return RMSProp([{"params": params, "beta": 0.7}], 0.1)
        optimizer = RMSProp(params, 0.1)
        optimizer.param_groups[0]["beta"] = 0.7
        return optimizer

    assert torch.equal(trained(method, 6)[0], expected)


@pytest.mark.parametrize(
    ("method", "option", "said"),
    [
        (Momentum, {"beta": 1.5}, r"Momentum: beta=1\.5, expected a number from 0 to below 1"),
        (Momentum, {"lr": -1.0}, r"Momentum: lr=-1\.0, expected a number of at least 0"),
        (Momentum, {"weight_decay": "a"}, "Momentum: weight_decay='a'"),
        (AdaGrad, {"eps": math.nan}, "AdaGrad: eps=nan"),
        (RMSProp, {"rho": None}, "RMSProp: rho=None"),
        (Newton, {"damping": -1.0}, r"Newton: damping=-1\.0"),
        (ConjugateGradient, {"tol": math.inf}, "ConjugateGradient: tol=inf"),
        (ConjugateGradient, {"n": 0}, "ConjugateGradient: n=0, expected at least 1"),
        (ConjugateGradient, {"n": 1.5}, r"ConjugateGradient: n=1\.5, expected at least 1"),
        (ConjugateGradient, {"delta": 0.0}, r"ConjugateGradient: delta=0\.0, expected None or a positive number"),
        (ConjugateGradient, {"delta": math.nan}, "ConjugateGradient: delta=nan"),
    ],
)
def test_options_are_checked_for_all_and_by_group(
    method: Callable[..., Any], option: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        method([nn.Parameter(torch.ones(2))], **option)
    with pytest.raises(InputError, match=said):
        method([{"params": [nn.Parameter(torch.ones(2))], **option}])


@pytest.mark.parametrize("dtype", [torch.float16, F64])
@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize("method", [AdaGrad, RMSProp])
def test_a_gradient_of_0_moves_nothing(method: Callable[..., Any], eps_inside: bool, dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.ones(3, dtype=dtype))
    eps = {} if dtype is torch.float16 else {"eps": 0.0}
    optimizer = method([w], 0.5, eps_inside=eps_inside, **eps)
    for _ in range(2):
        w.grad = torch.tensor([0.0, 1.0, 0.0 if dtype is F64 else 1e-5], dtype=dtype)  # its square is 0 in float16
        optimizer.step()
    assert w[0] == w[2] == 1
    assert float(w.detach()[1]) < 0.9


def test_a_loss_falls_in_an_ordinary_loop_with_a_closure() -> None:
    w = nn.Parameter(torch.tensor([3.0, -2.0], dtype=F64))
    optimizer = RMSProp([w], 0.05, beta=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(100)]
    assert losses[0] == 13
    assert losses[-1] < 0.02


@pytest.mark.parametrize(
    "method",
    [
        lambda p: Momentum(p, 0.05, nesterov=True),
        lambda p: AdaGrad(p, 0.3),
        lambda p: RMSProp(p, 0.1, beta=0.5),
    ],
    ids=["nesterov", "adagrad", "rmsprop"],
)
def test_a_run_goes_on_from_its_state_dict(method: Callable[..., Any]) -> None:
    expected, _ = trained(method, 8)
    w, optimizer = trained(method, 5)
    resumed = nn.Parameter(w.clone())
    other = method([resumed])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        resumed.grad = torch.from_numpy(gradient(resumed.detach().numpy()))
        other.step()
    assert torch.equal(resumed.detach(), expected)


def test_parameters_without_a_gradient_stay() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    used.square().sum().backward()
    optimizer = Momentum([used, unused], 0.1, nesterov=True)
    optimizer.step()
    with optimizer.at_weights():
        assert unused.tolist() == [1, 1]
    assert used.tolist() != [1, 1]


def test_bad_options_and_sparse_gradients() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(InputError, match=r"Momentum: beta=1.0, expected a number from 0 to below 1"):
        Momentum([w], beta=1.0)
    with pytest.raises(InputError, match=r"RMSProp: rho=-0\.1"):
        RMSProp([w], rho=-0.1)
    with pytest.raises(InputError, match="AdaGrad: lr=nan, expected a number of at least 0"):
        AdaGrad([w], math.nan)
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(GraphError, match=r"Momentum: a sparse gradient of shape \(4, 2\); use torch.optim.SGD"):
        Momentum(table.parameters()).step()


# Rates


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("exponential", lambda a, k, t: a * math.exp(-k * t)),
        ("inverse", lambda a, k, t: a / (1 + k * t)),
    ],
)
def test_decay_as_it_is_printed(kind: str, formula: Callable[[float, float, int], float]) -> None:
    w = nn.Parameter(torch.ones(1))
    optimizer = Momentum([w], 0.5)
    schedule = decay(optimizer, kind, k=0.3)
    for t in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(formula(0.5, 0.3, t), rel=1e-14)
        optimizer.step()
        schedule.step()


def test_exponential_decay_is_that_of_torch() -> None:
    rates = []
    for build in (
        lambda o: decay(o, "exponential", k=0.2),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, math.exp(-0.2)),
    ):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.5)
        schedule = build(optimizer)
        for _ in range(7):
            optimizer.step()
            schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)


def test_a_schedule_goes_on_from_its_state_dict() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.5)
    first = decay(optimizer, "inverse", k=0.3)
    for _ in range(3):
        optimizer.step()
        first.step()
    second = decay(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.5), "inverse", k=99.0)
    second.load_state_dict(first.state_dict())
    second.optimizer.step()
    second.step()
    assert second.get_last_lr() == pytest.approx([0.5 / (1 + 0.3 * 4)])


def test_what_cannot_decay() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(InputError, match=r"decay: kind='linear', expected one of: exponential, inverse"):
        decay(Momentum([w]), "linear", 0.1)
    with pytest.raises(InputError, match="decay: k=-1"):
        decay(Momentum([w]), "inverse", -1)
    with pytest.raises(InputError, match="decay: k='a', expected a number of at least 0"):
        decay(Momentum([w]), "inverse", "a")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Newton has no learning rate"):
        decay(make("newton", [w]), "inverse", 0.1)


# Weights alone


class Mixed(nn.Module):
    """A convolution, norms of one and of two dimensions, a bilinear layer, an embedding and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.batch = nn.BatchNorm2d(2)
        self.layer = nn.LayerNorm([4, 4])
        self.rms = nn.RMSNorm(4)
        self.recurrent = nn.GRU(4, 3)
        self.table = nn.Embedding(5, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.bias = nn.Parameter(torch.zeros(2, 2))


def test_biases_and_norms_do_not_decay() -> None:
    model = Mixed()
    weights, others = weight_groups(model, 0.1)
    assert [name for name, _ in weights["params"]] == [
        "conv.weight",
        "recurrent.weight_ih_l0",
        "recurrent.weight_hh_l0",
        "table.weight",
    ]
    assert (weights["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(weights["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_the_magnitude_of_a_weight_norm_does_not_decay(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(wrap(nn.Linear(3, 4)))
    weights, others = weight_groups(model, 0.1)
    assert [p.shape for _, p in weights["params"]] == [(4, 3)]
    assert sorted(p.shape for _, p in others["params"]) == [(4,), (4, 1)]


def test_with_no_gradient_only_weights_shrink() -> None:
    model = Mixed()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make("sgd", model, lr=0.5, weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    shrunk = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert shrunk == {"conv.weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "table.weight"}
    torch.testing.assert_close(model.conv.weight.detach(), 0.95 * before["conv.weight"])


def test_plain_tensors_decay_by_their_dimensions() -> None:
    params = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    assert [len(group["params"]) for group in weight_groups(iter(params), 0.1)] == [1, 1]
    assert [group["weight_decay"] for group in weight_groups(params[1:], 0.1)] == [0.0]


# By name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_name_makes_an_optimizer_that_lowers_a_loss(name: str) -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(10, 3, dtype=F64)
    y = x[:, :2]
    optimizer = make(name, model, **({} if name in SECOND_ORDER else {"lr": 0.01}))

    def losses() -> Tensor:
        return (model(x) - y).square().mean(1)

    before = float(losses().mean().detach())
    for _ in range(5):
        if name in SECOND_ORDER:
            optimizer.step(losses if name == "gauss-newton" else lambda: losses().mean())
        else:
            optimizer.zero_grad()
            losses().mean().backward()
            optimizer.step()
    assert float(losses().mean().detach()) < before


def test_names_and_options_reach_the_optimizer() -> None:
    model = nn.Linear(3, 2)
    assert type(make("adam", model)) is torch.optim.Adam
    assert make("adam", model, 0.3).param_groups[0]["lr"] == 0.3
    assert make("adam", model).param_groups[0]["lr"] == 1e-3
    assert make("nesterov", model).param_groups[0]["nesterov"] is True
    assert make("rmsprop-nesterov", model).param_groups[0]["beta"] == 0.9
    assert make("rmsprop-nesterov", model, eps_inside=False).param_groups[0]["eps_inside"] is False
    assert type(make("rmsprop", model)) is torch.optim.RMSprop
    assert type(make("rmsprop", model, eps_inside=False)) is torch.optim.RMSprop
    assert type(make("rmsprop", model, eps_inside=True, rho=0.5)) is RMSProp
    assert type(make("adagrad", model, eps_inside=True)) is AdaGrad
    assert make("lbfgs", model, max_eval=7).param_groups[0]["max_eval"] == 7


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (["sgd"], {}, r"optimizer \['sgd'\]: expected one of: sgd, momentum"),
        ("sgd", {"lr": math.nan}, "sgd: lr=nan, expected a finite number"),
        ("sgd", {"momentum": math.nan}, "sgd: momentum=nan, expected a finite number"),
        ("momentum", {"lr": "0.1"}, r"momentum: lr='0\.1', expected a finite number"),
        ("adam", {"lr": -1.0}, r"adam refuses lr=-1\.0, .*: Invalid learning rate: -1"),
        (
            "adam",
            {"betas": (0.9, 1.5)},
            r"adam refuses betas=\(0\.9, 1\.5\).*: Invalid beta parameter at index 1",
        ),
        ("sgd", {"nesterov": True}, "sgd refuses nesterov=True.*: Nesterov momentum requires a momentum"),
        ("nesterov", {"nesterov": False}, "nesterov: nesterov=False; for momentum without it make 'momentum'"),
        ("adamw", {"weight_decay": "a"}, "weight_decay='a', expected a number of at least 0"),
    ],
)
def test_what_cannot_be_made(name: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make(name, nn.Linear(3, 2), **options)


def test_the_default_decay_of_adamw_is_on_weights_too() -> None:
    assert [group["weight_decay"] for group in make("adamw", nn.Linear(3, 2)).param_groups] == [0.01, 0.0]


def test_groups_are_left_as_they_are() -> None:
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = make("sgd", [{"params": [a], "lr": 0.2}, {"params": [b]}], lr=0.1, weight_decay=0.3)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.2, 0.3), (0.1, 0.3)]


def test_wrong_names_and_options_say_what_there_is() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"optimizer 'Adam': expected one of: sgd, momentum, .*gauss-newton"):
        make("Adam", model)
    with pytest.raises(InputError, match=r"momentum has no option 'dampening'; it has: lr, beta, nesterov"):
        make("momentum", model, dampening=0.1)
    with pytest.raises(InputError, match="newton has no option 'lr'; it has: damping"):
        make("newton", model, lr=0.1)
    with pytest.raises(InputError, match="bfgs has no option 'weight_decay'; it has: curvature"):
        make("bfgs", model, weight_decay=0.1)
    with pytest.raises(InputError, match="adam has no option 'eps_inside'"):
        make("adam", model, eps_inside=True)
    with pytest.raises(InputError, match=r"rmsprop has no option 'rho'; it has: lr, alpha, .*eps_inside"):
        make("rmsprop", model, rho=0.1)
