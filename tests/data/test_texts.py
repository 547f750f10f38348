"""Texts as bags of words: which columns they are, the numbers they become, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from rowgrad.data import texts
from rowgrad.data.columns import Column
from rowgrad.data.preparation import prepare
from rowgrad.data.readers import read_table
from rowgrad.data.table import Table, standardize
from rowgrad.errors import InputError

THINGS = ("the cat", "a big dog", "this house", "some green trees", "old wine")
DEEDS = ("sat down quietly", "was seen again and again", "fell over", "costs nothing", "cannot be told from the rest")


def remark(k: int) -> str:
    """One of 25 sentences, with a number of its own."""
    return f"Note {k}: {THINGS[k % 5]} {DEEDS[k // 5 % 5]}."


def write(path: Path, columns: dict[str, list[str]]) -> Path:
    n = len(next(iter(columns.values())))
    pl.DataFrame(columns | {"label": ["yes", "no"] * (n // 2)}).write_csv(path)
    return path


def read(folder: Path, columns: dict[str, list[str]], **options) -> Table:
    return read_table(write(folder / "t.csv", columns), **options)


# fmt: off
KINDS = {
    "sentences":                         ([remark(k) for k in range(60)], "bag"),
    "few sentences, all different":      ([remark(k) for k in range(20)], "bag"),
    "few sentences, again and again":    ([remark(k % 4) for k in range(60)], "one-hot"),
    "sentences and as many words":       ([remark(k) if k % 2 else f"w{k}" for k in range(60)], "refused"),
    "more sentences than words":         ([f"w{k}" if k % 3 == 0 else remark(k) for k in range(60)], "bag"),
    "sentences where there is anything": ([remark(k) if k % 4 == 0 else "" for k in range(400)], "bag"),
    "names of two words":                ([f"Anna{k} Berg{k}" for k in range(60)], "refused"),
    "single words":                      ([f"w{k}" for k in range(60)], "refused"),
    "few words, all different":          ([f"w{k}" for k in range(20)], "one-hot"),
    "moments":                           ([f"2026-01-02 10:{k} 17 09" for k in range(60)], "refused"),
    "another script":                    ([f"это пример номер {k}" for k in range(60)], "bag"),
}
# fmt: on


@pytest.mark.parametrize("case", KINDS)
def test_what_a_column_of_text_becomes(tmp_path: Path, case: str) -> None:
    values, kind = KINDS[case]
    if kind == "refused":
        with pytest.raises(InputError, match=r"leave it out with --drop t, or count its words with --text t"):
            read(tmp_path, {"t": values})
        return
    table = read(tmp_path, {"t": values})
    assert table.texts == (("t",) if kind == "bag" else ())
    said = "Text columns became bags of words: t (" if kind == "bag" else "Text columns were one-hot encoded: t ("
    assert any(note.startswith(said) for note in table.notes)


def test_the_numbers_are_scikit_learns(tmp_path: Path) -> None:
    values = [remark(k) + " Again: again." * (k % 3) for k in range(60)]
    table = read(tmp_path, {"body": values, "size": [str(k * k) for k in range(60)]})
    (column, _) = table.columns
    assert column.words is not None
    reference = TfidfVectorizer(min_df=texts.LEAST_TEXTS, sublinear_tf=True)
    expected = reference.fit_transform(values).toarray()
    assert column.words == tuple(reference.get_feature_names_out())
    np.testing.assert_allclose(table.features[:, :-1].numpy(), expected, rtol=1e-6)
    assert table.feature_names == (*(f"body: {word}" for word in column.words), "size")
    assert table.features[:, -1].tolist() == [k * k for k in range(60)]
    assert f"Text columns became bags of words: body ({len(column.words)} words)." in table.notes


def test_texts_alone_take_half_the_memory(tmp_path: Path) -> None:
    values = [remark(k) for k in range(60)]
    assert read(tmp_path, {"body": values}).features.dtype == torch.float32
    assert read(tmp_path, {"body": values, "age": [str(k % 7) for k in range(60)]}).features.dtype == torch.float64


def test_a_column_can_be_named(tmp_path: Path) -> None:
    values = [f"Anna{k % 9} Berg{k}" for k in range(60)]
    table = read(tmp_path, {"name": values, "b": ["new car", "old car"] * 30}, text=["name", "b"])
    assert table.texts == ("name", "b")
    assert table.columns[0].words == tuple(f"anna{k}" for k in range(9))
    assert table.columns[1].words == ("car", "new", "old")


def test_texts_that_are_missing_or_hold_no_word_that_counts_are_told(tmp_path: Path) -> None:
    values = [remark(k) for k in range(57)] + ["", "NA", "Entirely unheard of"]
    table = read(tmp_path, {"body": values})
    assert (table.features[-3:] == 0).all()
    assert any(note.endswith(" words; 3 examples have none of them).") for note in table.notes)


def test_the_words_that_most_texts_hold_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [f"often here{' then' * (k % 2)}{' rare rare rare' * (k % 9 == 0)} number {k}" for k in range(60)]
    monkeypatch.setattr(texts, "MAX_WORDS", 4)
    table = read(tmp_path, {"body": values})
    assert table.columns[0].words == ("here", "number", "often", "then")
    assert "Text columns became bags of words: body (4 of 5 words)." in table.notes
    monkeypatch.setattr(texts, "LEAST_ROOM", 2)
    monkeypatch.setattr(texts, "MAX_ENTRIES", 60 * 6)  # room for three words of each of two columns
    table = read(tmp_path, {"body": values, "title": values})
    assert [column.words for column in table.columns] == [("here", "number", "often")] * 2


def test_other_texts_are_read_alike(tmp_path: Path) -> None:
    values = [remark(k) for k in range(60)]
    table = read(tmp_path, {"body": values, "size": [str(k % 7) for k in range(60)]})
    new = pl.DataFrame(
        {"other": ["x"] * 4, "size": range(4), "body": [values[7], "Zeppelins rust", None, "zzz CAT zzz"]}
    )
    new.write_parquet(tmp_path / "new.parquet")
    found = read_table(tmp_path / "new.parquet", like=table.columns, needs_target=False)
    assert found.feature_names == table.feature_names
    assert torch.equal(found.features[0, :-1], table.features[7, :-1])
    assert (found.features[1:3, :-1] == 0).all()
    assert found.features[3, table.feature_names.index("body: cat")] == 1
    assert found.features[3, :-1].sum() == 1


def test_the_words_of_a_column_have_one_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(50, 5, generator=generator, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 5, 1])
    features[:, 3] = 2  # no training text lacks it
    table = Table("t", features, tuple("abcde"), torch.zeros(50), "y", None, "row", np.arange(50))
    columns = (Column("a"), Column("t", words=("b", "c", "d"), weights=(1.0, 1.0, 1.0)), Column("e"))
    spans = Table(**(vars(table) | {"columns": columns})).spans
    assert spans == (slice(1, 4),)
    rows = torch.arange(30)
    alone, _, _ = standardize(features, rows)
    found, means, deviations = standardize(features, rows, block=2, spans=spans)
    assert torch.equal(found[:, [0, 4]], alone[:, [0, 4]])
    assert (found[:, 3] == 0).all()
    within = features[rows, 1:4]
    common = (within - within.mean(0)).square().mean().sqrt()
    torch.testing.assert_close(found[:, 1:3].double(), (features[:, 1:3] - means[1:3]) / common, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(deviations[1:4], common.expand(3))
    torch.testing.assert_close(prepare(features[rows], spans=spans)(features), found, rtol=1e-5, atol=1e-6)


# fmt: off
SENTENCES = [remark(k) for k in range(60)]
OPTIONS = {
    "an unknown column":   ({"text": ["x"]}, "--text x: no such column; found t, n, label"),
    "the target":          ({"text": ["label"]}, "--text label: this column is the target"),
    "a category, too":     ({"text": ["t"], "categorical": ["t"]}, "--text t: --categorical names it too"),
    "numbers":             ({"text": ["n"]}, "--text n: the column holds Int64, not text"),
    "a category":          ({"categorical": ["t"]}, "text column 't' has 60 distinct values; at most 50 are one-hot"),
}
# fmt: on


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be(tmp_path: Path, case: str) -> None:
    options, message = OPTIONS[case]
    frame = pl.DataFrame({"t": SENTENCES, "n": range(60), "label": ["x", "y"] * 30})
    frame.write_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "t.parquet", **options)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            [f"a{k} b{k} c{k}" for k in range(60)],
            "no word of text column 't' occurs in three examples; leave .* --drop t",
        ),
        (["! ! !" if k % 2 else "- - -" for k in range(60)], "no word of text column 't' occurs in three examples"),
    ],
)
def test_texts_without_words(tmp_path: Path, values: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(tmp_path, {"t": values}, text=["t"])


def test_too_many_examples_for_bags_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = read(tmp_path, {"t": SENTENCES})
    monkeypatch.setattr(texts, "MAX_ENTRIES", 60 * 99)
    with pytest.raises(InputError, match=r"60 examples leave memory for 99 words of text column 't', .* --drop t"):
        read(tmp_path, {"t": SENTENCES})
    monkeypatch.setattr(texts, "MAX_ENTRIES", 60 * table.columns[0].width - 1)
    with pytest.raises(InputError, match=r"60 examples of \d\d words of 't' take too much memory; split the file"):
        read(tmp_path, {"t": SENTENCES}, like=table.columns)
