"""What a step costs at least, and where the rest of ours goes: python -m benchmarks.floors [--only cnn lstm] [--fresh]

For the plain step, forward and data pass alone, and our outputs: seconds side by side; multiply-adds in products and
bytes read and written, counted as operations are started; and the seconds by kind of operation, from PyTorch's
profiler. What is left of a step is Python and the starting of operations.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import flop_registry

from benchmarks import processes, results
from benchmarks.arguments import whole_number
from benchmarks.counting import FUSED, OF_IN_PLACE, count
from benchmarks.ours import FORWARD
from benchmarks.probe import Setting, build
from benchmarks.reference import make_reference
from benchmarks.task import OURS, OUTPUTS, PLAIN, Step, Task
from benchmarks.timing import MOST_ROUNDS, side_by_side, summary
from benchmarks.workloads import WORKLOADS
from rowgrad.graph.lettering import number
from rowgrad.parameters import named
from rowgrad.rows.plan import make_plan
from rowgrad.rows.rules import RULES
from rowgrad.tape import Tape

DATA_PASS = "forward and data pass"  # what every answer needs
JVP = "jvp"
STEPS = {output: (OURS, output) for output in ("norms", "clipped", "gram", "dot")} | {JVP: (FORWARD, "dot")}
PROFILED = 10  # steps
TIME_LIMIT = 600
KINDS = ("products", "other operations", "rest")
PRODUCTS = {f"aten::{packet.__name__}" for packet in (*flop_registry, *FUSED, *OF_IN_PLACE)} | {
    "aten::mkldnn_convolution", "aten::mkldnn_convolution_backward", "aten::mv", "aten::addmv", "aten::dot",
}  # fmt: skip
# Ratios to the plain step that norms, clipped gradients, Gram matrices and dot products aim at.
AIMS = {
    "mlp-256": (0.75, 1.05, 0.85, 0.85),
    "mlp-32": (0.85, 1.15, 0.95, 0.95),
    "cnn": (1.05, 1.25, 1.4, 1.1),
    "gpt-64": (0.93, 1.18, 1.2, 1.0),
    "gpt-512": (1.05, 1.18, 1.3, 1.05),
    "lstm": (1.5, 1.9, 1.9, 1.6),
    "embedding": (0.5, 1.15, 0.8, 0.5),
}

Measured = dict[str, Any]


def data_pass(task: Task) -> None:
    """The forward pass and the cotangents of every use of a parameter, of which nothing is made."""
    losses = task.losses()
    tape = Tape(losses)
    with torch.no_grad():
        leaves = {tape.leaves[id(p)]: name for name, p in named(task.model).by_name.items() if id(p) in tape.leaves}
        seed = torch.ones_like(losses)
        plan = make_plan(tape, seed, leaves, RULES, "cached")
        tape.stream(plan.ownership.watch, seed, lambda node, cotangents: None, retain_graph=False)


def steps_of(workload: str, tiny: bool = False) -> dict[str, tuple[torch.nn.Module, Step]]:
    """By name, each on a model of its own."""
    goal = make_reference(WORKLOADS[workload].task(tiny=tiny)).goal
    task = WORKLOADS[workload].task(tiny=tiny)
    found = {PLAIN: build(workload, PLAIN, "", goal, tiny), DATA_PASS: (task.model, lambda: data_pass(task))}
    return found | {name: build(workload, *how, goal, tiny) for name, how in STEPS.items()}


def measure(workload: str, setting: Setting) -> dict[str, Measured]:
    """By step: seconds, their ratio to the plain step, what is counted, and seconds by kind."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(setting.threads)
    processes.keep_freed_blocks()
    steps = steps_of(workload, setting.tiny)
    seconds = side_by_side(steps, dict.fromkeys(steps, MOST_ROUNDS), quick=list(steps))
    found: dict[str, Measured] = {}
    for name, (model, step) in steps.items():
        model.zero_grad(set_to_none=True)
        counted = count(step)
        whole = median(s for s in seconds[name] if s is not None)
        kinds = _by_kind(model, step)
        kinds["rest"] = max(0.0, whole - sum(kinds.values()))
        found[name] = summary(seconds, name) | {"products": counted.products, "bytes": counted.bytes, "kinds": kinds}
    return found


def _by_kind(model: torch.nn.Module, step: Step) -> dict[str, float]:
    """Seconds that a step spends in operations. Those the profiler itself takes are among them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED):
            model.zero_grad(set_to_none=True)
            step()
    spent: dict[str, float] = dict.fromkeys(KINDS[:2], 0.0)
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            spent[KINDS[event.key not in PRODUCTS]] += event.self_cpu_time_total / PROFILED / 1e6
    return spent


def lines(key: str, steps: Mapping[str, Measured]) -> Iterable[list[str]]:
    """For each step of a workload its figures, beside the plain step's."""
    plain = steps[PLAIN]
    whole = plain["seconds"][0]
    aims: dict[str, float] = dict(zip(("norms", "clipped", "gram", "dot"), AIMS.get(key, ()), strict=False))
    for name, m in steps.items():
        shares = [m["kinds"][kind] / whole for kind in KINDS]
        aim = aims.get(STEPS[name][1]) if name in STEPS else None
        yield [
            OUTPUTS.get(name, name),
            f"{1000 * m['seconds'][0]:.1f}",
            f"{m['ratio'][0]:.2f}",
            "" if aim is None else f"{aim:g}",
            number(m["products"] / 1e6),
            f"{m['products'] / plain['products']:.2f}",
            number(m["bytes"] / 1e6),
            f"{m['bytes'] / plain['bytes']:.2f}",
            *(f"{share:.2f}" for share in shares),
        ]


HEAD = ["", "ms", "of plain", "aim", "M multiply-adds", "of plain", "MB", "of plain", *KINDS]


def table(key: str, steps: Mapping[str, Measured]) -> str:
    """As markdown; the last columns are in units of the plain step."""
    rows = [HEAD, ["---"] * len(HEAD), *lines(key, steps)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="workloads")
    parser.add_argument("--threads", type=whole_number(1), default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the machinery")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the file")
    parser.add_argument("--file", type=Path, default=results.FOLDER / "floors.json")
    arguments = parser.parse_args()
    whole = arguments.fresh and set(arguments.only) == set(WORKLOADS)
    content = results.begun(arguments.file, arguments.threads, tiny=arguments.tiny, fresh=whole)
    workloads = content.setdefault("workloads", {})
    for key in arguments.only:
        if arguments.fresh or key not in workloads:
            setting = Setting(arguments.threads, arguments.tiny)
            steps = processes.run(measure, key, setting, time_limit=TIME_LIMIT)
            workloads[key] = {"title": WORKLOADS[key].title, "steps": steps}
            results.write(arguments.file, content)
        print(f"\n{WORKLOADS[key].title}\n{table(key, workloads[key]['steps'])}", flush=True)
    print(f"\n{arguments.file}")


if __name__ == "__main__":
    main()
