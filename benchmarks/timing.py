"""Seconds of several methods side by side: in each round one step of each, in changing order."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

import rowgrad as rg
from benchmarks import processes
from benchmarks.probe import Setting, build
from benchmarks.task import OURS, PLAIN, Goal, Step
from benchmarks.workloads import WORKLOADS

MOST_ROUNDS, FEWEST_ROUNDS = 21, 2
CLOSE = 1.5  # times as slow as ours, by the first estimate: such a rival takes part in all rounds
SLOW = 1.0  # seconds; quicker steps are warmed up and taken twice a round, of which the second counts
HOST_CALLS = 50

Seconds = dict[str, list[float | None]]  # by method, one entry a round; None where it sat out


def time_methods(
    workload: str, output: str, estimates: Mapping[str, float], goal: Goal, setting: Setting, budget: float
) -> Seconds:
    """Seconds of each method and of the plain step. `estimates` of a step's seconds decide who sits rounds out."""
    limit = 60 + 10 * budget + 10 * sum(estimates.values())
    return processes.run(_time_methods, workload, output, dict(estimates), goal, setting, budget, time_limit=limit)


def rounds_for(seconds: float, share: float) -> int:
    """As many steps as fit in a method's share of the time, within bounds."""
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(share / max(seconds, 1e-9))))


def _time_methods(
    workload: str, output: str, estimates: dict[str, float], goal: Goal, setting: Setting, budget: float
) -> Seconds:
    warnings.simplefilter("ignore")
    torch.set_num_threads(setting.threads)
    processes.keep_freed_blocks()
    built = {method: build(workload, method, output, goal, setting.tiny) for method in [PLAIN, *estimates]}
    share = budget / len(built)
    close = CLOSE * estimates.get(OURS, 0)
    rounds = {
        name: MOST_ROUNDS if name == OURS or seconds < close else rounds_for(seconds, share)
        for name, seconds in estimates.items()
    }
    cold = [name for name, seconds in estimates.items() if seconds > SLOW]
    quick = [name for name in built if name not in cold]
    return side_by_side(built, rounds, cold, quick)


def side_by_side(
    built: Mapping[str, tuple[nn.Module, Step]],
    rounds: Mapping[str, int],
    cold: Sequence[str] = (),
    quick: Sequence[str] = (),
) -> Seconds:
    """One step of each in every round, after one that is not counted, except for those in `cold`.

    A method without a number of rounds is in every round. Those in `quick` take a step that is not counted in every
    round, too: in training the step before was of the same kind, and left its weights and code near the processor.
    """
    for name, (model, step) in built.items():
        if name not in cold:
            _seconds(model, step)
    left, found = dict(rounds), {method: [] for method in built}
    order = random.Random(0)
    for _ in range(max(left.values(), default=MOST_ROUNDS)):
        for method in order.sample(list(built), len(built)):
            takes_part = left.get(method, 1) > 0
            if takes_part and method in quick:
                _seconds(*built[method])
            found[method].append(_seconds(*built[method]) if takes_part else None)
            if method in left:
                left[method] -= 1
    return found


def _seconds(model: torch.nn.Module, step: Step) -> float:
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    result = step()
    seconds = time.perf_counter() - start
    del result
    return seconds


def spread(values: list[float]) -> list[float]:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [median(values), low, high]


def summary(seconds: Seconds, method: str) -> dict[str, Any]:
    """A method's seconds and its ratios to the plain step of the same round."""
    pairs = [(s, p) for s, p in zip(seconds[method], seconds[PLAIN], strict=True) if s is not None and p is not None]
    return {
        "rounds": len(pairs),
        "seconds": spread([s for s, _ in pairs]),
        "ratio": spread([s / p for s, p in pairs]),
    }


def host_seconds(workload: str) -> dict[str, float]:
    """Seconds of a call of ours, and of a backward pass, on the same structure with hardly any numbers.

    What a call takes there is what it takes in Python and in starting kernels, whatever the size of the model. Forward
    passes are left out. One thread.
    """
    return processes.run(_host_seconds, workload, time_limit=120)


def _host_seconds(workload: str) -> dict[str, float]:
    torch.set_num_threads(1)
    task = WORKLOADS[workload].task(tiny=True)
    calls: list[float] = []
    backwards: list[float] = []
    for _ in range(HOST_CALLS):
        for kind in (calls, backwards):
            losses = task.losses()
            task.model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            if kind is calls:
                rg.grad_norms(losses, task.model)
            else:
                losses.sum().backward()
            kind.append(time.perf_counter() - start)
    return {"call": median(calls), "backward": median(backwards)}
