"""The page of an audit in a loop of one's own: pictures, sections, and what stands in them."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import rowgrad as rg
from rowgrad.errors import InputError
from rowgrad.uses import sections
from rowgrad.uses.gallery import MAX_SIDE, picture
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


def audited(n_classes: int | None = K, n_visits: int = 4) -> rg.Audit:
    """Of N examples, the last never seen; examples 0 and 1 have the label that the logits speak against."""
    audit = rg.Audit(N, n_classes)
    index, generator = torch.arange(N - 1), torch.Generator().manual_seed(0)
    labels = index % K
    for _ in range(n_visits):
        logits = torch.eye(K)[labels] * 3 + 0.5 * torch.rand(N - 1, K, generator=generator)
        logits[:2] = logits[:2].roll(1, 1)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        with_labels = {} if n_classes is None else {"logits": logits, "labels": labels}
        audit.update(index, losses=losses, norms=losses + 0.1, **with_labels)
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
    assert "<b>2</b>likely mislabelled" in page
    assert "<b>1</b>never seen" in page
    assert 'given <b>a</b>, suggested <span class="new">&lt;b&gt;</span>' in page
    assert "A &lt;set&gt;" in page
    assert "<set>" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert not list(tmp_path.glob("*.tmp*"))


def test_the_charts_show_every_example_that_was_seen() -> None:
    scores = audited().compute()
    drawn = sections.data_map(scores)
    assert drawn.count('class="usual"') == N - 3
    assert drawn.count('class="doubted"') == 2
    assert sections.ranked_norms(scores).count('class="doubted"') == 2
    table = sections.given_by_suggested(scores)
    assert re.findall(r">(\d+)</td>", table) == ["1", "1"]


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
        (torch.rand(N, 4, 4), 'alt="image of example 0"'),
        (np.zeros((N, 4, 4, 3), np.uint8), "data:image/png"),
    ],
    ids=["text", "long text", "values", "tensor", "array"],
)
def test_examples_are_shown(examples: object, shown: str, tmp_path: Path) -> None:
    audited().report(tmp_path / "audit.html", examples=examples)
    read(tmp_path / "audit.html")
    assert shown in (tmp_path / "audit.html").read_text(encoding="utf-8")


def test_an_example_that_cannot_be_shown_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"example \d has shape \(4,\); the page shows pictures"):
        audited().report(tmp_path / "audit.html", examples=Tensor(N, 4))
    assert not list(tmp_path.iterdir())
