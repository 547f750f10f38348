"""Right at the edges: few examples, dead and infinite ones, narrow dtypes, scalers, compiled and distributed models."""

from __future__ import annotations

import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.cases import CASES, Setup
from tests.reference import assert_rows_close, assert_scaled_close, flat, rows_by_grad, rows_by_loop
from tests.rows.distributed import run_on_two_processes
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.rows.linear import matrix_second

KINDS = [
    "linear",
    "linear rank 3",
    "conv2d",
    "conv1d depthwise",
    "conv2d transposed",
    "embedding",
    "embedding, sparse",
    "embedding bag, mean",
    "layer norm",
    "group norm",
    "batch norm 1d, eval",
    "instance norm 2d",
    "prelu, a slope per channel",
    "attention, sequence first",
    "gru",
    "lstm, float32",
    "language model",
    "class token",
    "weight norm",
    "low-rank update, merged",
    "positions looked up by arange",
    "tokens flattened, sequence first",
]
each_kind = pytest.mark.parametrize("name", KINDS)


def jacobian(losses: Tensor, params: Any, **options: Any) -> rg.Jacobian:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rg.RowgradWarning)
        return rg.jacobian(losses, params, **options)


# -- several at once ---------------------------------------------------------------------------------------------------


def test_threads_that_ask_at_once_leave_gradients_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 2))
    x = torch.randn(64, 6, 3)
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    expected = rg.grad_norms(model(x).square().sum((1, 2)), model)

    def ask(_: int) -> bool:
        found = [rg.grad_norms(model(x).square().sum((1, 2)), model) for _ in range(50)]
        return all(torch.allclose(norms, expected) for norms in found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))
    for p, grad in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad)


# -- nothing at all ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_parameters_without_entries() -> None:
    model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2)).double()
    losses = model(torch.randn(4, 3, dtype=torch.float64)).square().sum(1)
    J = rg.jacobian(losses, model, retain_graph=True)
    A = flat(rows_by_grad(losses, dict(model.named_parameters())))
    torch.testing.assert_close(J.dense(), A)
    torch.testing.assert_close(J.gram(), A @ A.T)
    torch.testing.assert_close(J.norms(), A.norm(dim=1))
    assert J.dense(as_dict=True)["0.weight"].shape == (4, 0, 3)
    assert J.weighted_sum(1.0)["1.weight"].shape == (2, 0)


def test_no_row_of_those_too_large_to_keep() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    J = jacobian(model(torch.randn(5, 3, dtype=torch.float64)).squeeze(1), model, max_bytes=0)
    direction = {name: p.detach() for name, p in model.named_parameters()}
    n_parameters = J.shape[1]
    for key in ([], slice(0, 0)):
        assert J[key].norms().shape == J[key].dot(direction).shape == J[key].diag_gram(J[key]).shape == (0,)
        assert J[key].dense().shape == (0, n_parameters)
        assert J[key].gram(J).shape == (0, 5)
        assert J[key].weighted_sum(1.0)["0.weight"].tolist() == torch.zeros(4, 3).tolist()


def test_two_batches_without_tokens() -> None:
    table = nn.Embedding(9, 3)
    one, other = (rg.jacobian(table(torch.zeros(4, 0, dtype=torch.long)).sum((1, 2)), table) for _ in range(2))
    assert one.diag_gram(other).tolist() == [0.0] * 4


# -- how many examples -------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_examples(name: str, n: int) -> None:
    case = CASES[name]
    setup = case.build(n=n)
    rows = rows_by_grad(setup.losses(), setup.params)
    norms = flat(rows).norm(dim=1)
    J = jacobian(setup.losses(), setup.model)
    assert_rows_close(J.dense(as_dict=True), rows, case.rtol)
    assert_scaled_close(J.norms(), norms, norms, case.rtol)
    assert_scaled_close(J.gram(), flat(rows) @ flat(rows).T, torch.outer(norms, norms), case.rtol)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.independent and c.fast and "ragged" not in c.tags])
def test_one_example_is_never_slow(name: str) -> None:
    """Whatever the path, one example costs one pass: no warning."""
    case = CASES[name]
    setup = case.build(n=1)
    losses = setup.losses()
    rows = rows_by_grad(losses, setup.params)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rg.RowgradWarning)
        J = rg.jacobian(losses, setup.model)
    assert_rows_close(J.dense(as_dict=True), rows, case.rtol)


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "layer norm", "language model"])
def test_no_example_at_all(name: str) -> None:
    """Every product of an empty batch is empty or zero, and training on it changes nothing."""
    setup = CASES[name].build(n=0)
    J = rg.jacobian(setup.losses(), setup.model)
    n_params = sum(p.numel() for p in setup.params.values())
    assert len(J) == 0
    assert J.shape == (0, n_params)
    assert J.norms().shape == J.sq_norms().shape == (0,)
    assert all(v.shape == (0,) for v in J.norms("parameter").values())
    assert J.gram().shape == (0, 0)
    assert J.dense().shape == (0, n_params)
    assert (J @ {p: torch.ones_like(v) for p, v in setup.params.items()}).shape == (0,)
    for p, total in J.weighted_sum(1.0).items():
        assert total.shape == setup.params[p].shape
        assert not total.any()
    assert rg.grad_norms(setup.losses(), setup.model).shape == (0,)
    J.backward(torch.ones(0))
    loss = rg.jacobian(setup.losses(), setup.model).loss(1.0)
    assert loss.item() == 0
    loss.backward()
    for p in setup.params.values():
        assert p.grad is None or not p.grad.any()


def test_a_clipped_loss_of_no_example() -> None:
    setup = CASES["linear"].build(n=0)
    loss = rg.clipped_loss(setup.losses(), setup.model, 1.0)
    assert loss.item() == 0
    loss.backward()


@each_kind
def test_a_last_smaller_batch(name: str) -> None:
    """Batches of 5, 5, 2, 5 and 1 in a row, as at the end of an epoch."""
    case = CASES[name]
    for seed, n in enumerate((5, 5, 2, 5, 1)):
        setup = case.build(seed=seed, n=n)
        rows = rows_by_grad(setup.losses(), setup.params)
        assert_rows_close(jacobian(setup.losses(), setup.model).dense(as_dict=True), rows, case.rtol)


@pytest.mark.parametrize("n", [7, 33, 130])
def test_more_examples(n: int) -> None:
    """More than the codes of a proof have words of two or three digits for."""
    for name in ("linear", "packed tokens of ragged lengths", "batch norm 1d, training", "batch sorted by its content"):
        setup = CASES[name].build(n=n)
        losses = setup.losses()
        rows = rows_by_grad(losses, setup.params)
        assert_rows_close(jacobian(losses, setup.model).dense(as_dict=True), rows)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("sequence_first", [False, True])
def test_as_many_positions_and_features_as_examples(n: int, sequence_first: bool) -> None:
    model = nn.Sequential(nn.Linear(n, n), nn.LayerNorm(n), nn.Tanh(), nn.Linear(n, n)).double()
    positions = nn.Parameter(torch.randn(n, n, dtype=torch.float64))
    params = dict(model.named_parameters()) | {"positions": positions}

    def losses() -> Tensor:
        h = model(
            (x.transpose(0, 1) if sequence_first else x) + (positions.unsqueeze(1) if sequence_first else positions)
        )
        return (h.transpose(0, 1) if sequence_first else h).square().sum((1, 2))

    x = torch.randn(n, n, n, dtype=torch.float64)
    assert_rows_close(rg.jacobian(losses(), params).dense(as_dict=True), rows_by_grad(losses(), params))


# -- dead examples and infinite ones -----------------------------------------------------------------------------------


@each_kind
def test_losses_without_any_slope(name: str) -> None:
    case = CASES[name]
    setup = case.build()
    J = jacobian(setup.losses() * 0, setup.model)
    assert not J.norms().any()
    assert not J.dense().any()
    jacobian(setup.losses() * 0, setup.model).backward(1.0)
    rows = rows_by_grad(setup.losses(), setup.params)
    assert_rows_close(jacobian(setup.losses(), setup.model).dense(as_dict=True), rows, case.rtol)


@each_kind
def test_one_loss_without_slope(name: str) -> None:
    case = CASES[name]
    setup = case.build()
    gate = torch.ones(case.n, dtype=case.dtype)
    gate[1] = 0
    rows = rows_by_grad(setup.losses() * gate, setup.params)
    assert not flat(rows)[1].any()
    assert_rows_close(jacobian(setup.losses() * gate, setup.model).dense(as_dict=True), rows, case.rtol)


def test_all_units_dead_and_then_alive() -> None:
    """A call in which every cotangent of the first layer is zero proves nothing about the next."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    alive = model[0].bias.detach().clone()
    for bias in (alive, torch.full_like(alive, -100), alive, alive + 1):
        with torch.no_grad():
            model[0].bias.copy_(bias)
        losses = model(x).square().sum(1)
        rows = rows_by_grad(losses, dict(model.named_parameters()))
        assert_rows_close(rg.jacobian(losses, model).dense(as_dict=True), rows)


NON_FINITE = [
    "linear",
    "linear rank 3",
    "conv2d",
    "layer norm",
    "group norm",
    "prelu, a slope per channel",
    "attention, batch first",
    "gru",
    "scale and shift",
    "module applied repeatedly",
    "tokens flattened, sequence first",
    "positions of shape (T, d)",
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300], ids=["nan", "inf", "overflow"])
@pytest.mark.parametrize("name", NON_FINITE)
def test_a_non_finite_example_touches_no_other_row(name: str, value: float) -> None:
    case = CASES[name]
    setup = case.build()
    clean = rows_by_loop(setup.model, setup.batch, setup.loss_fn)
    x = setup.batch[0].clone()
    x[2] = value
    spoiled = replace(setup, batch=(x, *setup.batch[1:]))
    J = jacobian(spoiled.losses(), setup.model)
    own = rows_by_grad(spoiled.take([2]).losses(), setup.params)
    assert flat(own).norm().isfinite() or not J.norms()[2].isfinite()
    others = [0, 1, 3]
    assert_rows_close(J[others].dense(as_dict=True), {p: r[others] for p, r in clean.items()}, case.rtol)
    norms = flat(clean).norm(dim=1)
    assert_scaled_close(J.norms()[others], norms[others], norms[others], case.rtol)
    assert_scaled_close(J.gram()[0, 3], (flat(clean)[0] * flat(clean)[3]).sum(), norms[0] * norms[3], case.rtol)


def test_a_non_finite_example_left_out_of_training() -> None:
    setup = CASES["linear rank 3"].build()
    x = setup.batch[0].clone()
    x[1] = float("inf")
    spoiled = replace(setup, batch=(x,))
    clean = rows_by_loop(setup.model, setup.batch, setup.loss_fn)
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    expected = {p: torch.einsum("b,b...->...", keep, r) for p, r in clean.items()}
    jacobian(spoiled.losses(), setup.model).backward(1.0, nonfinite="zero")
    for name, p in setup.params.items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-14)
        p.grad = None
    rg.clipped_loss(spoiled.losses(), setup.model, 1e9, reduction="sum").backward()
    for name, p in setup.params.items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-14)
        p.grad = None
    jacobian(spoiled.losses(), setup.model).backward(1.0, nonfinite="propagate")
    assert not any(bool(p.grad.isfinite().all()) for p in setup.params.values())


# -- narrow dtypes -----------------------------------------------------------------------------------------------------


def _narrow(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4)).to(dtype)
    return model, torch.randn(5, 6).to(dtype), torch.randint(4, (5,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_by_the_float32_copy(dtype: torch.dtype) -> None:
    """Within 3% of the rows of the same weights in float32: the forward pass rounds, the rows do not add to it."""
    model, x, y = _narrow(dtype)
    J = rg.jacobian(F.cross_entropy(model(x), y, reduction="none"), model)
    wide = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))
    wide.load_state_dict(model.state_dict())
    losses = F.cross_entropy(wide(x.float()), y, reduction="none")
    assert_rows_close(J.dense(as_dict=True), rows_by_grad(losses, dict(wide.named_parameters())), 3e-2)
    assert J.norms().dtype == torch.float32
    assert J.explain().slow_uses() == []


def test_float16_gradients_below_its_range_need_a_loss_scale() -> None:
    """Losses of size 1e-7: unscaled the rows underflow, scaled they come back in units of the losses."""
    model = nn.Linear(4, 3).half()
    x = torch.randn(5, 4).half()

    def losses() -> Tensor:
        return 1e-6 * model(x).float().square().sum(1)

    wide = nn.Linear(4, 3)
    wide.load_state_dict(model.state_dict())
    expected = rows_by_grad(1e-6 * wide(x.float()).square().sum(1), dict(wide.named_parameters()))
    norms = flat(expected).norm(dim=1)
    J = rg.jacobian(losses(), model, loss_scale=2.0**16)
    assert_rows_close(J.dense(as_dict=True), expected, 1e-2)
    assert_scaled_close(J.norms(), norms, norms, 1e-2)
    assert_scaled_close(rg.grad_norms(losses(), model, loss_scale=2.0**16), norms, norms, 1e-2)
    scaled = rg.jacobian(losses(), model, loss_scale=2.0**16).loss(1.0)
    torch.testing.assert_close(scaled.detach(), losses().sum().detach(), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("name", ["linear", "batch norm 1d, training", "penalty on the weights", "weight norm"])
def test_a_loss_scale_changes_no_row(name: str) -> None:
    setup = CASES[name].build()
    rows = rows_by_grad(setup.losses(), setup.params)
    for scale in (1024.0, 2.0**-7, 3.0):
        assert_rows_close(jacobian(setup.losses(), setup.model, loss_scale=scale).dense(as_dict=True), rows)


def test_a_loss_scale_beyond_the_dtype_of_the_losses_is_refused() -> None:
    model = nn.Linear(3, 1).half()
    losses = model(torch.randn(4, 3, dtype=torch.float16)).squeeze(1)
    with pytest.raises(ValueError, match=r"loss_scale=65536\.0: losses are torch\.float16, which ends at 65504; lower"):
        rg.jacobian(losses, model, loss_scale=65536.0)


def test_another_default_device_changes_nothing() -> None:
    setup = CASES["linear rank 3"].build()
    expected = flat(rows_by_grad(setup.losses(), setup.params))
    for verify in ("cached", "always"):
        losses = setup.losses()
        with torch.device("meta"):
            J = rg.jacobian(losses, setup.model, verify=verify, retain_graph=True)
            norms = J.norms()
        torch.testing.assert_close(norms, expected.norm(dim=1))
    silent = nn.Linear(3, 1)
    with torch.device("meta"):
        norms = rg.grad_norms(
            (silent(torch.ones(4, 3, device="cpu")) * torch.zeros((), device="cpu")).squeeze(1), silent
        )
    assert norms.tolist() == [0.0] * 4


def test_calls_inside_autocast_and_under_no_grad() -> None:
    setup = CASES["autocast to bfloat16"].build()
    expected = rg.jacobian(setup.losses(), setup.model).dense()
    losses = setup.losses()
    with torch.autocast("cpu", torch.bfloat16):
        J = rg.jacobian(losses, setup.model)
        assert torch.equal(J.norms(), rg.jacobian(setup.losses(), setup.model).norms())
    with torch.no_grad():
        assert torch.equal(J.dense(), expected)
        J.weighted_sum(1.0)
        J.backward(1.0)
    assert all(p.grad is not None and p.grad.grad_fn is None for p in setup.params.values())


def test_a_scaler_with_accumulation_of_gradients() -> None:
    """Two steps of two micro-batches each under a gradient scaler, against the same steps on the losses' mean."""

    def train(ours: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
        for _ in range(2):
            for _ in range(2):
                x, y = torch.randn(6, 4), torch.randint(3, (6,))
                losses = F.cross_entropy(model(x), y, reduction="none")
                c = torch.full((6,), 1 / 6)
                loss = rg.jacobian(losses, model).loss(c) if ours else (c * losses).sum()
                scaler.scale(loss / 2).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        return [p.detach() for p in model.parameters()]

    torch.testing.assert_close(train(ours=True), train(ours=False), rtol=1e-5, atol=1e-7)


# -- around the model --------------------------------------------------------------------------------------------------


def test_the_same_dropout_mask_in_rows_and_losses() -> None:
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.ReLU(), nn.Linear(50, 1)).double()
    losses = model(torch.randn(6, 4, dtype=torch.float64)).squeeze(1).square()
    rows = rows_by_grad(losses, dict(model.named_parameters()))
    state = torch.get_rng_state()
    assert_rows_close(rg.jacobian(losses, model).dense(as_dict=True), rows)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_then_evaluation_then_training() -> None:
    """Batch norm changes from coupled to independent and back, at equal shapes."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    for mode in (True, False, True, False):
        model.train(mode)
        losses = model(x).square().sum(1)
        rows = rows_by_grad(losses, dict(model.named_parameters()))
        J = jacobian(losses, model)
        assert_rows_close(J.dense(as_dict=True), rows)
        assert bool(J.couplings) == mode


def test_parameters_given_in_every_form() -> None:
    setup = CASES["linear"].build()
    model = setup.model
    expected = flat(rows_by_grad(setup.losses(), setup.params))
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}], lr=1.0
    )
    forms = [
        model,
        list(model.parameters()),
        model.parameters(),
        model.named_parameters(),
        dict(model.named_parameters()),
        optimizer.param_groups,
        torch.optim.SGD(model.named_parameters(), lr=0.1).param_groups,
        nn.DataParallel(model),
    ]
    for params in forms:
        assert_rows_close(rg.jacobian(setup.losses(), params).dense(), expected)
    one = rg.jacobian(setup.losses(), model[0].weight)
    assert_rows_close(one.dense(), expected[:, : model[0].weight.numel()])


def test_names_are_those_of_the_wrapped_model() -> None:
    """Wrappers add no prefix, wherever they stand; a part of the model that is called "module" keeps its name."""
    setup = CASES["linear"].build()
    model, names = setup.model, tuple(setup.params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model)  # not run, so nothing is compiled
    forms = {
        nn.DataParallel(model): names,
        compiled: names,
        nn.DataParallel(compiled): names,
        nn.ModuleDict({"body": nn.DataParallel(compiled)}): tuple(f"body.{n}" for n in names),
        nn.ModuleDict({"module": model}): tuple(f"module.{n}" for n in names),
        nn.DataParallel(nn.ModuleDict({"module": model})): tuple(f"module.{n}" for n in names),
        nn.ModuleDict({"module": nn.ModuleDict({"module": model})}): tuple(f"module.module.{n}" for n in names),
    }
    for params, expected in forms.items():
        assert rg.jacobian(setup.losses(), params).names == expected
    given = {f"module.{n}": p for n, p in setup.params.items()}
    assert rg.jacobian(setup.losses(), given).names == tuple(given)


def test_a_part_called_module_beside_one_of_the_same_names() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.weight = nn.Linear(3, 3, bias=False), nn.Parameter(torch.randn(3))

    model = Model()
    losses = (model.module(torch.randn(4, 3)) * model.weight).square().sum(1)
    assert rg.jacobian(losses, model).names == ("weight", "module.weight")


def test_modules_and_tensors_as_keys() -> None:
    setup = CASES["linear"].build()
    J = rg.jacobian(setup.losses(), setup.model)
    first = setup.model[0]
    by = J.norms({"w": first.weight, "layer": first, "names": ["0.weight", "0.bias"], "all": ""})
    torch.testing.assert_close(by["layer"], by["names"])
    torch.testing.assert_close(by["all"], J.norms())
    torch.testing.assert_close(J[first].norms(), by["layer"])
    torch.testing.assert_close(J[first.weight].norms(), by["w"])


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (2, [2]),
        (-1, [3]),
        (torch.tensor(1), [1]),
        (np.int64(1), [1]),
        ([3, 0, 3], [3, 0, 3]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        (range(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        (np.array([1, 2]), [1, 2]),
        (torch.tensor([[1], [3]], dtype=torch.int32), [1, 3]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        ([False, True, False, False], [1]),
        ([], []),
        (slice(4, None), []),
    ],
    ids=str,
)
def test_examples_as_keys(key: object, expected: list[int]) -> None:
    setup = CASES["linear"].build()
    J = rg.jacobian(setup.losses(), setup.model)
    assert torch.equal(J[key].losses, J.losses[expected])
    assert_rows_close(J[key].dense(), J.dense()[expected])


def test_several_modules_as_a_key() -> None:
    setup = CASES["linear"].build()
    J = rg.jacobian(setup.losses(), setup.model)
    assert J[[setup.model[2], setup.model[0].bias]].names == ("0.bias", "2.weight", "2.bias")


def test_names_left_out_of_a_direction_count_as_zero() -> None:
    setup = CASES["linear"].build()
    J = rg.jacobian(setup.losses(), setup.model)
    v = torch.randn_like(setup.model[2].weight)
    whole = {name: torch.zeros_like(p) for name, p in setup.params.items()} | {"2.weight": v}
    torch.testing.assert_close(J @ {"2.weight": v}, J @ whole)
    assert not (J @ {}).any()


def test_a_parameter_under_two_names_answers_to_both() -> None:
    setup = CASES["one parameter under two names"].build()
    J = rg.jacobian(setup.losses(), setup.model)
    assert "2.weight" not in J.names
    torch.testing.assert_close(J["2.weight"].norms(), J["0.weight"].norms())


def test_losses_on_another_dtype_than_the_parameters() -> None:
    model = nn.Linear(3, 2)
    losses = model(torch.randn(4, 3)).double().square().sum(1)
    rows = rows_by_grad(losses, dict(model.named_parameters()))
    assert_rows_close(rg.jacobian(losses, model).dense(as_dict=True), rows, 1e-5)


def test_large_and_small_rows_in_one_batch() -> None:
    """Rows of 1e-12 beside rows of 1e+12, each right by its own norm."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    scale = 10.0 ** torch.linspace(-12, 12, 7, dtype=torch.float64)
    losses = model(torch.randn(7, 3, dtype=torch.float64)).square().sum(1) * scale
    rows = rows_by_grad(losses, dict(model.named_parameters()))
    J = rg.jacobian(losses, model)
    norms = flat(rows).norm(dim=1)
    assert_rows_close(J.dense(as_dict=True), rows)
    assert_scaled_close(J.norms(), norms, norms)
    assert_scaled_close(J.gram(), flat(rows) @ flat(rows).T, torch.outer(norms, norms))


# -- compiled regions --------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("donated", [False, True], ids=["buffers kept", "buffers donated"])
def test_a_compiled_region_is_exact_or_refused(donated: bool) -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with warnings.catch_warnings(), torch._functorch.config.patch(donated_buffer=donated):
        warnings.simplefilter("ignore")
        body = torch.compile(nn.Sequential(*model[:2]))
        x = torch.randn(5, 3)
        expected = rows_by_grad(model(x).square().sum(1), dict(model.named_parameters()))
        losses = model[2](body(x)).square().sum(1)
        try:
            J = rg.jacobian(losses, model)
        except rg.RowgradError as error:
            assert "compiled" in str(error)  # noqa: PT017 (either outcome is right, a wrong row is not)
            return
    assert_rows_close(J.dense(as_dict=True), expected, 1e-5)


# -- more than one process ---------------------------------------------------------------------------------------------


def test_data_parallel_training_reduces_as_usual() -> None:
    """Two processes: J.backward and J.loss leave the gradients that DDP's own backward leaves, on both."""
    run_on_two_processes("ddp")


# -- in place ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["in-place activations", "in-place arithmetic", "in-place arithmetic on parts"])
def test_in_place_operations_take_rules(name: str) -> None:
    setup: Setup = CASES[name].build(n=3)
    losses = setup.losses()
    rows = rows_by_grad(losses, setup.params)
    J = rg.jacobian(losses, setup.model)
    assert_rows_close(J.dense(as_dict=True), rows)
    assert J.explain().slow_uses() == []


# -- no dimension ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
def test_losses_stacked_from_single_numbers() -> None:
    w = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
    x, y = w.unbind()
    J = rg.jacobian(torch.stack([2 * x**2, (1 - x) * y]), {"w": w})
    assert J.dense().tolist() == [[12, 0], [2, -2]]


def test_what_one_rule_worked_out_is_not_taken_for_another_ones() -> None:
    """Two tables of rules on equal graphs; the second leaves out a scale at the same use."""
    model = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    rules = rg.RULES | {("AddmmBackward0", 2): partial(matrix_second, saved="mat1", scale=None)}
    for table in (rg.RULES, rg.RULES, rules):  # what is worked out is kept from the second call on
        losses = torch.addmm(model.bias, x, model.weight.T, alpha=2).sum(1)
        norms = rg.jacobian(losses, model, rules=table)["weight"].norms()
        factor = 2 if table is rg.RULES else 1
        torch.testing.assert_close(norms, factor * (2 * x.square().sum(1)).sqrt())
