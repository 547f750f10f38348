"""How much an audit finds, estimated from labels that it flips itself.

Note [planted flips]: a few labels, drawn at random, are replaced by others before training. They are known errors of
the same data, model and training, so that the share of them that is flagged estimates the recall for errors that fall
at random. Errors that were there before fall where examples are hard, so that this is an upper estimate for them.

Note [true flags]: the flips that were drawn could have been others, with other losses and flags; the resampled ones
show how much that changes. Of the errors, too, a share by chance lies above the cut: a binomial deviation is added. In
simulations with separate losses the interval covers in 95 of 100 cases or more; where the losses of right labels
overlap those of wrong ones, as they do where training is noisy, the number is an upper estimate and so is the interval.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rowgrad.errors import InputError
from rowgrad.uses.expected import GENERATOR, check, number

SHARE = number("the share of labels to flip, above 0 and at most 0.5, or 0 for none", lambda v: 0 < v <= 0.5)
RESAMPLES = 400  # of the flips, for the interval of the number of true flags
CUT = 0.75  # share of the flips above the loss at which errors are counted
Z = 1.959964  # 95% of a normal distribution lie within this many deviations


@dataclass(frozen=True)
class Calibration:
    """What the planted flips say.

    n_planted, n_found: flips that were seen, and those of them whose label was doubted.
    recall: share found; low, high: its 95% interval (Wilson 1927). NaN, 0 and 1 if none was seen. The flip of a wrong
        label may be right and is then rightly not doubted; so the share is divided by 1 - f / (K - 1), f being the
        share of flags among the other examples and K the number of classes.
    n_flagged: flags among the other examples.
    expected_errors: estimated wrong labels among the other examples.
    expected_true_flags: how many of the flags are expected to be wrong labels; low_true_flags, high_true_flags: its 95%
        interval for errors that fall at random, from resampled flips (Note [true flags]).
    """

    n_planted: int
    n_found: int
    recall: float
    low: float
    high: float
    n_flagged: int
    expected_errors: float
    expected_true_flags: float
    low_true_flags: float
    high_true_flags: float

    def __str__(self) -> str:
        if math.isnan(self.recall):
            return f"{self.n_planted} planted flips were seen; they say nothing about the {self.n_flagged} flags."
        return (
            f"{self.n_found} of {self.n_planted} planted flips were flagged: estimated recall {self.recall:.2f} "
            f"(95%: {self.low:.2f} to {self.high:.2f}). Of {self.n_flagged} flags about "
            f"{self.expected_true_flags:.0f} are expected to be wrong labels (95%: {self.low_true_flags:.0f} to "
            f"{self.high_true_flags:.0f}), fewer where right labels have losses as large."
        )


def calibrate(flagged: Tensor, loss: Tensor, planted: Tensor, n_classes: int) -> Calibration:
    """Compare the flips with the other examples.

    Above a loss that a share r of the flips exceeds lie r times the errors, and correct examples besides. So the count
    of other examples above it, divided by r, is at least the number of errors but for chance; the smaller of two such
    bounds is taken (Blanchard, Lee and Scott 2010, section 4), at the loss that three quarters of the flips exceed and,
    in place of a loss, at the flags. More cuts would find a smaller bound by chance.

    Args:
        flagged: whose label is doubted, flips among them. loss: what the ranking goes by. planted: which labels were
            flipped. All of the seen examples alone, shape (n,).
    """
    found, of_flips, others = flagged[planted], loss[planted], loss[~planted].sort().values
    n_planted, n_found, n_flagged = len(found), int(found.sum()), int((flagged & ~planted).sum())
    # of two classes all may be doubted: a flip is then as good as the label
    still_wrong = 1 - n_flagged / max(1, len(others)) / (n_classes - 1)
    if not n_planted or still_wrong <= 0:
        nothing = (math.nan, 0.0, 1.0, n_flagged, math.nan, math.nan, math.nan, math.nan)
        return Calibration(n_planted, n_found, *nothing)
    recall, low, high = (min(1.0, p / still_wrong) for p in (n_found / n_planted, *wilson(n_found, n_planted)))
    n_above = math.ceil(CUT * n_planted * still_wrong)
    share = min(1.0, n_above / n_planted / still_wrong)
    errors = _bound(of_flips, others, n_above, share)
    rng, resampled = torch.Generator().manual_seed(0), []
    for _ in range(RESAMPLES):
        again = torch.randint(n_planted, (n_planted,), generator=rng)
        noise = float(torch.randn((), generator=rng)) * math.sqrt(errors * (1 - share) / share)
        found_again = min(1.0, float(found[again].double().mean()) / still_wrong)
        resampled.append(found_again * (_bound(of_flips[again], others, n_above, share) + noise))
    resampled.sort()
    ends = (min(max(0.0, resampled[round(q * (RESAMPLES - 1))]), n_flagged) for q in (0.025, 0.975))
    if n_found:
        errors = min(errors, n_flagged / recall)
    return Calibration(n_planted, n_found, recall, low, high, n_flagged, errors, min(n_flagged, errors * recall), *ends)


def _bound(of_flips: Tensor, others: Tensor, n_above: int, share: float) -> float:
    """On the number of errors, from the others' losses, ascending, above the n_above-th largest of the flips'."""
    cut = of_flips.kthvalue(len(of_flips) - n_above + 1).values
    return (len(others) - int(torch.searchsorted(others, cut))) / share


def wilson(n_found: int, n: int, z: float = Z) -> tuple[float, float]:
    """The score interval of a share, at 95% by default: (0, 1) for n = 0.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.

    >>> low, high = wilson(9, 10)
    >>> round(low, 3), round(high, 3)
    (0.596, 0.982)
    """
    if not n:
        return 0.0, 1.0
    share, weight = n_found / n, z * z / n
    center = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    return max(0.0, center - half), min(1.0, center + half)


def draw_shifts(n: int, n_classes: int | None, share: float, generator: torch.Generator | None) -> Tensor:
    """Which of n labels to flip, and by how much: (N,) int64, 0 for a label to be left, else 1 to n_classes - 1.

    A flipped label is (label + shift) modulo n_classes: each other label is equally likely.
    """
    if n_classes is None:
        raise InputError("calibrate flips labels and needs n_classes; leave it 0 for regression")
    check("Audit", {"calibrate": share, "generator": generator}, {"calibrate": SHARE, "generator": GENERATOR})
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    chosen = torch.randperm(n, generator=generator)[: max(1, round(share * n))]
    shifts = torch.zeros(n, dtype=torch.int64)
    shifts[chosen] = torch.randint(1, n_classes, (len(chosen),), generator=generator)
    return shifts
