"""`Diagnosis`: what was found, the curves it was read from, and what was not looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from os import PathLike
from typing import Any

from rowgrad.diagnosis.drawing import along_chart, curves_chart, findings_list, fragment, write_page
from rowgrad.diagnosis.findings import Finding
from rowgrad.diagnosis.reading import Moments, Point
from rowgrad.diagnosis.steps import Along

_CURVES_HEAD = ("layer", "activation", "cotangent", "gradient/weight")
_CURVES_NOTE = (
    "What enters each layer (root mean square), the derivative of the mean loss at its output (norm), and the gradient "
    "of its weights over the weights (norms). Healthy curves stay within a few powers of ten; the cotangent travels "
    "from right to left."
)


@dataclass(frozen=True)
class Diagnosis:
    """What `rowgrad.diagnose` found.

    Attributes:
        findings: the worst first.
        curves: one point for each layer, in the order of the forward pass.
        not_looked_at: {kind: what to pass so that it is}.
        updates: {weight: size of the optimizer's next step over its own}, with `optimizer=`.
        along: the loss along that step and its quadratic model, with `closure=` too.
        moments: mean and spread of each layer's input, for a later `diagnose(..., earlier=this)`.

    >>> import torch, rowgrad
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> found = rowgrad.diagnose(model(torch.ones(1, 3)).sum(1), model)
    >>> found.ok, found.verdict, [point.layer.name for point in found.curves]
    (True, 'diagnosis of 2 layers: ok', ['0', '2'])
    """

    findings: tuple[Finding, ...]
    curves: tuple[Point, ...]
    not_looked_at: Mapping[str, str]
    updates: Mapping[str, float] = field(default_factory=dict)
    along: Along | None = None
    moments: Mapping[str, Moments] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool:
        """Whether nothing was found but notes."""
        return all(f.severity == "note" for f in self.findings)

    def of(self, kind: str) -> tuple[Finding, ...]:
        """The findings of one kind."""
        return tuple(f for f in self.findings if f.kind == kind)

    @property
    def verdict(self) -> str:
        """The first line: how many things are wrong."""
        n = sum(f.severity != "note" for f in self.findings)
        said = "ok" if n == 0 else f"{n} finding{'s' * (n > 1)}"
        return f"diagnosis of {len(self.curves)} layer{'s' * (len(self.curves) != 1)}: {said}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. Numbers that are not finite are strings."""
        return {
            "ok": self.ok,
            "findings": [f.to_dict() for f in self.findings],
            "curves": [p.to_dict() for p in self.curves],
            "not_looked_at": dict(self.not_looked_at),
            "updates": dict(self.updates),
        }

    def to_html(self, path: str | PathLike[str] | None = None) -> str:
        """The same as HTML, with the three curves by depth and the loss along the step drawn; nothing is loaded.

        Args:
            path: a file to which it is written as a page.
        """
        parts = [f"<h1>{escape(self.verdict)}</h1>", findings_list([(f, "") for f in self.findings])]
        if self.curves:
            parts += ["<h2>By depth</h2>", f'<p class="soft">{_CURVES_NOTE}</p>', curves_chart(self.curves)]
        if self.along is not None:
            parts += ["<h2>Along the next step</h2>", along_chart(self.along)]
        if self.curves:
            parts += ["<h2>Numbers</h2>", _table(_CURVES_HEAD, [_curve_cells(p) for p in self.curves])]
        parts += [f'<p class="soft">{escape(line)}</p>' for line in self._not_looked_at()]
        body = fragment(parts)
        if path is not None:
            write_page(path, self.verdict, body)
        return body

    def _repr_html_(self) -> str:
        return self.to_html()

    def __str__(self) -> str:
        findings = [line for f in self.findings for line in _lines(f)]
        curves = _aligned([_CURVES_HEAD, *map(_curve_cells, self.curves)])
        return "\n".join([self.verdict, *findings, *curves, *self._not_looked_at()])

    def _not_looked_at(self) -> list[str]:
        return [f"not looked at: {kind} (needs {needs})" for kind, needs in self.not_looked_at.items()]


def _lines(finding: Finding) -> list[str]:
    head = f"{finding.severity}: {finding.kind} at {finding.where}"
    return [head, f"  {finding.evidence}", f"  -> {finding.remedy}"]


def _curve_cells(point: Point) -> tuple[str, ...]:
    numbers = (point.activation, point.cotangent, point.gradient)
    return point.layer.name, *("not kept" if n != n else f"{n:.2e}" for n in numbers)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>" if rows else ""
