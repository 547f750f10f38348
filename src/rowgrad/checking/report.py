"""The one kind of report: a verdict, a table with a line for each finding, and notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import Any, Generic, Protocol, TypeVar


class Line(Protocol):
    """One line of a report's table."""

    @property
    def ok(self) -> bool: ...
    def cells(self) -> tuple[str, ...]:
        """What is shown, without the mark."""
        ...

    def to_dict(self) -> dict[str, Any]: ...


L = TypeVar("L", bound=Line)


@dataclass(frozen=True)
class Report(Generic[L]):
    """What a check found: one finding per parameter, and notes on what concerns no single one.

    Attributes:
        title: what was checked.
        allowed: how much error was allowed, in words.
        columns: heads of the table.
        findings: lines of the table.
        notes: faults that are in no line of the table.
        remarks: what else there is to say; no faults.
    """

    title: str
    allowed: str
    columns: tuple[str, ...]
    findings: tuple[L, ...]
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every finding is within what was allowed and there is no further fault."""
        return not self.notes and all(f.ok for f in self.findings)

    @property
    def verdict(self) -> str:
        """The first line: what was checked, how it went, how much was allowed."""
        return f"{self.title}: {'ok' if self.ok else 'FAILED'}, {self.allowed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. A number that is not finite is given as a string."""
        return {
            "ok": self.ok,
            "title": self.title,
            "allowed": self.allowed,
            "findings": [{k: _plain(v) for k, v in f.to_dict().items()} for f in self.findings],
            "notes": list(self.notes),
            "remarks": list(self.remarks),
        }

    def to_html(self) -> str:
        """The same table as HTML, for notebooks and pages."""
        head, *rows = self._table()
        lines = [f"<tr>{_cells('th', head)}</tr>"]
        for finding, row in zip(self.findings, rows, strict=True):
            start = "<tr>" if finding.ok else '<tr class="failed">'
            lines.append(f"{start}{_cells('td', row)}</tr>")
        notes = "".join(f"<p>{escape(note)}</p>" for note in (*self.notes, *self.remarks))
        return f"<p>{escape(self.verdict)}</p><table>{''.join(lines)}</table>{notes}"

    _repr_html_ = to_html

    def __str__(self) -> str:
        table = self._table()
        widths = [max(len(row[i]) for row in table) for i in range(len(self.columns))]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in table]
        return "\n".join([self.verdict, *lines, *self.notes, *self.remarks])

    def _table(self) -> list[tuple[str, ...]]:
        return [("", *self.columns), *(("ok" if f.ok else "FAILED", *f.cells()) for f in self.findings)]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _cells(tag: str, cells: Sequence[str]) -> str:
    return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
