"""Calls that carry tangents along by other means than PyTorch's formulas: because it has none, or for speed.

All that becomes of tangents is linear in them, so that one that is missing, None, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from math import ceil
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rowgrad.forward.numbers import Dual

# Rows of the data for which a product is faster with its weight on the left. The values are left as they are: wide
# layers have many entries before the kinks that follow, one of which, rounded otherwise, might lie beyond in the pass
# that checks.
FEW_ROWS = range(9, 33)
FEW_OUTPUTS = range(17)  # for which products are slow that do not fill vectors
VECTOR = 16  # numbers
NEAR = 2**20  # numbers that stay near the processor

NOTHING = None, None  # the value and the tangent of an argument that is not given

Call = Callable[..., Any]


# Rules: the call's arguments, with a Dual for each tensor, to the output; NotImplemented leaves it to PyTorch. The
# arguments have the names of the call's own.
#
# Note [products of zeros]. PyTorch's formulas take a missing tangent for zeros and multiply by them: of data with a
# weight that is half of the work.


def linear(input: Dual, weight: Dual, bias: Dual | None = None) -> Any:  # noqa: A002
    """d(h W^T + b) = h dW^T + dh W^T + db, summed in place; see Note [products of zeros]."""
    (h, dh), (W, dW), (b, db) = input, weight, bias or NOTHING
    if dh is None and dW is None:
        return NotImplemented
    if W.ndim == 2 and (b is None or b.ndim < 2):
        if h.shape[:-1].numel() in FEW_ROWS:
            ht, dht = input.each(lambda t: _as_matrix(t).t())
            dz = _transposed(_sum_of_products((dW, ht), (W, dht)), db)
            return Dual(F.linear(h, W, b), dz.view(*h.shape[:-1], len(W)))
        if len(W) in FEW_OUTPUTS:
            return _to_few_outputs(input, weight, bias)
    z = F.linear(h, W, b)
    if dW is None:
        assert dh is not None
        return Dual(z, F.linear(dh, W, db))
    dz = F.linear(h, dW, db)
    if dh is not None and W.ndim == 1:
        dz.add_(F.linear(dh, W))
    elif dh is not None:
        dz = _as_matrix(dz).addmm_(_as_matrix(dh), W.t()).view(z.shape)
    return Dual(z, dz)


def _to_few_outputs(input: Dual, weight: Dual, bias: Dual | None) -> Dual:  # noqa: A002
    """By products with W and dW one below the other: h with both at once, dh with as many lines as fill vectors."""
    (h, dh), (W, dW), (b, db) = input.each(_as_matrix), weight, bias or NOTHING
    n, shape = len(W), (*input.value.shape[:-1], len(W))
    lines = W if dW is None else torch.cat([W, dW])
    both = h @ lines.t()
    z, dz = both[:, :n], None if dW is None else both[:, n:]
    if dh is not None:
        through = (dh @ lines[: ceil(n / VECTOR) * VECTOR].t())[:, :n]
        dz = through if dz is None else dz.add_(through)
    assert dz is not None
    z, dz = (t.contiguous() if plus is None else t + plus for t, plus in ((z, b), (dz, db)))
    return Dual(z.view(shape), dz.view(shape))


def _as_matrix(t: Tensor) -> Tensor:
    return t if t.ndim == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _transposed(t: Tensor, plus: Tensor | None) -> Tensor:
    return t.t().contiguous() if plus is None else torch.add(t.t(), plus, out=t.new_empty(t.shape[::-1]))


def matmul(input: Dual, other: Dual | None = None, **named: Any) -> Any:  # noqa: A002
    """d(a b) = a db, or da b, where only one of them has a tangent; see Note [products of zeros]."""
    if other is None or named:
        return NotImplemented
    (a, da), (b, db) = input, other
    if da is not None and db is None:
        return Dual(a @ b, da @ b)
    if db is not None and da is None:
        return Dual(a @ b, a @ db)
    return NotImplemented


def layer_norm(
    input: Dual,  # noqa: A002
    normalized_shape: Any,
    weight: Dual | None = None,
    bias: Dual | None = None,
    eps: float = 1e-5,
) -> Any:
    """y = g x + b, with x the normalized input: dy = dg x + db + g dx.

    Note [normalization by its own backward]. The derivative of x in the input is a symmetric matrix, so that the kernel
    that multiplies cotangents by it multiplies tangents, too.
    """
    (h, dh), (g, dg), (b, db) = input, weight or NOTHING, bias or NOTHING
    shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    h = h.contiguous()
    y, mean, rstd = torch.native_layer_norm(h, shape, g, b, eps)
    dy = db if dg is None else torch.native_layer_norm(h, shape, dg, db, eps)[0]
    if dh is not None:
        backward = torch.ops.aten.native_layer_norm_backward
        dx, *_ = backward(dh.contiguous(), h, shape, mean, rstd, None, None, [True, False, False])
        dy = _sum_of(dx, g, dy)
    return Dual(y, None if dy is None else dy.expand_as(y))


def group_norm(
    input: Dual,  # noqa: A002
    num_groups: int,
    weight: Dual | None = None,
    bias: Dual | None = None,
    eps: float = 1e-5,
) -> Any:
    """As layer_norm, g and b by channel; see Note [normalization by its own backward]."""
    (h, dh), (g, dg), (b, db) = input, weight or NOTHING, bias or NOTHING
    if not h.numel():
        return NotImplemented
    n, c = h.shape[:2]
    sizes = n, c, h.numel() // (n * c), num_groups
    by_channel = (c, *[1] * (h.ndim - 2))
    h = h.contiguous()
    y, mean, rstd = torch.native_group_norm(h, g, b, *sizes, eps)
    dy = None if db is None else db.view(by_channel)
    if dg is not None:
        dy = torch.native_group_norm(h, dg, db, *sizes, eps)[0]
    if dh is not None:
        backward = torch.ops.aten.native_group_norm_backward
        dx, *_ = backward(dh.contiguous(), h, mean, rstd, None, *sizes, [True, False, False])
        dy = _sum_of(dx, None if g is None else g.view(by_channel), dy)
    return Dual(y, None if dy is None else dy.expand_as(y))


def _sum_of(dx: Tensor, g: Tensor | None, other: Tensor | None) -> Tensor:
    """g dx + other, in place."""
    if g is not None:
        dx.mul_(g)
    return dx if other is None else dx.add_(other)


def attention(
    query: Dual,
    key: Dual,
    value: Dual,
    attn_mask: Dual | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """o = P v, P = softmax(s q k^T): do = dP v + P dv, dP from s (dq k^T + q dk^T) by the softmax's own backward.

    That is P times a symmetric matrix, as in Note [normalization by its own backward]. What is masked has P = 0.
    """
    stacks = {t.value.shape[:-2] for t in (query, key, value)}
    still = query.tangent is None and key.tangent is None and value.tangent is None
    if (
        attn_mask is not None
        or dropout_p
        or enable_gqa
        or len(stacks) > 1
        or still
        or not (query.value.numel() and key.value.numel())
    ):
        return NotImplemented
    Q, K, V = (dual.each(lambda t: t.reshape(-1, *t.shape[-2:])) for dual in (query, key, value))
    (q, _), (k, _), (v, _) = Q, K, V
    s = q.shape[-1] ** -0.5 if scale is None else scale
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu_(1) if is_causal else None
    step = max(1, NEAR // (q.shape[1] * k.shape[1]))
    z, dz = (q.new_empty(*q.shape[:2], v.shape[2]) for _ in range(2))
    for i in range(0, len(q), step):
        some = itemgetter(slice(i, i + step))
        _attend(Q.each(some), K.each(some), V.each(some), s, mask, Dual(z, dz).each(some))
    shape = *query.value.shape[:-1], v.shape[2]
    return Dual(z.view(shape), dz.view(shape))


def _attend(query: Dual, key: Dual, value: Dual, s: float, mask: Tensor | None, out: Dual) -> None:
    (q, dq), (k, dk), (v, dv), (z, dz) = query, key, value, out
    P, dP = torch.bmm(q, k.mT).mul_(s), None
    if mask is not None:
        P.masked_fill_(mask, -torch.inf)
    P = P.softmax(-1)
    if dq is not None or dk is not None:
        dA = _sum_of_products((dq, k.mT), (q, None if dk is None else dk.mT)).mul_(s)
        dP = torch._softmax_backward_data(dA, P, -1, P.dtype)  # pyright: ignore[reportPrivateImportUsage]
    torch.bmm(P, v, out=z)
    assert dz is not None
    dz.copy_(_sum_of_products((dP, v), (P, dv)))


def _sum_of_products(*pairs: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """a b + a' b' + ..., of matrices or of stacks of them, without those of which a factor is missing."""
    total: Tensor | None = None
    for a, b in pairs:
        if a is None or b is None:
            continue
        if total is None:
            total = a @ b
        elif a.ndim == 2:
            total.addmm_(a, b)
        else:
            total.baddbmm_(a, b)
    assert total is not None
    return total


def embedding_bag(
    input: Dual,  # noqa: A002
    weight: Dual,
    offsets: Dual | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Dual | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Sums and means are linear in the table, and in the weights of what is looked up."""
    (ids, _), (W, dW), (starts, _), (a, da) = input, weight, offsets or NOTHING, per_sample_weights or NOTHING
    if mode == "max" or scale_grad_by_freq or max_norm is not None or (dW is None and da is None):
        return NotImplemented

    def bag(table: Tensor, weights: Tensor | None) -> Tensor:
        return F.embedding_bag(
            ids, table, starts, mode=mode, per_sample_weights=weights, include_last_offset=include_last_offset,
            padding_idx=padding_idx,
        )  # fmt: skip

    dz = [] if dW is None else [bag(dW, a)]
    if da is not None:
        dz.append(bag(W, da))
    return Dual(bag(W, a), dz[0] if len(dz) == 1 else dz[0] + dz[1])


# fmt: off
# call                            rule
RULES: dict[Call, Call] = {
    F.linear:                        linear,
    torch.matmul:                    matmul,
    torch.mm:                        matmul,
    torch.bmm:                       matmul,
    Tensor.matmul:                   matmul,
    Tensor.__matmul__:               matmul,
    F.layer_norm:                    layer_norm,
    F.group_norm:                    group_norm,
    F.scaled_dot_product_attention:  attention,
    F.embedding_bag:                 embedding_bag,
}
# fmt: on


# Calls whose kernels have no forward derivative: the context in which others are used, or the same in other calls


@contextmanager
def _without_fused_recurrence() -> Iterator[None]:
    """Not by oneDNN or cuDNN."""
    backends: tuple[Any, ...] = torch.backends.mkldnn, torch.backends.cudnn
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


def _embedding(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Autograd gives the row at `padding_idx` no gradient, and may divide one's by how often the batch looks it up."""
    z = F.embedding(input, weight, None, max_norm, norm_type)
    if scale_grad_by_freq:
        times = torch.bincount(input.flatten(), minlength=len(weight))[input].unsqueeze(-1)
        z = z.detach() + (z - z.detach()) / times
    if padding_idx is not None:
        z = torch.where((input == padding_idx % len(weight)).unsqueeze(-1), z.detach(), z)
    return z


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


# fmt: off
# call                            context
UNFUSED: dict[Call, Callable[[], AbstractContextManager[Any]]] = {
    F.scaled_dot_product_attention:  _without_fused_attention,
    F.multi_head_attention_forward:  _without_fused_attention,
    torch.lstm:                      _without_fused_recurrence,
    torch.gru:                       _without_fused_recurrence,
    torch.rnn_tanh:                  _without_fused_recurrence,
    torch.rnn_relu:                  _without_fused_recurrence,
}
COMPOSED: dict[Call, Call] = {
    F.embedding:         _embedding,
    torch._weight_norm:  _weight_norm,  # pyright: ignore[reportPrivateImportUsage]
}
# fmt: on
