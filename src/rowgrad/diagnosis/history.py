"""What a monitor has seen: records as JSON lines, and findings with the time over which they were seen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rowgrad.diagnosis.findings import Finding, plain

Record = dict[str, Any]
QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}


class Writer(Protocol):
    """What a monitor asks of a TensorBoard `SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...
    def add_text(self, tag: str, text_string: str, global_step: int) -> Any: ...


@dataclass(frozen=True)
class Seen:
    """A finding over time: as it was last, the steps at which it was first and last made, and how often."""

    finding: Finding
    first: int
    last: int
    times: int = 1

    def again(self, finding: Finding, step: int) -> Seen:
        """The same kind at the same place once more."""
        return replace(self, finding=finding, last=step, times=self.times + 1)

    @property
    def when(self) -> str:
        """The steps, in words."""
        return f"step {self.first}" if self.times == 1 else f"steps {self.first} to {self.last}, {self.times} times"

    def __str__(self) -> str:
        return f"{self.when}: {self.finding}"


def quantiles(norms: Tensor) -> dict[str, float]:
    """Of the norms of the examples' gradients."""
    points = torch.tensor(list(QUANTILES.values()), dtype=torch.float64, device=norms.device)
    found = torch.quantile(norms.double(), points).tolist()
    return dict(zip(QUANTILES, found, strict=True))


def write_line(path: Path, record: Record) -> None:
    """Append one record; behind a line that was cut short, on a line of its own."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(_json(record), allow_nan=False).encode() + b"\n")


def read_log(path: str | PathLike[str]) -> list[Record]:
    """The records of a log, without lines that were cut short; numbers that were not finite are floats again."""
    found = []
    for line in Path(path).read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            found.append(_numbers(record))
    return found


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    return plain(value) if isinstance(value, float) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def write_scalars(writer: Writer, record: Record) -> None:
    """One record to TensorBoard: finite numbers as scalars, findings as text."""
    step = record["step"]
    for tag, value in _scalars(record):
        if isfinite(value):
            writer.add_scalar(f"rowgrad/{tag}", value, step)
    for finding in record["findings"]:
        writer.add_text(f"rowgrad/{finding['kind']}", f"{finding['where']}: {finding['evidence']}", step)


def _scalars(record: Record) -> Sequence[tuple[str, float]]:
    layers = [(f"{what}/{name}", v) for name, sizes in record["layers"].items() for what, v in sizes.items()]
    norms = [(f"norms/{name}", v) for name, v in (record["norms"] or {}).items()]
    updates = [(f"update/{name}", v) for name, v in record["updates"].items()]
    noise = [] if record["noise_scale"] is None else [("noise_scale", record["noise_scale"])]
    return [("loss", record["loss"]), *layers, *norms, *updates, *noise]
