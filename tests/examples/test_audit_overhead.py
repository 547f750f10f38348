"""The timing of audited steps runs and prints its table; no time is asserted."""

from __future__ import annotations

import re

import examples.audit_overhead as module
import pytest
import torch
from torch import nn


def test_it_prints_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = "64-128-128-10, that of `rowgrad audit`"
    monkeypatch.setattr(module, "MODELS", {name: module.MODELS[name]})
    module.main(["--steps", "3"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 2
    for line, batch_size in zip(lines, (64, 256), strict=True):
        assert re.fullmatch(rf"\| {re.escape(name)}, {batch_size} \| \S+ \(\S+ to \S+\)( \| \d+\.\d\d){{4}} \|", line)


def test_every_way_takes_the_same_steps() -> None:
    """Auditing changes no weight: all ways end at the same model."""
    ends = []
    for way in module.WAYS.values():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, module.CLASSES))
        step = way(model)
        for k in range(3):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(k))
            step(torch.arange(5) + 5 * k, x, torch.arange(5))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-3, atol=1e-5)
