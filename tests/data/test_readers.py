"""From files and names to tables: what is decided, and that it is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from rowgrad.data.bundled import BUNDLED
from rowgrad.data.raw import TARGET_NAMES
from rowgrad.data.readers import read_table

PEOPLE = """id,color,age,income,city,flat,label
1,red,31,1000,Oslo,7,yes
2,blue,,1200,Bergen,7,no
3,red,45.5,NA,,7,yes
4,green,50,900,Oslo,7,no
"""


def _write(folder: Path, text: str | bytes, name: str = "people.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def _column(table, name: str) -> list[float]:
    return table.features[:, table.feature_names.index(name)].tolist()


@pytest.mark.parametrize(
    ("name", "shape", "n_classes"),
    [
        ("digits", (1797, 64), 10),
        ("breast_cancer", (569, 30), 2),
        ("wine", (178, 13), 3),
        ("iris", (150, 4), 3),
        ("diabetes", (442, 10), None),
    ],
)
def test_bundled_sets(name: str, shape: tuple[int, int], n_classes: int | None) -> None:
    table = read_table(name)
    data, target = BUNDLED[name](return_X_y=True)
    assert table.features.shape == shape
    assert table.features.double().numpy() == pytest.approx(data)
    if n_classes is None:
        assert table.classes is None
        assert table.targets.numpy() == pytest.approx(target)
    else:
        assert len(table.classes) == n_classes
        names = getattr(BUNDLED[name](), "target_names", None)
        assert [table.classes[k] for k in table.targets] == [str(names[k]) for k in target]
    assert (table.images is not None) is (name == "digits")


def test_a_csv_with_text_missing_and_useless_columns(tmp_path: Path) -> None:
    table = read_table(_write(tmp_path, PEOPLE))
    assert table.feature_names == (
        *("color = blue", "color = green", "color = red"),
        *("age", "age is missing"),
        *("income", "income is missing"),
        *("city = (missing)", "city = Bergen", "city = Oslo"),
    )
    assert _column(table, "color = red") == [1, 0, 1, 0]
    assert _column(table, "age") == [31, 45.5, 45.5, 50]  # the median of 31, 45.5 and 50
    assert _column(table, "age is missing") == [0, 1, 0, 0]
    assert _column(table, "income") == [1000, 1200, 1000, 900]
    assert _column(table, "city = (missing)") == [0, 0, 1, 0]
    assert table.classes == ("no", "yes")
    assert table.targets.tolist() == [1, 0, 1, 0]
    assert table.notes == (
        "Classification by label, 2 classes: it holds text.",
        "Text columns were one-hot encoded: color (3 values) and city (3 values).",
        (
            "Missing numbers were replaced by the median of their column and marked in a column of their own: "
            "age (1) and income (1)."
        ),
        "Columns were left out: id (numbers the rows) and flat (constant).",
    )
    assert table.frame.columns == ["id", "color", "age", "income", "city", "flat"]
    assert table.place == "line"
    assert table.numbers.tolist() == [2, 3, 4, 5]


def test_line_numbers_survive_blank_lines_and_quoted_breaks(tmp_path: Path) -> None:
    text = 'a,"note",label\n\n1,"two\nlines",x\n2,one,y\n\n3,one,x\n4,"two\nlines",y\n'
    table = read_table(_write(tmp_path, text))
    assert table.numbers.tolist() == [4, 5, 7, 9]  # the line on which a record ends
    assert table.frame["note"].to_list() == ["two\nlines", "one", "one", "two\nlines"]


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_separators_are_recognized_and_said(tmp_path: Path, separator: str, name: str) -> None:
    table = read_table(_write(tmp_path, PEOPLE.replace(",", separator)))
    assert f"The columns are separated by {name}." in table.notes
    assert _column(table, "age") == [31, 45.5, 45.5, 50]


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    plain = read_table(_write(tmp_path, PEOPLE))
    other = read_table(_write(tmp_path, b"\xef\xbb\xbf" + PEOPLE.replace("\n", "\r\n").encode(), "windows.csv"))
    assert other.feature_names == plain.feature_names
    assert torch.equal(other.features, plain.features)
    assert other.numbers.tolist() == plain.numbers.tolist()


def test_an_unnamed_first_column_that_numbers_the_rows_is_left_out(tmp_path: Path) -> None:
    table = read_table(_write(tmp_path, ",a,label\n0,1,x\n1,5,y\n2,2,x\n3,7,y\n"))
    assert table.feature_names == ("a",)
    assert "Columns were left out: unnamed (numbers the rows)." in table.notes


@pytest.mark.parametrize(
    ("values", "task", "classes"),
    [
        (["b", "a", "b", "a"], None, ("a", "b")),
        (["2", "10", "2", "10"], None, ("2", "10")),
        (["2.0", "10.0", "2.0", "10.0"], None, ("2", "10")),
        (["0.5", "1.5", "0.5", "1.5"], None, None),
        (["0.5", "1.5", "0.5", "1.5"], "classification", ("0.5", "1.5")),
        (["2", "10", "2", "10"], "regression", None),
        (["1", "1", "x", "x"], None, ("1", "x")),
        (["1", "1", "1", "1", "1", "x", "x"], "classification", ("1", "x")),
    ],
)
def test_what_a_target_is_taken_for(
    tmp_path: Path, values: list[str], task: str | None, classes: tuple[str, ...] | None
) -> None:
    rows = "".join(f"{k * k},{value}\n" for k, value in enumerate(values))
    table = read_table(_write(tmp_path, "a,label\n" + rows), task=task)
    assert table.classes == classes
    if classes is None:
        assert table.targets.tolist() == [float(value) for value in values]
    else:
        assert len(set(table.targets.tolist())) == 2


def test_many_whole_numbers_are_a_quantity(tmp_path: Path) -> None:
    rows = "".join(f"{k * k},{k % 51}\n" for k in range(102))
    assert read_table(_write(tmp_path, "a,y\n" + rows)).task == "regression"
    assert read_table(_write(tmp_path, "a,y\n" + rows.replace(",50\n", ",0\n"))).task == "classification"


def test_options_for_columns(tmp_path: Path) -> None:
    path = _write(tmp_path, "code,a,w,out\n5,1,x,1.5\n9,2,y,2.5\n5,3,z,0.5\n")
    table = read_table(path, target="out", drop=["w"], categorical=["code"])
    assert table.feature_names == ("code = 5", "code = 9", "a")
    assert table.target_name == "out"


def test_nan_may_count_as_missing(tmp_path: Path) -> None:
    table = read_table(_write(tmp_path, "a,label\n1,x\nnan,y\n3,x\n9,y\n"), nan="missing")
    assert _column(table, "a") == [1, 3, 3, 9]
    assert _column(table, "a is missing") == [0, 1, 0, 0]


def test_parquet_types(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "whole": [1, 2, None, 4],
            "flag": [True, False, True, True],
            "kind": pl.Series(["u", "v", "u", None], dtype=pl.Categorical),
            "target": [True, False, True, False],
        }
    )
    frame.write_parquet(tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet")
    assert table.classes == ("false", "true")
    assert table.targets.tolist() == [1, 0, 1, 0]
    assert _column(table, "whole") == [1, 2, 2, 4]
    assert _column(table, "flag") == [1, 0, 1, 1]
    assert _column(table, "kind = (missing)") == [0, 0, 0, 1]
    assert table.place == "row"


@pytest.mark.parametrize(
    ("shape", "displayed"),
    [
        ((6, 5, 4), (6, 5, 4)),
        ((6, 5, 4, 1), (6, 5, 4)),
        ((6, 5, 4, 3), (6, 5, 4, 3)),
        ((6, 3, 5, 7), (6, 5, 7, 3)),
    ],
)
def test_images_in_npz(tmp_path: Path, shape: tuple[int, ...], displayed: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.savez(tmp_path / "images.npz", images=images, label=np.array(["a", "b"] * 3))
    table = read_table(tmp_path / "images.npz")
    assert table.images.shape == displayed
    assert table.images.dtype == np.uint8
    assert (table.images.min(), table.images.max()) == (0, 255)
    assert table.features.shape == (6, np.prod(shape[1:]))
    assert sorted(table.features[0].tolist()) == pytest.approx(sorted(images[0].ravel().tolist()))
    assert table.classes == ("a", "b")


def test_a_matrix_in_npz(tmp_path: Path) -> None:
    features = np.arange(12).reshape(6, 2) ** 2
    np.savez(tmp_path / "m.npz", X=features, y=np.linspace(0, 1, 6)[:, None], other=np.zeros(3))
    table = read_table(tmp_path / "m.npz")
    assert table.task == "regression"
    assert table.features.tolist() == features.tolist()
    assert table.feature_names == ("X[0]", "X[1]")
    assert read_table(tmp_path / "m.npz", target="y").target_name == "y"


@pytest.mark.parametrize("name", [*TARGET_NAMES, "Y", "Labels"])
def test_a_target_goes_by_the_same_names_in_every_file(tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / "t.npz", **{"X": np.arange(8).reshape(4, 2), name: np.array([0, 0, 1, 1])})
    _write(tmp_path, f"a,{name}\n1,0\n2,0\n3,1\n4,1\n", "t.csv")
    for path in (tmp_path / "t.npz", tmp_path / "t.csv"):
        assert read_table(path).target_name == name
        assert name not in read_table(path, needs_target=False).feature_names


def test_a_large_file_is_read_in_pieces(tmp_path: Path) -> None:
    n = 45_000  # more than two pieces
    lines = "".join(f"{k % 7},w{k % 3},{k % 2}\n" for k in range(n))
    table = read_table(_write(tmp_path, "a,b,label\n" + lines))
    assert len(table) == n
    assert table.numbers[-1] == n + 1
    assert _column(table, "a") == [k % 7 for k in range(n)]
