"""The laws of the rows, each over the whole table of cases, against gradients taken one loss at a time."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tests.cases import CASES, Case, Setup
from tests.reference import assert_rows_close, assert_scaled_close, flat, rows_by_grad
from torch import Tensor, nn

import rowgrad as rg

every_case = pytest.mark.parametrize("name", CASES)
repeatable = [n for n, c in CASES.items() if c.deterministic]
apart = [n for n, c in CASES.items() if c.deterministic and c.independent]
quick = [n for n, c in CASES.items() if c.fast and c.dtype == torch.float64 and "double" not in c.tags]


@cache
def rows_of(name: str) -> dict[str, Tensor]:
    setup = CASES[name].build()
    return rows_by_grad(setup.losses(), setup.params)


def jacobian(losses: Tensor, params: Any, **options: Any) -> rg.Jacobian:
    """Where slow is allowed: without the warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rg.RowgradWarning)
        return rg.jacobian(losses, params, **options)


def jacobian_of(setup: Setup, **options: Any) -> rg.Jacobian:
    return jacobian(setup.losses(), setup.model, **options)


def made(name: str) -> tuple[Case, Setup, dict[str, Tensor], Tensor]:
    """The case, a setup of it, its rows by the reference and the norm of each row."""
    case, rows = CASES[name], rows_of(name)
    return case, case.build(), rows, flat(rows).norm(dim=1)


def other_batch(name: str) -> Setup:
    """The model of the first seed on the batch of the second."""
    return replace(CASES[name].build(), batch=CASES[name].build(seed=1).batch)


def weights(n: int) -> Tensor:
    """Of both signs, one of them zero."""
    return torch.linspace(-1, 2, n, dtype=torch.float64).where(torch.arange(n) != 1, 0.0)


def dense(t: Tensor) -> Tensor:
    return t.to_dense() if t.is_sparse else t


# -- rows --------------------------------------------------------------------------------------------------------------


@every_case
def test_dense_is_the_gradient_of_each_loss(name: str) -> None:
    case, setup, rows, _ = made(name)
    J = jacobian_of(setup)
    assert J.names == tuple(rows)
    assert J.shape == (len(flat(rows)), flat(rows).shape[1])
    assert_rows_close(J.dense(as_dict=True), rows, case.rtol)
    assert_rows_close(J.dense(), flat(rows), case.rtol)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.fast])
def test_every_parameter_takes_a_rule(name: str) -> None:
    setup = CASES[name].build()
    losses = setup.losses()
    reached = torch.autograd.grad(losses.sum(), list(setup.params.values()), allow_unused=True, retain_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rg.RowgradWarning)
        explanation = rg.jacobian(losses, setup.model).explain()
    assert explanation.slow_uses() == []
    assert [(e.name, not e.uses) for e in explanation.entries] == [
        (parameter, gradient is None) for parameter, gradient in zip(setup.params, reached, strict=True)
    ]
    assert all(parameter in str(explanation) for parameter in setup.params)


@every_case
def test_nothing_is_left_behind(name: str, leaves_nothing_behind: Any) -> None:
    setup = CASES[name].build()
    losses = setup.losses()
    with leaves_nothing_behind(setup.model, losses):
        J = jacobian(losses, setup.model)
        J.norms()
        J.weighted_sum(1.0)
        del J
    losses = setup.losses()
    with leaves_nothing_behind(setup.model, losses, may_change={"grad"}):
        jacobian(losses, setup.model).backward(0.5)


@every_case
def test_rows_sum_to_the_gradient(name: str) -> None:
    case, setup, _, norms = made(name)
    total = jacobian_of(setup).dense().sum(0)
    setup.losses().sum().backward()
    gradient = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else dense(p.grad)).flatten() for p in setup.params.values()]
    )
    assert_scaled_close(total, gradient.double(), norms.sum(), case.rtol)


@every_case
def test_the_general_path_agrees(name: str) -> None:
    case, setup, rows, _ = made(name)
    assert_rows_close(jacobian_of(setup, rules={}).dense(as_dict=True), rows, case.rtol)


@every_case
def test_rows_that_are_not_kept_agree(name: str) -> None:
    """With no memory for the rows of the general path they are computed anew for each product."""
    case, setup, rows, norms = made(name)
    J = jacobian_of(setup, max_bytes=1, rules={})
    assert_rows_close(J.dense(as_dict=True), rows, case.rtol)
    assert_scaled_close(J.norms(), norms, norms, case.rtol)
    c = weights(len(norms))
    expected = {p: torch.einsum("b,b...->...", c, r.double()) for p, r in rows.items()}
    for p, found in J.weighted_sum(c).items():
        assert_scaled_close(dense(found), expected[p], norms.sum(), case.rtol)


# -- norms -------------------------------------------------------------------------------------------------------------


@every_case
def test_norms(name: str) -> None:
    case, setup, _, norms = made(name)
    J = jacobian_of(setup)
    assert_scaled_close(J.norms(), norms, norms, case.rtol)
    assert_scaled_close(J.sq_norms(), norms.square(), norms.square(), case.rtol)
    assert J.norms().requires_grad is False


@every_case
def test_norms_by_parameter_module_and_group(name: str) -> None:
    case, setup, rows, norms = made(name)
    J = jacobian_of(setup)
    groups = _groups(setup)
    for by, expected in groups.items():
        request = expected if by == "parts" else by
        found, found_sq = J.norms(request), J.sq_norms(request)
        assert list(found) == list(found_sq) == list(expected)
        for group, members in expected.items():
            truth = flat({p: rows[p] for p in members}).norm(dim=1)
            assert_scaled_close(found[group], truth, norms, case.rtol)
            assert_scaled_close(found_sq[group], truth.square(), norms.square(), case.rtol)


def _groups(setup: Setup) -> dict[str, dict[str, list[str]]]:
    names = list(setup.params)
    by_module: dict[str, list[str]] = {}
    for p in names:
        by_module.setdefault(p.rpartition(".")[0], []).append(p)
    return {
        "parameter": {p: [p] for p in names},
        "module": by_module,
        "parts": {"first": names[:1], "rest and first": names, "last": names[-1:]},
    }


@every_case
def test_streamed_norms_equal_those_of_the_jacobian(name: str) -> None:
    case, setup, rows, norms = made(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rg.RowgradWarning)
        assert_scaled_close(rg.grad_norms(setup.losses(), setup.model), norms, norms, case.rtol)
        for p, found in rg.grad_norms(setup.losses(), setup.model, by="parameter").items():
            assert_scaled_close(found, flat({p: rows[p]}).norm(dim=1), norms, case.rtol)


@every_case
def test_rows_written_as_the_pass_comes_by_equal_the_reference(name: str) -> None:
    case, setup, rows, _ = made(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rg.RowgradWarning)
        found = rg.grad_rows(setup.losses(), setup.model)
        assert {p: (r.shape, r.dtype) for p, r in found.items()} == {
            p: (r.shape, r.dtype) for p, r in rg.jacobian(setup.losses(), setup.model).dense(as_dict=True).items()
        }
    assert list(found) == list(rows)
    assert_rows_close(found, rows, case.rtol)


# -- products ----------------------------------------------------------------------------------------------------------


@every_case
def test_the_product_with_a_direction(name: str) -> None:
    case, setup, rows, norms = made(name)
    J = jacobian_of(setup)
    direction = {p: torch.randn_like(v) for p, v in setup.params.items()}
    flat_direction = torch.cat([v.double().flatten() for v in direction.values()])
    expected, scale = flat(rows) @ flat_direction, norms * flat_direction.norm()
    assert_scaled_close(J.dot(direction), expected, scale, case.rtol)
    assert_scaled_close(J @ direction, expected, scale, case.rtol)
    assert_scaled_close(J @ list(direction.values()), expected, scale, case.rtol)
    last = list(direction)[-1]
    of_last = flat({last: rows[last]}) @ direction[last].double().flatten()
    assert_scaled_close(J.dot({last: direction[last]}), of_last, scale, case.rtol)


@every_case
def test_weighted_sums(name: str) -> None:
    case, setup, rows, norms = made(name)
    J = jacobian_of(setup)
    c = weights(len(norms))
    first, *rest = setup.params
    per_layer = {first: 1 / 3, **dict.fromkeys(rest, c.tolist())}
    for given, of in ((c, lambda p: c), (0.1, lambda p: c.new_full(c.shape, 0.1)), (per_layer, per_layer.get)):
        found = J.weighted_sum(given)
        assert list(found) == list(setup.params)
        for p, value in found.items():
            assert value.dtype == setup.params[p].dtype
            weight = torch.as_tensor(of(p), dtype=torch.float64).expand(len(norms))
            expected = torch.einsum("b,b...->...", weight, rows[p].double())
            assert_scaled_close(dense(value), expected, (weight.abs() * norms).sum(), case.rtol)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if "writes" not in c.tags])
def test_products_of_rows_with_rows(name: str) -> None:
    """Not for models whose forward pass writes on their weights: the first Jacobian is stale after the second."""
    case, setup, rows, norms = made(name)
    J, J2 = jacobian_of(setup), jacobian_of(other := other_batch(name))
    A, B = flat(rows), flat(rows_by_grad(other.losses(), other.params))
    n2 = B.norm(dim=1)
    assert_scaled_close(J.gram(), A @ A.T, torch.outer(norms, norms), case.rtol)
    assert_scaled_close(J.gram(J2), A @ B.T, torch.outer(norms, n2), case.rtol)
    cosines = (A @ A.T) / torch.outer(norms, norms)
    assert_scaled_close(J.cosines(), cosines, torch.ones_like(cosines).where(~cosines.isnan(), cosines), case.rtol)
    if len(A) == len(B):
        assert_scaled_close(J.diag_gram(J2), (A * B).sum(1), norms * n2, case.rtol)


@every_case
def test_parts_of_the_jacobian(name: str) -> None:
    case, setup, rows, norms = made(name)
    J = jacobian_of(setup)
    names, n = list(rows), len(norms)
    first = {names[0]: rows[names[0]]}
    assert_scaled_close(J[names[0]].norms(), flat(first).norm(dim=1), norms, case.rtol)
    assert J[names[-1:]].names == (names[-1],)
    assert_scaled_close(J[names].norms(), norms, norms, case.rtol)
    mask = torch.arange(n) % 2 == 0
    for key in ([n - 1, 0], slice(1, None), mask, torch.tensor([1, 1]), n - 1):
        index = torch.arange(n)[key].reshape(-1)
        expected = {p: r[index] for p, r in rows.items()}
        part = J[key]
        assert len(part) == len(index)
        assert_rows_close(part.dense(as_dict=True), expected, case.rtol)
        assert_scaled_close(part.norms(), norms[index], norms[index], case.rtol)
        assert_scaled_close(part.gram(J), flat(expected) @ flat(rows).T, torch.outer(norms[index], norms), case.rtol)
    both = J[[n - 1, 0]][names[-1]]
    found = both.weighted_sum(torch.tensor([1.0, -2.0], dtype=torch.float64))[names[-1]]
    expected = rows[names[-1]][n - 1].double() - 2 * rows[names[-1]][0].double()
    assert_scaled_close(dense(found), expected, norms[[n - 1, 0]].sum() * 2, case.rtol)


# -- back into training ------------------------------------------------------------------------------------------------


@every_case
def test_backward_equals_backward_of_the_losses(name: str) -> None:
    case, ours, theirs = CASES[name], CASES[name].build(), CASES[name].build()
    n = len(ours.losses())
    c = weights(n).to(case.dtype)
    for _ in range(2):  # the second adds to the gradient of the first
        jacobian_of(ours).backward(c)
        losses = theirs.losses()
        losses.backward(c.to(losses.dtype))
    _assert_same_gradients(ours, theirs, (c.abs() * flat(rows_of(name)).norm(dim=1)).sum() * 2, case.rtol)


@every_case
def test_the_loss_of_rows_has_the_value_and_gradient_of_weighted_losses(name: str) -> None:
    case, ours, theirs = CASES[name], CASES[name].build(), CASES[name].build()
    losses = theirs.losses()
    c = weights(len(losses)).to(losses.dtype)
    loss = jacobian_of(ours).loss(c)
    expected = (c * losses).sum()
    assert loss.shape == ()
    scale = (c.abs() * losses.detach().abs()).sum()
    assert_scaled_close(
        loss, expected.detach().double(), scale.double(), max(case.rtol, 4 * torch.finfo(losses.dtype).eps)
    )
    (loss / 3).backward()
    (expected / 3).backward()
    _assert_same_gradients(ours, theirs, (c.abs() * flat(rows_of(name)).norm(dim=1)).sum(), case.rtol)


def _assert_same_gradients(ours: Setup, theirs: Setup, scale: Tensor, rtol: float) -> None:
    for (name, p), q in zip(ours.params.items(), theirs.params.values(), strict=True):
        assert (p.grad is None) == (q.grad is None), f"{name}: {'no ' if p.grad is None else ''}gradient"
        if p.grad is not None:
            assert p.grad.dtype == q.grad.dtype
            assert p.grad.layout == q.grad.layout
            assert_scaled_close(dense(p.grad), dense(q.grad).double(), scale, rtol)


# -- independence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", apart)
def test_permuting_the_examples_permutes_the_rows(name: str) -> None:
    case, setup, rows, norms = made(name)
    order = torch.arange(len(norms)).roll(1).flip(0)
    J = jacobian_of(setup.take(order))
    assert_rows_close(J.dense(as_dict=True), {p: r[order] for p, r in rows.items()}, case.rtol)


@pytest.mark.parametrize("name", apart)
def test_changing_an_example_changes_its_row_only(name: str) -> None:
    case, setup, rows, norms = made(name)
    k = len(norms) // 2
    changed = tuple(
        torch.cat([t[:k], u[k : k + 1], t[k + 1 :]]) for t, u in zip(setup.batch, other_batch(name).batch, strict=True)
    )
    found = jacobian_of(replace(setup, batch=changed)).dense(as_dict=True)
    kept = torch.arange(len(norms)) != k
    assert_rows_close({p: r[kept] for p, r in found.items()}, {p: r[kept] for p, r in rows.items()}, case.rtol)


@pytest.mark.parametrize("name", apart)
def test_splitting_the_batch_changes_nothing(name: str) -> None:
    case, setup, rows, _ = made(name)
    parts = [jacobian_of(setup.take(part)).dense(as_dict=True) for part in (slice(0, 1), slice(1, None))]
    assert_rows_close({p: torch.cat([part[p] for part in parts]) for p in rows}, rows, case.rtol)


@pytest.mark.parametrize("name", apart)
def test_independent_examples_have_no_couplings(name: str) -> None:
    assert jacobian_of(CASES[name].build()).couplings == ()


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if "coupled" in c.tags and "attack" not in c.tags])
def test_coupled_examples_name_a_node(name: str) -> None:
    assert len(jacobian_of(CASES[name].build()).couplings) > 0


# -- again -------------------------------------------------------------------------------------------------------------


@every_case
def test_later_calls_see_their_own_data(name: str) -> None:
    """The same twice, then other data, then another model, then the first again."""
    case, setup, rows, _ = made(name)
    for _ in range(2):
        assert_rows_close(jacobian_of(setup).dense(as_dict=True), rows, case.rtol)
    for other in (other_batch(name), case.build(seed=1)):
        expected = rows_by_grad(other.losses(), other.params)
        assert_rows_close(jacobian_of(other).dense(as_dict=True), expected, case.rtol)
    assert_rows_close(jacobian_of(setup).dense(as_dict=True), rows, case.rtol)


@pytest.mark.parametrize("name", repeatable)
def test_proving_at_every_call_changes_nothing(name: str) -> None:
    case, setup, rows, _ = made(name)
    assert_rows_close(jacobian_of(setup, verify="always").dense(as_dict=True), rows, case.rtol)


# -- other dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick)
def test_single_precision(name: str) -> None:
    """Rows within 1e-4 of those of the same single-precision graph: a thousand roundings at most."""
    setup = CASES[name].build(dtype=torch.float32)
    rows = rows_by_grad(setup.losses(), setup.params)
    norms = flat(rows).norm(dim=1)
    J = jacobian_of(setup)
    assert_rows_close(J.dense(as_dict=True), rows, 1e-4)
    assert_scaled_close(J.norms(), norms, norms, 1e-4)
    assert_scaled_close(J.gram(), flat(rows) @ flat(rows).T, torch.outer(norms, norms), 1e-4)


HALF = [
    "linear",
    "linear rank 3",
    "conv2d",
    "embedding",
    "layer norm",
    "rms norm, functional",
    "group norm",
    "attention, batch first",
    "embedding tied to the head",
    "language model",
    "positions of shape (T, d)",
    "prelu, a slope per channel",
    "siamese encoders in one forward pass",
    "recurrence by hand, read at every step",
]


@pytest.mark.parametrize("name", HALF)
def test_bfloat16(name: str) -> None:
    """Within 5% of a row's norm: the reference rounds each entry, and each sum over positions, to 8 bits."""
    setup = CASES[name].build(dtype=torch.bfloat16)
    rows = rows_by_grad(setup.losses(), setup.params)
    norms = flat(rows).norm(dim=1)
    J = jacobian_of(setup)
    assert_rows_close(J.dense(as_dict=True), rows, 5e-2)
    assert_scaled_close(J.norms(), norms, norms, 5e-2)
    assert all(g.dtype == torch.bfloat16 for g in J.weighted_sum(1.0).values())


# -- the formula -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 8])
def test_the_formula_of_goodfellow(n: int) -> None:
    """s_j = sum zbar_j^2 * sum h_j^2 for each layer, the bias as one more input that is 1."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(n, 5, dtype=torch.float64), torch.randint(3, (n,))
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    expected = flat(rows_by_grad(losses, dict(model.named_parameters()))).square().sum(1)
    J = rg.jacobian(losses, model)
    s = torch.zeros(n, dtype=torch.float64)
    for layer in ("0", "2"):
        ((H, Zbar, owner),) = J.factors(f"{layer}.weight")
        H = torch.cat([H, torch.ones(len(H), 1)], 1)
        s = s.index_add(0, owner, Zbar.square().sum(1) * H.square().sum(1))
    assert_scaled_close(s, expected, expected)
    assert_scaled_close(J.sq_norms(), expected, expected)


@pytest.mark.parametrize("name", ["linear", "linear rank 3", "sequence first", "packed tokens of ragged lengths"])
def test_factors_make_the_rows_of_a_weight(name: str) -> None:
    case, setup, rows, norms = made(name)
    J = jacobian_of(setup)
    for p in (n for n in rows if n.endswith("weight")):
        total = torch.zeros(rows[p].shape, dtype=torch.float64)
        for H, Zbar, owner in J.factors(p):
            outer = torch.einsum("np,nd->npd", Zbar, H)
            total.index_add_(0, owner, outer if outer.shape[1:] == total.shape[1:] else outer.mT)
        assert_scaled_close(total.flatten(1), rows[p].flatten(1), norms.unsqueeze(1), case.rtol)


def test_a_transform_of_cotangents_acts_before_the_last_product() -> None:
    """Goodfellow 2015, section 6: rescaled Z is all that is needed for the gradient of another loss."""
    setup = CASES["linear"].build()
    c = torch.tensor([0.5, 2.0, 0.0, -1.0], dtype=torch.float64)
    jacobian_of(setup).backward(1.0, transform=lambda name, Z: Z * c.reshape(-1, *[1] * (Z.ndim - 1)))
    found = {n: p.grad for n, p in setup.params.items()}
    for name, expected in jacobian_of(setup).weighted_sum(c).items():
        torch.testing.assert_close(found[name], expected)
