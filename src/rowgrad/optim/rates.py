"""Learning rates that fall by the epoch, and penalties for weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm as WEIGHT_NORM
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from rowgrad.errors import InputError
from rowgrad.optim.second_order import non_negative
from rowgrad.parameters import Params, named

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass
class Exponential:
    """exp(-k t)."""

    k: float

    def __call__(self, t: int) -> float:
        return exp(-self.k * t)


@dataclass
class Inverse:
    """1 / (1 + k t)."""

    k: float

    def __call__(self, t: int) -> float:
        return 1 / (1 + self.k * t)


DECAYS: dict[str, Callable[[float], Callable[[int], float]]] = {"exponential": Exponential, "inverse": Inverse}


def decay(optimizer: torch.optim.Optimizer, kind: str, k: float) -> torch.optim.lr_scheduler.LambdaLR:
    """A schedule that lowers the rate by the epoch: alpha_0 exp(-k t), or alpha_0 / (1 + k t).

    Args:
        optimizer: whose groups have a rate `lr`, alpha_0.
        kind: "exponential" or "inverse".
        k: how fast, per epoch.
    Returns:
        PyTorch's scheduler; call its `step()` once after each epoch. The first epoch, t = 0, has the rate alpha_0.
    Raises:
        InputError: an unknown kind, a k below 0, or an optimizer without a rate.
    Source: Aggarwal 2018, "Learning Rate Decay".

    >>> import torch
    >>> from rowgrad.optim import decay
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.6)
    >>> schedule = decay(optimizer, "inverse", k=0.5)
    >>> optimizer.step()
    >>> schedule.step()
    >>> schedule.get_last_lr()
    [0.39999999999999997]
    """
    if kind not in DECAYS:
        raise InputError(f"decay: kind={kind!r}, expected one of: {', '.join(DECAYS)}")
    non_negative("decay", k=k)
    if any("lr" not in group for group in optimizer.param_groups):
        raise InputError(f"decay: {type(optimizer).__name__} has no learning rate")
    return torch.optim.lr_scheduler.LambdaLR(optimizer, DECAYS[kind](k))


def weight_groups(params: Params, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: weights, which decay, and biases and the parameters of norms, which do not.

    A weight is a parameter of two dimensions or more that belongs to no normalization and is not called a bias. Of
    weight normalization the direction is one, the magnitude is not.

    Args:
        params: as for `rowgrad.jacobian`; only a module tells which parameters are those of norms.
        weight_decay: for the weights.
    Returns:
        [{"params": [(name, tensor), ...], "weight_decay": ...}, the same with 0]; a group without parameters is left
        out.

    >>> import torch
    >>> from rowgrad.optim import weight_groups
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    >>> [([name for name, _ in group["params"]], group["weight_decay"]) for group in weight_groups(model, 0.01)]
    [(['0.weight'], 0.01), (['0.bias', '1.weight', '1.bias'], 0.0)]
    """
    non_negative("weight_groups", weight_decay=weight_decay)
    of_norms = _of_norms(params) if isinstance(params, nn.Module) else set()
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, p in named(params).by_name.items():
        is_weight = p.ndim >= 2 and id(p) not in of_norms and not name.split(".")[-1].startswith("bias")
        groups[0 if is_weight else 1]["params"].append((name, p))
    return [group for group in groups if group["params"]]


def _of_norms(model: nn.Module) -> set[int]:
    norms: list[Tensor] = [p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)]
    return {id(p) for p in (*norms, *_magnitudes(model))}


def _magnitudes(model: nn.Module) -> Iterator[Tensor]:
    """The lengths that weight normalization, as a parametrization or as a hook, gives to weights."""
    for module in model.modules():
        if isinstance(module, ParametrizationList) and any(isinstance(p, WEIGHT_NORM) for p in module):
            yield module.get_parameter("original0")
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                yield module.get_parameter(f"{hook.name}_g")
