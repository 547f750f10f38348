"""The results as one HTML page that needs nothing else: python -m benchmarks.page"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from benchmarks import floors, growth, paths, results, sweep
from benchmarks.charts import Dot, Series, dots_by_row, lines
from benchmarks.ours import FIRST, FORWARD
from benchmarks.reference import TINY_TOLERANCE, TOLERANCE
from benchmarks.task import OURS, OUTPUTS, PLAIN
from rowgrad.graph.lettering import number

FAMILIES = {
    "rowgrad": "rowgrad",
    "Opacus": "opacus",
    "BackPACK": "backpack",
    "TorchJD": "torchjd",
    "vmap(grad)": "func",
    "jvp": "func",
    "Captum": "captum",
    "plain": "plain",
    "naive": "plain",
    "is_grads_batched": "autograd",
    "double backward": "autograd",
    "forward AD": "autograd",
}
LEGEND = {
    "rowgrad": "rowgrad",
    "opacus": "Opacus",
    "backpack": "BackPACK",
    "torchjd": "TorchJD",
    "func": "torch.func (vmap, jvp)",
    "captum": "Captum",
    "autograd": "torch.autograd (batched, twice, forward)",
    "plain": "plain loop",
}
CHART = 520, 300  # pixels of a chart in two columns

Measured = dict[str, Any]


def family(method: str) -> str:
    """The style of a method's marks."""
    return next(style for prefix, style in FAMILIES.items() if method.startswith(prefix))


def is_rival(method: str) -> bool:
    return not method.startswith(OURS)


def best_rival(cell: Mapping[str, Measured]) -> tuple[str, Measured] | None:
    """The fastest of the rivals that are right."""
    right = [(name, m) for name, m in cell.items() if is_rival(name) and m["status"] == "ok" and m.get("ratio")]
    return min(right, key=lambda item: item[1]["ratio"][0], default=None)


def standings(workloads: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """Ours beside the fastest exact rival, by workload and output; `forward` is our jvp where there is one."""
    rows = []
    for w in workloads.values():
        cells = {}
        for output, cell in w.get("outputs", {}).items():
            best = best_rival(cell)
            ours, forward = (cell.get(name, {}).get("ratio") for name in (OURS, FORWARD))
            fastest = min((ratio[0] for ratio in (ours, forward) if ratio), default=None)
            ahead = None if fastest is None or best is None else best[1]["ratio"][0] / fastest
            cells[output] = {"ours": ours and ours[0], "forward": forward and forward[0], "best": best, "ahead": ahead}
        rows.append({"title": w.get("title", ""), "cells": cells})
    return rows


def failures(workloads: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """Methods that fail or are wrong, with what they say and where."""
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for w in workloads.values():
        for cell in w.get("outputs", {}).values():
            for method, m in cell.items():
                if m["status"] != "ok":
                    found.setdefault((method, m["status"], m["reason"]), {})[w["title"]] = None
    return [
        {"method": method, "status": status, "reason": reason, "where": list(where)}
        for (method, status, reason), where in found.items()
    ]


def ratio_chart(workloads: Mapping[str, Measured], output: str) -> Markup:
    """Ratio to the plain step, a row for each workload."""

    def dot(method: str, m: Measured, _: Measured) -> Dot | None:
        if not m.get("ratio"):
            return None
        middle, low, high = m["ratio"]
        return Dot(middle, f"{method}: {number(middle)}", family(method), (low, high))

    return _dots(workloads, output, dot, f"{OUTPUTS[output]}: ratio to the plain step")


def memory_chart(workloads: Mapping[str, Measured], output: str) -> Markup:
    """Peak memory over that of the plain step, a row for each workload."""

    def dot(method: str, m: Measured, w: Measured) -> Dot | None:
        if m["status"] != "ok" or not m["peak_bytes"] or not w["plain"]["peak_bytes"]:
            return None
        ratio = m["peak_bytes"] / w["plain"]["peak_bytes"]
        return Dot(ratio, f"{method}: {number(ratio)} ({number(m['peak_bytes'] / 1e6)} MB)", family(method))

    return _dots(workloads, output, dot, f"{OUTPUTS[output]}: peak memory over the plain step's")


def _dots(
    workloads: Mapping[str, Measured],
    output: str,
    dot: Callable[[str, Measured, Measured], Dot | None],
    title: str,
) -> Markup:
    rows = []
    for w in workloads.values():
        cell = w.get("outputs", {}).get(output, {})
        drawn = [dot(method, m, w) for method, m in cell.items() if method != FIRST]
        rows.append((w.get("title", ""), [d for d in reversed(drawn) if d is not None]))  # ours on top
    return dots_by_row(rows, title)


def growth_charts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Seconds along each axis."""
    charts = []
    for axis, points in found.get("axes", {}).items():
        names = list(dict.fromkeys(name for point in points for name in point["seconds"]))
        series = [
            Series(
                name,
                _growth_style(name),
                [(p["value"], p["seconds"][name]) for p in sorted(points, key=_value) if name in p["seconds"]],
            )
            for name in names
        ]
        charts.append(
            {
                "svg": _chart(series, growth.TITLES[axis], "seconds", f"seconds against {growth.TITLES[axis]}"),
                "failed": [(p["value"], p["reason"]) for p in points if p["reason"]],
            }
        )
    return charts


def _value(point: Mapping[str, Any]) -> float:
    return point["value"]


def _growth_style(name: str) -> str:
    if name == PLAIN:
        return "step"
    return family(name) + (" dashed" if name.endswith(": clipped") else "")


def sweep_charts(found: Mapping[str, Any]) -> list[Markup]:
    """Seconds and counted products at the largest of the other size, and ratios to the plain step."""
    points, charts = found.get("points", []), []
    for axis, other in (("p", "m"), ("m", "p")) if points else ():
        largest = max(point[other] for point in points)
        line = sorted((point for point in points if point[other] == largest), key=lambda point: point[axis])
        x_label = f"{axis} ({other} = {largest})"
        for quantity, y_label in (("seconds", "seconds"), ("products", "counted multiply-adds in products")):
            series = [
                Series(title, SWEEP_STYLES[name], [(pt[axis], pt[quantity][name]) for pt in line])
                for name, title in sweep.METHODS.items()
            ]
            charts.append(_chart(series, x_label, y_label, f"{y_label} against {axis}"))
    return charts


SWEEP_STYLES = {"plain": "step", "naive": "plain", "both": "rowgrad", "norms": "rowgrad dashed"}


PATH_STYLES = {"enumeration": "plain", "sweep": "rowgrad", "count": "rowgrad dashed", "engine": "step"}


def path_parts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By graph: seconds by depth as a chart and a table, and how they grow."""
    return [
        {
            "svg": _chart(
                [
                    Series(title, PATH_STYLES[m], [(p["depth"], p["seconds"][m]) for p in points if m in p["seconds"]])
                    for m, title in paths.METHODS.items()
                ],
                f"levels, {paths.FAMILIES[name].title}",
                "seconds",
                f"seconds against levels, {paths.FAMILIES[name].title}",
            ),
            "title": paths.FAMILIES[name].title,
            "table": paths.table(points),
            "summary": paths.summary(points),
        }
        for name, points in found.get("graphs", {}).items()
    ]


def _chart(series: list[Series], x_label: str, y_label: str, title: str) -> Markup:
    return lines(series, x_label=x_label, y_label=y_label, title=title, width=CHART[0], height=CHART[1])


def verdicts(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """The three statements of section 5, confirmed or not by what was counted and timed."""
    points = found.get("points", [])
    if not points:
        return []
    n = found["n_layers"]
    counted = [pt["products"]["naive"] / pt["products"]["plain"] for pt in points]
    added = [sweep.added_entries(pt) / (n * pt["m"] * pt["p"]) for pt in points if pt["p"] * pt["m"] >= 2**16]
    products = [pt["products"]["both"] / pt["products"]["plain"] for pt in points if pt["m"] > 1]
    large = max(points, key=lambda pt: (pt["m"], pt["p"]))
    batches = [pt for pt in points if pt["m"] == large["m"]]
    ratios = {
        name: [pt["seconds"][name] / pt["seconds"]["plain"] for pt in batches] for name in ("naive", "both", "norms")
    }
    return [
        {
            "claim": "The naive method roughly doubles the number of operations.",
            "found": _verdict(all(1.8 <= r <= 2.2 for r in counted))
            + f"Counted multiply-adds over the plain step's: {_range(counted)}.",
        },
        {
            "claim": "The proposed method adds only O(mnp) operations.",
            "found": _verdict(max(products, default=1) <= 1.05 and max(added, default=0) <= 4)
            + f"Multiply-adds in products, norms and gradient over the plain step's: {_range(products)}. "
            f"Entries that norms touch besides: {_range(added)} times m n p.",
        },
        {
            "claim": "In practice the difference is much greater.",
            "found": _verdict(min(ratios["naive"]) > 2 * max(counted))
            + f"Seconds over the plain step's at m = {large['m']}, over all p: naive {_range(ratios['naive'])}, "
            f"norms and gradient {_range(ratios['both'])}, norms alone {_range(ratios['norms'])}.",
        },
    ]


def _verdict(holds: bool) -> str:
    return "Confirmed. " if holds else "Not confirmed. "


def _range(values: list[float]) -> str:
    if not values:
        return "not measured"
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def render(
    cpu: Mapping[str, Any],
    grown: Mapping[str, Any],
    swept: Mapping[str, Any],
    walked: Mapping[str, Any],
    least: Mapping[str, Any],
) -> str:
    """The page; each part may be empty."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    style = resources.files("rowgrad.report").joinpath("templates/page.css").read_text(encoding="utf-8")
    workloads = {key: w for key, w in cpu.get("workloads", {}).items() if w.get("outputs")}
    return environment.get_template("page.html.j2").render(
        style=Markup(style),
        about=cpu.get("about", {}),
        commits=sorted({commit for w in workloads.values() for commit in w["commits"].values()}),
        workloads=workloads,
        outputs=OUTPUTS,
        ours=OURS,
        first=FIRST,
        plain=PLAIN,
        legend=LEGEND,
        standings=standings(workloads),
        ratio_charts={output: ratio_chart(workloads, output) for output in OUTPUTS if workloads},
        memory_charts={output: memory_chart(workloads, output) for output in ("norms", "clipped") if workloads},
        failures=failures(workloads),
        tolerance=TOLERANCE,
        tiny_tolerance=TINY_TOLERANCE,
        growth=growth_charts(grown),
        base=grown.get("base", {}),
        sweep=sweep_charts(swept),
        slopes=swept.get("slopes", {}),
        verdicts=verdicts(swept),
        naive_examples=swept.get("naive_examples"),
        paths=path_parts(walked),
        floors=[(w["title"], list(floors.lines(key, w["steps"]))) for key, w in least.get("workloads", {}).items()],
        floors_head=floors.HEAD,
        floors_about=least.get("about", {}),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=results.FOLDER)
    parser.add_argument("--cpu", type=Path, help="results of the runner, if not cpu.json in the folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder
    out = arguments.out or folder / "page.html"
    cpu = results.read(arguments.cpu or folder / "cpu.json")
    page = render(cpu, *(results.read(folder / f"{name}.json") for name in ("growth", "sweep", "paths", "floors")))
    out.write_text(page, encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
