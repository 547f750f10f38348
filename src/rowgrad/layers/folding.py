"""Batch normalization at inference is a linear map: it goes into the linear layer beside it."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rowgrad.errors import InputError
from rowgrad.layers.batchnorm import BATCH_NORMS
from rowgrad.layers.chains import is_chain

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # do nothing at inference

Layer = Any  # nn.Linear or a convolution
Norm = Any  # one of BATCH_NORMS


def fold(model: nn.Module) -> nn.Module:
    """A copy of a model for inference, without the batch normalizations that can go into a linear layer beside them.

    At inference the node is a = s v + t with s = gamma / sigma and t = beta - s mu. Behind a linear layer or
    convolution (pre-activation), W becomes s W and b becomes s b + t. In front of one (post-activation), W becomes
    W s and b becomes b + W t.

    Law: equal outputs in evaluation mode, to rounding. The copy is in evaluation mode and is not to be trained on.

    Only neighbors within an `nn.Sequential`, at any depth of the model, are known to follow each other. A batch
    normalization stays where it stands elsewhere, where no linear layer is beside it, and in front of a convolution
    with padding, whose border would not be shifted; so does one with a forward hook on it, on the layer beside it or on
    what is between them, as hooks may see and change what passes there.

    Args:
        model: with batch normalizations that hold the statistics to be used, see `population_statistics`. Linear
            layers behind or in front of one are taken to have inputs of shape (examples, features).
    Raises:
        InputError: not one batch normalization could be folded.

    Source: Aggarwal 2018, section 3.6: "The normalization is a simple linear transformation during inference."

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    >>> fold(model)
    Sequential(
      (0): Linear(in_features=3, out_features=4, bias=True)
      (1): Identity()
      (2): ReLU()
      (3): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    folded = copy.deepcopy(model).eval()
    n_uses = Counter(id(m) for _, m in folded.named_modules(remove_duplicate=False))
    places = [_places(m, n_uses) for m in folded.modules() if is_chain(m)]
    if not sum([_fold_chain(chain) for chain in places]):
        raise InputError(
            f"fold: no batch normalization in the {type(model).__name__} stands beside a linear layer or convolution "
            "within an nn.Sequential"
        )
    return folded


@dataclass
class _Place:
    """Where a module stands; what is put there replaces it, so that other uses of the old one stay as they are."""

    chain: nn.Sequential
    index: int

    @property
    def module(self) -> nn.Module:
        return self.chain[self.index]

    def put(self, module: nn.Module) -> None:
        self.chain[self.index] = module


def _places(chain: nn.Sequential, n_uses: Counter[int]) -> list[_Place]:
    """All that runs one after the other, chains within the chain looked into; one that is used twice is not."""
    found = []
    for index, module in enumerate(chain):
        if is_chain(module) and n_uses[id(module)] == 1 and not _is_hooked(module):
            found += _places(module, n_uses)
        elif not isinstance(module, TRANSPARENT) or _is_hooked(module):
            found.append(_Place(chain, index))
    return found


def _fold_chain(places: list[_Place]) -> int:
    """How many were folded; a place leaves the list with its batch normalization."""
    n, i = 0, 0
    while i < len(places):
        norm = places[i].module
        if isinstance(norm, BATCH_NORMS) and norm.running_mean is not None and not _is_hooked(norm):
            folded = _neighbor(norm, places, i)
            if folded is not None:
                place, layer = folded
                place.put(layer)
                places.pop(i).put(nn.Identity())
                n += 1
                continue
        i += 1
    return n


def _neighbor(norm: Norm, places: list[_Place], i: int) -> tuple[_Place, nn.Module] | None:
    """The layer that takes the batch normalization at place i in, as it becomes, and its place."""
    if i > 0 and _n_outputs(places[i - 1].module) == norm.num_features:
        return places[i - 1], _folded_behind(places[i - 1].module, norm)
    if i + 1 < len(places) and _n_inputs(places[i + 1].module) == norm.num_features:
        return places[i + 1], _folded_before(places[i + 1].module, norm)
    return None


def _n_outputs(module: nn.Module) -> int | None:
    return len(_weight(module)) if _is_plain(module) else None


def _n_inputs(module: Layer) -> int | None:
    if not _is_plain(module) or _has_border(module):
        return None
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def _is_plain(module: nn.Module) -> bool:
    """A layer as PyTorch made it: no subclass, no hook, no parametrized weight."""
    if _is_hooked(module):
        return False
    return type(module) in (nn.Linear, *CONVOLUTIONS) and "weight" in dict(module.named_parameters(recurse=False))


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _has_border(module: Layer) -> bool:
    """Whether it reads zeros from beyond its input."""
    if isinstance(module, nn.Linear) or module.padding_mode != "zeros" or module.padding == "valid":
        return False
    return module.padding == "same" or any(module.padding)


def _scale_and_shift(norm: Norm) -> tuple[Tensor, Tensor]:
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else norm.weight.detach() * scale
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else norm.bias.detach() + shift


def _folded_behind(layer: Layer, norm: Norm) -> Layer:
    scale, shift = _scale_and_shift(norm)
    weight = _weight(layer)
    bias = shift if layer.bias is None else layer.bias.detach() * scale + shift
    return _with(layer, weight * scale.view(-1, *[1] * (weight.dim() - 1)), bias)


def _folded_before(layer: Layer, norm: Norm) -> Layer:
    weight = _weight(layer)
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    shape = (*weight.shape[:2], *[1] * (weight.dim() - 2))
    scale, shift = (
        t.view(groups, 1, -1).expand(-1, len(weight) // groups, -1).reshape(shape) for t in _scale_and_shift(norm)
    )
    bias = (weight * shift).flatten(1).sum(1)
    return _with(layer, weight * scale, bias if layer.bias is None else layer.bias.detach() + bias)


def _weight(layer: Layer) -> Tensor:
    return layer.weight.detach()


def _with(layer: Layer, weight: Tensor, bias: Tensor) -> Layer:
    new = copy.deepcopy(layer)
    new.weight, new.bias = (nn.Parameter(t.to(layer.weight.dtype)) for t in (weight, bias))
    return new
