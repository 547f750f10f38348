"""Values of all processes of a distributed training, brought together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rowgrad.errors import InputError


def gathered(values: Tensor) -> Tensor:
    """The vectors of all processes behind each other, in the order of their ranks; they may differ in length."""
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError("distributed=True needs torch.distributed.init_process_group to have been called")
    n_processes = dist.get_world_size()
    length = torch.tensor([len(values)], device=values.device)
    lengths = [torch.empty_like(length) for _ in range(n_processes)]
    dist.all_gather(lengths, length)
    longest = max(int(n) for n in lengths)
    padded = torch.cat([values, values.new_zeros(longest - len(values))])
    parts = [torch.empty_like(padded) for _ in range(n_processes)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])
