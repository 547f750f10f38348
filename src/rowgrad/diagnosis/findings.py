"""What a diagnosis says: one finding for each thing that is wrong, and what was not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

SEVERITIES = ("error", "warning", "note")  # learning cannot go on; it will be slow or fail; worth knowing


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: one word of `KINDS`.
        where: layers, parameters or operations, by name.
        evidence: what was measured.
        remedy: what to do, with a number.
        severity: "error", "warning" or "note"; a note leaves the diagnosis ok.
        value: the number that was compared, nan where there is none.
        limit: what it was compared with, nan where there is none.

    >>> Finding("inputs", "the input of fc1", "root mean square 255", "Multiply the data by 0.0039").severity
    'warning'
    """

    kind: str
    where: str
    evidence: str
    remedy: str
    severity: str = "warning"
    value: float = float("nan")
    limit: float = float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; numbers that JSON has no word for are strings."""
        return asdict(self) | {"value": plain(self.value), "limit": plain(self.limit)}

    def __str__(self) -> str:
        return f"{self.severity}: {self.kind} at {self.where}: {self.evidence}. {self.remedy}"


# kind: what `diagnose` has to be given to look for it, None where the losses and the model are enough.
KINDS: dict[str, str | None] = {
    "not finite": None,
    "vanishing": None,
    "exploding": None,
    "saturated": None,
    "dead": "batches= with the losses of further batches, best of the whole data set",
    "symmetric": None,
    "unused": None,
    "inputs": None,
    "ratios": None,
    "bias before BatchNorm": None,
    "mixed": "losses as a vector, one per example (reduction=\"none\")",
    "start": "initial=True, if the weights are as they were drawn; the loss has to be a cross-entropy",
    "update": "optimizer=",
    "cliff": "closure= and optimizer=",
    "drift": "earlier= with a former Diagnosis of the same model",
}  # fmt: skip


def plain(value: float) -> float | str:
    """A number as JSON can hold it."""
    return value if isfinite(value) else str(value)


def by_severity(findings: Iterator[Finding]) -> tuple[Finding, ...]:
    """The worst first, otherwise in the order in which they were found."""
    return tuple(sorted(findings, key=lambda f: SEVERITIES.index(f.severity)))


def some(names: list[str] | tuple[str, ...], most: int = 3) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
