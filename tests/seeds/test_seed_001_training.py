"""Seed 001, the lectures on training: what they say of derivatives (Aggarwal 2018, ch. 3.3 to 3.6), by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.seeds.hand import Array, assert_same, given, leaf, plain, sigmoid
from torch import Tensor

import rowgrad as rg

# How to check correctness, and mini-batches


def test_eqs_12_and_13_a_perturbed_weight() -> None:
    """rho = |G_e - G_a| / |G_e + G_a| stays below 1e-6 for every weight of a smooth net."""
    w, x = leaf(3, 2), torch.randn(3, dtype=torch.float64)

    def L(w: Tensor) -> Tensor:
        return (x @ w).tanh().exp().sum()

    G_e, base, eps = plain(rg.Graph(L(w), {"w": w}).backward()["w"]), L(w).detach(), 1e-7
    for i in range(3):
        for j in range(2):
            nudged = w.detach().clone()
            nudged[i, j] += eps
            G_a = float((L(nudged) - base) / eps)  # (12)
            assert abs(G_e[i, j] - G_a) / abs(G_e[i, j] + G_a) < 1e-6  # (13)


def test_a_mini_batch_adds_what_its_points_bring() -> None:
    """The loss is additive over points: rows of matrices in place of vectors, and their gradients added."""
    w, x = leaf(3, 2), torch.randn(8, 3, dtype=torch.float64)
    batch = rg.Graph((x @ w).sigmoid().sum(), {"w": w}).backward()["w"]
    o = sigmoid(plain(x) @ plain(w))
    points = [np.outer(plain(x)[k], o[k] * (1 - o[k])) for k in range(8)]
    assert_same(batch, sum(points))
    rows = rg.jacobian((x @ w).sigmoid().sum(1), {"w": w}).dense(as_dict=True)["w"]
    assert_same(rows, np.stack(points))


# Vanishing and exploding gradients: one node in each layer


def one_node_per_layer(weights: Tensor, x: Tensor, phi: Callable[[Tensor], Tensor]) -> list[Tensor]:
    h = [x]
    for w in weights.unbind():
        h.append(phi(w * h[-1]))
    return h


@pytest.mark.parametrize("scale", [0.5, 1.0, 6.0])
def test_a_net_of_one_node_per_layer_multiplies_weights_and_slopes(scale: float) -> None:
    weights = scale * torch.randn(12, dtype=torch.float64)
    h = one_node_per_layer(weights, given(0.4), torch.tanh)
    flow = rg.Graph(h[-1]).backward()
    factors = [w * (1 - float(plain(o)) ** 2) for w, o in zip(weights.tolist(), h[1:], strict=True)]
    for i in range(len(factors)):
        assert_same(flow[h[i]], math.prod(factors[i:]))


def test_ten_sigmoids_multiply_by_at_most_a_quarter_each() -> None:
    """Weights of 1: the activations alone. The factor o(1 - o) is largest, 0.25, at o = 0.5."""
    h = one_node_per_layer(torch.ones(10, dtype=torch.float64), given(0.0), torch.sigmoid)
    graph = rg.Graph(h[-1])
    found = [float(graph.local_jacobian(o).matrix) for o in h[1:]]
    o = [float(plain(v)) for v in h[1:]]
    assert_same(found, [v * (1 - v) for v in o])
    assert o[0] == 0.5
    assert found[0] == max(found) == 0.25
    assert float(graph.backward()[h[0]]) < 0.25**10 < 1e-6


def test_ten_sigmoids_all_at_one_half_reach_the_bound() -> None:
    """With biases that keep every unit at o = 0.5 the factor is 0.25^10 itself."""
    h = one_node_per_layer(torch.ones(10, dtype=torch.float64), given(0.5), lambda z: (z - 0.5).sigmoid())
    assert float(rg.Graph(h[-1]).backward()[h[0]]) == 0.25**10


def test_the_slope_of_tanh_is_1_at_0_and_gone_at_the_extremes() -> None:
    z = given([-20.0, -3.0, 0.0, 3.0, 20.0])
    o = z.tanh()
    graph = rg.Graph(o.sum())
    found = graph.local_jacobian(o).matrix.diag()
    assert_same(found, 1 - np.tanh(plain(z)) ** 2)
    assert found[2] == 1 == found.max()
    assert found[[0, 4]].max() < 1e-15


def test_a_shared_weight_explodes_where_it_is_above_1() -> None:
    """h_t = w h_{t-1}: n copies of w, each with w^(n-1), together n w^(n-1)."""
    w, n = given(1.5), 40
    h = given(1.0)
    for _ in range(n):
        h = w * h
    graph = rg.Graph(h, {"w": w})
    parts = graph.decompose("w", by="time")
    assert_same(list(parts.values()), [1.5 ** (n - 1)] * n)
    assert_same(graph.backward()["w"], n * 1.5 ** (n - 1))


# Activations that are partial fixes


def test_a_relu_that_is_off_for_every_point_gets_no_gradient() -> None:
    w, b = leaf(3), given(-100.0)
    x = torch.randn(16, 3, dtype=torch.float64)
    flow = rg.Graph((x @ w + b).relu().sum(), {"w": w, "b": b}).backward()
    assert_same(flow["w"], np.zeros(3))
    assert_same(flow["b"], 0.0)


def test_eq_14_leaky_relu() -> None:
    """alpha v for v <= 0: PyTorch's derivative at 0 is alpha too."""
    alpha, v = 0.1, given([-2.0, -1e-300, 0.0, 1e-300, 3.0])
    out = F.leaky_relu(v, alpha)
    graph = rg.Graph(out.sum())
    z = plain(v)
    assert_same(out, np.where(z <= 0, alpha * z, z))
    assert_same(graph.local_jacobian(out).matrix, np.diag(np.where(z <= 0, alpha, 1.0)))


def maxout(W1: Tensor, W2: Tensor, x: Tensor) -> Tensor:
    return torch.maximum(x @ W1, x @ W2)


def test_maxout_sends_everything_to_the_larger_of_its_two() -> None:
    W1, W2, x = leaf(3), leaf(3), torch.randn(6, 3, dtype=torch.float64)
    flow = rg.Graph(maxout(W1, W2, x).sum(), {"W1": W1, "W2": W2}).backward()
    first = plain(x) @ plain(W1) > plain(x) @ plain(W2)
    assert 0 < first.sum() < 6
    assert_same(flow["W1"], plain(x)[first].sum(0))
    assert_same(flow["W2"], plain(x)[~first].sum(0))


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_maxout_contains_relu_and_leaky_relu(alpha: float) -> None:
    """W2 = 0 gives the ReLU, W2 = alpha W1 the leaky one, derivatives included."""
    W1, x = leaf(3), torch.randn(6, 3, dtype=torch.float64)
    as_maxout, as_relu = maxout(W1, alpha * W1, x), F.leaky_relu(x @ W1, alpha)
    assert_same(as_maxout, plain(as_relu))
    found = [rg.Graph(out.sum(), {"W1": W1}).backward()["W1"] for out in (as_maxout, as_relu)]
    on = plain(x) @ plain(W1) > 0
    for gradient in found:
        assert_same(gradient, (plain(x) * np.where(on, 1.0, alpha)[:, None]).sum(0))


# The batch normalization node


def normalized(v: Array, gamma: Array, beta: Array, eps: float) -> tuple[Array, Array, Array]:
    """sigma_i (which has epsilon under its root), v-hat and a."""
    sigma = np.sqrt(((v - v.mean(0)) ** 2).mean(0) + eps)
    v_hat = (v - v.mean(0)) / sigma
    return sigma, v_hat, gamma * v_hat + beta


def test_the_batch_normalization_node_is_a_node_like_any_other() -> None:
    """dL/dbeta = sum of g, dL/dgamma = sum of g v-hat, and the mean and v-hat's part taken from what goes back to v."""
    v, gamma, beta, eps = leaf(6, 3), leaf(3), leaf(3), 1e-2
    a = F.batch_norm(v, None, None, gamma, beta, training=True, eps=eps)
    sigma, v_hat, by_hand = normalized(plain(v), plain(gamma), plain(beta), eps)
    assert_same(a, by_hand)
    flow = rg.Graph(a.exp().sum(), {"v": v, "gamma": gamma, "beta": beta}).backward()
    g = np.exp(by_hand)
    assert_same(flow[a], g)
    assert_same(flow["beta"], g.sum(0))
    assert_same(flow["gamma"], (g * v_hat).sum(0))
    g_hat = g * plain(gamma)
    assert_same(flow["v"], (g_hat - g_hat.mean(0) - v_hat * (g_hat * v_hat).mean(0)) / sigma)


def test_a_points_gradient_depends_on_the_batch_it_is_in() -> None:
    """The same point, with two sets of others beside it; in inference it does not matter."""
    gamma, point = leaf(3), torch.randn(1, 3, dtype=torch.float64)
    of_batch, of_inference = [], []
    for _ in range(2):
        v = torch.cat([point, torch.randn(5, 3, dtype=torch.float64)])
        for training, found in ((True, of_batch), (False, of_inference)):
            mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
            a = F.batch_norm(v, mean, variance, gamma, None, training=training, momentum=0.0, eps=1e-2)
            found.append(rg.Graph(a[0].exp().sum(), {"gamma": gamma}).backward()["gamma"])
    x = plain(point)[0] / math.sqrt(1 + 1e-2)
    for gradient in of_inference:
        assert_same(gradient, np.exp(plain(gamma) * x) * x)
    assert (of_batch[0] - of_batch[1]).abs().max() > 0.1
