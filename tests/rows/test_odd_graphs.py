"""Graphs that are right to write and easy to read wrongly, each with new data twice, against autograd loss by loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.reference import assert_rows_close, rows_by_grad
from tests.rows.laws import assert_laws, assert_products, energy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rowgrad as rg
from rowgrad.rows.plan import forget

IDS = torch.tensor([[0, 1], [1, 2], [2, 0]])
Graph = tuple[Tensor, dict[str, Tensor]]  # losses (B,), parameters


def weight(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def data(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


class Clamped(torch.autograd.Function):
    """A backward pass that is not linear in the cotangent."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent.clamp(-0.1, 0.1)


def turned_onto_itself(dims: tuple[int, int]) -> Graph:
    W = weight(3, 3)
    return energy(data(4, 3) @ (W + data(3, 3)).transpose(*dims)), {"W": W}


def stack_turned(dims: tuple[int, int]) -> Graph:
    W = weight(3, 3, 3)
    return energy(torch.bmm(data(3, 4, 3), (W + data(3, 3, 3)).transpose(*dims)).transpose(0, 1)), {"W": W}


def stack_indexed() -> Graph:
    A = weight(3, 1, 2)
    return energy(torch.bmm(A, data(3, 2, 5))[IDS]), {"A": A}


def product_taken() -> Graph:
    U, V = weight(6, 2), weight(5, 2)
    return energy((U @ V.T).take(torch.randint(30, (4, 3)))), {"U": U, "V": V}


def product_gathered() -> Graph:
    U, V = weight(6, 2), weight(5, 2)
    return energy((U @ V.T).gather(1, torch.randint(5, (6, 3)))), {"U": U, "V": V}


def product_indexed_by_pairs() -> Graph:
    U, V = weight(6, 2), weight(5, 2)
    return energy((U @ V.T)[torch.randint(6, (4, 3)), torch.randint(5, (4, 3))]), {"U": U, "V": V}


def largest_of_a_product() -> Graph:
    U, V = weight(6, 2), weight(5, 2)
    return energy(F.embedding_bag(torch.randint(6, (4, 3)), U @ V.T, mode="max")), {"U": U, "V": V}


def weight_norm_indexed() -> Graph:
    v, g = weight(6, 2), weight(6, 1)
    return energy(torch._weight_norm(v, g, 0)[torch.randint(6, (4, 3)), torch.randint(2, (4, 3))]), {"v": v, "g": g}


def scaled_table_indexed() -> Graph:
    s = weight()
    return energy((data(4, 4) * s)[torch.randint(4, (3, 2)), torch.randint(4, (3, 2))]), {"s": s}


def divided_table_indexed() -> Graph:
    s = weight()
    return energy((data(4, 4) / s)[torch.randint(4, (3, 2)), torch.randint(4, (3, 2))]), {"s": s}


def complex_expanded() -> Graph:
    p = weight(3)
    return (p.to(torch.cdouble).expand(4, 3) * data(4, 3, dtype=torch.cdouble)).abs().sum(1), {"p": p}


def complex_pair_expanded() -> Graph:
    p, q = weight(3), weight(3)
    return (torch.complex(p, q).expand(4, 3) * data(4, 3, dtype=torch.cdouble)).abs().sum(1), {"p": p, "q": q}


def complex_added() -> Graph:
    p, q = weight(3), weight(3)
    return energy((data(4, 3, dtype=torch.cdouble) + torch.complex(p, q) - q).abs()), {"p": p, "q": q}


def phase() -> Graph:
    s = weight()
    return energy((data(4, 3, dtype=torch.cdouble) * torch.exp(1j * s)).real), {"s": s}


def complex_number() -> Graph:
    s = weight()
    return energy((data(4, 3, dtype=torch.cdouble) * s.to(torch.cdouble)).imag), {"s": s}


def clamped_below_a_sum() -> Graph:
    w = weight(3)
    return data(4) * Clamped.apply(w.sum()), {"w": w}


def sparse_data() -> Graph:
    W, b = weight(4, 3), weight(3)
    return energy(data(5, 4).relu().to_sparse() @ W + b), {"W": W, "b": b}


def sparse_rows_of_data() -> Graph:
    W = weight(3, 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return energy(F.linear(data(5, 4).relu().to_sparse_csr(), W)), {"W": W}


def two_precisions() -> Graph:
    W = weight(4, 3, dtype=torch.float32)
    x = data(5, 4, dtype=torch.float32)
    return energy((x @ W).double()) + energy(x.double() @ W.double()), {"W": W}


def lookup_in_two_precisions() -> Graph:
    W = weight(6, 3, dtype=torch.float32)
    ids = torch.randint(6, (5, 2))
    return energy(F.embedding(ids, W).double()) + energy(F.embedding(ids, W.double()) @ W.double().T), {"W": W}


def turned_kernel() -> Graph:
    W = weight(4, 3, 2, 2)
    return energy(F.conv2d(data(5, 4, 6, 6), W.transpose(0, 1))), {"W": W}


def turned_table() -> Graph:
    W = weight(3, 6)
    return energy(F.embedding(torch.randint(6, (5, 4)), W.T)), {"W": W}


def table_in_a_sum() -> Graph:
    """The rows of a sum go to both of its parts; of one a table's rows are added to them."""
    a, b = weight(7, 3), weight(7, 3)
    scaled = (data(5, 7, 3) * (a + b)).tanh().sum((1, 2))
    return F.embedding(torch.randint(7, (5, 4)), a).square().sum((1, 2)) + scaled, {"a": a, "b": b}


def table_that_scales() -> Graph:
    a = weight(7, 3)
    h = F.embedding(torch.randint(7, (5, 4)), a).sum(1, keepdim=True)
    return (h * (data(5, 7, 3) * a)).tanh().sum((1, 2)), {"a": a}


GRAPHS: dict[str, Callable[[], Graph]] = {
    "a looked-up table in a sum": table_in_a_sum,
    "a looked-up table that scales": table_that_scales,
    "kernel with its channels exchanged": turned_kernel,
    "lookup in a turned table": turned_table,
    "a dimension exchanged with itself": lambda: turned_onto_itself((0, 0)),
    "the same, counted from the end": lambda: turned_onto_itself((-1, 1)),
    **{f"cubic stack, {dims} exchanged": lambda d=dims: stack_turned(d) for dims in [(0, 2), (0, 1), (1, -1), (2, -1)]},
    "stack of products indexed": stack_indexed,
    "product, entries taken": product_taken,
    "product, entries gathered": product_gathered,
    "product, indexed by pairs": product_indexed_by_pairs,
    "product, largest of a bag": largest_of_a_product,
    "weight norm, indexed by pairs": weight_norm_indexed,
    "scaled table, indexed by pairs": scaled_table_indexed,
    "divided table, indexed by pairs": divided_table_indexed,
    "complex parameter expanded": complex_expanded,
    "complex pair expanded": complex_pair_expanded,
    "complex shift": complex_added,
    "phase": phase,
    "complex number": complex_number,
    "backward of a user's, below one number": clamped_below_a_sum,
    "sparse data": sparse_data,
    "sparse data by rows": sparse_rows_of_data,
    "one weight in two precisions": two_precisions,
    "one table in two precisions": lookup_in_two_precisions,
}


@pytest.mark.parametrize("name", GRAPHS)
def test_odd_graph(name: str) -> None:
    forget()
    for seed in range(3):
        torch.manual_seed(seed)
        losses, params = GRAPHS[name]()
        narrow = any(p.dtype == torch.float32 for p in params.values())
        J = assert_laws(losses, params, rtol=1e-5 if narrow else 1e-10, ruled=False)
        assert not J.dense().is_complex()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rg.RowgradWarning)
            norms = rg.grad_norms(losses, params, retain_graph=True)
            kept_nowhere = rg.jacobian(losses, params, retain_graph=True, max_bytes=0)
        assert_products(kept_nowhere, rows_by_grad(losses, params), 1e-5 if narrow else 1e-10)
        torch.testing.assert_close(norms, J.norms())


def test_products_of_jacobians_in_different_dtypes() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    narrow = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    narrow.load_state_dict(wide.state_dict())
    x = data(5, 6, 3)
    J, K = (rg.jacobian(energy(m(x.to(m[0].weight.dtype))), m) for m in (wide, narrow))
    expected = J.gram()
    for found in (J.gram(K), K.gram(J), J.gram(J)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(J.diag_gram(K).double(), expected.diagonal(), rtol=1e-4, atol=1e-4)


def test_uses_of_one_number_that_cancel() -> None:
    s, x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), data(4, 3)
    losses = (x * s).sum(1) - x.sum(1) * (s * s).sqrt() * 0.99999
    J, K = (rg.jacobian(losses, {"s": s}, retain_graph=True) for _ in range(2))
    rows = rows_by_grad(losses, {"s": s})["s"]
    torch.testing.assert_close(J.diag_gram(K), rows.square(), rtol=1e-8, atol=0)


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
def test_sparse_table_below_the_general_path() -> None:
    table = nn.Embedding(6, 3, sparse=True).double()
    losses = (data(3, 4, 3) * torch.tanh(table(torch.arange(4)))).sum((1, 2))
    J = rg.jacobian(losses, table, retain_graph=True)
    assert_rows_close(J.dense(), rows_by_grad(losses, dict(table.named_parameters()))["weight"].flatten(1), 1e-10)


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
@pytest.mark.parametrize("max_bytes", [None, 0])
def test_dropout_recomputed_around_a_computed_weight(max_bytes: int | None) -> None:
    torch.manual_seed(0)
    W, x = weight(4, 3), data(5, 4)
    losses = energy(checkpoint(lambda t: F.dropout(t @ torch.tanh(W), 0.3), x, use_reentrant=False))
    J = rg.jacobian(losses, {"W": W}, retain_graph=True, max_bytes=max_bytes)
    assert_rows_close(J.dense(), rows_by_grad(losses, {"W": W})["W"].flatten(1), 1e-10)


@pytest.mark.parametrize("verify", ["cached", "always"])
def test_an_overflow_hides_no_coupling(verify: str) -> None:
    """The second loss reads the first example where the first loss overflows."""
    forget()
    torch.manual_seed(0)
    for n in (4, 3, 9):
        W, x = weight(4, 3, dtype=torch.float32), data(n, 4, dtype=torch.float32)
        h = x @ W
        large = torch.ones(n)
        large[0] = 1e30
        mixing = torch.zeros(n, n)
        mixing[1, 0] = 1
        losses = h.square().sum(1) + (h.sum(1) - h.sum(1).detach()) * large * large + (mixing @ h).sin().sum(1)
        rows = rows_by_grad(losses, {"W": W})["W"].flatten(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rg.RowgradWarning)
            J = rg.jacobian(losses, {"W": W}, verify=verify, retain_graph=True)
        assert not rows[0].isfinite().any()
        assert_rows_close(J.dense()[1:], rows[1:], 1e-5)
        assert not J.norms()[0].isfinite()
