"""Groups of variables by module, so that a graph of thousands of operations can be looked at.

Note [no circle among groups]
    A module's operations may lie before and behind those of another: a residual block adds after its convolutions what
    it had before them. Drawn as one box each, the two would point at each other. An operation therefore joins its
    module's box only if no path leads from that box through others to the operation; else it opens a box of its own.
    Views join what they are a view of, which closes no circle either: they have no other input.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rowgrad.graph.scopes import Scopes
from rowgrad.graph.vertices import MOVES, Edge, Vertex, module_of

Run = tuple[str, int]  # a module's name and which of the watched spans


@dataclass(frozen=True)
class Forward:
    """What is drawn of a graph, in the order of the forward pass; parameters and their views are set aside.

    Attributes:
        vertices: of the graph.
        order: indices of the variables to be drawn, each behind those it was computed from.
        links: for each of them, (index of a drawn variable it reads, its own index and slot).
        leaves: for each of them, the indices of the leaves it reads, directly or through views.
        module: for each of them, the name of its module; "" outside of all.
        runs: for each of them, the spans of modules that it ran in, innermost first; empty without a trace.
    """

    vertices: Sequence[Vertex]
    order: tuple[int, ...]
    links: Mapping[int, tuple[tuple[int, Edge], ...]]
    leaves: Mapping[int, tuple[int, ...]]
    module: Mapping[int, str]
    runs: Mapping[int, tuple[Run, ...]]

    @property
    def max_depth(self) -> int:
        """Parts of the longest name of a module."""
        return max(len(_parts(name)) for name in self.module.values())

    def is_move(self, i: int) -> bool:
        """Whether the variable is a view of one other."""
        return self.vertices[i].op in MOVES and sum(t is not None for t in self.vertices[i].inputs) == 1


def forward(
    vertices: Sequence[Vertex], times: Sequence[int], outputs: Iterable[int], scopes: Scopes | None = None
) -> Forward:
    """Set parameters aside and put the rest in order; `times` says when each operation was recorded."""
    behind = _behind(vertices, set(outputs))
    drawn = [v for v in vertices if v.index not in behind]
    links, leaves = {}, {}
    for v in drawn:
        read = [(target[0], (v.index, slot)) for slot, target in enumerate(v.inputs) if target is not None]
        links[v.index] = tuple(link for link in read if link[0] not in behind)
        leaves[v.index] = tuple(dict.fromkeys(behind[i] for i, _ in read if i in behind))
    traced = any(not v.inferred and not v.is_leaf for v in vertices)
    return Forward(
        vertices,
        _in_order(links, times),
        links,
        leaves,
        {v.index: "" if traced and v.inferred else v.module for v in drawn},
        {v.index: () if scopes is None or v.is_leaf else _spans(scopes, times[v.index]) for v in drawn},
    )


def _behind(vertices: Sequence[Vertex], outputs: set[int]) -> dict[int, int]:
    """{variable that is not drawn: the leaf it is, or is a view of}. Unnamed leaves beside parameters are data."""
    named = any(v.op == "parameter" for v in vertices)
    found: dict[int, int] = {}
    for v in reversed(vertices):
        live = [target[0] for target in v.inputs if target is not None]
        if v.op == "parameter" or (v.is_leaf and not named):
            found[v.index] = v.index
        elif v.op in MOVES and len(live) == 1 and live[0] in found and v.index not in outputs:
            found[v.index] = found[live[0]]
    return found


def _spans(scopes: Scopes, time: int) -> tuple[Run, ...]:
    return tuple((name, k) for k, (begin, end, name) in enumerate(scopes.spans) if begin <= time < end)


def _in_order(links: Mapping[int, Sequence[tuple[int, Edge]]], times: Sequence[int]) -> tuple[int, ...]:
    """By time as far as inputs allow (times of several threads do not compare); a leaf just before its first reader."""
    readers: dict[int, list[int]] = {i: [] for i in links}
    for i, read in links.items():
        for j, _ in read:
            readers[j].append(i)
    ranks = {i: min((times[j] for j in readers[i]), default=0) - 0.5 if not links[i] else times[i] for i in links}
    return tuple(topological({i: {j for j, _ in read} for i, read in links.items()}, ranks))


def topological(inputs: Mapping[int, set[int]], ranks: Mapping[int, float]) -> list[int]:
    """Each behind its inputs, otherwise by rank, then the later index first, as the forward pass counts downwards.

    Behind a circle nothing is reached, so that the result is shorter than the input.
    """
    waiting = {i: len(js) for i, js in inputs.items()}
    readers: dict[int, list[int]] = {i: [] for i in inputs}
    for i, js in inputs.items():
        for j in js:
            readers[j].append(i)
    heap = [(ranks[i], -i) for i, n in waiting.items() if not n]
    heapq.heapify(heap)
    found = []
    while heap:
        i = -heapq.heappop(heap)[1]
        found.append(i)
        for reader in readers[i]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(heap, (ranks[reader], -reader))
    return found


@dataclass(frozen=True)
class Grouping:
    """A partition of the drawn variables whose quotient has no circle.

    Attributes:
        name: how this level of detail is called.
        groups: members of each group in forward order; groups in forward order, too.
        modules: of each group, the module that holds all its members.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]
    modules: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def group_of(self) -> dict[int, int]:
        """{variable: its group}."""
        return {i: k for k, members in enumerate(self.groups) for i in members}


def by_operation(graph: Forward) -> Grouping:
    """Every operation by itself, with its views."""
    return _grouped(graph, "operations", {i: (i,) for i in graph.order}, graph.module)


def by_module(graph: Forward, depth: int) -> Grouping:
    """Modules down to `depth` parts of their names, each run of a module by itself."""
    if depth > graph.max_depth:
        return by_operation(graph)
    modules = {i: cut(graph.module[i], depth) for i in graph.order}
    keys = {i: (modules[i], _run(graph.runs[i], modules[i]) if depth else None) for i in graph.order}
    return _grouped(graph, f"depth {depth}", keys, modules, depth == 0)


def cut(module: str, depth: int) -> str:
    """The first `depth` parts of a dotted name."""
    return ".".join(_parts(module)[:depth])


def _parts(module: str) -> list[str]:
    return module.split(".") if module else []


def _run(runs: Sequence[Run], module: str) -> int | None:
    """Which run of this module, or else of the nearest around it."""
    return next((k for name, k in runs if f"{module}.".startswith(f"{name}.") or not name), None)


def _grouped(
    graph: Forward, name: str, keys: Mapping[int, Hashable], modules: Mapping[int, str], everything: bool = False
) -> Grouping:
    groups = _Groups()
    for i in graph.order:
        inputs = {groups.of[j] for j, _ in graph.links[i]}
        if graph.is_move(i) and inputs:
            groups.put(i, inputs.pop(), set())
            continue
        fresh = set() if graph.runs[i] else {leaf for leaf in graph.leaves[i] if _owns(graph, leaf, modules[i])}
        loose = not modules[i] and not everything  # outside of modules only what hangs together is one
        group = groups.fitting(keys[i], inputs, fresh, loose)
        groups.put(i, group, inputs, keys[i], modules[i], fresh)
    return groups.result(graph, name)


def _owns(graph: Forward, leaf: int, module: str) -> bool:
    """Whether the leaf is a parameter of this very module: read anew, it begins another run."""
    name = graph.vertices[leaf].name
    return (module_of(name) or name) == module


class _Groups:
    """Groups as they grow; sets of groups are bits of an integer. See Note [no circle among groups]."""

    def __init__(self) -> None:
        self.of: dict[int, int] = {}
        self.members: list[list[int]] = []
        self.modules: list[str] = []
        self.keys: list[Hashable] = []
        self.before: list[int] = []  # all groups that lead to this one
        self.read: list[set[int]] = []
        self.latest: dict[Hashable, int] = {}

    def fitting(self, key: Hashable, inputs: set[int], fresh: set[int], loose: bool) -> int | None:
        """A group of this key that the next operation may join."""
        if loose:
            candidates = sorted((g for g in inputs if self.keys[g] == key), reverse=True)
        else:
            candidates = [self.latest[key]] if key in self.latest else []
        for group in candidates:
            through = any(self.before[g] >> group & 1 for g in inputs if g != group)
            if not through and not fresh & self.read[group]:
                return group
        return None

    def put(
        self,
        i: int,
        group: int | None,
        inputs: set[int],
        key: Hashable = None,
        module: str = "",
        read: Iterable[int] = (),
    ) -> None:
        more = 0
        for g in inputs - {group}:
            more |= self.before[g] | 1 << g
        if group is None:
            group = self._open(key, module, more)
        elif more & ~self.before[group]:
            self._lead(group, more)
        self.of[i] = group
        self.members[group].append(i)
        self.read[group].update(read)

    def _open(self, key: Hashable, module: str, before: int) -> int:
        self.members.append([])
        self.modules.append(module)
        self.keys.append(key)
        self.before.append(before)
        self.read.append(set())
        self.latest[key] = len(self.members) - 1
        return len(self.members) - 1

    def _lead(self, group: int, more: int) -> None:
        """Now `more` lead to this group, and so to all behind it."""
        self.before[group] |= more
        for g, before in enumerate(self.before):
            if before >> group & 1:
                self.before[g] |= more

    def result(self, graph: Forward, name: str) -> Grouping:
        return arranged(graph, name, self.members, self.modules)


def arranged(graph: Forward, name: str, members: Sequence[Iterable[int]], modules: Sequence[str]) -> Grouping:
    """Groups in the order of the forward pass."""
    place = {i: k for k, i in enumerate(graph.order)}
    sets = [tuple(sorted(m, key=place.__getitem__)) for m in members]
    of = {i: g for g, group in enumerate(sets) for i in group}
    inputs = {g: {of[j] for i in group for j, _ in graph.links[i]} - {g} for g, group in enumerate(sets)}
    order = topological(inputs, {g: place[group[-1]] for g, group in enumerate(sets)})
    if len(order) != len(sets):
        raise AssertionError(f"bug in rowgrad, please report: a circle among the groups of {name}")
    return Grouping(name, tuple(sets[g] for g in order), tuple(modules[g] for g in order))
