"""Training on chosen examples: the claims of the page, on fewer seeds."""

from __future__ import annotations

import re

import examples.select_examples as module
import pytest
import torch
from examples.select_examples import SHARES, WAYS, accuracies, main


def test_it_prints_a_table_and_leaves_the_random_numbers_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEPS", 20)
    state = torch.get_rng_state()
    main(["--seeds", "2"])
    assert torch.equal(torch.get_rng_state(), state)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cell = r" 0\.\d{3} \+- 0\.\d{3} \|"
    for line, way in zip(lines[2:], WAYS, strict=True):
        assert re.fullmatch(rf"\| {re.escape(way.name)} \|" + len(SHARES) * cell, line)


@pytest.mark.long
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_highest_losses_among_the_unflagged_beat_random_ones(share: float) -> None:
    """Of 40% kept; on wrong labels by over ten points. With a tenth kept random ones among the unflagged are better."""

    def mean(keep: float) -> list[float]:
        runs = [accuracies(share, seed, keep) for seed in range(3)]
        return torch.tensor(runs, dtype=torch.float64).mean(0).tolist()

    _, _, by_chance, unflagged, high, low, _ = mean(0.4)
    assert high > by_chance + (0.1 if share else 0.005)
    assert high > unflagged > low
    _, _, _, unflagged, high, _, _ = mean(0.1)
    assert unflagged > high
