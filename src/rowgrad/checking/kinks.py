"""On which pieces of its piecewise functions a forward pass runs: masks of ReLU, winners of max, every comparison.

Two passes with equal pieces lie on one smooth piece of the loss, as far as these functions go; where they differ, a
difference of losses has stepped over a kink or a jump.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Piece = tuple[str, Tensor]


def _beyond(x: Tensor, *limits: Any) -> Tensor:
    """How many of the limits each entry lies above."""
    above = [(x > limit).to(torch.uint8) for limit in limits if limit is not None]
    return torch.stack(above).sum(0) if above else torch.zeros((), dtype=torch.uint8)


def _of_zero(x: Tensor, *_: Any) -> Tensor:
    return _beyond(x, 0)


def _of_limit(x: Tensor, limit: Any, *_: Any) -> Tensor:
    return _beyond(x, limit)


def _of_range(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    return _beyond(x, low, high)


# Functions whose results are no integers, with the piece on which each entry lies. Whatever returns integers or truth
# values from floating-point numbers (comparisons, argmax, sort, max pooling) tells its pieces itself. Functions that
# write in place go by the name without the underscore.
_PIECES: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(("relu", "leaky_relu", "abs", "sign", "sgn", "elu", "celu", "selu"), _of_zero),
    **dict.fromkeys(("_prelu_kernel", "rrelu_with_noise"), _of_zero),
    **dict.fromkeys(("clamp_min", "clamp_max", "threshold", "maximum", "minimum", "fmax", "fmin"), _of_limit),
    "clamp": _of_range,
    "hardtanh": lambda x, low=-1, high=1: _of_range(x, low, high),
    **dict.fromkeys(("hardswish", "hardsigmoid"), lambda x: _of_range(x, -3, 3)),
    **dict.fromkeys(("hardshrink", "softshrink"), lambda x, limit=0.5: _of_range(x, -limit, limit)),
}
_ROUNDED = {"floor", "ceil", "round", "trunc"}
_EXTREME = {"amax", "amin", "max", "min"}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Piece] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        name = name if name.startswith("_") else name.rstrip("_")
        x = args[0] if args and isinstance(args[0], Tensor) and args[0].is_floating_point() else None
        if x is not None and name in _PIECES:
            self.found.append((name, _PIECES[name](x, *args[1:])))
        result = func(*args, **(kwargs or {}))
        if x is not None:
            self.found += [(name, piece) for piece in _told(name, x, args[1:], result)]
        return result


def _told(name: str, x: Tensor, rest: tuple, result: Any) -> Iterator[Tensor]:
    """The pieces that a function's results tell."""
    parts = [part for part in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(part, Tensor)]
    yield from (part.clone() for part in parts if not (part.is_floating_point() or part.is_complex()))
    if name in _ROUNDED:
        yield parts[0].clone()
    if name in _EXTREME and len(parts) == 1:
        dims = rest[0] if rest else []
        keeps = len(rest) > 1 and rest[1]
        yield x == (parts[0] if keeps or not dims else _unsqueezed(parts[0], dims, x.ndim))


def _unsqueezed(t: Tensor, dims: list[int], ndim: int) -> Tensor:
    for dim in sorted(d % ndim for d in dims):
        t = t.unsqueeze(dim)
    return t


@contextmanager
def recorded_pieces() -> Iterator[list[Piece]]:
    """Watches the forward passes in the block."""
    with _Recorder() as recorder:
        yield recorder.found


def crossed(one: list[Piece], other: list[Piece]) -> dict[str, int]:
    """{function: entries that are on different pieces in the two passes}, without those that are on none."""
    found: dict[str, int] = {}
    if [(name, p.shape) for name, p in one] != [(name, p.shape) for name, p in other]:
        return {"control flow": 1}
    for (name, a), (_, b) in zip(one, other, strict=True):
        n = int((a != b).sum())
        if n:
            found[name] = found.get(name, 0) + n
    return found
