"""Seed 001, part III: vector variables, Jacobians, and the table of forward and backward functions, line by line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.seeds.hand import Array, assert_same, given, leaf, plain, sigmoid
from torch import Tensor

import rowgrad as rg

# Eqs. 8 to 11 along a chain: linear, tanh, linear, ReLU, linear; z_{i+1} = W^T z_i


@pytest.fixture
def chain() -> tuple[list[Tensor], list[Tensor]]:
    """Weights, and the vector variables z_0 to z_5."""
    weights = [leaf(3, 5), leaf(5, 4), leaf(4, 2)]
    z = [leaf(3)]
    for w, phi in zip(weights, (torch.tanh, torch.relu, None), strict=True):
        z.append(w.T @ z[-1])
        if phi is not None:
            z.append(phi(z[-1]))
    return weights, z


def jacobians_by_hand(weights: list[Tensor], z: list[Tensor]) -> list[Array]:
    W1, W2, W3 = map(plain, weights)
    return [
        W1.T,
        np.diag(1 - np.tanh(plain(z[1])) ** 2),
        W2.T,
        np.diag((plain(z[3]) > 0).astype(float)),
        W3.T,
    ]


def test_eq_10_the_jacobian_of_every_layer(chain: tuple[list[Tensor], list[Tensor]]) -> None:
    weights, z = chain
    graph = rg.Graph(z[-1].square().sum())
    for before, after, by_hand in zip(z, z[1:], jacobians_by_hand(weights, z), strict=False):
        found = graph.local_jacobian(after, slot=len(graph[after].inputs) - 1)  # after W^T, where there is one
        assert_same(found.matrix, by_hand)
        assert found.source == graph[before]


def test_eqs_8_9_and_11_one_vector_for_each_layer(chain: tuple[list[Tensor], list[Tensor]]) -> None:
    """S(p, o) = sum of S(q, o) z(p, q), which is g_i = Z g_{i+1} with Z = J^T."""
    weights, z = chain
    flow = rg.Graph(z[-1].square().sum()).backward()
    assert_same(flow[z[-1]], 2 * plain(z[-1]))
    for i, J in enumerate(jacobians_by_hand(weights, z)):
        Z = np.array([[J[q, p] for q in range(J.shape[0])] for p in range(J.shape[1])])
        S = plain(flow[z[i + 1]])
        assert_same(flow[z[i]], [sum(S[q] * Z[p, q] for q in range(len(S))) for p in range(len(Z))])
        assert_same(flow[z[i]], Z @ S)
        assert_same(flow[z[i]], J.T @ S)


def test_a_chain_of_vectors_is_a_single_path(chain: tuple[list[Tensor], list[Tensor]]) -> None:
    """Method 1: the chain rule for vectors along the one path there is."""
    weights, z = chain
    graph = rg.Graph(z[-1].square().sum())
    product = np.linalg.multi_dot([J.T for J in jacobians_by_hand(weights, z)])
    (path,) = graph.paths(z[0])
    assert_same(graph.path_gradient(path), product @ (2 * plain(z[-1])))


def test_linear_layers_are_dense_and_activations_sparse(chain: tuple[list[Tensor], list[Tensor]]) -> None:
    _, z = chain
    graph = rg.Graph(z[-1].square().sum())
    forms = [graph.local_jacobian(v, slot=len(graph[v].inputs) - 1).form for v in z[1:]]
    assert forms == ["dense", "diagonal", "dense", "diagonal", "dense"]


# The table of forward and backward functions


@dataclass
class Line:
    """One line: in PyTorch, and the table's forward(z_i) and backward(z_i, z_{i+1}, g_{i+1})."""

    op: Callable[[Tensor], Tensor]
    forward: Callable[[Array], Array]
    backward: Callable[[Array, Array, Array], Array]
    form: str
    at: list[float]


WEIGHT = np.array([[0.5, -1.0], [2.0, 0.3], [-0.7, 1.1]])  # W, 3 x 2
FAR = [-700.0, -40.0, 40.0, 700.0]  # where sigmoid and tanh are saturated
NEAR = [-1.7, -0.4, 0.0, 0.3, 2.2]


def inside(z: Array) -> Array:
    return (z >= -1) & (z <= 1)


def softmax(z: Array) -> Array:
    return np.exp(z) / np.exp(z).sum()


def softmax_backward(z: Array, out: Array, g: Array) -> Array:
    """J^T g with J_kr = out_k (1(k = r) - out_r)."""
    return (np.diag(out) - np.outer(out, out)).T @ g


def products_backward(z: Array, out: Array, g: Array) -> Array:
    """f_k = z_1 ... z_k, so that J_kr is the product of the others up to k, 0 for r > k."""
    J = np.array([[np.delete(z[: k + 1], r).prod() if r <= k else 0.0 for r in range(len(z))] for k in range(len(z))])
    return J.T @ g


def maximum_backward(z: Array, out: Array, g: Array) -> Array:
    return np.where(np.arange(len(z)) == z.argmax(), g, 0.0)


TABLE = {
    "linear": Line(
        lambda z: z.new_tensor(WEIGHT).T @ z,
        lambda z: WEIGHT.T @ z,
        lambda z, out, g: WEIGHT @ g,
        "dense", [0.2, -1.5, 0.9],
    ),
    "sigmoid": Line(torch.sigmoid, sigmoid, lambda z, out, g: g * out * (1 - out), "diagonal", NEAR + FAR),
    "tanh": Line(torch.tanh, np.tanh, lambda z, out, g: g * (1 - out * out), "diagonal", NEAR + FAR),
    "ReLU": Line(torch.relu, lambda z: z * (z > 0), lambda z, out, g: g * (z > 0), "diagonal", NEAR + FAR),
    "hard tanh": Line(
        F.hardtanh,
        lambda z: np.where(inside(z), z, np.sign(z)),
        lambda z, out, g: np.where(inside(z), g, 0),
        "diagonal", NEAR + FAR,
    ),
    "hard tanh by clamp, boundary included": Line(
        lambda z: z.clamp(-1, 1),
        lambda z: np.where(inside(z), z, np.sign(z)),
        lambda z, out, g: np.where(inside(z), g, 0),
        "diagonal", [*NEAR, -1.0, 1.0, np.nextafter(-1, -2), np.nextafter(1, 2)],
    ),
    "max": Line(lambda z: z.max(), lambda z: z.max(), maximum_backward, "selection", NEAR),
    "max along a dimension": Line(lambda z: z.max(0).values, lambda z: z.max(), maximum_backward, "selection", NEAR),
    "arbitrary: softmax": Line(lambda z: z.softmax(0), softmax, softmax_backward, "dense", NEAR),
    "arbitrary: products": Line(
        lambda z: z.cumprod(0), lambda z: z.cumprod(), products_backward, "dense", [0.5, -1.2, 2.0, 0.7]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_forward_and_backward_functions(name: str) -> None:
    line = TABLE[name]
    z = given(line.at)
    out = line.op(z)
    forward = line.forward(plain(z))
    g = torch.randn_like(out)
    graph = rg.Graph(out)
    assert_same(out, forward)
    assert_same(graph.backward(seeds={out: g})[z], line.backward(plain(z), forward, plain(g)))
    J = graph.local_jacobian(out, slot=len(graph[out].inputs) - 1)
    assert J.form == line.form
    rows = np.eye(out.numel()).reshape(-1, *out.shape)
    assert_same(J.matrix, np.stack([line.backward(plain(z), forward, row) for row in rows]))


def test_a_maximum_over_windows_copies_to_the_maximal_input_of_each() -> None:
    """The table's last remark: max pooling."""
    z = given([[[0.3, -1.0, 2.0, 1.9, -4.0, -3.0]]])
    out = F.max_pool1d(z, 2)
    g = given([[[10.0, 20.0, 30.0]]]).detach()
    assert_same(rg.Graph(out).backward(seeds={out: g})[z], [[[10, 0, 20, 0, 0, 30]]])


def test_a_layer_of_units_that_maximize_other_units() -> None:
    z = given([[3.0, -1.0], [2.0, 5.0]])
    out = z.max(0).values
    flow = rg.Graph(out).backward(seeds={out: torch.tensor([7.0, 11.0], dtype=torch.float64)})
    assert_same(flow[z], [[7, 0], [0, 11]])


# Where PyTorch differs from the table, or the table leaves it open


def slopes(op: Callable[[Tensor], Tensor], at: list[float]) -> list[float]:
    z = given(at)
    return rg.Graph(op(z).sum()).backward()[z].tolist()


def test_hardtanh_of_pytorch_gives_0_at_its_boundary() -> None:
    """The table copies on the closed interval, as `clamp` does."""
    boundary = [-1.0, 1.0]
    assert slopes(F.hardtanh, boundary) == [0, 0]
    assert slopes(lambda z: z.clamp(-1, 1), boundary) == [1, 1]
    assert slopes(F.relu6, [0.0, 6.0]) == [0, 0]


def test_relu_at_0_is_that_of_the_table_but_not_as_a_maximum() -> None:
    """I(z > 0) is 0 at 0. `maximum(z, 0)` halves ties; `clamp(min=0)` copies there."""
    assert slopes(torch.relu, [0.0, -0.0]) == [0, 0]
    assert slopes(lambda z: torch.maximum(z, torch.zeros_like(z)), [0.0]) == [0.5]
    assert slopes(lambda z: z.clamp(min=0), [0.0]) == [1]


def test_several_maximal_inputs() -> None:
    """The table copies to the maximal input and knows of one. A maximum along a dimension picks one, others share."""
    ties = [1.0, 3.0, 3.0]
    assert slopes(lambda z: z.max(0).values, ties) == [0, 1, 0]
    assert slopes(lambda z: F.max_pool1d(z[None], 3), ties) == [0, 1, 0]
    for shared in (lambda z: z.max(), lambda z: z.amax(0)):
        assert slopes(shared, ties) == [0, 0.5, 0.5]
    assert slopes(lambda z: torch.maximum(z[1], z[2]), ties) == [0, 0.5, 0.5]


def test_saturated_outputs_are_rounded_to_1_and_lose_their_slope() -> None:
    """o(1 - o) and 1 - o^2 are taken of the rounded output; where it is near 0 nothing is lost."""
    assert slopes(torch.sigmoid, [40.0]) == [0]
    assert_same(slopes(torch.sigmoid, [-40.0]), [np.exp(-40)])
    assert slopes(torch.tanh, [-20.0, 20.0]) == [0, 0]
