"""From raw columns to numbers: numeric, one-hot, missing values; each decision is reported in a sentence."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from rowgrad.data.raw import Raw, enumerate_words, shorten
from rowgrad.errors import InputError

MAX_CATEGORIES = 50
MISSING_WORDS = ("", "na", "n/a", "null", "?")
MISSING_CATEGORY = "(missing)"
ROW_NUMBER_NAMES = ("unnamed", "unnamed: 0", "index", "id", "row", "__index_level_0__")


@dataclass(frozen=True)
class Advice:
    """What to do about a value that cannot be used; `{name}` stands for the column."""

    stray: str
    nan: str
    infinite: str
    neither: str


FEATURE = Advice(
    stray="mend or empty these cells, or use --categorical {name} or --drop {name}",
    nan="leave these cells empty, or use --nan missing or --drop {name}",
    infinite="mend these cells, or use --drop {name}",
    neither="make it numbers or text, or use --drop {name}",
)


@dataclass(frozen=True)
class Column:
    """How one raw column became numbers, so that other data can be encoded alike.

    median: in place of missing numbers, which a column of their own marks; None where none was missing.
    categories: each has a 0/1 column; None for numbers.
    """

    name: str
    median: float | None = None
    categories: tuple[str, ...] | None = None

    @property
    def width(self) -> int:
        """How many numeric columns it became."""
        return 1 + (self.median is not None) if self.categories is None else len(self.categories)


@dataclass
class Encoded:
    """Numeric columns made from the raw ones, and what was done on the way."""

    kept: list[Column] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    columns: list[np.ndarray] = field(default_factory=list)
    one_hot: dict[str, int] = field(default_factory=dict)
    filled: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, values: np.ndarray) -> None:
        """Append a column; names need not differ."""
        self.names.append(name)
        self.columns.append(values)

    def notes(self) -> list[str]:
        """One sentence for each kind of decision that was taken."""
        notes = []
        if self.one_hot:
            kinds = [f"{name} ({count} values)" for name, count in self.one_hot.items()]
            notes.append(f"Text columns were one-hot encoded: {enumerate_words(kinds)}.")
        if self.filled:
            counts = [f"{name} ({count})" for name, count in self.filled.items()]
            notes.append(
                "Missing numbers were replaced by the median of their column and marked in a column of their own: "
                f"{enumerate_words(counts)}."
            )
        if self.left_out:
            reasons = [f"{name} ({reason})" for name, reason in self.left_out.items()]
            notes.append(f"Columns were left out: {enumerate_words(reasons)}.")
        return notes


def encode(raw: Raw, names: list[str], categorical: frozenset[str], nan_is_missing: bool) -> Encoded:
    """The columns `names` of `raw` as float64 columns.

    Numbers stay as they are. Text of at most 50 distinct values, and every column in `categorical`, becomes one 0/1
    column per value. A missing number becomes the median of its column, with a 0/1 column that says where; a missing
    text is a value of its own. A column is left out if it is constant, without any value, or called like an index and
    numbering the rows.

    Raises:
        InputError: a mostly numeric column holds text, a text column has more than 50 values, a number is NaN or
            infinite, or a column is neither numbers nor text.
    """
    encoded = Encoded()
    for name in names:
        column = raw.frame[name]
        values = None if name in categorical else numbers(raw, column, FEATURE, nan_is_missing)
        if values is None:
            _add_categories(raw, encoded, as_text(column))
        else:
            _add_numbers(encoded, name, values)
    return encoded


def encode_like(raw: Raw, columns: Sequence[Column], nan_is_missing: bool) -> Encoded:
    """Columns of `raw` as those of other data were encoded; columns beside them are left out.

    Raises:
        InputError: a column is not there, holds a value that none there had (a category, a missing number), or what
            `encode` refuses.
    """
    encoded = Encoded()
    for column in columns:
        if column.name not in raw.frame.columns:
            raise InputError(
                f"{raw.name}: there is no column {column.name!r}, as there was in training; found "
                f"{shorten(raw.frame.columns)}"
            )
        found = raw.frame[column.name]
        if column.categories is not None:
            values = as_text(found).fill_null(MISSING_CATEGORY)
            new = np.flatnonzero(~values.is_in(list(column.categories)).to_numpy())
            if len(new):
                raise InputError(
                    f"{raw.name}: column {column.name!r} holds {values[int(new[0])]!r} in {raw.where(new)}; in "
                    f"training it held {shorten(column.categories)}"
                )
            _add_one_hot(encoded, column, values)
            continue
        values = numbers(raw, found, FEATURE, nan_is_missing)
        if values is None:
            raise InputError(
                f"{raw.name}: column {column.name!r} holds text ({found[0]!r}); in training it held numbers"
            )
        absent = np.flatnonzero(np.isnan(values))
        if len(absent) and column.median is None:
            raise InputError(
                f"{raw.name}: column {column.name!r} has no number in {raw.where(absent)}; in training every example "
                "had one, so give these examples one or remove them"
            )
        _add(encoded, column, values)
    return encoded


def numbers(raw: Raw, column: pl.Series, advice: Advice, nan_is_missing: bool = False) -> np.ndarray | None:
    """The column as float64 with NaN where a value is missing, or None where it is text."""
    if column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null):
        values = column.cast(pl.Float64)
    elif is_text(column):
        texts = _known(column, MISSING_WORDS)
        values = texts.cast(pl.Float64, strict=False)
        stray = np.flatnonzero((texts.is_not_null() & values.is_null()).to_numpy())
        if len(stray) and 2 * len(stray) >= len(texts) - texts.null_count():
            return None
        if len(stray):
            raise InputError(
                f"{raw.name}: column {column.name!r} is mostly numbers but holds text ({texts[int(stray[0])]!r}) in "
                f"{raw.where(stray)}; {advice.stray.format(name=column.name)}"
            )
    else:
        raise InputError(
            f"{raw.name}: column {column.name!r} holds {column.dtype}; {advice.neither.format(name=column.name)}"
        )
    if nan_is_missing:
        values = values.fill_nan(None)
    _refuse_nonfinite(raw, values.alias(column.name), advice)
    return values.to_numpy()


def missing(column: pl.Series) -> np.ndarray:
    """Positions of the examples without a value in this column."""
    return np.flatnonzero((as_text(column) if is_text(column) else column).is_null().to_numpy())


def is_text(column: pl.Series) -> bool:
    """Whether the column holds text of any kind."""
    return column.dtype in (pl.String, pl.Categorical, pl.Enum)


def as_text(column: pl.Series) -> pl.Series:
    """The column as text without spaces around it, null where it is a word for a missing value."""
    return _known(column, (*MISSING_WORDS, "nan"))


def _known(column: pl.Series, missing_words: tuple[str, ...]) -> pl.Series:
    text = column.cast(pl.String).str.strip_chars()
    return text.set(text.str.to_lowercase().is_in(missing_words), None)


def _refuse_nonfinite(raw: Raw, values: pl.Series, advice: Advice) -> None:
    bad = np.flatnonzero((values.is_not_null() & ~values.is_finite()).to_numpy())
    if len(bad):
        is_nan = bool(values.is_nan()[int(bad[0])])
        remedy = (advice.nan if is_nan else advice.infinite).format(name=values.name)
        kind = "NaN" if is_nan else "infinite"
        raise InputError(f"{raw.name}: column {values.name!r} is {kind} in {raw.where(bad)}; {remedy}")


def _add_numbers(encoded: Encoded, name: str, values: np.ndarray) -> None:
    absent = np.isnan(values)
    if absent.all():
        encoded.left_out[name] = "no values"
    elif absent.any():
        _add(encoded, Column(name, median=float(np.median(values[~absent]))), values)
        encoded.filled[name] = int(absent.sum())
    elif np.ptp(values) == 0:
        encoded.left_out[name] = "constant"
    elif name.lower() in ROW_NUMBER_NAMES and bool((np.diff(values) == 1).all()):
        encoded.left_out[name] = "numbers the rows"
    else:
        _add(encoded, Column(name), values)


def _add(encoded: Encoded, column: Column, values: np.ndarray) -> None:
    encoded.kept.append(column)
    if column.median is None:
        encoded.add(column.name, values)
        return
    absent = np.isnan(values)
    encoded.add(column.name, np.where(absent, column.median, values))
    encoded.add(f"{column.name} is missing", absent.astype(np.float64))


def _add_categories(raw: Raw, encoded: Encoded, texts: pl.Series) -> None:
    name = texts.name
    values = texts.fill_null(MISSING_CATEGORY)
    categories = values.unique().sort().to_list()
    if len(categories) > MAX_CATEGORIES:
        raise InputError(
            f"{raw.name}: text column {name!r} has {len(categories)} distinct values; at most {MAX_CATEGORIES} are "
            f"one-hot encoded, so leave it out with --drop {name}"
        )
    if len(categories) == 1:
        encoded.left_out[name] = "constant"
        return
    encoded.one_hot[name] = len(categories)
    _add_one_hot(encoded, Column(name, categories=tuple(categories)), values)


def _add_one_hot(encoded: Encoded, column: Column, values: pl.Series) -> None:
    encoded.kept.append(column)
    for category in column.categories or ():
        encoded.add(f"{column.name} = {category}", (values == category).to_numpy().astype(np.float64))
