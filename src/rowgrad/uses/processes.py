"""Values of all processes of a distributed training, brought together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from rowgrad.errors import InputError, RowgradError

T = TypeVar("T")


def place(rank: int | None, num_replicas: int | None) -> tuple[int, int]:
    """Rank and number of the processes, as given or else as `torch.distributed` has them; (0, 1) without it."""
    if rank is not None and num_replicas is not None:
        return rank, num_replicas
    if (rank, num_replicas) != (None, None):
        raise InputError(
            f"rank={rank} and num_replicas={num_replicas}: expected both or, to ask torch.distributed, none"
        )
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


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


def gathered(make: Callable[[], T], distributed: bool) -> list[T]:
    """What `make` gives here or, where `distributed`, in each process; see `from_all`."""
    if not distributed:
        return [make()]
    check_initialized("distributed=True")
    return from_all(make)
