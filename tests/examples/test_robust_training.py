"""What clipping does for training on wrong labels: the claims of the page, on fewer seeds."""

from __future__ import annotations

import re

import pytest
import torch
from examples.robust_training import SHARES, WAYS, accuracies, digits, main

PLAIN, SLOW, CLIPPED = WAYS[:3]


def test_the_data_are_as_the_page_says() -> None:
    x, y, x_test, y_test = digits(0.4, torch.Generator().manual_seed(3))
    clean = digits(0.0, torch.Generator().manual_seed(3))
    assert (x.shape, x_test.shape) == ((1257, 64), (540, 64))
    assert torch.equal(x, clean[0])
    assert int((y != clean[1]).sum()) == 503
    assert torch.equal(y_test, clean[3])


def test_it_prints_a_table_and_leaves_the_random_numbers_alone(capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.get_rng_state()
    main(["--seeds", "2", "--epochs", "1"])
    assert torch.equal(torch.get_rng_state(), state)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(WAYS)
    cell = r" 0\.\d{3} \+- 0\.\d{3} \[0\.\d{3}\] \|"
    for line, way in zip(lines[2:], WAYS, strict=True):
        assert re.fullmatch(rf"\| {re.escape(way.name)} \|" + len(SHARES) * cell, line)


@pytest.mark.long
def test_clipping_keeps_most_of_the_accuracy_that_wrong_labels_cost() -> None:
    """After 50 epochs, on 3 seeds: at 40% wrong labels over 10 points better than without and no worse than at a tenth
    of the learning rate; on clean labels at most 2 points worse."""

    def at_the_end(way, share: float) -> float:
        return sum(accuracies(way, share, seed)[-1] for seed in range(3)) / 3

    assert at_the_end(CLIPPED, 0.4) > at_the_end(PLAIN, 0.4) + 0.1
    assert at_the_end(CLIPPED, 0.4) > at_the_end(SLOW, 0.4)
    assert at_the_end(CLIPPED, 0.0) > at_the_end(PLAIN, 0.0) - 0.02
