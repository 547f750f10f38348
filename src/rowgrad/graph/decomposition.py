"""The gradient split over all paths by a label of the path: one sweep whose values are {label: cotangent}.

Note [labels are made on the way]
    A label is a fold over the operations of a path, from the loss down. Cotangents under one label have been added up
    before they are sent on, so what an operation costs is the number of labels that meet at it, however many paths
    they stand for. `use` and `time` are known only at the last step, and cost one plain sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from rowgrad.errors import GraphError
from rowgrad.graph.levels import Level, Named
from rowgrad.graph.sweep import Algebra, value_at
from rowgrad.graph.vertices import MOVES, Edge

S = TypeVar("S")
Label = Any  # any hashable value
Fold = Callable[[Label, Named], Label]
By = str | Fold | Sequence[str]


class Labels:
    """How a path comes by its label. The parts that differ are methods; this one follows a fold given by the user."""

    start: Label = None

    def __init__(self, fold: Fold) -> None:
        self.fold = fold

    def through(self, label: Label, vertex: Named) -> Label:
        """The label behind an operation."""
        return self.fold(label, vertex)

    def into(self, label: Label, vertex: Named, slot: int) -> Label:
        """The label of what an operation sends to one of its inputs."""
        return label

    def ordered(self, found: Mapping[Label, S]) -> dict[Label, S]:
        return dict(found)


class ByLength(Labels):
    """How many operations of a path compute something."""

    start = 0

    def __init__(self) -> None:
        super().__init__(lambda label, vertex: label + vertex.steps)

    def ordered(self, found: Mapping[Label, S]) -> dict[Label, S]:
        return dict(sorted(found.items()))


class ByModules(Labels):
    """Which of some modules a path passes through. Where modules are known from a trace, guesses do not count."""

    start = frozenset()

    def __init__(self, level: Level, names: Sequence[str]) -> None:
        ran = [v for v in level.nodes if v.module and not v.is_leaf]
        exact = {v.module for v in ran if not v.inferred}
        known = exact or {v.module for v in ran}
        for name in names:
            if not any(_is_within(module, name) for module in known):
                raise GraphError(
                    f"no operation of this graph ran in a module {name!r}; known: {', '.join(sorted(known))}"
                )
        self.passed = {v.index: frozenset(n for n in names if _is_within(v.module, n)) for v in ran}
        self.passed.update({v.index: frozenset() for v in ran if exact and v.inferred})

    def through(self, label: frozenset[str], vertex: Named) -> frozenset[str]:
        return label | self.passed.get(vertex.index, frozenset())


class ByUse(Labels):
    """Which read of the variable itself, or of a view of it, a path begins with."""

    def __init__(self, level: Level, edge: Edge, label: Callable[[int, str], Label]) -> None:
        uses = _uses(level, edge)
        moments = sorted({level.nodes[index].time for index, _ in uses})
        self.labels = {
            (index, slot): label(moments.index(level.nodes[index].time), _shown(level, index, slot, uses))
            for index, slot in uses
        }

    def through(self, label: Label, vertex: Named) -> Label:
        return label

    def into(self, label: Label, vertex: Named, slot: int) -> Label:
        return self.labels.get((vertex.index, slot), label)

    def ordered(self, found: Mapping[Label, S]) -> dict[Label, S]:
        return {label: found[label] for label in (*dict.fromkeys(self.labels.values()), None) if label in found}


def _is_within(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def _uses(level: Level, edge: Edge) -> list[tuple[int, int]]:
    """(vertex, slot) of each read of a variable or a view of it that is no view itself, in the forward pass's order."""
    same, uses = {edge}, []
    for vertex in reversed(level.nodes):
        slots = [slot for slot, target in enumerate(vertex.slots) if target in same]
        live = sum(target is not None for target in vertex.slots)
        if slots and live == 1 and vertex.op in MOVES:
            same.update((vertex.index, nr) for nr in range(vertex.n_outputs))
        else:
            uses += [(vertex.index, slot) for slot in slots]
    return sorted(uses, key=lambda use: (level.nodes[use[0]].time, use))


def _shown(level: Level, index: int, slot: int, uses: Sequence[tuple[int, int]]) -> str:
    several = sum(i == index for i, _ in uses) > 1
    return level.nodes[index].name + (f" (input {slot})" if several else "")


class Split(Generic[S]):
    """{label: value}, each label's value sent by itself."""

    def __init__(self, algebra: Algebra[Named, S], labels: Labels, most: int) -> None:
        self.algebra = algebra
        self.labels = labels
        self.most = most

    def add(self, a: dict[Label, S], b: dict[Label, S]) -> dict[Label, S]:
        found = dict(a)
        for label, s in b.items():
            self._put(found, label, s)
        return found

    def _put(self, found: dict[Any, S], label: Any, s: S) -> None:
        found[label] = self.algebra.add(found[label], s) if label in found else s

    def send(self, node: Named, own: Sequence[dict[Label, S] | None]) -> list[dict[Label, S]]:
        sent: list[dict[Label, S]] = [{} for _ in node.slots]
        for label, values in self._relabeled(node, own).items():
            for slot, s in enumerate(self.algebra.send(node, values)):
                if s is not None:
                    self._put(sent[slot], self.labels.into(label, node, slot), s)
        return sent

    def _relabeled(self, node: Named, own: Sequence[dict[Label, S] | None]) -> dict[Label, list[S | None]]:
        """By label behind the operation, the value at each of its outputs."""
        found: dict[Label, dict[int, S]] = {}
        for nr, split in enumerate(own):
            for label, s in (split or {}).items():
                self._put(found.setdefault(self.labels.through(label, node), {}), nr, s)
        if len(found) > self.most:
            raise GraphError(
                f"more than max_classes={self.most} classes of paths meet at {node.name}, and each costs a call of "
                "every operation below. Choose coarser labels, or raise max_classes"
            )
        return {label: [values.get(nr) for nr in range(len(own))] for label, values in found.items()}


def decompose(level: Level, key: Any, by: By, max_classes: int) -> dict[Hashable, Tensor]:
    """The gradient of a variable, split by the labels of its paths."""
    edge = level.find(key)
    labels = _labels(level, edge, by)
    if edge is None:
        return {}
    seeds = {end: {labels.start: s} for end, s in level.seeds().items()}
    found = value_at(level, edge, seeds, Split(level.algebra, labels, max_classes))
    return {label: level.finished(s, edge) for label, s in labels.ordered(found or {}).items()}


def _labels(level: Level, edge: Edge | None, by: By) -> Labels:
    if callable(by):
        return Labels(by)
    if by == "length":
        return ByLength()
    if by == "use" or by == "time":
        return ByUse(level, edge or (-1, 0), lambda moment, name: moment if by == "time" else name)
    if isinstance(by, str) or not all(isinstance(name, str) for name in by):
        raise GraphError(
            f'by={by!r}: expected "length", "use", "time", a function of (label, vertex) or a sequence of module names'
        )
    return ByModules(level, by)
