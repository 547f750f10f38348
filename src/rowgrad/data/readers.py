"""From what the user names (a bundled set, a file) to a `Table`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from rowgrad.data.bundled import BUNDLED, read_bundled
from rowgrad.data.columns import Column, Encoded, encode, encode_like, is_text
from rowgrad.data.files import read_csv, read_npz, read_parquet
from rowgrad.data.raw import Raw, enumerate_words, shorten
from rowgrad.data.table import Table
from rowgrad.data.targets import Target, likely_targets, read_target, target_column
from rowgrad.errors import InputError

SUFFIXES = (".csv", ".tsv", ".parquet", ".npz")


def read_table(
    source: str | Path,
    *,
    target: str | None = None,
    drop: Iterable[str] = (),
    categorical: Iterable[str] = (),
    task: str | None = None,
    nan: str = "error",
    needs_target: bool = True,
    like: Sequence[Column] | None = None,
    text: Iterable[str] = (),
) -> Table:
    """A bundled set of scikit-learn by name, or a CSV, Parquet or NPZ file, as a table.

    Args:
        source: `digits`, `breast_cancer`, `wine`, `iris`, `diabetes`, or the path of a file. NPZ files hold features
            under `X`, `x`, `data`, `images` or `features` (3 or 4 dimensions are images); with `lengths` the examples
            are sequences, (N, steps) or (N, steps, numbers).
        target: the column (in NPZ files the array) to predict; by default the one called y, target, targets, label,
            labels or class, in NPZ files the first of these.
        drop: columns to leave out.
        categorical: columns of numbers that are names of categories, to be one-hot encoded.
        task: `classification` or `regression`; by default text, truth values and up to 50 distinct whole numbers are
            classes.
        nan: `error` refuses NaN in features with their places; `missing` treats it as a missing value.
        needs_target: False reads the features alone: no target is needed, and the column that would be it is left out.
        like: the `columns` of another table, whose encoding the features are given; other columns are left out.
        text: columns that become bags of words; by default those in sentences, see `rowgrad.data.columns.encode`.

    Raises:
        InputError: the source or an option cannot be used; the message says what, where, and what to do.
    """
    raw = _read(str(source), target, needs_target)
    if raw.frame.height < (2 if like is None else 1):
        count = "no examples" if raw.frame.height == 0 else "one example"
        raise InputError(f"{raw.name}: found {count}; an audit compares examples and needs at least two")
    chosen = _target_name(raw, target, needs_target)
    encoded_target = read_target(raw, chosen, task) if needs_target else _no_target(raw)
    names = _feature_columns(raw, chosen, drop, categorical, text)
    columns: Sequence[Column] = ()
    if raw.images is not None:
        features, feature_names, notes = _pixels(raw)
        frame = None
    elif raw.sequences is not None:
        features, feature_names, notes = _steps(raw)
        frame = None
    else:
        if like is None:
            encoded = encode(raw, names, frozenset(categorical), nan == "missing", frozenset(text))
        elif not like:
            raise InputError(f"{raw.name}: a table, where images or sequences like those of the training are needed")
        else:
            encoded = encode_like(raw, like, nan == "missing")
        features, feature_names, notes = _matrix(raw, encoded)
        frame, columns = raw.frame.select(names), encoded.kept
    return Table(
        name=raw.name,
        features=features,
        feature_names=feature_names,
        targets=encoded_target.values,
        target_name=chosen if needs_target else "",
        classes=encoded_target.classes,
        place=raw.place,
        numbers=raw.numbers,
        frame=frame,
        images=None if raw.images is None else _displayed(raw.images),
        notes=tuple(note for note in (encoded_target.note, *raw.notes, *notes) if note),
        steps=None if raw.sequences is None else (raw.sequences.shape[1], raw.sequences.shape[2]),
        lengths=None if raw.lengths is None else torch.from_numpy(raw.lengths),
        columns=tuple(columns),
    )


def _target_name(raw: Raw, asked: str | None, needs_target: bool) -> str:
    """The target's column; where none is needed, the one that would be it, or none, the empty name."""
    if raw.name in BUNDLED:
        return raw.frame.columns[-1]
    if needs_target or asked is not None:
        return target_column(raw, asked)
    likely = likely_targets(raw)
    return likely[0] if len(likely) == 1 else ""


def _no_target(raw: Raw) -> Target:
    return Target(torch.zeros(raw.frame.height, dtype=torch.float64), None, "")


def _read(source: str, target: str | None, needs_target: bool) -> Raw:
    if source in BUNDLED:
        if target is not None:
            raise InputError(f"{source} brings its own target; --target {target} is for files")
        return read_bundled(source)
    path = Path(source)
    names = ", ".join(BUNDLED)
    if path.is_dir():
        raise InputError(f"{source} is a directory; give one file ({', '.join(SUFFIXES)})")
    suffix = path.suffix.lower()
    if not path.exists():
        raise InputError(f"{source}: no such file, and not a bundled set ({names})")
    if suffix not in SUFFIXES:
        raise InputError(
            f"{source}: cannot read {suffix or 'a file without an extension'}; "
            f"give {', '.join(SUFFIXES)} or one of {names}"
        )
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{source}: the file is empty; expected a header and at least two examples")
        if suffix == ".npz":
            return read_npz(path, target, needs_target)
        return read_parquet(path) if suffix == ".parquet" else read_csv(path)
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror or error})") from error


def _feature_columns(
    raw: Raw, target: str, drop: Iterable[str], categorical: Iterable[str], text: Iterable[str]
) -> list[str]:
    columns = raw.frame.columns
    for option, asked in (("--drop", drop), ("--categorical", categorical), ("--text", text)):
        for name in asked:
            if name not in columns:
                raise InputError(f"{raw.name}: {option} {name}: no such column; found {shorten(columns)}")
            if name == target:
                raise InputError(f"{raw.name}: {option} {name}: this column is the target")
    for name in text:
        if name in set(categorical):
            raise InputError(f"{raw.name}: --text {name}: --categorical names it too; leave out one of them")
        if not is_text(raw.frame[name]):
            raise InputError(f"{raw.name}: --text {name}: the column holds {raw.frame[name].dtype}, not text")
    names = [name for name in columns if name != target and name not in set(drop)]
    if not names and raw.images is None and raw.sequences is None:
        beside = f" beside the target {target!r}" if target else ""
        raise InputError(f"{raw.name}: no column is left{beside}; there is nothing to learn from")
    return names


def _matrix(raw: Raw, encoded: Encoded) -> tuple[torch.Tensor, tuple[str, ...], list[str]]:
    if not encoded.columns:
        reasons = enumerate_words([f"{name} ({reason})" for name, reason in encoded.left_out.items()])
        raise InputError(f"{raw.name}: no usable column beside the target: {reasons}; there is nothing to learn from")
    matrix = np.column_stack(encoded.columns)
    largest = np.maximum(matrix.max(axis=0), -matrix.min(axis=0)).astype(np.float64)
    if largest.max() > 1e150:  # squares overflow
        name = encoded.names[int(largest.argmax())]
        raise InputError(
            f"{raw.name}: column {name!r} holds values beyond 1e150, which cannot be standardized; rescale it"
        )
    return torch.from_numpy(matrix), tuple(encoded.names), encoded.notes()


def _pixels(raw: Raw) -> tuple[torch.Tensor, tuple[str, ...], list[str]]:
    images = raw.images
    assert images is not None
    flat = images.reshape(len(images), -1)
    if images.dtype.kind == "f" and not np.isfinite(flat).all():
        bad = np.flatnonzero(~np.isfinite(flat).all(axis=1))
        raise InputError(f"{raw.name}: the images in {raw.where(bad)} hold NaN or infinite pixels; mend or remove them")
    n_constant = int((flat.max(axis=0) == flat.min(axis=0)).sum())
    shape = " x ".join(str(length) for length in images.shape[1:])
    notes = [f"Images of {shape} values, one feature per value."]
    if n_constant:
        notes.append(f"{n_constant} of {flat.shape[1]} pixels are the same in every image and are set to 0.")
    values = torch.from_numpy(np.ascontiguousarray(flat.astype(np.float32) if flat.dtype == np.float16 else flat))
    return values, tuple(f"pixel {k}" for k in range(flat.shape[1])), notes


def _steps(raw: Raw) -> tuple[torch.Tensor, tuple[str, ...], list[str]]:
    sequences, lengths = raw.sequences, raw.lengths
    assert sequences is not None
    assert lengths is not None
    inside = np.arange(sequences.shape[1])[None, :, None] < lengths[:, None, None]
    values = np.where(inside, sequences, 0).astype(np.float64)
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=(1, 2)))
        raise InputError(f"{raw.name}: the sequences in {raw.where(bad)} hold NaN or infinite values; mend them")
    n_steps, n_numbers = sequences.shape[1:]
    names = tuple(f"step {t}, number {k}" for t in range(n_steps) for k in range(n_numbers))
    note = f"Sequences of {lengths.min()} to {lengths.max()} steps of {n_numbers} numbers."
    return torch.from_numpy(values.reshape(len(values), -1)), names, [note]


def _displayed(images: np.ndarray) -> np.ndarray:
    """The images as bytes, from the darkest value of the set to its brightest."""
    low, high = float(images.min()), float(images.max())
    scale = 255 / (high - low) if high > low else 0.0
    displayed = ((images.astype(np.float32) - low) * scale).round().astype(np.uint8)
    return displayed[..., 0] if displayed.ndim == 4 and displayed.shape[3] == 1 else displayed
