"""Seed 001, part II: backpropagation as dynamic programming (Aggarwal 2018, ch. 3.2), both recursions by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tests.seeds.hand import Array, assert_same, given, leaf, plain, sigmoid
from tests.seeds.test_seed_001_paths import EDGES, SINK, W, local_derivatives, units
from torch import Tensor

import rowgrad as rg

# The update of eq. 4


def test_eq_4_from_the_output_back_to_every_unit() -> None:
    w = given(W)
    y = units(w)
    flow = rg.Graph(y[SINK], {"w": w}).backward()
    z, S = local_derivatives(W), {SINK: 1.0}
    for i in reversed(range(SINK)):
        S[i] = sum(S[j] * z[i, j] for start, j in EDGES if start == i)
    for i, value in S.items():  # S(i, o) of all units, from one sweep
        assert_same(flow[y[i]], value)


def test_eq_4_is_the_chain_rule_at_every_variable_of_a_net() -> None:
    """A(i) are the readers of i, z(i, j) their local Jacobians: do/dy(i) = sum over j of do/dy(j) . dy(j)/dy(i)."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    x = leaf(2, 3)
    h = model(x)
    graph = rg.Graph(torch.nn.functional.cross_entropy(h + x.sin(), torch.tensor([0, 2])), model)
    flow = graph.backward()
    assert_same(flow[0], 1.0)  # S(o, o)
    for i in graph.vertices[1:]:
        total = sum(
            flow[j].reshape(-1) @ graph.local_jacobian(j, slot).matrix for j, slot in graph.readers(i) if j.name in flow
        )
        assert_same(flow[i].reshape(-1), total)


class Square(torch.autograd.Function):
    """w^2, counting how often it is differentiated."""

    n_derivatives = 0

    @staticmethod
    def forward(ctx, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w * w

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        Square.n_derivatives += 1
        return 2 * ctx.saved_tensors[0] * g


def test_w_squared_is_not_differentiated_twice() -> None:
    """f(w) = sin(w^2) + cos(w^2): once in the sweep, once for each path without it."""
    w = given(W)
    y = Square.apply(w)
    graph = rg.Graph(y.sin() + y.cos(), {"w": w})
    by_hand = 2 * W * math.cos(W**2) - 2 * W * math.sin(W**2)
    Square.n_derivatives = 0
    assert_same(graph.backward()["w"], by_hand)
    assert Square.n_derivatives == 1
    assert_same(sum(graph.path_gradient(path) for path in graph.paths("w")), by_hand)
    assert Square.n_derivatives == 1 + 2


def test_the_longest_path_is_found_by_the_same_recursion() -> None:
    """y_k = y_{k-1} y_{k-2}: the longest path grows by one with k, the number of paths as Fibonacci's numbers."""
    w = given(1.0)
    y, fibonacci = [w, w.sin()], [1, 1]
    for k in range(2, 60):
        y.append(y[k - 1] * y[k - 2])
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    graph = rg.Graph(y[-1], {"w": w})
    assert graph.count_paths("w") == fibonacci[-1] > 10**12
    assert graph.depth("w") == 59


# Pre-activation, post-activation, or both, on a net of three layers; w_ij leads from i to j


@dataclass
class Net:
    """The live variables of each layer, and the same numbers for the work by hand."""

    weights: list[Tensor]
    h: list[Tensor]  # post-activation, the input first
    a: list[Tensor]  # pre-activation
    target: Tensor
    graph: rg.Graph

    @property
    def slopes(self) -> list[Array]:
        """Phi' of each layer."""
        o = [plain(h) for h in self.h]
        return [1 - o[1] ** 2, o[2] * (1 - o[2]), o[3] * (1 - o[3])]


@pytest.fixture
def net() -> Net:
    weights = [leaf(3, 4), leaf(4, 4), leaf(4, 2)]
    h, a = [torch.randn(3, dtype=torch.float64)], []
    for w, phi in zip(weights, (torch.tanh, torch.sigmoid, torch.sigmoid), strict=True):
        a.append(w.T @ h[-1])
        h.append(phi(a[-1]))
    target = torch.rand(2, dtype=torch.float64)
    loss = (h[-1] - target).square().sum() / 2
    return Net(weights, h, a, target, rg.Graph(loss, {f"w{i}": w for i, w in enumerate(weights)}))


def pre_activation(net: Net) -> list[Array]:
    """Eq. 5, node by node: delta(o, o) = dL/do Phi'_o, delta(i, o) = Phi'_i sum of w_ij delta(j, o)."""
    slopes, weights = net.slopes, [plain(w) for w in net.weights]
    delta = [(plain(net.h[-1]) - plain(net.target)) * slopes[-1]]
    for layer in (1, 0):
        w = weights[layer + 1]
        A = range(w.shape[1])
        delta.insert(0, np.array([slopes[layer][i] * sum(w[i, j] * delta[0][j] for j in A) for i in range(len(w))]))
    return delta


def post_activation(net: Net) -> list[Array]:
    """Eq. 6, node by node: Delta(o, o) = dL/do, Delta(i, o) = sum of w_ij Delta(j, o) Phi'_j."""
    slopes, weights = net.slopes, [plain(w) for w in net.weights]
    Delta = [plain(net.h[-1]) - plain(net.target)]
    for layer in (1, 0):
        w = weights[layer + 1]
        A = range(w.shape[1])
        Delta.insert(0, np.array([sum(w[i, j] * Delta[0][j] * slopes[layer + 1][j] for j in A) for i in range(len(w))]))
    return Delta


def test_eq_5_pre_activation_variables(net: Net) -> None:
    flow = net.graph.backward()
    for found, a, by_hand in zip(flow.activations, net.a, pre_activation(net), strict=True):
        assert_same(found.delta, by_hand)
        assert_same(flow[a], by_hand)


def test_eq_6_post_activation_variables(net: Net) -> None:
    flow = net.graph.backward()
    for found, h, by_hand in zip(flow.activations, net.h[1:], post_activation(net), strict=True):
        assert_same(found.Delta, by_hand)
        assert_same(flow[h], by_hand)


def test_delta_is_Delta_times_the_slope(net: Net) -> None:
    for found, slope, pre, post in zip(
        net.graph.backward().activations, net.slopes, pre_activation(net), post_activation(net), strict=True
    ):
        assert_same(found.delta, plain(found.Delta) * slope)
        assert_same(pre, post * slope)


def test_the_local_derivatives_of_both_graphs(net: Net) -> None:
    """z(i, j) = w_ij Phi'_i between pre-activations, w_ij Phi'_j between post-activations."""
    for layer in (1, 2):
        before = net.graph.local_jacobian(net.h[layer]).matrix
        linear = net.graph.local_jacobian(net.a[layer], slot=1).matrix  # slot 0 is w^T
        after = net.graph.local_jacobian(net.h[layer + 1]).matrix
        w = plain(net.weights[layer])
        assert_same((linear @ before).T, w * net.slopes[layer - 1][:, None])
        assert_same((after @ linear).T, w * net.slopes[layer][None, :])


def test_weights_from_all_three_views(net: Net) -> None:
    """dL/dw_ij = delta(j, o) h_i, with delta from eq. 5, from eq. 6, and from vectors sent back by Jacobians."""
    flow, slopes = net.graph.backward(), net.slopes
    g = flow[net.h[-1]]
    pre, post = pre_activation(net), post_activation(net)
    for layer in (2, 1, 0):
        decoupled = net.graph.local_jacobian(net.h[layer + 1]).matrix.T @ g
        for delta in (pre[layer], post[layer] * slopes[layer], plain(decoupled)):
            assert_same(flow[f"w{layer}"], np.outer(plain(net.h[layer]), delta))
        if layer:
            g = net.graph.local_jacobian(net.a[layer], slot=1).matrix.T @ decoupled


# Losses at arbitrary nodes


def two_outputs(w: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = (x @ w).sigmoid()
    return h, (h @ v).square().sum(), h.exp().sum()


def test_contributions_of_several_outputs_are_added() -> None:
    w, v, x = leaf(3, 4), leaf(4, 2), torch.randn(3, dtype=torch.float64)
    h, first, second = two_outputs(w, v, x)
    flow = rg.Graph([first, second], {"w": w, "v": v}).backward()
    o = plain(h)
    S = 2 * plain(v) @ (o @ plain(v)) + np.exp(o)
    assert_same(flow[h], S)
    assert_same(flow["w"], np.outer(plain(x), S * o * (1 - o)))
    assert_same(flow["v"], np.outer(o, 2 * (o @ plain(v))))


def test_a_penalty_at_a_hidden_node_is_added_to_S() -> None:
    """S(i, o) first, then the penalty's derivative on top: here lambda |h|^2."""
    w, v, x, strength = leaf(3, 4), leaf(4, 2), torch.randn(3, dtype=torch.float64), 0.3
    h, loss, _ = two_outputs(w, v, x)
    flow = rg.Graph(loss, {"w": w, "v": v}).backward(seeds={h: 2 * strength * h})
    o = plain(h)
    S = 2 * plain(v) @ (o @ plain(v)) + 2 * strength * o
    assert_same(flow[h], S)
    assert_same(flow["w"], np.outer(plain(x), S * o * (1 - o)))


# Eq. 7: pretend all copies are different and just add


def test_eq_7_each_copy_of_a_tied_autoencoder() -> None:
    """r = sigmoid(x w) w^T and L = |r - x|^2 / 2."""
    w, x = leaf(5, 3), torch.randn(5, dtype=torch.float64)
    h = (x @ w).sigmoid()
    loss = (h @ w.T - x).square().sum() / 2
    graph = rg.Graph(loss, {"w": w})
    x, w_, o = plain(x), plain(w), sigmoid(plain(x) @ plain(w))
    error = o @ w_.T - x
    encoder = np.outer(x, (error @ w_) * o * (1 - o))
    decoder = np.outer(error, o)
    parts = list(graph.decompose("w", by="use").values())
    assert len(parts) == 2
    assert_same(parts[0], encoder)
    assert_same(parts[1], decoder)
    assert_same(graph.backward()["w"], encoder + decoder)


@pytest.mark.parametrize("by", ["use", "time"])
def test_eq_7_each_copy_of_a_recurrent_weight(by: str) -> None:
    """h_t = tanh(x_t + h_{t-1} w) with the loss at the end: the copy at t has h_{t-1}^T delta_t."""
    n_steps, w = 6, leaf(3, 3)
    x, h = torch.randn(n_steps, 3, dtype=torch.float64), [torch.randn(3, dtype=torch.float64)]
    for t in range(n_steps):
        h.append((x[t] + h[-1] @ w).tanh())
    graph = rg.Graph(h[-1].square().sum() / 2, {"w": w})
    o = [plain(t) for t in h]
    delta = o[-1] * (1 - o[-1] ** 2)
    copies = []
    for t in reversed(range(n_steps)):
        copies.insert(0, np.outer(o[t], delta))
        delta = (plain(w) @ delta) * (1 - o[t] ** 2)
    parts = graph.decompose("w", by=by)
    assert len(parts) == n_steps
    for found, copy in zip(parts.values(), copies, strict=True):
        assert_same(found, copy)
    assert_same(graph.backward()["w"], sum(copies))


def test_eq_7_each_copy_of_a_convolution_kernel() -> None:
    """One copy at every position: its part is delta at the position times the window it saw."""
    w, x = leaf(3), torch.randn(7, dtype=torch.float64)
    z = torch.stack([w @ x[t : t + 3] for t in range(5)])
    graph = rg.Graph(z.exp().sum(), {"w": w})
    windows = np.stack([plain(x)[t : t + 3] for t in range(5)])
    copies = np.exp(windows @ plain(w))[:, None] * windows
    for found, copy in zip(graph.decompose("w", by="time").values(), copies, strict=True):
        assert_same(found, copy)
    as_one = torch.nn.functional.conv1d(x[None, None], w[None, None]).exp().sum()
    assert_same(rg.Graph(as_one, {"w": w}).backward()["w"], copies.sum(0))
