"""One batch as an audit takes it in: on the CPU, detached, and checked before anything is accumulated."""

from dataclasses import dataclass

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
    """The batch, without the examples whose label is -100; see `Audit.update` for what is refused."""
    index = index.detach().to("cpu", torch.int64)
    _check_index(index, n)
    losses = _vector(index, "losses", losses)
    norms = None if norms is None else _vector(index, "norms", norms)
    if n_classes is None:
        return Batch(index, losses, norms, None, None)
    if logits is None or labels is None:
        raise InputError(
            "an audit with n_classes needs logits and labels in every update; for regression leave it None"
        )
    logits, labels = logits.detach().to("cpu", torch.float32), labels.detach().to("cpu", torch.int64)
    if logits.shape != (len(index), n_classes) or labels.shape != index.shape:
        raise InputError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; "
            f"expected ({len(index)}, {n_classes}) and ({len(index)},)"
        )
    batch = Batch(index, losses, norms, logits, labels)
    if bool((labels == IGNORED).any()):
        batch = batch.kept(labels != IGNORED)
    _check_labels(batch, n_classes)
    return batch


def _check_labels(batch: Batch, n_classes: int) -> None:
    labels, logits = batch.labels, batch.logits
    assert labels is not None
    assert logits is not None
    _check_finite(batch.index, "logits", logits.sum(dim=1))
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise InputError(f"labels run from {labels.min()} to {labels.max()}; expected 0 to {n_classes - 1}")


def _check_index(index: Tensor, n: int) -> None:
    if index.ndim != 1:
        raise InputError(f"index has shape {tuple(index.shape)}; expected one position per example, shape (B,)")
    if not index.numel():
        return
    ordered = index.sort().values
    if not 0 <= int(ordered[0]) <= int(ordered[-1]) < n:
        raise InputError(f"index runs from {ordered[0]} to {ordered[-1]}; this audit has examples 0 to {n - 1}")
    if bool((ordered[1:] == ordered[:-1]).any()):
        raise InputError("index holds an example twice; an update takes in different examples")


def _vector(index: Tensor, name: str, values: Tensor) -> Tensor:
    values = values.detach().to("cpu", torch.float64)
    if values.shape != index.shape:
        raise InputError(f"{name} has shape {tuple(values.shape)}; expected one value per example, ({len(index)},)")
    _check_finite(index, name, values)
    return values


def _check_finite(index: Tensor, name: str, values: Tensor) -> None:
    bad = ~values.isfinite()
    if bad.any():
        raise NonFiniteError(
            f"{name}: example {index[bad][0]} has {values[bad][0]:g}; the audit takes finite values only"
        )


def gathered(batch: Batch) -> Batch:
    """The batches of all processes as one; an example that several of them hold counts once.

    `DistributedSampler` gives the last processes examples of the first ones again, so that all have equally many.
    """
    parts: list[Batch | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, batch)
    names = ("index", "losses", "norms", "logits", "labels")
    joined = [_joined([getattr(part, name) for part in parts]) for name in names]
    index = joined[0]
    assert index is not None
    ordered, positions = index.sort(stable=True)
    is_first = torch.ones(len(index), dtype=torch.bool)
    is_first[positions[1:]] = ordered[1:] != ordered[:-1]
    return Batch(*joined).kept(is_first)  # type: ignore[arg-type]


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None
