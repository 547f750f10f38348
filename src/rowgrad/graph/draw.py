"""Drawings of a graph, as text."""

from __future__ import annotations

from rowgrad.graph.boxes import Marks, checked, drawn, picture
from rowgrad.graph.detail import level
from rowgrad.graph.listing import listing
from rowgrad.graph.variables import Variables


def text(graph: Variables, depth: int | None, max_boxes: int, marks: Marks) -> str:
    """As indented lines."""
    shown = drawn(graph)
    return listing(picture(graph, shown, level(shown, depth, max_boxes), checked(graph, marks)), facts(graph))


def facts(graph: Variables) -> str:
    """How large the graph is, in words."""
    n_edges = sum(t is not None for v in graph.vertices for t in v.inputs)
    return f"{len(graph)} variables, {n_edges} edges, {len(graph.parameters)} parameters"
