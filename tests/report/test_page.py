"""The page: its facts without a browser, and its behavior in one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.report.browser import Browser, program
from tests.report.runs import digits_run, words_run

from rowgrad.report.page import render, write_page
from rowgrad.report.scores import scores_frame
from rowgrad.training.audited import AuditRun
from rowgrad.uses.planted import score_planted

VOID = {"meta", "link", "img", "br", "hr", "input"}


class _Page(HTMLParser):
    """Elements with their attributes, the text a reader sees, and whether the tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["style"], ["title"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


RUNS = {
    "images": digits_run,
    "images, nothing planted": lambda: digits_run(flip=0),
    "labels": words_run,
    "labels, nothing planted": lambda: words_run(flip=0),
    "labels, flipped to calibrate": lambda: words_run(flip=0, calibrate=0.1),
    "labels, without norms": lambda: words_run(norms=False),
    "quantities, without norms": lambda: words_run("regression", norms=False),
    "quantities": lambda: words_run("regression"),
    "quantities, nothing planted": lambda: words_run("regression", flip=0),
}


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest) -> AuditRun:
    return RUNS[request.param]()


def test_one_file_that_asks_for_nothing(run: AuditRun) -> None:
    html = render(run)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    page = _Page(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "video", "audio", "source"}
    for tag, attributes in page.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert "default-src 'none'" in html


def test_it_names_the_suspects_and_the_figures(run: AuditRun) -> None:
    page = _Page(render(run, ["rowgrad", "audit", "a file.csv"]))
    frame = scores_frame(run).sort("rank")
    place = "line" if run.table.place == "line" else "index"
    shown = [f"{run.table.place} {number}" for number in frame[place].to_list()]
    assert re.findall(r"(?:row|line) \d+", page.text)[:12] == shown[:12]
    assert f"{len(run.rows):,}" in page.text
    assert "rowgrad audit 'a file.csv'" in page.text
    assert "Cost of the audit" in page.text
    assert f"{run.cost.audit_ratio:.2f}" in page.text
    assert ("with each example's gradient norm" in page.text) is (run.norms is not None)
    if run.table.classes is None:
        assert "suggested" not in page.text.replace("no other target is suggested", "")
        assert "sd²" in page.text
    else:
        n_flagged = int(run.scores.flagged.sum())
        assert f"{n_flagged} of {len(run.rows)} labels flagged" in page.text
        assert page.text.count("given") > 12
        assert "loss (nats)" in page.text
    if run.scores.calibration is not None:
        assert str(run.scores.calibration) in page.text
        assert "--flip" not in page.text
        assert page.text.count("label flipped to calibrate") == 2
    elif run.planted is None:
        assert "planted" not in page.text.lower()
        assert "--flip 0.1" in page.text
        assert ("--calibrate 0.03" in page.text) is (run.table.classes is not None)
    else:
        planted = score_planted(run.scores, run.planted)
        assert f"{planted.average_precision:.3f} average precision" in page.text
        assert "planted error, was" in page.text
        low, high = planted.precision_at_k_interval if run.table.classes is None else planted.recall_interval
        assert f"95%: {low:.2f} to {high:.2f})" in page.text


def test_suspects_carry_their_flags_and_the_reasons(run: AuditRun) -> None:
    page, scores = _Page(render(run)), run.scores
    for k in scores.order()[:12].tolist():
        assert scores.reason(k, run.table.classes).replace("  ", " ") in page.text
    shown = page.text.count
    for name, mask in scores.flags.items():
        n_listed = int(mask[scores.order()[:12]].sum())
        assert shown(name) >= n_listed + (name != "spiking")
    badges = [a for tag, a in page.elements if tag == "span" and a.get("class") == "badge flagged"]
    listed = scores.order()[: max(12, min(60, 0 if scores.flagged is None else int(scores.flagged.sum())))]
    assert len(badges) == sum(int(mask[listed].sum()) for mask in scores.flags.values())


def test_what_is_missing_without_norms_is_said(run: AuditRun) -> None:
    page = _Page(render(run))
    assert ("This run took none ( --no-norms )." in page.text) is (run.norms is None)
    assert ("Ranked gradient norms" in page.text) is (run.norms is not None)
    assert ("mean norm" in page.text) is (run.norms is not None)


def test_no_claim_that_the_data_may_refute(run: AuditRun) -> None:
    page = _Page(render(run))
    assert "It grows as they are learned" not in page.text
    assert "not used for the flags" not in page.text
    if run.table.classes is None:
        assert "label is believed" not in page.text
        assert "never forgotten" not in page.text


def test_thumbnails_or_values(run: AuditRun) -> None:
    page = _Page(render(run))
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    if run.table.images is None:
        assert not images
        assert "<script>alert(" in page.text  # escaped in the page, read as text
        assert "usually" in page.text
    else:
        assert len(images) >= 12
        assert all(attributes["alt"] for attributes in images)


def test_plots_have_axes_with_units(run: AuditRun) -> None:
    page = _Page(render(run))
    charts = [attributes for tag, attributes in page.elements if tag == "svg"]
    is_labels = run.table.classes is not None
    is_measured = any(epoch.noise_scale_error for epoch in run.epochs)
    has_norms = run.norms is not None
    n_of_each = 2 if has_norms else 1
    charts = [attributes for attributes in charts if attributes.get("role") == "img"]
    assert len(charts) == n_of_each * 6 + is_labels + has_norms + 2 * is_measured + 2 * n_of_each
    assert all(attributes["aria-label"] for attributes in charts)
    unit = "nats" if is_labels else "sd²"
    for label in (f"loss ({unit})", "epoch"):
        assert label in page.text
    assert (f"gradient norm ({unit} per unit of weight)" in page.text) is has_norms
    assert ("noise scale (examples)" in page.text) is is_measured
    assert ("mean gradient norm, log scale" in page.text) is has_norms
    assert ("confidence" in page.text) is is_labels


def test_sections_of_any_audit(run: AuditRun) -> None:
    page, classes = _Page(render(run)), run.table.classes
    for name, mask in run.scores.flags.items():
        assert f"{int(mask.sum())} {name}: " in page.text
    matrices = sum(attributes.get("class") == "matrix" for _, attributes in page.elements)
    assert matrices == (0 if classes is None else 1 + bool(run.scores.flagged.any()))
    assert ("Classes that pull against each other" in page.text) is (classes is not None)
    marked = sum(a.get("class") == "doubted" and a.get("r") == "2.6" for _, a in page.elements)
    expected = run.planted if classes is None else run.scores.flagged
    n_charts = (classes is not None) + (run.norms is not None)
    assert marked == (0 if expected is None else n_charts * int(expected.sum()))
    assert page.text.count("The result depends on the model") == 1


def test_the_same_run_gives_the_same_page(run: AuditRun) -> None:
    assert render(run) == render(run)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if program() is None:
        pytest.skip("no Chromium or Chrome is installed, so that the page cannot be opened in a browser")
    with Browser() as browser:
        yield browser


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(browser: Browser, run: AuditRun, tmp_path: Path, width: int, dark: bool) -> None:
    page = tmp_path / "report.html"
    write_page(run, page, ["rowgrad", "audit", "x" * 200])
    seen = browser.see(page, width, dark=dark)
    assert seen.messages == []
    assert seen.requests == [page.as_uri()]
    assert seen.inner_width == width
    assert seen.scroll_width <= width
    assert seen.overflowing == []


def test_the_browser_notices_faults(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "faulty.html"
    page.write_text(
        "<script>console.log('hello'); missing()</script><img src='gone.png'><div style='width:2000px'>wide</div>"
    )
    seen = browser.see(page, 390)
    assert len(seen.requests) == 2
    assert any("hello" in message for message in seen.messages)
    assert any("missing is not defined" in message for message in seen.messages)
    assert seen.scroll_width > 390 or seen.overflowing
