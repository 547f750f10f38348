"""Jacobians of single operations: Aggarwal 2018, part III, eqs. 8 to 11."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.cases import CASES
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import GraphError

SMALL = 3000  # entries of a Jacobian that is written out


def chain() -> tuple[nn.Sequential, list[Tensor], rg.Graph]:
    """Four layers on one example, all variables kept."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    values = [torch.randn(3, dtype=torch.float64, requires_grad=True)]
    for layer in model:
        values.append(layer(values[-1]))
    return model, values, rg.Graph(values[-1].square().sum(), model)


@pytest.mark.parametrize("name", CASES)
def test_on_every_case_a_cotangent_is_sent_by_the_transposed_jacobian(name: str) -> None:
    """Eq. 11 at every operation with small enough a Jacobian: J^T g is what the operation sends."""
    setup = CASES[name].build()
    graph = rg.Graph(setup.losses(), setup.params)
    for v in graph.vertices:
        for slot, source in enumerate(v.inputs):
            for nr in range(v.n_outputs):
                if source is None or not is_small_and_real(graph, (v.index, nr), source):
                    continue
                g = torch.randn_like(graph.ones((v.index, nr)))
                sent = graph.level.algebra.send(v, [g if i == nr else None for i in range(v.n_outputs)])[slot]
                found = graph.local_jacobian(v, slot, nr).matrix.double().T @ g.reshape(-1).double()
                truth = torch.zeros_like(found) if sent is None else sent.reshape(-1).double()
                off, low = found - truth, graph.ones(source).dtype != torch.float64 or g.dtype != torch.float64
                assert off.norm() <= (0.03 if low else 1e-10) * (truth.norm() + 1e-3), v.name


def is_small_and_real(graph: rg.Graph, edge: tuple[int, int], source: tuple[int, int]) -> bool:
    if edge not in graph.outputs and not graph.readers(edge):
        return False
    both = [graph.ones(edge), graph.ones(source)]
    return both[0].numel() * both[1].numel() <= SMALL and both[0].numel() <= 60 and not any(map(torch.is_complex, both))


def test_along_a_chain_each_cotangent_is_the_transposed_jacobian_times_the_next() -> None:
    """Eqs. 8, 9 and 11: g_i = Z g_{i+1} with Z = J^T, for every layer of a chain and the chain as a whole."""
    _, values, graph = chain()
    flow, product = graph.backward(), None
    for before, after in zip(values[:-1][::-1], values[1:][::-1], strict=True):
        J = between(graph, before, after)
        torch.testing.assert_close(flow[before], J.T @ flow[after])
        by_sums = [sum(flow[after][q] * J.T[p, q] for q in range(len(J))) for p in range(J.shape[1])]
        torch.testing.assert_close(flow[before], torch.stack(by_sums))  # eq. 8, entry by entry
        product = J if product is None else product @ J
    assert product is not None
    torch.testing.assert_close(flow[values[0]], product.T @ flow[values[-1]])


def between(graph: rg.Graph, before: Tensor, after: Tensor) -> Tensor:
    """J of a layer: the product over the one path of operations that it is made of."""
    edge, J = graph.edge(after), None
    while edge != graph.edge(before):
        v = graph.vertices[edge[0]]
        slot = next(i for i, t in enumerate(v.inputs) if t is not None and t[0] in below(graph, before))
        here = graph.local_jacobian(v, slot, edge[1]).matrix
        J, edge = here if J is None else J @ here, v.inputs[slot]
    assert J is not None
    return J


def below(graph: rg.Graph, key: Tensor) -> set[int]:
    return graph.between(key)


def test_the_jacobian_is_the_matrix_of_partial_derivatives() -> None:
    """Eq. 10 against `torch.autograd.functional.jacobian`, on an arbitrary function of a vector."""
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = F.softmax(x, 0)
    found = rg.Graph(y[0].log()).local_jacobian(y)
    torch.testing.assert_close(found.matrix, torch.autograd.functional.jacobian(lambda t: F.softmax(t, 0), x))
    assert found.form == "dense"


def test_linear_layers_are_dense_and_multiply_with_the_transposed_weight() -> None:
    """Part III: backpropagation is multiplication with the transposed weight matrix."""
    w = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    h = torch.randn(3, dtype=torch.float64, requires_grad=True)
    z = w.T @ h
    found = rg.Graph(z.sum()).local_jacobian(z, slot=1)
    assert found.form == "dense"
    torch.testing.assert_close(found.matrix, w.detach().T)


@pytest.mark.parametrize("act", [torch.sigmoid, torch.tanh, torch.relu, F.hardtanh, F.gelu, F.softplus, torch.sin])
def test_activations_are_diagonal(act) -> None:
    """Part III: elementwise multiplication with the derivative. Seed 002 has the same for its H x H matrix."""
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    h = act(z)
    found = rg.Graph(h.square().sum()).local_jacobian(h)
    assert found.form == "diagonal"
    (slopes,) = torch.autograd.grad(act(z).sum(), z)
    torch.testing.assert_close(found.matrix.diag(), slopes.reshape(-1))


@pytest.mark.parametrize(
    "op",
    [
        lambda z: z.max(1).values,
        lambda z: F.max_pool2d(z[None, None], 2)[0, 0],
        lambda z: z.T,
        lambda z: z[1:, ::2],
        lambda z: z.reshape(3, 8),
        lambda z: z.clone(),
        lambda z: z.gather(1, torch.tensor([[0, 0]] * 4)),
        lambda z: torch.cat([z, z.new_ones(2, 6)]),
    ],
)
def test_maxima_and_views_select(op) -> None:
    z = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    h = op(z)
    found = rg.Graph(h.sum()).local_jacobian(h)
    assert found.form == "selection", found
    reached = (found.matrix @ torch.arange(1.0, 1 + found.matrix.shape[1], dtype=torch.float64)).reshape(h.shape)
    assert set(reached.flatten().tolist()) <= set(map(float, range(25)))


def test_one_of_several_outputs() -> None:
    z = torch.randn(4, requires_grad=True)
    a, b = z.split([1, 3])
    graph = rg.Graph(a.sum() + b.sum())
    assert torch.equal(graph.local_jacobian(a).matrix, torch.eye(4)[:1])
    assert torch.equal(graph.local_jacobian(b).matrix, torch.eye(4)[1:])
    assert torch.equal(graph.local_jacobian(a, output=1).matrix, torch.eye(4)[1:])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda g, w: g.local_jacobian(w), "w is a leaf"),
        (lambda g, w: g.local_jacobian("after w: mul", 1), r"input 1 of after w: mul has no derivative.*\[0\]"),
        (lambda g, w: g.local_jacobian("after w: mul", 7), "input 7 of after w: mul has no derivative"),
        (lambda g, w: g.local_jacobian("after w: mul", output=2), "output 2 of after w: mul: it has 1"),
        (lambda g, w: g.local_jacobian("after w: mul", limit=8), "3 x 3 entries, more than limit=8"),
        (lambda g, w: g.local_jacobian("w: unbind", output=2), "output 2 of w: unbind: no path"),
        (lambda g, w: g.local_jacobian("w: complex"), "w: complex is complex"),
    ],
)
def test_what_has_no_jacobian_is_refused(call, says: str) -> None:
    w = torch.randn(3, requires_grad=True)
    complex_ = torch.complex(w, w.new_ones(3))
    graph = rg.Graph((w.sin() * 2).sum() + complex_.abs().sum() + w.unbind()[0], {"w": w})
    with pytest.raises(GraphError, match=says):
        call(graph, w)
