"""What a piece of code leaves behind on models and tensors, and in the process.

Used through the fixture `leaves_nothing_behind`:

    with leaves_nothing_behind(model, losses):
        rowgrad.jacobian(losses, model).norms()

Hooks are found by their handles: every `register_..._hook` of PyTorch, on a module, a tensor, a node of the graph or
for the whole process, makes a `RemovableHandle`. A handle made inside whose hook is still in place is a leftover. All
else is found by comparing two records, one taken before and one after.
"""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Record = dict[str, Any]


@contextmanager
def nothing_left_behind(*things: nn.Module | Tensor, may_change: Collection[str] = ()) -> Iterator[None]:
    """Fail if the code inside changes what it was given, or the state of the process.

    `may_change` names what is meant to change: `{"grad"}` around `backward`.
    """
    before = _record(things)
    with _handles_made() as handles:
        yield
    found = [f"hook {_in_place(handle)!r}" for handle in handles if _in_place(handle) is not None]
    found += _differences(before, _record(things), may_change)
    assert not found, "left behind:\n  " + "\n  ".join(found)


@contextmanager
def _handles_made() -> Iterator[list[RemovableHandle]]:
    """Handles of all hooks registered inside."""
    made: list[RemovableHandle] = []
    original = RemovableHandle.__init__

    def recording(self: RemovableHandle, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    RemovableHandle.__init__ = recording
    try:
        yield made
    finally:
        RemovableHandle.__init__ = original


def _in_place(handle: RemovableHandle) -> Any:
    """The hook behind a handle, None once it was removed or died with its owner."""
    hooks = handle.hooks_dict_ref()
    return None if hooks is None else hooks.get(handle.id)


def _differences(before: Record, after: Record, may_change: Collection[str]) -> list[str]:
    return [
        f"{name}: was {before.get(name, 'absent')}, is {after.get(name, 'absent')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name.rsplit(".", 1)[-1] not in may_change
    ]


def _record(things: Collection[nn.Module | Tensor]) -> Record:
    record = _process()
    for i, thing in enumerate(things):
        name = f"{type(thing).__name__}[{i}]"
        record |= _module(name, thing) if isinstance(thing, nn.Module) else _tensor(name, thing)
    return record


def _process() -> Record:
    return {
        "random state of torch": _digest(torch.get_rng_state().numpy().tobytes()),
        "random state of NumPy": _digest(pickle.dumps(np.random.get_state())),  # noqa: NPY002 (the global one)
        "random state of Python": _digest(pickle.dumps(random.getstate())),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "saved-tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(False),
    }


def _module(name: str, module: nn.Module) -> Record:
    record: Record = {}
    for path, part in module.named_modules(prefix=name):
        record |= {f"{path}.{key}": _contents(value) for key, value in vars(part).items()}
        record[f"{path}'s class"] = {key: _Same(value) for key, value in vars(type(part)).items()}
    for path, tensor in (*module.named_parameters(name), *module.named_buffers(name)):
        record |= _tensor(path, tensor)
    return record


def _tensor(name: str, tensor: Tensor) -> Record:
    return {
        f"{name}.values": _values(tensor),
        f"{name}.requires_grad": tensor.requires_grad,
        f"{name}.grad": _values(tensor.grad) if tensor.is_leaf or tensor.retains_grad else None,
        f"{name}.hooks": _contents(tensor._backward_hooks or {}),
        f"{name}.hooks after accumulation": _contents(tensor._post_accumulate_grad_hooks or {}),
    } | {f"{name}.{key}": _contents(value) for key, value in vars(tensor).items()}


def _values(tensor: Tensor | None) -> tuple | None:
    """The very tensor, how often it was written, where and how it lies, and its bits."""
    if tensor is None:
        return None
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    bits = dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    version = None if tensor.is_inference() else tensor._version
    place = None if tensor.is_sparse else tensor.data_ptr()
    return _Same(tensor), version, place, tensor.dtype, tensor.layout, tuple(tensor.shape), _digest(bits)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _contents(value: Any) -> Any:
    """An object compares by identity, a collection by its members: appending to it is a change."""
    if isinstance(value, dict):
        return {key: _Same(member) for key, member in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        members = map(_Same, value)
        return type(value).__name__, frozenset(members) if isinstance(value, (set, frozenset)) else tuple(members)
    return _Same(value)


class _Same:
    """Equal only to itself. Holds on to the object, so that no other gets its id."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and (self.it is other.it or _plainly_equal(self.it, other.it))

    def __hash__(self) -> int:
        return id(self.it)

    def __repr__(self) -> str:
        return type(self.it).__name__ if isinstance(self.it, Tensor) else repr(self.it)


def _plainly_equal(a: Any, b: Any) -> bool:
    """Numbers, strings and the like have a value and no identity."""
    return type(a) is type(b) and isinstance(a, (bool, int, float, complex, str, bytes, type(None))) and a == b
