"""Dual numbers in the place of parameters, in every call of PyTorch that a piece of code makes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from rowgrad.forward.numbers import Dual, split
from rowgrad.forward.rules import COMPOSED, RULES, UNFUSED

ATTRIBUTE = {"__get__", "__set__", "__delete__"}
VIEWS = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
OF_THE_PARAMETER = {Tensor.requires_grad_, Tensor.__deepcopy__, Tensor.__reduce_ex__}
HOOKS = {Tensor.register_hook, Tensor.retain_grad}


class _RecordedError(Exception):
    """A tensor is recorded for a backward pass."""


class Duals(TorchFunctionMode):
    """Inside, calls take the dual number given for a parameter wherever the parameter stands among their arguments.

    What autograd would not differentiate is not differentiated: under `torch.no_grad()`, which forward mode does not
    heed, tangents are left out. Attributes of parameters are theirs, not those of their stand-ins. Hooks of tensors,
    which only a backward pass would run, are not registered.

    Args:
        duals: by `id` of the parameter.
    """

    def __init__(self, duals: Mapping[int, Dual]) -> None:
        super().__init__()
        self._duals = duals
        self._stand_ins: dict[int, Tensor] = {}  # of the parameters that are not used by rules alone
        self._calls: list[Hashable] = []

    def way(self) -> Hashable:
        """Stands for the calls that were made, the rules that were taken, and where gradients were off."""
        return hash(tuple(self._calls))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_of_the_parameter(func):
            return func(*args, **kwargs)
        self._calls.append(func)
        if not torch.is_grad_enabled():
            self._calls.append(False)
            return _without_tangents(func, args, kwargs)
        rule = RULES.get(func)
        if rule is not None:
            found = self._by_rule(rule, args, kwargs)
            if found is not NotImplemented:
                self._calls.append(True)
                return found.join()
        if func in HOOKS and not args[0].requires_grad:
            return RemovableHandle(OrderedDict()) if func == Tensor.register_hook else None
        if func == Tensor.detach_:
            raise NotImplementedError("a forward derivative cannot be dropped in place by detach_(), but by detach()")
        func = COMPOSED.get(func, func)
        with UNFUSED.get(func, nullcontext)():
            return func(*_with(self._stand_in, args), **_with(self._stand_in, kwargs))

    def _by_rule(self, rule: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Not what is recorded for a backward pass, whose derivatives need tangents of their own, nor what is cast."""
        if _in_a_transform() or _casts(args[0] if args else next(iter(kwargs.values()))):
            return NotImplemented
        try:
            parts, named = [*map(self._split, args)], {name: self._split(a) for name, a in kwargs.items()}
        except _RecordedError:
            return NotImplemented
        return rule(*parts, **named)

    def _split(self, a: Any) -> Any:
        known = self._duals.get(id(a))
        if known is not None or not isinstance(a, Tensor):
            return known or a
        if a.requires_grad:
            raise _RecordedError
        return split(a)

    def _stand_in(self, t: Tensor) -> Tensor:
        key = id(t)
        if key not in self._duals:
            return t
        if key not in self._stand_ins:
            self._stand_ins[key] = self._duals[key].join()
        return self._stand_ins[key]


def _with(change: Callable[[Tensor], Tensor], a: Any) -> Any:
    """An argument of a call with its tensors changed."""
    if isinstance(a, Tensor):
        return change(a)
    kind = type(a)
    if kind is tuple or kind is list:
        return kind([_with(change, item) for item in a])
    return {key: _with(change, item) for key, item in a.items()} if kind is dict else a


@lru_cache(maxsize=1024)
def _is_of_the_parameter(func: Callable[..., Any]) -> bool:
    """Whether a call is about the parameter itself, not its numbers."""
    return func in OF_THE_PARAMETER or (getattr(func, "__name__", None) in ATTRIBUTE and func not in VIEWS)


def _casts(input: Tensor) -> bool:  # noqa: A002
    """Under `torch.autocast`."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type)


def _in_a_transform() -> bool:
    """Under `torch.func.vmap` or `grad`, where dual numbers cannot be taken apart."""
    return torch._C._are_functorch_transforms_active()


def _without_tangents(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The call on values alone. A tensor that it changes in place and returns stays the one that it was."""
    originals: dict[int, Tensor] = {}

    def value(t: Tensor) -> Tensor:
        detached = t.detach()
        originals[id(detached)] = t
        return detached

    values, named = _with(value, args), _with(value, kwargs)  # held, so that the ids stay theirs
    found = func(*values, **named)
    return originals.get(id(found), found) if isinstance(found, Tensor) else found
