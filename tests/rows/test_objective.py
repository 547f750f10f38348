"""Clip weights by their table, clipped losses by the loop, token losses by hand."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from tests.reference import rows_by_grad, trainable
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import NoGraphError
from rowgrad.rows.objective import share_clipped

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("norm", "mode", "weight"),
    [
        (0.0, "clip", 1.0),
        (0.5, "clip", 1.0),
        (2.0, "clip", 1.0),
        (8.0, "clip", 0.25),
        (INF, "clip", 0.0),
        (NAN, "clip", 0.0),
        (0.0, "normalize", 0.0),
        (0.5, "normalize", 4.0),
        (8.0, "normalize", 0.25),
        (INF, "normalize", 0.0),
        (NAN, "normalize", 0.0),
    ],
)
def test_clip_weights_by_the_table(norm: float, mode: str, weight: float) -> None:
    assert rg.clip_weights(torch.tensor([norm]), 2.0, mode=mode).tolist() == [weight]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_keep_the_dtype_and_an_empty_batch_is_empty(dtype: torch.dtype) -> None:
    assert rg.clip_weights(torch.tensor([4.0], dtype=dtype), 1.0).dtype is dtype
    assert rg.clip_weights(torch.empty(0, dtype=dtype), 1.0).shape == (0,)


def test_norms_may_be_a_sequence_of_numbers() -> None:
    assert rg.clip_weights([0.5, 2.0], 1.0).tolist() == [1.0, 0.5]
    assert rg.clip_weights(torch.tensor([1, 4]), 2).tolist() == [1.0, 0.5]
    assert rg.clip_weights([], 1.0).shape == (0,)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ({"0": torch.ones(2), "1": torch.ones(2)}, r"norms is a mapping of 2 groups.*max_norm=\{group: bound\}"),
        (["a"], r"norms is a list, expected a tensor of shape \(B,\)"),
        (None, "norms is a NoneType, expected a tensor"),
    ],
    ids=["by group", "words", "nothing"],
)
def test_norms_that_are_no_numbers_are_refused(norms: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        rg.clip_weights(norms, 1.0)  # type: ignore[arg-type]


def test_an_infinite_bound_clips_nothing() -> None:
    assert rg.clip_weights(torch.tensor([1.0, 1e30]), INF).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bound", [0.0, -1.0, NAN])
def test_a_bound_that_is_not_positive_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="expected a positive number"):
        rg.clip_weights(torch.ones(2), bound)


# fmt: off
BOUNDS = {
    "text":         ("1", TypeError, "max_norm='1' is a str; expected a positive number"),
    "nothing":      (None, TypeError, "max_norm=None is a NoneType; expected a positive number"),
    "a list":       ([1.0], TypeError, "is a list; expected a positive number"),
    "a bool":       (True, TypeError, "max_norm=True is a bool; expected a positive number"),
    "too few":      (torch.ones(4), ValueError, r"max_norm has shape \(4,\); expected one bound, or one for each"),
    "in a mapping": ({"weight": 1.0, "bias": None}, TypeError, "max_norm=None is a NoneType; expected a positive"),
}
# fmt: on


@pytest.mark.parametrize("case", BOUNDS)
def test_a_bound_that_is_no_number_is_refused(case: str) -> None:
    bound, error, message = BOUNDS[case]
    model = nn.Linear(3, 1)
    with pytest.raises(error, match=message):
        rg.clipped_loss(model(torch.randn(9, 3)).squeeze(1), model, bound)


@pytest.mark.parametrize("bound", [torch.tensor(0.5), torch.tensor([0.5]), torch.full((2,), 0.5)])
def test_a_bound_may_be_a_tensor_for_all_or_for_each(bound: Tensor) -> None:
    assert rg.clip_weights(torch.tensor([1.0, 0.1]), bound).tolist() == [0.5, 1.0]


def test_norms_are_not_negative() -> None:
    with pytest.raises(ValueError, match="norms: the smallest is -2; norms are not negative"):
        rg.clip_weights(torch.tensor([-1.0, -2.0, NAN, 1.0]), 1.0)


@pytest.mark.parametrize("bound", [1.0, {"": 1.0}])
def test_of_no_examples_the_gradients_are_zeros_as_of_the_plain_loss(bound: float | dict[str, float]) -> None:
    model = nn.Linear(3, 1)
    loss = rg.clipped_loss(model(torch.randn(0, 3)).squeeze(1), model, bound)
    loss.backward()
    assert loss.item() == 0
    assert [p.grad.abs().sum().item() for p in model.parameters()] == [0, 0]


def test_unknown_words_are_refused() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match='mode=\'cut\': expected "clip" or "normalize"'):
        rg.clip_weights(torch.ones(2), 1.0, mode="cut")
    with pytest.raises(ValueError, match='reduction=\'max\': expected "mean" or "sum"'):
        rg.clipped_loss(model(torch.ones(2, 2)).squeeze(1), model, 1.0, reduction="max")
    with pytest.raises(ValueError, match='reduction=\'none\': expected "mean" or "sum"'):
        rg.per_example(torch.ones(2, 2), reduction="none")


def test_the_share_clipped_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="rowgrad"):
        rg.clip_weights(torch.tensor([0.5, 2.0, 3.0, 4.0]), 1.0)
    assert "clipped 0.750 of 4 examples" in caplog.text


def test_the_share_clipped_is_counted_in_the_dtype_of_the_norms() -> None:
    """0.1 in float32 is larger than 0.1 in float64: a norm between the two is clipped."""
    norms = torch.tensor([0.1 + 5e-10, 0.1], dtype=torch.float64)
    assert share_clipped(norms, 0.1) == 0.5
    assert (rg.clip_weights(norms, 0.1) < 1).tolist() == [True, False]


def net() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, 3 * torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("mode", ["clip", "normalize"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_clipped_loss_is_the_loop(mode: str, reduction: str) -> None:
    model, x, y = net()
    rows = rows_by_grad(losses_of(model, x, y), trainable(model))
    norms = torch.cat([r.flatten(1) for r in rows.values()], 1).norm(dim=1)
    bound = float(norms.median())
    weights = [min(1.0, bound / float(n)) if mode == "clip" else bound / float(n) for n in norms]
    size = len(x) if reduction == "mean" else 1
    loss = rg.clipped_loss(losses_of(model, x, y), model, bound, mode=mode, reduction=reduction)
    loss.backward()
    for name, p in model.named_parameters():
        expected = sum(w * row for w, row in zip(weights, rows[name], strict=True)) / size
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-14)
    value = sum(w * v for w, v in zip(weights, losses_of(model, x, y).tolist(), strict=True)) / size
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert loss.share_clipped == pytest.approx(0.4)


def test_groups_are_clipped_each_by_its_own_norm() -> None:
    model, x, y = net()
    rows = rows_by_grad(losses_of(model, x, y), trainable(model))
    rg.clipped_loss(losses_of(model, x, y), model, {"0": 0.1, "2": 0.2}, reduction="sum").backward()
    for prefix, bound in (("0", 0.1), ("2", 0.2)):
        names = [n for n in rows if n.startswith(prefix)]
        norms = torch.cat([rows[n].flatten(1) for n in names], 1).norm(dim=1)
        weights = (bound / norms).clamp(max=1)
        for n in names:
            expected = torch.einsum("b,b...->...", weights, rows[n])
            torch.testing.assert_close(model.get_parameter(n).grad, expected, rtol=1e-12, atol=1e-14)


def test_groups_must_cover_every_parameter() -> None:
    model, x, y = net()
    with pytest.raises(ValueError, match=r"no weights for 2\.weight and 1 more"):
        rg.clipped_loss(losses_of(model, x, y), model, {"0": 0.1})


@pytest.mark.parametrize("groups", [{"": 1.0, "0": 0.1}, {"0": 0.1, "": 1.0}, {"0": 1.0, "2": 1.0, "0.weight": 1.0}])
def test_groups_must_not_overlap(groups: dict[str, float]) -> None:
    model, x, y = net()
    with pytest.raises(ValueError, match=r"max_norm: 0\.weight is in 2 groups, '.*' and '.*' among them"):
        rg.clipped_loss(losses_of(model, x, y), model, groups)


def test_an_example_is_left_out_of_all_groups_or_of_none() -> None:
    parts = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)}).double()
    x, z = torch.randn(2, 4, 3, dtype=torch.float64)
    z[1] = torch.nan

    def losses(chosen: list[int]) -> Tensor:
        return (parts["a"](x[chosen]) + parts["b"](z[chosen])).squeeze(1)

    groups = {"a": 1e6, "b": 1e6}
    loss = rg.clipped_loss(losses([0, 1, 2, 3]), parts, groups, reduction="sum")
    loss.backward()
    found = [p.grad.clone() for p in parts.parameters()]
    parts.zero_grad()
    expected = rg.clipped_loss(losses([0, 2, 3]), parts, groups, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach())
    torch.testing.assert_close(found, [p.grad for p in parts.parameters()])


def test_a_sparse_gradient_may_be_asked_for_with_its_graph() -> None:
    table = torch.nn.Embedding(9, 3, sparse=True)
    ids = torch.tensor([[0, 1], [1, 2]])
    (found,) = torch.autograd.grad(
        rg.clipped_loss(table(ids).square().sum((1, 2)), table, 1e6, reduction="sum"), [table.weight], create_graph=True
    )
    (expected,) = torch.autograd.grad(table(ids).square().sum(), [table.weight])
    torch.testing.assert_close(found.to_dense().detach(), expected.to_dense())


def test_a_second_derivative_is_refused() -> None:
    model, x, y = net()
    loss = rg.clipped_loss(losses_of(model, x, y), model, 1e6)
    gradients = torch.autograd.grad(loss + sum(p.square().sum() for p in model.parameters()), list(model.parameters()),
                                    create_graph=True)  # fmt: skip
    with pytest.raises(NoGraphError, match="cannot be differentiated again"):
        gradients[0].sum().backward()


def test_an_unknown_group_is_named() -> None:
    model, x, y = net()
    with pytest.raises(KeyError, match=r"'fc' is not among the parameters; known names start with: 0\.weight"):
        rg.clipped_loss(losses_of(model, x, y), model, {"fc": 0.1})


def test_a_non_finite_example_is_left_out() -> None:
    model, x, y = net()
    rows = rows_by_grad(losses_of(model, x, y), trainable(model))
    x[2] = INF
    rg.clipped_loss(losses_of(model, x, y), model, 1e6, reduction="sum").backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, rows[name][[0, 1, 3, 4]].sum(0), rtol=1e-12, atol=1e-14)


def test_the_clipped_loss_is_a_loss_like_any_other() -> None:
    """Scaled by a scaler, divided by the number of accumulated batches: the gradient follows."""
    model, x, y = net()
    rg.clipped_loss(losses_of(model, x, y), model, 0.5).backward()
    once = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for _ in range(2):
        (rg.clipped_loss(losses_of(model, x, y), model, 0.5) * 8 / 2).backward()
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 8 * g)


def test_token_losses_to_examples_by_hand() -> None:
    tokens = torch.tensor([[1.0, 2.0, 3.0], [4.0, NAN, 6.0], [7.0, 8.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    assert rg.per_example(tokens, mask).tolist() == [1.5, 5.0, 0.0]
    assert rg.per_example(tokens, mask, reduction="sum").tolist() == [3.0, 10.0, 0.0]
    assert rg.per_example(tokens[[0, 2]]).tolist() == [2.0, 8.0]
    assert rg.per_example(tokens[[0, 2]], torch.tensor([1, 1, 0])).tolist() == [1.5, 7.5]
    assert rg.per_example(torch.ones(2, 3, 4), torch.ones(2, 3, 1)).tolist() == [1.0, 1.0]
    assert rg.per_example(torch.ones(0, 3)).shape == (0,)


def test_masked_positions_send_no_gradient_even_where_they_are_not_finite() -> None:
    tokens = torch.tensor([[1.0, INF], [NAN, 2.0]], requires_grad=True)
    rg.per_example(tokens, torch.eye(2, dtype=torch.bool)).sum().backward()
    assert tokens.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mask of shape \(4,\) does not broadcast to the losses' \(2, 3\)"):
        rg.per_example(torch.ones(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match=r"token_losses is a scalar, expected \(B, ...\)"):
        rg.per_example(torch.ones(()))


def test_rows_of_token_losses_are_those_of_the_sentences() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double()
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0], [6, 1, 1, 2]])
    mask = ids != 0
    losses = rg.per_example(F.cross_entropy(model(ids).transpose(1, 2), ids.roll(-1, 1), reduction="none"), mask)
    rows = rows_by_grad(losses, trainable(model))
    expected = torch.cat([r.flatten(1) for r in rows.values()], 1).norm(dim=1)
    torch.testing.assert_close(rg.grad_norms(losses, model), expected, rtol=1e-12, atol=1e-14)


def test_gradients_are_handed_over_and_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    places: dict[str, int] = {}
    original = rg.Jacobian._gradients

    def watched(self: rg.Jacobian, *args: object, **options: object) -> dict[str, Tensor]:
        found = original(self, *args, **options)
        places.update({name: g.data_ptr() for name, g in found.items()})
        return found

    monkeypatch.setattr(rg.Jacobian, "_gradients", watched)
    model = nn.Linear(3, 4)
    for backward in (lambda J: J.backward(0.5), lambda J: J.loss(0.5).backward()):
        model.zero_grad(set_to_none=True)
        backward(rg.jacobian(model(torch.randn(5, 3)).square().sum(1), model))
        assert places == {name: p.grad.data_ptr() for name, p in model.named_parameters() if p.grad is not None}


def test_rows_that_overflow_for_their_scale_reach_the_scaler() -> None:
    """With weight 0 in place of nan a scaler would go on doubling, and the longest gradients would be left out."""
    model = torch.nn.Linear(3, 1)
    x = torch.tensor([[1.0, 2.0, 3.0], [1e3, 1e3, 1e3]])

    def gradient(scale: float, bound: object = 1.0) -> torch.Tensor:
        model.zero_grad()
        rg.clipped_loss(100 * model(x).squeeze(1), model, bound, loss_scale=scale).backward()
        return model.weight.grad

    with torch.no_grad():
        model.weight.fill_(1e-4)
    assert gradient(1.0).isfinite().all()
    torch.testing.assert_close(gradient(1024.0), gradient(1.0))
    for bound in (1.0, {"weight": 1.0, "bias": 1.0}):
        assert not gradient(1e37, bound).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_many_positions_keep_their_digits_in_half_precision(dtype: torch.dtype) -> None:
    losses = torch.full((2, 8192), 10.0, dtype=dtype)
    assert rg.per_example(losses).tolist() == [10, 10]
    assert rg.per_example(losses).dtype == dtype
    assert rg.per_example(torch.full((1, 1000), 3.0, dtype=dtype)).item() == 3
