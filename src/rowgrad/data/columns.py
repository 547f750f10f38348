"""From raw columns to numbers: numeric, one-hot, texts, missing values; each decision is reported in a sentence."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from rowgrad.data import texts
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
    categories: each has a 0/1 column; None for numbers and texts.
    words, weights: each word of a text has a column, see `rowgrad.data.texts`; None for others.
    """

    name: str
    median: float | None = None
    categories: tuple[str, ...] | None = None
    words: tuple[str, ...] | None = None
    weights: tuple[float, ...] | None = None

    @property
    def width(self) -> int:
        """How many numeric columns it became."""
        named = self.categories if self.words is None else self.words
        return 1 + (self.median is not None) if named is None else len(named)


@dataclass
class Encoded:
    """Numeric columns made from the raw ones, each of shape (N,) or several in (N, n), and what was done on the way."""

    kept: list[Column] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    columns: list[np.ndarray] = field(default_factory=list)
    one_hot: dict[str, int] = field(default_factory=dict)
    bags: dict[str, str] = field(default_factory=dict)
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
        if self.bags:
            sizes = [f"{name} ({size})" for name, size in self.bags.items()]
            notes.append(f"Text columns became bags of words: {enumerate_words(sizes)}.")
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


def encode(
    raw: Raw, names: list[str], categorical: frozenset[str], nan_is_missing: bool, text: frozenset[str] = frozenset()
) -> Encoded:
    """The columns `names` of `raw` as numeric columns, float64 but for texts.

    Numbers stay as they are. Text of at most 50 distinct values, and every column in `categorical`, becomes one 0/1
    column per value. Text of more distinct values, or of as many as half the examples, becomes a bag of words where
    most values are sentences, three words or more, and so does every column in `text`. A missing number becomes the
    median of its column, with a 0/1 column that says where; a missing category is a value of its own; a missing text
    has no words. A column is left out if it is constant, without any value, or called like an index and numbering the
    rows.

    Raises:
        InputError: a mostly numeric column holds text, a text column has more than 50 values and is not of sentences,
            there are too many examples for bags of words or no word is in three of them, a number is NaN or infinite,
            or a column is neither numbers nor text.
    """
    encoded = Encoded()
    asked = categorical | text
    read = {name: None if name in asked else numbers(raw, raw.frame[name], FEATURE, nan_is_missing) for name in names}
    words = {name: as_text(raw.frame[name]) for name, values in read.items() if values is None}
    bagged = [name for name in words if name in text or (name not in categorical and _reads_as_text(words[name]))]
    for name, values in read.items():
        if values is not None:
            _add_numbers(encoded, name, values)
        elif name in bagged:
            _add_text(raw, encoded, words[name], len(bagged))
        else:
            _add_categories(raw, encoded, words[name])
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
        if column.words is not None:
            if raw.frame.height * column.width > texts.MAX_ENTRIES:
                raise InputError(
                    f"{raw.name}: {raw.frame.height:,} examples of {column.width:,} words of {column.name!r} take too "
                    "much memory; split the file"
                )
            _add_bags(encoded, column, as_text(found))
            continue
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


def _reads_as_text(column: pl.Series) -> bool:
    n_distinct = column.n_unique()
    return (n_distinct > MAX_CATEGORIES or 2 * n_distinct > len(column)) and texts.are_sentences(column)


def _add_text(raw: Raw, encoded: Encoded, column: pl.Series, n_columns: int) -> None:
    name, room = column.name, texts.MAX_ENTRIES // len(column) // n_columns
    if room < texts.LEAST_ROOM:
        raise InputError(
            f"{raw.name}: {len(column):,} examples leave memory for {room} words of text column {name!r}, too few to "
            f"tell what it says; take fewer examples, or leave it out with --drop {name}"
        )
    words, weights, n_known = texts.choose_words(column.fill_null("").to_list(), min(room, texts.MAX_WORDS))
    if not words:
        raise InputError(
            f"{raw.name}: no word of text column {name!r} occurs in three examples; leave it out with --drop {name}"
        )
    bags = _add_bags(encoded, Column(name, words=words, weights=weights), column)
    size = f"{len(words):,}{'' if len(words) == n_known else f' of {n_known:,}'} words"
    n_empty = int((bags.max(axis=1) == 0).sum())
    empty = "one example has" if n_empty == 1 else f"{n_empty:,} examples have"
    encoded.bags[name] = f"{size}; {empty} none of them" if n_empty else size


def _add_bags(encoded: Encoded, column: Column, found: pl.Series) -> np.ndarray:
    words = column.words or ()
    bags = texts.bags_of(found.fill_null("").to_list(), words, column.weights or ())
    encoded.kept.append(column)
    encoded.names.extend(f"{column.name}: {word}" for word in words)
    encoded.columns.append(bags)
    return bags


def _add_categories(raw: Raw, encoded: Encoded, column: pl.Series) -> None:
    name = column.name
    values = column.fill_null(MISSING_CATEGORY)
    categories = values.unique().sort().to_list()
    if len(categories) > MAX_CATEGORIES:
        raise InputError(
            f"{raw.name}: text column {name!r} has {len(categories)} distinct values; at most {MAX_CATEGORIES} are "
            f"one-hot encoded, so leave it out with --drop {name}, or count its words with --text {name}"
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
