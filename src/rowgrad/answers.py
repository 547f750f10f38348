"""Whether code of the user's gives one answer to one question, told by the sums of what it answers.

Rows are what several passes agree on. The backward of a custom Function that changes what it works with (a state that
it keeps on `ctx`, a random draw) answers each pass in another way, and belongs to none.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rowgrad.errors import OpaqueGraphError

# Of the sum of magnitudes, by which two answers may differ: kernels that add in no fixed order round in different ways.
TOLERANCE = 1e-3
TOLERANCE_OF_HALVES = 1e-2


def fingerprint(z: Tensor | None) -> Tensor | None:
    """(2,) The sum of the entries and that of their magnitudes; None where there is nothing, or no plain numbers."""
    if z is None or z.layout != torch.strided or not (z.is_floating_point() or z.is_complex()):
        return None
    z = torch.view_as_real(z.detach().resolve_conj()) if z.is_complex() else z.detach()
    dtype = torch.float64 if z.device.type in ("cpu", "cuda") else torch.promote_types(z.dtype, torch.float32)
    return torch.stack([z.sum(dtype=dtype), torch.linalg.vector_norm(z, 1, dtype=dtype)])


def agree(before: Iterable[Tensor | None], now: Iterable[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether what was answered in both cases is the same within rounding; infinities and nan agree with each other."""
    tolerance = TOLERANCE if dtype.itemsize >= 4 else TOLERANCE_OF_HALVES
    for a, b in zip(before, now, strict=False):
        if a is None or b is None:
            continue
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return False
        if bool(finite.all()) and bool(((a - b).abs() > tolerance * torch.maximum(a, b)[1]).any()):
            return False
    return True


def answered_otherwise(who: str) -> OpaqueGraphError:
    """What to raise where they do not."""
    return OpaqueGraphError(
        f"{who} answers differently each time it is asked the same: its backward writes to what it works with, or "
        "draws random numbers, so that it has no rows. Let it keep what it saved as it is"
    )
