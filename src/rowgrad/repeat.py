"""A forward pass run again as if for the first time: same random numbers, same buffers."""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rowgrad.errors import GraphError


class Repeated:
    """Runs a closure any number of times without a trace: each run starts from the random state and the buffers (of
    BatchNorm, for instance) at which this object was made, and both are put back behind it.

    What else a closure changes (attributes that are no buffers, generators of its own, files) is not known here.

    Args:
        closure: the forward pass; returns the losses.
        model: whose buffers are exchanged for copies while it runs; anything but a module has none.
    Raises:
        TypeError: `closure` cannot be called.
    """

    def __init__(self, closure: Callable[[], Tensor], model: object) -> None:
        check_closure(closure)
        self.closure, self.model = closure, model
        self.draws = False  # whether any run drew random numbers
        self._start = random_state()
        self._last: Callable[[], Tensor | None] = lambda: None

    def __call__(self) -> Tensor:
        """The losses, with their graph.

        Raises:
            GraphError: the closure returned no tensor.
        """
        if self._start["numpy"] is None:
            self._start["numpy"] = random_state()["numpy"]  # NumPy may have been loaded since
        with same_randomness(self._start), own_buffers(self.model), torch.enable_grad():
            losses = self.closure()
            self.draws = self.draws or _differ(random_state(), self._start)
        if not isinstance(losses, Tensor):
            raise GraphError(f"closure returned a {type(losses).__name__}, expected the losses as a tensor")
        if losses is self._last():
            raise GraphError(
                "closure returned the same tensor twice: it has to run the forward pass each time it is called"
            )
        self._last = weakref.ref(losses)
        return losses


def check_closure(closure: object) -> None:
    """Refuse what cannot be called."""
    if not callable(closure):
        raise TypeError(
            f"closure is a {type(closure).__name__}, expected a function that runs the forward pass and returns the "
            "losses, for instance `lambda: losses_of(batch)`"
        )


@contextmanager
def own_buffers(model: object) -> Iterator[None]:
    """Copies of a module's buffers while the block runs."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [(m, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
    copies: dict[int, Tensor] = {}
    try:
        for module, name, buffer in before:
            module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
        yield
    finally:
        for module, name, buffer in before:
            module._buffers[name] = buffer


@contextmanager
def same_randomness(start: dict[str, Any]) -> Iterator[None]:
    """Random numbers from this state on; the state before is put back."""
    before = random_state()
    set_random_state(start)
    try:
        yield
    finally:
        set_random_state(before)


def random_state() -> dict[str, Any]:
    """Of PyTorch on every device in use, of Python and of NumPy where it is in use."""
    return {
        "python": random.getstate(),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": _numpy_random().get_state() if _numpy_random() is not None else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from a state that `random_state` returned."""
    random.setstate(state["python"])
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    if state["numpy"] is not None:
        _numpy_random().set_state(state["numpy"])


def _differ(now: dict[str, Any], start: dict[str, Any]) -> bool:
    """Whether a generator that was in use at the start has moved."""
    return not all(_equal(now[name], state) for name, state in start.items() if state is not None)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return bool((a == b).all()) if hasattr(a, "all") else a == b


def _numpy_random() -> Any:
    """NumPy's, if anything in this process uses it."""
    return sys.modules.get("numpy.random")
