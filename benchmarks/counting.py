"""Operations of a step, counted as they are started: multiply-adds of the products, and what everything touches."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
NO_WORK = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view}


class Counted(NamedTuple):
    """`products` is multiply-adds in matrix products and convolutions, `entries` the largest operand of each other
    operation, `bytes` what all operations read and write."""

    products: int
    entries: int
    bytes: int


class Counter(TorchDispatchMode):
    """Counts what runs within it."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.entries = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = OF_IN_PLACE.get(func.overloadpacket, func.overloadpacket)
        if func.is_view or packet in NO_WORK:
            return result
        tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
        self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        if packet in FUSED:
            self.products += FUSED[packet](*args)
        elif packet in flop_registry:
            self.products += flop_registry[packet](*args, **(kwargs or {}), out_val=result) // 2
        else:
            self.entries += max((t.numel() for t in tensors), default=0)
        return result


def _lstm(x: Tensor, into: Tensor, within: Tensor, *_: Any) -> int:
    return prod(x.shape[:-1]) * (into.numel() + within.numel())


def _lstm_backward(*args: Any) -> int:
    return 2 * _lstm(*args)  # of the input and of the weights, whatever is asked for


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    return prod(q.shape[:-1]) * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])


def _convolution_backward(z: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    *_, transposed, _, _, wanted = rest
    moved = x if transposed else z
    return moved.shape[0] * prod(moved.shape[2:]) * weight.numel() * sum(wanted[:2])


# The CPU's fused kernels, of which PyTorch counts nothing, and one of which it forgets the groups.
FUSED: dict[Any, Callable[..., int]] = {
    aten.convolution_backward: _convolution_backward,
    aten.mkldnn_rnn_layer: _lstm,
    aten.mkldnn_rnn_layer_backward: _lstm_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


OF_IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}


def count(step: Callable[[], Any]) -> Counted:
    """What one step does."""
    with Counter() as counter:
        step()
    return Counted(counter.products, counter.entries, counter.bytes)
