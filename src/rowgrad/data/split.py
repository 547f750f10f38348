"""Which rows are audited and which are held out."""

import torch

from rowgrad.errors import InputError


def split_rows(n: int, share: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`round(share * n)` rows drawn without replacement, in ascending order, and the others."""
    if not 0 < share <= 1:
        raise InputError(f"--rows {share:g}: the share of rows to audit must be above 0 and at most 1")
    order = torch.randperm(n, generator=generator)
    count = round(share * n)
    return order[:count].sort().values, order[count:].sort().values
