"""The check for leftovers finds each kind of leftover, and nothing where there is none."""

import random
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType

import numpy as np
import pytest
import torch
from torch import nn


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), head=nn.Linear(4, 1)))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.fc.sizes = [3, 4]
    return model


def ignore(*_: object) -> None:
    """A hook that changes nothing."""


def losses_of(model: nn.Module) -> torch.Tensor:
    return model(torch.randn(5, 3)).square().squeeze(1)


def write_values(model: nn.Module) -> None:
    model.fc.weight.data[0, 0] += 1e-3


def write_same_values(model: nn.Module) -> None:
    with torch.no_grad():
        model.fc.weight.mul_(1)


def accumulate_node(model: nn.Module) -> torch.autograd.graph.Node:
    return model.fc.weight.view_as(model.fc.weight).grad_fn.next_functions[0][0]


ON_A_MODEL: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    # what is left: (code that leaves it, what the message names)
    "forward hook": (lambda m: m.fc.register_forward_hook(ignore), "hook <function ignore"),
    "forward pre-hook": (lambda m: m.fc.register_forward_pre_hook(ignore), "hook <function ignore"),
    "backward hook": (lambda m: m.fc.register_full_backward_hook(ignore), "hook <function ignore"),
    "backward pre-hook": (lambda m: m.register_full_backward_pre_hook(ignore), "hook <function ignore"),
    "state_dict hook": (lambda m: m.register_state_dict_post_hook(ignore), "hook <function ignore"),
    "hook without a handle": (lambda m: m.fc._forward_hooks.update({-1: ignore}), r"fc\._forward_hooks"),
    "tensor hook on a parameter": (lambda m: m.fc.weight.register_hook(ignore), r"fc\.weight\.hooks"),
    "post-accumulate hook": (lambda m: m.fc.weight.register_post_accumulate_grad_hook(ignore), "after accumulation"),
    "attribute of a module": (lambda m: setattr(m.fc, "rows", 1), r"fc\.rows: was absent, is 1"),
    "attribute of a parameter": (lambda m: setattr(m.fc.weight, "row", 1), r"fc\.weight\.row: was absent"),
    "attribute removed": (lambda m: delattr(m.fc, "sizes"), r"fc\.sizes"),
    "attribute appended to": (lambda m: m.fc.sizes.append(5), r"fc\.sizes"),
    "forward replaced": (lambda m: setattr(m, "forward", MethodType(ignore, m)), r"\.forward"),
    "module replaced": (lambda m: setattr(m, "head", nn.Linear(4, 1)), r"_modules"),
    "parameter replaced": (lambda m: setattr(m.fc, "bias", nn.Parameter(m.fc.bias.detach())), r"fc\.bias\.values"),
    "buffer registered": (lambda m: m.register_buffer("rows", torch.ones(1)), r"_buffers"),
    "parameter written": (write_values, r"fc\.weight\.values"),
    "parameter written with what it held": (write_same_values, r"fc\.weight\.values"),
    "running statistics": (lambda m: m(torch.randn(5, 3)), r"norm\.running_mean\.values"),
    "frozen": (lambda m: m.fc.weight.requires_grad_(False), r"fc\.weight\.requires_grad: was True, is False"),
    "evaluation mode": (lambda m: m.norm.eval(), r"norm\.training: was True, is False"),
    "grad dropped": (lambda m: m.zero_grad(), r"fc\.weight\.grad"),
    "grad written": (lambda m: m.fc.bias.grad.mul_(2), r"fc\.bias\.grad"),
    "grad replaced by its copy": (lambda m: setattr(m.fc.bias, "grad", m.fc.bias.grad.clone()), r"fc\.bias\.grad"),
    "grad of a backward": (lambda m: m.eval()(torch.randn(1, 3)).sum().backward(), r"head\.weight\.grad"),
    "draw from torch": (lambda m: torch.rand(1), "random state of torch"),
    "draw from NumPy": (lambda m: np.random.rand(), "random state of NumPy"),  # noqa: NPY002
    "draw from Python": (lambda m: random.random(), "random state of Python"),
    "grad mode": (lambda m: torch._C._set_grad_enabled(False), "grad mode: was True, is False"),
    "default dtype": (lambda m: torch.set_default_dtype(torch.float64), "default dtype"),
}


@pytest.fixture
def _process_restored():
    with torch.enable_grad():
        yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_process_restored")
@pytest.mark.parametrize("kind", ON_A_MODEL)
def test_a_leftover_on_a_model_is_found(kind, model, leaves_nothing_behind):
    leave, named = ON_A_MODEL[kind]
    with pytest.raises(AssertionError, match=named), leaves_nothing_behind(model):
        _kept = leave(model)


ON_A_GRAPH: dict[str, Callable[[nn.Module, torch.Tensor], object]] = {
    "hook of a node": lambda m, losses: losses.grad_fn.register_hook(ignore),
    "prehook of a node": lambda m, losses: losses.grad_fn.next_functions[0][0].register_prehook(ignore),
    "prehook of an accumulating node": lambda m, losses: accumulate_node(m).register_prehook(ignore),
    "tensor hook on the losses": lambda m, losses: losses.register_hook(ignore),
    "hook for all modules": lambda m, losses: nn.modules.module.register_module_forward_hook(ignore),
}


@pytest.mark.parametrize("kind", ON_A_GRAPH)
def test_a_hook_on_a_graph_is_found(kind, model, leaves_nothing_behind):
    losses = losses_of(model)
    handles = []
    with pytest.raises(AssertionError, match="hook <function ignore"), leaves_nothing_behind(model, losses):
        handles.append(ON_A_GRAPH[kind](model, losses))
    handles[0].remove()


def test_saved_tensor_hooks_are_found(leaves_nothing_behind):
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with pytest.raises(AssertionError, match="saved-tensor hooks"), leaves_nothing_behind():
        hooks.__enter__()
    hooks.__exit__()


def test_a_grad_kept_on_an_inner_tensor_is_found(leaves_nothing_behind):
    inner = torch.ones(2, requires_grad=True) * 2
    inner.retain_grad()
    with pytest.raises(AssertionError, match=r"Tensor\[0\]\.grad"), leaves_nothing_behind(inner):
        inner.sum().backward()


def test_a_sparse_grad_is_compared(leaves_nothing_behind):
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    with leaves_nothing_behind(table):
        table(torch.tensor([1]))
    with pytest.raises(AssertionError, match=r"weight\.grad"), leaves_nothing_behind(table):
        table(torch.tensor([2])).sum().backward()


def test_what_is_undone_is_not_left(model, leaves_nothing_behind):
    losses = losses_of(model)
    with leaves_nothing_behind(model, losses):
        handles = [
            model.fc.register_forward_hook(ignore),
            model.fc.weight.register_hook(ignore),
            losses.grad_fn.register_prehook(ignore),
        ]
        torch.rand(2, generator=torch.Generator().manual_seed(1))
        torch.autograd.grad(losses.sum(), list(model.parameters()), retain_graph=True)
        for handle in handles:
            handle.remove()


def test_what_may_change_is_named(model, leaves_nothing_behind):
    losses = losses_of(model)
    with leaves_nothing_behind(model, losses, may_change={"grad"}):
        losses.sum().backward()
    with pytest.raises(AssertionError, match="requires_grad"), leaves_nothing_behind(model, may_change={"grad"}):
        model.fc.weight.requires_grad_(False)
    with pytest.raises(AssertionError, match="random state"), leaves_nothing_behind(model, may_change={"grad"}):
        torch.rand(1)


def test_an_error_inside_comes_through(model, leaves_nothing_behind):
    with pytest.raises(ZeroDivisionError), leaves_nothing_behind(model):
        _ = 1 / 0
