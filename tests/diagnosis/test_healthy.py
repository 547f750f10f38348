"""Networks that learn: nothing is found, at initialization or while they are trained."""

from __future__ import annotations

import pytest
import torch
from tests.diagnosis.healthy import HEALTHY, batches, losses_of, made

import rowgrad as rg

SEEDS = range(3)
STEPS = 25  # close to one epoch


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_found_at_initialization(name: str, seed: int) -> None:
    model, optimizer = made(name, seed)
    data = list(batches(seed))[:4]
    found = rg.diagnose(
        losses_of(model, *data[0]),
        model,
        batches=(losses_of(model, *batch) for batch in data[1:]),
        optimizer=optimizer,
        closure=lambda: losses_of(model, *data[0]),
        initial=True,
    )
    assert found.ok, str(found)
    assert set(found.not_looked_at) == {"drift"}
    assert {f.kind for f in found.findings} <= ({"mixed"} if "BatchNorm" in name else set())


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_training(name: str) -> None:
    model, optimizer = made(name, 0)
    first, values = None, []
    for step, (x, y) in enumerate(list(batches(0))[:STEPS]):
        losses = losses_of(model, x, y)
        if step % 6 == 0:
            found = rg.diagnose(
                losses,
                model,
                optimizer=optimizer,
                closure=lambda x=x, y=y: losses_of(model, x, y),
                earlier=first,
            )
            assert found.ok, f"step {step}: {found}"
            first = first or found
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        values.append(float(losses.detach().mean()))
    assert torch.tensor(values[-5:]).mean() < 0.95 * torch.tensor(values[:3]).mean(), "it was to learn"
