"""State as one safetensors file: tensors as they are, everything else as JSON in its header. Nothing is unpickled.

Note [what a state may hold]
    Nested dictionaries, lists and tuples of tensors, numbers, strings, booleans and None: what `state_dict()` of
    modules, optimizers and schedulers returns. Keys of dictionaries may be numbers. Infinite and missing floats are
    kept. Reading gives back equal values of equal types, so that a run resumes bit for bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rowgrad.errors import InputError
from rowgrad.files import whole

FORMAT = "rowgrad-1"
_PLAIN = (int, float, str, bool, type(None))


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state, whole or not at all: the file before stays until the new one is complete and on the disk.

    Raises:
        TypeError: the state holds something else; names where.
        InputError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = _packed(state, "", tensors)
    try:
        with whole(path) as stage:
            save_file(tensors, stage, metadata={"format": FORMAT, "state": json.dumps(tree)})
            with stage.open("rb") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be written ({said}); make room, or name another directory") from error


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        InputError: no such file, or another kind of file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"{path}: not a checkpoint of this version (format {metadata.get('format')!r})")
            # copies begin at addresses as PyTorch chooses them; the rounding of a dot product depends on that
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  no mapping
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint") from error
    except SafetensorError as error:
        raise InputError(f"{path}: not a checkpoint, or a damaged one ({error})") from error
    return _unpacked(json.loads(metadata["state"]), tensors)


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """JSON in which a container is {"kind": items} and a tensor the name it goes by."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}{place}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (int, str)) or isinstance(key, bool):
                raise TypeError(
                    f"state{place}: the key {key!r} is a {type(key).__name__}, expected a string or a number"
                )
        return {"dict": [[key, _packed(v, f"{place}/{key}", tensors)] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(v, f"{place}/{k}", tensors) for k, v in enumerate(value)]}
    if type(value) in _PLAIN:
        return value
    raise TypeError(
        f"state{place} is a {type(value).__name__}, expected tensors, numbers, strings and containers of them"
    )


def _unpacked(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, items),) = tree.items()
    if kind == "tensor":
        return tensors[items]
    if kind == "dict":
        return {key: _unpacked(v, tensors) for key, v in items}
    found = [_unpacked(v, tensors) for v in items]
    return found if kind == "list" else tuple(found)


def same(a: Any, b: Any) -> bool:
    """Whether two states hold the same values of the same types; tensors bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool((_bits(a) == _bits(b)).all())
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def _bits(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous().flatten().view(torch.uint8)
