"""Seed 003: backpropagation by neurons and by levels (Galvan 2015), every equation by hand in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.seeds.hand import Array, assert_same, leaf, plain, sigmoid
from torch import Tensor

import rowgrad as rg

# A net of arbitrary topology: neurons 0 to 2 hold the input, 7 and 8 are the output units. LINKS are (j, n), from j
# to n; some of them skip levels.

INPUTS, OUTPUTS = (0, 1, 2), (7, 8)
LINKS = [(0, 3), (1, 3), (1, 4), (2, 4), (0, 5), (3, 5), (4, 5), (3, 6), (2, 6), (5, 7), (6, 7), (1, 7), (5, 8), (3, 8)]
HIDDEN = (3, 4, 5, 6)
N = 4

Link = tuple[int, int]


def neurons(w: Mapping[Link, Tensor], x: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """a_l and phi_l of each neuron, as scalars of one graph."""
    a, phi = {}, {j: x[j] for j in INPUTS}
    for n in HIDDEN + OUTPUTS:
        a[n] = torch.stack([w[j, to] * phi[j] for j, to in LINKS if to == n]).sum()
        phi[n] = a[n].sigmoid()
    return a, phi


def loss_of(phi: Mapping[int, Tensor], y: Tensor) -> Tensor:
    return sum((phi[u] - t) ** 2 for u, t in zip(OUTPUTS, y, strict=True)) / 2  # type: ignore[return-value]


@pytest.fixture
def w() -> dict[Link, Tensor]:
    return {link: leaf() for link in LINKS}


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """Eq. 1: x in R^3 and y in R^2, N of each."""
    return torch.randn(N, 3, dtype=torch.float64), torch.rand(N, 2, dtype=torch.float64)


def by_hand(
    w: Mapping[Link, Tensor], x: Array, y: Array
) -> tuple[dict[int, float], dict[int, float], dict[int, float]]:
    """Eqs. 3, 4, 5 and 7 with plain numbers: a, phi and delta of each neuron."""
    weight = {link: float(plain(v)) for link, v in w.items()}
    a, phi = {}, {j: float(x[j]) for j in INPUTS}
    for n in HIDDEN + OUTPUTS:
        a[n] = sum(weight[j, to] * phi[j] for j, to in LINKS if to == n)  # (3)
        phi[n] = sigmoid(a[n])  # (4)
    slope = {n: phi[n] * (1 - phi[n]) for n in a}
    delta = {u: (phi[u] - t) * slope[u] for u, t in zip(OUTPUTS, y, strict=True)}
    for n in reversed(HIDDEN):
        reads_l = [to for j, to in LINKS if j == n]  # P(l) of (6), as (7) needs it
        delta[n] = sum(delta[k] * weight[n, k] * slope[n] for k in reads_l)  # (7)
    return a, phi, delta


def named(w: Mapping[Link, Tensor]) -> dict[str, Tensor]:
    return {f"{j}-{n}": v for (j, n), v in w.items()}


def test_eqs_3_to_5_and_7_delta_of_every_neuron(w: dict[Link, Tensor], data: tuple[Tensor, Tensor]) -> None:
    x, y = data[0][0], data[1][0]
    live_a, live_phi = neurons(w, x)
    graph = rg.Graph(loss_of(live_phi, y), named(w))
    flow = graph.backward()
    a, phi, delta = by_hand(w, plain(x), plain(y))
    for n in HIDDEN + OUTPUTS:
        assert_same(live_a[n], a[n])
        assert_same(graph.value(live_phi[n]), phi[n])
        assert_same(flow[live_a[n]], delta[n])
    found = {graph[live_a[n]].index: delta[n] for n in delta}
    assert {v.pre.index: float(v.delta) for v in flow.activations} == pytest.approx(found, rel=1e-10)


def test_each_weight_is_delta_of_its_end_times_phi_of_its_start(
    w: dict[Link, Tensor], data: tuple[Tensor, Tensor]
) -> None:
    """The equation between (4) and (5), which has no number: dL/dw_lj = delta_l phi_j."""
    x, y = data[0][0], data[1][0]
    flow = rg.Graph(loss_of(neurons(w, x)[1], y), named(w)).backward()
    _, phi, delta = by_hand(w, plain(x), plain(y))
    for j, n in LINKS:
        assert_same(flow[f"{j}-{n}"], delta[n] * phi[j])


def test_eq_6_the_neurons_summed_over_are_those_that_read_phi(
    w: dict[Link, Tensor], data: tuple[Tensor, Tensor]
) -> None:
    """Under a_l = sum of w_lj phi_j these are the k with a weight w_kl; the text prints w_lk."""
    live_a, live_phi = neurons(w, data[0][0])
    graph = rg.Graph(loss_of(live_phi, data[1][0]), named(w))
    sums = {graph[a].index: n for n, a in live_a.items()}
    for n in HIDDEN:
        products = [reader for reader, _ in graph.readers(live_phi[n])]
        stacks = [graph.readers(product)[0][0] for product in products]
        found = {sums[graph.readers(stack)[0][0].index] for stack in stacks}
        assert found == {k for j, k in LINKS if j == n}
        assert found != {k for k, to in LINKS if to == n}


def test_output_units_need_no_weights_for_delta(w: dict[Link, Tensor], data: tuple[Tensor, Tensor]) -> None:
    """delta_u follows from a_u and the loss alone: the same behind other weights that lead to the same a_u."""
    a_u = [leaf(), leaf()]
    phi = {u: a.sigmoid() for u, a in zip(OUTPUTS, a_u, strict=True)}
    y = data[1][0]
    flow = rg.Graph(loss_of(phi, y), a_u).backward()
    for a, t in zip(a_u, plain(y), strict=True):
        o = sigmoid(float(plain(a)))
        assert_same(flow[a], (o - t) * o * (1 - o))
    x = data[0][0]
    live_a, live_phi = neurons(w, x)
    full = rg.Graph(loss_of(live_phi, y), named(w)).backward()
    for u, t in zip(OUTPUTS, plain(y), strict=True):
        o = float(plain(live_phi[u]))
        assert_same(full[live_a[u]], (o - t) * o * (1 - o))


def test_eqs_1_and_2_the_mean_loss_has_the_mean_gradient(w: dict[Link, Tensor], data: tuple[Tensor, Tensor]) -> None:
    losses = torch.stack([loss_of(neurons(w, x)[1], y) for x, y in zip(*data, strict=True)])
    graph = rg.Graph(losses.mean(), named(w))
    mean = dict.fromkeys(LINKS, 0.0)
    for x, y in zip(*map(plain, data), strict=True):
        _, phi, delta = by_hand(w, x, y)
        for j, n in LINKS:
            mean[j, n] += delta[n] * phi[j] / N
    for (j, n), gradient in mean.items():
        assert_same(graph.backward()[f"{j}-{n}"], gradient)


# Levels, in matrix notation

SIZES = (3, 5, 4, 2)  # p(1) to p(4)


@pytest.fixture
def W() -> list[Tensor]:
    """W_2 to W_4, each p(i) x p(i-1)."""
    return [leaf(p, before) for before, p in pairwise(SIZES)]


def levels(W: list[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Eqs. 8 to 10."""
    phi, a = [x], []
    for W_i in W:
        a.append(W_i @ phi[-1])
        phi.append(a[-1].tanh())
    return a, phi


def deltas(W: list[Tensor], a: list[Array], y: Array) -> list[Array]:
    """Eq. 12 for the loss |phi - y|^2 / 2, then eq. 13 with the slope it needs, sigma'(a_i)."""
    slope = [1 - np.tanh(z) ** 2 for z in a]
    found = [(np.tanh(a[-1]) - y) * slope[-1]]
    for i in reversed(range(len(a) - 1)):
        found.insert(0, (plain(W[i + 1]).T @ found[0]) * slope[i])
    return found


def test_eqs_8_to_13_by_levels(W: list[Tensor]) -> None:
    x, y = torch.randn(3, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    a, phi = levels(W, x)
    graph = rg.Graph((phi[-1] - y).square().sum() / 2, {f"W{i + 2}": W_i for i, W_i in enumerate(W)})
    flow = graph.backward()
    hand_phi, hand_a = [plain(x)], []
    for W_i in W:
        hand_a.append(plain(W_i) @ hand_phi[-1])
        hand_phi.append(np.tanh(hand_a[-1]))
    Delta = deltas(W, hand_a, plain(y))
    for i in range(len(W)):
        assert_same(a[i], hand_a[i])
        assert_same(graph.value(phi[i + 1]), hand_phi[i + 1])
        assert_same(flow[a[i]], Delta[i])
        assert_same(flow[f"W{i + 2}"], np.outer(Delta[i], hand_phi[i]))
        assert flow[f"W{i + 2}"].shape == (SIZES[i + 1], SIZES[i])
    for found, by_hand in zip(flow.activations, Delta, strict=True):
        assert_same(found.delta, by_hand)


def test_eq_11_its_middle_with_the_jacobian_written_out(W: list[Tensor]) -> None:
    """dL/dW = dL/da . (da/dW)^T, where da/dW is p(i) x p(i)p(i-1) and holds phi once in each row."""
    x = torch.randn(3, dtype=torch.float64)
    a, phi = levels(W, x)
    graph = rg.Graph(phi[-1].square().sum(), {f"W{i + 2}": W_i for i, W_i in enumerate(W)})
    flow = graph.backward()
    for i in range(len(W)):
        J = graph.local_jacobian(a[i], 0)
        assert J.source.name == f"W{i + 2}"
        assert_same(J.matrix, np.kron(np.eye(SIZES[i + 1]), plain(phi[i])))
        assert_same((J.matrix.T @ flow[a[i]]).reshape(W[i].shape), np.outer(plain(flow[a[i]]), plain(phi[i])))


def test_eq_13_as_printed_is_not_the_cotangent(W: list[Tensor]) -> None:
    """The text has sigma(Delta_i) where the chain rule has sigma'(a_i)."""
    x = torch.randn(3, dtype=torch.float64)
    a, phi = levels(W, x)
    flow = rg.Graph(phi[-1].square().sum(), W).backward()
    Delta = [plain(flow[z]) for z in a]
    for i in range(len(W) - 1):
        back = plain(W[i + 1]).T @ Delta[i + 1]
        assert_same(Delta[i], back * (1 - np.tanh(plain(a[i])) ** 2))
        assert np.abs(Delta[i] - back * np.tanh(Delta[i])).max() > 0.1 * np.abs(Delta[i]).max()


def test_eqs_1_2_and_11_on_a_batch_the_mean_of_the_rows(W: list[Tensor]) -> None:
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.rand(N, 2, dtype=torch.float64)
    names = {f"W{i + 2}": W_i for i, W_i in enumerate(W)}
    phi = x
    for W_i in W:
        phi = (phi @ W_i.T).tanh()
    rows = rg.jacobian((phi - y).square().sum(1) / 2, names)
    mean = {name: np.zeros(p.shape) for name, p in names.items()}
    for k in range(N):
        a, phi_k = levels(W, x[k])
        for i, Delta_i in enumerate(deltas(W, [plain(z) for z in a], plain(y[k]))):
            one = np.outer(Delta_i, plain(phi_k[i]))
            mean[f"W{i + 2}"] += one / N
            assert_same(rows.dense(as_dict=True)[f"W{i + 2}"][k], one)
    for name, gradient in rows.weighted_sum(1 / N).items():
        assert_same(gradient, mean[name])


# The recurrent net of figure 1

STEPS = 5


def test_a_recurrent_net_is_one_weight_at_several_times() -> None:
    """phi_t = tanh(a_t), a_t = U x_t + V phi_{t-1}, a loss at every step: V's part at t is delta_t phi_{t-1}^T."""
    U, V = leaf(4, 3), leaf(4, 4)
    x, y = torch.randn(STEPS, 3, dtype=torch.float64), torch.rand(STEPS, 4, dtype=torch.float64)
    start = torch.randn(4, dtype=torch.float64)
    a, phi, losses = [], [start], []
    for t in range(STEPS):
        a.append(U @ x[t] + V @ phi[-1])
        phi.append(a[-1].tanh())
        losses.append((phi[-1] - y[t]).square().sum() / 2)
    graph = rg.Graph(torch.stack(losses).sum(), {"U": U, "V": V})
    flow = graph.backward()

    h = [plain(p) for p in phi]
    delta: list[Array] = [np.zeros(4)] * (STEPS + 1)
    for t in reversed(range(STEPS)):
        delta[t] = (h[t + 1] - plain(y[t]) + plain(V).T @ delta[t + 1]) * (1 - h[t + 1] ** 2)
        assert_same(flow[a[t]], delta[t])
    for name, reads in (("U", plain(x)), ("V", h)):
        parts = graph.decompose(name, by="time")
        assert list(parts) == list(range(STEPS))
        for t, part in parts.items():
            assert_same(part, np.outer(delta[t], reads[t]))
        assert_same(flow[name], sum(np.outer(delta[t], reads[t]) for t in range(STEPS)))
