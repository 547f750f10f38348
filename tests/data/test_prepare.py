"""Standardized inputs, splits, and planted errors."""

from __future__ import annotations

import pytest
import torch

from rowgrad.data.corrupt import flip_labels, permute_targets
from rowgrad.data.split import split_rows
from rowgrad.data.table import standardize
from rowgrad.errors import InputError


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.uint8, torch.int64])
def test_standardized_by_the_chosen_rows(dtype: torch.dtype) -> None:
    features = (torch.rand(40, 7, generator=_generator()) * 100).to(dtype)
    rows = torch.arange(30)
    standardized, means, deviations = standardize(features, rows, block=3)
    chosen = features[rows].double()
    torch.testing.assert_close(means, chosen.mean(0))
    torch.testing.assert_close(deviations, chosen.std(0, correction=0))
    torch.testing.assert_close(standardized.double(), (features.double() - means) / deviations, rtol=1e-6, atol=1e-6)
    assert standardized.dtype == torch.float32


def test_a_constant_column_becomes_zero_even_where_the_mean_is_rounded() -> None:
    features = torch.full((1001, 2), 0.1, dtype=torch.float64)
    features[:, 1] = torch.arange(1001)
    standardized, _, _ = standardize(features, torch.arange(1001))
    assert (standardized[:, 0] == 0).all()
    assert standardized[:, 1].std(correction=0) == pytest.approx(1)


def test_a_large_offset_is_taken_off_before_rounding_to_float32() -> None:
    features = 1.7e9 + torch.arange(50, dtype=torch.float64)[:, None]
    standardized, _, _ = standardize(features, torch.arange(50))
    assert len(standardized.unique()) == 50


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_flipped_labels(share: float) -> None:
    targets = torch.randint(5, (200,), generator=_generator())
    before = targets.clone()
    flipped, planted = flip_labels(targets, 5, share, _generator(1))
    assert planted.sum() == share * 200
    assert torch.equal(flipped != targets, planted)
    assert ((flipped >= 0) & (flipped < 5)).all()
    assert torch.equal(targets, before)
    again, _ = flip_labels(targets, 5, share, _generator(1))
    assert torch.equal(flipped, again)


def test_every_other_label_is_planted_about_as_often() -> None:
    flipped, planted = flip_labels(torch.zeros(30_000, dtype=torch.int64), 4, 0.5, _generator())
    counts = torch.bincount(flipped[planted], minlength=4)
    assert counts[0] == 0
    assert (counts[1:] - 5000).abs().max() < 5 * 5000**0.5  # five standard deviations


def test_permuted_targets() -> None:
    targets = torch.rand(100, generator=_generator(), dtype=torch.float64)
    permuted, planted = permute_targets(targets, 0.2, _generator(1))
    assert planted.sum() == 20
    assert torch.equal(permuted.sort().values, targets.sort().values)
    assert torch.equal(permuted != targets, planted)
    few, planted = permute_targets(targets[:3], 0.01, _generator(1))  # one alone has nobody to trade with
    assert planted.sum() == 2
    assert torch.equal(few.sort().values, targets[:3].sort().values)


@pytest.mark.parametrize("share", [0, -0.1, 0.6, float("nan")])
def test_shares_that_cannot_be_planted(share: float) -> None:
    with pytest.raises(InputError, match=r"must be above 0 and at most 0\.5"):
        flip_labels(torch.zeros(10, dtype=torch.int64), 2, share, _generator())


@pytest.mark.parametrize(("n", "share", "count"), [(1797, 0.7, 1258), (10, 0.7, 7), (100, 0.29, 29), (10, 1, 10)])
def test_split(n: int, share: float, count: int) -> None:
    chosen, left = split_rows(n, share, _generator())
    assert len(chosen) == count
    assert torch.equal(torch.cat([chosen, left]).sort().values, torch.arange(n))
    assert torch.equal(chosen, chosen.sort().values)
    assert not torch.equal(split_rows(1000, 0.5, _generator(1))[0], split_rows(1000, 0.5, _generator(2))[0])


@pytest.mark.parametrize("share", [0, 1.1, float("nan")])
def test_shares_that_cannot_be_split(share: float) -> None:
    with pytest.raises(InputError, match="must be above 0 and at most 1"):
        split_rows(10, share, _generator())
