"""A model and its forward pass in float64, whatever dtype they are written in, without changing either.

Note [how a forward pass becomes one in float64]
    Parameters hold float64 values while the block runs, and tensors of fewer digits are exchanged for float64 ones at
    every function of PyTorch that meets them: inputs, constants, and dtypes that the code asks for. Autocast leaves
    float64 alone, and compiled regions run eagerly. What no Python function of PyTorch sees stays as it is: scripted
    modules, kernels of other libraries. The graph shows it, see `narrowest`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from rowgrad.errors import ParameterError
from rowgrad.tape import Tape

WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
_NARROWING = {Tensor.float, Tensor.half, Tensor.bfloat16}
_ABOUT_GRADIENTS = {
    "backward", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "detach_",
    "__get__", "__set__", "__delete__",
}  # fmt: skip


@contextmanager
def in_float64(model: object, parameters: Iterable[Tensor]) -> Iterator[None]:
    """See Note [how a forward pass becomes one in float64]; each forward pass runs under a `Widening` of its own.

    Args:
        model: its frozen parameters and its buffers are converted with the rest, if it is a module.
        parameters: leaf tensors that the forward pass uses.
    Raises:
        ParameterError: a device without float64.
    """
    tensors = {id(p): p for p in parameters}
    tensors |= {id(p): p for p in model.parameters()} if isinstance(model, nn.Module) else {}
    narrow = [(p, p.data) for p in tensors.values() if p.dtype in WIDER]
    with ExitStack() as stack:
        stack.callback(_put_back, narrow)
        for p, data in narrow:
            p.data = _widened(data)
        stack.enter_context(_buffers_widened(model))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _put_back(narrow: list[tuple[Tensor, Tensor]]) -> None:
    for p, data in narrow:
        p.data = data


def _widened(t: Tensor) -> Tensor:
    try:
        return t.to(WIDER[t.dtype])
    except (TypeError, RuntimeError) as error:
        raise ParameterError(
            f"{t.device} cannot hold float64 ({error}), and in fewer digits differences tell nothing exact. Move the "
            "model and its data to the CPU for this check"
        ) from error


@contextmanager
def _buffers_widened(model: object) -> Iterator[None]:
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    narrow = [(m, name, b) for m in modules for name, b in m._buffers.items() if b is not None and b.dtype in WIDER]
    try:
        for module, name, buffer in narrow:
            module._buffers[name] = _widened(buffer.detach())
        yield
    finally:
        for module, name, buffer in narrow:
            module._buffers[name] = buffer


class Widening(TorchFunctionMode):
    """Exchanges what has fewer digits at every function.

    Args:
        held: what `detach()` returned, call by call: filled by a first forward pass, returned again in later ones.
            Default None, then `detach()` is nothing special.
    """

    def __init__(self, held: list[Tensor] | None = None) -> None:
        super().__init__()
        self._held, self._n_held = held, 0  # and the calls of detach() so far
        self._known: dict[int, tuple[Tensor, int, Tensor]] = {}  # by id: tensor, its version, the float64 one

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ABOUT_GRADIENTS:
            result = func(*args, **kwargs)
            return WIDER.get(result, result) if isinstance(result, torch.dtype) else result
        if func is Tensor.detach and self._held is not None:
            return self._same(self._wide(args[0]).detach())
        if func in _NARROWING:
            return self._wide(args[0]).double() if not args[0].is_complex() else self._wide(args[0])
        written = args[:1] if _writes_into_first(name) else ()
        rest = tree_map(self._wide, args[len(written) :])
        return func(*written, *rest, **tree_map(self._wide, kwargs))

    def _same(self, found: Tensor) -> Tensor:
        """What the first pass found in its place."""
        assert self._held is not None
        if self._n_held == len(self._held):
            self._held.append(found.clone())
        self._n_held += 1
        return self._held[self._n_held - 1].clone()

    def _wide(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return WIDER.get(value, value)
        if not isinstance(value, Tensor) or value.dtype not in WIDER:
            return value
        if not value.is_leaf:
            return value.to(WIDER[value.dtype])
        known = self._known.get(id(value))
        if known is None or known[1] != value._version or known[2].requires_grad != value.requires_grad:
            wide = value.detach().to(WIDER[value.dtype]).requires_grad_(value.requires_grad)
            known = self._known[id(value)] = value, value._version, wide
        return known[2]


def _writes_into_first(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in {"__setitem__", "__iadd__", "__imul__"}


def narrowest(tape: Tape) -> torch.dtype:
    """Of the floating-point dtypes in a graph the one with the fewest digits."""
    found = {node.dtype(nr) for node in tape.nodes for nr in range(node.n_outputs) if node.is_traced(nr)}
    real = [d for d in found if d.is_floating_point]
    return max(real, key=lambda d: torch.finfo(d).eps, default=torch.float64)
