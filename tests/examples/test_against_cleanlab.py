"""The comparison with cross-validation: what needs no cleanlab, and the claims of the page on fewer seeds."""

from __future__ import annotations

import builtins

import pytest
import torch
from examples.against_cleanlab import PACKAGES, RANKINGS, cleanlab_network, digits, main, measured, sentences, text

from rowgrad.training.settings import Settings

AUDIT, FINAL = (RANKINGS[name] for name in ("audit: mean loss of one training", "the same training: loss at the end"))


def test_the_text_is_sentences_by_package() -> None:
    found = sentences()
    assert len(found) > 1000
    assert {package for _, package in found} == {*PACKAGES}
    assert len({sentence for sentence, _ in found}) == len(found)
    x, y = text()
    assert len(x) == len(y) == len(found)
    assert bool(x.isfinite().all())


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest, **options):
        if name == "cleanlab":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit, match="pip install cleanlab"):
        main([])


@pytest.mark.long
def test_means_over_training_rank_wrong_digits_as_the_page_says() -> None:
    x, y = digits()
    audit, final = (
        torch.tensor([measured(ranking, x, y, seed, Settings())[0] for seed in range(2)]).mean()
        for ranking in (AUDIT, FINAL)
    )
    assert audit > 0.98
    assert audit > final


@pytest.mark.long
def test_it_ranks_wrong_digits_better_than_cross_validation_of_the_same_network() -> None:
    x, y = digits()
    assert measured(AUDIT, x, y, 0, Settings())[0] > measured(cleanlab_network, x, y, 0, Settings())[0] + 0.02
