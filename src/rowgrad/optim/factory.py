"""Optimizers by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rowgrad.errors import InputError, RowgradError
from rowgrad.optim.conjugate import ConjugateGradient
from rowgrad.optim.first_order import AdaGrad, Momentum, RMSProp
from rowgrad.optim.gauss_newton import GaussNewton
from rowgrad.optim.newton import Newton
from rowgrad.optim.quasi_newton import BFGS, LBFGS
from rowgrad.optim.rates import weight_groups
from rowgrad.optim.second_order import is_number
from rowgrad.parameters import Params, named

Maker = Callable[..., torch.optim.Optimizer]

# fmt: off
OPTIMIZERS: dict[str, Maker] = {
    "sgd":                torch.optim.SGD,
    "momentum":           Momentum,
    "nesterov":           partial(Momentum, nesterov=True),
    "adagrad":            torch.optim.Adagrad,
    "rmsprop":            torch.optim.RMSprop,
    "rmsprop-nesterov":   partial(RMSProp, beta=0.9),
    "adadelta":           torch.optim.Adadelta,
    "adam":               torch.optim.Adam,
    "adamw":              torch.optim.AdamW,
    "nadam":              torch.optim.NAdam,
    "radam":              torch.optim.RAdam,
    "newton":             Newton,
    "conjugate-gradient": ConjugateGradient,
    "bfgs":               BFGS,
    "lbfgs":              LBFGS,
    "gauss-newton":       GaussNewton,
}
# fmt: on
WITH_EPS_INSIDE: dict[str, Maker] = {"adagrad": AdaGrad, "rmsprop": RMSProp}
SECOND_ORDER = ("newton", "conjugate-gradient", "bfgs", "lbfgs", "gauss-newton")


def make(
    name: str, params: Params, lr: float | None = None, *, weight_decay: float | None = None, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer by its name.

    "sgd", "adagrad", "rmsprop", "adadelta", "adam", "adamw", "nadam" and "radam" are PyTorch's; "momentum", "nesterov"
    and "rmsprop-nesterov" have the form of Aggarwal 2018; "newton", "conjugate-gradient", "bfgs", "lbfgs" and
    "gauss-newton" are of second order: their `step` needs a closure. Between steps "nesterov" and "rmsprop-nesterov"
    have the parameters ahead of the weights: evaluate, and save a finished model, in `with optimizer.at_weights():`.

    Args:
        name: one of these.
        params: as for `rowgrad.jacobian`.
        lr: learning rate; None is the optimizer's own default.
        weight_decay: on weights only, see `weight_groups`; None is the optimizer's own default, for weights only too.
            Groups of parameters are left as they are given.
        options: the optimizer's own. `eps_inside=True` gives "adagrad" and "rmsprop" the source's sqrt(A + eps), where
            PyTorch has sqrt(A) + eps; the options are then those of `AdaGrad` and `RMSProp`.
    Raises:
        InputError: an unknown name or option, and the message lists those that exist; an option that is not finite or
            that the optimizer refuses, with its own words.

    >>> import torch
    >>> from rowgrad.optim import make
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = make("adam", model, lr=0.01, weight_decay=0.1)
    >>> [(group["param_names"], group["weight_decay"]) for group in optimizer.param_groups]
    [(['weight'], 0.1), (['bias'], 0.0)]
    """
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise InputError(f"optimizer {name!r}: expected one of: {', '.join(OPTIMIZERS)}")
    maker = OPTIMIZERS[name]
    if name in WITH_EPS_INSIDE and options.pop("eps_inside", False):
        maker = WITH_EPS_INSIDE[name]
    given = options | {k: v for k, v in (("lr", lr), ("weight_decay", weight_decay)) if v is not None}
    defaults = _options(maker)
    wrong = [option for option in given if option not in defaults]
    if wrong:
        extra = [*defaults, "eps_inside"] if maker is OPTIMIZERS[name] and name in WITH_EPS_INSIDE else [*defaults]
        raise InputError(f"{name} has no option {wrong[0]!r}; it has: {', '.join(extra)}")
    _check(name, given)
    if name in SECOND_ORDER:
        return _made(name, maker, _groups(params, None), given)
    given.setdefault("weight_decay", defaults["weight_decay"])
    return _made(name, maker, _groups(params, given["weight_decay"]), given)


def _check(name: str, given: dict[str, Any]) -> None:
    """What PyTorch's optimizers let through."""
    for option, value in given.items():
        if (option == "lr" or isinstance(value, float)) and not is_number(value):
            raise InputError(f"{name}: {option}={value!r}, expected a finite number")
    if name == "nesterov" and not given.get("nesterov", True):
        raise InputError("nesterov: nesterov=False; for momentum without it make 'momentum'")


def _made(name: str, maker: Maker, groups: list[Any], given: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        return maker(groups, **given)
    except RowgradError:
        raise
    except (TypeError, ValueError) as error:
        said = ", ".join(f"{option}={value!r}" for option, value in given.items())
        raise InputError(f"{name} refuses {said or 'its parameters'}: {error}") from error


def _options(maker: Maker) -> dict[str, Any]:
    """The options of an optimizer, with their defaults."""
    found = dict(inspect.signature(maker).parameters)
    if maker is LBFGS:
        found |= inspect.signature(torch.optim.LBFGS).parameters
    return {name: option.default for name, option in found.items() if name not in ("params", "options")}


def _groups(params: Params, weight_decay: float | None) -> list[Any]:
    """Groups as given; else weights and others apart, or all in one."""
    if not isinstance(params, (nn.Module, Tensor, Mapping)):
        items: list[Any] = list(params)
        if items and isinstance(items[0], Mapping):
            return items
        params = items
    if weight_decay is None:
        return list(named(params).by_name.items())
    return list(weight_groups(params, weight_decay))
