"""Sources and options that cannot be used: one error each, which says what, where and what to do."""

from __future__ import annotations

import datetime
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from rowgrad.data.readers import read_table
from rowgrad.errors import InputError

MANY_WORDS = "t,label\n" + "".join(f"w{k},{k % 2}\n" for k in range(51))
MANY_STRAYS = "a,label\n" + "1,x\n2,y\n" * 10 + "q,x\n" * 7

# fmt: off
CSV = {
    "only a header":            ("a,label\n", "found no examples; an audit compares examples"),
    "empty":                    ("", "the file is empty"),
    "blank lines":              ("\n\n\n", "the file is empty"),
    "one example":              ("a,label\n1,x\n", "found one example"),
    "a constant target":        ("a,label\n1,x\n2,x\n", "the target 'label' is x for every example"),
    "a constant quantity":      ("a,y\n1,2.5\n2,2.5\n", r"the target 'y' is 2\.5 for every example"),
    "a class with one member":  ("a,label\n1,x\n2,x\n3,y\n", r"class 'y' of 'label' has one member \(line 4\)"),
    "a number with one member": ("a,y\n1,0\n2,0\n3,1\n", "or use --task regression if the target is a quantity"),
    "NaN":                      ("a,label\n1,x\nnan,x\n3,y\nNaN,y\n", "NaN in lines 3 and 5; leave .* --nan missing"),
    "infinity":                 ("a,label\n1,x\n-inf,x\n3,y\n1e999,y\n", "'a' is infinite in lines 3 and 5; mend"),
    "a missing target":         ("a,label\n1,x\n2,\n3,y\n4,NA\n", "the target 'label' is missing in lines 3 and 5"),
    "a NaN target":             ("a,y\n1,.5\n2,nan\n3,.7\n", "the target 'y' is missing in line 3"),
    "an infinite target":       ("a,y\n1,.5\n2,inf\n3,.7\n", "'y' is infinite in line 3; give these examples a target"),
    "stray text":               ("a,label\n1,x\n2,x\n\noops,y\n4,y\n", r"holds text \('oops'\) in line 5"),
    "stray text in the target": ("a,y\n1,.5\n2,.7\n3,.9\n4,x\n", r"text \('x'\) in line 5; mend .* --task"),
    "much stray text":          (MANY_STRAYS, "lines 22, 23, 24, 25, 26 and 2 more"),
    "text of many values":      (MANY_WORDS, r"51 distinct values; .* --drop t"),
    "two columns of one name":  ("a,a,label\n1,1,x\n", "the column name 'a' occurs 2 times"),
    "two columns without name": (",,label\n1,1,x\n", "columns 1 and 2 have no name"),
    "a long record":            ("a,label\n1,x\n\n1,x,3\n", "line 4 has 3 values where the header names 2 columns"),
    "a short record":           ("a,b,label\n1,2,x\n1,x\n", "line 3 has 2 values where the header names 3"),
    "an open quote":            ('a,label\n1,"x\n', "line 2 is not valid CSV"),
    "no feature":               ("label\nx\ny\nx\ny\n", "no column is left beside the target 'label'"),
    "constant features":        ("k,e,label\n3,,x\n3,,y\n3,,x\n3,,y\n", r"k \(constant\) and e \(no values\)"),
    "no target":                ("a,b\n1,2\n3,4\n", "none is called y, .*; say --target with one of a, b"),
    "two targets":              ("a,label,class\n1,x,u\n2,y,v\n", "2 are called like one"),
    "too large to standardize": ("a,label\n1e200,x\n1,y\n2,x\n3,y\n", "'a' holds values beyond 1e150"),
}
# fmt: on


@pytest.mark.parametrize("case", CSV)
def test_csv(tmp_path: Path, case: str) -> None:
    text, message = CSV[case]
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        read_table(path)
    assert "\n" not in str(error.value)
    assert "t.csv" in str(error.value)


def test_csv_of_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"a,label\n" + b"1,x\n" * 5000 + b"2,\xff\n")
    with pytest.raises(InputError, match="line 5002 is not UTF-8"):
        read_table(path)


def _text_target(path: Path) -> None:
    pl.DataFrame({"a": [1, 2, 3], "y": ["u", "v", "w"]}).write_parquet(path)


def _dates(path: Path) -> None:
    pl.DataFrame({"a": [datetime.date(2020, 1, 1)] * 4, "y": [0, 0, 1, 1]}).write_parquet(path)


def _null_target(path: Path) -> None:
    pl.DataFrame({"a": [1.5, 2, 3], "y": [0.5, None, 0.25]}).write_parquet(path)


def _junk(path: Path) -> None:
    path.write_bytes(b"PAR1 and then nothing of the kind PAR1")


def _pickled(path: Path) -> None:
    np.savez(path, X=np.array([{1: 2}, {}], dtype=object), y=np.arange(2))


def _bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps([1, 2, 3]))


def _arrays(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


def _truncated(path: Path) -> None:
    np.savez(path, X=np.zeros((50, 2)), y=np.arange(50))
    path.write_bytes(path.read_bytes()[:300])


def _damaged(path: Path) -> None:
    np.savez(path, X=np.zeros((50, 2)), y=np.arange(50))
    data = bytearray(path.read_bytes())
    data[200:260] = b"?" * 60
    path.write_bytes(bytes(data))


TWO = np.array([0, 0, 1, 1])
HOLE = np.array([[1.0, 2], [np.nan, 3], [2, 2], [1, 1]])
# fmt: off
FILES = {
    "t.parquet": {
        "junk":              (_junk, {}, "not a readable Parquet file"),
        "dates":             (_dates, {}, "column 'a' holds Date; make it numbers or text, or use --drop a"),
        "a missing target":  (_null_target, {}, "the target 'y' is missing in row 1"),
        "text as quantity":  (_text_target, {"task": "regression"}, r"holds text \('u'\), not a quantity"),
    },
    "t.npz": {
        "junk":              (_junk, {}, "not an NPZ file"),
        "a pickle":          (_bare_pickle, {}, "not an NPZ file"),
        "pickled objects":   (_pickled, {}, "pickled objects, which are never loaded"),
        "cut short":         (_truncated, {}, "not an NPZ file"),
        "damaged":           (_damaged, {}, "not a readable NPZ file"),
        "no features":       (_arrays(foo=TWO), {}, "no array of features; expected one of X, .* found foo"),
        "no targets":        (_arrays(X=TWO), {}, "no array of targets; expected one of y, .* found X"),
        "an unknown target": (_arrays(X=TWO, y=TWO), {"target": "z"}, "no array is called 'z'; found X, y"),
        "two lengths":       (_arrays(X=TWO, y=np.arange(5)), {}, "X has 4 examples and y has 5"),
        "five dimensions":   (_arrays(X=np.zeros((4, 1, 1, 1, 1)), y=TWO), {}, r"X has shape \(4, 1, 1, 1, 1\)"),
        "no values":         (_arrays(X=np.zeros((0, 3)), y=np.zeros(0)), {}, "which holds no values"),
        "two targets each":  (_arrays(X=TWO, y=np.zeros((4, 2))), {}, r"y has shape \(4, 2\)"),
        "complex numbers":   (_arrays(X=TWO * 1j, y=TWO), {}, "X has type complex128"),
        "NaN":               (_arrays(X=HOLE, y=TWO), {}, r"column 'X\[0\]' is NaN in row 1"),
        "NaN in images":     (_arrays(X=HOLE.reshape(4, 2, 1), y=TWO), {}, "the images in row 1 hold NaN"),
    },
}
# fmt: on


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in FILES.items() for case in cases])
def test_other_files(tmp_path: Path, name: str, case: str) -> None:
    write, options, message = FILES[name][case]
    write(tmp_path / name)
    with pytest.raises(InputError, match=message) as error:
        read_table(tmp_path / name, **options)
    assert "\n" not in str(error.value)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nosuch\.csv: no such file, and not a bundled set \(digits, "):
        read_table("nosuch.csv")
    with pytest.raises(InputError, match=r"is a directory; give one file \(\.csv, "):
        read_table(tmp_path)
    (tmp_path / "t.xlsx").write_bytes(b"x")
    with pytest.raises(InputError, match=r"cannot read \.xlsx; give \.csv"):
        read_table(tmp_path / "t.xlsx")
    (tmp_path / "plain").write_bytes(b"x")
    with pytest.raises(InputError, match="cannot read a file without an extension"):
        read_table(tmp_path / "plain")


# fmt: off
OPTIONS = {
    "a target of a bundled set": ({"target": "x"}, "iris brings its own target"),
    "an unknown column to drop": ({"drop": ["x"]}, "--drop x: no such column; found sepal length"),
    "an unknown category":       ({"categorical": ["x"]}, "--categorical x: no such column"),
    "the target dropped":        ({"drop": ["species"]}, "--drop species: this column is the target"),
}
# fmt: on


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str) -> None:
    options, message = OPTIONS[case]
    with pytest.raises(InputError, match=message):
        read_table("iris", **options)


def test_an_unknown_target(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3,4\n")
    with pytest.raises(InputError, match="no column is called 'z'; found a, b"):
        read_table(tmp_path / "t.csv", target="z")
