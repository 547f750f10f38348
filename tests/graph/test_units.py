"""The graph of scalar units: z(i, j) a number, eq. 3 by enumeration, eq. 4 by the sweep, and the paths of the seed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from tests.graph.test_paths import LINES, program, scalar
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import GraphError
from rowgrad.graph.reads import FORMS
from rowgrad.graph.sweep import sweep
from rowgrad.graph.units import Unit


def network(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1]).double()


def with_input(model: nn.Module, *shape: int) -> tuple[Tensor, dict[str, Tensor]]:
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    return x, {"x": x, **dict(model.named_parameters())}


def derivatives(graph: rg.Graph) -> dict[int, float]:
    """S(i) of every unit by eq. 4."""
    found: dict[int, float] = {}
    sweep(graph.level, graph.level.seeds(), graph.level.algebra, lambda u, own: found.update({u.index: own[0]}))
    return found


def units_of(graph: rg.Graph, name: str) -> list[Unit]:
    return [u for u in graph.units if u.vertex.name == name]


def assert_sweeps_agree(graph: rg.Graph, leaves: dict[str, Tensor]) -> None:
    """Eq. 4 by units equals the sweep by vectors, which equals the engine."""
    found = derivatives(graph)
    by_vectors = graph.backward().gradients
    for name in graph.parameters:
        by_units = torch.tensor([found.get(u.index, 0.0) for u in units_of(graph, name)], dtype=torch.float64)
        torch.testing.assert_close(by_units.view(leaves[name].shape), by_vectors[name].double())


# The seed's statements


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Sigmoid])
def test_enumeration_equals_the_sweep_equals_the_engine_for_3_4_4_2(activation: type[nn.Module]) -> None:
    """Eq. 3 = eq. 4 = autograd, for every entry of every parameter and of the input."""
    model = network(3, 4, 4, 2, activation=activation)
    x, leaves = with_input(model, 3)
    loss = (model(x) - torch.tensor([0.3, -0.8])).square().sum()
    graph = rg.Graph(loss, leaves, level="unit")
    engine = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    found = derivatives(graph)
    counts = {
        "x": 4 * 4 * 2,
        "0.weight": 4 * 2,
        "0.bias": 4 * 2,
        "2.weight": 2,
        "2.bias": 2,
        "4.weight": 1,
        "4.bias": 1,
    }
    for (name, count), gradient in zip(counts.items(), engine, strict=True):
        units = units_of(graph, name)
        assert len(units) == gradient.numel()
        for unit, g in zip(units, gradient.flatten(), strict=True):
            paths = list(graph.paths(unit))
            assert len(paths) == graph.count_paths(unit) == count
            torch.testing.assert_close(sum(graph.path_gradient(p) for p in paths), g)  # eq. 3
            assert found[unit.index] == pytest.approx(float(g), abs=1e-14)  # eq. 4


def test_a_million_paths_through_three_hidden_layers_of_a_hundred() -> None:
    """Part I: "Million paths for a network with 100 nodes in each layer and three layers"."""
    model = network(10, 100, 100, 100, 1)
    x, leaves = with_input(model, 10)
    graph = rg.Graph(model(x), leaves, level="unit")
    assert graph.count_paths("x[7]") == 10**6
    assert graph.count_paths("0.weight[99,3]") == 10**4  # it enters at one unit of the first layer
    assert graph.count_paths("2.weight[5,60]") == 100
    assert graph.depth("x[0]") == 7  # four linear layers and three activations
    assert_sweeps_agree(graph, leaves)


def test_counts_are_exact_however_large() -> None:
    widths = [2, *[7] * 40, 1]
    model = network(*widths)
    x, leaves = with_input(model, 2)
    assert rg.Graph(model(x), leaves, level="unit").count_paths("x[1]") == 7**40


def test_between_pre_activations_z_is_the_weight_times_the_derivative_of_the_activation() -> None:
    """z(i, j) = w_ij Phi'_i (eq. 5), and with post-activations w_ij Phi'_j (eq. 6)."""
    model = network(3, 4, 4, 1, activation=nn.Sigmoid)
    x, leaves = with_input(model, 3)
    graph = rg.Graph(model(x), leaves, level="unit")
    z = graph.level.algebra.of
    with torch.no_grad():
        a1 = model[0](x)
        h1 = a1.sigmoid()
        a2 = model[2](h1)
        slope1, slope2, weight = h1 * (1 - h1), a2.sigmoid() * (1 - a2.sigmoid()), model[2].weight.detach()
    first, second = units_of(graph, "after 0: sigmoid"), units_of(graph, "2: addmm")
    last = units_of(graph, "after 2: sigmoid")
    for i in range(4):
        assert z(first[i]) == pytest.approx([float(slope1[i])])
        for j in range(4):
            path = next(p for p in graph.paths(first[i]) if second[j] in [e.vertex for e in p.edges])
            steps = {e.vertex.index: z(e.vertex)[e.slot] for e in path.edges}
            assert steps[second[j].index] == pytest.approx(float(weight[j, i]))
            pre_to_pre = z(first[i])[0] * steps[second[j].index]
            assert pre_to_pre == pytest.approx(float(weight[j, i] * slope1[i]))
            post_to_post = steps[second[j].index] * steps[last[j].index]
            assert post_to_post == pytest.approx(float(weight[j, i] * slope2[j]))


def test_the_two_paths_of_the_seeds_first_example() -> None:
    """o = sin(w^2) + cos(w^2): 2w cos(w^2) along one path, -2w sin(w^2) along the other."""
    w = scalar(1.3)
    y = w.square()
    graph = rg.Graph(y.sin() + y.cos(), {"w": w}, level="unit")
    along = [float(graph.path_gradient(p)) for p in graph.paths("w")]
    v = w.detach()
    assert along == pytest.approx([float(2 * v * (v**2).cos()), float(-2 * v * (v**2).sin())])


# Units and vectors


@settings(max_examples=60)
@given(LINES)
def test_where_variables_are_scalars_both_levels_are_one(lines: list[tuple[int, int, int]]) -> None:
    leaves = {"u": scalar(0.7), "v": scalar(-1.2)}
    out = program([(op % 7, i, j) for op, i, j in lines], list(leaves.values()))
    if out.grad_fn is None:
        return
    vectors, units = (rg.Graph(out, leaves, level=level) for level in ("vector", "unit"))
    assert len(units.units) == len(vectors)
    for name in leaves:
        assert units.count_paths(name) == vectors.count_paths(name)
        assert {str(p) for p in units.paths(name)} == {str(p) for p in vectors.paths(name)}
    assert units.depth() == vectors.depth()
    assert_sweeps_agree(units, leaves)


def test_each_example_of_a_batch_has_units_of_its_own() -> None:
    model = network(3, 4, 2)
    x, leaves = with_input(model, 5, 3)
    graph = rg.Graph(model(x).square().sum(1), leaves, level="unit")
    assert graph.count_paths("x[4,0]") == 8
    assert graph.count_paths("0.weight[1,2]") == 5 * 2
    assert_sweeps_agree(graph, leaves)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, lambda z, y: F.mse_loss(z, F.one_hot(y, 3).double())])
def test_with_the_usual_losses(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = network(4, 5, 3, activation=nn.ReLU)
    x, leaves = with_input(model, 6, 4)
    graph = rg.Graph(loss_fn(model(x), torch.tensor([0, 2, 1, 1, 0, 2])), leaves, level="unit")
    assert_sweeps_agree(graph, leaves)
    assert graph.count_paths("x[0,0]") == 5 * 3  # of the log-softmax only the target's entry is read


def test_decompose_and_shared_weights_by_units() -> None:
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    h = torch.ones(3, dtype=torch.float64)
    for _ in range(3):
        h = torch.tanh(w @ h)
    vectors, units = (rg.Graph(h.sum(), {"w": w}, level=level) for level in ("vector", "unit"))
    whole = vectors.decompose("w", by="time")
    for i, j in [(0, 0), (2, 1)]:
        parts = units.decompose(f"w[{i},{j}]", by="time")
        assert [float(parts[t]) for t in sorted(parts)] == pytest.approx([float(part[i, j]) for part in whole.values()])


def test_in_single_precision_and_half() -> None:
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        model = network(3, 4, 2).to(dtype)
        graph = rg.Graph(model(torch.randn(3, dtype=dtype)).square().sum(), model, level="unit")
        gradient = graph.backward()["0.weight"]
        parts = [graph.path_gradient(p) for p in graph.paths("0.weight[1,2]")]
        assert parts[0].dtype == dtype
        assert float(sum(parts)) == pytest.approx(float(gradient[1, 2]), rel=close)


# Every form against the operation itself

SIGNED = [
    "abs", "asinh", "atan", "cos", "cosh", "erf", "erfc", "exp", "exp2", "expm1", "frac", "neg", "sin", "sinc",
    "sinh", "tan",
]  # fmt: skip
POSITIVE = ["acosh", "lgamma", "log", "log10", "log2", "reciprocal", "rsqrt", "sqrt"]
WITHIN_1 = ["acos", "asin", "atanh", "erfinv", "logit"]
TWO = ["atan2", "fmax", "fmin", "hypot", "logaddexp", "maximum", "minimum", "mul", "sub", "add", "div", "xlogy"]
ACTIVATIONS = [
    "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu",
    "sigmoid", "silu", "softplus", "softshrink", "tanh",
]  # fmt: skip


def mask(x: Tensor) -> Tensor:
    return torch.rand(x.shape) > 0.5


def _on(name: str, make: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[Tensor], Tensor]:
    return lambda x: getattr(torch, name)(*make(x))


SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in SIGNED},
    **{name: _on(name, lambda x: (1.1 + x * x,)) for name in POSITIVE},
    **{name: _on(name, lambda x: (0.5 + 0.4 * x.sin(),)) for name in WITHIN_1},
    **{
        name: _on(
            name,
            lambda x: (
                1.1 + x * x,
                1.2 + x[:1].cos(),
            ),
        )
        for name in TWO
    },
    **{name: getattr(F, name) for name in ACTIVATIONS},
    "log1p": lambda x: torch.log1p(x * x),
    "addcdiv": lambda x: torch.addcdiv(x, x.sin(), 2 + x[0]),
    "addcmul": lambda x: torch.addcmul(x, x.sin(), x[0]),
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(x.sigmoid(), mask(x).double(), reduction="none"),
    "binary_cross_entropy_with_logits": lambda x: F.binary_cross_entropy_with_logits(x, x.detach().abs() / 9),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp_max": lambda x: x.clamp_max(0.5),
    "clamp_min": lambda x: x.clamp_min(0.5),
    "huber_loss": lambda x: F.huber_loss(x, x.detach() + 0.3, reduction="none"),
    "lerp": lambda x: torch.lerp(x, x[:1], 0.3),
    "log_sigmoid": F.logsigmoid,
    "masked_fill": lambda x: x.masked_fill(mask(x), 2.0),
    "mse_loss": lambda x: F.mse_loss(x, x.detach() + 1),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "pow": lambda x: x**3,
    "prelu_kernel": lambda x: F.prelu(x, x[0, :1] * 0 + 0.3),
    "rrelu_with_noise": lambda x: F.rrelu(x, training=True),
    "rsub": lambda x: torch.rsub(x, x[:1].exp()),
    "smooth_l1_loss": lambda x: F.smooth_l1_loss(x, x.detach() + 0.3, reduction="sum"),
    "soft_margin_loss": lambda x: F.soft_margin_loss(x, x.detach().sign(), reduction="none"),
    "threshold": lambda x: F.threshold(x, 0.1, -1.0),
    "where": lambda x: torch.where(mask(x), x, x.exp()),
    "mm": lambda x: x.T @ x,
    "bmm": lambda x: torch.bmm(x.expand(2, 3, 4), x.T.expand(2, 4, 3)),
    "mv": lambda x: torch.mv(x, x[0]),
    "dot": lambda x: torch.dot(x[0], x[1]),
    "addmm": lambda x: torch.addmm(x[0, :3], x, x.T, beta=2),
    "baddbmm": lambda x: torch.baddbmm(x[:1, :3], x.expand(2, 3, 4), x.T.expand(2, 4, 3)),
    "addmv": lambda x: torch.addmv(x[:, 0], x, x[1]),
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin((0, 1)),
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, dim=0),
    "logsumexp": lambda x: x.view(3, 2, 2).logsumexp((0, 2)),
    "max": lambda x: x.max(0, keepdim=True).values,
    "mean": lambda x: x.view(3, 2, 2).mean((-1, 0)),
    "min": lambda x: x.view(3, 2, 2).min(-1).values,
    "prod": lambda x: x.prod(0),
    "std": lambda x: x.std(1, keepdim=True),
    "sum": lambda x: x.view(3, 2, 2).sum((0, -1), keepdim=True),
    "var": lambda x: x.var(0),
    "log_softmax": lambda x: x.view(3, 2, 2).log_softmax(-1),
    "softmax": lambda x: x.softmax(0),
    "nll_loss": lambda x: F.nll_loss(x, torch.tensor([3, 0, 1]), reduction="none"),
    "alias": lambda x: torch.ops.aten.alias(x),
    "as_strided": lambda x: x.as_strided((2, 3), (1, 2), 1),
    "cat": lambda x: torch.cat([x, x[:1], x.exp()]),
    "clone": torch.clone,
    "constant_pad_nd": lambda x: F.pad(x, (1, 0, 0, 2)),
    "diagonal": torch.diagonal,
    "embedding": lambda x: F.embedding(torch.tensor([[2, 0], [1, 1]]), x, padding_idx=1),
    "expand": lambda x: x.expand(2, 3, 4),
    "flip": lambda x: x.flip(0),
    "gather": lambda x: x.gather(1, torch.tensor([[1], [1], [0]])),
    "index": lambda x: x[torch.tensor([0, 2, 2]), torch.tensor([1, 3, 3])],
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 3, 0])),
    "permute": lambda x: x.view(3, 2, 2).permute(2, 0, 1),
    "repeat": lambda x: x.repeat(2, 1),
    "roll": lambda x: x.roll(1, 1),
    "select": lambda x: x[1],
    "slice": lambda x: x[1:],
    "split": lambda x: x.split(2)[1],
    "split_with_sizes": lambda x: x.split_with_sizes([1, 2])[1],
    "squeeze": lambda x: x[:, None].squeeze(1),
    "stack": lambda x: torch.stack([x, x.exp()], 1),
    "t": torch.t,
    "to_copy": lambda x: x.float(),
    "transpose": lambda x: x.transpose(0, 1),
    "tril": torch.tril,
    "triu": torch.triu,
    "unbind": lambda x: x.unbind(1)[2],
    "unfold": lambda x: x.unfold(1, 2, 1),
    "unsafe_split": lambda x: x.unsafe_split(2)[1],
    "unsafe_split_with_sizes": lambda x: x.unsafe_split_with_sizes([1, 2])[0],
    "unsqueeze": lambda x: x[:, None],
    "unsafe_view": lambda x: torch.ops.aten._unsafe_view(x, [4, 3]),
    "view": lambda x: x.view(2, 6),
    "reshape_alias": lambda x: torch.ops.aten._reshape_alias(x, [2, 6], [6, 1]),
}
# Views and others under names that other operations record today, or that need complex numbers.
NOT_RECORDED = {
    "contiguous", "copy", "detach", "flatten", "movedim", "narrow", "reshape", "swapaxes", "view_as",
    "view_as_complex", "view_as_real",
}  # fmt: skip


def test_every_form_has_a_sample() -> None:
    assert set(SAMPLES) == set(FORMS) - NOT_RECORDED


@pytest.mark.parametrize("op", SAMPLES)
def test_a_unit_reads_what_it_can_have_a_derivative_in(op: str) -> None:
    """Over many inputs; at a single one a ReLU that is off or a loser of a maximum has a derivative of zero."""
    seen: set[tuple[int, int]] = set()
    for _ in range(60):
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        graph = rg.Graph(SAMPLES[op](x), {"x": x}, level="unit")
        vertex = graph.vertices[graph.outputs[0][0]]
        assert vertex.op == op
        seen |= entries_with_a_derivative(graph)
    ours = {(u.index, i) for u in graph.units if u.vertex is vertex for i, _ in u.slots}
    assert ours == seen
    assert_sweeps_agree(graph, {"x": x})


def entries_with_a_derivative(graph: rg.Graph) -> set[tuple[int, int]]:
    places = {(u.vertex.index, u.output, u.entry): u.index for u in graph.units}
    (index, nr) = graph.outputs[0]
    found = set()
    for slot, source in enumerate(graph.vertices[index].inputs):
        if source is not None:
            matrix = graph.local_jacobian(index, slot, nr).matrix
            found |= {(places[index, nr, k], places[*source, r]) for k, r in matrix.nonzero().tolist()}
    return found


def test_an_edge_is_there_whether_its_derivative_is_zero_or_not() -> None:
    x = torch.tensor([[-1.0, 2.0, 0.0]], requires_grad=True)
    graph = rg.Graph(x.relu().max(1).values * 0, {"x": x}, level="unit")
    assert [graph.count_paths(f"x[0,{i}]") for i in range(3)] == [1, 1, 1]
    assert [float(graph.path_gradient(next(graph.paths(f"x[0,{i}]")))) for i in range(3)] == [0, 0, 0]


def test_a_variable_read_twice_by_one_unit_is_two_edges() -> None:
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    graph = rg.Graph((x @ x).sum(), {"x": x}, level="unit")
    assert graph.count_paths("x[1,1]") == 6  # three columns as the left factor, three rows as the right one
    assert_sweeps_agree(graph, {"x": x})


# Names


def test_every_unit_is_found_by_its_name() -> None:
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    a, b, c = w.unbind()
    graph = rg.Graph((a * b).sum() + c.sum(), {"w": w}, level="unit")
    names = [u.name for u in graph.units]
    assert len(set(names)) == len(names)
    assert names[-6:] == ["w[0,0]", "w[0,1]", "w[1,0]", "w[1,1]", "w[2,0]", "w[2,1]"]
    assert "w: unbind (output 1)[0]" in names
    for unit in graph.units:
        assert graph.level.find(unit.name) == graph.level.find(unit) == (unit.index, 0)
    assert graph.level.find("w[-1, 0]") == graph.level.find("w[2,0]")
    path = next(graph.paths("w[2,0]"))
    assert str(path) == "w[2,0] -> w: unbind (output 2)[0] -> w: sum -> after w: add"


def test_a_variable_of_one_unit_needs_no_place() -> None:
    w = torch.ones(1, 1, requires_grad=True)
    graph = rg.Graph(w.sin(), {"w": w}, level="unit")
    assert graph.count_paths("w") == graph.count_paths(w) == graph.count_paths("w[0,0]") == 1


def test_what_is_no_unit_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(2, 3)})
    graph = rg.Graph(model["used"](torch.ones(3)).sum(), model, level="unit")
    assert graph.count_paths("unused.weight[2,1]") == 0
    with pytest.raises(KeyError, match=r"unused.weight\[3, 0\]: unused.weight has shape \(3, 2\)"):
        graph.count_paths("unused.weight[3,0]")
    with pytest.raises(KeyError, match=r"used.weight\[0\]: used.weight has shape \(2, 3\)"):
        graph.count_paths("used.weight[0]")
    with pytest.raises(KeyError, match=r"'use\.weight' is no variable of this graph; near it: 'used\.weight'"):
        graph.count_paths("use.weight[0,0]")
    with pytest.raises(GraphError, match=r"used.weight has 6 units, shape \(2, 3\); name one .* 'used.weight\[0,0\]'"):
        graph.count_paths("used.weight")
    with pytest.raises(GraphError, match=r"a tensor of shape \(2, 3\) has 6 units"):
        graph.count_paths(model["used"].weight)
    other = rg.Graph(model["used"](torch.ones(3)).sum(), model, level="unit")
    with pytest.raises(KeyError, match="a unit of another graph"):
        graph.count_paths(other.units[3])


# Refusals


def test_a_graph_that_is_too_large_is_refused_with_its_size() -> None:
    model = nn.Linear(2000, 1500)
    with pytest.raises(GraphError, match=r"has 60\d+ units, more than the 2000000 .* Take a smaller net or batch"):
        rg.Graph(model(torch.ones(1, 2000)).sum(), model, level="unit")
    model = network(300, 400, 10)
    x, leaves = with_input(model, 20, 300)
    with pytest.raises(GraphError, match=r"has \d+ units and 5\d{6} edges, more than the 2000000"):
        rg.Graph(model(x).sum(), leaves, level="unit")


def test_an_operation_without_a_unit_form_is_named() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 1))
    with pytest.raises(GraphError, match=r"^0: convolution \(1, 3, 3\) has no unit form: .* Use level=\"vector\""):
        rg.Graph(model(torch.ones(1, 2, 4)).sum(), model, level="unit")


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
def test_an_embedding_that_scales_has_no_unit_form() -> None:
    w = torch.randn(3, 2, requires_grad=True)
    h = F.embedding(torch.tensor([0, 1, 1]), w, scale_grad_by_freq=True)
    with pytest.raises(GraphError, match=r"EmbeddingBackward0#1 scales what it moves and has no unit form"):
        rg.Graph(h.sum(), {"w": w}, level="unit")


def test_one_output_entry_reads_all_whatever_the_operation() -> None:
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    graph = rg.Graph(torch.linalg.det(w).sin(), {"w": w}, level="unit")
    assert "linalg_det" in {v.op for v in graph.vertices} - set(FORMS)
    assert_sweeps_agree(graph, {"w": w})


def test_complex_variables_have_no_units() -> None:
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(GraphError, match="is complex and has no unit form"):
        rg.Graph(torch.fft.rfft(w).abs().sum(), {"w": w}, level="unit")


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(GraphError, match='level=\'units\': expected "vector" or "unit"'):
        rg.Graph(scalar(1.0).sin(), level="units")
