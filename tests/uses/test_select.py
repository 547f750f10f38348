"""Which examples `Audit.select` keeps, and when it says that random ones are better."""

from __future__ import annotations

import pytest
import torch

import rowgrad as rg
from rowgrad.errors import InputError, RowgradWarning

N = 20


def audited(n_flagged: int = 3, **options) -> rg.Audit:
    """Losses fall with the position; the first have labels that the logits speak against; the last two are not seen."""
    audit = rg.Audit(N, 2, **options)
    index = torch.arange(N - 2)
    labels = audit.plant(index, index % 2)
    logits = 2 * torch.eye(2)[index % 2]
    logits[:n_flagged] = logits[:n_flagged].flip(1)
    audit.update(index, losses=torch.arange(N - 2, 0, -1.0), logits=logits, labels=labels)
    return audit


def test_the_flagged_are_left_out_and_the_hardest_of_the_others_kept() -> None:
    found = audited().select(0.5)
    assert found.dtype == torch.int64
    assert found.tolist() == [*range(3, 12)]  # 9 of the 18 seen


@pytest.mark.parametrize(("drop_top", "first"), [(5, 5), (0.5, 9), ("flags", 3), (4.0 / 18, 4), (0.0, 0)])
def test_what_is_dropped(drop_top: str | float, first: int) -> None:
    assert audited().select(1.0, drop_top).tolist() == [*range(first, 18)]


def test_random_ones_are_unflagged_and_repeat() -> None:
    audit = audited()
    found = audit.select(0.5, prefer="random")
    assert len(set(found.tolist())) == len(found) == 9
    assert found.tolist() == sorted(found.tolist())
    assert int(found.min()) >= 3
    assert int(found.max()) < 18
    assert torch.equal(found, audit.select(0.5, prefer="random"))
    other = audit.select(0.5, prefer="random", generator=torch.Generator().manual_seed(5))
    assert not torch.equal(found, other)


def test_planted_examples_are_left_out() -> None:
    audit = audited(n_flagged=1, calibrate=0.25)
    planted = audit.compute().planted
    assert int(planted.sum()) > 0
    assert not planted[audit.select(1.0)].any()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"prefer": "low"}, "teach little"),
        ({"keep": 0.15}, "of a share of 0.15"),
        ({"drop_top": 0}, "3 of the 7 chosen are flagged"),
    ],
)
def test_it_says_when_random_is_better(arguments: dict, reason: str) -> None:
    with pytest.warns(RowgradWarning, match=f"random is likely the better choice.*{reason}"):
        audited().select(**arguments)


@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_it_says_that_flags_mean_little(keep: float) -> None:
    """Of a network that guesses: what is left out is then as good as what is kept."""
    with pytest.warns(RowgradWarning, match="the audit says little of what to choose: .* It learned next to nothing"):
        audited(n_flagged=9).select(keep)


def test_it_says_where_fewer_are_left_than_asked_for() -> None:
    with pytest.warns(RowgradWarning, match="keep=0.9 asks for 16 examples; without those dropped 15 are left") as told:
        assert audited().select(0.9).tolist() == [*range(3, 18)]
    assert told[0].filename == __file__


def test_it_says_nothing_where_nothing_is_chosen_between() -> None:
    assert audited().select(1.0, prefer="low").tolist() == [*range(3, 18)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "expected a share above 0 and at most 1"),
        ({"keep": 1.1}, "expected a share above 0 and at most 1"),
        ({"prefer": "best"}, "expected one of high, random, low"),
        ({"drop_top": 1.0}, "a share of at least 0 and below 1"),
        ({"drop_top": 18}, "below the 18 examples seen"),
        ({"drop_top": -1}, "below the 18 examples seen"),
        ({"drop_top": "some"}, 'expected "flags"'),
        ({"drop_top": True}, 'expected "flags"'),
        ({"drop_top": None}, 'expected "flags"'),
        ({"drop_top": torch.ones(3)}, 'expected "flags"'),
        ({"keep": "0.4"}, "select: keep='0.4', expected a share"),
        ({"prefer": "random", "generator": 3}, "select: generator=3, expected a torch.Generator"),
    ],
)
def test_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        audited().select(**arguments)


def test_without_labels_there_are_no_flags_to_drop() -> None:
    audit = rg.Audit(3)
    audit.update(torch.arange(3), losses=torch.arange(3.0))
    with pytest.raises(InputError, match="no labels and no flags"):
        audit.select()
    assert audit.select(0.4, drop_top=1).tolist() == [1]
