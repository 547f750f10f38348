"""Write the table of rules into docs/support.md, from the rules themselves.

python tools/support_table.py          # write
python tools/support_table.py --check  # fail if what is committed differs
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from rowgrad import RULES

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
HEAD = """# What has a rule

A rule gives the rows of a parameter in factors, at about the price of the backward pass. This table is generated from
the rules (`python tools/support_table.py`). Each line is a way in which a parameter meets the data, the nodes of the
graph at which that happens, and which of their inputs the parameter is.

Not in the table: views, slices, splits, transposes, reshapes and casts between a parameter and its use; they are
followed. Parameters that are computed from others (weight norm, merged low-rank updates) use the rule of the place
where the computed weight meets the data, and are pushed down from there. Whatever is not covered goes the general path:
exact, one partial backward pass an example, with a warning.

| how a parameter meets the data | nodes and inputs |
|---|---|
"""


def page() -> str:
    nodes: dict[str, dict[str, set[int]]] = {}
    for (kind, slot), rule in sorted(RULES.items()):
        function = rule.func if isinstance(rule, partial) else rule
        sentence = (function.__doc__ or "").strip().splitlines()[0].rstrip(".")
        if not sentence:
            raise SystemExit(f"{function.__name__} has no docstring to show in the table")
        nodes.setdefault(sentence, {}).setdefault(kind.partition("Backward")[0], set()).add(slot)
    return HEAD + "".join(f"| {what} | {_places(kinds)} |\n" for what, kinds in sorted(nodes.items()))


def _places(kinds: dict[str, set[int]]) -> str:
    return "; ".join(f"`{kind}` {' '.join(map(str, sorted(slots)))}" for kind, slots in sorted(kinds.items()))


def main() -> None:
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        raise SystemExit(f"{PAGE.name} is not what the rules say; run python tools/support_table.py")


if __name__ == "__main__":
    main()
