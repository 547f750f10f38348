"""The page of an audit in a loop of one's own: pictures, sections, and what stands in them."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import rowgrad as rg
from rowgrad.errors import InputError
from rowgrad.uses import sections
from rowgrad.uses.gallery import MAX_SIDE, VALUE_LETTERS, picture
from rowgrad.uses.sections import MOST_CLASSES, class_conflict

N, K = 12, 3


class Reader(HTMLParser):
    """The headings, and whether every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in {"meta", "link", "img", "circle", "line", "polyline"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"circle", "line", "polyline"}:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader


def audited(n_classes: int | None = K, n_visits: int = 4, *, norms: bool = True, calibrate: float = 0.0) -> rg.Audit:
    """Of N examples, the last never seen; examples 0 and 1 have the label that the logits speak against."""
    audit = rg.Audit(N, n_classes, calibrate=calibrate)
    index, generator = torch.arange(N - 1), torch.Generator().manual_seed(0)
    labels = index % K
    given = audit.plant(index, labels)
    for _ in range(n_visits):
        logits = torch.eye(K)[labels] * 3 + 0.5 * torch.rand(N - 1, K, generator=generator)
        logits[:2] = logits[:2].roll(1, 1)
        losses = torch.nn.functional.cross_entropy(logits, given, reduction="none")
        with_labels = {} if n_classes is None else {"logits": logits, "labels": given}
        audit.update(index, losses=losses, norms=losses + 0.1 if norms else None, **with_labels)
    return audit


def decoded(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,")))))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_bytes_are_shown_as_they_are(shape: tuple[int, ...]) -> None:
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(decoded(picture(pixels)), pixels.numpy())
    if len(shape) == 3:
        assert np.array_equal(decoded(picture(pixels.permute(2, 0, 1))), pixels.numpy())


def test_other_numbers_are_stretched_and_odd_channels_left_out() -> None:
    values = torch.tensor([[-1.0, 0.0], [1.0, 3.0]])
    assert decoded(picture(values)).tolist() == [[0, 64], [128, 255]]
    assert decoded(picture(torch.stack([values, values * 0]))).tolist() == [[0, 64], [128, 255]]
    assert decoded(picture(torch.full((2, 2), 7.0))).tolist() == [[0, 0], [0, 0]]


def test_large_pictures_are_reduced() -> None:
    assert decoded(picture(torch.rand(400, 200))).shape == (MAX_SIDE, MAX_SIDE // 2)


def test_the_conflict_of_classes_is_the_mean_over_pairs() -> None:
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0, 1, 0])
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
    cosines[3] = cosines[:, 3] = torch.nan  # a gradient of 0
    found = class_conflict(cosines, labels, 4)
    for a in range(4):
        for b in range(4):
            pairs = [
                cosines[i, j]
                for i in range(9)
                for j in range(9)
                if i != j and 3 not in (i, j) and (int(labels[i]), int(labels[j])) == (a, b)
            ]
            expected = torch.stack(pairs).mean() if pairs else torch.tensor(torch.nan, dtype=torch.float64)
            torch.testing.assert_close(found[a, b], expected, equal_nan=True)
    assert found[2, 2].isnan()  # one example: no pair
    with pytest.raises(InputError, match=r"cosines have shape \(9, 9\); expected 4 by 4"):
        class_conflict(cosines, labels[:4], 4)


def test_the_page_has_its_sections(tmp_path: Path) -> None:
    path, audit = tmp_path / "audit.html", audited()
    audit.report(
        path, title="A <set>", classes=["a", "<b>", "c"], conflict=torch.eye(K) - 0.5, further={"Mine": "<i>x</i>"}
    )
    assert read(path).headings == [
        "In short",
        "Suspects",
        "Data map",
        "Ranked gradient norms",
        "Flagged: given label by suggested label",
        "Classes that pull against each other",
        "Mine",
        "How far to trust this",
    ]
    page = path.read_text(encoding="utf-8")
    assert "11 of 12 examples were seen" in page
    assert "<b>2</b><span>likely mislabelled: " in page
    assert "<b>1</b><span>never seen" in page
    assert 'given <b>a</b>, suggested <span class="new">&lt;b&gt;</span>' in page
    assert "A &lt;set&gt;" in page
    assert "<set>" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert not list(tmp_path.glob("*.tmp*"))


def test_the_charts_show_every_example_that_was_seen() -> None:
    scores = audited().compute()
    legend, drawn = sections.data_map(scores).split("</ul>")
    assert re.findall(r'class="(\w+)"[^<]*/></svg>([\w ]+)</li>', legend) == [
        ("usual", "other examples"),
        ("doubted", "likely mislabelled"),
    ]
    assert drawn.count('class="usual"') == N - 3
    assert drawn.count('class="doubted"') == 2
    legend, drawn = sections.ranked_norms(scores).split("</ul>")
    assert "likely mislabelled" in legend
    assert drawn.count('class="doubted"') == 2
    table = sections.given_by_suggested(scores)
    assert re.findall(r">(\d+)</td>", table) == ["1", "1"]


def test_labels_flipped_to_calibrate_have_a_mark_of_their_own() -> None:
    scores = audited(calibrate=0.3).compute()
    assert scores.planted is not None
    n_flipped = int(scores.planted.sum())
    for chart in (sections.data_map(scores), sections.ranked_norms(scores)):
        legend, drawn = chart.split("</ul>")
        assert "label flipped to calibrate" in legend
        assert drawn.count('class="changed"') == n_flipped > 0
    assert sections.data_map(scores).split("</ul>")[1].count('class="usual"') == int(
        (~scores.planted & ~scores.flagged & (scores.times_seen > 0)).sum()
    )


def test_a_chart_of_one_kind_of_examples_has_no_legend() -> None:
    scores = audited(None).compute()
    assert "<ul" not in sections.ranked_norms(scores)
    legend, drawn = sections.ranked_norms(scores, planted=torch.arange(N) < 4).split("</ul>")
    assert "planted error" in legend
    assert drawn.count('class="doubted"') == 4


@pytest.mark.parametrize("norms", [True, False])
def test_quantities_are_not_spoken_of_as_labels(norms: bool) -> None:
    told = re.sub("<[^>]*>", " ", sections.summary(audited(None, norms=norms).compute()))
    assert re.search("label|learned|forgotten", told) is None
    assert "redundant: fitted with hardly any " + ("pull on the weights" if norms else "loss") in told
    assert "hard: the loss is far above that of the others" in told


def test_conflicts_are_shaded_by_the_largest_between_two_classes() -> None:
    shown = sections.conflict_matrix(torch.tensor([[0.6, -0.09, 0.0], [-0.09, 0.5, 0.04], [-0.001, 0.04, 0.4]]))
    shares = [int(share) for share in re.findall(r"(\d+)%, transparent", shown)]
    assert shares[1] == shares[3] == 65
    assert shares[5] == shares[7] == 29
    assert re.findall(r'">([^<]*)</td>', shown) == [
        *("+0.60", "-0.09", "0.00"),
        *("-0.09", "+0.50", "+0.04"),
        *("0.00", "+0.04", "+0.40"),
    ]


def test_names_that_differ_in_the_middle_alone_are_numbered() -> None:
    names = [f"a long common prefix {k} of all the names" for k in range(3)]
    shown = sections.conflict_matrix(torch.eye(3), names)
    heads = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', shown)
    assert [head[:3] for head in heads] == ["0: ", "1: ", "2: "]
    assert len(set(heads)) == 3
    assert f"<li>2: {names[2]}</li>" in shown
    assert "<li>" not in sections.conflict_matrix(torch.eye(3), ["a", "b" * 40, "c" * 40])


def test_of_many_classes_the_largest_entries_are_kept() -> None:
    n = MOST_CLASSES + 5
    conflict = torch.zeros(n, n)
    conflict[3, n - 1] = -0.9
    shown = sections.conflict_matrix(conflict)
    assert "5 more classes" in shown
    assert shown.count("<tr>") == MOST_CLASSES + 1
    assert "-0.90" in shown


def test_quantities_have_no_section_of_labels(tmp_path: Path) -> None:
    audited(None).report(tmp_path / "audit.html")
    assert read(tmp_path / "audit.html").headings == [
        "In short",
        "Suspects",
        "Ranked gradient norms",
        "How far to trust this",
    ]


def test_an_audit_of_nothing_has_a_page(tmp_path: Path) -> None:
    rg.Audit(3, 2).report(tmp_path / "audit.html")
    assert "0 of 3 examples were seen" in (tmp_path / "audit.html").read_text(encoding="utf-8")
    read(tmp_path / "audit.html")


@pytest.mark.parametrize(
    ("examples", "shown"),
    [
        (["a <b> text"] * N, "a &lt;b&gt; text"),
        (["long " * 200] * N, "…"),
        ([{"height & width": 1.5}] * N, "<dt>height &amp; width</dt><dd>1.5</dd>"),
        ([{"third": torch.tensor(1 / 3), "none": None}] * N, "<dd>0.333333</dd><dt>none</dt><dd>(missing)</dd>"),
        ([{"several": np.arange(3), "as a tensor": torch.arange(2)}] * N, "<dd>[0 1 2]</dd>"),
        ([{"long": "x" * 500}] * N, f"<dd>{'x' * (VALUE_LETTERS - 1)}…</dd>"),
        (torch.rand(N, 4, 4), 'alt="image of example 0"'),
        (np.zeros((N, 4, 4, 3), np.uint8), "data:image/png"),
        (np.full((N, 4, 4), np.nan), "data:image/png"),
        ([Image.new("L", (5, 4), 7)] * N, "data:image/png"),
        ([Image.new("RGB", (5, 4)).convert("P")] * N, "data:image/png"),
        (TensorDataset(torch.rand(N, 1, 4, 4), torch.arange(N)), "data:image/png"),
        (rg.Indexed([("the text", 3)] * N), '<p class="text">the text</p>'),
        (pd.Series([f"text {k}" for k in range(N)], index=range(50, 50 + N)), '<p class="text">text 0</p>'),
        (pd.DataFrame({"size": np.arange(N) / 3}, index=range(50, 50 + N)), "<dt>size</dt><dd>0.333333</dd>"),
        (pl.DataFrame({"size": np.arange(N) / 3}), "<dt>size</dt><dd>0.333333</dd>"),
        (pl.Series([f"text {k}" for k in range(N)]), '<p class="text">text 0</p>'),
    ],
    ids=[
        *(
            "text",
            "long text",
            "values",
            "odd values",
            "vectors",
            "long value",
            "tensor",
            "array",
            "nan",
            "Pillow",
            "palette",
        ),
        *("TensorDataset", "Indexed", "pandas series", "pandas rows", "polars rows", "polars series"),
    ],
)
def test_examples_are_shown(examples: object, shown: str, tmp_path: Path) -> None:
    audited().report(tmp_path / "audit.html", examples=examples)
    read(tmp_path / "audit.html")
    assert shown in (tmp_path / "audit.html").read_text(encoding="utf-8")


def test_a_palette_is_shown_by_its_colors(tmp_path: Path) -> None:
    audited().report(tmp_path / "audit.html", examples=[Image.new("RGB", (6, 5), (250, 10, 20)).convert("P")] * N)
    address = re.search(r'src="(data:image/png[^"]*)"', (tmp_path / "audit.html").read_text(encoding="utf-8"))
    assert address is not None
    red, green, blue = decoded(address[1])[0, 0]
    assert red > 200 > 60 > max(green, blue)


# fmt: off
UNSHOWN = {
    "vectors":     ({"examples": torch.rand(N, 4)}, r"example \d has shape \(4,\) and torch.float32; the page shows"),
    "no pixels":   ({"examples": torch.rand(N, 0, 5)}, r"example \d has shape \(0, 5\)"),
    "complex":     ({"examples": torch.rand(N, 4, 4).cfloat()}, r"example \d has shape \(4, 4\) and torch.complex64"),
    "numbers":     ({"examples": list(range(N))}, r"example \d has shape \(\)"),
    "nothing":     ({"examples": [None] * N}, r"example \d is a NoneType; the page shows pictures"),
    "objects":     ({"examples": [object()] * N}, r"example \d is a object; the page shows pictures"),
    "bytes":       ({"examples": [b"abc"] * N}, r"example \d "),
    "too few":     ({"examples": ["a"] * 3}, "examples holds 3, the audit 12; pass all that the audit's"),
    "a function":  ({"examples": lambda k: "a"}, "examples is a function; expected what gives an example by"),
    "a generator": ({"examples": ("a" for _ in range(N))}, "examples is a generator; expected what gives"),
    "few classes": ({"classes": ["a", "b"]}, "classes names 2 labels, the audit has 3; name each"),
    "conflict":    ({"conflict": np.eye(2)}, r"conflict has shape \(2, 2\); expected \(3, 3\), a cosine for each pair"),
}
# fmt: on


@pytest.mark.parametrize("case", UNSHOWN)
def test_what_cannot_be_shown_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    arguments, message = UNSHOWN[case]
    with pytest.raises(InputError, match=message):
        audited().report(tmp_path / "audit.html", **arguments)
    assert not list(tmp_path.iterdir())


def test_an_array_of_conflicts_will_do(tmp_path: Path) -> None:
    audited().report(tmp_path / "audit.html", conflict=np.eye(K) - 0.5)
    assert "Classes that pull against each other" in read(tmp_path / "audit.html").headings


def test_of_quantities_there_are_no_classes_to_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="classes names 3 labels, the audit has none"):
        audited(None).report(tmp_path / "audit.html", classes=["a", "b", "c"])
