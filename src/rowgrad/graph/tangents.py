"""Forward mode through a single operation of a recorded graph: what its outputs do when its inputs move.

Note [forward mode from the backward side]
    An operation's call, c -> J^T c, is linear in its cotangents and can be differentiated: <J^T c, t> has the
    derivative J t in c, whatever c is. The two inner products <J^T c, t> and <c, J t> must agree, for the cotangents
    that the backward pass brings and for random ones; where they do not, part of the call escaped differentiation, or
    it is no linear map.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rowgrad.errors import GraphError, RowgradWarning
from rowgrad.tape import Node, Tape

Tensors = Sequence[Tensor | None]
MOST_CALLS = 10_000  # entries of an operation's outputs that are asked one by one


class Pushed(NamedTuple):
    """What one operation made of its cotangents and its inputs' tangents."""

    flows: list[float]  # <J^T c, t> at each input, 0 where there is none of either
    tangents: list[Tensor | None]  # J t at each output that has a cotangent


def push(tape: Tape, node: Node, cotangents: Tensors, tangents: Tensors) -> Pushed:
    """One operation in forward mode; where it cannot be differentiated twice, by a call for each output entry.

    Raises:
        GraphError: its outputs have too many entries for that, or its backward is not linear.
    """
    sent = tape.local_gradients(node, cotangents)
    try:
        found, reason = _by_double_backward(tape, node, cotangents, tangents), "its second derivative is incomplete"
    except RuntimeError as error:
        found, reason = None, str(error).partition("\n")[0]
    if found is None or not _agree(cotangents, found, sent, tangents):
        found = _by_formula(node, cotangents, tangents)
    if found is None or not _agree(cotangents, found, sent, tangents):
        found = _by_basis(tape, node, cotangents, tangents, reason)
    if not _agree(cotangents, found, sent, tangents):
        raise GraphError(
            f"{node!r}: its backward is not linear in the cotangent, so it is no derivative of anything and tangents "
            "cannot pass. Take shares of variables behind it"
        )
    return Pushed(_inner(sent, tangents), found)


def _by_double_backward(tape: Tape, node: Node, cotangents: Tensors, tangents: Tensors) -> list[Tensor | None] | None:
    """J t at random cotangents; None where it is not what the call says itself."""
    own = [None if c is None else _random(c).requires_grad_() for c in cotangents]
    with torch.enable_grad():
        sent = tape.local_gradients(node, own, differentiable=True)
        flows = [_dot(s, t) for s, t in zip(sent, tangents, strict=True) if s is not None and t is not None]
        total = sum((f for f in flows if f.requires_grad), torch.zeros((), dtype=torch.float64))
    made = iter(())
    if total.requires_grad:
        made = iter(torch.autograd.grad(total, [c for c in own if c is not None], allow_unused=True))
    found = [None if c is None else _filled(next(made, None), c) for c in own]
    return found if _agree(own, found, sent, tangents) else None


def _by_formula(node: Node, cotangents: Tensors, tangents: Tensors) -> list[Tensor | None] | None:
    """J t of fused attention, which cannot be differentiated twice; None for other operations, and with dropout.

    With S = scale q k^T, P = softmax(S) and o = P v: dP = P . (dS - sum(P . dS)) along each row, do = dP v + P dv.
    """
    if not node.kind.startswith("ScaledDotProduct") or node.attribute("dropout_p") != 0:
        return None
    q, k, v = (node.saved(name) for name in ("query", "key", "value"))
    if q.shape[:-2] != k.shape[:-2]:
        return None
    given = zip((q, k, v), tangents, strict=False)
    dq, dk, dv = (torch.zeros_like(x) if t is None else t.to(x.dtype) for x, t in given)
    scale = node.attribute("scale") or q.shape[-1] ** -0.5
    weights = _masked(node, scale * q @ k.transpose(-1, -2)).softmax(-1)
    moved = scale * (dq @ k.transpose(-1, -2) + q @ dk.transpose(-1, -2))
    moved = weights * (moved - (weights * moved).sum(-1, keepdim=True))
    found = moved @ v + weights @ dv
    return [found if nr == 0 and c is not None else None for nr, c in enumerate(cotangents)]


def _masked(node: Node, scores: Tensor) -> Tensor:
    if node.attribute("is_causal"):
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    mask = node.saved("attn_mask") if node.has_saved("attn_mask") else None
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


def _by_basis(tape: Tape, node: Node, cotangents: Tensors, tangents: Tensors, reason: str) -> list[Tensor | None]:
    """J t entry by entry: <J^T e_k, t> for every k."""
    calls = sum(c.numel() for c in cotangents if c is not None)
    if calls > MOST_CALLS or any(c is not None and c.is_complex() for c in cotangents):
        raise GraphError(
            f"{node!r} cannot be differentiated twice ({reason}), and its outputs have {calls} entries; "
            f"at most {MOST_CALLS} real ones can be asked one by one. Use an unfused form of this layer, or a "
            "smaller batch"
        )
    warnings.warn(
        f"{node!r} cannot be differentiated twice ({reason}); its tangents are exact, at {calls} calls of it",
        RowgradWarning,
        stacklevel=6,  # where the user asked for the shares
    )
    found = [None if c is None else _filled(None, c) for c in cotangents]
    for nr, out in enumerate(found):
        if out is not None:
            entries = out.view(-1)
            for k in range(len(entries)):
                basis = [_unit(out, k) if i == nr else None for i in range(len(found))]
                entries[k] = sum(_inner(tape.local_gradients(node, basis), tangents))
    return found


def _unit(like: Tensor, k: int) -> Tensor:
    found = _filled(None, like)
    found.view(-1)[k] = 1
    return found


def _filled(t: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like, memory_format=torch.contiguous_format) if t is None else t.detach()


def _random(like: Tensor) -> Tensor:
    """The same numbers each time, without drawing from the user's."""
    numbers = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return numbers.to(like.device, like.dtype)


def _inner(a: Tensors, b: Tensors) -> list[float]:
    return [0.0 if s is None or t is None else float(_dot(s, t).detach()) for s, t in zip(a, b, strict=True)]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Re <a, b> in double precision."""
    a = a.to_dense() if a.is_sparse else a
    both = (a * b.conj()).real if a.is_complex() or b.is_complex() else a.double() * b.double()
    return both.double().sum()


def _agree(cotangents: Tensors, pushed: Tensors, sent: Tensors, tangents: Tensors) -> bool:
    """<c, J t> = <J^T c, t>, to the rounding of the coarsest dtype."""
    off = sum(_inner(cotangents, pushed)) - sum(_inner(sent, tangents))
    rounding = max(torch.finfo(t.dtype).eps for t in (*cotangents, *tangents) if t is not None) ** 0.5
    return abs(off) <= rounding * (_size(cotangents, pushed) + _size(sent, tangents))


def _size(a: Tensors, b: Tensors) -> float:
    pairs = [(s.detach(), t.detach()) for s, t in zip(a, b, strict=True) if s is not None and t is not None]
    return sum(_length(s) * _length(t) for s, t in pairs)


def _length(t: Tensor) -> float:
    """Euclidean, also of numbers so small that their squares are zero."""
    sizes = (t.to_dense() if t.is_sparse else t).abs().double()
    largest = float(sizes.max()) if sizes.numel() else 0.0
    return largest * float((sizes / largest).norm()) if 0 < largest < float("inf") else largest
