"""What the structure of a graph settles, against numbers: at every edge, not only at those the proof looks at."""

from __future__ import annotations

import pytest
import torch
from tests.cases import CASES

from rowgrad.rows.listed import laid_out
from rowgrad.rows.ownership import MIXED, Prover, scaled_by_power_of_two
from rowgrad.rows.structure import infer
from rowgrad.tape import Tape


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.dtype == torch.float64])
def test_every_settled_layout_holds(name: str) -> None:
    losses = CASES[name].build().losses()
    if len(losses) < 2:
        return
    tape = Tape(losses)
    settled = infer(tape, len(losses))
    prover = Prover(tape, torch.ones_like(losses.detach()), torch.Generator().manual_seed(1), allow_rounding=False)
    found = prover.look(list(settled), {e: laid_out(tape, e, layout) for e, layout in settled.items()})
    assert not {repr(tape.nodes[i]): str(settled[i, nr]) for (i, nr), layout in found.items() if layout is MIXED}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_what_came_back_times_a_power_of_two_has_one_owner(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(50, dtype=dtype, generator=generator)
    power = 2.0 ** torch.randint(-2, 3, (50,), generator=generator)
    silent = torch.arange(50) % 3 == 0
    z = (base * power).masked_fill(silent, 0).to(dtype)
    assert scaled_by_power_of_two(base, z).all()
    assert scaled_by_power_of_two(torch.full_like(base, torch.nan), z).all()
    seen = ~scaled_by_power_of_two(base, z + base.roll(1, 0))
    assert seen.float().mean() > 0.9  # a mantissa of eight bits may agree by chance
    assert not scaled_by_power_of_two(torch.zeros_like(base), base).any(), "a sum that canceled"
