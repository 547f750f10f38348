"""What a drawing shows: boxes with their lettering, and the arrows between them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from rowgrad.errors import GraphError
from rowgrad.graph.collapse import Forward, Grouping, forward
from rowgrad.graph.flow import Flow, rms
from rowgrad.graph.lettering import count, number, one_line, percent
from rowgrad.graph.paths import Path
from rowgrad.graph.shares import Shares
from rowgrad.graph.sweep import above
from rowgrad.graph.variables import Key, Variables
from rowgrad.graph.vertices import Edge

N_NAMED = 16  # variables that a box names when it is pointed at

EdgeKey = tuple[Key, int]  # an operation and which of its inputs


@dataclass(frozen=True)
class Marks:
    """What is written on a drawing besides the graph.

    Attributes:
        labels: {(vertex index, slot): text or number} for what enters an operation.
        shares: {(vertex index, slot): its share of the gradient}, signed.
        flow: cotangents whose size is written into the boxes.
        path: what is to stand out, as (vertex index, slot).
    """

    labels: Mapping[Edge, str | float] = field(default_factory=dict)
    shares: Mapping[Edge, float] = field(default_factory=dict)
    flow: Flow | None = None
    path: frozenset[Edge] = frozenset()


@dataclass(frozen=True)
class Box:
    """A group of variables.

    Attributes:
        module: dotted name of the module that holds all of it; "" outside of all.
        title: the module, or what is computed where there is none.
        detail: what is computed, or the modules inside.
        shape: of what leaves the box; "scalar" for a number, "+2" for two others.
        n_weights: entries of the parameters that enter here first, so that all boxes together count each once.
        n_shared: entries of those that entered an earlier box, too.
        gradient: root mean square of the cotangent of what leaves it; None if not asked for or none arrived.
        share: of the gradient of a parameter that enters here, what comes back to it here; None if not asked for.
        kind: "weights" where parameters enter, "data" for a leaf, else "plain".
        is_output: whether a loss is in it.
        is_marked: whether it is on the path that is to stand out.
        notes: its variables and all its parameters.
    """

    module: str
    title: str
    detail: str
    shape: str
    n_weights: int
    n_shared: int
    gradient: float | None
    share: float | None
    kind: str
    is_output: bool
    is_marked: bool
    notes: tuple[str, ...]

    @property
    def weights(self) -> str:
        """`816`, `816 shared`, `54 + 816 shared`."""
        shared = f"{count(self.n_shared)} shared" if self.n_shared else ""
        return " + ".join(filter(None, (count(self.n_weights) if self.n_weights else "", shared)))

    @property
    def facts(self) -> tuple[str, ...]:
        """Lines about sizes."""
        weights = f"{self.weights} weight{'s' * (self.n_weights + self.n_shared > 1)}" if self.weights else ""
        gradient = "" if self.gradient is None else f"gradient rms {number(self.gradient)}"
        share = "" if self.share is None else f"{percent(self.share)} of the gradient enters here"
        return tuple(filter(None, (" · ".join(filter(None, (self.shape, weights))), gradient, share)))


@dataclass(frozen=True)
class Arrow:
    """All that one box reads from another."""

    source: int
    target: int
    n_edges: int
    text: str = ""
    share: float | None = None
    is_marked: bool = False


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


def marks(
    graph: Variables,
    labels: Mapping[EdgeKey, str | float] | None = None,
    shares: Shares | Mapping[EdgeKey, float] | None = None,
    flow: Flow | None = None,
    to: Key | Path | None = None,
) -> Marks:
    """Marks by index, once they are known to belong to this graph."""
    if flow is not None and flow.graph is not graph:
        raise GraphError("flow belongs to another graph, expected what this graph's backward() returned")
    return Marks(
        {_edge(graph, "labels", edge): text for edge, text in (labels or {}).items()},
        {_edge(graph, "shares", edge): share for edge, share in (shares or {}).items()},
        flow,
        frozenset() if to is None else _path(graph, to),
    )


def _edge(graph: Variables, name: str, edge: EdgeKey) -> Edge:
    if isinstance(edge, tuple) and len(edge) == 2 and isinstance(edge[1], int):
        inputs = graph[edge[0]].inputs
        if 0 <= edge[1] < len(inputs) and inputs[edge[1]] is not None:
            return graph[edge[0]].index, edge[1]
    raise GraphError(f"{name}: {edge!r} is no edge; keys are (operation, slot) where the slot is one that is not None")


def _path(graph: Variables, to: Key | Path) -> frozenset[Edge]:
    """The edges of a path, or of all paths from a variable to the losses."""
    if isinstance(to, Path):
        if any(r.vertex.index >= len(graph) or graph.vertices[r.vertex.index] is not r.vertex for r in to.edges):
            raise GraphError(f"to={to!r} is no path of this graph's vector variables")
        return frozenset((read.vertex.index, read.slot) for read in to.edges)
    start = graph.find(to)
    if start is None:
        raise GraphError(f"to={to!r}: no path leads from it to a loss")
    on = above(graph.tape, [start[0]])
    slots = ((i, slot, target) for i in on for slot, target in enumerate(graph.vertices[i].inputs))
    return frozenset((i, slot) for i, slot, target in slots if target is not None and target[0] in on)


def picture(graph: Variables, shown: Forward, grouping: Grouping, marks: Marks) -> Picture:
    """Letter a level of detail."""
    leaving = _leaving(graph, shown, grouping)
    boxes, entered = [], set[int]()
    for members, module, left in zip(grouping.groups, grouping.modules, leaving, strict=True):
        boxes.append(_box(graph, shown, members, module, left, marks, entered))
        entered.update(leaf for i in members for leaf in shown.leaves[i])
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
    made = [
        dict.fromkeys(_made(shown, e, module) for e in edges)
        for edges, module in zip(found, grouping.modules, strict=True)
    ]
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
    graph: Variables,
    shown: Forward,
    members: Sequence[int],
    module: str,
    leaving: Sequence[Edge],
    marks: Marks,
    entered: Collection[int],
) -> Box:
    title, detail = _title(shown, members, module)
    leaves = list(dict.fromkeys(leaf for i in members for leaf in shown.leaves[i]))
    first, again = [i for i in leaves if i not in entered], [i for i in leaves if i in entered]
    arrived = [] if marks.flow is None else [marks.flow.cotangents[e] for e in leaving if e in marks.flow.cotangents]
    reads = [edge for i in members for edge in _parameter_reads(shown, i)]
    shares = [marks.shares[edge] for edge in reads if edge in marks.shares]
    return Box(
        module,
        one_line(title),
        one_line(detail),
        _shape([graph.vertices[i].shapes[nr] for i, nr in leaving]),
        _entries(graph, first),
        _entries(graph, again),
        rms(arrived[0]) if arrived else None,
        sum(shares) if shares else None,
        "weights" if leaves else "data" if graph.vertices[members[0]].is_leaf else "plain",
        not {i for i, _ in graph.outputs}.isdisjoint(members),
        any((i, slot) in marks.path for i in members for slot in range(len(graph.vertices[i].inputs))),
        tuple(_notes(*([str(graph.vertices[i]) for i in part] for part in (members, first, again)))),
    )


def _entries(graph: Variables, leaves: Iterable[int]) -> int:
    return sum(graph.vertices[i].shapes[0].numel() for i in leaves)


def _parameter_reads(shown: Forward, i: int) -> list[Edge]:
    """Inputs of a variable that are parameters or views of them."""
    drawn = {edge for _, edge in shown.links[i]}
    inputs = shown.vertices[i].inputs
    return [(i, slot) for slot, target in enumerate(inputs) if target is not None and (i, slot) not in drawn]


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
    listed = ", ".join(dict.fromkeys(parts))
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


def _notes(variables: Sequence[str], weights: Sequence[str], shared: Sequence[str]) -> Iterable[str]:
    """As much of the variables as fits beside a pointer, the latest first, and all parameters."""
    yield from variables[: -N_NAMED - 1 : -1]
    if len(variables) > N_NAMED:
        yield f"and {len(variables) - N_NAMED} more"
    yield from (f"weights: {name}" for name in weights)
    yield from (f"shared weights: {name}" for name in shared)


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
        is_marked = not marks.path.isdisjoint(edges)
        yield Arrow(source, target, len(edges), ", ".join(dict.fromkeys(texts)), share, is_marked)


def _text(label: str | float) -> str:
    return one_line(label) if isinstance(label, str) else number(label)
