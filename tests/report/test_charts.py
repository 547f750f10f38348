"""Numbers, axes and marks of the charts, and thumbnails."""

from __future__ import annotations

import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import image

from rowgrad.graph.lettering import number
from rowgrad.report.charts import Line, line_chart
from rowgrad.report.thumbnails import data_uri

# fmt: off
NUMBERS = [
    (0, "0"), (1, "1"), (2.5, "2.5"), (10, "10"), (100, "100"), (0.1, "0.1"), (1 / 3, "0.333"), (999.4, "999"),
    (999.6, "1,000"), (1234.5, "1,234"), (123456, "123,456"), (1e6, "1e6"), (2.346e7, "2.35e7"), (0.00123, "0.00123"),
    (0.000123, "1.23e-4"), (-0.25, "-0.25"), (-1e-5, "-1e-5"),
]
# fmt: on


@pytest.mark.parametrize(("value", "text"), NUMBERS)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def _tree(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def _texts(tree: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in tree.iter("text")]


def _chart(values: np.ndarray, band: tuple[np.ndarray, np.ndarray] | None = None) -> ElementTree.Element:
    lines = [Line(values, "suspect")]
    return _tree(line_chart(lines, band, width=300, height=150, x_label="epoch", y_label="loss (nats)", title="t<"))


def _points(element: ElementTree.Element) -> np.ndarray:
    return np.array([[float(part) for part in point.split(",")] for point in element.get("points").split()])


@pytest.mark.parametrize("top", [1e-7, 0.3, 1, 8.7, 1e5])
@pytest.mark.parametrize("n", [2, 3, 40, 500])
def test_lines_stay_inside_and_keep_proportion(n: int, top: float) -> None:
    values = np.random.default_rng(0).random(n) * top
    tree = _chart(values, (values / 2, values))
    points = _points(tree.find("polyline"))
    assert len(points) == n
    assert points[:, 0].min() == pytest.approx(46)
    assert points[:, 0].max() == pytest.approx(290)
    assert points[:, 1].min() >= 21.9
    assert points[:, 1].max() <= 114.1
    base = 114
    heights = base - points[:, 1]
    assert heights / heights.max() == pytest.approx(values / values.max(), abs=0.01)
    assert _points(tree.find("polygon")).shape == (2 * n, 2)
    assert {"loss (nats)", "epoch", "1", "0"} <= set(_texts(tree))


def test_one_epoch_is_a_dot() -> None:
    tree = _chart(np.array([2.0]), (np.array([1.0]), np.array([3.0])))
    assert tree.find("polyline") is None
    assert tree.find("circle") is not None


def test_all_zero_values_can_be_drawn() -> None:
    assert _points(_chart(np.zeros(5)).find("polyline"))[:, 1] == pytest.approx(114)


def test_titles_are_escaped() -> None:
    assert _chart(np.ones(3)).find("title").text == "t<"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((8, 8), (8, 8)), ((20, 30, 3), (20, 30)), ((5, 6, 4), (5, 6)), ((300, 150), (96, 48)), ((4, 400, 3), (1, 96))],
)
def test_thumbnails(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    address = data_uri(pixels)
    assert address.startswith("data:image/png;base64,")
    read = image.imread(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert read.shape[:2] == expected
    if expected == shape[:2]:
        seen = (read * 255).round().astype(np.uint8)
        wanted = pixels[..., None].repeat(3, axis=2) if pixels.ndim == 2 else pixels
        assert np.array_equal(seen[..., : wanted.shape[2]], wanted)
