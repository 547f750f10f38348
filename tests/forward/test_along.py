"""What jvp promises beside the numbers: what counts as constant, what is refused, and that nothing is left behind."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.reference import flat, rows_by_grad, trainable
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import rowgrad as rg
from rowgrad.errors import ForwardModeError, NoGraphError, NotAVectorError, OpaqueGraphError, ParameterError
from rowgrad.forward import along

Direction = dict[str, Tensor]


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64)


def direction_of(model: Any) -> Direction:
    return {name: torch.randn_like(p) for name, p in trainable(model).items()}


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1)


def expected(closure: Callable[[], Tensor], model: Any, v: Direction) -> Tensor:
    rows = rows_by_grad(closure(), trainable(model))
    return flat({name: rows[name] for name in v}) @ torch.cat([t.flatten() for t in v.values()])


def check(closure: Callable[[], Tensor], model: Any) -> None:
    v = direction_of(model)
    torch.testing.assert_close(rg.jvp(closure, model, v)[1], expected(closure, model, v), rtol=1e-10, atol=1e-12)


# -- what is given -----------------------------------------------------------------------------------------------------


def test_parameters_and_directions_as_everywhere(model: nn.Sequential, x: Tensor) -> None:
    v, params = direction_of(model), list(model.parameters())
    closure = lambda: losses_of(model, x)  # noqa: E731
    truth = expected(closure, model, v)
    optimizer = torch.optim.SGD(params, 0.1)
    for given, direction in [
        (model, v),
        (params, list(v.values())),
        (dict(model.named_parameters()), v),
        (optimizer.param_groups, list(v.values())),
        (model, {p: v[name] for name, p in model.named_parameters()}),
        (model, {name: nn.Parameter(t) for name, t in v.items()}),
    ]:
        losses, derivatives = rg.jvp(closure, given, direction)
        torch.testing.assert_close(derivatives, truth, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(losses, closure(), rtol=1e-14, atol=1e-15)
        assert not derivatives.requires_grad


def test_parameters_left_out_stand_still(model: nn.Sequential, x: Tensor) -> None:
    closure = lambda: losses_of(model, x)  # noqa: E731
    for names in [["2.bias"], ["0.weight", "2.weight"]]:
        v = {name: t for name, t in direction_of(model).items() if name in names}
        found = rg.jvp(closure, model, v)[1]
        torch.testing.assert_close(found, expected(closure, model, v), rtol=1e-10, atol=1e-12)
    assert torch.equal(rg.jvp(closure, model, {})[1], torch.zeros(5, dtype=torch.float64))


def test_a_direction_in_another_precision(model: nn.Sequential, x: Tensor) -> None:
    v = {name: t.float() for name, t in direction_of(model).items()}
    closure = lambda: losses_of(model, x)  # noqa: E731
    found = rg.jvp(closure, model, v)[1]
    assert found.dtype == torch.float64
    exact = expected(closure, model, {name: t.double() for name, t in v.items()})
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_one_tensor_under_two_names(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    check(lambda: losses_of(model, x), model)
    v = {"2.weight": torch.randn(3, 3, dtype=torch.float64)}
    found = rg.jvp(lambda: losses_of(model, x), model, v)[1]
    torch.testing.assert_close(
        found, rg.jvp(lambda: losses_of(model, x), model, {"0.weight": v["2.weight"]})[1], rtol=0, atol=0
    )


def test_other_parameters_may_be_trained(model: nn.Sequential, x: Tensor) -> None:
    v = direction_of(model)
    head = {name: t for name, t in v.items() if name.startswith("2.")}
    given = {name: p for name, p in model.named_parameters() if name.startswith("2.")}
    found = rg.jvp(lambda: losses_of(model, x), given, head)
    truth = expected(lambda: losses_of(model, x), model, head)
    torch.testing.assert_close(found[1], truth, rtol=1e-10, atol=1e-12)
    assert not found[0].requires_grad
    assert not found[1].requires_grad


def test_no_graph_is_recorded(model: nn.Sequential, x: Tensor) -> None:
    seen: list[bool] = []

    def closure() -> Tensor:
        losses = losses_of(model, x)
        seen.append(losses.requires_grad)
        return losses

    for _ in range(3):
        rg.jvp(closure, model, direction_of(model))
    assert seen == [False, True, False, False]  # the second checks the first


# -- what counts as constant -------------------------------------------------------------------------------------------


def test_no_grad_stops_tangents_as_it_stops_gradients(model: nn.Sequential, x: Tensor) -> None:
    def closure() -> Tensor:
        h = model[0](x)
        with torch.no_grad():
            scale = h.abs().mean(1, keepdim=True) + model[2](h.tanh()).sum(1, keepdim=True)
            both = torch.cat([scale, model.get_parameter("2.weight").sum().expand(5, 1)], 1).sum(1, keepdim=True)
        with torch.inference_mode():
            shift = h.sum(1, keepdim=True)
        return model[2](h * both + shift.clone()).square().sum(1)

    check(closure, model)


def test_what_is_written_in_place_under_no_grad(model: nn.Sequential, x: Tensor) -> None:
    def closure() -> Tensor:
        h = model[0](x)
        with torch.no_grad():
            same = h.mul_(2)
            h[:, 0] = 1
            h += 1
        assert same is h
        return model[2](h).square().sum(1)

    check(closure, model)


def test_enable_grad_within_no_grad(model: nn.Sequential, x: Tensor) -> None:
    def closure() -> Tensor:
        with torch.no_grad():
            a = model[0](x)
            with torch.enable_grad():
                h = model[0](x)
        return model[2](h * a).square().sum(1)

    check(closure, model)


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode], ids=str)
def test_called_where_gradients_are_off(outside: Callable[[], Any], model: nn.Sequential, x: Tensor) -> None:
    v = direction_of(model)
    with outside():
        found = rg.jvp(lambda: losses_of(model, x), model, v)[1]
        assert not torch.is_grad_enabled()
    truth = expected(lambda: losses_of(model, x), model, v)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


def test_detached_values_and_data_are_constant(model: nn.Sequential, x: Tensor) -> None:
    def closure() -> Tensor:
        h = model[0](x)
        k = model[0](x)
        W = model.get_parameter("2.weight")
        return (model[2](h * h.detach() + k * h.data) @ W.detach() @ W.data.T).square().sum(1)

    check(closure, model)
    with pytest.warns(rg.RowgradWarning, match=r"in place by detach_\(\), but by detach\(\)"):
        check(lambda: (model[2](model[0](x).detach_()) * model(x)).sum(1), model)


def test_attributes_of_parameters_are_their_own(model: nn.Sequential, x: Tensor) -> None:
    def closure() -> Tensor:
        W = model.get_parameter("0.weight")
        assert W.requires_grad
        assert W.is_leaf
        assert W.grad is None
        assert isinstance(W, nn.Parameter)
        return (x @ W.T @ W @ W.mT).square().sum(1) + model.get_parameter("2.bias").sum() * W.shape[0]

    check(closure, model)


def test_hooks_do_not_run(model: nn.Sequential, x: Tensor) -> None:
    def closure() -> Tensor:
        h = model[0](x)
        h.register_hook(lambda g: 2 * g).remove()
        h.retain_grad()
        return model[2](h).square().sum(1)

    check(closure, model)


def test_lists_and_mappings_of_parameters(x: Tensor) -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(3, 2, dtype=torch.float64)) for _ in range(3)])

    def closure() -> Tensor:
        W = torch.cat([*model], 1) + torch.stack(tuple(model)).sum() + torch.block_diag(*model)[:3]
        return torch.einsum("bi,ij->bj", x, W).square().sum(1) + sum((p.exp().mean() for p in model), 0.0)

    check(closure, model)


def test_functional_calls_and_checkpoints(model: nn.Sequential, x: Tensor) -> None:
    check(lambda: torch.func.functional_call(model, dict(model.named_parameters()), (x,)).square().sum(1), model)
    check(lambda: checkpoint(model, x, use_reentrant=False).square().sum(1), model)  # type: ignore[union-attr]


def test_compiled_models_run_as_written(model: nn.Sequential, x: Tensor) -> None:
    compiled: Any = torch.compile(model, backend="eager")
    compiled(x)
    check(lambda: compiled(x).square().sum(1), model)
    v = direction_of(model)
    found = rg.jvp(lambda: compiled(x).square().sum(1), compiled, v)[1]
    torch.testing.assert_close(found, expected(lambda: losses_of(model, x), model, v), rtol=1e-10, atol=1e-12)


def test_scripts_of_activations(model: nn.Sequential, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(nn.Sequential(nn.GELU(), nn.Sigmoid()))
    for _ in range(4):  # scripts are optimized from the second or third call on
        check(lambda: model[2](script(model[0](x))).square().sum(1), model)


def test_no_script_is_fused(model: nn.Sequential, x: Tensor) -> None:
    """A fused kernel takes numbers alone. Those for processors need a PyTorch built with LLVM, so look at the flag."""
    is_optimized: Callable[[], bool] = torch._C._get_graph_executor_optimize
    seen: list[bool] = []

    def closure() -> Tensor:
        seen.append(is_optimized())
        return losses_of(model, x)

    rg.jvp(closure, model, direction_of(model))
    assert seen == [False, True]  # the second checks the first
    assert is_optimized()


def test_batch_norm_updates_its_statistics_once(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    twin = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    twin.load_state_dict(model.state_dict())
    rg.jvp(lambda: losses_of(model, x), model, direction_of(model))
    losses_of(twin, x)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-14, atol=1e-15)
    assert forward_ad.unpack_dual(model[1].running_mean).tangent is None


# -- where the rows answer --------------------------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g * w, g * x


def _script(model: nn.Sequential, x: Tensor) -> Callable[[], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(model)
    return lambda: script(x).square().sum(1)


def _outside(model: nn.Sequential, x: Tensor) -> Callable[[], Tensor]:
    h = model[0](x)
    return lambda: model[2](h).square().sum(1)


HIDDEN: dict[str, Callable[[nn.Sequential, Tensor], Callable[[], Tensor]]] = {
    "script": _script,
    "custom function": lambda model, x: lambda: Scaled.apply(x[:, :2], model.get_parameter("2.bias")).square().sum(1),
    "outside": _outside,
}


@pytest.mark.filterwarnings("ignore:.*no rule for how the examples meet")
@pytest.mark.parametrize("kind", HIDDEN)
def test_parameters_out_of_sight(kind: str, model: nn.Sequential, x: Tensor) -> None:
    v = direction_of(model)
    with pytest.warns(rg.RowgradWarning, match="not those of a backward pass"):
        found = rg.jvp(HIDDEN[kind](model, x), model, v)[1]
    torch.testing.assert_close(found, expected(HIDDEN[kind](model, x), model, v), rtol=1e-10, atol=1e-12)


def test_reentrant_checkpoints_are_refused(model: nn.Sequential, x: Tensor) -> None:
    at = x.clone().requires_grad_()
    with pytest.raises(OpaqueGraphError, match="reentrant"), pytest.warns(rg.RowgradWarning):
        rg.jvp(lambda: checkpoint(model, at, use_reentrant=True).square().sum(1), model, direction_of(model))  # type: ignore[union-attr]


def test_operations_without_a_forward_derivative(model: nn.Sequential, x: Tensor) -> None:
    for closure, named in [
        (lambda: torch.cdist(model(x), model(x) + 1).sum(1), "_cdist_forward"),
        (lambda: Scaled.apply(model(x), x[:, :2]).sum(1), "custom autograd"),
    ]:
        v = direction_of(model)
        truth, told = expected(closure, model, v), []
        for _ in range(3):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = rg.jvp(closure, model, v)[1]
            told.append([str(w.message) for w in caught])
            torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)
        assert named in told[0][0]
        assert told[1:] == [[], []]
        with pytest.raises(ForwardModeError, match=rf'{named}(.|\n)*Leave verify="never" out'):
            rg.jvp(closure, model, v, verify="never")


def test_what_loses_tangents(model: nn.Sequential, x: Tensor) -> None:
    """No error tells of these: the check does."""
    index = torch.arange(2).expand(5, 2)

    def reduced() -> Tensor:
        return torch.ones(5, 2, dtype=x.dtype).scatter_reduce(1, index, model(x), "prod").sum(1) + losses_of(model, x)

    def slope() -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda q: losses_of(model, q[None])[0]))(x).square().sum(1) + losses_of(
            model, x
        )

    def hooked() -> Tensor:
        h = model[0](x)
        h.register_hook(lambda g: 2 * g)
        return model[2](h).square().sum(1)

    def constant_slope() -> Tensor:
        at = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(losses_of(model, at).sum(), at)
        return losses_of(model, x + g)

    for closure in (reduced, slope, constant_slope, hooked):
        with pytest.warns(rg.RowgradWarning, match="not those of a backward pass"):
            check(closure, model)


def test_a_closure_that_goes_on_to_the_next_batch(model: nn.Sequential) -> None:
    batches = iter(torch.randn(6, 5, 3, dtype=torch.float64))
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(next(batches))
        return losses_of(model, seen[-1])

    with pytest.warns(rg.RowgradWarning, match="other random numbers or data"):
        found = [rg.jvp(closure, model, v := direction_of(model))]
    truth = expected(lambda: losses_of(model, seen[-1]), model, v)
    torch.testing.assert_close(found[0][1], truth, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0][0], losses_of(model, seen[-1]).detach())
    rg.jvp(closure, model, v)
    assert len(seen) == 3  # from the second call on once


def test_other_errors_of_the_closure_are_its_own(model: nn.Sequential, x: Tensor) -> None:
    def unfinished() -> Tensor:
        raise NotImplementedError("attention over images")

    for _ in range(2):
        with pytest.raises(NotImplementedError, match="attention over images") as caught:
            rg.jvp(unfinished, model, direction_of(model))
        assert not isinstance(caught.value, rg.RowgradError)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        rg.jvp(lambda: losses_of(model, x[:, :2]), model, direction_of(model))
    check(lambda: losses_of(model, x), model)


# -- when it is checked ------------------------------------------------------------------------------------------------


def test_new_ways_through_a_closure_are_checked(model: nn.Sequential, x: Tensor) -> None:
    calls, way = [0], ["plain"]

    def closure() -> Tensor:
        calls[0] += 1
        losses = losses_of(model, x)
        if way[0] == "longer":
            losses = losses.exp().log()
        if way[0] == "wrong":
            y = torch.ones(5, 1, dtype=x.dtype)
            losses = y.scatter_reduce(1, torch.zeros(5, 1, dtype=torch.int64), losses[:, None], "prod").sum(1) + losses
        return losses

    check_calls: list[int] = []
    for name in ("plain", "plain", "longer", "longer", "plain", "wrong", "plain"):
        way[0], before = name, calls[0]
        v = direction_of(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rg.RowgradWarning)
            found = rg.jvp(closure, model, v)[1]
        check_calls.append(calls[0] - before)
        torch.testing.assert_close(found, expected(closure, model, v), rtol=1e-10, atol=1e-12)
    assert check_calls == [2, 1, 2, 1, 1, 2, 1]


def test_a_way_is_checked_again_now_and_then(model: nn.Sequential, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(along, "CHECK_EVERY", 3)
    calls: list[int] = []

    def closure() -> Tensor:
        calls[-1] += 1
        return losses_of(model, x)

    for _ in range(8):
        calls.append(0)
        rg.jvp(closure, model, direction_of(model))
    assert calls == [2, 1, 1, 2, 1, 1, 2, 1]
    for _ in range(2):
        calls.append(0)
        rg.jvp(closure, model, direction_of(model), verify="always")
    assert calls[-2:] == [2, 2]
    for _ in range(4):
        calls.append(0)
        rg.jvp(closure, model, direction_of(model), verify="never")
    assert calls[-4:] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"verify='no': expected"):
        rg.jvp(closure, model, direction_of(model), verify="no")


def test_numbers_in_another_precision_are_another_way(model: nn.Sequential, x: Tensor) -> None:
    calls, narrow, x = [0], model.float(), x.float()

    def closure() -> Tensor:
        calls[0] += 1
        return narrow(x).float().square().sum(1)

    seen = []
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            rg.jvp(closure, narrow, direction_of(narrow))
        seen.append(calls[0])
    assert seen == [2, 4, 5, 6]


def test_a_new_way_of_a_model_that_draws(x: Tensor) -> None:
    """It is not expected, so the random numbers at its start are not kept: the second pass answers for its own."""
    model, way, calls = nn.Sequential(nn.Linear(3, 40), nn.Dropout(0.5), nn.Linear(40, 2)).double(), ["plain"], [0]

    def closure() -> Tensor:
        calls[0] += 1
        losses = losses_of(model, x)
        return losses if way[0] == "plain" else losses.exp().log()

    seen = []
    for way[0] in ("plain", "plain", "longer", "longer", "longer"):
        v = direction_of(model)
        before = calls[0]
        losses, derivatives = rg.jvp(closure, model, v)
        seen.append(calls[0] - before)
        assert losses.isfinite().all()
        assert derivatives.isfinite().all()
    assert seen == [2, 1, 2, 2, 1]


def test_a_direction_that_sees_nothing_confirms_nothing(model: nn.Sequential, x: Tensor) -> None:
    """A custom Function loses the tangent of one bias, which does not move in the first calls."""
    calls = [0]

    def closure() -> Tensor:
        calls[0] += 1
        return Scaled.apply(model[0](x)[:, :2].detach(), model.get_parameter("2.bias")).sum(1) + losses_of(model, x)

    v = direction_of(model)
    still = {name: t * (name != "2.bias") for name, t in v.items()}
    part = {name: t for name, t in v.items() if name != "2.bias"}
    found = [rg.jvp(closure, model, given)[1] for given in (still, still, part, part)]
    assert calls == [2 + 2 + 2 + 1]
    for t in found:
        torch.testing.assert_close(t, expected(closure, model, part), rtol=1e-10, atol=1e-12)
    with pytest.warns(rg.RowgradWarning):
        check(closure, model)


def test_dropout_is_the_same_in_the_check(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(3, 40), nn.Dropout(0.5), nn.Linear(40, 2)).double()
    v = direction_of(model)
    torch.manual_seed(1)
    first = rg.jvp(lambda: losses_of(model, x), model, v)
    after = torch.rand(3)
    torch.manual_seed(1)
    truth = rows_by_grad(losses := losses_of(model, x), trainable(model))
    assert torch.equal(torch.rand(3), after)
    torch.testing.assert_close(first[0], losses.detach())
    torch.testing.assert_close(first[1], flat(truth) @ torch.cat([t.flatten() for t in v.values()]))


def test_values_that_are_not_finite_are_looked_at(x: Tensor) -> None:
    """The derivative of a saturated cross-entropy is 0, and nan by its forward formula."""
    model, scale = nn.Linear(3, 1), [1.0]
    x = x.float()

    def closure() -> Tensor:
        p = (model(x)[:, 0] * scale[0]).sigmoid()
        return F.binary_cross_entropy(p, (p > 0.5).float().detach(), reduction="none")

    for scale[0], verify in ((1.0, "cached"), (1e4, "cached"), (1e4, "always"), (1.0, "cached")):
        v = direction_of(model)
        rows = rows_by_grad(closure(), trainable(model))
        found = rg.jvp(closure, model, v, verify=verify)[1]
        torch.testing.assert_close(
            found.double(), flat(rows) @ torch.cat([t.flatten() for t in v.values()]).double(), rtol=1e-4, atol=1e-6
        )
    assert not along._known_of(closure, along.named(model)).by_rows


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_dual_numbers_in_use(model: nn.Sequential, x: Tensor) -> None:
    v = direction_of(model)
    with forward_ad.dual_level(), pytest.raises(ForwardModeError, match=r"in use already.*jvp inside another"):
        rg.jvp(lambda: losses_of(model, x), model, v)
    check(lambda: losses_of(model, x), model)


def test_what_is_no_vector_of_losses(model: nn.Sequential, x: Tensor) -> None:
    v = direction_of(model)
    with pytest.raises(TypeError, match=r"closure is a Tensor, expected a function"):
        rg.jvp(losses_of(model, x), model, v)  # type: ignore[arg-type]
    with pytest.raises(NotAVectorError, match=r"losses is a tuple"):
        rg.jvp(lambda: (losses_of(model, x), x), model, v)  # type: ignore[arg-type, return-value]
    with pytest.raises(NotAVectorError, match=r'scalar.*reduction="none"'):
        rg.jvp(lambda: losses_of(model, x).mean(), model, v)
    with pytest.raises(NotAVectorError, match=r"shape \(5, 2\)"):
        rg.jvp(lambda: model(x), model, v)
    with pytest.raises(NotAVectorError, match=r"torch\.int64"):
        rg.jvp(lambda: model(x).argmax(1), model, v)


def test_losses_that_depend_on_none(model: nn.Sequential, x: Tensor) -> None:
    v, other = direction_of(model), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    @torch.no_grad()
    def without() -> Tensor:
        return losses_of(model, x)

    with pytest.raises(ParameterError, match=r"none of the 4 parameters"), pytest.warns(rg.RowgradWarning):
        rg.jvp(lambda: losses_of(other, x), model, v)
    for closure in (without, lambda: losses_of(model, x).detach()):
        with pytest.raises(NoGraphError, match=r"no_grad"):
            rg.jvp(closure, model, v)
    unused = nn.ModuleList([model, nn.Linear(2, 2).double()])
    found = rg.jvp(lambda: losses_of(model, x), unused, {"1.weight": torch.randn(2, 2)})[1]
    assert torch.equal(found, torch.zeros(5, dtype=torch.float64))


def test_directions_that_do_not_fit(model: nn.Sequential, x: Tensor) -> None:
    closure = lambda: losses_of(model, x)  # noqa: E731
    with pytest.raises(KeyError, match="'head' is not among the parameters"):
        rg.jvp(closure, model, {"head": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"0\.bias has shape \(3,\), expected \(4,\)"):
        rg.jvp(closure, model, {"0.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"1 tensors, expected 4"):
        rg.jvp(closure, model, [torch.zeros(4)])


# -- what is left ------------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind(model: nn.Sequential, x: Tensor, leaves_nothing_behind: Callable) -> None:
    v = direction_of(model)
    kept: list[Tensor] = []

    def closure() -> Tensor:
        kept.append(model[0](x))
        return model[2](kept[-1]).square().sum(1)

    with leaves_nothing_behind(model, x, *v.values()):
        rg.jvp(closure, model, v)
    assert all(forward_ad.unpack_dual(h).tangent is None for h in kept)
    with leaves_nothing_behind(model, x), pytest.raises(NotAVectorError):
        rg.jvp(lambda: model(x), model, v)


def test_kernels_are_put_back_after_recurrent_layers() -> None:
    model = nn.LSTM(3, 4, batch_first=True).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    check(lambda: model(x)[0].square().sum((1, 2)), model)
    assert torch.backends.mkldnn.enabled  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.backends.cudnn.enabled


def test_threads_wait_for_one_another(model: nn.Sequential, x: Tensor) -> None:
    found: dict[int, Tensor] = {}
    vs = [direction_of(model) for _ in range(4)]

    def ask(i: int) -> None:
        for _ in range(20):
            found[i] = rg.jvp(lambda: losses_of(model, x), model, vs[i])[1]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, v in enumerate(vs):
        truth = expected(lambda: losses_of(model, x), model, v)
        torch.testing.assert_close(found[i], truth, rtol=1e-10, atol=1e-12)


def test_an_empty_batch(model: nn.Sequential, x: Tensor) -> None:
    losses, derivatives = rg.jvp(lambda: losses_of(model, x[:0]), model, direction_of(model))
    assert losses.shape == derivatives.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype, model: nn.Sequential, x: Tensor) -> None:
    v = direction_of(model)
    truth = expected(lambda: losses_of(model, x), model, v)
    narrow = model.to(dtype)
    found = rg.jvp(
        lambda: F.mse_loss(narrow(x.to(dtype)), torch.zeros(5, 2, dtype=dtype), reduction="none").sum(1), narrow, v
    )[1]
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), truth, rtol=0, atol=30 * torch.finfo(dtype).eps * float(truth.abs().max())
    )
