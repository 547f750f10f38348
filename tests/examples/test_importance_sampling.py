"""Where the example says that drawing by norms pays, and where not."""

from __future__ import annotations

import pytest
from examples.importance_sampling import NEVER, course


@pytest.mark.long
def test_it_pays_on_fitted_clean_labels() -> None:
    first, *learning, fitted = course(0.0, 0, after=(1, 5, 10, 20, 30))
    assert not first.active
    assert first.measured == 1.0
    assert 0.8 < first.true < 1.3
    assert fitted.active
    assert 5 < fitted.true < fitted.best < 37
    for row in (*learning, fitted):
        assert abs(row.measured - row.true) < 3 * row.error, row.epoch
    assert fitted.error < 0.05 * fitted.true


@pytest.mark.long
def test_it_hardly_pays_on_wrong_labels() -> None:
    """There is less to gain, and norms of an epoch ago lose about half of that."""
    for row in course(0.2, 0, after=(20, 50)):
        assert row.best < 4
        assert row.true < 0.8 * row.best


@pytest.mark.long
def test_never_is_a_shuffle() -> None:
    assert not course(0.0, 0, NEVER, after=(10,))[0].active
