"""Goodfellow 2015, section 5, measured: python -m benchmarks.sweep [--fresh]

n layers of p units and m examples: the plain step, the naive method (the plain step, then a backward pass for each
example alone) and ours (norms and gradient from one pass; norms alone), in seconds and in counted operations. The
section says: the naive method roughly doubles the operations; the proposed one adds only O(mnp); in practice the
difference is much greater.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
from torch import Tensor, nn

import rowgrad as rg
from benchmarks import processes, results
from benchmarks.arguments import whole_number
from benchmarks.counting import count
from benchmarks.task import Step
from benchmarks.timing import rounds_for, side_by_side
from rowgrad.rows.plan import forget

N_LAYERS = 3
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 4, 16, 64, 256, 1024)
NAIVE_EXAMPLES = 8  # the naive method is timed on this many at most, and multiplied
SECONDS = 0.4  # to spend on a method at a point
FITTED = 3  # points at the large end through which slopes are fitted

METHODS = {
    "plain": "plain step",
    "naive": "naive: plain step, then each example alone",
    "both": "rowgrad: norms and gradient",
    "norms": "rowgrad: norms alone",
}

Point = dict[str, Any]


def steps(p: int, m: int) -> tuple[nn.Module, dict[str, Step], Callable[[int], None]]:
    """The model, the steps that take the whole batch, and the naive method's loop over its first examples."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(N_LAYERS) for layer in (nn.Linear(p, p), nn.ReLU())))
    x = torch.randn(m, p)
    params = list(model.parameters())

    def losses(rows: Tensor) -> Tensor:
        return model(rows).square().mean(1)

    def both() -> None:
        J = rg.jacobian(losses(x), model)
        J.norms()
        J.backward(1.0)

    def one_at_a_time(n: int) -> None:
        for j in range(n):
            gradients = torch.autograd.grad(losses(x[j : j + 1]).sum(), params)
            torch.stack([torch.linalg.vector_norm(g) for g in gradients]).norm()

    whole: dict[str, Step] = {
        "plain": lambda: losses(x).sum().backward(),
        "both": both,
        "norms": lambda: rg.grad_norms(losses(x), model),
    }
    return model, whole, one_at_a_time


def measure(p: int, m: int, threads: int) -> Point:
    """Median seconds and counted operations of each method at one point."""
    torch.set_num_threads(threads)
    model, whole, one_at_a_time = steps(p, m)
    n = min(m, NAIVE_EXAMPLES)
    timed = {name: (model, step) for name, step in (whole | {"naive": lambda: one_at_a_time(n)}).items()}
    first = side_by_side(timed, dict.fromkeys(timed, 1))
    rounds = {name: rounds_for(first[name][0] or 0, SECONDS) for name in timed}
    seconds = {name: median(s for s in found if s is not None) for name, found in side_by_side(timed, rounds).items()}
    counted = {}
    for name, step in whole.items():
        forget()
        for _ in range(2):  # the first call proves where the examples lie
            model.zero_grad(set_to_none=True)
            counted[name] = count(step)
    counted["naive"] = tuple(c * m // n for c in count(lambda: one_at_a_time(n)))
    seconds["naive"] = seconds["naive"] * m / n + seconds["plain"]
    counted["naive"] = tuple(a + b for a, b in zip(counted["naive"], counted["plain"], strict=True))
    return {
        "p": p,
        "m": m,
        "seconds": {name: seconds[name] for name in METHODS},
        "products": {name: counted[name][0] for name in METHODS},
        "entries": {name: counted[name][1] for name in METHODS},
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Exponent of the power law through the last points; None where a value is not positive."""
    pairs = list(zip(x, y, strict=True))[-FITTED:]
    if len(pairs) < FITTED or min(b for _, b in pairs) <= 0:
        return None
    return linear_regression([math.log(a) for a, _ in pairs], [math.log(b) for _, b in pairs]).slope


def fit(points: list[Point]) -> dict[str, dict[str, float | None]]:
    """Exponents in p at the largest m and in m at the largest p, of seconds and of counted operations."""
    largest = {axis: max(point[axis] for point in points) for axis in "pm"}
    lines = {}
    for axis, other in (("p", "m"), ("m", "p")):
        line = sorted((pt for pt in points if pt[other] == largest[other]), key=lambda pt: pt[axis])
        x = [pt[axis] for pt in line]
        quantities = {f"{name}, seconds": [pt["seconds"][name] for pt in line] for name in METHODS}
        quantities |= {f"{name}, products": [pt["products"][name] for pt in line] for name in METHODS}
        quantities["entries added by norms"] = [added_entries(pt) for pt in line]
        for name, y in quantities.items():
            lines.setdefault(name, {})[axis] = slope(x, y)
    return lines


def added_entries(point: Point) -> int:
    """Entries that a step for norms alone touches beyond the plain step."""
    return point["entries"]["norms"] - point["entries"]["plain"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=whole_number(1), default=len(os.sched_getaffinity(0)))
    parser.add_argument("--widths", type=whole_number(1), nargs="+", default=WIDTHS)
    parser.add_argument("--batches", type=whole_number(1), nargs="+", default=BATCHES)
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the file")
    parser.add_argument("--file", type=Path, default=results.FOLDER / "sweep.json")
    arguments = parser.parse_args()
    content = results.begun(arguments.file, arguments.threads, fresh=arguments.fresh)
    content |= {"n_layers": N_LAYERS, "naive_examples": NAIVE_EXAMPLES}
    points: list[Point] = content.setdefault("points", [])
    done = {(point["p"], point["m"]) for point in points}
    for p, m in ((p, m) for p in arguments.widths for m in arguments.batches if (p, m) not in done):
        point = processes.run(measure, p, m, arguments.threads, time_limit=300)
        points.append(point)
        content["slopes"] = fit(points)
        results.write(arguments.file, content)
        plain = point["seconds"]["plain"]
        ratios = ", ".join(f"{name} {s / plain:.2f}" for name, s in point["seconds"].items() if name != "plain")
        print(f"p={p:5} m={m:5}: plain {1000 * plain:9.2f} ms; ratios: {ratios}", flush=True)
    print(f"\n{arguments.file}")


if __name__ == "__main__":
    main()
