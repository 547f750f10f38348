"""How a step grows with examples, positions, width and depth of a GPT: python -m benchmarks.growth [--fresh]"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks import processes, results
from benchmarks.arguments import whole_number
from benchmarks.methods import METHODS
from benchmarks.task import OURS, PLAIN, Goal, Step, Task
from benchmarks.timing import rounds_for, side_by_side
from benchmarks.workloads import SEED, language, seen_by_hooks

BASE = {"b": 8, "t": 64, "width": 128, "depth": 2}
AXES = {
    "b": (1, 2, 4, 8, 16, 32, 64),
    "t": (16, 32, 64, 128, 256, 512, 1024),
    "width": (32, 64, 128, 256, 512, 1024),
    "depth": (1, 2, 4, 8, 16),
}
TITLES = {"b": "examples B", "t": "positions T", "width": "width", "depth": "blocks"}
SHOWN = [
    (OURS, "norms"),
    (OURS, "clipped"),
    ("vmap(grad)", "norms"),
    ("Opacus hooks", "norms"),
    ("plain loop", "norms"),
]
VOCABULARY = 500
SECONDS = 1.0  # to spend on a method at a point
TIME_LIMIT = 120  # for a point


def label(method: str, output: str) -> str:
    return f"{method}: {output}"


def measure(sizes: dict[str, int], threads: int) -> dict[str, float]:
    """Median seconds of the plain step and of each method that works."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    goal = Goal(1.0)
    plain = _task(sizes)
    built: dict[str, tuple[nn.Module, Step]] = {PLAIN: (plain.model, plain.plain)}
    for name, output in SHOWN:
        method = next(m for m in METHODS if m.name == name)
        task = seen_by_hooks(_task(sizes)) if method.for_hooks else _task(sizes)
        try:
            built[label(name, output)] = task.model, method.make(task, output, goal)
        except ModuleNotFoundError:
            continue
    first = side_by_side(built, dict.fromkeys(built, 1))
    rounds = {name: rounds_for(first[name][0] or 0, SECONDS) for name in built}
    found = side_by_side(built, rounds)
    return {name: median(s for s in seconds if s is not None) for name, seconds in found.items()}


def _task(sizes: dict[str, int]) -> Task:
    torch.manual_seed(SEED)
    return language(sizes["b"], sizes["t"], VOCABULARY, sizes["width"], sizes["depth"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=whole_number(1), default=len(os.sched_getaffinity(0)))
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--most", type=whole_number(1), help="leave out larger values")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the file")
    parser.add_argument("--file", type=Path, default=results.FOLDER / "growth.json")
    arguments = parser.parse_args()
    content = results.begun(arguments.file, arguments.threads, fresh=arguments.fresh)
    content |= {"base": BASE | {"vocabulary": VOCABULARY}}
    for axis in arguments.axes:
        points: list[dict[str, Any]] = content.setdefault("axes", {}).setdefault(axis, [])
        done = {point["value"] for point in points}
        for value in (v for v in AXES[axis] if v not in done and v <= (arguments.most or v)):
            point = {"value": value, "seconds": {}, "reason": ""}
            try:
                point["seconds"] = processes.run(
                    measure, BASE | {axis: value}, arguments.threads, time_limit=TIME_LIMIT
                )
            except processes.ProcessError as error:
                point["reason"] = str(error)
            points.append(point)
            results.write(arguments.file, content)
            shown = ", ".join(f"{name} {1000 * s:.1f}" for name, s in point["seconds"].items())
            print(f"{TITLES[axis]} = {value}: {shown or point['reason']} ms", flush=True)
    print(f"\n{arguments.file}")


if __name__ == "__main__":
    main()
