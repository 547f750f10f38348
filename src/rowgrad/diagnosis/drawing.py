"""Drawings of a diagnosis: SVG and HTML that need nothing from outside, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import ceil, floor, isfinite, log10
from os import PathLike

from rowgrad.diagnosis.findings import Finding
from rowgrad.diagnosis.reading import Point
from rowgrad.diagnosis.steps import Along
from rowgrad.files import whole

WIDTH, HEIGHT = 760, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46  # margins around the plot
LETTER = 6.3  # width of a letter in pixels
MOST_LETTERS = 16  # of a name at an axis
STYLES = ("a", "b", "c", "d", "e", "f", "g", "h")  # classes of lines, see STYLE

STYLE = """
.rowgrad { --ink: #1d1c1a; --soft: #5c5955; --line: #e2dfd9; --card: #fff; --bad: #b8400e; --a: #2f5d8a; --b: #b8400e;
  --c: #3d7a4a; --d: #7a4b94; --e: #8a6d1f; --f: #2d7d80; --g: #a3375f; --h: #52606d; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  max-width: 980px; margin: 0 auto; }
@media (prefers-color-scheme: dark) { .rowgrad { --ink: #eceae6; --soft: #a9a6a0; --line: #34373b; --card: #1e2023;
  --bad: #ff9a62; --a: #85b6e6; --b: #ff9a62; --c: #7fc48f; --d: #c79ae0; --e: #d9bd6a; --f: #6cc5c8; --g: #f08aae;
  --h: #b3bfca; } }
.rowgrad h1 { font-size: 1.5rem; line-height: 1.25; margin: 24px 0 8px; }
.rowgrad h2 { font-size: 1.1rem; margin: 32px 0 4px; }
.rowgrad p { margin: 0 0 8px; max-width: 76ch; }
.rowgrad .soft { color: var(--soft); font-size: 0.9rem; }
.rowgrad .findings { list-style: none; margin: 12px 0; padding: 0; }
.rowgrad .findings li { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--soft);
  border-radius: 6px; padding: 8px 14px; margin: 0 0 8px; overflow-wrap: anywhere; }
.rowgrad .findings .error, .rowgrad .findings .warning { border-left-color: var(--bad); }
.rowgrad .findings b { margin-right: 8px; }
.rowgrad .findings p { margin: 2px 0 0; }
.rowgrad table { margin: 8px 0 24px; border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
.rowgrad th, .rowgrad td { text-align: left; padding: 3px 18px 3px 0; border-bottom: 1px solid var(--line); }
.rowgrad svg { display: block; width: 100%; height: auto; max-width: 900px; }
.rowgrad svg text { font-size: 11.5px; fill: var(--soft); }
.rowgrad svg .end { text-anchor: end; } .rowgrad svg .middle { text-anchor: middle; }
.rowgrad svg .grid { stroke: var(--line); } .rowgrad svg .axis { stroke: var(--soft); }
.rowgrad svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.rowgrad svg .dashed { stroke-dasharray: 5 4; } .rowgrad svg .band { fill: var(--line); opacity: 0.55; }
.rowgrad .legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 8px 0 4px; padding: 0; list-style: none;
  font-size: 0.9rem; color: var(--soft); }
.rowgrad .legend i { display: inline-block; width: 20px; border-top: 3px solid; margin-right: 6px;
  vertical-align: 4px; }
""" + "\n".join(
    f".rowgrad svg .{s} {{ stroke: var(--{s}); }} .rowgrad svg .dot.{s} {{ fill: var(--{s}); }} "
    f".rowgrad .legend .{s} {{ border-color: var(--{s}); }}"
    for s in STYLES
)
PAGE_STYLE = (
    "body { margin: 0; padding: 16px 20px 48px; background: #f7f6f3; }"
    "@media (prefers-color-scheme: dark) { body { background: #151618; } }"
)


@dataclass(frozen=True)
class Series:
    """One line: y over x; what is not finite, or not positive on a logarithmic scale, is left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    is_dashed: bool = False


@dataclass(frozen=True)
class Band:
    """A shaded range of y."""

    low: float
    high: float


# Charts of a diagnosis


def curves_chart(points: Sequence[Point]) -> str:
    """Activation, cotangent and gradient over weight, by layer, on one logarithmic scale."""
    x = list(range(1, len(points) + 1))
    series = [
        Series("activation", x, [p.activation for p in points]),
        Series("cotangent", x, [p.cotangent for p in points]),
        Series("gradient of the weights / weights", x, [p.gradient for p in points]),
    ]
    names = [p.layer.name for p in points]
    return chart(series, "layers, in the order of the forward pass", is_log=True, x_names=names)


def along_chart(along: Along) -> str:
    """The loss along the optimizer's next step beside its quadratic model."""
    parts = [t for t, _ in along.points]
    series = [
        Series("loss", parts, [loss for _, loss in along.points]),
        Series("quadratic model", parts, [along.model(t) for t in parts], is_dashed=True),
    ]
    return chart(series, "part of the step that is taken", is_log=False)


def findings_list(findings: Sequence[tuple[Finding, str]]) -> str:
    """Findings, each with a remark on when it was made."""
    items = [
        f'<li class="{f.severity}"><b>{escape(f.kind)}</b>{escape(f.where)} <span class="soft">{escape(remark)}</span>'
        f"<p>{escape(f.evidence)}.</p><p>→ {escape(f.remedy)}.</p></li>"
        for f, remark in findings
    ]
    return f'<ul class="findings">{"".join(items)}</ul>' if items else ""


# Pages


def fragment(parts: Sequence[str]) -> str:
    """Parts of a page with the style that they need, for a notebook or a page."""
    return f'<div class="rowgrad"><style>{STYLE}</style>{"".join(parts)}</div>'


def page(title: str, body: str) -> str:
    """A page that needs nothing else."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{PAGE_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def write_page(path: str | PathLike[str], title: str, body: str) -> None:
    """Write a page, whole or not at all."""
    with whole(path) as stage:
        stage.write_text(page(title, body), encoding="utf-8")


# One chart


class _Frame:
    """The ranges of a chart and where they lie on it."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], is_log: bool) -> None:
        self.is_log = is_log
        self.x_low, self.x_high = _apart(min(xs), max(xs))
        low, high = _apart(*((log10(v) for v in (min(ys), max(ys))) if is_log else (min(ys), max(ys))))
        self.ticks = _decades(low, high) if is_log else _round_numbers(low, high)
        self.low, self.high = min(low, self.ticks[0]), max(high, self.ticks[-1])

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return self.height(log10(value) if self.is_log else value)

    def height(self, scaled: float) -> float:
        return HEIGHT - BOTTOM - (scaled - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def chart(
    series: Sequence[Series],
    x_label: str,
    *,
    is_log: bool,
    x_names: Sequence[str] | None = None,
    band: Band | None = None,
) -> str:
    """Lines over one pair of axes, with a legend above; a line saying so where there is nothing to draw.

    Args:
        x_names: names of the positions 1, 2, ... on the x axis, in place of numbers.
        band: drawn behind the lines.
    """
    seen = [(x, y) for s in series for x, y in zip(s.x, s.y, strict=True) if _is_drawn(y, is_log)]
    if not seen:
        return '<p class="soft">nothing to draw: no number here is finite</p>'
    edges = [band.low, band.high] if band is not None else []
    frame = _Frame([x for x, _ in seen], [y for _, y in seen] + edges, is_log)
    parts = [] if band is None else [_band(frame, band)]
    parts += [*_y_axis(frame), *_x_axis(frame, x_names, x_label)]
    for s, style in zip(series, _styles(len(series)), strict=True):
        parts += _line(frame, s, style, x_names)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(x_label)}">{"".join(parts)}</svg>'
    return _legend(series) + svg


def _styles(n: int) -> list[str]:
    return [STYLES[k % len(STYLES)] for k in range(n)]


def _legend(series: Sequence[Series]) -> str:
    items = [
        f'<li><i class="{style}"{" style=border-top-style:dashed" if s.is_dashed else ""}></i>{escape(s.name)}</li>'
        for s, style in zip(series, _styles(len(series)), strict=True)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _is_drawn(y: float, is_log: bool) -> bool:
    return isfinite(y) and (y > 0 or not is_log)


def _line(frame: _Frame, s: Series, style: str, x_names: Sequence[str] | None) -> list[str]:
    """Runs of points without a gap, and the points themselves where there are few."""
    pairs = list(zip(s.x, s.y, strict=True))
    parts = []
    for is_drawn, run in groupby(pairs, lambda pair: _is_drawn(pair[1], frame.is_log)):
        points = [(frame.x(x), frame.y(y), x, y) for x, y in run] if is_drawn else []
        if len(points) > 1:
            coordinates = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in points)
            parts.append(f'<polyline class="{style}{" dashed" if s.is_dashed else ""}" points="{coordinates}"/>')
        if len(points) == 1 or (len(pairs) <= 80 and not s.is_dashed):
            parts += [_dot(px, py, style, f"{s.name}, {_at(x, x_names)}: {y:.3g}") for px, py, x, y in points]
    return parts


def _dot(x: float, y: float, style: str, text: str) -> str:
    return f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"><title>{escape(text)}</title></circle>'


def _at(x: float, x_names: Sequence[str] | None) -> str:
    return f"{x:g}" if x_names is None else x_names[int(x) - 1]


def _band(frame: _Frame, band: Band) -> str:
    top, bottom = frame.y(band.high), frame.y(band.low)
    return f'<rect class="band" x="{LEFT}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{bottom - top:.1f}"/>'


def _y_axis(frame: _Frame) -> list[str]:
    parts = []
    for tick in frame.ticks:
        y, text = frame.height(tick), f"1e{tick:g}" if frame.is_log else f"{tick:g}"
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 7}" y="{y + 4:.1f}">{text}</text>')
    return parts


def _x_axis(frame: _Frame, names: Sequence[str] | None, label: str) -> list[str]:
    base = HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{base}"/>']
    if names is None:
        ticks = [(t, f"{t:g}") for t in _round_numbers(frame.x_low, frame.x_high) if frame.x_low <= t <= frame.x_high]
    else:
        ticks = [(k, _short(name)) for k, name in enumerate(names, 1)]
    for x, text in _thinned(frame, ticks):
        parts.append(f'<line class="axis" x1="{frame.x(x):.1f}" y1="{base}" x2="{frame.x(x):.1f}" y2="{base + 4}"/>')
        parts.append(f'<text class="middle" x="{frame.x(x):.1f}" y="{base + 17}">{escape(text)}</text>')
    parts.append(f'<text class="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}">{escape(label)}</text>')
    return parts


def _thinned(frame: _Frame, ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Every k-th, so that no text touches the next or leaves the drawing."""
    if len(ticks) < 2:
        return list(ticks)
    room = (frame.x(ticks[-1][0]) - frame.x(ticks[0][0])) / (len(ticks) - 1)
    widest = max(len(text) for _, text in ticks) * LETTER + 10
    chosen = ticks[:: ceil(widest / room)]
    return [(x, text) for x, text in chosen if frame.x(x) + len(text) * LETTER / 2 < WIDTH]


def _short(name: str) -> str:
    """The end of a long name, which tells more than its beginning."""
    return name if len(name) <= MOST_LETTERS else "…" + name[1 - MOST_LETTERS :]


def _apart(low: float, high: float) -> tuple[float, float]:
    """A range with some width."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _decades(low: float, high: float) -> list[float]:
    """Whole powers of ten around a range, at most 8."""
    first, last = floor(low), ceil(high)
    step = ceil((last - first) / 7)
    return [float(k) for k in range(first, last + step, step)]


def _round_numbers(low: float, high: float) -> list[float]:
    """About five round numbers around a range."""
    size = 10.0 ** floor(log10((high - low) / 4))
    step = next(size * k for k in (1, 2, 5, 10) if size * k >= (high - low) / 5)
    return [step * k for k in range(floor(low / step), ceil(high / step) + 1)]
