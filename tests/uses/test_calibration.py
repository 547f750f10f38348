"""Planted flips: which labels change, what they tell, and that they are no findings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import rowgrad as rg
from rowgrad.errors import InputError
from rowgrad.uses.audit import Audit
from rowgrad.uses.calibration import calibrate, wilson

N, CLASSES = 200, 5


def _planted(share: float = 0.1, seed: int = 0) -> rg.Audit:
    return rg.Audit(N, CLASSES, calibrate=share, generator=torch.Generator().manual_seed(seed))


def _labels() -> torch.Tensor:
    return torch.arange(N) % CLASSES


def test_a_known_share_of_labels_is_flipped_the_same_way_every_time() -> None:
    audit, labels = _planted(), _labels()
    flipped = audit.plant(torch.arange(N), labels)
    assert (flipped != labels).sum() == 20
    assert flipped.min() >= 0
    assert flipped.max() < CLASSES
    index = torch.randperm(N, generator=torch.Generator().manual_seed(1))[:50]
    assert torch.equal(audit.plant(index, labels[index]), flipped[index])
    assert torch.equal(_planted().plant(torch.arange(N), labels), flipped)
    assert not torch.equal(_planted(seed=1).plant(torch.arange(N), labels), flipped)
    assert audit.plant(torch.arange(3), torch.full((3,), -100)).tolist() == [-100] * 3


def test_each_other_label_is_equally_likely() -> None:
    audit = rg.Audit(20_000, 3, calibrate=0.5)
    found = audit.plant(torch.arange(20_000), torch.ones(20_000, dtype=torch.int64)).bincount()
    assert found[1] == 10_000
    assert abs(float(found[0]) - 5000) < 4 * 50  # four standard deviations


def test_no_global_generator_is_drawn_from() -> None:
    before = torch.random.get_rng_state()
    first, second = rg.Audit(N, CLASSES, calibrate=0.1), rg.Audit(N, CLASSES, calibrate=0.1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.plant(torch.arange(N), _labels()), second.plant(torch.arange(N), _labels()))


def _fed(audit: rg.Audit, doubted: torch.Tensor) -> rg.Audit:
    """Examples in `doubted` get outputs for another label than the given one."""
    labels = audit.plant(torch.arange(N), _labels())
    shown = torch.where(doubted, (labels + 1) % CLASSES, labels)
    logits = 4.0 * F.one_hot(shown, CLASSES)
    losses = F.cross_entropy(logits, labels, reduction="none")
    audit.update(torch.arange(N), losses=losses, logits=logits, labels=labels)
    return audit


def test_flips_are_marked_and_never_flagged() -> None:
    audit = _planted()
    is_flip = audit.plant(torch.arange(N), _labels()) != _labels()
    doubted = is_flip.clone()
    doubted[is_flip.nonzero()[:5]] = False
    doubted[(~is_flip).nonzero()[:8]] = True
    scores = _fed(audit, doubted).compute()
    assert torch.equal(scores.planted, is_flip)
    assert torch.equal(scores.before, _labels())
    assert torch.equal(scores.flagged, doubted & ~is_flip)
    assert not any((mask & is_flip).any() for mask in scores.flags.values())
    assert set(scores.order()[-20:].tolist()) == set(is_flip.nonzero()[:, 0].tolist())
    assert set(scores.order()[:8].tolist()) == set(scores.flagged.nonzero()[:, 0].tolist())
    found = scores.calibration
    assert (found.n_planted, found.n_found, found.n_flagged) == (20, 15, 8)
    by_right_flips = 1 - 8 / 180 / 4
    assert found.recall == pytest.approx(0.75 / by_right_flips)
    assert (found.low, found.high) == pytest.approx([p / by_right_flips for p in wilson(15, 20)])
    assert str(found).startswith("15 of 20 planted flips were flagged: estimated recall 0.76 (95%: 0.54 to 0.90).")
    frame = audit.table()
    assert frame["planted"].to_list() == is_flip.tolist()


def test_a_state_carries_the_flips() -> None:
    audit = _planted(seed=3)
    labels = audit.plant(torch.arange(N), _labels())
    again = rg.Audit(N, CLASSES)
    again.load_state_dict(audit.state_dict())
    assert torch.equal(again.plant(torch.arange(N), _labels()), labels)
    audit.reset()
    assert torch.equal(audit.plant(torch.arange(N), _labels()), labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_classes": None, "calibrate": 0.1}, "calibrate flips labels and needs n_classes"),
        ({"n_classes": 3, "calibrate": 0.6}, "calibrate=0.6, expected the share of labels to flip"),
        ({"n_classes": 3, "calibrate": -0.1}, "calibrate=-0.1, expected the share"),
        ({"n_classes": 3, "calibrate": float("nan")}, "calibrate=nan, expected the share"),
    ],
)
def test_shares_that_cannot_be_flipped(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rg.Audit(10, **arguments)


def test_training_on_labels_that_were_not_flipped_is_noticed() -> None:
    audit = _planted()
    with pytest.raises(InputError, match=r"train on `labels = audit.plant\(index, labels\)`"):
        audit.update(
            torch.arange(2),
            losses=torch.ones(2),
            logits=torch.zeros(2, CLASSES),
            labels=torch.zeros(2, dtype=torch.int64),
        )


def test_without_flips_labels_pass_through() -> None:
    labels = _labels()
    assert rg.Audit(N, CLASSES).plant(torch.arange(N), labels) is labels
    assert rg.Audit(N, CLASSES).compute().calibration is None


def test_the_interval_against_its_equation() -> None:
    """Its ends are the shares p whose distance to the found one is z standard deviations of p itself."""
    for k, n in ((0, 10), (3, 10), (10, 10), (70, 100)):
        low, high = wilson(k, n)
        for p in (low, high):
            assert (k / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-12)
        assert low - 1e-12 <= k / n <= high + 1e-12
    assert wilson(0, 0) == (0.0, 1.0)


def test_errors_are_counted_where_losses_overlap() -> None:
    """Errors and flips from one distribution of losses, correct examples from a lower one that overlaps."""
    generator = torch.Generator().manual_seed(0)
    n_errors, n_right, n_flips = 500, 4500, 250
    loss = torch.randn(n_errors + n_right + n_flips, generator=generator, dtype=torch.float64)
    loss[:n_errors] += 3
    loss[-n_flips:] += 3
    planted = torch.zeros(len(loss), dtype=torch.bool)
    planted[-n_flips:] = True
    found = calibrate(loss > 1.5, loss, planted, n_classes=1000)
    is_error = torch.arange(len(loss)) < n_errors
    n_true = int(((loss > 1.5) & is_error).sum())
    assert found.recall == pytest.approx(n_true / n_errors, abs=0.05)
    assert found.expected_errors == pytest.approx(n_errors, rel=0.15)
    assert found.expected_true_flags == pytest.approx(n_true, rel=0.15)
    assert found.n_flagged > 1.3 * n_true
    assert found.low < n_true / n_errors < found.high


@pytest.mark.parametrize(("n_errors", "n_flips", "apart", "widest"), [(120, 40, 5, 60), (50, 100, 8, 15)])
def test_the_interval_of_true_flags_holds_their_number(n_errors: int, n_flips: int, apart: int, widest: int) -> None:
    """In 95 of 100 cases of errors, flips and correct examples, give or take chance, and it is not all numbers."""
    covered, width, n_cases, n_right = 0, 0.0, 60, 1100
    for seed in range(n_cases):
        rng = torch.Generator().manual_seed(seed)
        loss = torch.randn(n_errors + n_right + n_flips, generator=rng, dtype=torch.float64)
        loss[:n_errors] += apart
        loss[-n_flips:] += apart
        planted = torch.arange(len(loss)) >= n_errors + n_right
        found = calibrate(loss > apart / 2, loss, planted, n_classes=1000)
        n_true = int((loss[:n_errors] > apart / 2).sum())
        covered += found.low_true_flags - 0.5 <= n_true <= found.high_true_flags + 0.5
        width += (found.high_true_flags - found.low_true_flags) / n_cases
        assert found.low_true_flags <= found.expected_true_flags <= found.high_true_flags <= found.n_flagged
    assert covered >= 0.9 * n_cases
    assert width < widest


def test_no_errors_are_expected_where_there_are_none() -> None:
    loss = torch.cat([torch.linspace(0, 1, 100), torch.linspace(5, 6, 10)]).double()
    found = calibrate(loss > 2, loss, torch.arange(110) >= 100, n_classes=2)
    assert (found.recall, found.n_flagged, found.expected_errors, found.expected_true_flags) == (1.0, 0, 0, 0)


def test_flips_of_wrong_labels_that_became_right_do_not_count_against_the_recall() -> None:
    """Two classes, 30% of the labels wrong, and an audit that doubts exactly the wrong ones."""
    generator = torch.Generator().manual_seed(0)
    n = 100_000
    is_wrong = torch.rand(n, generator=generator) < 0.3
    planted = torch.rand(n, generator=generator) < 0.1
    doubted = is_wrong ^ planted
    found = calibrate(doubted, doubted.double(), planted, n_classes=2)
    assert found.n_found / found.n_planted == pytest.approx(0.7, abs=0.05)
    assert found.recall == pytest.approx(1.0, abs=0.05)
    assert found.expected_true_flags == pytest.approx(found.n_flagged, rel=0.1)


def test_without_a_seen_flip_nothing_is_known() -> None:
    found = calibrate(torch.tensor([True]), torch.ones(1), torch.tensor([False]), n_classes=2)
    assert (found.low, found.high) == (0.0, 1.0)
    assert found.recall != found.recall


@pytest.mark.parametrize(
    ("index", "labels", "said"),
    [
        ([0, 1], [1, 3], "labels run from 1 to 3; expected 0 to 2"),
        ([0, 100], [1, 1], "index runs from 0 to 100; this audit has examples 0 to 99"),
        ([-1, 1], [1, 1], "index runs from -1 to 1"),
        ([0, 1], [1], r"labels have shape \(1,\); expected one per example, \(2,\)"),
    ],
)
def test_what_cannot_be_planted_is_refused(index: list[int], labels: list[int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Audit(100, 3, calibrate=0.03).plant(torch.tensor(index), torch.tensor(labels))


def test_small_integers_are_planted_like_large_ones() -> None:
    labels = torch.arange(200)
    found = [Audit(200, 200, calibrate=0.5).plant(torch.arange(200), labels.to(d)) for d in (torch.uint8, torch.int64)]
    assert torch.equal(found[0].long(), found[1])
    assert int((found[1] != labels).sum()) == 100


def test_labels_that_were_not_planted_are_refused() -> None:
    audit, index, labels = Audit(40, 2, calibrate=0.5), torch.arange(40), torch.zeros(40, dtype=torch.int64)
    audit.plant(index, labels)
    with pytest.raises(InputError, match=r"example \d+ was flipped by `plant`, and another label is passed here"):
        audit.update(index, losses=torch.ones(40), logits=torch.zeros(40, 2), labels=labels)


def test_where_every_label_is_doubted_nothing_is_estimated() -> None:
    audit, index = Audit(40, 2, calibrate=0.1), torch.arange(40)
    labels = audit.plant(index, torch.zeros(40, dtype=torch.int64))
    audit.update(index, losses=torch.ones(40), logits=torch.tensor([[0.0, 1.0]]).expand(40, 2), labels=labels)
    found = audit.compute().calibration
    assert found is not None
    assert found.recall != found.recall
    assert (found.low, found.high) == (0, 1)
    assert str(found) == "4 planted flips were seen; they say nothing about the 36 flags."
