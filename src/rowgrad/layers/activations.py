"""Activations by name, with their options."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from rowgrad.errors import InputError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "hard_tanh": nn.Hardtanh,
    "identity": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def activation(name: str, *, alpha: float | None = None) -> nn.Module:
    """An activation by its name, one of `ACTIVATIONS`.

    Args:
        name: "relu", "leaky_relu", "tanh", ...
        alpha: for "leaky_relu" alone, the slope for v <= 0; default None, PyTorch's 0.01.
    Raises:
        InputError: no such name, an alpha that is not a finite number, or an alpha for another activation.

    Source: Aggarwal 2018, section 3.4, eq. 14: Phi(v) = alpha v for v <= 0, v otherwise.

    >>> import torch
    >>> activation("leaky_relu", alpha=0.1)(torch.tensor([-2.0, 3.0]))
    tensor([-0.2000,  3.0000])
    """
    if name not in ACTIVATIONS:
        raise InputError(f"activation {name!r}: there are {', '.join(ACTIVATIONS)}")
    if alpha is None:
        return ACTIVATIONS[name]()
    if name != "leaky_relu":
        raise InputError(f"activation {name!r} takes no alpha, found {alpha}: leave it out, or use 'leaky_relu'")
    if not math.isfinite(alpha):
        raise InputError(f"activation 'leaky_relu': alpha={alpha}, expected a finite number such as 0.1")
    return nn.LeakyReLU(alpha)
