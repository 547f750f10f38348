"""Clipping by value and by norm, and the record of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rowgrad.errors import InputError, NonFiniteError
from rowgrad.optim import GradientClip


def model_with(*gradients: list[float]) -> nn.ParameterList:
    params = nn.ParameterList(nn.Parameter(torch.zeros(len(g), dtype=torch.float64)) for g in gradients)
    for p, g in zip(params, gradients, strict=True):
        p.grad = torch.tensor(g, dtype=torch.float64)
    return params


def gradients(params: nn.ParameterList) -> list[list[float]]:
    return [p.grad.tolist() for p in params]


@pytest.mark.parametrize(
    ("mode", "bound", "expected"),
    [
        ("value", 2.0, [[2, 0], [-2, 1]]),
        ("value", 5.0, [[3, 0], [-4, 1]]),
        ("norm", math.sqrt(26) / 2, [[1.5, 0], [-2, 0.5]]),
        ("norm", 6.0, [[3, 0], [-4, 1]]),
        ("normalize", math.sqrt(26) / 2, [[1.5, 0], [-2, 0.5]]),
        ("normalize", math.sqrt(26) * 2, [[6, 0], [-8, 2]]),
    ],
)
def test_what_becomes_of_a_gradient(mode: str, bound: float, expected: list[list[float]]) -> None:
    params = model_with([3, 0], [-4, 1])
    assert GradientClip(params, bound, mode)() == pytest.approx(math.sqrt(26))
    for found, wanted in zip(gradients(params), expected, strict=True):
        assert found == pytest.approx(wanted)


def test_a_cap_is_that_of_torch() -> None:
    ours, theirs = model_with([3, 0], [-4, 1]), model_with([3, 0], [-4, 1])
    GradientClip(ours, 2.0)()
    nn.utils.clip_grad_norm_(theirs.parameters(), 2.0)
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("mode", ["value", "norm", "normalize"])
def test_a_gradient_of_0_and_none_stay(mode: str) -> None:
    params = model_with([0, 0], [0, 0])
    params[1].grad = None
    clip = GradientClip(params, 1.0, mode)
    assert clip() == 0
    assert params[0].grad.tolist() == [0, 0]
    assert params[1].grad is None
    assert clip.acted == 0


def test_the_record_counts_what_changed() -> None:
    params = model_with([3, 4])
    clip, by_value = GradientClip(params, 1.0), GradientClip(params, 0.1, "value")
    assert math.isnan(clip.share)
    assert str(clip) == "GradientClip(1.0, 'norm'): acted in 0 of 0 calls, largest norm 0"
    for scale in (1.0, 0.1, 0.01, 2.0):
        params[0].grad = scale * torch.tensor([3.0, 4.0], dtype=torch.float64)
        clip()
        params[0].grad = scale * torch.tensor([3.0, 4.0], dtype=torch.float64)
        by_value()
    assert (clip.calls, clip.acted, clip.share, clip.largest) == (4, 2, 0.5, 10)
    assert (by_value.acted, by_value.entries_clipped) == (3, 6 / 8)
    assert math.isnan(clip.entries_clipped)
    other = GradientClip(params, 1.0)
    other.load_state_dict(clip.state_dict())
    assert str(other) == str(clip) == "GradientClip(1.0, 'norm'): acted in 2 of 4 calls (50.0%), largest norm 10"


def test_normalizing_acts_on_small_gradients_too() -> None:
    params = model_with([0.3, 0.4])
    clip = GradientClip(params, 1.0, "normalize")
    clip()
    assert params[0].grad.tolist() == pytest.approx([0.6, 0.8])
    assert clip.acted == 1


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("mode", ["value", "norm", "normalize"])
def test_what_is_not_finite(mode: str, bad: float) -> None:
    params = model_with([3, 4], [bad, -5])
    clip = GradientClip(params, 1.0, mode)
    if mode == "value" and bad == math.inf:
        assert clip() == math.inf
        assert gradients(params) == [[1, 1], [1, -1]]
        return
    with pytest.raises(NonFiniteError, match=r"the gradient of 1 holds inf or nan, and no .* bounds that"):
        clip()
    assert params[0].grad.tolist() == [3, 4]
    assert clip.calls == 0


def test_a_norm_beyond_its_dtype() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3e38, 0.0])
    with pytest.raises(NonFiniteError, match="every gradient is finite, but their norm overflows"):
        GradientClip([p], 1.0)()
    GradientClip([p], 1.0, "value")()
    assert p.grad.tolist() == [1, 0]


def test_wrong_modes_and_bounds() -> None:
    params = model_with([1.0])
    with pytest.raises(InputError, match="mode='clip', expected one of: value, norm, normalize"):
        GradientClip(params, 1.0, "clip")
    for bound in (0, -1, math.inf, math.nan):
        with pytest.raises(InputError, match=r"bound=.*, expected a positive finite number"):
            GradientClip(params, bound)


@pytest.mark.parametrize("mode", ["value", "norm", "normalize"])
def test_a_sparse_gradient_becomes_what_a_dense_one_does(mode: str) -> None:
    """Row 1 comes twice, so that its entries are the sums of two."""
    clips, found = [], []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Linear(3, 2)).double()
        (7 * model(torch.tensor([1, 3, 1]))).square().sum().backward()
        clip = GradientClip(model, 0.5, mode)
        norm = clip()
        clips.append((norm, clip.acted, clip.entries_clipped))
        found.append([p.grad.to_dense() for p in model.parameters() if p.grad is not None])
    assert clips[0] == pytest.approx(clips[1], nan_ok=True)
    assert clips[0][1] == 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bound", ["1", None, math.nan])
def test_a_bound_that_is_no_number(bound: object) -> None:
    with pytest.raises(InputError, match=f"GradientClip: bound={bound!r}, expected a positive finite number"):
        GradientClip([nn.Parameter(torch.ones(1))], bound)  # type: ignore[arg-type]
