"""Seed 002 transcribed to NumPy as it is printed: one hidden layer of ReLU under a softmax (CS 349-02, 2017).

Row vectors as in the text: a point x is 1 x D, a layer multiplies from the right, s = x.W + b.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tests.seeds.hand import Array

Weights = dict[str, Array]  # W1 (D, H), b1 (H,), W2 (H, C), b2 (C,)


@dataclass
class OnePoint:
    """The forward pass and section 3 for one point."""

    s1: Array
    a1: Array
    s2: Array
    a2: Array
    J: float
    ds2: Array
    dW2: Array
    db2: Array
    ds1: Array
    dW1: Array
    db1: Array


def section_3(w: Weights, x: Array, y: int) -> OnePoint:
    H, C = w["W2"].shape
    s1 = x @ w["W1"] + w["b1"]  # (2)
    a1 = np.maximum(s1, 0)  # (3)
    s2 = a1 @ w["W2"] + w["b2"]  # (4)
    a2 = np.exp(s2) / np.exp(s2).sum()  # (5)
    ds2 = np.array([[a2[0, c] - (y == c) for c in range(C)]])  # (6)
    tmp = ds2 @ w["W2"].T
    for h in range(H):
        if a1[0, h] <= 0:
            tmp[0, h] = 0
    J = -np.log(a2[0, y])
    return OnePoint(s1, a1, s2, a2, J, ds2, a1.T @ ds2, ds2, tmp, x.T @ tmp, tmp)  # (7) to (10)


def gradients(w: Weights, x: Array, y: list[int], alpha: float) -> Weights:
    """Lines 5 to 15: accumulate point by point, divide by N, add alpha W."""
    grad = {name: np.zeros(p.shape) for name, p in w.items()}
    N = len(x)
    for i in range(N):
        one = section_3(w, x[i : i + 1], y[i])
        grad["W2"] += one.dW2
        grad["b2"] += one.db2[0]
        grad["W1"] += one.dW1
        grad["b1"] += one.db1[0]
    grad = {name: g / N for name, g in grad.items()}
    grad["W2"] += alpha * w["W2"]
    grad["W1"] += alpha * w["W1"]
    return grad


def algorithm_1(w: Weights, x: Array, y: list[int], *, eta: float, alpha: float, maxiter: int) -> Weights:
    """Lines 4 to 20, from the weights of lines 1 to 3."""
    for _ in range(maxiter):
        grad = gradients(w, x, y, alpha)
        w = {name: w[name] - eta * grad[name] for name in w}
    return w
