"""Sequences of modules that run one after the other."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn


def is_chain(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether it does what `nn.Sequential` does: a subclass with a forward of its own does not."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
