"""Shares of a gradient: over every cut they add up to 1, and each is what is lost when its edge is cut."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from tests.cases import CASES
from tests.graph.test_decompose import Residual, residual
from tests.graph.test_paths import LINES, ROUNDING, narrowest, program, scalar
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import rowgrad as rg
from rowgrad.errors import GraphError, NonFiniteError, RowgradWarning
from rowgrad.graph.shares import Shares
from rowgrad.graph.sweep import Cotangents, value_at
from rowgrad.graph.vertices import Vertex

MOST = 6  # edges of a case that are cut one by one


class Without(Cotangents):
    """Backpropagation with nothing coming along one edge."""

    def __init__(self, graph: rg.Graph, vertex: Vertex, slot: int) -> None:
        super().__init__(graph.tape)
        self.edge = (vertex.index, slot)

    def send(self, node, own: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if (node.index, i) == self.edge else z for i, z in enumerate(super().send(node, own))]


def remains(graph: rg.Graph, key: str, vertex: Vertex, slot: int) -> float:
    """<g, g'> / |g|^2, where g' is the gradient with one edge cut."""
    edge = graph.edge(key)
    seeds = {end: graph.ones(end) for end in graph.outputs}
    g = value_at(graph.tape, edge, seeds, Cotangents(graph.tape)).to(torch.complex128)
    cut = value_at(graph.tape, edge, seeds, Without(graph, vertex, slot))
    return 0.0 if cut is None else float((g.conj() * cut).sum().real / (g.conj() * g).sum().real)


def cuts(graph: rg.Graph, shares: Shares) -> list[float]:
    """Shares added up over the edges between the variables before a moment and those behind it, for every moment."""
    ends = [(vertex.index, vertex.inputs[slot][0], share) for (vertex, slot), share in shares.items()]
    highest = max((source for _, source, _ in ends), default=0)
    return [sum(s for reader, source, s in ends if reader < k <= source) for k in range(1, highest + 1)]


def assert_right(graph: rg.Graph, key: str, *, most: int = MOST) -> Shares:
    shares = graph.shares(key)
    rounding = 10 * ROUNDING[narrowest(graph)] * max(1.0, *map(abs, shares.values()))
    assert cuts(graph, shares) == pytest.approx([1.0] * len(cuts(graph, shares)), abs=rounding)
    for vertex, slot in list(shares)[:: 1 + len(shares) // most]:
        assert shares[vertex, slot] == pytest.approx(1 - remains(graph, key, vertex, slot), abs=rounding)
    return shares


@pytest.mark.parametrize("name", CASES)
def test_on_every_case_shares_are_what_cutting_loses(name: str, leaves_nothing_behind) -> None:
    setup = CASES[name].build()
    losses = setup.losses()
    graph = rg.Graph(losses, setup.params)
    gradients = graph.backward().gradients
    with leaves_nothing_behind(setup.model, losses), warnings.catch_warnings():
        warnings.simplefilter("ignore", RowgradWarning)
        for param, gradient in gradients.items():
            if gradient.norm() > 1e-10:
                assert_right(graph, param)
    losses.sum().backward()  # still possible


@settings(max_examples=150)
@given(LINES)
def test_on_small_programs_every_edge_is_what_cutting_it_loses(lines: list[tuple[int, int, int]]) -> None:
    leaves = {"u": scalar(0.7), "v": scalar(-1.2)}
    out = program(lines, list(leaves.values()))
    if out.grad_fn is None:
        return
    graph = rg.Graph(out, leaves)
    for name, g in graph.backward().gradients.items():
        if abs(g) > 1e-3:
            assert_right(graph, name, most=1000)


# Where the answer is known


def test_along_a_chain_every_edge_has_all() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Sigmoid()).double()
    shares = rg.Graph(model(torch.randn(5, 3, dtype=torch.float64)).square().mean(), model).shares("0.weight")
    assert list(shares.values()) == pytest.approx([1.0] * len(shares))


@pytest.mark.parametrize("traced", [True, False])
def test_skip_and_block_are_one_at_every_residual_addition(traced: bool) -> None:
    graph = residual(4, traced=traced)
    shares = assert_right(graph, "stem.weight", most=1000)
    additions = [v for v in graph.vertices if v.op == "add"]
    assert len(additions) == 4
    for v in additions:
        assert shares[v, 0] + shares[v, 1] == pytest.approx(1)
        assert shares[v.name, 0] == shares[v, 0]
        assert 0 < abs(shares[v, 1]) < 1


def test_a_block_that_does_nothing_has_no_share() -> None:
    model = Residual(3).double()
    nn.init.zeros_(model.blocks[1][0].weight)
    graph = rg.Graph(model(torch.randn(5, 3, dtype=torch.float64)), model)
    shares = graph.shares("stem.weight")
    pairs = [(shares[v, 0], shares[v, 1]) for v in graph.vertices if v.op == "add"]
    assert pairs[1] == pytest.approx((1, 0))
    assert all(block != pytest.approx(0) for _, block in (pairs[0], pairs[2]))


def test_two_uses_of_a_weight_have_the_shares_of_their_parts() -> None:
    model = nn.Linear(5, 3, bias=False).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    graph = rg.Graph((torch.sigmoid(model(x)) @ model.weight - x).square().sum(), model)
    shares = assert_right(graph, "weight", most=1000)
    parts, g = graph.decompose("weight", by="use"), graph.backward()["weight"]
    for name, part in parts.items():
        slot = 1  # both multiply from the right
        assert shares[name, slot] == pytest.approx(float((part * g).sum() / g.square().sum()))


def test_a_part_that_works_against_the_rest_is_negative() -> None:
    w = scalar(2.0)
    shares = rg.Graph(3 * w - w.square() / 4, {"w": w}).shares("w")
    assert [shares["after w: sub", i] for i in (0, 1)] == pytest.approx([1.5, -0.5])


def test_outputs_that_are_read_apart_and_several_losses() -> None:
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    values, vectors = torch.linalg.eigh(w.T @ w)
    graph = rg.Graph([values.log().sum(), (vectors[:, 0] * torch.arange(3)).square().sum(), w.sin()], {"w": w})
    shares = assert_right_out_of(graph, "w")
    assert len(shares) == sum(t is not None for v in graph.vertices for t in v.inputs)


def assert_right_out_of(graph: rg.Graph, key: str) -> Shares:
    """With several losses only the edges that lead out of the variable are a cut of all paths."""
    shares, index = graph.shares(key), graph[key].index
    assert sum(s for (v, i), s in shares.items() if v.inputs[i][0] == index) == pytest.approx(1)
    for vertex, slot in shares:
        assert shares[vertex, slot] == pytest.approx(1 - remains(graph, key, vertex, slot))
    return shares


def test_of_a_hidden_variable() -> None:
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    a, b, _ = (w.sin() * 2).unbind()
    graph = rg.Graph(a.exp() * b + a, {"w": w})
    shares = graph.shares(a)
    assert shares.variable.op == "unbind"
    assert shares[graph.outputs[0][0], 0] + shares[graph.outputs[0][0], 1] == pytest.approx(1)
    assert all(v.op != "mul" or i == 0 for v, i in shares)


def test_complex_values_between() -> None:
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    graph = rg.Graph(torch.fft.rfft(w.sin()).abs().square().sum() + w.exp().sum(), {"w": w})
    assert_right(graph, "w", most=1000)


def test_half_the_gradient_tiny_in_single_precision() -> None:
    w = torch.randn(3, requires_grad=True)
    graph = rg.Graph((w.sin() * 1e-30 + w.exp() * 1e-30).sum(), {"w": w})  # |g|^2 is 0 in this dtype
    shares = graph.shares("w")
    parts = list(graph.decompose("w", by="use").values())
    scaled = [1e30 * p.double() for p in parts]
    truth = [float((p * sum(scaled)).sum() / sum(scaled).square().sum()) for p in scaled]
    assert [shares["after w: add", 0], shares["after w: add", 1]] == pytest.approx(truth, rel=1e-5)


# Operations that are hard to differentiate twice


def test_through_a_recurrent_layer_in_both_precisions() -> None:
    for dtype in (torch.float32, torch.float64):  # fused, and written out
        model = nn.LSTM(3, 4).to(dtype)
        graph = rg.Graph(model(torch.randn(5, 2, 3, dtype=dtype))[0].square().sum(), model)
        for name in ("weight_ih_l0", "weight_hh_l0"):
            assert_right(graph, name)


MASK = torch.tensor([[True, False, True], [True, True, True], [False, True, True]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": MASK},
        {"attn_mask": MASK.double().log().clamp(min=-2.0)},
    ],
    ids=str,
)
def test_fused_attention(options: dict[str, Any]) -> None:
    w = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    h = F.scaled_dot_product_attention(x @ w, x @ w.T, x @ (w * w), **options)
    graph = rg.Graph(h.square().sum() + (x @ w).sin().sum(), {"w": w})
    assert any(v.op.startswith("scaled_dot_product") for v in graph.vertices)
    assert_right(graph, "w", most=1000)


class Once(torch.autograd.Function):
    """A sine whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, z: Tensor) -> Tensor:
        return z * ctx.saved_tensors[0].cos()


def once(entries: int) -> rg.Graph:
    w = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    x = torch.randn(entries // 8, 8, dtype=torch.float64)
    return rg.Graph(Once.apply(x @ w).square().sum() + (x @ w).sin().sum(), {"w": w})


def test_what_cannot_be_differentiated_twice_is_asked_entry_by_entry_and_says_so() -> None:
    graph = once(160)
    with pytest.warns(RowgradWarning, match=r"Once\w+#\d+ cannot be differentiated twice .*160 calls") as said:
        assert_right(graph, "w", most=1000)
    assert said[0].filename == __file__


def test_what_is_large_and_cannot_be_differentiated_twice_is_refused() -> None:
    with pytest.raises(GraphError, match=r"have 16000 entries; at most 10000 .* Use an unfused form"):
        once(16000).shares("w")


class Square(torch.autograd.Function):
    """Its derivative escapes in the way that `how` says."""

    @staticmethod
    def forward(ctx, x: Tensor, how: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.how = how
        return x * x

    @staticmethod
    def backward(ctx, z: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        factor = z if ctx.how == "square" else 1.0
        if ctx.how == "detached":
            z = z.detach()
        if ctx.how == "in NumPy":
            z = torch.from_numpy(z.numpy() * 1.0)
        if ctx.how == "half detached":
            z = z / 2 + z.detach() / 2
        return 2 * x * z * factor + (0.1 if ctx.how == "affine" else 0.0), None


class OnceDifferentiable(Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, z: Tensor) -> tuple[Tensor, None]:
        return Square.backward(ctx, z)


def with_function(function: type[Square], how: str) -> rg.Graph:
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    return rg.Graph((function.apply(w.sin(), how).exp() + w.cos()).sum(), {"w": w})


def test_custom_functions_that_can_be_differentiated_twice() -> None:
    assert_right(with_function(Square, "linear"), "w", most=1000)


@pytest.mark.parametrize(
    ("function", "how"),
    [(Square, "detached"), (Square, "half detached"), (Square, "in NumPy"), (OnceDifferentiable, "linear")],
)
def test_custom_functions_that_cannot_are_asked_entry_by_entry(function: type[Square], how: str) -> None:
    with pytest.warns(RowgradWarning, match="cannot be differentiated twice"):
        assert_right(with_function(function, how), "w", most=1000)


@pytest.mark.parametrize("how", ["square", "affine"])
@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
def test_custom_functions_that_are_no_derivative_are_refused(how: str) -> None:
    with pytest.raises(GraphError, match="its backward is not linear in the cotangent"):
        with_function(Square, how).shares("w")


@pytest.mark.parametrize("how", ["detached", "half detached"])
def test_a_derivative_that_escapes_is_seen_where_no_cotangent_arrives(how: str) -> None:
    """At c = 0 both J^T c and what is left of J t are 0, and agree."""
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    s = Square.apply(w, how)
    graph = rg.Graph((s * 3 - s * 3 + w.exp()).sum(), {"w": w})
    with pytest.warns(RowgradWarning, match="cannot be differentiated twice"):
        shares = assert_right(graph, "w", most=1000)
    first, second = (shares[v, i] for v in graph.vertices if v.op == "sub" for i in (0, 1))
    assert first == pytest.approx(-second)
    assert abs(first) > 0.1


# How they read


def test_shares_are_a_mapping_in_the_order_of_the_graph() -> None:
    w = scalar(2.0)
    h = w * 3
    shares = rg.Graph(h + h.square(), {"w": w}).shares("w")
    assert [(e.vertex.name, e.slot) for e in shares] == [
        ("after w: add", 0),
        ("after w: add", 1),
        ("after w: pow", 0),
        ("w: mul", 0),
    ]
    assert dict(shares) == pytest.approx(dict(zip(shares, [3 / 39, 36 / 39, 36 / 39, 1], strict=True)))
    assert repr(shares) == "<shares of 4 edges in the gradient of w>"
    assert str(shares).splitlines()[0] == "shares of |dO/d w|^2 = 1521"
    assert shares.norm == pytest.approx(39)
    with pytest.raises(KeyError, match=r"input 1 of w: mul is on no path from w; inputs that are: \[0\]"):
        shares["w: mul", 1]


@pytest.mark.parametrize("seed", range(5))
def test_beside_others_an_edge_may_carry_numbers_whose_squares_are_zero(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, a, b = (torch.randn(20, 30, dtype=torch.float64, generator=generator) for _ in range(3))
    h = w.requires_grad_().tanh()
    shares = rg.Graph((h * a).sum() + (h.flip(0, 1) * 1e-200 * b).sum(), {"w": w}).shares("w")
    assert shares.norm == pytest.approx(((1 - h.detach() ** 2) * a).norm().item())


# Refusals


def test_a_gradient_of_zero_cannot_be_shared_out() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 3)})
    dead = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = model["used"](torch.ones(1, 2)).sum() + dead.relu().sum()
    with pytest.raises(GraphError, match=r"shares of unused.weight: no path leads from it"):
        rg.Graph(loss, model).shares("unused.weight")
    with pytest.raises(GraphError, match=r"shares of w: its gradient is zero"):
        rg.Graph(loss, {"w": dead}).shares("w")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_cannot_be_shared_out(value: float) -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(NonFiniteError, match=r"shares of w: its gradient holds inf or nan"):
        rg.Graph((w * value).sum(), {"w": w}).shares("w")
