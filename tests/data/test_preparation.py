"""Standardizing and whitening against scikit-learn's, fitted on the training part alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_wine
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from rowgrad.data.preparation import prepare
from rowgrad.data.readers import read_table
from rowgrad.errors import InputError

WINE = torch.from_numpy(load_wine().data)
DIGITS = torch.from_numpy(load_digits().data)


def test_standardizing_is_scikit_learns() -> None:
    expected = StandardScaler().fit(WINE[:100].numpy()).transform(WINE.numpy())
    np.testing.assert_allclose(prepare(WINE[:100])(WINE).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_constant_feature_becomes_zero() -> None:
    x = torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 4.0]])
    found = prepare(x)(torch.tensor([[0.1, 1.0], [7.0, 2.0]]))
    assert found[:, 0].tolist() == [0, 0]


def test_whitening_is_principal_components_of_variance_one() -> None:
    train = WINE[:100]
    for kind, steps in (("whiten", [StandardScaler()]), ("whiten-raw", [])):
        found = prepare(train, kind, 0)
        white = found(train).double()
        torch.testing.assert_close(white.T @ white / 100, torch.eye(13, dtype=torch.float64), rtol=1e-4, atol=1e-4)
        pipeline = make_pipeline(*steps, PCA(whiten=True)).fit(train.numpy())
        expected = pipeline.transform(WINE.numpy()) * (100 / 99) ** 0.5
        np.testing.assert_allclose(np.abs(found(WINE).numpy()), np.abs(expected), rtol=1e-3, atol=1e-4)


def test_whitening_does_not_depend_on_units() -> None:
    """Of the wines as they are measured, four directions are dropped for the small units of their features."""
    assert prepare(WINE, "whiten").n_outputs == 13
    assert prepare(WINE, "whiten-raw").n_outputs == 9
    units = 10.0 ** torch.arange(-6, 7)
    torch.testing.assert_close(
        prepare(WINE * units, "whiten")(WINE * units).abs(), prepare(WINE, "whiten")(WINE).abs(), rtol=1e-3, atol=1e-4
    )


def test_whitening_drops_directions_without_variance() -> None:
    """Three pixels of the digits are always 0, and a feature given twice is one direction."""
    found = prepare(DIGITS, "whiten")
    assert found.n_outputs == 61
    twice = torch.cat([WINE, WINE[:, :1]], dim=1)
    assert prepare(twice, "whiten").n_outputs == 13
    assert float(found(DIGITS).std(0, correction=0).sub(1).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["center", "standardize", "whiten"])
def test_only_the_training_part_is_looked_at(kind: str) -> None:
    found, other = prepare(WINE[:100], kind), prepare(WINE, kind)
    torch.testing.assert_close(found.center, WINE[:100].mean(0))
    assert float(found(WINE[:100]).mean(0).abs().max()) < 1e-4
    assert float(other(WINE[:100]).mean(0).abs().max()) > 0.1


def test_none_and_center() -> None:
    torch.testing.assert_close(prepare(WINE, "none")(WINE), WINE.float())
    torch.testing.assert_close(prepare(WINE, "center")(WINE), (WINE - WINE.mean(0)).float())


def test_bad_input() -> None:
    with pytest.raises(InputError, match="preparation 'scale': expected none, center"):
        prepare(WINE, "scale")
    with pytest.raises(InputError, match="no training examples"):
        prepare(WINE[:0])
    with pytest.raises(InputError, match="whitening leaves nothing"):
        prepare(torch.ones(5, 2), "whiten")
    with pytest.raises(InputError, match=r"features of shape \(178, 12\); the model was made for \(N, 13\)"):
        prepare(WINE)(WINE[:, 1:])


def test_medians_are_those_of_the_rows_that_are_named(tmp_path: Path) -> None:
    lines = ["color,size,weight,kind"] + [
        f"{'red' if k % 2 else 'blue'},{'' if k in (1, 6) else k},{'' if k == 7 else 10 * k},{k % 3}" for k in range(9)
    ]
    path = tmp_path / "things.csv"
    path.write_text("\n".join(lines))
    table = read_table(str(path), target="kind", task="classification")
    names = table.feature_names
    found = table.with_medians_of(torch.tensor([0, 1, 2, 3]))
    assert [column.width for column in table.columns] == [2, 2, 2]
    assert found.features[[1, 6], names.index("size")].tolist() == [2, 2]  # of 0, 2 and 3
    assert found.features[7, names.index("weight")] == 15  # of 0, 10, 20 and 30
    assert [column.median for column in found.columns] == [None, 2, 15]
    assert table.features[1, names.index("size")] == 4  # the table itself is as it was
    there = table.with_medians_of(torch.tensor([1, 6]))
    assert [column.median for column in there.columns] == [None, 4, 35]  # no size among these: that of all
    again = read_table(str(path), target="kind", task="classification", like=found.columns)
    assert torch.equal(again.features, found.features)
