"""How wide text is without a font at hand, how it is shortened, and how numbers are written.

Note [room for text]
    A drawing names several monospaced fonts and does not know which the reader has. A character of the widest of them
    takes 0.62 of the font's size, an East Asian one or a picture two of these. What is measured so is never narrower
    than what is shown.
"""

from __future__ import annotations

import re
import unicodedata
from html import escape as _escape
from math import isfinite

FONT = 'ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace'
CELL = 0.62  # width of a character, in sizes of the font
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def cells(text: str) -> int:
    """Width in characters."""
    return sum(_cells_of(c) for c in text)


def _cells_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    is_wide = unicodedata.east_asian_width(character) in "WF" or unicodedata.category(character) == "So"
    return 2 if is_wide else 1


def width(text: str, size: float) -> float:
    """At most this many pixels in a font of this size. See Note [room for text]."""
    return cells(text) * size * CELL


def elided(text: str, n_cells: int) -> str:
    """Shortened in the middle to at most so many characters."""
    if cells(text) <= n_cells:
        return text
    head, tail = [], []
    room = n_cells - 1
    for i in range(len(text)):
        character = text[i // 2] if i % 2 == 0 else text[-1 - i // 2]
        room -= _cells_of(character)
        if room < 0:
            break
        (tail if i % 2 else head).append(character)
    return "".join(head) + "…" + "".join(reversed(tail))


def one_line(text: str) -> str:
    """Without what XML forbids and without line breaks."""
    return re.sub(r"\s", " ", _NOT_XML.sub("\ufffd", text))


def escape(text: str) -> str:
    """As text of an XML or HTML element or of a quoted attribute."""
    return _escape(_NOT_XML.sub("\ufffd", text))


def number(value: float) -> str:
    """A number for a reader: three significant digits, thousands separated, no trailing zeros."""
    if value == 0 or not isfinite(value):
        return f"{value:g}"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 999.5:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float) -> str:
    """A share as `12.3%`, with three significant digits and no trailing zeros."""
    return f"{100 * share:.3g}%"


def count(value: int) -> str:
    """`816`, `12.3k`, `4.5M`, `7B`: a count in little room."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{number(value / size)}{unit}"
    return str(value)
