"""A gradient split over all paths by a label: the parts add up, and each is what its paths add up to."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import pytest
import torch
from tests.cases import CASES
from tests.graph.test_paths import FEW, ROUNDING, narrowest
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import GraphError
from rowgrad.graph.paths import Path
from rowgrad.tape import Tape

KINDS = {
    "length": "length",
    "use": "use",
    "time": "time",
    "callable": lambda label, vertex: vertex.op if label is None else label,
}


def assert_close(found: Tensor, truth: Tensor, scale: Tensor, rounding: float) -> None:
    assert (found - truth).norm() <= 1e-12 + rounding * scale.norm()


def total(parts: dict[Hashable, Tensor], like: Tensor) -> Tensor:
    return sum(parts.values(), torch.zeros_like(like))


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_on_every_case_the_classes_add_up_to_the_gradient(name: str, by: str, leaves_nothing_behind) -> None:
    setup = CASES[name].build()
    losses = setup.losses()
    graph = rg.Graph(losses, setup.params)
    with leaves_nothing_behind(setup.model, losses):
        for param, gradient in graph.backward().gradients.items():
            parts = graph.decompose(param, by=KINDS[by])
            assert_close(total(parts, gradient), gradient, gradient, ROUNDING[narrowest(graph)])


# Each class against its paths, one by one


class Residual(nn.Module):
    """Blocks h + f(h), the last of them with a bias shared by all."""

    def __init__(self, n_blocks: int, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(n_blocks))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h).sum()


def residual(n_blocks: int, *, traced: bool = True) -> rg.Graph:
    model = Residual(n_blocks).double()
    with rg.trace(model) as scopes:
        loss = model(torch.randn(5, 3, dtype=torch.float64))
    return rg.Graph(loss, model, trace=scopes if traced else None)


def passed(names: list[str]) -> Callable[[Path], Hashable]:
    """The modules a path passes through."""
    within = lambda v, n: v.module == n or v.module.startswith(f"{n}.")  # noqa: E731
    return lambda path: frozenset(n for n in names if any(within(read.vertex, n) for read in path.edges))


BLOCKS = ["blocks.0", "blocks.2", "blocks.3.0"]


@pytest.mark.parametrize(
    ("by", "label_of"),
    [
        ("length", lambda path: path.length),
        (BLOCKS, passed(BLOCKS)),
        (
            lambda label, v: (label or 0) + (v.op == "add"),
            lambda path: sum(read.vertex.op == "add" for read in path.edges),
        ),
        (
            lambda label, v: (*(label or ()), v.name)[-2:],
            lambda path: tuple(read.vertex.name for read in path.edges[1::-1]),
        ),
    ],
    ids=["length", "modules", "number of additions", "the first two operations"],
)
@pytest.mark.parametrize("traced", [True, False])
def test_each_class_is_the_sum_of_its_paths(by, label_of: Callable[[Path], Hashable], traced: bool) -> None:
    graph = residual(4, traced=traced)
    gradients = graph.backward().gradients
    for name in ("stem.weight", "blocks.1.0.bias"):
        expected: dict[Hashable, Tensor] = {}
        assert 0 < graph.count_paths(name) <= FEW
        for path in graph.paths(name):
            part = graph.path_gradient(path)
            expected[label_of(path)] = expected.get(label_of(path), torch.zeros_like(part)) + part
        found = graph.decompose(name, by=by)
        assert set(found) == set(expected)
        for label, part in found.items():
            assert_close(part, expected[label], gradients[name], 1e-12)


def test_ten_residual_blocks_are_eleven_classes_of_1024_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, calls = residual(10), []
    count_calls(monkeypatch, calls)
    gradient = graph.backward()["stem.weight"]
    plain = len(calls)
    parts = graph.decompose("stem.weight", by="length")
    assert graph.count_paths("stem.weight") == 1024
    assert len(parts) == 11
    assert list(parts) == sorted(parts)
    assert_close(total(parts, gradient), gradient, gradient, 1e-13)
    assert len(calls) - plain <= 5 * plain  # the mean number of classes at an operation, not the number of paths


def count_calls(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    original = Tape.local_gradients

    def counting(self: Tape, node, cotangents, **options):
        calls.append(node.kind)
        return original(self, node, cotangents, **options)

    monkeypatch.setattr(Tape, "local_gradients", counting)


def test_modules_may_be_whole_or_part_and_are_exact_under_a_trace() -> None:
    graph = residual(3)
    parts = graph.decompose("stem.weight", by=["blocks.1"])
    assert set(parts) == {frozenset(), frozenset({"blocks.1"})}
    assert set(graph.decompose("stem.weight", by=["blocks"])) == {frozenset(), frozenset({"blocks"})}
    skipped = graph.decompose("stem.weight", by=["blocks.0.1", "blocks.1.1", "blocks.2.1"])
    assert len(skipped) == 8


def test_what_ran_outside_of_all_modules_is_in_none() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    with rg.trace(model) as scopes:
        h = model(torch.ones(1, 3))
    graph = rg.Graph(h.sin().sum() + h.sum(), model, trace=scopes)
    assert list(graph.decompose("0.weight", by=["0", "1"])) == [frozenset({"0", "1"})]
    assert graph["after 0: sin"].inferred


# Uses and time


def recurrent(T: int = 6) -> tuple[rg.Graph, dict[str, Tensor], list[Tensor], Tensor]:
    """h_t = tanh(U x_t + W h_{t-1}), losses at every step."""
    shapes = {"W": (4, 4), "U": (4, 3)}
    p = {n: torch.randn(*s, dtype=torch.float64).mul(0.7).requires_grad_() for n, s in shapes.items()}
    x = torch.randn(T, 3, dtype=torch.float64)
    h, states = torch.randn(4, dtype=torch.float64), []
    states.append(h)
    for x_t in x:
        h = torch.tanh(p["U"] @ x_t + p["W"] @ h)
        states.append(h)
    loss = sum((s.square().sum() for s in states[1:]), torch.zeros((), dtype=torch.float64))
    return rg.Graph(loss, p), p, [s.detach() for s in states], x


def test_by_time_is_backpropagation_through_time_written_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """delta_t = (2 h_t + W^T delta_{t+1}) (1 - h_t^2); the part of time t is delta_t h_{t-1}^T."""
    graph, p, h, x = recurrent()
    by_hand, behind = {}, torch.zeros(4, dtype=torch.float64)
    for t in reversed(range(len(x))):
        delta = (2 * h[t + 1] + behind) * (1 - h[t + 1] ** 2)
        by_hand[t] = {"W": torch.outer(delta, h[t]), "U": torch.outer(delta, x[t])}
        behind = p["W"].detach().T @ delta
    calls: list[str] = []
    count_calls(monkeypatch, calls)
    plain = len(graph.tape) - 2
    for name in ("W", "U"):
        calls.clear()
        parts = graph.decompose(name, by="time")
        assert list(parts) == list(range(len(x)))
        for t, part in parts.items():
            torch.testing.assert_close(part, by_hand[t][name])
        assert len(calls) <= plain  # no more than one backward pass


def test_by_use_looks_through_views_and_names_each_copy() -> None:
    """Eq. 7: an autoencoder whose decoder is its encoder transposed."""
    model = nn.Linear(5, 3, bias=False).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    copies = [model.weight.detach().clone().requires_grad_() for _ in range(2)]
    error = lambda a, b: (torch.sigmoid(x @ a.T) @ b - x).square().sum()  # noqa: E731
    graph = rg.Graph(error(model.weight, model.weight), model)
    parts = graph.decompose("weight", by="use")
    assert [graph[str(name)].op for name in parts] == ["mm", "mm"]
    expected = torch.autograd.grad(error(*copies), copies)
    for part, g in zip(parts.values(), expected, strict=True):
        torch.testing.assert_close(part, g)


def test_an_operation_that_reads_the_variable_twice_is_two_uses() -> None:
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    graph = rg.Graph((w @ w.T).sin().sum() + w.unbind()[1].sum(), {"w": w})
    parts = graph.decompose("w", by="use")
    assert list(parts) == ["w: mm (input 0)", "w: mm (input 1)", "w: sum"]
    assert list(graph.decompose("w", by="time")) == [0, 1]
    copies = [w.detach().clone().requires_grad_() for _ in range(2)]
    expected = torch.autograd.grad((copies[0] @ copies[1].T).sin().sum(), copies)
    for part, g in zip(parts.values(), expected, strict=False):
        torch.testing.assert_close(part, g)


def test_a_hidden_variable_can_be_decomposed() -> None:
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    h = w.sin()
    graph = rg.Graph([h.square().sum(), h.exp().sum(), h], {"w": w})
    parts = graph.decompose(h, by="use")
    assert list(parts) == ["after w: pow", "after w: exp", None]
    torch.testing.assert_close(total(parts, h), graph.backward()[h])
    assert list(graph.decompose(h, by="length")) == [0, 2]


def test_without_a_path_there_is_no_class() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 3)})
    graph = rg.Graph(model["used"](torch.ones(1, 2)).sum(), model)
    for by in ("length", "use", "time", ["used"]):
        assert graph.decompose("unused.weight", by=by) == {}


# Refusals


@pytest.mark.parametrize(
    ("by", "says"),
    [
        ("lenght", r"by='lenght': expected \"length\", \"use\", \"time\", a function"),
        ([1, 2], r"by=\[1, 2\]: expected"),
        (["blocks.0", "body"], r"no operation of this graph ran in a module 'body'; known: .*blocks.0.1"),
    ],
)
def test_an_unknown_way_to_label_is_named(by, says: str) -> None:
    with pytest.raises(GraphError, match=says):
        residual(2).decompose("stem.weight", by=by)


def test_too_many_classes_are_refused_where_they_meet() -> None:
    graph = residual(8)
    with pytest.raises(GraphError, match=r"more than max_classes=100 classes of paths meet at .*add"):
        graph.decompose("stem.weight", by=lambda label, v: (label or ()) + (v.name,), max_classes=100)
