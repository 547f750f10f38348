"""Pictures of a gradient's parts: bars by class of paths, and a map of time by weight. SVG that needs nothing else."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import log10

from torch import Tensor

from rowgrad.graph.layout import SIZE
from rowgrad.graph.lettering import elided, escape, number, percent, width
from rowgrad.graph.svg import RULES, colors

MOST_BARS = 40  # rows of a chart; more classes are joined to the smallest
MOST_CELLS = 120  # columns of a map; more times are joined
BAR, ROW, GAP = 360.0, 20.0, 12.0  # width of the largest bar, height of a row, room between columns
CELL = (6.0, 24.0)  # width of a cell, at least and at most
DECADES = 4  # orders of magnitude that the shades of a map tell apart
NAME = 36  # characters of a name


def part_sizes(parts: Mapping[Hashable, Tensor]) -> dict[str, tuple[float, float]]:
    """For each class of paths the norm of its part and its share <part, g> / |g|^2; shares add up to 1."""
    gradient = sum((p.double() for p in parts.values()), start=0.0)
    if not isinstance(gradient, Tensor):
        return {}
    square = float(gradient.square().sum())
    return {
        _label(label): (float(p.double().norm()), float((p.double() * gradient).sum()) / square if square else 0.0)
        for label, p in parts.items()
    }


def _label(label: Hashable) -> str:
    if isinstance(label, (frozenset, set)):
        return " + ".join(sorted(map(str, label))) or "none of them"
    return str(label)


def bars(parts: Mapping[Hashable, Tensor], title: str) -> str:
    """A row for each class of paths: its share of the gradient as a bar, and the norm of its part.

    Args:
        parts: what `Graph.decompose` returned.
        title: the line above.
    """
    rows = _joined(part_sizes(parts))
    names = [elided(label, NAME) for label, _, _ in rows]
    largest = max((abs(share) for _, _, share in rows), default=0.0) or 1.0
    least = min((share for _, _, share in rows), default=0.0)
    name_width = max((width(n, SIZE) for n in names), default=0.0)
    zero = name_width + GAP + BAR * max(-least, 0.0) / largest
    end = zero + BAR + GAP
    lines = [f'<text class="fact" x="0" y="{ROW - 6:.0f}">{escape(title)}</text>']
    for k, (name, (label, norm, share)) in enumerate(zip(names, rows, strict=True), start=1):
        y, long = k * ROW, BAR * abs(share) / largest
        x = zero if share >= 0 else zero - long
        lines.append(
            f'<g class="bar{" against" * (share < 0)}"><title>{escape(label)}</title>'
            f'<text x="{name_width:.1f}" y="{y + 14:.1f}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{x:.1f}" y="{y + 3:.1f}" width="{max(long, 0.5):.1f}" height="{ROW - 6:.1f}"/>'
            f'<text x="{end:.1f}" y="{y + 14:.1f}">{percent(share)}</text>'
            f'<text class="fact" x="{end + 100:.1f}" y="{y + 14:.1f}">norm {number(norm)}</text></g>'
        )
    return _svg(lines, max(end + 200, width(title, SIZE)), (len(rows) + 1) * ROW + 4, title)


def _joined(sizes: Mapping[str, tuple[float, float]]) -> list[tuple[str, float, float]]:
    """All classes in order, or the largest of them and one row for the others."""
    rows = [(label, norm, share) for label, (norm, share) in sizes.items()]
    if len(rows) <= MOST_BARS:
        return rows
    kept = {label for label, _, _ in sorted(rows, key=lambda r: -r[1])[: MOST_BARS - 1]}
    others = [r for r in rows if r[0] not in kept]
    rest = (f"{len(others)} others", sum(n * n for _, n, _ in others) ** 0.5, sum(s for _, _, s in others))
    return [*(r for r in rows if r[0] in kept), rest]


def time_map(parts: Mapping[str, Mapping[Hashable, Tensor]], title: str) -> str:
    """Weights by time: the norm of the part of each weight's gradient that enters at each time.

    Args:
        parts: {weight: what `Graph.decompose(weight, by="time")` returned}.
        title: the line above.
    """
    norms = {name: [float(p.double().norm()) for p in found.values()] for name, found in parts.items()}
    longest = max((len(row) for row in norms.values()), default=0)
    joined = -(-longest // MOST_CELLS) or 1
    n = -(-longest // joined)
    largest = max((v for row in norms.values() for v in row), default=0.0)
    names = {name: elided(name, NAME) for name in norms}
    left = max((width(text, SIZE) for text in names.values()), default=0.0) + GAP
    wide = min(max(600.0 / max(n, 1), CELL[0]), CELL[1])
    lines = [f'<text class="fact" x="0" y="{ROW - 6:.0f}">{escape(title)}</text>']
    for k, (name, row) in enumerate(norms.items(), start=1):
        y = k * ROW
        text = f'<title>{escape(name)}</title><text x="{left - GAP:.1f}" y="{y + 14:.1f}" text-anchor="end">'
        lines.append(f"<g>{text}{escape(names[name])}</text></g>")
        for t in range(-(-len(row) // joined)):
            value = max(row[t * joined : (t + 1) * joined])
            when = f"time {t * joined}" if joined == 1 else f"times {t * joined} to {(t + 1) * joined - 1}"
            lines.append(
                f'<rect class="cell" x="{left + t * wide:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{ROW:.1f}" '
                f'fill-opacity="{_shade(value, largest):.3f}">'
                f"<title>{escape(name)}, {when}: {number(value)}</title></rect>"
            )
    bottom, right = (len(norms) + 1) * ROW, left + n * wide
    lines.append(f'<text class="fact" x="{left:.1f}" y="{bottom + 16:.1f}">time 0</text>')
    lines.append(f'<text class="fact" x="{right:.1f}" y="{bottom + 16:.1f}" text-anchor="end">{longest - 1}</text>')
    lines += _scale(left, bottom + 30, largest)
    return _svg(lines, max(right, left + 540, width(title, SIZE)) + GAP, bottom + 60, title)


def _shade(value: float, largest: float) -> float:
    """1 for the largest, 0 from `DECADES` orders of magnitude below."""
    if not value > 0 or not largest > 0:
        return 0.0
    return max(0.0, 1 + log10(value / largest) / DECADES)


def _scale(x: float, y: float, largest: float) -> list[str]:
    """What the shades mean."""
    found = []
    for k in range(DECADES + 1):
        value, at = largest * 10.0 ** (k - DECADES), x + 104 * k
        found.append(
            f'<rect class="cell" x="{at:.1f}" y="{y:.1f}" width="14" height="14" fill-opacity="{k / DECADES:.2f}"/>'
            f'<text class="fact" x="{at + 18:.1f}" y="{y + 12:.1f}">{"≤ " * (k == 0)}{number(value)}</text>'
        )
    return found


def _svg(lines: Sequence[str], wide: float, tall: float, title: str) -> str:
    style = (
        f"<style>.rowgrad {{ {colors(0)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ .rowgrad {{ {colors(1)} }} }}\n{RULES}\n"
        ".rowgrad .bar rect { fill: var(--blue); } .rowgrad .bar.against rect { fill: var(--against); }\n"
        ".rowgrad .cell { fill: var(--mark); stroke: var(--edge); stroke-width: 0.5; }</style>"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="rowgrad" role="img" width="{wide:.0f}" height="{tall:.0f}" '
        f'viewBox="0 0 {wide:.1f} {tall:.1f}"><title>{escape(title)}</title>'
    )
    return "\n".join([head, style, *lines, "</svg>\n"])
