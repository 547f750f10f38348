"""One batch as an audit takes it in: on the CPU, detached, and checked before anything is accumulated."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from rowgrad.errors import InputError

IGNORED = -100  # the label that PyTorch's losses leave out
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Batch:
    """B examples: positions (B,), losses and norms (B,) in float64, logits (B, K) in float32, labels (B,)."""

    index: Tensor
    losses: Tensor
    norms: Tensor | None
    logits: Tensor | None
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def positions(self) -> set[int]:
        """The examples in it."""
        return set(self.index.tolist())

    def kept(self, keep: Tensor) -> "Batch":
        """The examples where the mask `keep`, shape (B,), is True."""
        parts = (self.index, self.losses, self.norms, self.logits, self.labels)
        return Batch(*(None if part is None else part[keep] for part in parts))  # type: ignore[arg-type]

    def visits(self) -> "list[Batch]":
        """Batches of different examples: the first visits of all, then the second ones of those drawn twice, ..."""
        if len(self.positions) == len(self):
            return [self]
        times: dict[int, int] = {}
        number = []
        for position in self.index.tolist():
            number.append(times.get(position, 0))
            times[position] = number[-1] + 1
        numbers = torch.tensor(number)
        return [self.kept(numbers == k) for k in range(max(number) + 1)]

    def overflowed(self) -> dict[str, Tensor]:
        """Masks, (B,), of the examples whose losses, norms or logits are not finite, by these names; empty if all are.

        Another label's logit may be -inf: its probability is 0. One look at the sum of everything; only where that is
        inf or nan the values one by one.
        """
        parts = {"losses": self.losses, "norms": self.norms, "logits": self.logits}
        found = {name: part for name, part in parts.items() if part is not None}
        if isfinite(sum(float(part.sum()) for part in found.values())):
            return {}
        bad = {name: ~part.isfinite() for name, part in found.items() if part.ndim == 1}
        if self.logits is not None and self.labels is not None:
            given = self.logits.gather(1, self.labels[:, None])
            bad["logits"] = (~given.isfinite() | ~(self.logits < inf)).any(dim=1)
        return {name: mask for name, mask in bad.items() if mask.any()}


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
    index = _whole_numbers("index", index)
    _check_index(index, n)
    losses = _vector(index, "losses", losses)
    norms = None if norms is None else _vector(index, "norms", norms)
    if n_classes is None:
        if logits is not None or labels is not None:
            raise InputError(
                "this audit was made without n_classes and takes no logits and labels; make it with "
                "rg.Audit(n, n_classes=...), or leave them out"
            )
        batch = Batch(index, losses, norms, None, None)
    else:
        batch = _with_outputs(Batch(index, losses, norms, logits, labels), n_classes)
    if norms is not None and (norms < 0).any():
        raise InputError(f"norms: the smallest is {float(norms[norms < 0].min()):g}; norms are not negative")
    return batch


def _with_outputs(batch: Batch, n_classes: int) -> Batch:
    if batch.logits is None or batch.labels is None:
        raise InputError(
            "an audit with n_classes needs logits and labels in every update; for regression leave it None"
        )
    logits, labels = _tensor("logits", batch.logits), _whole_numbers("labels", batch.labels)
    if logits.shape != (len(batch), n_classes) or labels.shape != batch.index.shape:
        raise InputError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; "
            f"expected ({len(batch)}, {n_classes}) and ({len(batch)},)" + _of_one_logit(logits, batch, n_classes)
        )
    _check_real("logits", logits)
    logits = logits.detach().to("cpu", torch.float32, copy=True)
    batch = Batch(batch.index, batch.losses, batch.norms, logits, labels)
    found = labels.tolist()
    if IGNORED in found:
        batch = batch.kept(labels != IGNORED)
    _check_labels(found, n_classes)
    return batch


def _of_one_logit(logits: Tensor, batch: Batch, n_classes: int) -> str:
    """What to do about outputs as `binary_cross_entropy_with_logits` takes them."""
    if n_classes != 2 or tuple(logits.shape) not in ((len(batch),), (len(batch), 1)):
        return ""
    flat = "logits" if logits.ndim == 1 else "logits[:, 0]"
    return f"; of a single logit make two: torch.stack([torch.zeros_like({flat}), {flat}], 1)"


def _check_labels(labels: list[int], n_classes: int) -> None:
    """Range errors of labels, of which -100 is none."""
    if labels and not 0 <= min(labels) <= max(labels) < n_classes:
        labels = [label for label in labels if label != IGNORED]
        if labels and not 0 <= min(labels) <= max(labels) < n_classes:
            raise InputError(f"labels run from {min(labels)} to {max(labels)}; expected 0 to {n_classes - 1}")


def _check_index(index: Tensor, n: int) -> None:
    if index.ndim != 1:
        raise InputError(f"index has shape {tuple(index.shape)}; expected one position per example, shape (B,)")
    positions = index.tolist()
    if positions and not 0 <= min(positions) <= max(positions) < n:
        raise InputError(f"index runs from {min(positions)} to {max(positions)}; this audit has examples 0 to {n - 1}")


def check_planted(index: Tensor, labels: Tensor, n: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """Positions and labels as copies on the CPU; what `Audit.plant` refuses."""
    index, labels = _whole_numbers("index", index), _whole_numbers("labels", labels)
    _check_index(index, n)
    if labels.shape != index.shape:
        raise InputError(f"labels have shape {tuple(labels.shape)}; expected one per example, ({len(index)},)")
    _check_labels(labels.tolist(), n_classes)
    return index, labels


def _tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is a {type(values).__name__}; expected a tensor") from error


def _whole_numbers(name: str, values: Any) -> Tensor:
    values = _tensor(name, values)
    if values.dtype not in INTEGERS and values.numel():
        raise InputError(f"{name} holds {str(values.dtype).removeprefix('torch.')}; expected whole numbers, as int64")
    return values.detach().to("cpu", torch.int64, copy=True)


def _check_real(name: str, values: Tensor) -> None:
    if values.is_complex():
        raise InputError(f"{name} holds {str(values.dtype).removeprefix('torch.')}; expected real numbers")


def _vector(index: Tensor, name: str, values: Any) -> Tensor:
    values = _tensor(name, values)
    if values.shape != index.shape:
        raise InputError(f"{name} has shape {tuple(values.shape)}; expected one value per example, ({len(index)},)")
    _check_real(name, values)
    return values.detach().to("cpu", torch.float64, copy=True)


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches of the same kind as one."""
    if len(batches) == 1:
        return batches[0]
    names = [field.name for field in fields(Batch)]
    parts = ([getattr(batch, name) for batch in batches] for name in names)
    return Batch(*(None if values[0] is None else torch.cat(values) for values in parts))  # type: ignore[arg-type]


def each_once(batch: Batch) -> Batch:
    """The first visit of each example alone, in order of position."""
    ordered, positions = batch.index.sort(stable=True)
    is_first = torch.ones(len(ordered), dtype=torch.bool)
    is_first[positions[1:]] = ordered[1:] != ordered[:-1]
    return batch.kept(is_first)
