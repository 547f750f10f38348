"""Find mislabelled examples from quantities that training computes anyway.

Note [trajectory rule]: early in training a network fits what examples have in common, late it memorizes single ones.
A probability averaged over the whole run still shows the label that the other examples suggested before the wrong one
was learned by heart; the probability at the end does not. Averaging the loss ranks examples for the same reason.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from rowgrad.errors import InputError
from rowgrad.files import whole
from rowgrad.uses.batch import Batch, check_planted, checked, gathered, joined
from rowgrad.uses.calibration import calibrate as calibrated
from rowgrad.uses.calibration import draw_shifts
from rowgrad.uses.page import audit_page
from rowgrad.uses.scores import AuditScores
from rowgrad.uses.select import select
from rowgrad.uses.tables import scores_table

# Accumulated for each example, in float64: counts are exact up to 2^53.
COLUMNS = (
    *("seen", "loss_sum", "loss"),
    *("norm_sum", "norm", "peak", "peak_visit", "influence"),
    *("margin_sum", "given_sum", "given_sq_sum", "was_right", "forgotten", "learned"),
)
WAITING = 10_000  # examples times classes that wait to be added together
_AT = {name: position for position, name in enumerate(COLUMNS)}


class Audit:
    """Accumulates losses, gradient norms and probabilities per example during training, in O(N) memory.

    Law: `compute()` depends on the updates alone: every mean is over the updates that held the example, and updates of
    different examples commute.

    Flags follow the trajectory rule: the label of largest mean probability differs from the given one. The ranking is
    by mean loss. On scikit-learn's digits with 10% of the labels changed it has an average precision of .99. The mean
    margin is as good there; on its breast_cancer, trained until the labels were memorized, it had .80 against .93.

    Args:
        n: how many examples the data set has.
        n_classes: how many classes, for flags and suggestions; None for regression.
        calibrate: share of the labels to flip, above 0 and at most .5, to estimate how many errors are found; 0 for
            none. Train on what `plant(index, labels)` returns. The flipped examples are never flagged.
        generator: draws the flips; None takes one of its own with seed 0. No global state is drawn from.
        gather: with an initialized `torch.distributed`, take in the batches of all processes at every update, so that
            each process holds the audit of all examples. All processes must update equally often.

    >>> audit = Audit(2, n_classes=2)
    >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    >>> labels = torch.tensor([0, 1])
    >>> losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    >>> audit.update(torch.tensor([0, 1]), losses=losses, logits=logits, labels=labels)
    >>> audit.compute().flagged
    tensor([False,  True])
    >>> audit.compute().reason(1)[:74]
    'Over one visit the network gave label 0 a mean probability of 0.88 and the'
    >>> audit.load_state_dict(audit.state_dict())  # goes on after an interruption
    """

    def __init__(
        self,
        n: int,
        n_classes: int | None = None,
        *,
        calibrate: float = 0.0,
        generator: torch.Generator | None = None,
        gather: bool = False,
    ) -> None:
        if n < 1 or (n_classes is not None and n_classes < 2):
            raise InputError(f"an audit needs an example and, for labels, two classes; got {n} and {n_classes}")
        self.n, self.n_classes, self.gather = n, n_classes, gather
        self._shifts = draw_shifts(n, n_classes, calibrate, generator) if calibrate else None
        self.reset()

    def reset(self) -> None:
        """Forget every update; the same labels stay flipped."""
        self._columns = torch.zeros(len(COLUMNS), self.n, dtype=torch.float64)
        self._probability_sum = torch.zeros(self.n, self.n_classes or 0)
        self._labels = torch.full((self.n,), -1, dtype=torch.int64)
        self._has_norms: bool | None = None
        self._has_planted = False
        self._flipped = torch.full((0 if self._shifts is None else self.n,), -1)  # what `plant` returned
        self._waiting: list[tuple[Batch, float]] = []
        self._waiting_for: set[int] = set()

    def state_dict(self) -> dict[str, Any]:
        """What was taken in so far: tensors on the CPU and plain values, for `torch.save` and a later run.

        `torch.load` reads it back with `weights_only=True`. The tensors are copies: later updates leave them alone.
        """
        shifts = None if self._shifts is None else self._shifts.clone()
        plain = {"n": self.n, "n_classes": self.n_classes, "has_norms": self._has_norms, "shifts": shifts}
        return (
            plain
            | {"has_planted": self._has_planted, "flipped": self._flipped.clone()}
            | {name: tensor.clone() for name, tensor in self._tensors().items()}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` gave; the labels that are flipped are those of the state.

        Raises:
            InputError: the state is of another n or n_classes, or lacks an entry; nothing was loaded.
        """
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise InputError(f"the state has no {', '.join(missing)}; load what `Audit.state_dict()` gave")
        if (state["n"], state["n_classes"]) != (self.n, self.n_classes):
            raise InputError(
                f"the state is of an audit with n={state['n']}, n_classes={state['n_classes']}; this one has "
                f"n={self.n}, n_classes={self.n_classes}. Make the audit with the sizes of the state"
            )
        tensors = self._tensors()
        self._has_norms, self._has_planted = state["has_norms"], state["has_planted"]
        self._shifts = None if state["shifts"] is None else state["shifts"].clone()
        self._flipped = state["flipped"].clone()
        for name, tensor in tensors.items():
            tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that is accumulated, by name."""
        self._settle()
        columns = dict(zip(COLUMNS, self._columns.unbind(), strict=True))
        return columns | {"probability_sum": self._probability_sum, "labels": self._labels}

    def plant(self, index: Tensor, labels: Tensor) -> Tensor:
        """The labels to train on: those of the examples chosen for calibration flipped, the others as they are.

        The same example gets the same label every time. Call it in the process that updates, not in a data worker.
        Without `calibrate` the labels are returned as they are.

        Args:
            index, labels: positions and labels of B examples, shape (B,); labels of -100 are left alone.
        Returns:
            (B,), on the device of the labels.
        Raises:
            InputError: a position or a label is out of range, or their shapes differ.

        >>> audit = Audit(4, n_classes=2, calibrate=0.25)
        >>> (audit.plant(torch.arange(4), torch.zeros(4, dtype=torch.int64)) == 1).sum()
        tensor(1)
        """
        if self._shifts is None or self.n_classes is None:
            return labels
        given, index = labels.detach().to("cpu", torch.int64), index.detach().to("cpu", torch.int64)
        check_planted(index, given, self.n, self.n_classes)
        self._has_planted = True
        shifts = self._shifts[index]
        flipped = torch.where((shifts > 0) & (given >= 0), (given + shifts) % self.n_classes, given)
        self._flipped[index] = flipped
        return flipped.to(labels.device, labels.dtype)

    def update(
        self,
        index: Tensor,
        *,
        losses: Tensor,
        norms: Tensor | None = None,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        lr: float = 1.0,
    ) -> None:
        """Take in one batch of B different examples.

        Args:
            index: positions of the examples in the data set, shape (B,), integers below n.
            losses: their losses, shape (B,).
            norms: their gradient norms, shape (B,); in every update or in none.
            logits, labels: outputs of shape (B, n_classes) and labels that were trained on, of shape (B,); required
                with n_classes. An example with the label -100 is left out.
            lr: learning rate of this step, for the self-influence.

        Raises:
            InputError: a shape does not fit, a position is out of range or occurs twice, or a label changed.
            NonFiniteError: a loss, norm or logit is inf or nan; nothing was taken in.
        """
        if (norms is not None) is not (self._has_norms if self._has_norms is not None else norms is not None):
            raise InputError("norms were given in some updates and not in others; give them in every update or in none")
        batch = checked(index, losses, norms, logits, labels, n=self.n, n_classes=self.n_classes)
        if self._shifts is not None and not self._has_planted:
            raise InputError(
                "calibrate flips labels: train on `labels = audit.plant(index, labels)`, and pass these here"
            )
        if self._shifts is not None and batch.labels is not None:
            wrong = (self._shifts[batch.index] > 0) & (self._flipped[batch.index] != batch.labels)
            if wrong.any():
                raise InputError(
                    f"example {int(batch.index[wrong][0])} was flipped by `plant`, and another label is passed here; "
                    "train on what `plant` returned and pass that"
                )
        if self.gather:
            batch = gathered(batch)
        self._take_labels(batch)
        self._has_norms = norms is not None
        positions = set(batch.index.tolist())
        if not self._waiting_for.isdisjoint(positions):
            self._settle()
        self._waiting.append((batch, lr))
        self._waiting_for |= positions
        if len(self._waiting_for) * (self.n_classes or 1) >= WAITING:
            self._settle()

    def _settle(self) -> None:
        """Add what waits to the columns. Each example waits once at most, so that the batches can be taken as one.

        A dozen operations on 64 examples take as long as on a thousand: what a small model's step costs is mostly their
        number.
        """
        if not self._waiting:
            return
        rates = torch.cat([torch.full((len(batch),), lr, dtype=torch.float64) for batch, lr in self._waiting])
        batch = joined([batch for batch, _ in self._waiting])
        self._waiting.clear()
        self._waiting_for.clear()
        old = dict(zip(COLUMNS, self._columns[:, batch.index].unbind(), strict=True))
        new = {"seen": old["seen"] + 1, "loss_sum": old["loss_sum"] + batch.losses, "loss": batch.losses}
        if batch.norms is not None:
            new |= _norm_columns(old, batch.norms, rates)
        if batch.logits is not None and batch.labels is not None:
            probabilities = batch.logits.softmax(dim=1)
            new |= _label_columns(old, batch.logits, batch.labels, probabilities)
            self._probability_sum.index_add_(0, batch.index, probabilities)
        self._columns[:, batch.index] = torch.stack([new.get(name, old[name]) for name in COLUMNS])

    def _take_labels(self, batch: Batch) -> None:
        if batch.labels is None:
            return
        before = self._labels[batch.index]
        changed = (before >= 0) & (before != batch.labels)
        if changed.any():
            raise InputError(
                f"example {batch.index[changed][0]} has another label than in an earlier update; reset() first"
            )
        self._labels[batch.index] = batch.labels

    def compute(self) -> AuditScores:
        """The scores of all examples so far; the accumulated state is left as it is."""
        self._settle()
        is_seen = self._column("seen") > 0
        seen = torch.where(is_seen, self._column("seen"), torch.nan)
        mean_loss = self._column("loss_sum") / seen
        scores: dict[str, Any] = {
            "times_seen": self._column("seen").long(),
            "mean_loss": mean_loss.float(),
            "final_loss": torch.where(is_seen, self._column("loss"), torch.nan).float(),
        }
        if self._has_norms:
            scores |= self._norm_scores(seen)
        if self.n_classes is not None:
            scores |= self._label_scores(seen)
        planted = None
        if self._shifts is not None and self.n_classes is not None:
            planted = (self._shifts > 0) & is_seen
            scores["planted"] = planted
            scores["before"] = torch.where(is_seen, (self._labels - self._shifts) % self.n_classes, -1)
            doubted = scores["flagged"]
            scores["calibration"] = calibrated(doubted[is_seen], mean_loss[is_seen], planted[is_seen], self.n_classes)
            scores["flagged"] = doubted & ~planted
        return AuditScores(rank=_ranks(mean_loss, planted), **scores)

    def select(
        self,
        keep: float = 0.4,
        drop_top: str | float = "flags",
        *,
        prefer: str = "high",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Positions of the examples to train on: the suspicious left out, then a share of all kept.

        On digits, a fresh network trained on 40% of 1257 examples reached a test accuracy of .972 with the highest
        losses among the unflagged and of .953 with 40% at random; with 20% wrong labels .962 against .776, and .951 at
        random among the unflagged. Of 20% kept, the highest losses were no better than random among the unflagged; of
        10% they were worse (.869 against .906, with 20% wrong labels .813 against .908). The lowest were always worse.
        All standard errors are below .025 (`examples/select_examples.py`). Other data may differ: compare with random.

        Args:
            keep: share of the examples seen, above 0 and at most 1; where fewer are left, all of these are kept.
            drop_top: what to leave out first: "flags", those that are likely mislabelled; a share (float) or a number
                (int) of the ranking by mean loss. Examples never seen, and planted ones, are always left out.
            prefer: of the rest the "high" mean losses, "low" ones, or "random" ones.
            generator: draws the random ones; None takes one of its own with seed 0.
        Returns:
            int64, ascending.
        Warns:
            RowgradWarning: where random was measured to be better: "low"; "high" with less than a fifth kept, or with
                flagged examples making up over a twentieth of what is kept.
        Raises:
            InputError: an argument is out of range, or there are no flags, for want of labels.

        >>> audit = Audit(5)
        >>> audit.update(torch.arange(5), losses=torch.tensor([0.1, 9.0, 0.3, 0.4, 0.2]))
        >>> audit.select(0.4, drop_top=1)
        tensor([2, 3])
        """
        return select(self.compute(), keep, drop_top, prefer, generator)

    def table(self, to: str | PathLike[str] = "polars") -> Any:
        """The scores as a table, one row per example; see `rowgrad.uses.tables.scores_table`.

        Args:
            to: "polars" or "pandas" for a data frame of that library; a path ending in .parquet to write one there.
        Raises:
            InputError: `to` is none of these, or what it needs is not installed.
        """
        return scores_table(self.compute(), to)

    def report(
        self,
        path: str | PathLike[str],
        *,
        title: str = "Audit",
        classes: Sequence[str] | None = None,
        examples: Any = None,
        conflict: Tensor | None = None,
        further: Mapping[str, str] | None = None,
    ) -> None:
        """Write a page about the audit: one HTML file that needs nothing else.

        Args:
            path: of the file; its directory must be there.
            classes: names of the labels.
            examples: gives by position what to show of an example: a picture (tensor or array of 2 or 3 dimensions), a
                text, or a mapping of named values.
            conflict: mean cosines between classes, (n_classes, n_classes), from `rowgrad.uses.sections.class_conflict`.
            further: sections of your own, {heading: HTML}; the HTML is taken as it is.
        """
        shown = audit_page(
            self.compute(), title=title, classes=classes, examples=examples, conflict=conflict, further=further
        )
        with whole(path) as stage:
            stage.write_text(shown, encoding="utf-8")

    def _norm_scores(self, seen: Tensor) -> dict[str, Tensor]:
        names = {"final_norm": "norm", "peak_norm": "peak", "self_influence": "influence"}
        found = {name: (self._column(column) * (seen / seen)).float() for name, column in names.items()}
        mean_norm = (self._column("norm_sum") / seen).float()
        return found | {"mean_norm": mean_norm, "peak_visit": self._column("peak_visit").long()}

    def _label_scores(self, seen: Tensor) -> dict[str, Tensor]:
        probability = self._probability_sum / seen[:, None].float()
        best = probability.max(dim=1)
        is_seen = ~seen.isnan()
        confidence = self._column("given_sum") / seen
        variance = self._column("given_sq_sum") / seen - confidence.square()
        return {
            "given": self._labels.clone(),
            "mean_margin": (self._column("margin_sum") / seen).float(),
            "confidence": confidence.float(),
            "variability": variance.clamp_min(0).sqrt().float(),
            "suggested": torch.where(is_seen, best.indices, -1),
            "suggested_probability": best.values,
            "times_forgotten": self._column("forgotten").long(),
            "first_learned": self._column("learned").long(),
            "flagged": (best.indices != self._labels) & is_seen,
        }

    def _column(self, name: str) -> Tensor:
        return self._columns[_AT[name]]


def _norm_columns(old: Mapping[str, Tensor], norms: Tensor, rates: Tensor) -> dict[str, Tensor]:
    higher = (norms > old["peak"]) | (old["seen"] == 0)
    return {
        "norm_sum": old["norm_sum"] + norms,
        "norm": norms,
        "peak": torch.where(higher, norms, old["peak"]),
        "peak_visit": torch.where(higher, old["seen"] + 1, old["peak_visit"]),
        "influence": old["influence"] + rates * norms.square(),
    }


def _label_columns(
    old: Mapping[str, Tensor], logits: Tensor, labels: Tensor, probabilities: Tensor
) -> dict[str, Tensor]:
    column = labels[:, None]
    logit, given = logits.gather(1, column)[:, 0], probabilities.gather(1, column)[:, 0].double()
    others = logits.scatter(1, column, -torch.inf).amax(dim=1)
    is_right = (logit > others).double()
    return {
        "margin_sum": old["margin_sum"] + (logit - others),
        "given_sum": old["given_sum"] + given,
        "given_sq_sum": old["given_sq_sum"] + given.square(),
        "was_right": is_right,
        "forgotten": old["forgotten"] + old["was_right"] * (1 - is_right),
        "learned": torch.where(old["learned"] == 0, (old["seen"] + 1) * is_right, old["learned"]),
    }


def _ranks(suspicion: Tensor, planted: Tensor | None) -> Tensor:
    """1 for the largest value; ties in order of position; the planted behind all others, NaN last."""
    order = suspicion.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    if planted is not None:
        group = planted.long() + 2 * suspicion.isnan()
        order = order[group[order].argsort(stable=True)]
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(1, len(order) + 1)
    return ranks
