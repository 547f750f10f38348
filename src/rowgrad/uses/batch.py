"""One batch as an audit takes it in: on the CPU, detached, and checked before anything is accumulated."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rowgrad.errors import InputError, NonFiniteError

IGNORED = -100  # the label that PyTorch's losses leave out


@dataclass(frozen=True)
class Batch:
    """B different examples: positions (B,), losses and norms (B,) in float64, logits (B, K) in float32, labels (B,)."""

    index: Tensor
    losses: Tensor
    norms: Tensor | None
    logits: Tensor | None
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.index)

    def kept(self, keep: Tensor) -> "Batch":
        """The examples where the mask `keep`, shape (B,), is True."""
        parts = (self.index, self.losses, self.norms, self.logits, self.labels)
        return Batch(*(None if part is None else part[keep] for part in parts))  # type: ignore[arg-type]


def checked(
    index: Tensor,
    losses: Tensor,
    norms: Tensor | None,
    logits: Tensor | None,
    labels: Tensor | None,
    *,
    n: int,
    n_classes: int | None,
) -> Batch:
    """The batch, copied, without the examples whose label is -100; see `Audit.update` for what is refused."""
    index = index.detach().to("cpu", torch.int64, copy=True)
    _check_index(index, n)
    losses = _vector(index, "losses", losses)
    norms = None if norms is None else _vector(index, "norms", norms)
    if n_classes is None:
        batch = Batch(index, losses, norms, None, None)
    else:
        batch = Batch(index, losses, norms, *_outputs(index, logits, labels, n_classes))
        if batch.labels is not None and bool((batch.labels == IGNORED).any()):
            batch = batch.kept(batch.labels != IGNORED)
        _check_labels(batch, n_classes)
    _check_finite(batch)
    return batch


def _outputs(index: Tensor, logits: Tensor | None, labels: Tensor | None, n_classes: int) -> tuple[Tensor, Tensor]:
    if logits is None or labels is None:
        raise InputError(
            "an audit with n_classes needs logits and labels in every update; for regression leave it None"
        )
    if logits.shape != (len(index), n_classes) or labels.shape != index.shape:
        raise InputError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; "
            f"expected ({len(index)}, {n_classes}) and ({len(index)},)"
        )
    return logits.detach().to("cpu", torch.float32, copy=True), labels.detach().to("cpu", torch.int64, copy=True)


def _check_labels(batch: Batch, n_classes: int) -> None:
    labels = [] if batch.labels is None else batch.labels.tolist()
    if labels and not 0 <= min(labels) <= max(labels) < n_classes:
        raise InputError(f"labels run from {min(labels)} to {max(labels)}; expected 0 to {n_classes - 1}")


def _check_index(index: Tensor, n: int) -> None:
    if index.ndim != 1:
        raise InputError(f"index has shape {tuple(index.shape)}; expected one position per example, shape (B,)")
    positions = index.tolist()
    if positions and not 0 <= min(positions) <= max(positions) < n:
        raise InputError(f"index runs from {min(positions)} to {max(positions)}; this audit has examples 0 to {n - 1}")
    if len(set(positions)) < len(positions):
        raise InputError(
            "index holds an example twice; an update takes in different examples. Of a batch drawn with replacement "
            "pass each example once"
        )


def check_planted(index: Tensor, labels: Tensor, n: int, n_classes: int) -> None:
    """What `Audit.plant` refuses."""
    _check_index(index, n)
    if labels.shape != index.shape:
        raise InputError(f"labels have shape {tuple(labels.shape)}; expected one per example, ({len(index)},)")
    real = labels[labels != IGNORED].tolist()
    if real and not 0 <= min(real) <= max(real) < n_classes:
        raise InputError(f"labels run from {min(real)} to {max(real)}; expected 0 to {n_classes - 1}")


def _vector(index: Tensor, name: str, values: Tensor) -> Tensor:
    if values.shape != index.shape:
        raise InputError(f"{name} has shape {tuple(values.shape)}; expected one value per example, ({len(index)},)")
    return values.detach().to("cpu", torch.float64, copy=True)


def _check_finite(batch: Batch) -> None:
    """One look at the sum of everything; only where that is inf or nan the values one by one."""
    parts = {"losses": batch.losses, "norms": batch.norms, "logits": batch.logits}
    found = {name: values for name, values in parts.items() if values is not None}
    if isfinite(sum(float(values.sum()) for values in found.values())):
        return
    for name, values in found.items():
        bad = ~(values if values.ndim == 1 else values.sum(dim=1)).isfinite()
        if bad.any():
            value = values[bad][0].flatten()
            raise NonFiniteError(
                f"{name}: example {batch.index[bad][0]} has {value[~value.isfinite()][0]:g}; the audit takes finite "
                "values only"
            )


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches of the same kind as one."""
    names = [field.name for field in fields(Batch)]
    parts = ([getattr(batch, name) for batch in batches] for name in names)
    return Batch(*(None if values[0] is None else torch.cat(values) for values in parts))  # type: ignore[arg-type]


def gathered(batch: Batch) -> Batch:
    """The batches of all processes as one; an example that several of them hold counts once.

    `DistributedSampler` gives the last processes examples of the first ones again, so that all have equally many.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, batch)
    everything = joined(found)
    ordered, positions = everything.index.sort(stable=True)
    is_first = torch.ones(len(ordered), dtype=torch.bool)
    is_first[positions[1:]] = ordered[1:] != ordered[:-1]
    return everything.kept(is_first)
