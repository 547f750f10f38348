"""Paths from a variable to a loss: counted and measured by a sweep, and walked one by one where they are few (eq. 3).

Note [what a path is]
    A path is a sequence of reads: an operation reads a variable at one of its inputs and answers at one of its
    outputs, which the next operation reads. `w * w` reads `w` twice, which makes two paths. A read is an edge of the
    graph whether its local derivative is zero or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log10
from typing import Any, NamedTuple

from torch import Tensor

from rowgrad.errors import GraphError
from rowgrad.graph.levels import Level, Named
from rowgrad.graph.sweep import above, sweep, value_at
from rowgrad.graph.vertices import Edge


class Read(NamedTuple):
    """One edge of a path: who read the variable before it, at which input, and by which output the path goes on."""

    vertex: Named
    slot: int
    output: int


@dataclass(frozen=True, eq=False)
class Path:
    """One way from a variable to a loss.

    Attributes:
        start: the variable it begins at.
        output: which of its outputs, 0 unless it has several.
        edges: (vertex, slot, output) of each operation on the way, the loss last; empty for the loss itself.
        length: operations on the way that compute something, `Vertex.steps` added up.
    """

    start: Named
    output: int
    edges: tuple[Read, ...]

    @property
    def length(self) -> int:
        return sum(read.vertex.steps for read in self.edges)

    def __len__(self) -> int:
        return len(self.edges)

    def __str__(self) -> str:
        parts, source = [_named(self.start, self.output)], (self.start.index, self.output)
        for read in self.edges:
            several = read.vertex.slots.count(source) > 1
            parts.append(_named(read.vertex, read.output) + (f" (input {read.slot})" if several else ""))
            source = (read.vertex.index, read.output)
        return " -> ".join(parts)

    def __repr__(self) -> str:
        return f"<path {self}>"


def _named(vertex: Named, output: int) -> str:
    return vertex.name if vertex.n_outputs == 1 else f"{vertex.name} (output {output})"


class Counts:
    """How many ways: numbers added up, passed on as they are."""

    def add(self, a: int, b: int) -> int:
        return a + b

    def send(self, node: Named, own: Sequence[int | None]) -> list[int]:
        return [sum(n for n in own if n is not None)] * len(node.slots)


class Longest:
    """The longest way: the maximum in place of the sum, and each operation adds its steps."""

    def add(self, a: int, b: int) -> int:
        return max(a, b)

    def send(self, node: Named, own: Sequence[int | None]) -> list[int]:
        return [max(n for n in own if n is not None) + node.steps] * len(node.slots)


def count_paths(level: Level, key: Any) -> int:
    """How many paths lead from a variable to the losses, 0 for a parameter without one."""
    edge = level.find(key)
    return 0 if edge is None else value_at(level, edge, dict.fromkeys(level.seeds(), 1), Counts()) or 0


def depth(level: Level, key: Any = None) -> int:
    """Steps on the longest path from a variable, or from any."""
    longest: dict[int, int] = {}

    def arrived(node: Named, own: list[int | None]) -> None:
        longest[node.index] = max(n for n in own if n is not None)

    seeds = dict.fromkeys(level.seeds(), 0)
    if key is None:
        sweep(level, seeds, Longest(), arrived)
        return max(longest.values())
    edge = level.find(key)
    found = None if edge is None else value_at(level, edge, seeds, Longest())
    if found is None:
        raise GraphError(f"depth of {key}: no path leads from it to a loss")
    return found


def paths(level: Level, key: Any, limit: int | None) -> Iterator[Path]:
    """Each path once, depth first from the losses, made as they are asked for."""
    count = count_paths(level, key)
    if limit is not None and count > limit:
        raise GraphError(
            f"{_shown(key)}: {_number(count)} paths lead to the losses, more than limit={limit}. `count_paths`, "
            "`backward` and `decompose` answer without walking them; the first n are "
            "itertools.islice(graph.paths(..., limit=None), n)"
        )
    edge = level.find(key)
    return iter(()) if edge is None else _walk(level, edge)


def _shown(key: Any) -> str:
    return f"a tensor of shape {tuple(key.shape)}" if isinstance(key, Tensor) else str(key)


def _number(count: int) -> str:
    return str(count) if count < 10**15 else f"about 10^{int(log10(count))}"


def _walk(level: Level, target: Edge) -> Iterator[Path]:
    nodes, needed = level.nodes, above(level, [target[0]])
    start = nodes[target[0]]
    for output in level.seeds():
        trail: list[Read] = []
        pending = [_reads(nodes[output[0]], output[1], needed)]
        if output == target:
            yield Path(start, target[1], ())
            continue
        while pending:
            read, source = next(pending[-1], (None, None))
            if read is None or source is None:
                pending.pop()
                trail = trail[:-1]
            elif source == target:
                yield Path(start, target[1], (read, *reversed(trail)))
            else:
                trail.append(read)
                pending.append(_reads(nodes[source[0]], source[1], needed))


def _reads(vertex: Named, output: int, needed: set[int]) -> Iterator[tuple[Read, Edge]]:
    return ((Read(vertex, i, output), t) for i, t in enumerate(vertex.slots) if t is not None and t[0] in needed)


def path_gradient(level: Level, path: Path) -> Tensor:
    """The product of the local derivatives along one path, from the loss down."""
    if not all(_is_of(level, v) for v in (path.start, *(read.vertex for read in path.edges))):
        raise GraphError(f"{path}: a path of another graph. Take it from this one's `paths`")
    edge = (path.start.index, path.output)
    end = (path.edges[-1].vertex.index, path.edges[-1].output) if path.edges else edge
    value = level.seeds()[end]
    for read in reversed(path.edges):
        own = [None] * read.vertex.n_outputs
        own[read.output] = value
        value = level.algebra.send(read.vertex, own)[read.slot]
        if value is None:
            break
    return level.finished(value, edge)


def _is_of(level: Level, vertex: Named) -> bool:
    return vertex.index < len(level.nodes) and level.nodes[vertex.index] is vertex
