"""What a reader hands on: named columns as they stand in the source, and how to say where a value is."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl

from rowgrad.errors import InputError

N_SHOWN = 5  # places named in an error before "and 12 more"
TARGET_NAMES = ("y", "target", "targets", "label", "labels", "class")  # of a column or an array, in any case of letters


@dataclass(frozen=True)
class Raw:
    """Columns of a source before anything is decided about them.

    frame: one column per feature, and the target; text where the source does not say otherwise.
    images: (N, height, width) or (N, height, width, channels), where the examples are images; `frame` then holds
        the target alone.
    sequences, lengths: (N, steps, numbers) and how many steps each example has, where the examples are sequences;
        `frame` then holds the target alone.
    place, numbers: the word for where an example stands ("line", "row") and its number there, shape (N,).
    """

    name: str
    frame: pl.DataFrame
    place: str
    numbers: np.ndarray
    notes: tuple[str, ...] = ()
    images: np.ndarray | None = None
    sequences: np.ndarray | None = None
    lengths: np.ndarray | None = None

    def where(self, examples: np.ndarray) -> str:
        """`lines 3, 8 and 12`, for the examples at these positions; at most five are named."""
        numbers = [str(number) for number in self.numbers[examples[:N_SHOWN]]]
        left = len(examples) - len(numbers)
        word = self.place if len(examples) == 1 else f"{self.place}s"
        if left:
            return f"{word} {', '.join(numbers)} and {left} more"
        return f"{word} {enumerate_words(numbers)}"


def enumerate_words(words: list[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def shorten(names: Iterable[str], limit: int = 12) -> str:
    """`a, b, c and 40 more`; `nothing` for none."""
    words = list(names)
    shown = ", ".join(words[:limit]) or "nothing"
    return f"{shown} and {len(words) - limit} more" if len(words) > limit else shown


def check_names(source: str, names: list[str]) -> list[str]:
    """The names, `unnamed` for the one column that may lack one; two columns of the same name are refused."""
    unnamed = [position for position, name in enumerate(names, start=1) if not name]
    if len(unnamed) > 1:
        raise InputError(f"{source}: columns {unnamed[0]} and {unnamed[1]} have no name; name every column")
    repeated = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if repeated is not None:
        raise InputError(
            f"{source}: the column name {repeated!r} occurs {names.count(repeated)} times; rename all but one of them"
        )
    return [name or "unnamed" for name in names]
