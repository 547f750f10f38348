"""Whether code of the user's gives one answer to one question, told by the sums of what it answers.

Rows are what several passes agree on. The backward of a custom Function that changes what it works with (a state that
it keeps on `ctx`, a random draw) answers each pass in another way, and belongs to none.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rowgrad.errors import OpaqueGraphError

# Of the sum of magnitudes, by which two answers may differ: elsewhere than on the CPU, kernels add in no fixed order.
TOLERANCE = 1e-5
TOLERANCE_ELSEWHERE = 1e-3
GOLDEN = 0.6180339887498949  # its multiples, less whole numbers, are spread evenly


def fingerprint(z: Tensor | None) -> Tensor | None:
    """(3,) The sum of the entries, that of their magnitudes, and one weighted by place; None where there is nothing, or
    no plain numbers."""
    if z is None or z.layout != torch.strided or not (z.is_floating_point() or z.is_complex()):
        return None
    z = torch.view_as_real(z.detach().resolve_conj()) if z.is_complex() else z.detach()
    dtype = torch.float64 if z.device.type in ("cpu", "cuda") else torch.promote_types(z.dtype, torch.float32)
    z = z.reshape(-1).to(dtype)
    weights = torch.arange(1, len(z) + 1, dtype=dtype, device=z.device).mul_(GOLDEN).frac_().sub_(0.5)
    return torch.stack([z.sum(), z.abs().sum(), z @ weights])


def agree(before: Iterable[Tensor | None], now: Iterable[Tensor | None]) -> bool:
    """Whether what was answered in both cases is the same within rounding; infinities and nan agree with each other."""
    for a, b in zip(before, now, strict=False):
        if a is None or b is None:
            continue
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return False
        tolerance = TOLERANCE if a.is_cpu else TOLERANCE_ELSEWHERE
        if bool(finite.all()) and bool(((a - b).abs() > tolerance * torch.maximum(a, b)[1]).any()):
            return False
    return True


def answered_otherwise(who: str) -> OpaqueGraphError:
    """What to raise where they do not."""
    return OpaqueGraphError(
        f"{who} answers differently each time it is asked the same: its backward writes to what it works with, or "
        "draws random numbers, so that it has no rows. Let it keep what it saved as it is, and draw in the forward "
        "pass"
    )
