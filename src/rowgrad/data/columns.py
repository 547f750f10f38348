"""From raw columns to numbers: numeric, one-hot, missing values; each decision is reported in a sentence."""

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from rowgrad.data.raw import Raw, enumerate_words
from rowgrad.errors import InputError

MAX_CATEGORIES = 50
MISSING_WORDS = ("", "na", "n/a", "null", "none", "?")
ROW_NUMBER_NAMES = ("unnamed", "unnamed: 0", "index", "id", "row", "__index_level_0__")
MISSING_CATEGORY = "(missing)"


@dataclass
class Encoded:
    """Numeric columns made from the raw ones, and what was done on the way."""

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
                f"Missing values were replaced by the column's median and marked in a column of their own: {enumerate_words(counts)}."
            )
        if self.left_out:
            reasons = [f"{name} ({reason})" for name, reason in self.left_out.items()]
            notes.append(f"Columns were left out: {enumerate_words(reasons)}.")
        return notes


def encode(raw: Raw, names: list[str], categorical: frozenset[str], nan_is_missing: bool) -> Encoded:
    """The columns `names` of `raw` as float64 columns.

    Numbers stay as they are; text of at most 50 distinct values (and every column in `categorical`) becomes one 0/1 column per value;
    a missing number becomes the column's median, with a 0/1 column that says where; a missing text is a value of its own.
    Columns that are constant, entirely missing, or called like an index and number the rows carry nothing and are left out.

    Raises:
        InputError: a mostly numeric column holds text, a text column has more than 50 values, a number is NaN or infinite,
            or a column is neither numbers nor text.
    """
    encoded = Encoded()
    for name in names:
        column = raw.frame[name]
        if name in categorical:
            _add_categories(raw, encoded, _as_text(column))
        elif (values := numbers(raw, column, nan_is_missing)) is not None:
            _add_numbers(encoded, name, values)
        else:
            _add_categories(raw, encoded, _as_text(column))
    return encoded


def numbers(raw: Raw, column: pl.Series, nan_is_missing: bool = False) -> np.ndarray | None:
    """The column as float64 with NaN where a value is missing, or None where it is text."""
    if column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null):
        values = column.cast(pl.Float64)
        texts = None
    elif _is_text(column):
        texts = _as_text(column)
        values = texts.cast(pl.Float64, strict=False)
        n_text = int((texts.is_not_null() & values.is_null()).sum())
        n_given = len(texts) - texts.null_count()
        if n_text and 2 * n_text >= n_given:
            return None
        if n_text:
            _refuse_stray(raw, column.name, texts, values)
    else:
        raise InputError(
            f"{raw.name}: column {column.name!r} holds {column.dtype}; use numbers or text, or --drop {column.name}"
        )
    if nan_is_missing:
        values = values.fill_nan(None)
    _refuse_nonfinite(raw, column.name, values)
    return values.to_numpy()


def missing(column: pl.Series) -> np.ndarray:
    """Positions of the examples without a value in this column."""
    column = _as_text(column) if _is_text(column) else column
    return np.flatnonzero(column.is_null().to_numpy())


def _is_text(column: pl.Series) -> bool:
    return column.dtype in (pl.String, pl.Categorical, pl.Enum)


def _as_text(column: pl.Series) -> pl.Series:
    """The column as text without spaces around it, null where it is one of the words for a missing value."""
    text = column.cast(pl.String).str.strip_chars()
    return text.set(text.str.to_lowercase().is_in(MISSING_WORDS), None)


def _refuse_stray(raw: Raw, name: str, texts: pl.Series, values: pl.Series) -> None:
    stray = np.flatnonzero((texts.is_not_null() & values.is_null()).to_numpy())
    raise InputError(
        f"{raw.name}: column {name!r} is mostly numbers but holds text ({texts[int(stray[0])]!r}) in {raw.where(stray)}; "
        f"mend or empty these cells, or use --categorical {name} or --drop {name}"
    )


def _refuse_nonfinite(raw: Raw, name: str, values: pl.Series) -> None:
    bad = np.flatnonzero((values.is_not_null() & ~values.is_finite()).to_numpy())
    if not len(bad):
        return
    nan = bool(values.is_nan()[int(bad[0])])
    remedy = "leave the cells empty, or use --nan missing" if nan else "mend these cells"
    raise InputError(
        f"{raw.name}: column {name!r} is {'NaN' if nan else 'infinite'} in {raw.where(bad)}; {remedy}, or use --drop {name}"
    )


def _add_numbers(encoded: Encoded, name: str, values: np.ndarray) -> None:
    absent = np.isnan(values)
    if absent.all():
        encoded.left_out[name] = "no values"
    elif np.ptp(values[~absent]) == 0 and not absent.any():
        encoded.left_out[name] = "constant"
    elif name.lower() in ROW_NUMBER_NAMES and _numbers_the_rows(values):
        encoded.left_out[name] = "numbers the rows"
    elif absent.any():
        encoded.add(name, np.where(absent, np.median(values[~absent]), values))
        encoded.add(f"{name} is missing", absent.astype(np.float64))
        encoded.filled[name] = int(absent.sum())
    else:
        encoded.add(name, values)


def _numbers_the_rows(values: np.ndarray) -> bool:
    return len(values) > 2 and bool((np.diff(values) == 1).all()) and values[0] in (0, 1)


def _add_categories(raw: Raw, encoded: Encoded, texts: pl.Series) -> None:
    name = texts.name
    values = texts.fill_null(MISSING_CATEGORY)
    categories = values.unique().sort().to_list()
    if len(categories) > MAX_CATEGORIES:
        raise InputError(
            f"{raw.name}: text column {name!r} has {len(categories)} distinct values; at most {MAX_CATEGORIES} are one-hot "
            f"encoded, so leave it out with --drop {name}"
        )
    if len(categories) == 1:
        encoded.left_out[name] = "constant"
        return
    encoded.one_hot[name] = len(categories)
    for category in categories:
        encoded.add(f"{name} = {category}", (values == category).to_numpy().astype(np.float64))
