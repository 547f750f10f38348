"""One method alone: is it right, and how much memory does it take."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import processes
from benchmarks.methods import METHODS
from benchmarks.reference import TINY_TOLERANCE, TOLERANCE, Reference, make_reference
from benchmarks.task import OURS, PLAIN, Goal, Step
from benchmarks.workloads import WORKLOADS

SHORT = 60.0  # seconds; a call that takes less is made once more, with memory as in the steps timed side by side
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


def build(workload: str, method: str, output: str, goal: Goal, tiny: bool) -> tuple[nn.Module, Step]:
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
    on_tiny = 0.0 if method == PLAIN else _error_on_tiny(workload, method, output)  # loads the code, too
    model, step = build(workload, method, output, reference.goal, setting.tiny)
    WORKLOADS[workload].task(tiny=setting.tiny).plain()  # the kernels' own memory is there before
    before = processes.resident_bytes()  # what a method leaves behind from its first call is its own
    peak, seconds, result = _call(model, step)
    if seconds < QUICK or method == PLAIN or method.startswith(OURS):
        del result
        peak, seconds, result = _call(model, step)
    peak -= before
    if method != PLAIN and seconds < SHORT:
        del result
        processes.keep_freed_blocks()
        _, seconds, result = _call(model, step)
    if method == PLAIN:
        return asdict(Probe("ok", peak_bytes=peak, seconds=seconds))
    error = reference.error(output, result)
    found = Probe("ok", "", error if math.isfinite(error) else None, peak, seconds)
    if not on_tiny <= TINY_TOLERANCE:
        found = replace(found, status="wrong", reason="not within rounding on a tiny model")
    elif not error <= TOLERANCE:
        found = replace(found, status="wrong", reason="not within rounding")
    return asdict(found)


def _error_on_tiny(workload: str, method: str, output: str) -> float:
    """Of the same structure at a tiny size, where what is small on the workload itself shows and rounding is less."""
    reference = make_reference(WORKLOADS[workload].task(tiny=True))
    _, step = build(workload, method, output, reference.goal, tiny=True)
    return reference.error(output, step())


def _call(model: nn.Module, step: Step) -> tuple[int, float, Any]:
    model.zero_grad(set_to_none=True)

    def timed() -> tuple[float, Any]:
        start = time.perf_counter()
        result = step()
        return time.perf_counter() - start, result

    peak, (seconds, result) = processes.peak_bytes(timed)
    return peak, seconds, result
