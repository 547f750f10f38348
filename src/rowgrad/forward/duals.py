"""Dual numbers in the place of parameters, in every call of PyTorch that a piece of code makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from rowgrad.forward.rules import COMPOSED, RULES, UNFUSED

ATTRIBUTE = {"__get__", "__set__", "__delete__"}
VIEWS = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
REQUIRES_GRAD = Tensor.requires_grad.__get__  # pyright: ignore[reportAttributeAccessIssue]
OF_THE_PARAMETER = {Tensor.requires_grad_, Tensor.__deepcopy__, Tensor.__reduce_ex__}
HOOKS = {Tensor.register_hook, Tensor.retain_grad}


class Duals(TorchFunctionMode):
    """Inside, calls take the dual number given for a parameter wherever the parameter stands among their arguments.

    What autograd would not differentiate is not differentiated: under `torch.no_grad()`, whose meaning forward mode
    does not know, tangents are left out. Attributes of parameters are theirs, not those of their stand-ins. Values with
    a tangent say that they require grad, and take hooks, which forward mode never runs.

    Args:
        duals: by `id` of the parameter.
    """

    def __init__(self, duals: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._duals = duals

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in ATTRIBUTE and func not in VIEWS:
            found = func(*args, **kwargs)
            return found or has_tangent(args[0]) if func == REQUIRES_GRAD else found
        if func in OF_THE_PARAMETER:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return _without_tangents(func, args, kwargs)
        if func in HOOKS and has_tangent(args[0]) and not args[0].requires_grad:
            return RemovableHandle({}) if func == Tensor.register_hook else None
        args = tuple([self._dual(a) for a in args])
        kwargs = {key: self._dual(a) for key, a in kwargs.items()}
        rule = RULES.get(func)
        if rule is not None and _is_bare(args, kwargs):
            found = rule(*args, **kwargs)
            if found is not NotImplemented:
                return found
        func = COMPOSED.get(func, func)
        with UNFUSED.get(func, nullcontext)():
            return func(*args, **kwargs)

    def _dual(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self._duals.get(id(a), a)
        kind = type(a)
        if kind is tuple or kind is list:
            return kind([self._dual(item) for item in a])
        return {key: self._dual(item) for key, item in a.items()} if kind is dict else a


def has_tangent(t: Tensor) -> bool:
    return not _in_a_transform() and unpack_dual(t).tangent is not None


def _in_a_transform() -> bool:
    """Under `torch.func.vmap` or `grad`, where dual numbers cannot be taken apart."""
    return torch._C._are_functorch_transforms_active()


def _is_bare(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Nothing here is recorded for a backward pass, whose derivatives would need tangents of their own, or cast."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    recorded = any([t.requires_grad for t in tensors])
    return not (recorded or _in_a_transform() or torch.is_autocast_enabled(tensors[0].device.type))


def _without_tangents(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The call on values alone. A tensor that it changes in place and returns stays the one that it was."""
    originals: dict[int, Tensor] = {}

    def value(a: Any) -> Any:
        if isinstance(a, Tensor):
            detached = a.detach()
            originals[id(detached)] = a
            return detached
        kind = type(a)
        if kind is tuple or kind is list:
            return kind([value(item) for item in a])
        return {key: value(item) for key, item in a.items()} if kind is dict else a

    values, named = [value(a) for a in args], {key: value(a) for key, a in kwargs.items()}
    found = func(*values, **named)
    return originals.get(id(found), found) if isinstance(found, Tensor) else found
