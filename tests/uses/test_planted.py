"""Precision, recall and average precision against scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import average_precision_score, precision_score, recall_score

from rowgrad.errors import InputError
from rowgrad.uses.calibration import wilson
from rowgrad.uses.planted import average_precision, score_planted
from rowgrad.uses.scores import AuditScores


def _scores(n: int = 50, labels: bool = True) -> tuple[AuditScores, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    planted = torch.rand(n, generator=generator) < 0.3
    loss = torch.rand(n, generator=generator) + planted * 0.4
    rank = torch.empty(n, dtype=torch.int64)
    rank[loss.argsort(descending=True)] = torch.arange(1, n + 1)
    flagged = loss > 0.8 if labels else None
    scores = AuditScores(
        rank=rank,
        times_seen=torch.ones(n),
        mean_loss=loss,
        final_loss=torch.rand(n, generator=generator),
        mean_margin=-loss.square() if labels else None,
        flagged=flagged,
    )
    return scores, planted


def test_agrees_with_scikit_learn() -> None:
    scores, planted = _scores()
    found = score_planted(scores, planted)
    assert found.precision == pytest.approx(precision_score(planted, scores.flagged))
    assert found.recall == pytest.approx(recall_score(planted, scores.flagged))
    assert found.average_precision == pytest.approx(average_precision_score(planted, scores.mean_loss))
    assert found.n_found == int((planted & scores.flagged).sum())
    assert found.n_planted == int(planted.sum())
    assert found.precision_interval == wilson(found.n_found, int(scores.flagged.sum()))
    assert found.recall_interval == wilson(found.n_found, found.n_planted)
    n_first = int(planted[scores.order()[: found.n_planted]].sum())
    assert found.precision_at_k_interval == wilson(n_first, found.n_planted)
    assert found.by_column["final loss"] == pytest.approx(average_precision_score(planted, scores.final_loss))
    assert found.by_column["mean margin"] == pytest.approx(found.average_precision)  # a monotone function of the loss
    assert list(found.by_column) == ["mean loss", "final loss", "mean margin"]


def test_precision_at_k_counts_the_first_k() -> None:
    scores, planted = _scores()
    k = int(planted.sum())
    expected = planted[scores.mean_loss.topk(k).indices].double().mean()
    assert score_planted(scores, planted).precision_at_k == pytest.approx(float(expected))


def test_without_flags_there_is_a_ranking_only() -> None:
    scores, planted = _scores(labels=False)
    found = score_planted(scores, planted)
    assert (found.n_found, found.precision, found.recall) == (None, None, None)
    assert (found.precision_interval, found.recall_interval) == (None, None)
    assert 0 < found.average_precision < 1


def test_precision_without_a_flag_is_undefined() -> None:
    scores, planted = _scores()
    scores.flagged[:] = False
    found = score_planted(scores, planted)
    assert (found.precision, found.precision_interval) == (None, None)
    assert found.recall == found.recall_interval[0] == 0


def test_perfect_and_worst_ranking() -> None:
    hits = torch.tensor([True, True, False, False])
    assert average_precision(hits) == 1
    assert average_precision(hits.flip(0)) == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_nothing_planted_is_refused() -> None:
    scores, planted = _scores()
    with pytest.raises(InputError, match="no error was planted"):
        score_planted(scores, torch.zeros_like(planted))
