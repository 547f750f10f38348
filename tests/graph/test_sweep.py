"""The sweep against the engine: on every case of the table, with several outputs, with seeds inside the graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.cases import CASES
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import FreedGraphError, GraphError, NoGraphError, ParameterError


def assert_equal_to_the_engine(found: dict[str, Tensor], losses: list[Tensor], params: dict[str, Tensor]) -> None:
    expected = torch.autograd.grad(
        losses, list(params.values()), [torch.ones_like(t) for t in losses], retain_graph=True, allow_unused=True
    )
    assert list(found) == list(params)
    for (name, p), g in zip(params.items(), expected, strict=True):
        truth = torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
        torch.testing.assert_close(found[name], truth, rtol=1e-12, atol=1e-14, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_the_sweep_equals_the_engine(name: str, leaves_nothing_behind) -> None:
    setup = CASES[name].build()
    losses = setup.losses()
    with leaves_nothing_behind(setup.model, losses):
        found = rg.Graph(losses, setup.params).backward().gradients
    found = {n: found[n] for n in setup.params}
    assert_equal_to_the_engine(found, [losses], setup.params)


def two_headed() -> tuple[nn.Module, list[Tensor], Tensor]:
    model = nn.ModuleDict({"body": nn.Linear(3, 5), "one": nn.Linear(5, 2), "two": nn.Linear(5, 4)}).double()
    h = torch.tanh(model["body"](torch.randn(6, 3, dtype=torch.float64)))
    return model, [model["one"](h).square().mean(), model["two"](h).sin().sum()], h


def test_several_outputs_are_the_sum_of_single_sweeps() -> None:
    model, losses, _ = two_headed()
    together = rg.Graph(losses, model).backward().gradients
    single = [rg.Graph(t, model).backward().gradients for t in losses]
    for name, g in together.items():
        torch.testing.assert_close(g, single[0][name] + single[1][name])
    assert_equal_to_the_engine(together, losses, dict(model.named_parameters()))


def test_an_output_can_be_weighted() -> None:
    model, losses, _ = two_headed()
    weighted = rg.Graph(losses, model).backward({losses[1]: torch.tensor(-3.0, dtype=torch.float64)}).gradients
    assert_equal_to_the_engine(weighted, [losses[0] - 3 * losses[1]], dict(model.named_parameters()))


def test_a_penalty_on_hidden_units_enters_as_a_seed_added_to_what_arrives() -> None:
    """Aggarwal 2018, part II: an initial value added to S(i, o) just after it has been computed."""
    model, losses, h = two_headed()
    graph = rg.Graph(losses, model)
    plain, penalized = graph.backward(), graph.backward({h: 2 * 0.1 * h.detach()})
    torch.testing.assert_close(penalized[h], plain[h] + 0.2 * h.detach())
    params = dict(model.named_parameters())
    assert_equal_to_the_engine(penalized.gradients, [losses[0] + losses[1] + 0.1 * h.square().sum()], params)


def test_each_copy_of_a_tied_weight_has_its_part() -> None:
    """Eq. 7 on an autoencoder whose decoder is its encoder transposed."""
    w = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 5, dtype=torch.float64)
    copies = [w.detach().clone().requires_grad_() for _ in range(2)]
    error = lambda a, b: (torch.sigmoid(x @ a.T) @ b - x).square().sum()  # noqa: E731
    gradient = rg.Graph(error(w, w), {"w": w}).backward()["w"]
    flow = rg.Graph(error(*copies), dict(zip("ab", copies, strict=True))).backward()
    torch.testing.assert_close(gradient, flow["a"] + flow["b"])


def test_each_step_of_a_recurrent_net_has_its_part() -> None:
    """Eq. 7: the gradient of the shared weight is the sum over its copies in time."""
    w, u = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(6, 4, dtype=torch.float64)

    def loss(ws: list[Tensor]) -> Tensor:
        h = torch.zeros(4, dtype=torch.float64)
        for x_t, w_t in zip(x, ws, strict=True):
            h = torch.tanh(w_t @ h + u @ x_t)
        return h.sum()

    copies = [w.detach().clone().requires_grad_() for _ in x]
    shared = rg.Graph(loss([w] * 6), {"w": w}).backward()["w"]
    apart = rg.Graph(loss(copies), {f"w{t}": c for t, c in enumerate(copies)}).backward().gradients
    torch.testing.assert_close(shared, sum(apart.values()))


def test_a_parameter_without_a_path_has_a_zero_gradient_and_says_so() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 3)})
    graph = rg.Graph(model["used"](torch.ones(1, 2)).sum(), model)
    assert graph.backward().gradients["unused.weight"].tolist() == [[0, 0]] * 3
    with pytest.raises(KeyError, match=r"unused.weight: no path leads"):
        graph["unused.weight"]


def test_names_are_exact_for_parameters_and_say_where_they_are_guessed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    graph = rg.Graph(model(torch.ones(2, 3)).square().mean(), model)
    assert set(graph.parameters) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    relu = graph["after 0: relu"]
    assert (relu.op, relu.module, relu.inferred) == ("relu", "0", True)
    assert not graph["0.weight"].inferred
    assert len({v.name for v in graph.vertices}) == len(graph)


def test_a_trace_gives_the_modules_and_leaves_nothing(leaves_nothing_behind) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(self.act(self.a(x)))))

    model = Net()
    with leaves_nothing_behind(model), rg.trace(model) as scopes:
        loss = F.softplus(model(torch.ones(2, 3))).sum()
    graph = rg.Graph(loss, model, trace=scopes)
    assert scopes.runs("a") == 2
    assert [v.name for v in reversed(graph.vertices) if v.op == "tanh"] == ["act: tanh #1", "act: tanh #2"]
    assert not graph["act: tanh #1"].inferred
    assert graph["after b: softplus"].inferred


def test_a_trace_is_removed_after_an_error(leaves_nothing_behind) -> None:
    model = nn.Linear(3, 1)
    with leaves_nothing_behind(model), pytest.raises(RuntimeError, match="shapes"), rg.trace(model):
        model(torch.ones(2, 5))


def test_values_are_found_where_an_operation_kept_them() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 1))
    x = torch.randn(2, 5, 3)
    h = model[:2](x)
    graph = rg.Graph(model[2:](h).sum(), model)
    torch.testing.assert_close(graph.value(h), h.detach())
    torch.testing.assert_close(graph.value("0.weight"), model[0].weight.detach())
    torch.testing.assert_close(graph.value("2: native_layer_norm"), model[2](h).detach())
    assert graph.value("after 3: sum") is None


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m, t: rg.Graph(t.detach(), m), NoGraphError, "has no graph"),
        (lambda m, t: rg.Graph([], m), GraphError, "empty sequence"),
        (lambda m, t: rg.Graph(3.0, m), GraphError, "loss is a float"),
        (lambda m, t: rg.Graph([3.0], m), GraphError, "loss is a float"),
        (lambda m, t: rg.Graph(None, m), GraphError, "loss is a NoneType, expected a tensor"),
        (lambda m, t: rg.Graph({"loss": t}, m), GraphError, "loss is a dict with the keys 'loss'"),
        (lambda m, t: rg.Graph(t, m)[True], KeyError, "True is a bool"),
        (lambda m, t: rg.Graph(t, m)[1.5], KeyError, "1.5 is a float"),
        (lambda m, t: rg.Graph(t, m).count_paths((99, 0)), KeyError, "this graph has"),
        (lambda m, t: rg.Graph(t, m).edge((0, 7)), KeyError, "no such output"),
        (lambda m, t: rg.Graph(t, m)["zzz"], KeyError, "near it: 'weight'"),
        (lambda m, t: rg.Graph(t, m)["weigth"], KeyError, "near it: 'weight'"),
        (lambda m, t: rg.Graph(t, m)[99], KeyError, "this graph has"),
        (lambda m, t: rg.Graph(t, m)[torch.ones(2)], KeyError, "no variable of this graph"),
        (lambda m, t: rg.Graph(t, m).backward({"weight": torch.ones(2)}), GraphError, r"shape \(2,\), expected"),
        (lambda m, t: rg.trace(t).__enter__(), ParameterError, "found a Tensor"),
    ],
)
def test_bad_input_is_named(call, error: type[Exception], says: str) -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(error, match=says):
        call(model, model(torch.ones(2, 3)).square().sum())


def test_a_freed_graph_is_named() -> None:
    model = nn.Linear(3, 1)
    loss = model(torch.ones(2, 3)).square().sum()
    loss.backward()
    with pytest.raises(FreedGraphError, match="retain_graph=True"):
        rg.Graph(loss, model).backward()


def test_under_a_trace_an_operation_of_the_model_itself_belongs_to_no_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a(x)

    model = Net()
    with rg.trace(model) as scopes:
        out = model(torch.ones(1, 3))
    graph = rg.Graph(out.sum(), model, trace=scopes)
    assert (graph[out].name, graph[out].module, graph[out].inferred) == ("after a: add", "", False)
    assert rg.Graph(out.sum(), model)[out].module == "a"


def test_complex_parameters_are_named_in_a_graph() -> None:
    w = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    loss = (w * w).abs().sum()
    (expected,) = torch.autograd.grad(loss, w, retain_graph=True)
    torch.testing.assert_close(rg.Graph(loss, {"w": w}).backward()["w"], expected)
