"""Write the figures of the results into README.md.

python -m benchmarks.readme          # write
python -m benchmarks.readme --check  # fail if what is committed differs
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.ours import FIRST
from benchmarks.page import standings
from benchmarks.task import OUTPUTS
from rowgrad.graph.lettering import number

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- begin of the figures from benchmarks/readme.py -->\n", "<!-- end of those figures -->\n"


def block(found: Mapping[str, Any]) -> str:
    """The sentence on how it was measured, and a line for each workload."""
    about, workloads = found["about"], found["workloads"]
    torch = about["versions"]["torch"]
    lines = [
        "Medians of the ratio to the plain step (forward and backward of the summed losses), in brackets the fastest",
        "exact rival's, with ~ where it took so long that it was timed once; jvp is for directions known beforehand;",
        f"float32, torch {torch}, {about['threads']} threads of {about['machine']}:",
        "",
        f"| workload | {' | '.join(OUTPUTS.values())} | first call |",
        "|---" * (len(OUTPUTS) + 2) + "|",
    ]
    for row, w in zip(standings(workloads), workloads.values(), strict=True):
        cells = [_cell(row["cells"].get(output)) for output in OUTPUTS]
        first = w["outputs"].get("norms", {}).get(FIRST, {}).get("ratio")
        lines.append(f"| {row['title']} | {' | '.join(cells)} | {number(first[0]) if first else ''} |")
    return "\n".join(lines) + "\n"


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    ours = number(cell["ours"]) if cell["ours"] else "failed"
    if cell["forward"]:
        ours += f", jvp {number(cell['forward'])}"
    if cell["best"] is None:
        return ours
    rival = cell["best"][1]
    about = "~" if rival.get("reason") == results.ALONE else ""
    return f"{ours} ({about}{number(rival['ratio'][0])})"


def page() -> str:
    """The README with the figures of the results in their place."""
    head, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + block(results.read(results.FOLDER / "cpu.json")) + END + tail


def main() -> None:
    text = page()
    if "--check" not in sys.argv:
        README.write_text(text, encoding="utf-8")
    elif README.read_text(encoding="utf-8") != text:
        raise SystemExit("README.md does not have the figures of the results; run python -m benchmarks.readme")


if __name__ == "__main__":
    main()
