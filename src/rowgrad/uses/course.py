"""What an audit accumulates of each example's course through training.

Note [rows of the table]: the numbers of an example lie side by side, so that a batch reads and writes one stretch of
memory for each example. Probabilities are made with the classes in the first dimension: a softmax over the last one,
of ten or so, is not vectorized and took six times as long. It takes 64 examples at a time, since the last few would be
computed by other instructions and rounded otherwise: what an example scores must not depend on its place in the batch.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rowgrad.uses.batch import Batch

# Accumulated for each example, in float64: counts are exact up to 2^53.
COLUMNS = (
    *("seen", "loss_sum", "loss"),
    *("norm_sum", "norm", "peak", "peak_visit", "influence"),
    *("margin_sum", "given_sum", "given_sq_sum", "was_right", "forgotten", "learned"),
)
SIGNED = ("loss_sum", "loss", "margin_sum")  # of these, what may be negative
_AT = {name: position for position, name in enumerate(COLUMNS)}


class Course:
    """Sums over the visits of n examples, and of their probabilities over `n_classes` labels."""

    def __init__(self, n: int, n_classes: int | None) -> None:
        self._table = torch.zeros(n, len(COLUMNS), dtype=torch.float64)
        self.probability_sum = torch.zeros(n, n_classes or 0)

    def __getitem__(self, name: str) -> Tensor:
        """A column, shape (n,); writing to it writes to the table."""
        return self._table[:, _AT[name]]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is accumulated, by name; writing to these writes to the table."""
        return {name: self[name] for name in COLUMNS} | {"probability_sum": self.probability_sum}

    def add(self, batch: Batch, rates: Tensor) -> None:
        """A visit to each of B different examples, at learning rates of shape (B,)."""
        old = dict(zip(COLUMNS, self._table.index_select(0, batch.index).T.contiguous().unbind(), strict=True))
        new = {"seen": old["seen"] + 1, "loss_sum": old["loss_sum"] + batch.losses, "loss": batch.losses}
        if batch.norms is not None:
            new |= _norm_columns(old, batch.norms, rates)
        if batch.logits is not None and batch.labels is not None:
            logits = batch.logits.T.contiguous()
            probabilities = F.pad(logits, (0, -len(batch) % 64)).softmax(dim=0)[:, : len(batch)]
            new |= _label_columns(old, logits, batch.labels, probabilities)
            self.probability_sum.index_add_(0, batch.index, probabilities.T)
        values = torch.stack([new.get(name, old[name]) for name in COLUMNS])
        self._table.index_copy_(0, batch.index, values.T)


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
    """Logits and probabilities of shape (K, B)."""
    row = labels[None]
    logit, given = logits.gather(0, row)[0], probabilities.gather(0, row)[0].double()
    margin = logit - logits.scatter(0, row, -torch.inf).amax(dim=0)
    is_right = (margin > 0).double()
    return {
        "margin_sum": old["margin_sum"] + margin,
        "given_sum": old["given_sum"] + given,
        "given_sq_sum": torch.addcmul(old["given_sq_sum"], given, given),
        "was_right": is_right,
        "forgotten": torch.addcmul(old["forgotten"], old["was_right"], 1 - is_right),
        "learned": torch.where(old["learned"] == 0, (old["seen"] + 1) * is_right, old["learned"]),
    }
