"""Lookups: embeddings, bags, indexing, gathering; what they cost on large tables; sparse gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.reference import assert_scaled_close, flat, rows_by_grad
from tests.rows.laws import assert_laws, energy, rows_in_double, trained
from tests.rows.sizes import Largest
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.rows import factors

SINGLE = 1e-5  # of the row's norm, float32 against the same network in float64
HALF = 5e-2  # bfloat16 keeps 8 bits of every looked-up row and cotangent
N_IDS, D = 7, 4

Lookup = Callable[[Tensor, Tensor], Tensor]  # table (7, 4), ids (B, 5) -> (B, ...)

# fmt: off
LOOKUPS: dict[str, Lookup] = {
    "embedding":               lambda w, ids: F.embedding(ids, w),
    "embedding, padding":      lambda w, ids: F.embedding(ids, w, padding_idx=2),
    "embedding, last padding": lambda w, ids: F.embedding(ids, w, padding_idx=-1),
    "embedding, narrow ids":   lambda w, ids: F.embedding(ids.int(), w),
    "embedding, one id":       lambda w, ids: F.embedding(ids[:, 0], w),
    "embedding, a grid":       lambda w, ids: F.embedding(ids[:, :4].reshape(-1, 2, 2), w),
    "embedding, ids first":    lambda w, ids: F.embedding(ids.T, w).transpose(0, 1),
    "embedding, all padding":  lambda w, ids: F.embedding(0 * ids, w, padding_idx=0) + F.embedding(ids, w),
    "embedding, no ids":       lambda w, ids: F.embedding(ids[:, :0], w).sum(1) + w[ids[:, 0]],
    "index":                   lambda w, ids: w[ids],
    "index, from the end":     lambda w, ids: w[ids - N_IDS],
    "index, narrow ids":       lambda w, ids: w[ids.int()],
    "index, then all":         lambda w, ids: w[ids, :],
    "index, entries":          lambda w, ids: w[ids, ids.flip(1) % D],
    "index, a vector":         lambda w, ids: w.flatten()[ids],
    "index, a stack":          lambda w, ids: w.reshape(N_IDS, 2, 2)[ids],
    "index, two of three":     lambda w, ids: w.reshape(N_IDS, 2, 2)[ids, ids % 2],
    "index_select":            lambda w, ids: w.index_select(0, ids.flatten()).reshape(*ids.shape, D),
    "gather, vector":          lambda w, ids: w[:, 0].gather(0, ids.flatten()).reshape(ids.shape),
    "gather, first dimension": lambda w, ids: w.gather(0, ids[:, :D]),
    "gather, last dimension":  lambda w, ids: w[:len(ids)].gather(1, ids % D),
    "take":                    lambda w, ids: w.take(3 * ids - 5),
    "tied to a product":       lambda w, ids: F.embedding(ids, w) @ w.T,
    "three kinds at once":     lambda w, ids: F.embedding(ids, w) + w[ids.flip(1)] * w.take(ids)[..., None],
}

BAGS: dict[str, Lookup] = {
    "two dimensions":     lambda w, ids, **how: F.embedding_bag(ids, w, **how),
    "offsets":            lambda w, ids, **how: F.embedding_bag(ids.flatten(), w, offsets(ids), **how),
    "narrow offsets":     lambda w, ids, **how: F.embedding_bag(ids.int().flatten(), w, offsets(ids).int(), **how),
    "last offset":        lambda w, ids, **how: F.embedding_bag(
        ids.flatten(), w, F.pad(offsets(ids), (0, 1), value=ids.numel()), include_last_offset=True, **how),
    "several an example": lambda w, ids, **how: F.embedding_bag(ids.flatten(), w, offsets(ids, 3), **how),
    "empty bags":         lambda w, ids, **how: F.embedding_bag(ids.flatten(), w, offsets(ids) // 10 * 5, **how),
}
# fmt: on
MODES = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "max": {"mode": "max"},
    "sum, padding": {"mode": "sum", "padding_idx": 3},
    "mean, padding": {"mode": "mean", "padding_idx": 3},
    "max, padding": {"mode": "max", "padding_idx": 3},
}


def offsets(ids: Tensor, n_bags: int = 1) -> Tensor:
    """First position of each bag: ids (B, 5) split unevenly into `n_bags` an example."""
    return (5 * torch.arange(len(ids)).unsqueeze(1) + torch.tensor([0, 1, 4])[:n_bags]).flatten()


def make_ids(n: int) -> Tensor:
    """Some repeated within an example, some across examples."""
    return torch.randint(N_IDS, (n, 5), generator=torch.Generator().manual_seed(n))


def holding(table: Tensor) -> nn.Module:
    module = nn.Module()
    module.table = nn.Parameter(table)
    return module


def make_table(dtype: torch.dtype = torch.float64) -> nn.Module:
    return holding(torch.randn(N_IDS, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype))


def by_example(out: Tensor, n: int) -> Tensor:
    return energy(out.reshape(n, -1))


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups(name: str, n: int) -> None:
    module = make_table()
    assert_laws(by_example(LOOKUPS[name](module.table, make_ids(n)), n), trained(module))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BAGS)
def test_bags(name: str, mode: str, n: int) -> None:
    module = make_table()
    assert_laws(by_example(BAGS[name](module.table, make_ids(n), **MODES[mode]), n), trained(module))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, SINGLE), (torch.bfloat16, HALF)])
@pytest.mark.parametrize("name", ["embedding", "embedding, padding", "index", "gather, last dimension", "take"])
def test_lookups_in_lower_precision(name: str, dtype: torch.dtype, rtol: float) -> None:
    module, ids = make_table(dtype), make_ids(3)
    rows = rows_in_double(module, lambda twin: by_example(LOOKUPS[name](twin.table, ids), 3))
    losses = by_example(LOOKUPS[name](module.table, ids), 3).float()
    J = assert_laws(losses, trained(module), rtol=rtol, rows=rows)
    assert J.weighted_sum(1.0)["table"].dtype == dtype


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, SINGLE), (torch.bfloat16, HALF)])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_in_lower_precision(mode: str, dtype: torch.dtype, rtol: float) -> None:
    module, ids = make_table(dtype), make_ids(3)
    rows = rows_in_double(module, lambda twin: energy(F.embedding_bag(ids, twin.table, mode=mode)))
    assert_laws(energy(F.embedding_bag(ids, module.table, mode=mode)).float(), trained(module), rtol=rtol, rows=rows)


@pytest.mark.parametrize("n", [1, 3])
def test_one_table_read_in_every_way(n: int) -> None:
    module, ids = make_table(), make_ids(n)
    read = [lookup(module.table, ids).reshape(n, -1) for lookup in LOOKUPS.values()]
    read += [F.embedding_bag(ids, module.table, mode=mode) for mode in ("sum", "mean", "max")]
    assert_laws(energy(torch.cat(read, 1)), trained(module))


def test_frozen_table() -> None:
    model = nn.Sequential(nn.Embedding(N_IDS, D), nn.Linear(D, 2)).double()
    model[0].weight.requires_grad_(False)
    assert assert_laws(energy(model(make_ids(3))), trained(model)).names == ("1.weight", "1.bias")


def test_table_frozen_under_trained_weights_of_a_bag() -> None:
    table, weight = make_table().table.detach(), nn.Parameter(torch.randn(N_IDS, dtype=torch.float64))
    ids = make_ids(3)
    out = F.embedding_bag(ids, table, per_sample_weights=weight[ids], mode="sum")
    assert_laws(energy(out), {"weight": weight})


@pytest.mark.parametrize("padding", [None, 3])
def test_bags_with_weights(padding: int | None) -> None:
    module, ids = make_table(), make_ids(3)
    weight = nn.Parameter(torch.randn(N_IDS, dtype=torch.float64))
    for per_sample in (torch.randn(3, 5, dtype=torch.float64), weight[ids].sigmoid()):
        out = F.embedding_bag(ids, module.table, per_sample_weights=per_sample, mode="sum", padding_idx=padding)
        params = trained(module) | ({"weight": weight} if per_sample.requires_grad else {})
        assert_laws(energy(out), params)


def test_weights_of_a_bag_that_are_a_parameter_go_the_general_path() -> None:
    module, ids = make_table(), make_ids(3)
    own = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
    losses = energy(F.embedding_bag(ids, module.table, per_sample_weights=own, mode="sum"))
    J = assert_laws(losses, {**trained(module), "own": own}, ruled=False)
    assert [name for name, _ in J.explain().slow_uses()] == ["own"]


@pytest.mark.parametrize("mode", MODES)
def test_examples_with_different_numbers_of_bags(mode: str) -> None:
    module, owner = make_table(), torch.tensor([2, 0, 0, 1, 2, 2, 0])
    of_bag = energy(F.embedding_bag(make_ids(7), module.table, **MODES[mode]))
    assert_laws(torch.zeros(3, dtype=torch.float64).index_add(0, owner, of_bag), trained(module))


def test_examples_with_different_numbers_of_ids() -> None:
    module, owner = make_table(), torch.tensor([2, 0, 0, 1, 2, 2, 0])
    of_id = energy(F.embedding(make_ids(7)[:, 0], module.table, padding_idx=1))
    assert_laws(torch.zeros(3, dtype=torch.float64).index_add(0, owner, of_id), trained(module))


def test_one_example_at_a_time() -> None:
    module = make_table()
    losses = [F.embedding(ids, module.table).sin().sum() for row in make_ids(3) for ids in row[:1]]
    assert_laws(torch.stack(losses), trained(module))


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_rows_shortened_to_a_norm_in_the_forward_pass(layer: type[nn.Module]) -> None:
    """The forward pass changes the table itself; rows belong to the table as it left it."""
    model, ids = layer(N_IDS, D, max_norm=0.5).double(), make_ids(3)
    before = model.weight.detach().clone()
    losses = energy(model(ids))
    assert not torch.equal(before, model.weight)
    assert_laws(losses, trained(model))
    assert_laws(energy(model(ids)) + energy(model(ids.flip(1))), trained(model))


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_gradients_scaled_by_frequency_go_the_general_path(layer: type[nn.Module]) -> None:
    """The counts are over the whole batch, so no rule for one example's part exists."""
    model = layer(N_IDS, D, scale_grad_by_freq=True).double()
    assert assert_laws(energy(model(make_ids(3))), trained(model), ruled=False).explain().slow_uses()


def test_columns_of_a_table_go_the_general_path() -> None:
    module = make_table()
    J = assert_laws(energy(module.table[:, make_ids(3) % D].transpose(0, 1)), trained(module), ruled=False)
    assert J.explain().slow_uses()


@pytest.mark.parametrize("padding", [None, 3])
def test_a_not_finite_cotangent_at_padding_does_no_harm(padding: int | None) -> None:
    module = make_table()
    ids = torch.tensor([[0, 3], [1, 2]])
    out = F.embedding(ids, module.table, padding_idx=padding)
    weight = torch.ones(2, 2, 1, dtype=torch.float64)
    weight[0, 1] = torch.inf
    assert rg.jacobian((out * weight).sum((1, 2)), module).norms().isfinite().tolist() == [padding is not None, True]


# -- sparse gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("step", ["backward", "loss", "clipped_loss"])
def test_sparse_gradients_stay_sparse(step: str, padding: int | None) -> None:
    """`.grad` is what `losses.backward(c)` makes: sparse, of the same rows of the table."""
    model, ids = nn.Embedding(N_IDS, D, padding_idx=padding, sparse=True).double(), torch.tensor([[0, 3], [5, 5]])
    energy(model(ids)).backward(torch.ones(2, dtype=torch.float64))
    expected, model.weight.grad = model.weight.grad.coalesce(), None
    J = rg.jacobian(energy(model(ids)), model)
    if step == "backward":
        J.backward(1.0)
    elif step == "loss":
        J.loss(1.0).backward()
    else:
        rg.clipped_loss(energy(model(ids)), model, max_norm=1e9, reduction="sum").backward()
    found = model.weight.grad
    assert found.is_sparse
    assert torch.equal(found.coalesce().indices(), expected.indices())
    torch.testing.assert_close(found.to_dense(), expected.to_dense())


def test_absent_positions_are_no_rows_of_a_sparse_gradient() -> None:
    """Examples of different lengths are padded inside; the padding must not touch the table."""
    model, owner = nn.Embedding(N_IDS, D, sparse=True).double(), torch.tensor([0, 0, 0, 1])
    losses = torch.zeros(2, dtype=torch.float64).index_add(0, owner, energy(model(torch.tensor([3, 4, 5, 6]))))
    rg.jacobian(losses, model).backward(1.0)
    assert model.weight.grad.coalesce().indices().tolist() == [[3, 4, 5, 6]]


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_sparse_bags(mode: str) -> None:
    model, ids = nn.EmbeddingBag(N_IDS, D, mode=mode, sparse=True).double(), make_ids(3)
    rg.jacobian(energy(model(ids)), model).backward(1.0)
    found, model.weight.grad = model.weight.grad, None
    energy(model(ids)).sum().backward()
    assert found.is_sparse
    torch.testing.assert_close(found.to_dense(), model.weight.grad.to_dense())


def test_a_sparse_table_tied_to_a_dense_use_has_a_dense_gradient() -> None:
    model, ids = nn.Embedding(N_IDS, D, sparse=True).double(), make_ids(3)
    losses = energy(model(ids) @ model.weight.T)
    losses.sum().backward(retain_graph=True)
    expected, model.weight.grad = model.weight.grad, None
    rg.jacobian(losses, model).backward(1.0)
    assert not model.weight.grad.is_sparse
    torch.testing.assert_close(model.weight.grad, expected)


# -- size --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["embedding", "mean", "max"])
@pytest.mark.parametrize("ask", ["norms", "weighted_sum", "dot", "gram"])
def test_nothing_is_as_large_as_the_table_for_each_example(ask: str, mode: str) -> None:
    n_ids, n, n_positions, d = 100_000, 256, 32, 16
    table = nn.Parameter(torch.randn(n_ids, d))
    ids = torch.randint(n_ids, (n, n_positions))
    if mode == "embedding":
        losses = F.embedding(ids, table).sin().sum((1, 2))
    else:
        losses = F.embedding_bag(ids, table, mode=mode).sin().sum(1)
    J = rg.jacobian(losses, {"table": table})
    arguments = {"weighted_sum": (1.0,), "dot": ([table],)}.get(ask, ())
    with Largest() as largest:
        getattr(J, ask)(*arguments)
    assert largest.bytes <= max(2 * table.nbytes, 2 * factors.CHUNK_BYTES)


@pytest.mark.parametrize("n_ids", [5, 1000])
def test_products_of_lookups_pair_by_pair_and_id_by_id(n_ids: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few ids in many positions and many ids in few; against another batch, in pieces of one id."""
    monkeypatch.setattr(factors, "CHUNK_BYTES", 1)
    table = nn.Parameter(torch.randn(n_ids, D, dtype=torch.float64))
    batches = [torch.randint(n_ids, (n, 6)) for n in (4, 3)]
    losses = [energy(F.embedding(ids, table)) for ids in batches]
    rows = [flat(rows_by_grad(part, {"table": table})) for part in losses]
    first, second = (rg.jacobian(part, {"table": table}) for part in losses)
    scale = torch.outer(rows[0].norm(dim=1), rows[1].norm(dim=1))
    assert_scaled_close(first.gram(second), rows[0] @ rows[1].T, scale)


def test_a_long_sequence_under_a_tied_head() -> None:
    """512 positions meet 512 ids; neither rows of the size of the table nor all pairs of positions at once."""
    n_ids, n, n_positions, d = 3000, 4, 512, 8
    table = nn.Parameter(torch.randn(n_ids, d) / 3)
    ids = torch.randint(n_ids, (n, n_positions))
    scores = F.embedding(ids, table).sin() @ table.T
    losses = F.cross_entropy(scores.flatten(0, 1), ids.flatten().roll(1), reduction="none").reshape(n, -1).mean(1)
    norms = flat(rows_by_grad(losses, {"table": table})).norm(dim=1)
    J = rg.jacobian(losses, {"table": table})
    with Largest() as largest:
        found = J.norms()
    assert_scaled_close(found, norms, norms, 1e-4)
    assert largest.bytes <= scores.nbytes
