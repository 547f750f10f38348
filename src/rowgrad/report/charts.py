"""Charts as SVG text that takes its colors and fonts from the page's style sheet.

A chart is drawn in the width it is shown at, so that its text has the size of the page's; a page for two widths of
screen holds it twice and shows one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import LogLocator, MaxNLocator

from rowgrad.graph.lettering import number

LEFT, RIGHT, TOP, BOTTOM = 46, 10, 22, 36  # margins around the plot, in pixels


@dataclass(frozen=True)
class Line:
    """One line of a chart: values at the positions 1, 2, ... and the class of the style sheet that colors it."""

    values: np.ndarray
    style: str


@dataclass(frozen=True)
class Series:
    """Points of a plot, joined by a line or as dots, and the class of the style sheet that colors them."""

    x: np.ndarray
    y: np.ndarray
    style: str
    is_joined: bool = False


@dataclass(frozen=True)
class _Frame:
    """The plot's area and the ranges it shows."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)


def line_chart(
    lines: Sequence[Line],
    band: tuple[np.ndarray, np.ndarray] | None,
    *,
    width: int,
    height: int,
    x_label: str,
    y_label: str,
    title: str,
) -> Markup:
    """Lines over the positions 1 .. n, on a linear scale from 0, with an optional shaded band between two curves."""
    n = len(lines[0].values)
    top = max(float(curve.max()) for curve in (*(line.values for line in lines), *(band or ())))
    y_ticks = _ticks(0, top)
    frame = _Frame(width, height, (1, max(n, 2)), (0, max(top * 1.02, y_ticks[-1])))
    x_ticks = [tick for tick in (1, *_ticks(1, n, whole=True)) if 1 <= tick <= n]
    parts = _axes(frame, _dedupe(x_ticks), y_ticks, x_label, y_label)
    if band is not None:
        outline = [*_points(frame, band[1]), *reversed(_points(frame, band[0]))]
        parts.append(f'<polygon class="band" points="{" ".join(outline)}"/>')
    for line in lines:
        if n == 1:
            parts.append(
                f'<circle class="{line.style} dot" cx="{frame.x(1):.1f}" cy="{frame.y(line.values[0]):.1f}" r="3"/>'
            )
        else:
            parts.append(f'<polyline class="{line.style}" points="{" ".join(_points(frame, line.values))}"/>')
    return _svg(frame, parts, title)


def plot(
    series: Sequence[Series],
    *,
    width: int,
    height: int,
    x_label: str,
    y_label: str,
    title: str,
    x_log: bool = False,
    x_names: Sequence[str] = (),
) -> Markup:
    """Positive values on a logarithmic scale over a linear, a logarithmic or a named one (positions 0, 1, ...)."""
    y = np.concatenate([s.y for s in series])
    low, high = _roomy(float(y.min()), float(y.max()))
    y_ticks = _decades(low, high)
    if x_names:
        x_range, x_ticks = (-0.5, len(x_names) - 0.5), list(map(float, range(len(x_names))))
    else:
        x = np.concatenate([s.x for s in series])
        ends = float(x.min()), float(x.max())
        ends = _roomy(*ends) if x_log else ends if ends[1] > ends[0] else (ends[0] - 0.5, ends[1] + 0.5)
        x_ticks = _decades(*ends) if x_log else [t for t in _ticks(*ends) if ends[0] <= t <= ends[1]]
        if (x == x.round()).all():
            x_ticks = [t for t in x_ticks if x_log or t == round(t)]  # whole numbers have no places between them
        x_range = (float(np.log10(ends[0])), float(np.log10(ends[1]))) if x_log else ends
    frame = _Frame(width, height, x_range, (float(np.log10(low)), float(np.log10(high))))
    parts = _axes(frame, x_ticks, y_ticks, x_label, y_label, log=x_log, y_log=True, names=x_names)
    for one in series:
        across = np.log10(one.x) if x_log else one.x
        places = [(frame.x(float(a)), frame.y(float(b))) for a, b in zip(across, np.log10(one.y), strict=True)]
        if one.is_joined and len(places) > 1:
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline class="{one.style}" points="{points}"/>')
        else:
            parts += [f'<circle class="{one.style}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in places]
    return _svg(frame, parts, title)


def _roomy(low: float, high: float) -> tuple[float, float]:
    """A little beyond both ends of positive values, at least a factor of 2 in all."""
    room = max(1.15, (2 * low / high) ** 0.5)
    return low / room, high * room


def _axes(
    frame: _Frame,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
    log: bool = False,
    y_log: bool = False,
    names: Sequence[str] = (),
) -> list[str]:
    base = frame.height - BOTTOM
    parts = [f'<text class="label" x="0" y="11">{escape(y_label)}</text>']
    for tick in y_ticks:
        y = frame.y(float(np.log10(tick)) if y_log else tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{frame.width - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 4:.1f}">{number(tick)}</text>')
    for k, tick in enumerate(x_ticks):
        said = escape(names[k]) if names else number(tick)
        x = frame.x(np.log10(tick) if log else tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 4}"/>')
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{base + 16}">{said}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{base}" x2="{frame.width - RIGHT}" y2="{base}"/>')
    parts.append(f'<text class="label end" x="{frame.width - RIGHT}" y="{frame.height - 4}">{escape(x_label)}</text>')
    return parts


def _svg(frame: _Frame, parts: list[str], title: str) -> Markup:
    body = "".join(parts)
    return Markup(
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def _points(frame: _Frame, values: np.ndarray) -> list[str]:
    return [f"{frame.x(k):.1f},{frame.y(float(value)):.1f}" for k, value in enumerate(values, start=1)]


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """A few round numbers that reach from `low` to `high`."""
    locator = MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10], integer=whole)
    return [float(tick) for tick in locator.tick_values(low, high if high > low else low + 1)]


def _dedupe(ticks: Sequence[float]) -> list[float]:
    """Ascending, without a tick that would touch the first."""
    first, *others = sorted(set(ticks))
    gap = 0.08 * (max(ticks) - first)
    return [first, *(tick for tick in others if tick - first > gap)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten inside the range, with 2 and 5 between them where it spans less than two decades."""
    subs = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
    ticks = [float(tick) for tick in LogLocator(base=10, subs=subs).tick_values(low, high) if low <= tick <= high]
    step = -(-len(ticks) // 7)
    return ticks[::step]
