"""Paths: counted by a sweep, walked one by one, and their derivatives added up (Aggarwal 2018, eqs. 3 and 4)."""

from __future__ import annotations

import doctest
import importlib
import math
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cases import CASES
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import GraphError

FEW = 300  # paths of a parameter that are walked one by one


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def assert_paths_add_up(graph: rg.Graph, name: str, gradient: Tensor) -> None:
    """Eq. 3: over all paths the products of local derivatives add up to the gradient."""
    found = [graph.path_gradient(path) for path in graph.paths(name)]
    assert len(found) == graph.count_paths(name)
    off = sum(found, torch.zeros_like(gradient)) - gradient
    assert off.norm() <= 1e-12 + ROUNDING[narrowest(graph)] * gradient.norm()


ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.03}


def narrowest(graph: rg.Graph) -> torch.dtype:
    """The dtype in which most is rounded."""
    dtypes = {node.dtype(nr) for node in graph.tape.nodes for nr in range(node.n_outputs)}
    return next(dtype for dtype in (torch.bfloat16, torch.float32, torch.float64) if dtype in dtypes)


@pytest.mark.parametrize("name", CASES)
def test_on_every_case_the_paths_add_up_to_the_gradient(name: str, leaves_nothing_behind) -> None:
    setup = CASES[name].build()
    losses = setup.losses()
    graph = rg.Graph(losses, setup.params)
    gradients = graph.backward().gradients
    with leaves_nothing_behind(setup.model, losses):
        for param, gradient in gradients.items():
            if graph.count_paths(param) <= FEW:
                assert_paths_add_up(graph, param, gradient)


# Small programs of random shape: each line combines two earlier values

BINARY = [torch.add, torch.mul, torch.sub, lambda a, b: torch.maximum(a, b * 0.9)]
UNARY = [torch.sin, torch.tanh, torch.relu, lambda a: a[None].expand(3).mean() * 0.5]
LINES = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=9)


def program(lines: list[tuple[int, int, int]], leaves: list[Tensor]) -> Tensor:
    values = list(leaves)
    for op, i, j in lines:
        a, b = values[-1 - i % len(values)], values[j % len(values)]
        values.append(BINARY[op](a, b) if op < 4 else UNARY[op - 4](a))
    return values[-1]


@settings(max_examples=150)
@given(LINES)
def test_enumeration_equals_the_sweep_equals_the_engine(lines: list[tuple[int, int, int]]) -> None:
    leaves = {"u": scalar(0.7), "v": scalar(-1.2)}
    out = program(lines, list(leaves.values()))
    if out.grad_fn is None:
        return
    graph = rg.Graph(out, leaves)
    engine = torch.autograd.grad(out, list(leaves.values()), retain_graph=True, allow_unused=True)
    for (name, leaf), g in zip(leaves.items(), engine, strict=True):
        truth = torch.zeros_like(leaf) if g is None else g
        torch.testing.assert_close(graph.backward().gradients[name], truth)
        assert_paths_add_up(graph, name, truth)
        assert (graph.count_paths(name) == 0) == (name not in graph.parameters)


@settings(max_examples=60)
@given(LINES)
def test_depth_is_the_length_of_the_longest_path(lines: list[tuple[int, int, int]]) -> None:
    leaves = {"u": scalar(0.7), "v": scalar(-1.2)}
    out = program(lines, list(leaves.values()))
    if out.grad_fn is None:
        return
    graph = rg.Graph(out, leaves)
    longest = {name: max(p.length for p in graph.paths(name)) for name in graph.parameters}
    assert {name: graph.depth(name) for name in longest} == longest
    assert graph.depth() == max(longest.values())


# What counts as a path


def test_paths_are_counted_exactly_however_many() -> None:
    w = o = scalar(1.0)
    for _ in range(1000):
        o = o * o
    assert rg.Graph(o, {"w": w}).count_paths("w") == 2**1000
    assert rg.Graph(o, {"w": w}).depth("w") == 1000


def test_operations_that_only_move_entries_add_no_depth() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(0), nn.Tanh())
    graph = rg.Graph(model(torch.ones(2, 3)).reshape(2, 4).T.sum(), model)
    assert graph.depth("0.weight") == 3  # addmm, tanh, sum
    path = next(graph.paths("0.weight"))
    assert (path.length, len(path)) == (3, 7)
    assert str(path).startswith("0.weight -> 0.weight: t -> 0: addmm -> ")


def test_an_edge_whose_derivative_is_zero_is_an_edge() -> None:
    w = scalar(-1.0)
    graph = rg.Graph(torch.relu(w) * 3 + w, {"w": w})
    assert graph.count_paths("w") == 2
    assert sorted(float(graph.path_gradient(p)) for p in graph.paths("w")) == [0.0, 1.0]


def test_outputs_of_one_operation_are_told_apart() -> None:
    w = torch.arange(3.0, requires_grad=True)
    a, b, c = w.unbind()
    graph = rg.Graph(a * b + b * c, {"w": w})
    assert graph.count_paths("w") == 4
    assert [str(p).split(" -> ")[1] for p in graph.paths("w")] == [f"w: unbind (output {i})" for i in (0, 1, 1, 2)]
    assert_paths_add_up(graph, "w", torch.tensor([1.0, 2.0, 1.0]))
    assert graph.count_paths(b) == 2


def test_paths_from_hidden_variables_and_to_several_losses() -> None:
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    h = w.sin()
    losses = [h.square(), (h * 2).sum()]
    graph = rg.Graph([h, *losses], {"w": w})
    assert graph.count_paths(h) == graph.count_paths("w") == 3
    assert [len(p) for p in graph.paths(h)] == [0, 1, 2]
    for key in (h, w):
        found = torch.stack([graph.path_gradient(p) for p in graph.paths(key)]).sum(0)
        torch.testing.assert_close(found, graph.backward()[key])


def test_without_a_path_the_count_and_the_gradient_are_zero() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 3)})
    graph = rg.Graph(model["used"](torch.ones(1, 2)).sum(), model)
    for key in ("unused.weight", model["unused"].weight):
        assert graph.count_paths(key) == 0
        assert list(graph.paths(key)) == []
        with pytest.raises(GraphError, match="no path leads"):
            graph.depth(key)
    assert graph.backward().gradients["unused.weight"].count_nonzero() == 0


def test_a_path_through_a_function_without_a_gradient_is_zero() -> None:
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, z: Tensor) -> None:
            return None

    w = torch.ones(3, requires_grad=True)
    graph = rg.Graph((Cut.apply(w) + w.sin()).sum(), {"w": w})
    assert_paths_add_up(graph, "w", graph.backward()["w"])
    assert graph.count_paths("w") == 2


# Too many


def test_more_paths_than_the_limit_are_refused_before_the_first() -> None:
    w = o = scalar(1.0)
    for _ in range(20):
        o = o * o
    graph = rg.Graph(o, {"w": w})
    with pytest.raises(GraphError, match=r"w: 1048576 paths lead to the losses, more than limit=10000"):
        graph.paths("w")
    assert len(list(islice(graph.paths("w", limit=None), 5))) == 5
    for _ in range(20_000):
        o = o * o
    with pytest.raises(GraphError, match=r"w: about 10\^6026 paths lead"):  # more digits than Python writes out
        rg.Graph(o, {"w": w}).paths("w")
    assert math.isclose(graph.path_gradient(next(graph.paths("w", limit=2**20))), 1.0)


def test_a_path_of_another_graph_is_refused() -> None:
    w = scalar(2.0)
    graphs = [rg.Graph(w.sin().cos(), {"w": w}) for _ in range(2)]
    with pytest.raises(GraphError, match="path of another graph"):
        graphs[1].path_gradient(next(graphs[0].paths("w")))


def test_deep_graphs_are_walked_without_recursion() -> None:
    w = o = scalar(1.0)
    for _ in range(3000):
        o = o.sin()
    assert len(next(rg.Graph(o, {"w": w}).paths("w"))) == 3000


@pytest.mark.parametrize("name", ["graph", "scopes"])
def test_the_examples_in_the_docstrings_are_right(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"rowgrad.graph.{name}")).failed == 0
