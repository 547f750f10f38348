"""The charts of the page as SVG text: dots on a logarithmic axis by row, and lines on two logarithmic axes.

Colors and fonts come from the page's style sheet; a series' class is its family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from rowgrad.graph.lettering import number

WIDTH = 1072
ROW, DOT = 30, 5  # height of a row and radius of a dot, in pixels
LABELS, RIGHT, TOP, BOTTOM = 300, 24, 8, 26  # room around dots by row
LEFT = 48  # room for the numbers beside lines


@dataclass(frozen=True)
class Dot:
    """A value with its quartiles; `text` is shown when it is pointed at."""

    value: float
    text: str
    family: str
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """A line through points."""

    name: str
    family: str
    points: Sequence[tuple[float, float]]


def dots_by_row(rows: Sequence[tuple[str, Sequence[Dot]]], title: str) -> Markup:
    """One row for each label with its dots; a line marks 1. Later dots lie on top."""
    values = [dot.value for _, dots in rows for dot in dots] + [1.0]
    axis = _Log(min(values) / 1.1, max(values) * 1.1, LABELS, WIDTH - RIGHT)
    bottom = TOP + ROW * len(rows)
    parts = [_text(0, TOP + ROW * k + ROW / 2 + 4, label, "row") for k, (label, _) in enumerate(rows)]
    for tick in axis.ticks():
        x = axis(tick)
        parts.append(_line(x, TOP, x, bottom, "axis" if tick == 1 else "grid"))
        parts.append(_text(x, bottom + 16, number(tick), "tick middle"))
    for k, (_, dots) in enumerate(rows):
        y = TOP + ROW * k + ROW / 2
        for dot in dots:
            if dot.spread is not None:
                parts.append(_line(axis(dot.spread[0]), y, axis(dot.spread[1]), y, f"whisker {dot.family}"))
            parts.append(
                f'<circle class="{dot.family}" cx="{axis(dot.value):.1f}" cy="{y:.1f}" r="{DOT}">'
                f"<title>{escape(dot.text)}</title></circle>"
            )
    return _svg(WIDTH, bottom + BOTTOM, parts, title)


def lines(series: Sequence[Series], *, x_label: str, y_label: str, title: str, width: int, height: int) -> Markup:
    """Lines with dots on two logarithmic axes; points that are not positive are left out."""
    series = [Series(s.name, s.family, [p for p in s.points if min(p) > 0]) for s in series]
    every = [p for s in series for p in s.points]
    if not every:
        return Markup("")
    x_axis = _Log(min(x for x, _ in every), max(x for x, _ in every), LEFT, width - 12)
    y_axis = _Log(min(y for _, y in every) / 1.2, max(y for _, y in every) * 1.2, height - 36, 22)
    parts = [_text(0, 11, y_label, "label"), _text(width - 12, height - 4, x_label, "label end")]
    for tick in y_axis.ticks():
        y = y_axis(tick)
        parts += [_line(LEFT, y, width - 12, y, "grid"), _text(LEFT - 6, y + 4, number(tick), "tick end")]
    for tick in x_axis.ticks():
        parts.append(_text(x_axis(tick), height - 20, number(tick), "tick middle"))
    for s in series:
        placed = [(x_axis(x), y_axis(y)) for x, y in s.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="{s.family}" points="{path}"><title>{escape(s.name)}</title></polyline>')
        for (x, y), (at, value) in zip(placed, s.points, strict=True):
            text = escape(f"{s.name}, {number(at)}: {number(value)}")
            parts.append(f'<circle class="{s.family}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{text}</title></circle>')
    return _svg(width, height, parts, title)


@dataclass(frozen=True)
class _Log:
    """Values from low to high to pixels from start to end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low) if self.high > self.low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten, with 2 and 5 between them while there is room."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**d for d in decades for step in steps]
            found = [tick for tick in found if self.low <= tick <= self.high]
            if len(found) <= 9:
                break
        return found[:: -(-len(found) // 9)] if found else [self.low]


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
