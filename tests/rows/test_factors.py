"""Every form answers every question as its rows written out would."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from tests.rows.sizes import Largest

import rowgrad as rg
from rowgrad.rows import factors, pairs
from rowgrad.rows.factors import Dense, Form, Multiples, Outer, Rows
from rowgrad.rows.hadamard import times
from rowgrad.rows.pairs import gram, inner, of_itself, product, remembering

B, G, P, D = 4, 1, 5, 3


def outer(t: int, n: int = B) -> Outer:
    left, right = torch.randn(n, G, t, P, dtype=torch.float64), torch.randn(n, G, t, D, dtype=torch.float64)
    return Outer(left, right, torch.Size((P, D)), cotangent_left=True)


FORMS: dict[str, Callable[[], Form]] = {
    "outer, one position": lambda: outer(1),
    "outer, few positions": lambda: outer(2),
    "outer, many positions": lambda: outer(9),
    "outer, no position": lambda: outer(0),
    "rows": lambda: Rows(torch.randint(P, (B, 6)), torch.randn(B, 6, D, dtype=torch.float64), torch.Size((P, D))),
    "outer, one position, times a tensor": lambda: times(outer(1), torch.randn(P, D, dtype=torch.float64)),
    "outer, few positions, times a tensor": lambda: times(outer(2), torch.randn(P, D, dtype=torch.float64)),
    "outer, many positions, times a tensor": lambda: times(outer(9), torch.randn(P, D, dtype=torch.float64)),
    "dense": lambda: Dense(torch.randn(B, P, D, dtype=torch.float64)),
    "multiples": lambda: Multiples(torch.randn(B, dtype=torch.float64), torch.randn(P, D, dtype=torch.float64)),
}


@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "formed"])
@pytest.mark.parametrize("chunk", [1, 64 * 2**20], ids=["one at a time", "at once"])
@pytest.mark.parametrize("name", FORMS)
def test_questions_to_one_form(name: str, chunk: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "CHUNK_BYTES", chunk)
    form = FORMS[name]()
    rows = form.dense()
    if not kept:
        form = form.select(torch.arange(B))
    c, v = torch.randn(B, dtype=torch.float64), torch.randn(P, D, dtype=torch.float64)
    torch.testing.assert_close(form.sq_norms(), rows.flatten(1).square().sum(1))
    torch.testing.assert_close(form.weighted_sum(c), torch.einsum("b,bpd->pd", c, rows))
    torch.testing.assert_close(form.dot(v), torch.einsum("bpd,pd->b", rows, v))
    torch.testing.assert_close(form.scaled(c).dense(), c[:, None, None] * rows)
    torch.testing.assert_close(form.select(torch.tensor([2, 0, 2])).dense(), rows[[2, 0, 2]])
    torch.testing.assert_close(form.with_cotangents(lambda z: 2 * z).dense(), 2 * rows)
    torch.testing.assert_close(form.condensed().dense(), rows)


@pytest.mark.parametrize(("t", "cotangent_left", "is_formed"), [
    (1, True, False),  # less by its factors, which norms do not form
    (2, False, False),  # norms by Gram matrices
    (2, True, False),
    (3, True, True),  # 15 entries, and 15 cotangents
    (3, False, False),  # 9 cotangents
    (4, False, False),
    (5, False, True),
])  # fmt: skip
def test_rows_are_written_out_early_where_they_take_no_more_than_cotangents(
    t: int, cotangent_left: bool, is_formed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = outer(t)
    form.cotangent_left = cotangent_left
    found = form.condensed()
    assert isinstance(found, Dense) == is_formed
    assert is_formed or found is form
    column = Outer(form.left[:, :, :1], form.right[:, :, :1, :1], torch.Size((P, 1)), cotangent_left=True)
    assert column.condensed() is column  # one position: norms form nothing
    monkeypatch.setattr(factors, "KEEP_BYTES", 0)
    assert outer(9).condensed().sizes[2] == 9


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("t", [0, 1, 2, 9])
def test_dot_products_whichever_side_is_wide(t: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    form, v = outer(t), torch.randn(P, D, dtype=torch.float64)
    expected = torch.einsum("bta,btc,ac->b", form.left[:, 0], form.right[:, 0], v)
    torch.testing.assert_close(form.dot(v), expected)
    torch.testing.assert_close(form.transposed().dot(v.T.contiguous()), expected)


@pytest.mark.parametrize("chunk", [1, 64 * 2**20], ids=["one at a time", "at once"])
@pytest.mark.parametrize(("f", "g"), list(itertools.product(FORMS, FORMS)))
def test_products_of_two_forms(f: str, g: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "CHUNK_BYTES", chunk)
    one, other = FORMS[f](), FORMS[g]()
    left, right = one.dense().flatten(1), other.dense().flatten(1)
    torch.testing.assert_close(inner(one, other), (left * right).sum(1))
    torch.testing.assert_close(gram(one, other), left @ right.T)
    torch.testing.assert_close(gram(one, one), left @ left.T)
    torch.testing.assert_close(inner(one.select(torch.arange(B)), other), (left * right).sum(1))


@pytest.mark.parametrize("length", [2**14, 2**14 + 1, 2**14 + 16, 3])
def test_products_of_long_rows(length: int) -> None:
    left, right = torch.randn(200, length, dtype=torch.float64), torch.randn(3, length, dtype=torch.float64)
    torch.testing.assert_close(product(left, right), left @ right.T)
    torch.testing.assert_close(product(left, left), left @ left.T)
    torch.testing.assert_close(product(left[:0], right), left[:0] @ right.T)


def test_very_long_rows_are_added_up_in_parts() -> None:
    rows = torch.randn(2, 2**22 + 3)
    expected = rows.double() @ rows.double().T
    torch.testing.assert_close(product(rows, rows).double(), expected, rtol=0, atol=2e-5 * float(expected.max()))


def test_what_is_remembered_is_not_taken_for_another() -> None:
    with remembering():
        for i in range(20):  # the memory of the one before would be used again if it were free
            rows = torch.full((B, 100), float(i))
            assert of_itself(rows)[0, 0] == 100 * i * i
            assert of_itself(rows[:2]).shape == (2, 2)
            assert of_itself(rows) is of_itself(rows.view(B, 10, 10).flatten(1))
            del rows
    rows = torch.ones(B, 100)
    assert of_itself(rows) is not of_itself(rows)


def test_the_product_of_a_layers_cotangents_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(pairs, "product", lambda left, right: taken.append(left.shape) or left @ right.T)
    model = torch.nn.Sequential(torch.nn.Linear(D, P), torch.nn.Tanh(), torch.nn.Linear(P, 1)).double()
    J = rg.jacobian(model(torch.randn(B, D, dtype=torch.float64)).squeeze(1), model)
    expected = J.dense() @ J.dense().T
    taken.clear()
    torch.testing.assert_close(J.gram(), expected)
    assert sorted(taken) == [(B, 1), (B, D), (B, P), (B, P)]


@pytest.mark.parametrize("t", [1, 127, 128, 129, 200])
def test_gram_matrices_by_halves(t: int) -> None:
    left, right = (torch.randn(B, 2, t, n, dtype=torch.float64) for n in (P, D))
    found, bound = factors._products_of_grams(left, right)
    torch.testing.assert_close(found, (left.mT @ right).square().sum((1, 2, 3)))
    torch.testing.assert_close(bound, (left.norm(dim=3) * right.norm(dim=3)).sum(2).square().sum(1))


def test_norms_that_cancel_are_formed() -> None:
    """Two positions that all but cancel: by Gram matrices in float32 nothing but rounding would be left."""
    h, z = torch.randn(1, 1, 1, 300), torch.randn(1, 1, 1, 300)
    form = Outer(torch.cat([z, -z], 2), torch.cat([h, h * (1 + 1e-4)], 2), torch.Size((300, 300)), cotangent_left=True)
    assert form.prefers_gram
    exact = Outer(form.left.double(), form.right.double(), form.shape, cotangent_left=True).dense().square().sum()
    assert float(form.sq_norms()) == pytest.approx(float(exact), rel=1e-2)


def test_a_transform_that_changes_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"given cotangents of shape \(8, 5\) and returned \(8,\)"):
        outer(2).with_cotangents(lambda z: z.sum(1))


def test_products_of_many_long_rows_are_not_taken_in_parts() -> None:
    """Each part would give a whole product: more than the rows themselves."""
    rows = torch.randn(1200, pairs.LONG_ROW)
    assert pairs.PARTS * len(rows) ** 2 > rows.numel()
    with Largest() as largest:
        found = product(rows, rows[:1100])
    torch.testing.assert_close(found, rows @ rows[:1100].T, rtol=1e-4, atol=1e-2)
    assert largest.bytes == rows.nbytes


@pytest.mark.parametrize(("n", "length"), [(31, pairs.LONG_ROW), (67, pairs.LONG_ROW + 3), (130, 2048), (515, 1024)])
def test_a_product_with_itself_has_both_triangles(n: int, length: int) -> None:
    rows = torch.randn(n, length, dtype=torch.float64)
    torch.testing.assert_close(product(rows, rows), rows @ rows.T, rtol=1e-12, atol=1e-10)


def test_products_that_are_large_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(8, 3)
    with remembering():
        assert of_itself(rows) is of_itself(rows)
        monkeypatch.setattr(pairs, "CHUNK_BYTES", 1)
        assert of_itself(rows) is not of_itself(rows)
