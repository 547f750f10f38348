"""What cannot be exact is refused, by name, with what to do instead; and nothing is changed by the attempt."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.reference import assert_rows_close, rows_by_grad
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rowgrad as rg
from rowgrad.errors import (
    ConsumedJacobianError,
    FreedGraphError,
    GraphError,
    HookedParameterError,
    NoGraphError,
    NonFiniteError,
    NotAVectorError,
    OpaqueGraphError,
    ParameterError,
    RowgradError,
    StaleJacobianError,
)
from rowgrad.rows import reading

ENTRIES: dict[str, Callable[..., Any]] = {
    "jacobian": rg.jacobian,
    "grad_norms": rg.grad_norms,
    "grad_rows": rg.grad_rows,
    "clipped_loss": lambda losses, params, **options: rg.clipped_loss(losses, params, 1.0, **options),
}
each_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64)


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1)


# -- losses ------------------------------------------------------------------------------------------------------------


@each_entry
def test_a_scalar_loss(entry: Callable, model: nn.Module, x: Tensor) -> None:
    with pytest.raises(NotAVectorError, match=r"scalar.*reduction=\"none\""):
        entry(losses_of(model, x).mean(), model)


@each_entry
def test_losses_of_two_dimensions(entry: Callable, model: nn.Module, x: Tensor) -> None:
    with pytest.raises(NotAVectorError, match=r"\(5, 2\).*per_example"):
        entry(model(x).square(), model)


@each_entry
def test_losses_that_are_no_tensor(entry: Callable, model: nn.Module, x: Tensor) -> None:
    with pytest.raises(NotAVectorError, match="list"):
        entry(list(losses_of(model, x)), model)


def test_complex_losses(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(NotAVectorError, match="complex128"):
        rg.jacobian(losses_of(model, x) * 1j, model)


@each_entry
def test_detached_losses(entry: Callable, model: nn.Module, x: Tensor) -> None:
    with pytest.raises(NoGraphError, match="detached"):
        entry(losses_of(model, x).detach(), model)


def test_losses_under_no_grad(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        losses = losses_of(model, x)
    with pytest.raises(NoGraphError, match="no_grad"):
        rg.jacobian(losses, model)


def test_losses_that_are_a_leaf(model: nn.Module) -> None:
    with pytest.raises(NoGraphError, match="leaf"):
        rg.jacobian(torch.ones(3, requires_grad=True), model)


@each_entry
def test_losses_from_inference_mode(entry: Callable, model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        losses = losses_of(model, x)
    with pytest.raises(NoGraphError, match="inference mode"):
        entry(losses, model)


@each_entry
def test_losses_without_values(entry: Callable, model: nn.Module, x: Tensor) -> None:
    with pytest.raises(NoGraphError, match="device meta"):
        entry(losses_of(model.to("meta"), x.to("meta")), model)


@each_entry
def test_a_freed_graph(entry: Callable, model: nn.Module, x: Tensor) -> None:
    losses = losses_of(model, x)
    losses.sum().backward()
    with pytest.raises(FreedGraphError, match="retain_graph=True"):
        entry(losses, model)


@each_entry
def test_a_graph_freed_by_the_call_before(entry: Callable, model: nn.Module, x: Tensor) -> None:
    losses = losses_of(model, x)
    rg.jacobian(losses, model)
    with pytest.raises(FreedGraphError, match="retain_graph=True"):
        entry(losses, model)


def test_a_graph_that_is_kept_can_be_read_again(model: nn.Module, x: Tensor) -> None:
    losses = losses_of(model, x)
    first = rg.jacobian(losses, model, retain_graph=True).dense()
    rg.grad_norms(losses, model, retain_graph=True)
    assert torch.equal(rg.jacobian(losses, model, retain_graph=True).dense(), first)
    losses.sum().backward()


@each_entry
def test_a_warning_points_to_the_line_that_asked(entry: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_warned", set())
    p = torch.randn(3, requires_grad=True)
    losses = (torch.randn(5, 3) * p).cumsum(0).square().sum(1)
    with pytest.warns(rg.RowgradWarning, match="no rule") as caught:
        entry(losses, [p])
    assert {w.filename for w in caught} == {__file__}


# -- parameters --------------------------------------------------------------------------------------------------------


@each_entry
def test_a_parameter_that_is_not_a_leaf(entry: Callable, model: nn.Module, x: Tensor) -> None:
    weight = 2 * model[0].weight
    with pytest.raises(ParameterError, match=r"head.*not a leaf.*MulBackward"):
        entry(F.linear(x, weight).square().sum(1), {"head": weight})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda p, w: [p, w], r"^params\[1\] is not a leaf: it was computed by MulBackward"),
        (lambda p, w: w, r"^params is not a leaf"),
        (lambda p, w: {"1": w}, r"^params\['1'\] is not a leaf"),
        (lambda p, w: [{"params": [p]}, {"params": [w]}], r"^group1\.0 is not a leaf"),
        (lambda p, w: [p, 2.0], r"^params\[1\] is a float, expected a tensor"),
        (lambda p, w: 3, r"^params is a int, expected a module, or an iterable or mapping of tensors"),
        (lambda p, w: "0.weight", r"^params is a str, expected a module"),
    ],
    ids=["a list", "a tensor", "a mapping", "groups", "a number in a list", "a number", "a name"],
)
def test_unnamed_parameters_are_pointed_at(params: Callable, message: str, model: nn.Module, x: Tensor) -> None:
    weight = 2 * model[0].weight
    with pytest.raises(ParameterError, match=message):
        rg.jacobian(F.linear(x, weight).square().sum(1), params(model[2].weight, weight))


@each_entry
def test_a_complex_parameter(entry: Callable, x: Tensor) -> None:
    w = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    with pytest.raises(ParameterError, match=r"w is complex.*view_as_real"):
        entry((x * w).abs().sum(1), {"w": w})


@each_entry
def test_parameters_of_another_model(entry: Callable, model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ParameterError, match=r"none of the 4 parameters is in the graph.*0\.weight"):
        entry(losses_of(model, x), copy.deepcopy(model))


def test_some_parameters_of_another_model_have_zero_rows(model: nn.Module, x: Tensor) -> None:
    params = {"mine": model[0].weight, "other": copy.deepcopy(model)[0].weight}
    rows = rg.jacobian(losses_of(model, x), params).dense(as_dict=True)
    assert not rows["other"].any()
    assert rows["mine"].any()


@each_entry
def test_no_parameter_to_train(entry: Callable, model: nn.Module, x: Tensor) -> None:
    losses = losses_of(model, x)
    for params in (copy.deepcopy(model).requires_grad_(False), [], {}):
        with pytest.raises(ParameterError, match="requires grad"):
            entry(losses, params)


@each_entry
def test_something_else_among_the_parameters(entry: Callable, model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ParameterError, match="scale is a float, expected a tensor"):
        entry(losses_of(model, x), {"weight": model[0].weight, "scale": 2.0})


def test_two_tensors_of_one_name(model: nn.Module, x: Tensor) -> None:
    pairs = [("w", model[0].weight), ("w", model[2].weight)]
    with pytest.raises(ParameterError, match="two different tensors are named 'w'"):
        rg.jacobian(losses_of(model, x), pairs)


@each_entry
def test_a_tensor_hook_on_a_parameter(entry: Callable, model: nn.Module, x: Tensor) -> None:
    handle = model[0].weight.register_hook(lambda g: 2 * g)
    with pytest.raises(HookedParameterError, match=r"0\.weight has 1 tensor hook"):
        entry(losses_of(model, x), model)
    handle.remove()
    entry(losses_of(model, x), model)


def test_a_hook_after_accumulation_sees_the_gradient(model: nn.Module, x: Tensor) -> None:
    """It changes no gradient that rows describe, and runs as it would after `losses.backward`."""
    seen: list[Tensor] = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    J = rg.jacobian(losses_of(model, x), model)
    assert seen == []
    J.backward(1.0)
    losses_of(model, x).sum().backward()
    torch.testing.assert_close(2 * seen[0], seen[1])


# -- graphs that hide something ----------------------------------------------------------------------------------------


@each_entry
def test_reentrant_checkpointing(entry: Callable, model: nn.Module, x: Tensor) -> None:
    h = checkpoint(model[:2], x.requires_grad_(), use_reentrant=True)
    with pytest.raises(OpaqueGraphError, match="use_reentrant=False"):
        entry(model[2](h).square().sum(1), model)


class HidesBackward(torch.autograd.Function):
    """A Function that recomputes its layer and runs `backward` on it, as some reversible nets do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.layer(x).backward(grad)
        return x.grad, None


@each_entry
@pytest.mark.parametrize("already", [False, True], ids=["no gradient yet", "a gradient there already"])
def test_a_function_that_runs_backward(entry: Callable, model: nn.Module, x: Tensor, already: bool) -> None:
    hidden = nn.Linear(4, 4).double()
    params = [*model.parameters(), *hidden.parameters()]
    if already:
        losses_of(nn.Sequential(model[:2], hidden, model[2]), x).sum().backward()
    before = [None if p.grad is None else p.grad.clone() for p in params]
    h = HidesBackward.apply(model[0](x).tanh(), hidden)
    with pytest.raises(OpaqueGraphError, match=r"backward\(\) inside its own backward"):
        entry(model[2](h).square().sum(1), params)
    for p, grad in zip(params, before, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)


# -- a Jacobian whose time is over -------------------------------------------------------------------------------------

PRODUCTS: dict[str, Callable[[rg.Jacobian], Any]] = {
    "norms": lambda J: J.norms(),
    "weighted_sum": lambda J: J.weighted_sum(1.0),
    "dot": lambda J: J.dot([torch.ones(4, 3), torch.ones(4), torch.ones(2, 4), torch.ones(2)]),
    "gram": lambda J: J.gram(),
    "dense": lambda J: J.dense(),
    "factors": lambda J: J.factors("0.weight"),
    "backward": lambda J: J.backward(1.0),
    "loss": lambda J: J.loss(1.0).backward(),
    "part": lambda J: J["0"].norms(),
}
each_product = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)


@each_product
def test_a_step_of_the_optimizer_makes_it_stale(product: Callable, model: nn.Module, x: Tensor) -> None:
    J = rg.jacobian(losses_of(model, x), model)
    losses_of(model, x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(StaleJacobianError, match=r"0\.weight was changed after this Jacobian was made"):
        product(J)


@each_product
def test_a_batch_filled_again_makes_it_stale(product: Callable, model: nn.Module, x: Tensor) -> None:
    J = rg.jacobian(losses_of(model, x), model)
    x.zero_()
    with pytest.raises(StaleJacobianError, match=r"the gradient of 0\.weight is made of was written to after"):
        product(J)


def test_a_batch_filled_again_before_a_clipped_step(model: nn.Module, x: Tensor) -> None:
    loss = rg.clipped_loss(losses_of(model, x), model, 1.0)
    x.zero_()
    with pytest.raises(StaleJacobianError, match="written to"):
        loss.backward()


def test_a_spent_one_watches_nothing(model: nn.Module, x: Tensor) -> None:
    J = rg.jacobian(losses_of(model, x), model)
    norms = J.norms()
    J.backward(1.0)
    assert J._watched == []
    x.zero_()
    assert torch.equal(J.norms(), norms)


def test_the_losses_are_its_own(model: nn.Module, x: Tensor) -> None:
    losses = losses_of(model, x)
    expected = losses.detach().clone()
    J = rg.jacobian(losses, model)
    with torch.no_grad():
        losses.zero_()
    J.losses.zero_()
    torch.testing.assert_close(J.losses, expected)
    torch.testing.assert_close(J.loss(1.0).detach(), expected.sum())


def test_norms_computed_before_a_step_survive_it(model: nn.Module, x: Tensor) -> None:
    J = rg.jacobian(losses_of(model, x), model)
    before = J.norms()
    J.backward(1.0)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(J.norms(), before)


def test_a_loss_made_before_a_step_cannot_be_used_after_it(model: nn.Module, x: Tensor) -> None:
    loss = rg.jacobian(losses_of(model, x), model).loss(1.0)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises((StaleJacobianError, RuntimeError), match=r"changed|modified"):
        loss.backward()


def test_a_weight_changed_between_forward_pass_and_call(model: nn.Module, x: Tensor) -> None:
    """Autograd itself refuses: the second layer's weight was saved for the first layer's gradient."""
    losses = losses_of(model, x)
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rg.jacobian(losses, model)


@pytest.mark.parametrize("product", [p for name, p in PRODUCTS.items() if name != "norms"])
def test_backward_uses_up_the_factors_but_not_the_norms(product: Callable, model: nn.Module, x: Tensor) -> None:
    J = rg.jacobian(losses_of(model, x), model)
    J.backward(1.0)
    assert J.norms().shape == (5,)
    with pytest.raises(ConsumedJacobianError, match="retain=True"):
        product(J)


@each_product
def test_the_backward_of_its_loss_uses_up_the_factors(product: Callable, model: nn.Module, x: Tensor) -> None:
    J = rg.jacobian(losses_of(model, x), model)
    J.loss(1.0).backward()
    with pytest.raises(ConsumedJacobianError, match="retain=True"):
        product(J)


def test_retained_factors_can_be_used_again(model: nn.Module, x: Tensor) -> None:
    J = rg.jacobian(losses_of(model, x), model)
    J.backward(1.0, retain=True)
    J.loss(1.0, retain=True).backward()
    first = [p.grad.clone() for p in model.parameters()]
    J.backward(1.0)
    torch.testing.assert_close([p.grad for p in model.parameters()], [1.5 * g for g in first])


# -- arguments ---------------------------------------------------------------------------------------------------------


V = torch.ones(4)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda J: J.backward(torch.ones(3)), ValueError, r"\(3,\), expected a number or \(5,\)"),
        (lambda J: J.weighted_sum(torch.ones(5, 1)), ValueError, r"\(5, 1\), expected a number or \(5,\)"),
        (lambda J: J.weighted_sum({"0": 1.0}), ValueError, r"no weights for 2\.weight"),
        (lambda J: J.weighted_sum({"nose": 1.0}), KeyError, r"nose.*is not among the parameters.*0\.weight"),
        (lambda J: J.dot([torch.ones(4, 3)]), ValueError, "1 tensors, expected 4"),
        (lambda J: J.dot({"0.weight": torch.ones(3, 4)}), ValueError, r"0\.weight has shape \(3, 4\).*\(4, 3\)"),
        (lambda J: J.dot({"0": torch.ones(3, 4)}), (ValueError, KeyError), "'0'"),
        (lambda J: J["nose"], KeyError, "nose"),
        (lambda J: J.norms("layer"), ValueError, "by='layer'"),
        (lambda J: J.norms({"a": ["nose"]}), KeyError, "nose"),
        (lambda J: J.factors("nose"), KeyError, "nose"),
        (lambda J: J.diag_gram(J[:2]), ValueError, "found 5 and 2"),
        (lambda J: J.gram(J["0"]), ValueError, "different parameters"),
        (lambda J: J.backward(1.0, nonfinite="ignore"), ValueError, "nonfinite='ignore'"),
        (lambda J: J.backward(1.0, transform=lambda name, Z: Z.sum(0)), ValueError, "transform"),
        (lambda J: J.dot(torch.ones(22)), ValueError, r"one tensor of shape \(22,\), expected .*4 parameters"),
        (lambda J: J.dot({"nose": torch.ones(2)}), KeyError, "nose' is not among the parameters"),
        (lambda J: J.dot({"0.bias": 1.0}), ValueError, r"0\.bias is a float, expected a tensor of shape \(4,\)"),
        (lambda J: J.dot(2.0), ValueError, "direction is a float"),
        (lambda J: J.dot({"0.bias": V, J._parameters.by_name["0.bias"]: V}), ValueError, r"0\.bias is given twice"),
        (lambda J: J[7], IndexError, r"J\[7\]: example 7 is not among the 5 examples"),
        (lambda J: J[-6], IndexError, "example -6 is not among the 5"),
        (lambda J: J[[0, 5]], IndexError, "example 5 is not among the 5"),
        (lambda J: J[1.5], IndexError, r"J\[1\.5\]: 1\.5 is no index.*whole numbers.*slice.*mask.*name"),
        (lambda J: J[torch.tensor(0.5)], IndexError, r"J\[tensor of torch\.float32, shape \(\)\]: .*whole numbers"),
        (lambda J: J[torch.ones(5, dtype=torch.uint8)], IndexError, r"uint8.*\.bool\(\)"),
        (lambda J: J[torch.ones(4, dtype=torch.bool)], IndexError, r"mask of shape \(4,\), expected \(5,\)"),
        (lambda J: J[[True, False]], IndexError, r"mask of shape \(2,\), expected \(5,\)"),
        (lambda J: J[True], IndexError, r"mask of shape \(\), expected \(5,\)"),
        (lambda J: J[None], IndexError, "None is no index"),
        (lambda J: J[2, "0.weight"], IndexError, r"one kind at a time, J\[\.\.\.\]\[\.\.\.\]"),
        (lambda J: J["0.weight", 2], IndexError, "one kind at a time"),
        (lambda J: J[0, 2], IndexError, r"J\[0, 2\]: a Jacobian has one index.*a list"),
        (lambda J: J["nose":], IndexError, "slice indices must be integers"),
        (lambda J: J[1.0:], IndexError, "slice"),
        (lambda J: J["nothing"], KeyError, r"nothing' is not among the parameters; known names start with: 0\.weight"),
        (lambda J: J.norms({"a": 3}), KeyError, "3 is not among the parameters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_do_not_fit(call: Callable, kind: Any, message: str, model: nn.Module, x: Tensor) -> None:
    J = rg.jacobian(losses_of(model, x), model)
    with pytest.raises(kind, match=message):
        call(J)
    assert J.norms().shape == (5,), "a refused call leaves the Jacobian usable"


def test_backward_needs_weights(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(TypeError, match="'c'"):
        rg.jacobian(losses_of(model, x), model).backward()  # type: ignore[call-arg]


def test_an_unknown_way_to_verify(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match="verify='never'"):
        rg.jacobian(losses_of(model, x), model, verify="never")


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_a_loss_scale_that_cannot_be_divided_out(scale: float, model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match="loss_scale"):
        rg.jacobian(losses_of(model, x), model, loss_scale=scale)


def test_non_finite_rows_on_the_way_to_the_optimizer(model: nn.Module, x: Tensor) -> None:
    x[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"1 of 5 examples.*example 3"):
        rg.jacobian(losses_of(model, x), model).backward(1.0)
    assert all(p.grad is None for p in model.parameters())


# -- all of them -------------------------------------------------------------------------------------------------------


def test_every_error_is_one_of_ours_and_tells_what_to_do(model: nn.Module, x: Tensor) -> None:
    losses = losses_of(model, x)
    for given in (losses.mean(), model(x), losses.detach()):
        with pytest.raises(RowgradError) as caught:
            rg.jacobian(given, model)
        assert isinstance(caught.value, GraphError)
        assert isinstance(caught.value, ValueError)
        assert re.search(r"Compute|Reduce|Pass|run", str(caught.value))


def test_a_refusal_changes_nothing(model: nn.Module, x: Tensor, leaves_nothing_behind: Any) -> None:
    losses = losses_of(model, x)
    for given, params in ((losses.mean(), model), (losses, copy.deepcopy(model)), (losses.detach(), model)):
        with leaves_nothing_behind(model, losses), pytest.raises(RowgradError, match=r"."):
            rg.jacobian(given, params)
    assert_rows_close(
        rg.jacobian(losses, model, retain_graph=True).dense(as_dict=True),
        rows_by_grad(losses, dict(model.named_parameters())),
    )
