"""Dual numbers: a value with its tangent, how far it moves when the parameters move along the direction."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rowgrad.errors import ForwardModeError


class Dual(NamedTuple):
    """Value and tangent of a tensor; no tangent stands for zeros."""

    value: Tensor
    tangent: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> Dual:
        """Something linear of both."""
        return Dual(change(self.value), None if self.tangent is None else change(self.tangent))

    def join(self) -> Tensor:
        """One tensor, whose tangent PyTorch carries along. As `torch.autograd.forward_ad.make_dual`, at its price."""
        if self.tangent is None:
            return self.value
        _load_formulas()
        return torch._make_dual(self.value, self.tangent, level=0)  # pyright: ignore[reportPrivateImportUsage]


def split(t: Tensor) -> Dual:
    """As `torch.autograd.forward_ad.unpack_dual`, at a third of its price. Not under `torch.func.vmap` or `grad`."""
    return Dual(*torch._unpack_dual(t, level=0))  # pyright: ignore[reportPrivateImportUsage]


def enter_level() -> int:
    """Begin where dual numbers live; PyTorch has one such place, for all threads.

    Raises:
        ForwardModeError: somebody is in it.
    """
    try:
        return forward_ad.enter_dual_level()
    except RuntimeError as error:
        raise ForwardModeError(
            f"dual numbers are in use already ({error}): a jvp inside another, or code between torch.autograd."
            "forward_ad.dual_level() and its end. Use rowgrad.jacobian(losses, params).dot(direction) there"
        ) from error


def leave_level(level: int) -> None:
    """Tensors that live on keep their values alone."""
    forward_ad.exit_dual_level(level=level)


@cache
def _load_formulas() -> None:
    """Those that PyTorch keeps in Python come with its own function, as scripts, which it says are deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
