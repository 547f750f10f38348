"""Measure every workload, output and method: python -m benchmarks.runner [--only cnn lstm] [--fresh]

Each method is first tried alone in a process (right? how much memory?), then those that are right are timed together
in another. A method that fails or is wrong keeps its line, with the reason. What is finished is in the results' file
and is skipped by the next run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.arguments import duration, whole_number
from benchmarks.methods import methods_for
from benchmarks.probe import Probe, Setting, probe
from benchmarks.processes import ProcessError
from benchmarks.reference import Reference, make_reference
from benchmarks.task import OURS, OUTPUTS, PLAIN
from benchmarks.timing import host_seconds, spread, summary, time_methods
from benchmarks.workloads import WORKLOADS

Cell = dict[str, dict[str, Any]]  # by method
HOPELESS = 0.5, 20.0  # seconds and plain steps, together, after which a rival is not timed again


def measure_workload(
    key: str, found: dict[str, Any], wanted: list[str], setting: Setting, budget: float, save: Callable[[], None]
) -> None:
    """Add what is missing to `found`, an output at a time."""
    missing = [output for output in wanted if output not in found.get("outputs", {})]
    if not missing:
        return
    task = WORKLOADS[key].task(tiny=setting.tiny)
    print(f"\n{WORKLOADS[key].title}: reference", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.pt"
        reference = make_reference(task)
        reference.save(path)
        plain = probe(key, PLAIN, "", path, setting, limit=60 + budget)
        found |= {
            "title": WORKLOADS[key].title,
            "n_examples": len(task),
            "n_parameters": sum(p.numel() for p in task.model.parameters()),
            "plain": {"seconds": {}} | found.get("plain", {}) | {"peak_bytes": plain.peak_bytes},
            "host": host_seconds(key),
        }
        for output in missing:
            start = time.perf_counter()
            hopeless = HOPELESS[0] + HOPELESS[1] * (plain.seconds or 0)
            cell, plain_seconds = measure_output(key, output, reference, path, setting, budget, hopeless)
            found.setdefault("outputs", {})[output] = cell
            found["plain"]["seconds"][output] = plain_seconds
            found.setdefault("commits", {})[output] = results.commit()
            save()
            print(table(key, output, found), f"({time.perf_counter() - start:.0f} s)", flush=True)


def measure_output(
    key: str, output: str, reference: Reference, path: Path, setting: Setting, budget: float, hopeless: float
) -> tuple[Cell, list[float]]:
    """One cell: every method tried alone, the right ones timed together. Also the seconds of the plain step.

    A rival that takes more than `hopeless` seconds alone is not timed again.
    """
    probes: dict[str, Probe] = {}
    for method in methods_for(output):
        print(f"\r  {OUTPUTS[output]}: {method.name:40}", end="", flush=True)
        probes[method.name] = probe(key, method.name, output, path, setting, limit=60 + budget)
    print(f"\r  {OUTPUTS[output]}: {'side by side':40}", end="\n", flush=True)
    right = {name: p.seconds for name, p in probes.items() if p.status == "ok" and p.seconds is not None}
    estimates = {name: seconds for name, seconds in right.items() if seconds < hopeless or name == OURS}
    cell: Cell = {name: vars(p) | {"seconds": None} for name, p in probes.items()}
    try:
        seconds = time_methods(key, output, estimates, reference.goal, setting, budget)
    except ProcessError as error:
        for name in estimates:
            cell[name] |= {"status": "failed", "reason": f"timed with the others: {error}"}
        return cell, []
    plain = spread([s for s in seconds[PLAIN] if s is not None])
    for name, alone in right.items():
        if name in estimates:
            cell[name] |= summary(seconds, name)
        else:
            once = {"rounds": 1, "seconds": [alone] * 3, "ratio": [alone / plain[0]] * 3}
            cell[name] |= once | {"reason": results.ALONE}
    return cell, plain


def table(key: str, output: str, found: dict[str, Any]) -> str:
    """A cell as a markdown table."""
    plain = found["plain"]
    lines = [
        f"{found['title']}: {OUTPUTS[output]}",
        "| method | ms | ratio (quartiles) | rounds | peak MB | of plain | error | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if plain["seconds"][output]:
        milliseconds = 1000 * plain["seconds"][output][0]
        lines.append(f"| {PLAIN} | {milliseconds:.1f} | 1 | | {plain['peak_bytes'] / 1e6:.0f} | 1 | | |")
    for method, m in found["outputs"][output].items():
        if m.get("ratio"):
            middle, low, high = m["ratio"]
            speed = f"{1000 * m['seconds'][0]:.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) | {m['rounds']}"
        else:
            speed = " | | "
        memory = " | " if m["peak_bytes"] is None else f"{m['peak_bytes'] / 1e6:.0f} | {_times(m, plain)}"
        error = "" if m["error"] is None else f"{m['error']:.0e}"
        remark = m["reason"] if m["status"] == "ok" else f"{m['status']}: {m['reason']}"
        lines.append(f"| {method} | {speed} | {memory} | {error} | {remark} |")
    return "\n".join(lines)


def _times(m: dict[str, Any], plain: dict[str, Any]) -> str:
    return f"{m['peak_bytes'] / plain['peak_bytes']:.2f}" if plain["peak_bytes"] else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="workloads")
    parser.add_argument("--outputs", nargs="+", choices=OUTPUTS, default=list(OUTPUTS))
    parser.add_argument("--threads", type=whole_number(1), default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--seconds", type=duration, default=8, help="to spend on timing each workload and output, about"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the machinery")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the file")
    parser.add_argument("--file", type=Path, default=results.FOLDER / "cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = Setting(arguments.threads, arguments.tiny)
    whole = arguments.fresh and set(arguments.only) == set(WORKLOADS)
    content = results.begun(arguments.file, arguments.threads, tiny=arguments.tiny, fresh=whole)
    workloads = content.setdefault("workloads", {})
    if arguments.fresh:
        for key in arguments.only:
            workloads.pop(key, None)
    for key in arguments.only:
        found = workloads.setdefault(key, {})
        save = lambda: results.write(arguments.file, content)  # noqa: E731
        measure_workload(key, found, arguments.outputs, setting, arguments.seconds, save)
    print(f"\n{arguments.file}")


if __name__ == "__main__":
    main()
