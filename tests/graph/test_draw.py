"""Drawings: few boxes, nothing on top of anything else, all arrows downwards, every parameter in its place."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import torch
from tests.cases import CASES
from tests.graph import nets
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import GraphError
from rowgrad.graph.boxes import drawn
from rowgrad.graph.detail import MAX_BOXES, levels

SVG = "{http://www.w3.org/2000/svg}"
GRAPHS = {
    "resnet": nets.resnet,
    "gpt": nets.gpt,
    "recurrent": nets.recurrent,
    "resnet, names guessed": lambda: nets.resnet(traced=False),
    "gpt, names guessed": lambda: nets.gpt(traced=False),
    "recurrent, names guessed": lambda: nets.recurrent(traced=False),
}


class Rect(NamedTuple):
    x: float
    y: float
    width: float
    height: float

    def overlaps(self, other: Rect) -> bool:
        apart_x = self.x + self.width <= other.x or other.x + other.width <= self.x
        return not apart_x and not (self.y + self.height <= other.y or other.y + other.height <= self.y)


class Drawing:
    """An SVG read back."""

    def __init__(self, text: str) -> None:
        root = ElementTree.fromstring(text)
        groups = [(str(g.get("class")).split(), g) for g in root.iter(f"{SVG}g")]
        self.boxes = [rect(g) for classes, g in groups if "box" in classes]
        self.notes = [str(g.findtext(f"{SVG}title")) for classes, g in groups if "box" in classes]
        self.labels = [rect(g) for classes, g in groups if "label" in classes]
        self.texts = [str(g.findtext(f"{SVG}text")) for classes, g in groups if "label" in classes]
        self.arrows = [path(g) for classes, g in groups if "arrow" in classes]
        self.ends = [(int(str(g.get("data-from"))), int(str(g.get("data-to")))) for c, g in groups if "arrow" in c]
        self.marked = [k for k, (classes, _) in enumerate(p for p in groups if "box" in p[0]) if "marked" in classes]
        self.view = [float(v) for v in str(root.get("viewBox")).split()]
        self.text = text


def rect(group: ElementTree.Element) -> Rect:
    found = group.find(f"{SVG}rect")
    assert found is not None
    return Rect(*(float(str(found.get(k))) for k in ("x", "y", "width", "height")))


def path(group: ElementTree.Element) -> list[float]:
    """The heights of an arrow's points."""
    found = group.find(f"{SVG}path")
    assert found is not None
    steps = re.findall(r"([MVC])([^MVC]*)", str(found.get("d")))
    numbers = [(kind, [float(v) for v in text.split()]) for kind, text in steps]
    return [values[-1] for _, values in numbers]


@pytest.mark.parametrize("name", GRAPHS)
def test_large_nets_fit_into_forty_boxes(name: str) -> None:
    graph = GRAPHS[name]()
    drawing = Drawing(graph.to_svg())
    assert 5 < len(drawing.boxes) <= 40


@pytest.mark.parametrize("name", [*GRAPHS, *list(CASES)[::12]])
def test_nothing_overlaps_and_arrows_point_down(name: str) -> None:
    if name in GRAPHS:
        graph = GRAPHS[name]()
    else:
        setup = CASES[name].build()
        graph = rg.Graph(setup.losses(), setup.params)
    shares = {edge: 1 / (2 + k) for k, edge in enumerate((v.index, s) for v in graph.vertices for s in live(v))}
    for drawing in (
        Drawing(graph.to_svg(shares=shares)),
        Drawing(graph.to_svg(1)),
        Drawing(graph.to_svg(max_boxes=12)),
    ):
        for a, b in combinations(drawing.boxes + drawing.labels, 2):
            assert not a.overlaps(b), (a, b)
        left, top, width, height = drawing.view
        for box in drawing.boxes + drawing.labels:
            assert left <= box.x <= box.x + box.width <= left + width
            assert top <= box.y <= box.y + box.height <= top + height
        for heights in drawing.arrows:
            assert heights == sorted(heights)
        for (source, target), heights in zip(drawing.ends, drawing.arrows, strict=True):
            assert heights[0] == pytest.approx(drawing.boxes[source].y + drawing.boxes[source].height, abs=0.2)
            assert drawing.boxes[target].y - 10 < heights[-1] <= drawing.boxes[target].y


def live(vertex: rg.graph.vertices.Vertex) -> list[int]:  # pyright: ignore[reportAttributeAccessIssue]
    return [slot for slot, target in enumerate(vertex.inputs) if target is not None]


@pytest.mark.parametrize("name", GRAPHS)
def test_every_level_is_a_partition_without_a_circle(name: str) -> None:
    shown = drawn(GRAPHS[name]())
    sizes = []
    for grouping in levels(shown):
        members = [i for group in grouping.groups for i in group]
        assert sorted(members) == sorted(shown.order)
        of = grouping.group_of
        for i in shown.order:
            assert all(of[j] <= of[i] for j, _ in shown.links[i]), "an arrow points backwards"
        sizes.append(len(grouping))
    assert sizes[0] == max(sizes)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("depth", [0, 1, 2, None])
def test_every_parameter_is_named_in_a_box_and_counted_once(name: str, depth: int | None) -> None:
    graph = GRAPHS[name]()
    drawing = Drawing(graph.to_svg(depth))
    named = [note.split() for note in drawing.notes]
    for parameter in graph.parameters:
        assert any(parameter in words for words in named), parameter
    total = sum(p.numel() for key, p in graph.leaves.items() if key in graph.parameters)
    if depth == 0:
        assert f"{total / 1000:.3g}k weights" in drawing.text or f"{total} weights" in drawing.text


def test_a_branch_and_its_skip_are_two_ways_to_the_addition() -> None:
    graph = nets.resnet()
    boxes = graph.to_text().splitlines()
    adds = [line for line in boxes if "add, relu" in line]
    assert len(adds) == 8
    assert all(re.search(r"<- \d+, \d+$", line) for line in adds)


def test_depth_chooses_the_level() -> None:
    graph = nets.resnet()
    sizes = [len(Drawing(graph.to_svg(depth)).boxes) for depth in (0, 1, 2, 9)]
    assert sizes[0] == 1
    assert sizes == sorted(sizes)
    assert sizes[-1] == len(levels_of(graph)[0])
    with pytest.raises(GraphError, match="depth is -1, expected 0"):
        graph.to_text(-1)
    with pytest.raises(GraphError, match="max_boxes is 0"):
        graph.to_text(max_boxes=0)


def levels_of(graph: rg.Graph) -> list[tuple[tuple[int, ...], ...]]:
    return [grouping.groups for grouping in levels(drawn(graph))]


@pytest.mark.parametrize("max_boxes", [1, 2, 7, 40, 1000])
def test_max_boxes_is_kept(max_boxes: int) -> None:
    graph = nets.gpt()
    assert len(Drawing(graph.to_svg(max_boxes=max_boxes)).boxes) <= max_boxes


def test_shares_are_written_on_arrows_and_boxes() -> None:
    graph = nets.resnet()
    drawing = Drawing(graph.to_svg(shares=graph.shares("stem.weight")))
    assert len(drawing.texts) == len(drawing.arrows)
    assert all(text.endswith("%") for text in drawing.texts)
    into = {target: 0.0 for _, target in drawing.ends}
    for (_, target), text in zip(drawing.ends, drawing.texts, strict=True):
        into[target] += float(text.removesuffix("%"))
    cut = [into[t] for t in into if sum(target == t for _, target in drawing.ends) == 2]
    assert len(cut) == 8
    assert cut == pytest.approx([100.0] * 8, abs=0.6)  # skip and block make up the whole at every addition


def test_paths_to_a_variable_stand_out() -> None:
    graph = nets.resnet()
    drawing = Drawing(graph.to_svg(to="layers.3.0.conv1.weight"))
    first = min(drawing.marked)
    assert "layers.3.0.conv1.weight" in drawing.notes[first]
    assert drawing.marked == list(range(first, len(drawing.boxes))) or 0 < len(drawing.marked) < len(drawing.boxes)
    path = next(iter(graph.paths("layers.3.1.conv1.weight")))
    assert len(Drawing(graph.to_svg(to=path)).marked) >= 2
    with pytest.raises(GraphError):
        Drawing(graph.to_svg(to=next(iter(nets.resnet().paths("layers.3.1.conv1.weight")))))


def test_sizes_of_cotangents_are_written() -> None:
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    graph = rg.Graph((w * w).sum(), {"w": w})
    assert "gradient rms 1" in graph.to_svg(flow=graph.backward())
    with pytest.raises(GraphError, match="flow belongs to another graph"):
        graph.to_svg(flow=rg.Graph((w * w).sum(), {"w": w}).backward())


@pytest.mark.parametrize(
    "name", ["größe", "<b>&\"'", "x" * 300, "日本語のモデル", "a\nb\tc", "]]>", "</svg><script>alert(1)</script>"]
)
def test_odd_names_are_escaped_and_shortened(name: str) -> None:
    w = torch.ones(2, requires_grad=True)
    graph = rg.Graph((w * 2).exp().sum(), {name: w})
    drawing = Drawing(graph.to_svg())
    assert drawing.view[2] < 700
    page = graph.to_html()
    assert "<script" not in page
    assert len(max(graph.to_text().splitlines(), key=len)) <= 100


def test_the_smallest_graph_is_drawn() -> None:
    w = torch.ones((), requires_grad=True)
    drawing = Drawing(rg.Graph(w * 2, {"w": w}).to_svg())
    assert (len(drawing.boxes), len(drawing.arrows)) == (1, 0)


def test_labels_are_for_edges_that_exist() -> None:
    w = torch.ones(2, requires_grad=True)
    graph = rg.Graph((w * 2).exp().sum(), {"w": w})
    assert Drawing(graph.to_svg(9, labels={("after w: exp", 0): "e < pi"})).texts == ["e < pi"]
    with pytest.raises(GraphError, match=r"labels: \('after w: exp', 1\) is no edge"):
        graph.to_svg(labels={("after w: exp", 1): "none"})


def test_a_page_is_one_file_with_all_levels(tmp_path: Path) -> None:
    graph = nets.resnet()
    text = graph.to_html(tmp_path / "graph.html")
    assert (tmp_path / "graph.html").read_text(encoding="utf-8") == text
    assert [p.name for p in tmp_path.iterdir()] == ["graph.html"]
    assert text.count("<svg") == len(levels_of(graph))
    assert not re.search(r"(src|href)=|@import|url\(", text)
    ids = re.findall(r'id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert text.count(" checked") == 1


class Odd(nn.Module):
    """Views, two losses, a leaf with a gradient that is no parameter, a parameter used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(self.a(x).view(-1, 3).t().t())
        return h.sum(), (h * x).mean()


def test_several_losses_and_data_with_a_gradient() -> None:
    model, x = Odd(), torch.randn(2, 3, requires_grad=True)
    graph = rg.Graph(model(x), model)
    text = graph.to_svg(9)
    assert text.count(" output") >= 2
    assert 'class="box data' in text
    assert "shared" in graph.to_text(9)
    assert len(Drawing(graph.to_svg()).boxes) <= MAX_BOXES
