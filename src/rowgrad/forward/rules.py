"""Calls that carry tangents along by other means than PyTorch's formulas: because it has none, or for speed.

A dual number is a tensor with its tangent (`torch.autograd.forward_ad`). All that becomes of tangents is linear in them,
so that one that is missing, None, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

THIN = 32  # outputs up to which a product is so narrow that one of twice the width costs hardly more

Tangent = Tensor | None
Call = Callable[..., Any]


# Rules: arguments of the call, dual numbers among them, to the dual output; NotImplemented leaves it to PyTorch.
# The arguments have the names of the call's own.
#
# Note [products of zeros]. PyTorch's formulas take a missing tangent for zeros and multiply by them: of data with a
# weight that is half of the work.


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: A002
    """d(h W^T + b) = h dW^T + dh W^T + db, summed in place; see Note [products of zeros]."""
    (h, dh), (W, dW), (b, db) = _parts(input), _parts(weight), _parts(bias)
    if W.ndim != 2 or (dh is None and dW is None):
        return NotImplemented
    if dW is None:
        return make_dual(F.linear(h, W, b), F.linear(dh, W, db))
    if len(W) <= THIN:
        z, dz = F.linear(h, torch.cat([W, dW])).tensor_split(2, -1)
        z, dz = _plus(z, b).contiguous(), _plus(dz, db).contiguous()
    else:
        z, dz = F.linear(h, W, b), F.linear(h, dW, db)
    if dh is not None:
        dz.view(-1, dz.shape[-1]).addmm_(dh.reshape(-1, dh.shape[-1]), W.t())
    return make_dual(z, dz)


def _plus(t: Tensor, other: Tensor | None) -> Tensor:
    return t if other is None else t + other


def _convolution(convolve: Call) -> Call:
    def rule(input: Tensor, weight: Tensor, bias: Tensor | None = None, *how: Any, **named: Any) -> Any:  # noqa: A002
        """d(h * W + b) = h * dW + dh * W + db; see Note [products of zeros]."""
        (h, dh), (W, dW), (b, db) = _parts(input), _parts(weight), _parts(bias)
        if dh is None and dW is None:
            return NotImplemented
        z = convolve(h, W, b, *how, **named)
        if dW is None:
            return make_dual(z, convolve(dh, W, db, *how, **named))
        dz = convolve(h, dW, db, *how, **named)
        return make_dual(z, dz if dh is None else dz.add_(convolve(dh, W, None, *how, **named)))

    return rule


def _product(multiply: Call) -> Call:
    def rule(a: Tensor, b: Tensor) -> Any:
        """d(a b) = a db + da b; see Note [products of zeros]."""
        (a, da), (b, db) = _parts(a), _parts(b)
        if (da is None) == (db is None):
            return NotImplemented
        return make_dual(multiply(a, b), multiply(a, db) if da is None else multiply(da, b))

    return rule


def layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """y = g x + b, with x the normalized input: dy = dg x + db + g dx.

    Note [normalization by its own backward]. The derivative of x in the input is a symmetric matrix, so that the kernel
    that multiplies cotangents by it multiplies tangents, too.
    """
    (h, dh), (g, dg), (b, db) = _parts(input), _parts(weight), _parts(bias)
    if dh is None:
        return NotImplemented
    shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    h = h.contiguous()
    y, mean, rstd = torch.native_layer_norm(h, shape, g, b, eps)
    backward = torch.ops.aten.native_layer_norm_backward
    dy, *_ = backward(dh.contiguous(), h, shape, mean, rstd, None, None, [True, False, False])
    if g is not None:
        dy.mul_(g)
    if dg is not None:
        dy.add_(torch.native_layer_norm(h, shape, dg, db, eps)[0])
    elif db is not None:
        dy.add_(db)
    return make_dual(y, dy)


def group_norm(
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """As layer_norm, g and b by channel; see Note [normalization by its own backward]."""
    (h, dh), (g, dg), (b, db) = _parts(input), _parts(weight), _parts(bias)
    if dh is None or not h.numel():
        return NotImplemented
    n, c = h.shape[:2]
    sizes = n, c, h.numel() // (n * c), num_groups
    by_channel = (c, *[1] * (h.ndim - 2))
    h = h.contiguous()
    y, mean, rstd = torch.native_group_norm(h, g, b, *sizes, eps)
    dy, *_ = torch.ops.aten.native_group_norm_backward(
        dh.contiguous(), h, mean, rstd, None, *sizes, [True, False, False]
    )
    if g is not None:
        dy.mul_(g.view(by_channel))
    if dg is not None:
        dy.add_(torch.native_group_norm(h, dg, db, *sizes, eps)[0])
    elif db is not None:
        dy.add_(db.view(by_channel))
    return make_dual(y, dy)


def embedding(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Autograd gives the row at `padding_idx` no gradient, and may divide a row's by how often the batch looks it up."""
    W, dW = _parts(weight)
    if dW is None or (padding_idx is None and not scale_grad_by_freq):
        return NotImplemented
    z, dz = F.embedding(input, W, padding_idx, max_norm, norm_type), F.embedding(input, dW)
    if scale_grad_by_freq:
        dz /= torch.bincount(input.flatten(), minlength=len(W))[input].unsqueeze(-1)
    if padding_idx is not None:
        dz.masked_fill_((input == padding_idx % len(W)).unsqueeze(-1), 0)
    return make_dual(z, dz)


def embedding_bag(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Sums and means are linear in the table, and in the weights of what is looked up."""
    (W, dW), (a, da) = _parts(weight), _parts(per_sample_weights)
    if mode == "max" or scale_grad_by_freq or max_norm is not None or (dW is None and da is None):
        return NotImplemented

    def bag(table: Tensor, weights: Tensor | None) -> Tensor:
        return F.embedding_bag(
            input, table, offsets, mode=mode, per_sample_weights=weights, include_last_offset=include_last_offset,
            padding_idx=padding_idx,
        )  # fmt: skip

    dz = [bag(table, weights) for table, weights, moved in ((dW, a, dW), (W, da, da)) if moved is not None]
    return make_dual(bag(W, a), dz[0] if len(dz) == 1 else dz[0] + dz[1])


RULES: dict[Call, Call] = {
    # fmt: off
    F.linear:           linear,
    F.conv1d:           _convolution(F.conv1d),
    F.conv2d:           _convolution(F.conv2d),
    F.conv3d:           _convolution(F.conv3d),
    torch.matmul:       _product(torch.matmul),
    torch.mm:           _product(torch.matmul),
    torch.bmm:          _product(torch.matmul),
    Tensor.matmul:      _product(torch.matmul),
    Tensor.__matmul__:  _product(torch.matmul),
    F.layer_norm:       layer_norm,
    F.group_norm:       group_norm,
    F.embedding:        embedding,
    F.embedding_bag:    embedding_bag,
    # fmt: on
}


# Calls whose kernels have no forward derivative: the context in which others are used, or the same in other calls


@contextmanager
def _without_fused_recurrence() -> Iterator[None]:
    """Not by oneDNN or cuDNN."""
    backends = torch.backends.mkldnn, torch.backends.cudnn
    before = [backend.enabled for backend in backends]
    try:
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        for backend, was in zip(backends, before, strict=True):
            backend.enabled = was


def _without_fused_attention() -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


UNFUSED: dict[Call, Callable[[], AbstractContextManager[Any]]] = {
    # fmt: off
    F.scaled_dot_product_attention:  _without_fused_attention,
    F.multi_head_attention_forward:  _without_fused_attention,
    torch.lstm:                      _without_fused_recurrence,
    torch.gru:                       _without_fused_recurrence,
    torch.rnn_tanh:                  _without_fused_recurrence,
    torch.rnn_relu:                  _without_fused_recurrence,
    # fmt: on
}
COMPOSED: dict[Call, Call] = {torch._weight_norm: _weight_norm}


def _parts(t: Tensor | None) -> tuple[Any, Any]:
    """Value and tangent."""
    return (None, None) if t is None else tuple(unpack_dual(t))
