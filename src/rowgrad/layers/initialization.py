"""Gaussian initialization by the number of inputs of each unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from rowgrad.errors import InputError, ParameterError
from rowgrad.layers.maxout import Maxout
from rowgrad.layers.tied import TiedLinear

SCHEMES: dict[str, Callable[[int, int], float]] = {
    "lecun": lambda r_in, r_out: math.sqrt(1 / r_in),
    "he": lambda r_in, r_out: math.sqrt(2 / r_in),
    "glorot": lambda r_in, r_out: math.sqrt(2 / (r_in + r_out)),
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCell, nn.LSTMCell, nn.GRUCell)

Fans = Iterator[tuple[str, int, int]]  # name of a weight in its module, inputs of a unit, units an input goes to


@torch.no_grad()
def initialize(
    model: nn.Module, scheme: str, *, value: float | None = None, generator: torch.Generator | None = None
) -> dict[str, float]:
    """Draw the weights of a model from Gaussians as wide as their number of inputs asks for; biases become 0.

    The variance of a unit's output grows with its number of inputs r, so that weights of one size let activations and
    gradients explode or vanish with depth. Standard deviations:

    | scheme   | standard deviation       | keeps the variance of                                         |
    |----------|--------------------------|---------------------------------------------------------------|
    | lecun    | sqrt(1 / r)              | activations: linear layers, tanh near 0, `Maxout` of 2 pieces |
    | he       | sqrt(2 / r)              | activations through ReLU, which leaves half of the units at 0 |
    | glorot   | sqrt(2 / (r_in + r_out)) | activations and gradients, as well as both can be kept        |
    | constant | 0, all weights `value`   | shows why not: all units of a layer move in lockstep          |

    r is in_features of a linear layer and k^2 channels (per group) of a convolution. In recurrent layers each matrix
    goes by its own inputs. Attention, `Maxout` and transposed convolutions (without regard to their stride) are known
    too; other modules, such as embeddings and norms, stay as they are.

    Args:
        scheme: one of the names above.
        value: of every weight, for "constant" alone.
        generator: what to draw from; default PyTorch's global generator.
    Returns:
        {name of the weight: its standard deviation}, everything that was drawn.
    Raises:
        InputError: unknown scheme, a value missing or out of place, no layer in the model that is known here, or one
            without inputs.
        ParameterError: a weight that is parametrized (weight norm and the like) or not there yet (lazy layers).

    Source: Aggarwal 2018, section 3.3, "Symmetry Breaking" and "Sensitivity to Number of Inputs".

    >>> model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    >>> initialize(model, "he")  # sqrt(2 / 18) and sqrt(2 / 8)
    {'0.weight': 0.3333333333333333, '3.weight': 0.5}
    """
    _check(scheme, value)
    found, seen = {}, set()
    for prefix, module in model.named_modules():
        for name, r_in, r_out in _fans(module):
            label = f"{prefix}.{name}".lstrip(".")
            weight = _weight(module, name, label)
            if id(weight) not in seen:
                seen.add(id(weight))
                found[label] = 0.0 if value is not None else _std(scheme, r_in, r_out, label)
                _draw(weight, found[label], value, generator)
    if not found:
        raise InputError(f"initialize: no linear, convolutional or recurrent layer in the {type(model).__name__}")
    _zero_biases(model)
    return found


def _check(scheme: str, value: float | None) -> None:
    if scheme not in (*SCHEMES, "constant"):
        raise InputError(f"initialization {scheme!r}: there are {', '.join(SCHEMES)}, constant")
    if scheme == "constant" and (value is None or not math.isfinite(value)):
        raise InputError(f"initialization 'constant' with value={value}: give the number that every weight becomes")
    if scheme != "constant" and value is not None:
        raise InputError(f"initialization {scheme!r} takes no value, found {value}: leave it out, or use 'constant'")


def _fans(module: nn.Module) -> Fans:
    """The weights of a module, biases and children left out."""
    if isinstance(module, nn.Linear | Maxout):
        yield "weight", module.in_features, module.out_features
    elif isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        area = math.prod(module.kernel_size)
        r_in, r_out = (channels // module.groups * area for channels in (module.in_channels, module.out_channels))
        yield "weight", r_in, r_out
    elif isinstance(module, RECURRENT):
        for name, p in module.named_parameters(recurse=False):
            if p.dim() == 2:
                is_projection = name.startswith("weight_hr")
                yield name, p.shape[1], p.shape[0] if is_projection else module.hidden_size
    elif isinstance(module, nn.MultiheadAttention):
        for name, p in module.named_parameters(recurse=False):
            if name.endswith("proj_weight"):
                yield name, p.shape[1], module.embed_dim


def _std(scheme: str, r_in: int, r_out: int, label: str) -> float:
    if r_in < 1 or r_out < 1:
        raise InputError(f"initialize: {label} has {r_in} inputs and {r_out} outputs, expected at least 1 of both")
    return SCHEMES[scheme](r_in, r_out)


def _weight(module: nn.Module, name: str, label: str) -> Tensor:
    if parametrize.is_parametrized(module, name):
        raise ParameterError(f"{label} is parametrized and computed at each call: initialize before parametrizing it")
    weight = getattr(module, name)
    if isinstance(weight, UninitializedParameter):
        raise ParameterError(f"{label} has no shape yet: run the model once, then initialize")
    return weight


def _draw(weight: Tensor, std: float, value: float | None, generator: torch.Generator | None) -> None:
    if value is None:
        weight.normal_(0, std, generator=generator)
    else:
        weight.fill_(value)


def _zero_biases(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, TiedLinear) or next(_fans(module), None) is not None:
            for name, p in module.named_parameters(recurse=False):
                if "bias" in name:
                    p.zero_()
