"""From what a user writes in brackets to positions of examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rowgrad.parameters import shown


def positions(key: Any, n: int, device: torch.device) -> Tensor:
    """The examples meant, (k,) int64, each in 0 .. n - 1: by a whole number, several of them, a slice or a mask.

    Raises:
        IndexError: `key` is none of these, or an example is not among the n.
    """
    if isinstance(key, slice):
        return torch.tensor(_sliced(key, n), dtype=torch.int64, device=device)
    if isinstance(key, tuple):
        raise IndexError(f"J[{', '.join(map(shown, key))}]: a Jacobian has one index. {accepted(n)}")
    index = _as_tensor(key, n).to(device)
    if index.dtype == torch.bool:
        if index.shape != (n,):
            raise IndexError(f"J[{shown(key)}]: mask of shape {tuple(index.shape)}, expected ({n},)")
        return index.nonzero().squeeze(1)
    if not index.numel():
        return index.reshape(-1).long()
    if index.dtype == torch.uint8:
        raise IndexError(f"J[{shown(key)}]: uint8 may be a mask or positions; use .bool() or .long()")
    if index.is_floating_point() or index.is_complex():
        raise IndexError(f"J[{shown(key)}]: {shown(key)} is no index. {accepted(n)}")
    return _within(index.reshape(-1).long(), n, key)


def accepted(n: int) -> str:
    """What may stand in the brackets."""
    return (
        f"Examples are chosen by whole numbers (one, a list or a tensor of them), a slice, or a mask of shape ({n},); "
        "parameters by name, tensor or module, or a list of these"
    )


def _sliced(key: slice, n: int) -> range:
    try:
        return range(n)[key]
    except (TypeError, ValueError) as error:
        raise IndexError(f"J[{key}]: {error}. {accepted(n)}") from error


def _as_tensor(key: Any, n: int) -> Tensor:
    try:
        return torch.as_tensor(key)
    except (TypeError, ValueError, RuntimeError) as error:
        raise IndexError(f"J[{shown(key)}]: {shown(key)} is no index. {accepted(n)}") from error


def _within(index: Tensor, n: int, key: Any) -> Tensor:
    outside = index[(index < -n) | (index >= n)]
    if len(outside):
        raise IndexError(f"J[{shown(key)}]: example {int(outside[0])} is not among the {n} examples")
    return torch.where(index < 0, index + n, index)
