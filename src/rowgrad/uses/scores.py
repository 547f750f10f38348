"""What an audit says of each example: its course through training, the flags, and a sentence for each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt

import torch
from torch import Tensor

from rowgrad.uses.calibration import Calibration

FENCE = 3.0  # Tukey's for "far out": this many times the middle half's width above it
HESITANT = 2 / 3  # mean probability of the given label below which a hard example is not taken for fitted
REDUNDANT = 0.1  # of the median self-influence
SPIKE = 5.0  # times the mean norm
MANY = 1 / 3  # share of flagged examples from which the network is as likely to be wrong as the labels
LATE = 3  # visits from which a peak is no longer the start of training

FLAGS = ("likely mislabelled", "hard", "never learned", "redundant", "spiking")


@dataclass(frozen=True)
class AuditScores:
    """What was accumulated for each of N examples; every tensor has shape (N,) and lies on the CPU.

    rank: 1 for the most suspicious, by mean loss; examples flipped for calibration, and behind them those that were
        never seen, come last.
    times_seen: updates that held the example.
    mean_loss, final_loss: over all updates, and at the last one; NaN for an example never seen.
    mean_norm, final_norm, peak_norm: likewise for the gradient norm, and its largest value; None without norms.
    peak_visit: the visit (1 for the first) at which the norm was largest; the epoch, where each epoch visits all.
    self_influence: sum over the visits of learning rate times squared norm by the number B of examples of the step: how
        far its own share of the steps lowered its own loss, to first order, for SGD on the mean of the batch (TracIn;
        Pruthi, Liu, Sundararajan and Kale 2020, section 3.2). Of other optimizers it says who pulled, and in what
        proportion, but not how far losses fell.
    given: the label that was trained on; -1 for an example never seen. None without logits, as are the following.
    confidence, variability: mean and (population) standard deviation over the visits of the given label's probability
        (Swayamdipta et al. 2020, section 2).
    suggested, suggested_probability: the label of largest mean probability, and that probability.
    mean_margin: logit of the given label minus the largest other one.
    times_forgotten: visits with a wrong prediction right after a visit with a right one; first_learned: the first
        visit with a right one, 0 if there was none (Toneva et al. 2019, section 3.1).
    planted: examples whose label the audit itself flipped; before: their label before. None without calibration.
    calibration: how many of these were found.
    """

    rank: Tensor
    times_seen: Tensor
    mean_loss: Tensor
    final_loss: Tensor
    mean_norm: Tensor | None = None
    final_norm: Tensor | None = None
    peak_norm: Tensor | None = None
    peak_visit: Tensor | None = None
    self_influence: Tensor | None = None
    given: Tensor | None = None
    confidence: Tensor | None = None
    variability: Tensor | None = None
    suggested: Tensor | None = None
    suggested_probability: Tensor | None = None
    mean_margin: Tensor | None = None
    times_forgotten: Tensor | None = None
    first_learned: Tensor | None = None
    flagged: Tensor | None = None
    planted: Tensor | None = None
    before: Tensor | None = None
    calibration: Calibration | None = field(default=None, repr=False)

    def order(self) -> Tensor:
        """Positions of the examples from the most to the least suspicious."""
        return self.rank.argsort()

    @cached_property
    def flags(self) -> dict[str, Tensor]:
        """Masks of shape (N,) by the name of the flag, as far as labels and norms were given.

        Examples flipped for calibration carry none.

        likely mislabelled: the label of largest mean probability is not the given one (`flagged`).
        hard: not that, but the mean loss lies beyond Tukey's fence: 3 widths of the middle half (of the examples not
            likely mislabelled) above it; with labels also the given one's mean probability is below two thirds. Where
            nearly all examples are fitted, losses far above the others' are still small.
        never learned: the prediction was wrong at every one of at least two visits.
        redundant: never forgotten once learned, and its self-influence (without norms its mean loss) is below a tenth
            of the median.
        spiking: at a visit after the second, its norm was its largest, above the median peak, five times the mean of
            the other visits and beyond Tukey's fence for that ratio, as dropout makes all norms restless.
        """
        may = (self.times_seen > 0) & ~self._planted
        doubted = torch.zeros_like(may) if self.flagged is None else self.flagged
        found = {
            "likely mislabelled": self.flagged,
            "hard": (self.mean_loss > self._fence) & self._is_hesitant & ~doubted,
            "never learned": None if self.first_learned is None else (self.first_learned == 0) & (self.times_seen > 1),
            "redundant": self._is_redundant & ~doubted,
            "spiking": self._is_spiking,
        }
        return {name: mask & may for name, mask in found.items() if mask is not None}

    def reason(self, position: int, classes: Sequence[str] | None = None) -> str:
        """Why the example at this position is flagged, in plain sentences; empty if it is not.

        Args:
            classes: what the labels are called; by default "label 0" and so on.
        """
        found = (self._sentence(name, position, classes) for name, mask in self.flags.items() if mask[position])
        return " ".join(found)

    @cached_property
    def doubt(self) -> str:
        """Why the flags of this training mean little, in plain sentences; empty where nothing speaks against them.

        Either the labels of largest mean probability agree with the given ones hardly more often (two standard errors)
        than the largest class would, or more than a third of the examples is flagged. Those flipped for calibration do
        not count. Without labels nothing is said.
        """
        if self.given is None or self.suggested is None or self.flagged is None:
            return ""
        seen = (self.given >= 0) & ~self._planted
        n = int(seen.sum())
        if not n:
            return ""
        largest = int(self.given[seen].bincount().max())
        agreed = int((self.given == self.suggested)[seen].sum())
        if agreed <= largest + 2 * sqrt(largest * (1 - largest / n)):
            return (
                f"Over training the network gave {agreed / n:.0%} of the examples their label, hardly more than the "
                f"largest class makes up ({largest / n:.0%}). It learned next to nothing, and the flags say nothing "
                "about the labels: train longer, or change the model or the learning rate."
            )
        share = int(self.flagged.sum()) / n
        if share > MANY:
            return (
                f"{share:.0%} of the examples are flagged: the labels are very wrong, or the network learned too "
                "little to judge them."
            )
        return ""

    @property
    def _planted(self) -> Tensor:
        return torch.zeros_like(self.times_seen, dtype=torch.bool) if self.planted is None else self.planted

    def _sentence(self, name: str, k: int, classes: Sequence[str] | None) -> str:
        n_seen = int(self.times_seen[k])
        if name == "likely mislabelled":
            return (
                f"Over {_visits(n_seen)} the network gave {self._label('suggested', k, classes)} a mean probability of "
                f"{self._at('suggested_probability', k):.2f} and the given {self._label('given', k, classes)} one of "
                f"{self._at('confidence', k):.2f}."
            )
        if name == "hard":
            text = f"Its mean loss of {self.mean_loss[k]:.3g} is far above the usual, beyond {self._fence:.3g}"
            if self.confidence is None:
                return f"{text}."
            return f"{text}, and its label had a mean probability of {self._at('confidence', k):.2f}."
        if name == "never learned":
            return f"The network predicted another label at each of {_visits(n_seen)}."
        if name == "redundant":
            learned = (
                ""
                if self.first_learned is None
                else f"Learned at visit {self._at('first_learned', k):.0f} and never forgotten; "
            )
            what = "self-influence" if self.self_influence is not None else "mean loss"
            text = f"its {what} of {self._pull[k]:.2g} is below a tenth of the median, {self._median_pull:.2g}."
            return learned + text if learned else text[0].upper() + text[1:]
        return (
            f"Its gradient norm rose to {self._at('peak_norm', k):.3g} at visit {self._at('peak_visit', k):.0f}, "
            f"{self._at('peak_norm', k) / self._at('mean_norm', k):.1f} times its mean."
        )

    def _at(self, name: str, position: int) -> float:
        return float(getattr(self, name)[position])

    def _label(self, name: str, position: int, classes: Sequence[str] | None) -> str:
        label = int(self._at(name, position))
        return f"label {label}" if classes is None else classes[label]

    @cached_property
    def _fence(self) -> float:
        others = self.mean_loss if self.flagged is None else self.mean_loss[~self.flagged]
        return _fence(others)

    @property
    def _is_hesitant(self) -> Tensor:
        """Whether the network never quite believed the label; True of all where there are none."""
        return torch.ones_like(self._planted) if self.confidence is None else self.confidence < HESITANT

    @property
    def _pull(self) -> Tensor:
        return self.mean_loss if self.self_influence is None else self.self_influence

    @cached_property
    def _median_pull(self) -> float:
        return _quantiles(self._pull, 0.5)[0]

    @property
    def _is_redundant(self) -> Tensor:
        weak = self._pull < REDUNDANT * self._median_pull
        if self.times_forgotten is None or self.first_learned is None:
            return weak
        return weak & (self.first_learned > 0) & (self.times_forgotten == 0)

    @property
    def _is_spiking(self) -> Tensor | None:
        if self.peak_norm is None or self.mean_norm is None or self.peak_visit is None:
            return None
        high = self.peak_norm > _quantiles(self.peak_norm, 0.5)[0]
        others = (self.mean_norm * self.times_seen - self.peak_norm) / (self.times_seen - 1)
        times = self.peak_norm / others.clamp_min(torch.finfo(others.dtype).tiny)
        return high & (times > max(SPIKE, _fence(times))) & (self.peak_visit >= LATE)


def _visits(n: int) -> str:
    return "one visit" if n == 1 else f"{n} visits"


def _fence(values: Tensor) -> float:
    """Far above the middle half."""
    low, high = _quantiles(values, 0.25, 0.75)
    return high + FENCE * (high - low)


def _quantiles(values: Tensor, *shares: float) -> list[float]:
    """Of the values that are no NaN; NaN if there are none. `torch.quantile` takes 2^24 values at most."""
    ordered = values[~values.isnan()].double().sort().values
    if not len(ordered):
        return [torch.nan] * len(shares)
    return [float(ordered[round(share * (len(ordered) - 1))]) for share in shares]
