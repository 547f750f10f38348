"""Values of all processes of a distributed training, brought together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rowgrad.errors import InputError, RowgradError

T = TypeVar("T")


def check_initialized(option: str) -> None:
    """Refuse an option that needs other processes where there are none."""
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(f"{option} needs torch.distributed.init_process_group to have been called")


def from_all(make: Callable[[], T]) -> list[T]:
    """What `make` gives in each process, in the order of their ranks.

    Where it raises an error of ours, all processes raise it: one that stopped alone would leave the others waiting.
    """
    mine: Any
    try:
        mine = make()
    except RowgradError as error:
        mine = error
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    for rank, value in enumerate(found):
        if isinstance(value, RowgradError):
            raise type(value)(f"in process {rank}: {value}")
    return found


def from_first(values: Tensor) -> Tensor:
    """The tensor of the first process."""
    check_initialized("gather=True")
    found: list[Any] = [values]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def gathered(values: Tensor) -> Tensor:
    """The vectors of all processes behind each other, in the order of their ranks; they may differ in length."""
    check_initialized("distributed=True")
    n_processes = dist.get_world_size()
    length = torch.tensor([len(values)], device=values.device)
    lengths = [torch.empty_like(length) for _ in range(n_processes)]
    dist.all_gather(lengths, length)
    longest = max(int(n) for n in lengths)
    padded = torch.cat([values, values.new_zeros(longest - len(values))])
    parts = [torch.empty_like(padded) for _ in range(n_processes)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])
