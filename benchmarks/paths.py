"""Aggarwal's eq. 3 against his eq. 4, measured by depth: python -m benchmarks.paths [--fresh]

The derivative of a loss in one scalar as the sum over all paths (eq. 3, "exponential time") and by dynamic programming
(eq. 4, "polynomial time"), with the exact number of paths and PyTorch's own backward pass beside them, on two graphs:
products, where each node multiplies the one before by itself and has 2 paths a level; and nets of 10 units a layer, by
scalar units, with 10 paths a level.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
from torch import Tensor, nn

import rowgrad as rg
from benchmarks import processes, results
from benchmarks.arguments import whole_number
from benchmarks.task import Step
from benchmarks.timing import rounds_for, side_by_side
from rowgrad.graph.sweep import value_at

MOST_PATHS = 20_000  # more are not walked
SECONDS = 0.5  # to spend on a method at a point
FITTED = 3  # last points through which the growth is fitted
WIDTH = 10

METHODS = {
    "enumeration": "sum over all paths (eq. 3)",
    "sweep": "sweep (eq. 4)",
    "count": "number of paths",
    "engine": "PyTorch's backward",
}
Point = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A graph by its depth: the loss, the leaf and which of its entries, and the level of detail."""

    title: str
    depths: Sequence[int]
    make: Callable[[int], tuple[Tensor, Tensor]]
    key: str
    level: str


def products(depth: int) -> tuple[Tensor, Tensor]:
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = w
    for _ in range(depth):
        loss = loss * loss
    return loss, w


def net(depth: int) -> tuple[Tensor, Tensor]:
    widths = [1, *[WIDTH] * depth, 1]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers[:-1]).double().requires_grad_(False)
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    return model(x).sum(), x


FAMILIES = {
    "products": Family("product nodes", (1, 2, 4, 6, 8, 10, 12, 14, 32, 64, 128, 256), products, "w", "vector"),
    "net": Family(f"{WIDTH} units a layer", (1, 2, 3, 4, 8, 16, 32, 64), net, "w[0]", "unit"),
}


def measure(name: str, depth: int) -> Point:
    """Median seconds of each method at one depth, and how far eq. 3 and eq. 4 are from the engine."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    family = FAMILIES[name]
    loss, leaf = family.make(depth)
    graph = rg.Graph(loss, {"w": leaf}, level=family.level)  # pyright: ignore[reportArgumentType]
    level, n_paths = graph.level, graph.count_paths(family.key)
    edge = level.find(family.key) or (0, 0)

    def enumeration() -> float:
        return sum(float(graph.path_gradient(path)) for path in graph.paths(family.key, limit=None))

    def sweep() -> float:
        return float(value_at(level, edge, level.seeds(), level.algebra) or 0.0)

    def engine() -> float:
        return float(torch.autograd.grad(loss, leaf, retain_graph=True)[0].sum())

    steps = {"sweep": sweep, "count": lambda: graph.count_paths(family.key), "engine": engine}
    if n_paths <= MOST_PATHS:
        steps["enumeration"] = enumeration
    seconds = _seconds(steps)
    truth = engine()
    return {
        "depth": depth,
        "paths": n_paths,
        "edges": sum(len(v.slots) for v in level.nodes),
        "seconds": {method: seconds[method] for method in METHODS if method in seconds},
        "errors": {m: abs(steps[m]() - truth) / abs(truth) for m in ("enumeration", "sweep") if m in steps},
    }


def _seconds(steps: dict[str, Step]) -> dict[str, float]:
    nothing = nn.Module()
    timed = {method: (nothing, step) for method, step in steps.items()}
    first = side_by_side(timed, dict.fromkeys(timed, 1))
    rounds = {method: rounds_for(first[method][0] or 0, SECONDS) for method in timed}
    return {method: median(s for s in found if s is not None) for method, found in side_by_side(timed, rounds).items()}


def growth(points: Sequence[Point]) -> dict[str, float]:
    """Of eq. 3 the factor for one more level; of the others the exponent of the power of the depth."""
    found = {}
    for method in METHODS:
        pairs = [(p["depth"], p["seconds"][method]) for p in points if method in p["seconds"]][-FITTED:]
        if len(pairs) == FITTED:
            depths, logs = [float(d) for d, _ in pairs], [math.log(s) for _, s in pairs]
            if method == "enumeration":
                found[method] = math.exp(linear_regression(depths, logs).slope)
            else:
                found[method] = linear_regression([math.log(d) for d in depths], logs).slope
    return found


def table(points: Sequence[Point]) -> str:
    """Milliseconds by depth."""
    rows = [["depth", "paths", "edges", *(f"{METHODS[m]}, ms" for m in METHODS)]]
    for p in points:
        times = [f"{1000 * p['seconds'][m]:.3g}" if m in p["seconds"] else "-" for m in METHODS]
        rows.append([str(p["depth"]), shown(p["paths"]), str(p["edges"]), *times])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)


def shown(paths: int) -> str:
    return str(paths) if paths < 10**7 else f"{paths:.1e}" if paths < 10**300 else f"1e{int(math.log10(paths))}"


def summary(points: Sequence[Point]) -> str:
    found = growth(points)
    eq3 = (
        f"with one more level eq. 3 costs {found['enumeration']:.1f} times as much; " if "enumeration" in found else ""
    )
    others = ", ".join(f"{METHODS[m]} {found[m]:.2f}" for m in METHODS if m in found and m != "enumeration")
    return eq3 + (f"exponents in the depth: {others}" if others else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--most", type=whole_number(1), help="leave out deeper graphs")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the file")
    parser.add_argument("--file", type=Path, default=results.FOLDER / "paths.json")
    arguments = parser.parse_args()
    content = results.begun(arguments.file, 1, fresh=arguments.fresh)
    for name in arguments.graphs:
        points: list[Point] = content.setdefault("graphs", {}).setdefault(name, [])
        done = {point["depth"] for point in points}
        for depth in (d for d in FAMILIES[name].depths if d not in done and d <= (arguments.most or d)):
            points.append(processes.run(measure, name, depth, time_limit=300))
            points.sort(key=lambda point: point["depth"])
            results.write(arguments.file, content)
        print(f"{FAMILIES[name].title}\n{table(points)}\n{summary(points)}\n", flush=True)
    print(arguments.file)


if __name__ == "__main__":
    main()
