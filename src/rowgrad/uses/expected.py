"""What an option, an entry of a state or an argument may be: each rule in words, for the error, and as a test."""

from collections.abc import Callable, Mapping
from math import inf
from numbers import Integral, Real
from sys import float_info
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowgrad.errors import InputError


class Expected(NamedTuple):
    """`what` completes "expected ..."; `fits` is true of values that are as expected, and never raises."""

    what: str
    fits: Callable[[Any], bool]


def whole(least: int, most: int | None = None, *, what: str = "") -> Expected:
    """A whole number."""
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"
    return Expected(
        what or f"a whole number {limits}", lambda v: is_whole(v) and least <= v <= (inf if most is None else most)
    )


def number(what: str, fits: Callable[[Any], bool]) -> Expected:
    """A real number for which `fits` holds; NaN must fail it."""
    return Expected(what, lambda v: is_number(v) and fits(v))


def same(value: Any) -> Expected:
    """An option that a state holds for comparison."""
    return Expected(
        f"{value!r}, as here; make it with the options of the state",
        lambda v: type(v) is type(value) and v == value,
    )


def tensor(dtype: torch.dtype, *shape: int, least: float, most: float = float_info.max) -> Expected:
    """A tensor of this dtype and shape, -1 for any length, with entries from `least` to `most`, none of them NaN."""
    name = str(dtype).removeprefix("torch.")
    return Expected(
        f"a tensor of {name} and shape {shape}, from {least:g} to {most:g}",
        lambda v: (
            is_tensor(v, dtype, *shape) and (not v.numel() or (least <= v.min().item() and v.max().item() <= most))
        ),
    )


FLAG = Expected("True or False", lambda v: isinstance(v, bool))
GENERATOR = Expected(
    "a torch.Generator of the CPU, or None for one of its own",
    lambda v: v is None or (isinstance(v, torch.Generator) and v.device.type == "cpu"),
)


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_tensor(value: Any, dtype: torch.dtype, *shape: int) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype == dtype
        and len(value.shape) == len(shape)
        and all(asked in (-1, found) for asked, found in zip(shape, value.shape, strict=True))
    )


def is_integers(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def check(owner: str, values: Mapping[str, Any], expected: Mapping[str, Expected]) -> None:
    """Refuse the first of the options that is not as expected."""
    for name, (what, fits) in expected.items():
        if not fits(values[name]):
            raise InputError(f"{owner}: {name}={described(values[name])}, expected {what}")


def checked_state(owner: str, state: Any, expected: Mapping[str, Expected]) -> dict[str, Any]:
    """A copy of the state, tensors on the CPU, if it has the expected entries, each of them as expected."""
    if not isinstance(state, Mapping):
        raise InputError(f"{owner}: the state is {described(state)}; load what {owner}.state_dict() gave")
    for name, (what, fits) in expected.items():
        if name not in state:
            raise InputError(f"{owner}: the state has no {name}; load what {owner}.state_dict() gave")
        if not fits(state[name]):
            raise InputError(f"{owner}: the state's {name} is {described(state[name])}, expected {what}")
    if more := [name for name in state if name not in expected]:
        raise InputError(f"{owner}: the state has a {more[0]!r}, which is none of {', '.join(expected)}")
    return {name: _copied(value) for name, value in state.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return [_copied(v) for v in value] if isinstance(value, list) else value


def vector(name: str, value: Any) -> Tensor:
    """Norms or weights of examples, (B,), in float64 on the CPU; inf and NaN may be among them."""
    if not isinstance(value, Tensor) or value.ndim != 1 or value.dtype == torch.bool or value.is_complex():
        raise InputError(f"{name} must be of shape (B,), one real number for each example; got {described(value)}")
    found = value.detach().cpu().double()  # some devices have no float64
    if bool((found < 0).any()):
        raise InputError(f"{name}: the smallest is {float(found.min()):g}; expected numbers that are not negative")
    return found


def length(name: str, value: Any) -> float:
    """The norm of one vector; may be inf or NaN."""
    value = value.detach() if isinstance(value, Tensor) else value
    is_one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if not is_one and not is_number(value):
        raise InputError(f"{name}={described(value)}: expected one number, the norm of a vector")
    if float(value) < 0:
        raise InputError(f"{name}={float(value):g}: expected a norm, which is not negative")
    return float(value)


def described(value: Any) -> str:
    """A plain value or a few of them as they are; of a tensor its dtype, shape and range; of anything else the type."""
    plain = (type(None), bool, int, float, str)
    if isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(v, plain) for v in value[:9])):
        return repr(value)
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    name = str(value.dtype).removeprefix("torch.")
    has_range, value = value.numel() and not value.is_complex(), value.detach()
    limits = f", from {value.min().item():g} to {value.max().item():g}" if has_range else ""
    return f"a tensor of {name} and shape {tuple(value.shape)}{limits}"
