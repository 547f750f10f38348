"""CSV, Parquet and NPZ files as raw columns. Nothing is unpickled and every refusal names the line or row."""

import csv
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from pyarrow import parquet

from rowgrad.data.raw import TARGET_NAMES, Raw, check_names, shorten
from rowgrad.errors import InputError

CHUNK = 20_000  # records held as Python strings at a time
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
FEATURE_KEYS = ("X", "x", "data", "images", "features")
LENGTH_KEYS = ("lengths", "length")


def read_csv(path: Path) -> Raw:
    """Text columns of a CSV file with a header; every record keeps its line number."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read_records(path, file)
    except UnicodeDecodeError as error:
        line = _first_undecodable_line(path)
        raise InputError(f"{path}: line {line} is not UTF-8 text; save the file as UTF-8") from error


def _read_records(path: Path, file) -> Raw:
    separator = _separator(file.readline())
    file.seek(0)
    reader = csv.reader(file, delimiter=separator, strict=True)
    try:
        header = next((record for record in reader if record), None)
        if header is None:
            raise InputError(f"{path}: the file is empty; expected a header and at least two examples")
        names = check_names(str(path), [name.strip() for name in header])
        chunks, lines = _columns(path, reader, names)
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num} is not valid CSV ({error}); check its quotes") from error
    notes = () if separator == "," else (f"The columns are separated by {SEPARATORS[separator]}.",)
    return Raw(path.name, pl.concat(chunks), "line", np.array(lines, dtype=np.int64), notes)


def _separator(header: str) -> str:
    """The separator that occurs most in the header; a comma where none does."""
    return max(SEPARATORS, key=header.count)


def _columns(path: Path, reader, names: list[str]) -> tuple[list[pl.DataFrame], list[int]]:
    schema = dict.fromkeys(names, pl.String)
    chunks, records, lines = [pl.DataFrame(schema=schema)], [], []
    for record in reader:
        if not record:  # a blank line
            continue
        if len(record) != len(names):
            raise InputError(
                f"{path}: line {reader.line_num} has {len(record)} values where the header names {len(names)} columns"
            )
        records.append(record)
        lines.append(reader.line_num)
        if len(records) == CHUNK:
            chunks.append(pl.DataFrame(records, schema=schema, orient="row"))
            records = []
    chunks.append(pl.DataFrame(records, schema=schema, orient="row"))
    return chunks, lines


def _first_undecodable_line(path: Path) -> int:
    data = path.read_bytes()
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return data.count(b"\n", 0, error.start) + 1
    raise AssertionError("bug in rowgrad, please report: a file failed to decode in parts but not as a whole")


def read_parquet(path: Path) -> Raw:
    """The columns of a Parquet file, with their types."""
    try:
        table = parquet.read_table(path)
        frame = pl.from_arrow(table.rename_columns(check_names(str(path), table.column_names)))
    except (pa.ArrowException, pl.exceptions.PolarsError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({_first_line(error)})") from error
    assert isinstance(frame, pl.DataFrame)
    return Raw(path.name, frame, "row", np.arange(frame.height))


def read_npz(path: Path, target: str | None, needs_target: bool = True) -> Raw:
    """The arrays of an NPZ file; `target` names the array of targets, which otherwise goes by one of the usual keys.

    Where no target is needed and there is none, zeros stand for it.
    """
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not an NPZ file (it is not a zip archive); write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as archive:
            key_x, key_y = _keys(path, archive.files, target, needs_target)
            features = archive[key_x]
            targets = archive[key_y] if key_y in archive.files else np.zeros(features.shape[:1])
            lengths = next((archive[key] for key in LENGTH_KEYS if key in archive.files and key != key_y), None)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = "it holds pickled objects, which are never loaded" if "pickle" in str(error) else _first_line(error)
        raise InputError(f"{path}: not a readable NPZ file ({reason})") from error
    _check_arrays(path, key_x, features, key_y, targets)
    column = pl.Series(key_y, targets.reshape(-1))
    rows = np.arange(len(column))
    if lengths is not None:
        sequences = features[:, :, None] if features.ndim == 2 else features
        _check_lengths(path, key_x, sequences, lengths)
        return Raw(path.name, column.to_frame(), "row", rows, sequences=sequences, lengths=lengths.astype(np.int64))
    if features.ndim > 2:
        return Raw(path.name, column.to_frame(), "row", rows, images=_channels_last(features))
    columns = features.reshape(len(features), -1).T
    frame = pl.DataFrame({f"{key_x}[{k}]": values for k, values in enumerate(columns)} | {key_y: column})
    return Raw(path.name, frame, "row", rows)


def _keys(path: Path, found: list[str], target: str | None, needs_target: bool) -> tuple[str, str]:
    if target is not None and target not in found:
        raise InputError(f"{path}: no array is called {target!r}; found {shorten(found)}")
    features = next((key for key in FEATURE_KEYS if key in found and key != target), None)
    otherwise = None if needs_target else TARGET_NAMES[0]
    likely = {key.lower(): key for key in found if key != features}
    targets = target or next((likely[name] for name in TARGET_NAMES if name in likely), otherwise)
    if features is None or targets is None:
        missing, keys = ("features", FEATURE_KEYS) if features is None else ("targets", TARGET_NAMES)
        raise InputError(f"{path}: no array of {missing}; expected one of {shorten(keys)}, found {shorten(found)}")
    return features, targets


def _check_arrays(path: Path, key_x: str, features: np.ndarray, key_y: str, targets: np.ndarray) -> None:
    if targets.ndim != 1 and targets.shape[1:] != (1,):
        raise InputError(f"{path}: {key_y} has shape {targets.shape}; expected one target per example, shape (N,)")
    if features.ndim not in (1, 2, 3, 4):
        raise InputError(
            f"{path}: {key_x} has shape {features.shape}; expected (N, columns), (N, height, width) or "
            "(N, height, width, channels)"
        )
    if len(features) != len(targets):
        raise InputError(
            f"{path}: {key_x} has {len(features)} examples and {key_y} has {len(targets)}; they must agree"
        )
    if not features.size:
        raise InputError(f"{path}: {key_x} has shape {features.shape}, which holds no values; expected two examples")
    for key, array, kinds in ((key_x, features, "biuf"), (key_y, targets, "biufU")):
        if array.dtype.kind not in kinds:
            expected = "numbers or text" if "U" in kinds else "numbers"
            raise InputError(f"{path}: {key} has type {array.dtype}; expected {expected}")


def _check_lengths(path: Path, key_x: str, sequences: np.ndarray, lengths: np.ndarray) -> None:
    if sequences.ndim != 3:
        raise InputError(
            f"{path}: with lengths the examples are sequences, and {key_x} has shape {sequences.shape}; expected "
            "(N, steps) or (N, steps, numbers)"
        )
    if lengths.shape != (len(sequences),) or lengths.dtype.kind not in "iu":
        raise InputError(
            f"{path}: lengths has shape {lengths.shape} and type {lengths.dtype}; expected a whole number for each "
            f"of the {len(sequences)} examples"
        )
    bad = np.flatnonzero((lengths < 1) | (lengths > sequences.shape[1]))
    if len(bad):
        raise InputError(
            f"{path}: row {bad[0]} has length {lengths[bad[0]]}; a sequence has 1 to {sequences.shape[1]} steps here"
        )


def _channels_last(images: np.ndarray) -> np.ndarray:
    """Images as (N, height, width[, channels]); channels first is recognized by 1, 3 or 4 there and not at the end."""
    if images.ndim == 4 and images.shape[1] in (1, 3, 4) and images.shape[3] not in (1, 3, 4):
        return np.moveaxis(images, 1, 3)
    return images


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
