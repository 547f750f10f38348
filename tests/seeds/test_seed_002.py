"""Seed 002: one hidden layer of ReLU under a softmax (CS 349-02, 2017), every intermediate against NumPy.

Row vectors as in the text: a point x is 1 x D, a layer multiplies from the right, s = x.W + b.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tests.seeds.hand import assert_same, leaf, plain
from tests.seeds.two_layers import OnePoint, Weights, algorithm_1, gradients, section_3
from torch import Tensor

import rowgrad as rg

N, D, H, C = 5, 3, 6, 4
ALPHA, ETA = 0.3, 0.1


@dataclass
class Net:
    W1: Tensor
    b1: Tensor
    W2: Tensor
    b2: Tensor

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {"W1": self.W1, "b1": self.b1, "W2": self.W2, "b2": self.b2}

    @property
    def numbers(self) -> Weights:
        return {name: plain(p).copy() for name, p in self.parameters.items()}


@dataclass
class Pass:
    """Eqs. 2 to 5 for one point, and its loss, as live variables."""

    s1: Tensor
    a1: Tensor
    s2: Tensor
    a2: Tensor
    loss: Tensor


def forward(net: Net, x: Tensor, y: int) -> Pass:
    s1 = x @ net.W1 + net.b1
    a1 = s1.relu()
    s2 = a1 @ net.W2 + net.b2
    a2 = s2.softmax(1)
    return Pass(s1, a1, s2, a2, -a2[0, y].log())


@pytest.fixture
def net() -> Net:
    net = Net(leaf(D, H), leaf(H), leaf(H, C), leaf(C))
    with torch.no_grad():
        net.W1[:, 2] = 0
        net.b1[2] = 0  # a unit exactly at the kink of its ReLU
    return net


@pytest.fixture
def data() -> tuple[Tensor, list[int]]:
    return torch.randn(N, D, dtype=torch.float64), [1, 3, 0, 2, 1]


@pytest.fixture
def point(net: Net, data: tuple[Tensor, list[int]]) -> tuple[Pass, rg.Graph, OnePoint]:
    """The first point: its live variables, its graph, and the same by hand."""
    x, y = data[0][:1], data[1][0]
    live = forward(net, x, y)
    by_hand = section_3(net.numbers, plain(x), y)
    assert 0 < (by_hand.a1 > 0).sum() < H
    return live, rg.Graph(live.loss, net.parameters), by_hand


def test_eqs_2_to_5_the_forward_pass_is_read_from_the_graph(point: tuple[Pass, rg.Graph, OnePoint]) -> None:
    live, graph, by_hand = point
    assert_same(graph.value(live.a1), by_hand.a1)
    assert_same(graph.value(live.a2), by_hand.a2)
    assert_same(live.s1, by_hand.s1)
    assert_same(live.s2, by_hand.s2)
    assert_same(live.loss, by_hand.J)


def test_eqs_6_12_13_the_cotangent_of_the_top_layer(point: tuple[Pass, rg.Graph, OnePoint]) -> None:
    live, graph, by_hand = point
    found = graph.backward()[live.s2]
    assert_same(found, by_hand.ds2)
    assert found.shape == live.s2.shape == (1, C)


def test_eqs_7_and_8_weights_and_biases_of_the_top_layer(point: tuple[Pass, rg.Graph, OnePoint]) -> None:
    live, graph, by_hand = point
    flow = graph.backward()
    assert_same(flow["W2"], by_hand.a1.T @ plain(flow[live.s2]))
    assert_same(flow["W2"], by_hand.dW2)
    assert_same(flow["b2"], by_hand.db2[0])
    assert flow["W2"].shape == (H, C)


def test_eqs_9_and_10_weights_and_biases_of_the_hidden_layer(point: tuple[Pass, rg.Graph, OnePoint]) -> None:
    """With the loop of section 3.2 that sets tmp to 0 wherever a_1 is."""
    live, graph, by_hand = point
    flow = graph.backward()
    assert_same(flow[live.s1], by_hand.ds1)
    assert_same(flow["W1"], by_hand.dW1)
    assert_same(flow["b1"], by_hand.db1[0])
    assert flow["W1"].shape == (D, H)


def test_eq_11_through_the_softmax(point: tuple[Pass, rg.Graph, OnePoint], data: tuple[Tensor, list[int]]) -> None:
    """The calculus the text leaves out: da_2[k]/ds_2[c] = a_2[k] (1(k = c) - a_2[c])."""
    live, graph, by_hand = point
    flow, a2, y = graph.backward(), by_hand.a2[0], data[1][0]
    softmax = graph.local_jacobian(live.a2).matrix
    assert_same(softmax, [[a2[k] * ((k == c) - a2[c]) for c in range(C)] for k in range(C)])
    assert_same(flow[live.a2], [[-(y == c) / a2[y] for c in range(C)]])
    assert_same(flow[live.a2] @ softmax, by_hand.ds2)


def test_cross_entropy_has_eq_6_without_a_softmax(
    net: Net, point: tuple[Pass, rg.Graph, OnePoint], data: tuple[Tensor, list[int]]
) -> None:
    """PyTorch's loss takes s_2: its graph goes through log-softmax and has no a_2."""
    by_hand = point[2]
    s2 = forward(net, data[0][:1], data[1][0]).s2
    graph = rg.Graph(torch.nn.functional.cross_entropy(s2, torch.tensor(data[1][:1])), net.parameters)
    assert [v.op for v in graph.vertices[:2]] == ["nll_loss", "log_softmax"]
    assert_same(graph.backward()[s2], by_hand.ds2)


def through_product(graph: rg.Graph, s: Tensor, slot: int) -> Tensor:
    """The Jacobian of s = h.W + b in h (slot 0) or W (slot 1) where the addition is an operation of its own."""
    add = graph.local_jacobian(s, 0)
    assert_same(add.matrix, np.eye(s.numel()))
    return graph.local_jacobian(add.source, slot).matrix


def test_eqs_14_and_15_the_top_layer_in_its_weights(point: tuple[Pass, rg.Graph, OnePoint]) -> None:
    """ds_2/dW_2 is C x HC, with a_1 repeated; the text's a_1^T is what multiplying with it amounts to."""
    live, graph, by_hand = point
    full = through_product(graph, live.s2, 1)
    assert_same(full, np.kron(by_hand.a1, np.eye(C)))
    assert_same((full.T @ graph.backward()[live.s2][0]).reshape(H, C), by_hand.dW2)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_layer_in_its_bias_is_the_identity(point: tuple[Pass, rg.Graph, OnePoint], layer: int) -> None:
    """Sections 4.1.4 and 4.2.4: ds/db = 1."""
    live, graph, by_hand = point
    s, ds = (live.s1, by_hand.ds1) if layer == 1 else (live.s2, by_hand.ds2)
    found = graph.local_jacobian(s, 1)
    assert found.source.name == f"b{layer}"
    assert_same(found.matrix, np.eye(s.numel()))
    assert_same(graph.backward()[f"b{layer}"], 1 * ds[0])


def test_eq_16_three_terms_with_the_diagonal_matrix(net: Net, point: tuple[Pass, rg.Graph, OnePoint]) -> None:
    """1 x C, C x H and H x H; the last is 0 off its diagonal, and on it where s_1 is not above 0."""
    live, graph, by_hand = point
    first = graph.backward()[live.s2]
    second = through_product(graph, live.s2, 0)
    third = graph.local_jacobian(live.a1)
    assert (first.shape, second.shape, third.matrix.shape) == ((1, C), (C, H), (H, H))
    assert_same(second, plain(net.W2).T)
    assert third.form == "diagonal"
    assert_same(third.matrix, np.diag([1.0 if s > 0 else 0.0 for s in by_hand.s1[0]]))
    assert third.matrix[2, 2] == 0  # exactly at the kink
    assert_same(first @ second @ third.matrix, by_hand.ds1)
    assert_same(graph.backward()[live.s1], by_hand.ds1)


def test_eq_17_the_hidden_layer_in_its_weights(
    point: tuple[Pass, rg.Graph, OnePoint], data: tuple[Tensor, list[int]]
) -> None:
    """x has no gradient, so that the product reads W_1 alone."""
    live, graph, by_hand = point
    x = plain(data[0][:1])
    full = through_product(graph, live.s1, 1)
    assert_same(full, np.kron(x, np.eye(H)))
    assert_same((full.T @ graph.backward()[live.s1][0]).reshape(D, H), x.T @ by_hand.ds1)
    assert_same(graph.backward()["W1"], x.T @ by_hand.ds1)


# The whole batch


def losses(net: Net, x: Tensor, y: list[int]) -> Tensor:
    """J_data of each point, as anyone would write it."""
    logits = (x @ net.W1 + net.b1).relu() @ net.W2 + net.b2
    return torch.nn.functional.cross_entropy(logits, torch.tensor(y), reduction="none")


def total_loss(net: Net, x: Tensor, y: list[int]) -> Tensor:
    """Eq. 1: weights are regularized, biases are not."""
    return losses(net, x, y).mean() + ALPHA / 2 * (net.W2.square().sum() + net.W1.square().sum())


def test_each_row_is_the_gradient_of_one_point(net: Net, data: tuple[Tensor, list[int]]) -> None:
    x, y = data
    rows = rg.jacobian(losses(net, x, y), net.parameters).dense(as_dict=True)
    for i in range(N):
        one = section_3(net.numbers, plain(x[i : i + 1]), y[i])
        by_hand = {"W1": one.dW1, "b1": one.db1[0], "W2": one.dW2, "b2": one.db2[0]}
        for name, gradient in by_hand.items():
            assert_same(rows[name][i], gradient)


def test_algorithm_1_is_the_mean_of_the_rows_plus_alpha_w(net: Net, data: tuple[Tensor, list[int]]) -> None:
    x, y = data
    by_hand = gradients(net.numbers, plain(x), y, ALPHA)
    mean = rg.jacobian(losses(net, x, y), net.parameters).weighted_sum(1 / N)
    for name, p in net.parameters.items():
        decay = ALPHA * p.detach() if name.startswith("W") else 0
        assert_same(mean[name] + decay, by_hand[name])


def test_eq_1_the_regularized_loss_in_one_graph(net: Net, data: tuple[Tensor, list[int]]) -> None:
    """Sections 4.1.3 and 4.2.3: the paths through the regularization bring alpha W, all others the data's part."""
    x, y = data
    by_hand = gradients(net.numbers, plain(x), y, ALPHA)
    graph = rg.Graph(total_loss(net, x, y), net.parameters)
    flow = graph.backward()
    for name in net.parameters:
        assert_same(flow[name], by_hand[name])
    for name in ("W1", "W2"):
        parts = list(graph.decompose(name, by="use").values())
        assert len(parts) == 2
        weight = plain(net.parameters[name])
        assert_same(parts[0], by_hand[name] - ALPHA * weight)
        assert_same(parts[1], ALPHA * weight)


def test_lines_16_to_19_a_step_against_the_gradient(net: Net, data: tuple[Tensor, list[int]]) -> None:
    x, y = data
    by_hand = algorithm_1(net.numbers, plain(x), y, eta=ETA, alpha=ALPHA, maxiter=1)
    loss = total_loss(net, x, y)
    found = rg.Graph(loss, net.parameters).backward().gradients
    with torch.no_grad():
        for name, p in net.parameters.items():
            p -= ETA * found[name]
            assert_same(p, by_hand[name])
    assert total_loss(net, x, y) < loss


def test_line_1_weights_of_zero_give_no_gradient_to_any_weight(data: tuple[Tensor, list[int]]) -> None:
    shapes = ((D, H), (H,), (H, C), (C,))
    net = Net(*(torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes))
    flow = rg.Graph(losses(net, *data).mean(), net.parameters).backward()
    for name in ("W1", "b1", "W2"):
        assert_same(flow[name], np.zeros(net.parameters[name].shape))
    assert_same(flow["b2"], np.full(C, 1 / C) - np.bincount(data[1], minlength=C) / N)
