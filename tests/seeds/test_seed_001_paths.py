"""Seed 001, part I: derivatives as sums over paths (Aggarwal 2018, ch. 3.2), against closed forms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.seeds.hand import assert_same, given, plain, sigmoid
from torch import Tensor

import rowgrad as rg
from rowgrad.errors import GraphError

W = 0.7
LAYERS = 5  # of the seed's product graph


def products_along_paths(graph: rg.Graph, name: str = "w") -> list[float]:
    return [float(graph.path_gradient(path)) for path in graph.paths(name)]


def test_eq_1_sigmoid_of_sigmoid() -> None:
    w = given(W)
    y = w.sigmoid()
    o = y.sigmoid()
    graph = rg.Graph(o, {"w": w})
    inner = 1 / (1 + math.exp(-W))
    outer = 1 / (1 + math.exp(-1 / (1 + math.exp(-W))))
    assert_same(graph.value(o), outer)
    assert_same(products_along_paths(graph), [outer * (1 - outer) * inner * (1 - inner)])
    assert_same(graph.backward()["w"], outer * (1 - outer) * inner * (1 - inner))


def test_along_one_path_local_derivatives_are_multiplied() -> None:
    """f(g(w)) = cos(w^2)."""
    w = given(W)
    y = w.square()
    o = y.cos()
    graph = rg.Graph(o, {"w": w})
    assert_same(graph.local_jacobian(o).matrix, [[-math.sin(W**2)]])
    assert_same(graph.local_jacobian(y).matrix, [[2 * W]])
    assert_same(products_along_paths(graph), [-2 * W * math.sin(W**2)])
    assert_same(graph.backward()["w"], -2 * W * math.sin(W**2))


def test_eq_2_each_input_of_a_multivariate_function_brings_one_term() -> None:
    """f = log(exp(g_1) + ... + exp(g_k)) with g_i = sin(i w)."""
    w, k = given(W), 4
    g = [(i * w).sin() for i in range(1, k + 1)]
    graph = rg.Graph(torch.stack(g).logsumexp(0), {"w": w})
    i = np.arange(1, k + 1)
    weights = np.exp(np.sin(i * W))
    df_dg, dg_dw = weights / weights.sum(), i * np.cos(i * W)
    assert_same(sorted(products_along_paths(graph)), sorted(df_dg * dg_dw))
    assert_same(graph.backward()["w"], (df_dg * dg_dw).sum())


def test_along_several_paths_the_products_are_added() -> None:
    """o = K(p, q) = p + q with p = cos(y), q = sin(z) and y = z = f(w) = w^2."""
    w = given(W)
    y = w.square()
    p, q = y.cos(), y.sin()
    o = p + q
    graph = rg.Graph(o, {"w": w})
    assert_same([graph.local_jacobian(o, slot).matrix for slot in (0, 1)], [[[1]], [[1]]])
    assert_same(graph.local_jacobian(p).matrix, [[-math.sin(W**2)]])
    assert_same(graph.local_jacobian(q).matrix, [[math.cos(W**2)]])
    assert_same(products_along_paths(graph), [-2 * W * math.sin(W**2), 2 * W * math.cos(W**2)])
    assert_same(graph.backward()["w"], -2 * W * math.sin(W**2) + 2 * W * math.cos(W**2))


# The pathwise aggregation lemma, on a graph of units y(j) = sigmoid(sum over i of c(i, j) y(i))

EDGES = {
    (0, 1): 0.8, (0, 2): -1.1, (0, 3): 0.4, (1, 4): 1.3, (2, 4): -0.6, (2, 5): 0.9, (3, 5): 1.7, (1, 6): -0.3,
    (4, 6): 0.5, (4, 7): -1.9, (5, 7): 1.2, (6, 8): 0.7, (7, 8): -1.4, (0, 8): 0.2,
}  # fmt: skip
SINK = 8


def units(w: Tensor) -> list[Tensor]:
    y = [w]
    for j in range(1, SINK + 1):
        y.append(torch.sigmoid(torch.stack([c * y[i] for (i, to), c in EDGES.items() if to == j]).sum()))
    return y


def local_derivatives(w: float) -> dict[tuple[int, int], float]:
    """z(i, j) = dy(j)/dy(i), after a forward phase that computes every y(i)."""
    y = {0: w}
    for j in range(1, SINK + 1):
        y[j] = sigmoid(sum(c * y[i] for (i, to), c in EDGES.items() if to == j))
    return {(i, j): c * y[j] * (1 - y[j]) for (i, j), c in EDGES.items()}


def all_paths(start: int) -> Iterator[tuple[int, ...]]:
    if start == SINK:
        yield (SINK,)
    for i, j in EDGES:
        if i == start:
            yield from ((start, *rest) for rest in all_paths(j))


def by_units(graph: rg.Graph, y: list[Tensor]) -> Mapping[tuple[int, ...], float]:
    """{the units on a path: its product}."""
    number = {graph[t].index: i for i, t in enumerate(y)}
    return {
        (0, *(number[read.vertex.index] for read in path.edges if read.vertex.index in number)): float(
            graph.path_gradient(path)
        )
        for path in graph.paths("w")
    }


def test_eq_3_the_exponential_time_algorithm_step_by_step() -> None:
    w = given(W)
    y = units(w)
    graph = rg.Graph(y[SINK], {"w": w})
    z = local_derivatives(W)
    by_hand = {path: math.prod(z[edge] for edge in pairwise(path)) for path in all_paths(0)}
    found = by_units(graph, y)
    assert len(by_hand) == graph.count_paths("w") == 8
    assert found.keys() == by_hand.keys()
    assert_same([found[path] for path in by_hand], list(by_hand.values()))
    assert_same(graph.backward()["w"], sum(by_hand.values()))


# Product nodes: each layer has two, each of them the product of the two before


def product_graph(w: Tensor, n_layers: int) -> tuple[Tensor, list[list[Tensor]]]:
    layers = [[w.clone(), w.clone()]]
    for _ in range(n_layers - 1):
        a, b = layers[-1]
        layers.append([a * b, a * b])
    a, b = layers[-1]
    return a * b, layers


def test_the_product_graph_has_32_paths_that_carry_w_to_the_31() -> None:
    w = given(W)
    o, _ = product_graph(w, LAYERS)
    graph = rg.Graph(o, {"w": w})
    assert_same(o, W**32)
    assert graph.count_paths("w") == 32
    assert_same(products_along_paths(graph), [W**31] * 32)
    assert_same(graph.backward()["w"], 32 * W**31)


def test_along_a_path_of_products_are_the_values_on_the_disjoint_path() -> None:
    """Beginning with two different values, so that the paths differ too."""
    u, v = given(0.7), given(1.3)
    layers = [[u.clone(), v.clone()]]
    for _ in range(LAYERS - 1):
        a, b = layers[-1]
        layers.append([a * b, a * b])
    o = layers[-1][0] * layers[-1][1]
    graph = rg.Graph(o, {"u": u, "v": v})
    other = {graph[pair[j]].index: graph.value(pair[1 - j]) for pair in layers for j in (0, 1)}
    for name, start in (("u", 1.3), ("v", 0.7)):
        for path in graph.paths(name):
            values = [float(other[read.vertex.index]) for read in path.edges if read.vertex.index in other]
            assert_same(values, [start, *((0.7 * 1.3) ** 2**k for k in range(LAYERS - 1))])
            assert_same(graph.path_gradient(path), math.prod(values))
    assert graph.count_paths("u") + graph.count_paths("v") == 32


@pytest.mark.parametrize("depth", range(1, 10))
def test_the_number_of_paths_doubles_with_depth(depth: int) -> None:
    w = given(0.99)
    graph = rg.Graph(product_graph(w, depth)[0], {"w": w})
    n, value = 2**depth, 0.99 ** (2**depth - 1)
    assert graph.count_paths("w") == n
    assert_same(products_along_paths(graph), [value] * n)
    assert_same(graph.backward()["w"], n * value)


def test_paths_that_nobody_could_walk_are_counted_and_summed() -> None:
    w = given(1.0)
    graph = rg.Graph(product_graph(w, 100)[0], {"w": w})
    assert graph.count_paths("w") == 2**100
    assert float(graph.backward()["w"]) == 2.0**100
    with pytest.raises(GraphError, match=r"w: about 10\^30 paths"):
        graph.paths("w")


# Units of a net, one by one


def scalar_net(x: Tensor, width: int) -> tuple[Tensor, list[list[list[Tensor]]]]:
    """Three hidden layers and one output, every weight a variable of its own."""
    h, weights = [x], []
    for n in (width, width, width, 1):
        weights.append([list(row.unbind()) for row in torch.randn(n, len(h), dtype=torch.float64).requires_grad_()])
        h = [torch.stack([w * g for w, g in zip(row, h, strict=True)]).sum().sigmoid() for row in weights[-1]]
    return h[0], weights


def test_a_million_paths_lead_through_three_layers_of_100() -> None:
    x = given(0.3)
    o, weights = scalar_net(x, 100)
    graph = rg.Graph(o, {"x": x})
    assert graph.count_paths("x") == 1_000_000
    assert [graph.count_paths(layer[0][0]) for layer in weights] == [100 * 100, 100, 1, 1]


def test_a_net_of_units_small_enough_to_walk() -> None:
    """Eq. 3 over the 27 paths of three layers of 3, with z(i, j) = w_ij y_j (1 - y_j) by hand."""
    x = given(0.3)
    o, weights = scalar_net(x, 3)
    graph = rg.Graph(o, {"x": x})
    W1, W2, W3, W4 = (np.array([[float(w.detach()) for w in row] for row in layer]) for layer in weights)
    y1 = sigmoid(W1 @ plain(x)[None])
    y2 = sigmoid(W2 @ y1)
    y3 = sigmoid(W3 @ y2)
    y4 = sigmoid(W4 @ y3)
    z1, z2, z3, z4 = (W * (y * (1 - y))[:, None] for W, y in ((W1, y1), (W2, y2), (W3, y3), (W4, y4)))
    by_hand = np.einsum("ax,ba,cb,oc->abc", z1, z2, z3, z4).reshape(-1)
    assert_same(sorted(products_along_paths(graph, "x")), sorted(by_hand))
    assert_same(graph.backward()["x"], by_hand.sum())
