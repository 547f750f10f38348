"""The example of seed 002 against its equations in NumPy (CS 349-02, 2017, algorithm 1)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.seeds.hand import assert_same, plain
from tests.seeds.two_layers import algorithm_1
from torch import Tensor

from examples import two_layer_softmax

FILE = Path(two_layer_softmax.__file__)
N, D, H, C = 12, 4, 7, 3


def weights(std: float) -> dict[str, Tensor]:
    shapes = {"W1": (D, H), "b1": (H,), "W2": (H, C), "b2": (C,)}
    return {name: (std * torch.randn(shape, dtype=torch.float64)).requires_grad_() for name, shape in shapes.items()}


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D, dtype=torch.float64), torch.tensor([0] * 7 + [1] * 3 + [2] * 2)


@pytest.mark.parametrize("maxiter", [1, 2, 25])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_number_by_number(data: tuple[Tensor, Tensor], alpha: float, maxiter: int) -> None:
    x, y = data
    w = weights(0.5)
    begin = {name: plain(p).copy() for name, p in w.items()}
    two_layer_softmax.train(w, x, y, eta=0.4, alpha=alpha, maxiter=maxiter)
    by_hand = algorithm_1(begin, plain(x), y.tolist(), eta=0.4, alpha=alpha, maxiter=maxiter)
    for name, p in w.items():
        assert np.abs(by_hand[name] - begin[name]).max() > 1e-3
        assert_same(p, by_hand[name])


def test_weights_of_zero_never_reach_the_hidden_layer(data: tuple[Tensor, Tensor]) -> None:
    """Line 1: "all-zeros may result in 0 gradient with some activations"; the biases of the top layer learn alone."""
    w = weights(0.0)
    two_layer_softmax.train(w, *data, eta=0.4, alpha=0.3, maxiter=5)
    for name in ("W1", "b1", "W2"):
        assert not w[name].any()
    assert w["b2"].abs().max() > 0.01


def test_small_random_weights_do(data: tuple[Tensor, Tensor]) -> None:
    w = weights(1e-3)
    before = {name: p.detach().clone() for name, p in w.items()}
    two_layer_softmax.train(w, *data, eta=0.4, alpha=0.0, maxiter=5)
    assert all((p - before[name]).abs().max() > 0 for name, p in w.items())


def test_it_is_short() -> None:
    assert len(FILE.read_text(encoding="utf-8").splitlines()) < 40


@pytest.mark.parametrize("name", ["iris", "wine"])
def test_it_runs_on_data_of_scikit_learn(name: str) -> None:
    done = subprocess.run([sys.executable, FILE, name], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(re.fullmatch(r"right on (.*)% of \d+ new points\n", done.stdout)[1]) > 90
