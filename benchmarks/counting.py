"""Operations of a step, counted as they are started: multiply-adds of the products, and entries of everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
NO_WORK = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view}


class Counter(TorchDispatchMode):
    """`products` is multiply-adds in matrix products and convolutions, `entries` the largest operand of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.products += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result) // 2
        elif not func.is_view and func.overloadpacket not in NO_WORK:
            self.entries += max((t.numel() for t in tree_leaves((args, result)) if isinstance(t, Tensor)), default=0)
        return result


def count(step: Callable[[], Any]) -> tuple[int, int]:
    """Multiply-adds in products, and entries touched by everything else."""
    with Counter() as counter:
        step()
    return counter.products, counter.entries
