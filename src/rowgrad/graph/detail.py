"""Levels of detail of a drawing, from every operation to one box, and which of them fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rowgrad.errors import GraphError
from rowgrad.graph.collapse import Forward, Grouping, arranged, by_module, by_operation, cut

MAX_BOXES = 40


def level(graph: Forward, depth: int | None, max_boxes: int) -> Grouping:
    """The level of this depth; without one the most detailed of at most `max_boxes` boxes.

    Raises:
        GraphError: a negative depth, or no box at all.
    """
    if depth is not None:
        if depth < 0:
            raise GraphError(f"depth is {depth}, expected 0 (everything one box), 1 (outermost modules) or more")
        return by_module(graph, depth)
    if max_boxes < 1:
        raise GraphError(f"max_boxes is {max_boxes}, expected at least 1")
    coarsest = None
    for coarsest in levels(graph):
        if len(coarsest) <= max_boxes:
            return coarsest
    return in_pieces(graph, coarsest or by_operation(graph), max_boxes)


def levels(graph: Forward) -> Iterator[Grouping]:
    """Most detailed first: operations, then modules by depth, also with chains joined within a module."""
    found = by_operation(graph)
    yield found
    for depth in range(graph.max_depth, 0, -1):
        previous, found = found, by_module(graph, depth)
        if found.groups != previous.groups:
            yield found
        joined = chains_joined(graph, found, depth - 1) if depth > 1 else found
        if joined.groups != found.groups:
            yield joined


def chains_joined(graph: Forward, grouping: Grouping, depth: int) -> Grouping:
    """Neighbours that read and feed nothing but each other become one, inside a module of this depth.

    What is left of a residual block are its branches and its addition.
    """
    inputs, readers = _neighbours(graph, grouping)
    parents = [cut(module, depth) for module in grouping.modules]
    first = list(range(len(grouping)))
    for g in range(len(grouping)):
        (source,) = inputs[g] if len(inputs[g]) == 1 else (None,)
        if source is not None and len(readers[source]) == 1 and parents[source] == parents[g]:
            first[g] = first[source]
    return _merged(graph, grouping, first, f"{grouping.name}, chains joined")


def in_pieces(graph: Forward, grouping: Grouping, max_boxes: int) -> Grouping:
    """Equal pieces of the forward pass, however the modules lie: cuts of an order of the boxes close no circle."""
    size = -(-len(grouping) // max_boxes)
    number = [k // size for k in range(len(grouping))]
    return _merged(graph, grouping, number, f"{grouping.name}, {size} in a row as one")


def _neighbours(graph: Forward, grouping: Grouping) -> tuple[list[set[int]], list[set[int]]]:
    of = grouping.group_of
    inputs: list[set[int]] = [set() for _ in grouping.groups]
    readers: list[set[int]] = [set() for _ in grouping.groups]
    for i in graph.order:
        for j, _ in graph.links[i]:
            if of[i] != of[j]:
                inputs[of[i]].add(of[j])
                readers[of[j]].add(of[i])
    return inputs, readers


def _merged(graph: Forward, grouping: Grouping, number: Sequence[int], name: str) -> Grouping:
    """Groups of the same number become one."""
    members: dict[int, list[int]] = {}
    modules: dict[int, list[str]] = {}
    for k, n in enumerate(number):
        members.setdefault(n, []).extend(grouping.groups[k])
        modules.setdefault(n, []).append(grouping.modules[k])
    return arranged(graph, name, list(members.values()), [_common(names) for names in modules.values()])


def _common(modules: Sequence[str]) -> str:
    """The innermost module that holds all of them."""
    parts = [module.split(".") for module in modules]
    n = 0
    while all(len(p) > n for p in parts) and len({p[n] for p in parts}) == 1:
        n += 1
    return ".".join(parts[0][:n])
