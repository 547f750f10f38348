"""Bars by class of paths and the map of time by weight, read back from their SVG."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch
from tests.graph import nets

from rowgrad.graph.charts import MOST_BARS, MOST_CELLS, bars, part_sizes, time_map

SVG = "{http://www.w3.org/2000/svg}"


def rows(svg: str) -> list[tuple[str, float, list[str]]]:
    """Name, signed length of the bar and texts of each row."""
    found = []
    for g in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        rect, texts = g.find(f"{SVG}rect"), [str(t.text) for t in g.iter(f"{SVG}text")]
        sign = -1 if "against" in str(g.get("class")) else 1
        assert rect is not None
        found.append((texts[0], sign * float(str(rect.get("width"))), texts[1:]))
    return found


def test_bars_are_as_long_as_the_shares() -> None:
    parts = {3: torch.tensor([3.0, 1.0]), 5: torch.tensor([-1.0, 0.0])}  # g = (2, 1), |g|^2 = 5
    assert part_sizes(parts) == {"3": (pytest.approx(10**0.5), pytest.approx(1.4)), "5": (1.0, pytest.approx(-0.4))}
    (a, long, texts), (b, short, others) = rows(bars(parts, "title"))
    assert (a, b) == ("3", "5")
    assert texts == ["140%", "norm 3.16"]
    assert others == ["-40%", "norm 1"]
    assert short / long == pytest.approx(-0.4 / 1.4, rel=1e-3)


def test_shares_of_a_decomposition_add_up_to_one() -> None:
    graph = nets.resnet()
    parts = graph.decompose("stem.weight", by="length")
    assert sum(share for _, share in part_sizes(parts).values()) == pytest.approx(1)
    assert len(rows(bars(parts, ""))) == len(parts)


def test_many_classes_are_joined() -> None:
    parts = {k: torch.tensor([1.0 + k]) for k in range(100)}
    found = rows(bars(parts, ""))
    assert len(found) == MOST_BARS
    assert found[-1][0] == "61 others"
    assert [name for name, _, _ in found[:-1]] == [str(k) for k in range(61, 100)]
    assert found[-1][2][1] == f"norm {sum((1.0 + k) ** 2 for k in range(61)) ** 0.5:.3g}"


def test_a_gradient_of_zero_has_no_shares_and_no_parts_no_bars() -> None:
    assert part_sizes({1: torch.zeros(2)}) == {"1": (0.0, 0.0)}
    assert rows(bars({}, "nothing")) == []


def cells(svg: str) -> list[tuple[float, float, float, str]]:
    """Left, top, opacity and note of each cell of the map."""
    root = ElementTree.fromstring(svg)
    rects = [(r, r.findtext(f"{SVG}title")) for r in root.iter(f"{SVG}rect") if r.get("class") == "cell"]
    return [
        (float(str(r.get("x"))), float(str(r.get("y"))), float(str(r.get("fill-opacity"))), note)
        for r, note in rects
        if note is not None
    ]


def test_a_map_has_a_row_for_each_weight_and_a_cell_for_each_time() -> None:
    parts = {
        "a": {0: torch.tensor([100.0]), 1: torch.tensor([1.0]), 2: torch.tensor([0.0])},
        "b<": {0: torch.tensor([1e-3])},
    }
    found = cells(time_map(parts, "title"))
    assert [(round(shade, 3), note) for _, _, shade, note in found] == [
        (1.0, "a, time 0: 100"),
        (0.5, "a, time 1: 1"),
        (0.0, "a, time 2: 0"),
        (0.0, "b<, time 0: 0.001"),
    ]
    assert found[0][0] < found[1][0] < found[2][0]
    assert found[0][0] == found[3][0]
    assert found[0][1] < found[3][1]


def test_many_times_are_joined() -> None:
    parts = {"a": {t: torch.tensor([float(t)]) for t in range(3 * MOST_CELLS - 1)}}
    found = cells(time_map(parts, ""))
    assert len(found) == MOST_CELLS
    assert found[1][3] == "a, times 3 to 5: 5"


def test_nothing_is_a_map_too() -> None:
    assert cells(time_map({}, "")) == []
    assert [shade for _, _, shade, _ in cells(time_map({"a": {0: torch.zeros(1)}}, ""))] == [0.0]
