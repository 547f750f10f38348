"""Forward mode through a single operation of a recorded graph: what its outputs do when its inputs move.

Note [forward mode from the backward side]
    An operation's call is linear in its cotangents c and can be differentiated: <J^T c, t> has the derivative J t in
    c. At the cotangents that the backward pass brings, the same call yields what goes along each edge, J^T c, so the
    two inner products <J^T c, t> and <c, J t> must agree; where they do not, part of the call escaped
    differentiation, or the operation's backward is no linear map.
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

    flows: list[float]  # <sent, tangent> at each input, 0 where there is none of either
    tangents: list[Tensor | None]  # J t at each output that has a cotangent


def push(tape: Tape, node: Node, cotangents: Tensors, tangents: Tensors) -> Pushed:
    """One operation in forward mode; where it cannot be differentiated twice, by a call for each output entry.

    Raises:
        GraphError: its outputs have too many entries for that, or its backward is not linear.
    """
    try:
        pushed, reason = _by_double_backward(tape, node, cotangents, tangents), "its second derivative is incomplete"
    except RuntimeError as error:
        pushed, reason = None, str(error).partition("\n")[0]
    if pushed is not None and _agrees(pushed, cotangents):
        return pushed
    pushed = _by_basis(tape, node, cotangents, tangents, reason)
    if not _agrees(pushed, cotangents):
        raise GraphError(
            f"{node!r}: its backward is not linear in the cotangent, so it is no derivative of anything and tangents "
            "cannot pass. Take shares of variables behind it"
        )
    return pushed


def _by_double_backward(tape: Tape, node: Node, cotangents: Tensors, tangents: Tensors) -> Pushed:
    own = [None if c is None else c.detach().requires_grad_() for c in cotangents]
    with torch.enable_grad():
        sent = tape.local_gradients(node, own, differentiable=True)
        flows = [_inner(s, t) for s, t in zip(sent, tangents, strict=True)]
        total = sum((f for f in flows if f.requires_grad), torch.zeros((), dtype=torch.float64))
    found = [None] * len(own)
    if total.requires_grad:
        asked = [c for c in own if c is not None]
        made = iter(torch.autograd.grad(total, asked, allow_unused=True))
        found = [None if c is None else next(made) for c in own]
    return Pushed([float(f.detach()) for f in flows], _filled(found, cotangents))


def _by_basis(tape: Tape, node: Node, cotangents: Tensors, tangents: Tensors, reason: str) -> Pushed:
    """J t entry by entry: <J^T e_k, t> for every k."""
    entries = sum(c.numel() for c in cotangents if c is not None)
    if entries > MOST_CALLS or any(c is not None and c.is_complex() for c in cotangents):
        raise GraphError(
            f"{node!r} cannot be differentiated twice ({reason}), and its outputs have {entries} entries, too many to "
            f"be asked one by one (at most {MOST_CALLS}, real). Use an unfused form of this layer, or a smaller batch"
        )
    warnings.warn(
        f"{node!r} cannot be differentiated twice ({reason}); its tangents are exact, at {entries} calls of it",
        RowgradWarning,
        stacklevel=2,
    )
    found = _filled([None] * len(cotangents), cotangents)
    for nr, out in enumerate(found):
        for k in range(0 if out is None else out.numel()):
            out.view(-1)[k] = sum(_flows(tape, node, _basis(cotangents, nr, k), tangents))
    return Pushed(_flows(tape, node, cotangents, tangents), found)


def _flows(tape: Tape, node: Node, cotangents: Tensors, tangents: Tensors) -> list[float]:
    sent = tape.local_gradients(node, cotangents)
    return [float(_inner(s, t)) for s, t in zip(sent, tangents, strict=True)]


def _basis(cotangents: Tensors, nr: int, k: int) -> list[Tensor | None]:
    own = [torch.zeros_like(c) if c is not None and i == nr else None for i, c in enumerate(cotangents)]
    vector = own[nr]
    if vector is not None:
        vector.view(-1)[k] = 1
    return own


def _filled(found: Tensors, cotangents: Tensors) -> list[Tensor | None]:
    return [
        None if c is None else torch.zeros_like(c, memory_format=torch.contiguous_format) if t is None else t.detach()
        for t, c in zip(found, cotangents, strict=True)
    ]


def _inner(a: Tensor | None, b: Tensor | None) -> Tensor:
    """Re <a, b> in double precision."""
    if a is None or b is None:
        return torch.zeros((), dtype=torch.float64)
    a = a.to_dense() if a.is_sparse else a
    both = (a * b.conj()).real if a.is_complex() or b.is_complex() else a.double() * b.double()
    return both.sum().double()


def _agrees(pushed: Pushed, cotangents: Tensors) -> bool:
    """<J^T c, t> = <c, J t>, to the rounding of the coarsest dtype."""
    inside = [float(_inner(c, t)) for c, t in zip(cotangents, pushed.tangents, strict=True)]
    size = max((float(c.abs().double().norm() * t.abs().double().norm())
                for c, t in zip(cotangents, pushed.tangents, strict=True) if c is not None and t is not None), default=0.0)
    size = max(size, *map(abs, pushed.flows))
    rounding = max(torch.finfo(c.dtype).eps for c in cotangents if c is not None) ** 0.5
    return abs(sum(inside) - sum(pushed.flows)) <= rounding * size
