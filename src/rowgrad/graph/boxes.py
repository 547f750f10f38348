"""What a drawing shows: boxes with their lettering, and the arrows between them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from rowgrad.errors import GraphError
from rowgrad.graph.collapse import Forward, Grouping, forward
from rowgrad.graph.flow import Flow, rms
from rowgrad.graph.lettering import count, number, one_line, percent
from rowgrad.graph.variables import Variables
from rowgrad.graph.vertices import Edge

N_NAMED = 16  # variables and parameters that a box names when it is pointed at


@dataclass(frozen=True)
class Marks:
    """What is written on a drawing besides the graph.

    Attributes:
        labels: {(vertex index, slot): text or number} for what enters an operation.
        shares: {(vertex index, slot): its share of the gradient}, signed.
        flow: cotangents whose size is written into the boxes.
    """

    labels: Mapping[Edge, str | float] = field(default_factory=dict)
    shares: Mapping[Edge, float] = field(default_factory=dict)
    flow: Flow | None = None


@dataclass(frozen=True)
class Box:
    """A group of variables.

    Attributes:
        module: dotted name of the module that holds all of it; "" outside of all.
        title: the module, or what is computed where there is none.
        detail: what is computed, or the modules inside.
        shape: of what leaves the box; "scalar" for a number, "+2" for two others.
        n_weights: entries of the parameters that enter it.
        gradient: root mean square of the cotangent of what leaves it; None if not asked for or none arrived.
        kind: "weights" where parameters enter, "data" for a leaf, else "plain".
        is_output: whether a loss is in it.
        notes: its variables and parameters.
    """

    module: str
    title: str
    detail: str
    shape: str
    n_weights: int
    gradient: float | None
    kind: str
    is_output: bool
    notes: tuple[str, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """What is written into it."""
        weights = f"{count(self.n_weights)} weight{'s' if self.n_weights != 1 else ''}" if self.n_weights else ""
        size = " · ".join(filter(None, (self.shape, weights)))
        gradient = "" if self.gradient is None else f"gradient rms {number(self.gradient)}"
        return tuple(filter(None, (self.title, self.detail, size, gradient)))


@dataclass(frozen=True)
class Arrow:
    """All that one box reads from another."""

    source: int
    target: int
    n_edges: int
    text: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Picture:
    """A graph at one level of detail; boxes in the order of the forward pass, so that every arrow points forward."""

    name: str
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


def drawn(graph: Variables) -> Forward:
    """The graph without parameters, in forward order."""
    times = [node.time for node in graph.tape.nodes]
    return forward(graph.vertices, times, [i for i, _ in graph.outputs], graph.scopes)


def checked(graph: Variables, marks: Marks) -> Marks:
    """The marks, once they are known to belong to this graph."""
    if marks.flow is not None and marks.flow.graph is not graph:
        raise GraphError("flow belongs to another graph, expected what this graph's backward() returned")
    for name, edges in (("edge_labels", marks.labels), ("shares", marks.shares)):
        for edge in edges:
            if not _exists(graph, edge):
                raise GraphError(f"{name}: {edge!r} is no edge; keys are (vertex index, slot) of what an input enters")
    return marks


def _exists(graph: Variables, edge: Edge) -> bool:
    if not isinstance(edge, tuple) or len(edge) != 2 or not all(isinstance(n, int) for n in edge):
        return False
    inputs = graph.vertices[edge[0]].inputs if 0 <= edge[0] < len(graph) else ()
    return 0 <= edge[1] < len(inputs) and inputs[edge[1]] is not None


def picture(graph: Variables, shown: Forward, grouping: Grouping, marks: Marks) -> Picture:
    """Letter a level of detail."""
    leaving = _leaving(graph, shown, grouping)
    boxes = [
        _box(graph, shown, members, module, leaving[g], marks)
        for g, (members, module) in enumerate(zip(grouping.groups, grouping.modules, strict=True))
    ]
    return Picture(grouping.name, tuple(_numbered(boxes)), tuple(_arrows(shown, grouping, marks)))


def _leaving(graph: Variables, shown: Forward, grouping: Grouping) -> list[list[Edge]]:
    """For each group the variables that others read, or that are losses, the latest first."""
    of = grouping.group_of
    found: list[dict[Edge, None]] = [{} for _ in grouping.groups]
    for edge in graph.outputs:
        found[of[edge[0]]][edge] = None
    for i in shown.order:
        for source, (reader, slot) in shown.links[i]:
            target = graph.vertices[reader].inputs[slot]
            if of[source] != of[i] and target is not None:
                found[of[source]][target] = None
    place = {i: k for k, i in enumerate(shown.order)}
    made = [dict.fromkeys(_made(shown, e, module) for e in edges) for edges, module in zip(found, grouping.modules)]
    return [sorted(edges, key=lambda e: (-place[e[0]], e[1])) for edges in made]


def _made(shown: Forward, edge: Edge, module: str) -> Edge:
    """What the box's own module returned, before a view that another took of it."""
    while shown.is_move(edge[0]) and shown.links[edge[0]] and not _is_of(shown, edge[0], module):
        (_, (reader, slot)) = shown.links[edge[0]][0]
        edge = shown.vertices[reader].inputs[slot] or edge
    return edge


def _is_of(shown: Forward, i: int, module: str) -> bool:
    return f"{shown.module[i]}.".startswith(f"{module}.") and not shown.vertices[i].name.startswith("after ")


def _box(
    graph: Variables, shown: Forward, members: Sequence[int], module: str, leaving: Sequence[Edge], marks: Marks
) -> Box:
    title, detail = _title(shown, members, module)
    leaves = tuple(dict.fromkeys(leaf for i in members for leaf in shown.leaves[i]))
    arrived = [] if marks.flow is None else [marks.flow.cotangents[e] for e in leaving if e in marks.flow.cotangents]
    outputs = {i for i, _ in graph.outputs}
    return Box(
        module,
        one_line(title),
        one_line(detail),
        _shape([graph.vertices[i].shapes[nr] for i, nr in leaving]),
        sum(graph.vertices[i].shapes[0].numel() for i in leaves),
        rms(arrived[0]) if arrived else None,
        "weights" if leaves else "data" if graph.vertices[members[0]].is_leaf else "plain",
        not outputs.isdisjoint(members),
        tuple(_notes([str(graph.vertices[i]) for i in members], [str(graph.vertices[i]) for i in leaves])),
    )


def _shape(shapes: Sequence[torch.Size]) -> str:
    first = str(tuple(shapes[0])) if len(shapes[0]) else "scalar"
    return f"{first} +{len(shapes) - 1}" if len(shapes) > 1 else first


def _title(shown: Forward, members: Sequence[int], module: str) -> tuple[str, str]:
    computing = [i for i in members if not shown.is_move(i)] or list(members)
    names = [shown.vertices[i].name for i in computing]
    if len(computing) == 1 and ": " in names[0] and module:
        title, _, detail = names[0].rpartition(": ")
        return title, _short(detail)
    parts = [_part(shown, i, module) for i in computing]
    listed = ", ".join(p for k, p in enumerate(parts) if k == 0 or p != parts[k - 1])
    if not module:
        return listed, ""
    return (f"after {module}" if all(name.startswith("after ") for name in names) else module), listed


def _part(shown: Forward, i: int, module: str) -> str:
    """The module below `module` that a variable is of, or else its operation."""
    vertex, inner = shown.vertices[i], shown.module[i]
    if vertex.is_leaf:
        return vertex.name
    return _short(vertex.op) if inner == module else inner[len(module) :].lstrip(".").split(".")[0]


def _short(operation: str) -> str:
    """As people call it: `native_layer_norm` is layer_norm, each of the fused attentions is attention."""
    if operation.startswith("scaled_dot_product"):
        return "attention"
    bare = operation.removeprefix("native_").removeprefix("cudnn_")
    return re.sub(r"(?<=\d)_d$", "d", bare)


def _notes(variables: Sequence[str], leaves: Sequence[str]) -> Iterable[str]:
    """As much as fits beside a pointer, the latest variable first."""
    for title, names in (("", [*reversed(variables)]), ("weights: ", leaves)):
        yield from (title + name for name in names[:N_NAMED])
        if len(names) > N_NAMED:
            yield f"{title}and {len(names) - N_NAMED} more"


def _numbered(boxes: Sequence[Box]) -> list[Box]:
    """Runs of one module told apart."""
    total, seen = Counter((box.title, box.detail) for box in boxes), Counter[tuple[str, str]]()
    found = []
    for box in boxes:
        seen[box.title, box.detail] += 1
        is_only = total[box.title, box.detail] == 1
        found.append(box if is_only else replace(box, title=f"{box.title} #{seen[box.title, box.detail]}"))
    return found


def _arrows(shown: Forward, grouping: Grouping, marks: Marks) -> Iterable[Arrow]:
    of = grouping.group_of
    found: dict[tuple[int, int], list[Edge]] = {}
    for i in shown.order:
        for source, edge in shown.links[i]:
            if of[source] != of[i]:
                found.setdefault((of[source], of[i]), []).append(edge)
    for (source, target), edges in sorted(found.items(), key=lambda item: item[0][::-1]):
        shares = [marks.shares[e] for e in edges if e in marks.shares]
        share = sum(shares) if shares else None
        texts = [] if share is None else [percent(share)]
        texts += [_text(marks.labels[e]) for e in edges if e in marks.labels]
        yield Arrow(source, target, len(edges), ", ".join(dict.fromkeys(texts)), share)


def _text(label: str | float) -> str:
    return one_line(label) if isinstance(label, str) else number(label)
