"""Find mislabelled examples from quantities that training computes anyway.

Note [trajectory rule]: early in training a network fits what examples have in common, late it memorizes single ones.
A probability averaged over the whole run still shows the label that the other examples suggested before the wrong one
was learned by heart; the probability at the end does not. Averaging the loss ranks examples for the same reason.
"""

import warnings
from collections.abc import Mapping, Sequence
from math import inf
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from rowgrad.errors import InputError, RowgradWarning
from rowgrad.files import whole as whole_file
from rowgrad.uses.batch import IGNORED, Batch, check_planted, checked, each_once, joined
from rowgrad.uses.calibration import calibrate as calibrated
from rowgrad.uses.calibration import draw_shifts
from rowgrad.uses.course import COLUMNS, SIGNED, Course
from rowgrad.uses.expected import FLAG, Expected, check, checked_state, is_whole, number, same, tensor, whole
from rowgrad.uses.page import audit_page
from rowgrad.uses.processes import check_initialized, from_all, from_first
from rowgrad.uses.scores import AuditScores
from rowgrad.uses.select import select
from rowgrad.uses.tables import scores_table

RATE = number("the learning rate of this step, finite and not negative", lambda v: 0 <= v < inf)
WAITING = 10_000  # examples times classes that wait to be added together


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
            each process holds the audit of all examples; one that several hold in a step counts once. All processes
            must update equally often; the labels to flip are those of the first.
    Attributes:
        skipped: visits left out because a loss, a norm or the logits were not finite, as under a `GradScaler` that
            skips the step and lowers its scale.

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
        sizes = [n] if n_classes is None else [n, n_classes]
        if not all(is_whole(size) and size > least for size, least in zip(sizes, (0, 1), strict=False)):
            raise InputError(
                f"an audit needs an example and, for labels, two classes; got n={n!r} and n_classes={n_classes!r}, "
                "expected whole numbers: len(dataset), and how many labels there are"
            )
        self.n, self.n_classes, self.gather = int(n), None if n_classes is None else int(n_classes), gather
        self._shifts = draw_shifts(self.n, self.n_classes, calibrate, generator) if calibrate else None
        if gather and self._shifts is not None:
            self._shifts = from_first(self._shifts)
        elif gather:
            check_initialized("gather=True")
        self.reset()

    def reset(self) -> None:
        """Forget every update; the same labels stay flipped."""
        self._course = Course(self.n, self.n_classes)
        self._labels = torch.full((self.n,), -1, dtype=torch.int64)
        self._has_norms: bool | None = None
        self._has_planted = False
        self.skipped = 0
        self._flipped = torch.full((0 if self._shifts is None else self.n,), -1)  # what `plant` returned
        self._waiting: list[tuple[Batch, float]] = []
        self._waiting_for: set[int] = set()

    def state_dict(self) -> dict[str, Any]:
        """What was taken in so far: tensors on the CPU and plain values, for `torch.save` and a later run.

        `torch.load` reads it back with `weights_only=True`. The tensors are copies: later updates leave them alone.
        """
        shifts = None if self._shifts is None else self._shifts.clone()
        plain = {"n": self.n, "n_classes": self.n_classes, "has_norms": self._has_norms, "skipped": self.skipped}
        return (
            plain
            | {"has_planted": self._has_planted, "shifts": shifts, "flipped": self._flipped.clone()}
            | {name: values.clone() for name, values in self._tensors().items()}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` gave; the labels that are flipped are those of the state.

        Raises:
            InputError: the state is of another n or n_classes, lacks an entry, or holds one of another kind, shape or
                range; nothing was loaded.
        """
        found = checked_state("Audit", state, self._expected(state))
        self._has_norms, self._has_planted, self.skipped = found["has_norms"], found["has_planted"], found["skipped"]
        self._shifts, self._flipped = found["shifts"], found["flipped"]
        for name, values in self._tensors().items():
            values.copy_(found[name])

    def _expected(self, state: Any) -> dict[str, Expected]:
        """What a state of an audit of these sizes holds; the labels planted depend on whether any are to be."""
        n, last = self.n, (self.n_classes or 0) - 1
        is_planted = isinstance(state, Mapping) and state.get("shifts") is not None
        shifts = tensor(torch.int64, n, least=0, most=max(0, last))
        sums = {name: tensor(torch.float64, n, least=-inf if name in SIGNED else 0, most=inf) for name in COLUMNS}
        return {
            "n": same(n),
            "n_classes": same(self.n_classes),
            "has_norms": Expected("True, False or None", lambda v: v is None or isinstance(v, bool)),
            "skipped": whole(0),
            "has_planted": FLAG,
            "shifts": Expected(f"None, or {shifts.what}", lambda v: v is None or shifts.fits(v)),
            "flipped": tensor(torch.int64, n if is_planted else 0, least=IGNORED, most=last),
            "labels": tensor(torch.int64, n, least=-1, most=last),
            "probability_sum": tensor(torch.float32, n, self.n_classes or 0, least=0, most=inf),
        } | sums

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that is accumulated, by name."""
        self._settle()
        return self._course.tensors() | {"labels": self._labels}

    def plant(self, index: Tensor, labels: Tensor) -> Tensor:
        """The labels to train on: those of the examples chosen for calibration flipped, the others as they are.

        The same example gets the same label every time. Call it in the process that updates, not in a data worker.
        Without `calibrate` the labels are returned as they are.

        Args:
            index, labels: positions and labels of B examples, shape (B,), as tensors, arrays or lists; labels of -100
                are left alone.
        Returns:
            (B,), on the device of the labels; of lists and arrays an int64 tensor on the CPU.
        Raises:
            InputError: a position or a label is out of range, or their shapes differ.

        >>> audit = Audit(4, n_classes=2, calibrate=0.25)
        >>> (audit.plant(torch.arange(4), torch.zeros(4, dtype=torch.int64)) == 1).sum()
        tensor(1)
        """
        if self._shifts is None or self.n_classes is None:
            return labels
        index, given = check_planted(index, labels, self.n, self.n_classes)
        self._has_planted = True
        shifts = self._shifts[index]
        flipped = torch.where((shifts > 0) & (given >= 0), (given + shifts) % self.n_classes, given)
        self._flipped[index] = flipped
        return flipped.to(labels.device, labels.dtype) if isinstance(labels, Tensor) else flipped

    def update(
        self,
        index: Tensor,
        *,
        losses: Tensor,
        norms: Tensor | None = None,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        lr: float | Tensor = 1.0,
    ) -> None:
        """Take in one batch of B examples. One that the batch holds twice, drawn with replacement, is visited twice.

        Args:
            index: positions of the examples in the data set, shape (B,), integers below n.
            losses: their losses, shape (B,), not divided and not multiplied by a scale.
            norms: their gradient norms, shape (B,); in every update or in none.
            logits, labels: outputs of shape (B, n_classes) and labels that were trained on, of shape (B,); required
                with n_classes. An example with the label -100 is left out.
            lr: learning rate of this step, for the self-influence. The step is taken to be one along the mean gradient
                of the batch, with gather=True of all processes' batches: each example's share of it is lr / B. Where
                n micro-batches make a step, pass lr / n.

        Raises:
            InputError: a shape or dtype does not fit, a position or label is out of range, a norm or the lr is
                negative, or a label changed; nothing was taken in. With gather=True it is raised in all processes.
        Warns:
            RowgradWarning: at the first example with a loss, norm or logit that is inf or nan. Such examples are left
                out and counted in `skipped`. A logit of -inf, a probability of 0, is taken for all but the given label.
        """

        def mine() -> tuple[Batch, int]:
            check("Audit.update", {"lr": lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr}, {"lr": RATE})
            return self._checked(index, losses, norms, logits, labels), len(index)

        found = from_all(mine) if self.gather else [mine()]
        batch = joined([batch for batch, _ in found])
        batch, n_left_out, why = _without_overflow(each_once(batch) if self.gather else batch)
        visits = batch.visits()
        self._take_labels(batch)
        self._has_norms = norms is not None
        share = float(lr) / max(1, sum(size for _, size in found))
        for visit in visits:
            self._wait(visit, share)
        if n_left_out and not self.skipped:
            warnings.warn(why, RowgradWarning, stacklevel=2)
        self.skipped += n_left_out

    def _checked(self, index: Tensor, losses: Tensor, norms: Tensor | None, logits: Any, labels: Any) -> Batch:
        if (norms is not None) is not (self._has_norms if self._has_norms is not None else norms is not None):
            raise InputError("norms were given in some updates and not in others; give them in every update or in none")
        batch = checked(index, losses, norms, logits, labels, n=self.n, n_classes=self.n_classes)
        if self._shifts is None or batch.labels is None:
            return batch
        if not self._has_planted:
            raise InputError(
                "calibrate flips labels: train on `labels = audit.plant(index, labels)`, and pass these here"
            )
        wrong = (self._shifts[batch.index] > 0) & (self._flipped[batch.index] != batch.labels)
        if wrong.any():
            raise InputError(
                f"example {int(batch.index[wrong][0])} was flipped by `plant`, and another label is passed here; "
                "train on what `plant` returned and pass that"
            )
        return batch

    def _wait(self, visit: Batch, lr: float) -> None:
        if not self._waiting_for.isdisjoint(visit.positions):
            self._settle()
        self._waiting.append((visit, lr))
        self._waiting_for |= visit.positions
        if len(self._waiting_for) * (self.n_classes or 1) >= WAITING:
            self._settle()

    def _settle(self) -> None:
        """Add what waits to the course. Each example waits once at most, so that the batches can be taken as one.

        A dozen operations on 64 examples take as long as on a thousand: what a small model's step costs is mostly their
        number.
        """
        if not self._waiting:
            return
        sizes = torch.tensor([len(batch) for batch, _ in self._waiting])
        rates = torch.tensor([lr for _, lr in self._waiting], dtype=torch.float64).repeat_interleave(sizes)
        batch = joined([batch for batch, _ in self._waiting])
        self._waiting.clear()
        self._waiting_for.clear()
        self._course.add(batch, rates)

    def _take_labels(self, batch: Batch) -> None:
        if batch.labels is None:
            return
        before = self._labels[batch.index]
        if torch.equal(before, batch.labels):
            return
        self._labels[batch.index] = batch.labels
        differs = self._labels[batch.index] != batch.labels  # from another visit in this batch
        changed = differs | ((before >= 0) & (before != batch.labels))
        if changed.any():
            self._labels[batch.index] = before
            k = batch.index[changed][0]
            if (before[batch.index == k] < 0).all():
                raise InputError(
                    f"example {k} has two labels in this batch; an audit takes one for each example, from 0 to n - 1 "
                    "in the data set: look at how the index is made"
                )
            raise InputError(f"example {k} has another label than at an earlier visit; reset() first")

    def compute(self) -> AuditScores:
        """The scores of all examples so far; the accumulated state is left as it is."""
        self._settle()
        is_seen = self._course["seen"] > 0
        seen = torch.where(is_seen, self._course["seen"], torch.nan)
        mean_loss = self._course["loss_sum"] / seen
        scores: dict[str, Any] = {
            "times_seen": self._course["seen"].long(),
            "mean_loss": mean_loss.float(),
            "final_loss": torch.where(is_seen, self._course["loss"], torch.nan).float(),
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
            RowgradWarning: where the flags mean little (`AuditScores.doubt`), where fewer than `keep` are left (below
                1, which asks for all that are), and where random was measured to be better: "low"; "high" with less
                than a fifth kept, or with flagged examples making up over a twentieth of what is kept.
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
        conflict: Any = None,
        further: Mapping[str, str] | None = None,
    ) -> None:
        """Write a page about the audit: one HTML file that needs nothing else.

        Args:
            path: of the file; its directory must be there.
            classes: names of the labels, one for each.
            examples: gives by position what to show of an example: a picture (tensor, array or Pillow image of 2 or 3
                dimensions), a text, or a mapping of named values. The data set of the training will do: of a tuple
                (inputs, label) the inputs are shown; so will a data frame, of which the rows are.
            conflict: mean cosines between classes, (n_classes, n_classes), from `rowgrad.uses.sections.class_conflict`.
            further: sections of your own, {heading: HTML}; the HTML is taken as it is.
        Raises:
            InputError: there are not as many classes or examples as the audit has, `conflict` has another shape, or an
                example is none of these. Nothing is written.
        """
        shown = audit_page(
            self.compute(),
            self.n_classes,
            title=title,
            classes=classes,
            examples=examples,
            conflict=conflict,
            further=further,
        )
        with whole_file(path) as stage:
            stage.write_text(shown, encoding="utf-8")

    def _norm_scores(self, seen: Tensor) -> dict[str, Tensor]:
        names = {"final_norm": "norm", "peak_norm": "peak", "self_influence": "influence"}
        found = {name: (self._course[column] * (seen / seen)).float() for name, column in names.items()}
        mean_norm = (self._course["norm_sum"] / seen).float()
        return found | {"mean_norm": mean_norm, "peak_visit": self._course["peak_visit"].long()}

    def _label_scores(self, seen: Tensor) -> dict[str, Tensor]:
        probability = self._course.probability_sum / seen[:, None].float()
        best = probability.max(dim=1)
        is_seen = ~seen.isnan()
        confidence = self._course["given_sum"] / seen
        variance = self._course["given_sq_sum"] / seen - confidence.square()
        return {
            "given": self._labels.clone(),
            "mean_margin": (self._course["margin_sum"] / seen).float(),
            "confidence": confidence.float(),
            "variability": variance.clamp_min(0).sqrt().float(),
            "suggested": torch.where(is_seen, best.indices, -1),
            "suggested_probability": best.values,
            "times_forgotten": self._course["forgotten"].long(),
            "first_learned": self._course["learned"].long(),
            "flagged": (best.indices != self._labels) & is_seen,
        }


def _without_overflow(batch: Batch) -> tuple[Batch, int, str]:
    """The batch without the examples whose values are not finite, how many these are, and what to say of them."""
    overflowed = batch.overflowed()
    if not overflowed:
        return batch, 0, ""
    bad = torch.stack([*overflowed.values()]).any(dim=0)
    first = int(bad.nonzero()[0])
    names = " and ".join(name for name, mask in overflowed.items() if mask[first])
    why = (
        f"example {int(batch.index[first])}: its {names} are not finite. Such visits are left out of the audit and "
        "counted in audit.skipped; a few are usual under a GradScaler, many mean that the training diverges"
    )
    return batch.kept(~bad), int(bad.sum()), why


def _ranks(suspicion: Tensor, planted: Tensor | None) -> Tensor:
    """1 for the largest value; ties in order of position; the planted behind all others, NaN last."""
    order = suspicion.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    if planted is not None:
        group = planted.long() + 2 * suspicion.isnan()
        order = order[group[order].argsort(stable=True)]
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(1, len(order) + 1)
    return ranks
