"""A page of HTML with a drawing for each level of detail; radio buttons and a style sheet switch them, no script."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rowgrad.graph.boxes import Picture
from rowgrad.graph.lettering import FONT, escape
from rowgrad.graph.listing import listing
from rowgrad.graph.svg import RULES, colors, svg

STYLE = f"""
:root {{ color-scheme: light dark; {colors(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {colors(1)} }} }}
body {{ margin: 0; padding: 24px; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.4rem; margin: 0 0 4px; }}
p, summary {{ color: var(--soft); margin: 0 0 14px; }}
summary {{ cursor: pointer; }}
pre {{ font: 13px/1.45 {FONT}; overflow-x: auto; }}
.level {{ position: absolute; opacity: 0; }}
.level + label {{ display: inline-block; margin: 0 6px 8px 0; padding: 3px 12px; border: 1px solid var(--edge);
  border-radius: 14px; cursor: pointer; }}
.level + label small {{ color: var(--soft); }}
.level:checked + label {{ background: var(--weights); border-color: var(--blue); }}
.level:focus-visible + label {{ outline: 2px solid var(--mark); }}
.view {{ display: none; overflow-x: auto; margin-top: 8px; }}
.view svg {{ display: block; margin: 0 auto; }}
section {{ margin-top: 32px; overflow-x: auto; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 2px 18px; }}
.legend i {{ display: inline-block; width: 14px; height: 11px; border: 1px solid; border-radius: 3px;
  margin-right: 6px; }}
""".strip()


def page(first: Picture, pictures: Sequence[Picture], facts: str, below: Sequence[str] = ()) -> str:
    """The levels of detail in the given order, `first` of them shown, and further HTML below."""
    shown = "\n".join(f"#level{k}:checked ~ #view{k} {{ display: block; }}" for k in range(len(pictures)))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>Computational graph: {escape(facts)}</title>",
            f"<style>\n{STYLE}\n{RULES}\n{shown}\n</style></head><body>",
            f"<h1>Computational graph</h1><p>{escape(facts)}. Point at a box for what is in it.</p>",
            *(_button(k, picture, picture is first or picture == first) for k, picture in enumerate(pictures)),
            f'<p class="legend">{"".join(_legend(first))}</p>',
            *(_view(k, picture, facts) for k, picture in enumerate(pictures)),
            *(f"<section>{html}</section>" for html in below),
            "</body></html>\n",
        ]
    )


def _button(k: int, picture: Picture, is_first: bool) -> str:
    n = len(picture.boxes)
    return (
        f'<input class="level" type="radio" name="level" id="level{k}"{" checked" * is_first}>'
        f'<label for="level{k}">{escape(picture.name)} <small>{n} box{"es" * (n > 1)}</small></label>'
    )


def _legend(picture: Picture) -> Iterator[str]:
    """What the colors mean, as far as they appear."""
    kinds = {box.kind for box in picture.boxes}
    for kind, color, text in (
        ("weights", "blue", "weights enter"),
        ("plain", "edge", "no weights"),
        ("data", "green", "data with a gradient"),
    ):
        if kind in kinds:
            yield _key(f"background: var(--{kind}); color: var(--{color})", text)
    yield _key("color: var(--ink); border-width: 2px", "a loss")
    if any(box.is_marked for box in picture.boxes):
        yield _key("color: var(--mark); border-width: 2px", "on the marked paths")
    if any(arrow.share is not None for arrow in picture.arrows):
        yield _key("color: var(--line); background: var(--line); height: 5px", "width: share of the gradient")
    if any(arrow.share is not None and arrow.share < 0 for arrow in picture.arrows):
        yield _key("color: var(--against); border-style: dashed; height: 0", "against the gradient")


def _key(style: str, text: str) -> str:
    return f'<span><i style="{style}"></i>{text}</span>'


def _view(k: int, picture: Picture, facts: str) -> str:
    return (
        f'<div class="view" id="view{k}">{svg(picture, picture.name)}'
        f"<details><summary>As text</summary><pre>{escape(listing(picture, facts))}</pre></details></div>"
    )
