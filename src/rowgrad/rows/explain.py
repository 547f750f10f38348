"""What was done for each parameter, as a table one can print."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Entry:
    """One parameter and its uses; `stuck`: the node that a weight computed from it goes through one by one."""

    class Use(NamedTuple):
        kind: str
        rule: str | None
        route: str
        direct: bool
        layout: str
        proof: str

    name: str
    shape: tuple[int, ...]
    uses: list[Entry.Use]
    stuck: str | None = None

    def __str__(self) -> str:
        head = f"{self.name} {list(self.shape)}: "
        if not self.uses:
            return head + "not in the graph, rows are zero"
        shown = [f"{u.kind} {_how(u)} [{u.layout}, {u.proof}]" for u in self.uses[:2]]
        more = f" and {len(self.uses) - 2} more uses" if len(self.uses) > 2 else ""
        return head + "; ".join(shown) + more + (f"; example by example from {self.stuck} on" if self.stuck else "")


@dataclass(frozen=True)
class Explanation:
    """Per parameter: where it is used, by rule or general path, how the examples lie and how that is known."""

    entries: list[Entry]
    couplings: tuple[str, ...] = field(default=())

    def slow_uses(self) -> list[tuple[str, str]]:
        """(parameter, node) of each use that goes the general path for want of a rule. See `Entry.stuck` as well."""
        return [(e.name, u.kind) for e in self.entries for u in e.uses if u.rule is None]

    def __str__(self) -> str:
        lines = [str(e) for e in self.entries]
        if self.couplings:
            lines.append("examples are mixed below: " + ", ".join(self.couplings))
        return "\n".join(lines)

    __repr__ = __str__


def _how(use: Entry.Use) -> str:
    if use.rule is None:
        return "general path"
    return ", ".join(part for part in (use.rule, use.route, "" if use.direct else "pushed down") if part)
