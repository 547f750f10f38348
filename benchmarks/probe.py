"""One method alone: is it right, and how much memory does it take."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import processes
from benchmarks.methods import METHODS
from benchmarks.reference import TOLERANCE, Reference
from benchmarks.task import OURS, PLAIN, Step
from benchmarks.workloads import WORKLOADS

QUICK = 1.0  # seconds; a call that takes less is made twice, and the second counts


@dataclass(frozen=True)
class Probe:
    """What one method gave for one output."""

    status: str  # ok, wrong, failed
    reason: str = ""
    error: float | None = None
    peak_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Setting:
    """How everything is run."""

    threads: int
    tiny: bool = False


def build(workload: str, method: str, output: str, goal: Any, tiny: bool) -> tuple[torch.nn.Module, Step]:
    """A model of its own for a method, and its step."""
    found = next((m for m in METHODS if m.name == method), None)
    task = WORKLOADS[workload].task(tiny=tiny, for_hooks=found is not None and found.for_hooks)
    return task.model, task.plain if found is None else found.make(task, output, goal)


def probe(workload: str, method: str, output: str, reference: Path, setting: Setting, limit: float) -> Probe:
    """In a process of its own."""
    try:
        return Probe(**processes.run(_probe, workload, method, output, reference, setting, time_limit=limit))
    except processes.ProcessError as error:
        return Probe("failed", str(error))


def _probe(workload: str, method: str, output: str, path: Path, setting: Setting) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(setting.threads)
    processes.return_freed_blocks()
    reference = Reference.load(path)
    model, step = build(workload, method, output, reference.goal, setting.tiny)
    WORKLOADS[workload].task(tiny=setting.tiny).plain()  # the kernels' own memory is there before
    peak, seconds, result = _call(model, step)
    if seconds < QUICK or method in (OURS, PLAIN):
        del result
        peak, seconds, result = _call(model, step)
    if method == PLAIN:
        return asdict(Probe("ok", peak_bytes=peak, seconds=seconds))
    error = reference.error(output, result)
    if not error <= TOLERANCE:
        return asdict(Probe("wrong", f"relative error {error:.1g}", min(error, 1e9), peak, seconds))
    return asdict(Probe("ok", "", error, peak, seconds))


def _call(model: torch.nn.Module, step: Step) -> tuple[int, float, Any]:
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    peak, result = processes.peak_bytes(step)
    return peak, time.perf_counter() - start, result
