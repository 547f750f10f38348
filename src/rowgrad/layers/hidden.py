"""A hidden layer by names: linear, activation, and normalization before or after it."""

from __future__ import annotations

from torch import nn

from rowgrad.errors import InputError
from rowgrad.layers.activations import activation
from rowgrad.layers.batchnorm import BatchNorm
from rowgrad.layers.maxout import Maxout

NORMS = ("batch-pre", "batch-post", "layer", "none")


def hidden_layer(
    n_in: int, n_out: int, name: str = "relu", *, norm: str = "none", alpha: float | None = None
) -> nn.Sequential:
    """A linear layer with its activation and its normalization.

    Args:
        n_in, n_out: inputs and units.
        name: of the activation, one of `ACTIVATIONS`, or "maxout", which is a linear layer in itself.
        norm: "batch-pre" normalizes each unit over the batch before the activation, the more common; the linear layer
            has no bias then, beta is one. "batch-post" does so after the activation. "layer" normalizes each example
            over the units, before the activation. "none", the default.
        alpha: for "leaky_relu", the slope for v <= 0.
    Raises:
        InputError: a name that does not exist, or a norm before maxout, which has no single pre-activation.

    Source: Aggarwal 2018, section 3.6, "Solution: Batch Normalization" (a) and (b).

    >>> [type(m).__name__ for m in hidden_layer(4, 3, "tanh", norm="batch-pre")]
    ['Linear', 'BatchNorm', 'Tanh']
    >>> [type(m).__name__ for m in hidden_layer(4, 3, "maxout", norm="batch-post")]
    ['Maxout', 'BatchNorm']
    """
    if norm not in NORMS:
        raise InputError(f"norm {norm!r}: there are {', '.join(NORMS)}")
    after = [BatchNorm(n_out)] if norm == "batch-post" else []
    if name == "maxout":
        if norm in ("batch-pre", "layer"):
            raise InputError(f"norm {norm!r}: maxout has no single pre-activation; use batch-post or none")
        if alpha is not None:
            raise InputError(f"activation 'maxout' takes no alpha, found {alpha}: leave it out, or use 'leaky_relu'")
        return nn.Sequential(Maxout(n_in, n_out), *after)
    before = {"batch-pre": [BatchNorm(n_out)], "layer": [nn.LayerNorm(n_out)]}.get(norm, [])
    linear = nn.Linear(n_in, n_out, bias=norm != "batch-pre")
    return nn.Sequential(linear, *before, activation(name, alpha=alpha), *after)
