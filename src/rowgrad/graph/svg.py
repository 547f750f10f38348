"""A drawing as SVG text that needs nothing else: no style sheet, font, script or network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from rowgrad.graph.boxes import Arrow, Box, Picture
from rowgrad.graph.layout import INSIDE_X, INSIDE_Y, LINE, MARGIN, SIZE, SMALL, Layout, Rect, Stem, label, layout, lines
from rowgrad.graph.lettering import FONT, elided, escape, width

HEAD = 24.0  # height of a drawing's own line of facts
N_CAPTION = 120  # its characters, at most
TIP_X, TIP_Y = 3.5, 8.0  # half the width and the height of an arrow's tip
THIN, THICK = 1.2, 9.0  # arrows without a share, and with all of it

# fmt: off
COLORS = {
    "page":  ("#ffffff", "#1e2023"), "ink":    ("#1d1c1a", "#eceae6"), "soft":    ("#5c5955", "#b4b1ab"),
    "plain": ("#f4f2ee", "#2a2d31"), "edge":   ("#a5a099", "#75787d"), "weights": ("#e3edf7", "#22364a"),
    "blue":  ("#2f5d8a", "#85b6e6"), "data":   ("#e9f3e6", "#25382a"), "green":   ("#4c7a45", "#93c58a"),
    "mark":  ("#b8400e", "#ff9a62"), "line":   ("#6f6b66", "#9a9ca0"), "against": ("#8e2a7a", "#e58ad4"),
}
# fmt: on

RULES = f"""
.rowgrad {{ background: var(--page); font-family: {FONT}; }}
.rowgrad text {{ font-size: {SIZE:g}px; fill: var(--ink); white-space: pre; }}
.rowgrad .name, .rowgrad .both {{ font-weight: 600; }}
.rowgrad .detail, .rowgrad .fact {{ fill: var(--soft); font-weight: 400; }}
.rowgrad .box rect {{ fill: var(--plain); stroke: var(--edge); }}
.rowgrad .weights rect {{ fill: var(--weights); stroke: var(--blue); }}
.rowgrad .data rect {{ fill: var(--data); stroke: var(--green); }}
.rowgrad .output rect {{ stroke: var(--ink); stroke-width: 2; }}
.rowgrad .box.marked rect {{ stroke: var(--mark); stroke-width: 2.5; }}
.rowgrad .arrow path {{ fill: none; stroke: var(--line); stroke-linejoin: round; }}
.rowgrad .arrow polygon {{ fill: var(--line); }}
.rowgrad .marked path {{ stroke: var(--mark); }}
.rowgrad .marked polygon {{ fill: var(--mark); }}
.rowgrad .against path {{ stroke: var(--against); stroke-dasharray: 6 3; }}
.rowgrad .against polygon {{ fill: var(--against); }}
.rowgrad .label rect {{ fill: var(--page); }}
.rowgrad .label text {{ font-size: {SMALL:g}px; text-anchor: middle; }}
""".strip()


def colors(column: int) -> str:
    """The variables that a style sheet needs: 0 on light paper, 1 in the dark."""
    return " ".join(f"--{name}: {both[column]};" for name, both in COLORS.items())


def standalone(picture: Picture, facts: str) -> str:
    """A file of its own, with its colors and a line of facts above."""
    style = f"<style>.rowgrad {{ {colors(0)} }}\n{RULES}</style>"
    return svg(picture, elided(f"{facts}: {picture.name}", N_CAPTION), style, HEAD)


def svg(picture: Picture, title: str, style: str = "", head: float = 0.0) -> str:
    """The drawing as an element of a page that has `RULES` and `colors`; `head` is room above to write the title."""
    placed = layout(picture)
    around = placed.around
    wide = max(around.width, width(title, SIZE) + 2 * MARGIN) if head else around.width
    left, tall = around.x - (wide - around.width) / 2, around.height + head
    caption = f'<text class="fact" x="{left + MARGIN:.1f}" y="{MARGIN + 4 - head:.1f}">{escape(title)}</text>'
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" class="rowgrad" role="img" width="{wide:.0f}" '
                f'height="{tall:.0f}" viewBox="{left:.1f} {-head:.1f} {wide:.1f} {tall:.1f}">'
            ),
            f"<title>{escape(title)}</title>",
            *([style] if style else []),
            *([caption] if head else []),
            *_body(picture, placed),
            "</svg>\n",
        ]
    )


def _body(picture: Picture, placed: Layout) -> Iterator[str]:
    """Arrows below boxes, those that stand out above the others, labels on top."""
    arrows = sorted(zip(picture.arrows, placed.routes, strict=True), key=lambda pair: pair[0].is_marked)
    yield from (_arrow(arrow, route) for arrow, route in arrows)
    yield from (_box(k, box, rect) for k, (box, rect) in enumerate(zip(picture.boxes, placed.boxes, strict=True)))
    for arrow, rect in zip(picture.arrows, placed.labels, strict=True):
        if rect is not None:
            yield _label(arrow, rect)


def _box(k: int, box: Box, rect: Rect) -> str:
    classes = f"box {box.kind}" + " output" * box.is_output + " marked" * box.is_marked
    notes = escape("\n".join(box.notes))
    return (
        f'<g class="{classes}" data-box="{k}"><title>{notes}</title>{_rect(rect, 5)}'
        + "".join(
            f'<text class="{style}" x="{rect.x + INSIDE_X:.1f}" y="{rect.y + INSIDE_Y + (n + 0.75) * LINE:.1f}">'
            f"{_written(box, style, text)}</text>"
            for n, (style, text) in enumerate(lines(box))
        )
        + "</g>"
    )


def _written(box: Box, style: str, text: str) -> str:
    if style != "both":
        return escape(text)
    title = escape(text[: len(box.title)])
    return f'{title}<tspan class="detail">{escape(text[len(box.title) :])}</tspan>'


def _rect(rect: Rect, rounded: float) -> str:
    place = f'x="{rect.x:.1f}" y="{rect.y:.1f}" width="{rect.width:.1f}" height="{rect.height:.1f}"'
    return f'<rect {place} rx="{rounded:g}"/>'


def _arrow(arrow: Arrow, route: Sequence[Stem]) -> str:
    end = route[-1]
    stroke = THIN if arrow.share is None else THIN + (THICK - THIN) * min(abs(arrow.share), 1.0)
    spread = max(TIP_X, stroke * 0.8)
    tip = f"{end.x:.1f},{end.bottom:.1f} {end.x - spread:.1f},{end.bottom - TIP_Y:.1f} "
    classes = "arrow" + " marked" * arrow.is_marked + " against" * (arrow.share is not None and arrow.share < 0)
    return (
        f'<g class="{classes}" data-from="{arrow.source}" data-to="{arrow.target}">'
        f'<path d="{_line(route)}" stroke-width="{stroke + arrow.is_marked:.1f}"/>'
        f'<polygon points="{tip}{end.x + spread:.1f},{end.bottom - TIP_Y:.1f}"/></g>'
    )


def _line(route: Sequence[Stem]) -> str:
    parts = [f"M{route[0].x:.1f} {route[0].top:.1f}V{route[0].bottom:.1f}"]
    for a, b in pairwise(route):
        middle, last = (a.bottom + b.top) / 2, b.bottom - TIP_Y + 1 if b is route[-1] else b.bottom
        parts.append(f"C{a.x:.1f} {middle:.1f} {b.x:.1f} {middle:.1f} {b.x:.1f} {b.top:.1f}V{last:.1f}")
    return "".join(parts)


def _label(arrow: Arrow, rect: Rect) -> str:
    x, y = rect.x + rect.width / 2, rect.y + rect.height - 4
    return (
        f'<g class="label" data-from="{arrow.source}" data-to="{arrow.target}"><title>{escape(arrow.text)}</title>'
        f'{_rect(rect, 2)}<text x="{x:.1f}" y="{y:.1f}">{escape(label(arrow))}</text></g>'
    )
