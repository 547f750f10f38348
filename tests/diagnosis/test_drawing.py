"""Drawings: what is on them, and that they can be read."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import rowgrad as rg
from rowgrad.diagnosis.drawing import BOTTOM, HEIGHT, LEFT, LETTER, RIGHT, TOP, WIDTH, Band, Series, chart

F64 = torch.float64
SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)


def drawn(html: str) -> ElementTree.Element:
    """The first SVG, parsed."""
    return ElementTree.fromstring(SVG.search(html)[0])


def lines(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in svg.iter("polyline")]


def texts(svg: ElementTree.Element, css: str) -> list[ElementTree.Element]:
    return [t for t in svg.iter("text") if t.get("class") == css]


def test_a_power_of_ten_is_the_same_height_everywhere() -> None:
    svg = drawn(chart([Series("s", [1, 2, 3, 4], [1e-6, 1e-4, 1e-2, 1.0])], "x", is_log=True))
    (points,) = lines(svg)
    assert [x for x, _ in points] == pytest.approx([LEFT + k / 3 * (WIDTH - LEFT - RIGHT) for k in range(4)], abs=0.06)
    assert [y for _, y in points] == pytest.approx(
        [HEIGHT - BOTTOM - k / 3 * (HEIGHT - BOTTOM - TOP) for k in range(4)], abs=0.06
    )
    assert [t.text for t in texts(svg, "end")][:-1] == [f"1e{k}" for k in range(-6, 1)]


def test_what_is_not_finite_or_not_positive_is_a_gap() -> None:
    y = [1.0, 2.0, float("nan"), 4.0, float("inf"), 0.0, 7.0, 8.0]
    svg = drawn(chart([Series("s", range(1, 9), y)], "x", is_log=True))
    assert [len(points) for points in lines(svg)] == [2, 2]
    assert len(list(svg.iter("circle"))) == 5
    linear = drawn(chart([Series("s", range(1, 9), y)], "x", is_log=False))
    assert [len(points) for points in lines(linear)] == [2, 3]


@pytest.mark.parametrize("y", [[5.0], [3.0, 3.0], [-1.0, -1.0], [1e-300, 1e300], [0.0, 1e-9]])
@pytest.mark.parametrize("is_log", [True, False])
def test_lines_stay_inside(y: list[float], is_log: bool) -> None:
    html = chart([Series("s", range(1, len(y) + 1), y)], "x", is_log=is_log)
    if is_log and not any(v > 0 for v in y):
        assert "nothing to draw" in html
        return
    for circle in drawn(html).iter("circle"):
        assert LEFT <= float(circle.get("cx")) <= WIDTH - RIGHT
        assert TOP - 1 <= float(circle.get("cy")) <= HEIGHT - BOTTOM + 1


@pytest.mark.parametrize("n", [1, 2, 11, 81, 500])
def test_names_at_the_axis_do_not_overlap(n: int) -> None:
    names = [f"encoder.layers.{k}.attention.output" for k in range(n)]
    svg = drawn(chart([Series("s", range(1, n + 1), [1.0] * n)], "x", is_log=True, x_names=names))
    labels = [(float(t.get("x")), len(t.text) * LETTER) for t in texts(svg, "middle")]
    assert labels
    assert all(x - width / 2 >= 0 and x + width / 2 <= WIDTH for x, width in labels if n > 1)
    for (x, width), (next_x, next_width) in pairwise(labels):
        assert x + width / 2 < next_x - next_width / 2


def test_a_band_lies_where_its_numbers_are() -> None:
    svg = drawn(chart([Series("s", [1, 2], [1e-6, 1.0])], "x", is_log=True, band=Band(1e-4, 1e-2)))
    (band,) = (r for r in svg.iter("rect"))
    assert float(band.get("height")) == pytest.approx((HEIGHT - TOP - BOTTOM) / 3, abs=0.1)
    assert float(band.get("y")) == pytest.approx(TOP + (HEIGHT - TOP - BOTTOM) / 3, abs=0.1)


def vanishing() -> rg.Diagnosis:
    model = nn.Sequential(*(m for _ in range(11) for m in (nn.Linear(8, 8), nn.Sigmoid()))).double()
    losses = lambda: model(torch.ones(4, 8, dtype=F64)).sum(1)  # noqa: E731
    return rg.diagnose(losses(), model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), closure=losses)


def test_a_diagnosis_draws_three_curves_and_the_step(tmp_path: Path) -> None:
    found = vanishing()
    body = found.to_html(tmp_path / "diagnosis.html")
    depth, along = (ElementTree.fromstring(svg) for svg in SVG.findall(body))
    assert [len(points) for points in lines(depth)] == [11, 11, 11]
    assert [len(points) for points in lines(along)] == [9, 9]
    heights = [y for _, y in lines(depth)[1]]
    assert heights == sorted(heights, reverse=True)  # the cotangent falls from right to left
    titles = [c.find("title").text for c in depth.iter("circle")]
    assert f"cotangent, 0: {found.curves[0].cotangent:.3g}" in titles
    for finding in found.findings:
        assert finding.kind in body
        assert finding.remedy in body
    page = (tmp_path / "diagnosis.html").read_text()
    assert page.startswith("<!doctype html>")
    assert body in page
    assert "http" not in page
    assert found._repr_html_() == body


def test_names_are_escaped() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1e3)
    found = rg.diagnose((torch.ones(3, 2) @ weight).sum(1), {"<b>&": weight}, optimizer=optimizer)
    assert found.of("update")[0].where == "<b>&"
    assert "<b>&" not in found.to_html()
    assert "&lt;b&gt;&amp;" in found.to_html()


def test_a_monitor_draws_its_records(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = rg.Monitor(model, optimizer, every=1, norms_every=1)
    assert monitor.to_html()
    for _ in range(6):
        losses = model(torch.randn(9, 4, dtype=F64)).square().squeeze(1)
        monitor.observe(losses)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        monitor.update()
    monitor.observe(model(torch.full((9, 4), float("nan"), dtype=F64)).squeeze(1))
    body = monitor.to_html(tmp_path / "monitor.html")
    drawings = [ElementTree.fromstring(svg) for svg in SVG.findall(body)]
    assert len(drawings) == 6  # loss, cotangents, activations, updates, norms, noise scale
    assert [len(points) for points in lines(drawings[0])] == [6]
    assert len(lines(drawings[1])) == 2
    assert "step 6" in body
    assert "the input of 0" in body
    assert (tmp_path / "monitor.html").read_text().count("<svg") == 6
