"""One sweep in reverse topological order, for every quantity that adds up over paths.

Note [one dynamic program]
    Aggarwal's eq. 4, S(i) = sum over j of z(i, j) S(j), visits each variable once, after all that were computed from
    it, and needs two operations of its values: to add them and to send one through an operation. With cotangents and
    local derivatives it is backpropagation; with integers and the identity it counts paths; with the maximum in place
    of the sum it finds the longest; with {label: cotangent} it splits the gradient by classes of paths.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from rowgrad.graph.vertices import Edge
from rowgrad.tape import Tape

S = TypeVar("S")


class Variable(Protocol):
    """What a sweep asks of a variable: a node of the tape, a vertex, or one scalar unit of it."""

    @property
    def index(self) -> int: ...
    @property
    def slots(self) -> Sequence[Edge | None]: ...
    @property
    def n_outputs(self) -> int: ...
    @property
    def is_leaf(self) -> bool: ...


V = TypeVar("V", bound=Variable)
V_co = TypeVar("V_co", bound=Variable, covariant=True)
V_contra = TypeVar("V_contra", bound=Variable, contravariant=True)


class Net(Protocol[V_co]):
    """Variables with inputs, each before those it was computed from."""

    @property
    def nodes(self) -> Sequence[V_co]: ...


class Algebra(Protocol[V_contra, S]):
    """What a sweep does with its values."""

    def add(self, a: S, b: S) -> S:
        """Two values that meet at a variable."""
        ...

    def send(self, node: V_contra, own: Sequence[S | None]) -> Sequence[S | None]:
        """From the values at an operation's outputs to those of each of its inputs."""
        ...


def walk(
    net: Net[V], seeds: Mapping[Edge, S], algebra: Algebra[V, S], *, needed: Collection[int] | None = None
) -> Iterator[tuple[V, list[S | None]]]:
    """Each node that the seeds reach, with the value S of each of its outputs, as soon as these are complete.

    Args:
        net: a tape, or the variables of a graph at another level of detail.
        seeds: values to start from, by (node index, output number). One at a variable inside the graph is added to
            what arrives there.
        needed: indices of the nodes to go through; default all.
    """
    inbox: dict[Edge, S] = {}
    for node in net.nodes:
        own = [inbox.pop((node.index, nr), None) for nr in range(node.n_outputs)]
        for nr in range(node.n_outputs):
            if (node.index, nr) in seeds:
                own[nr] = _joined(algebra, own[nr], seeds[node.index, nr])
        if all(s is None for s in own) or (needed is not None and node.index not in needed):
            continue
        yield node, own
        if not node.is_leaf:
            for target, s in zip(node.slots, algebra.send(node, own), strict=True):
                if target is not None and s is not None:
                    inbox[target] = _joined(algebra, inbox.get(target), s)


def sweep(
    net: Net[V],
    seeds: Mapping[Edge, S],
    algebra: Algebra[V, S],
    arrived: Callable[[V, list[S | None]], None],
    *,
    needed: Collection[int] | None = None,
) -> None:
    """As `walk`, to the end: `arrived` is called with each node and its values."""
    for node, own in walk(net, seeds, algebra, needed=needed):
        arrived(node, own)


def _joined(algebra: Algebra[V, S], a: S | None, b: S) -> S:
    return b if a is None else algebra.add(a, b)


class Cotangents:
    """Backpropagation: cotangents, and the operations' own local derivatives."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def send(self, node: Variable, own: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [_dense(z) for z in self.tape.local_gradients(self.tape.nodes[node.index], own)]


def _dense(z: Tensor | None) -> Tensor | None:
    return z.to_dense() if z is not None and z.is_sparse else z


def above(net: Net[Variable], wanted: Collection[int]) -> set[int]:
    """The nodes on paths to the wanted ones, themselves included."""
    needed = set(wanted)
    for node in reversed(net.nodes):
        if any(t is not None and t[0] in needed for t in node.slots):
            needed.add(node.index)
    return needed


def value_at(net: Net[V], edge: Edge, seeds: Mapping[Edge, S], algebra: Algebra[V, S]) -> S | None:
    """S at one variable, by a sweep through what lies above it; None where no path leads."""
    found: list[S | None] = [None]

    def arrived(node: V, own: list[S | None]) -> None:
        if node.index == edge[0]:
            found[0] = own[edge[1]]

    sweep(net, seeds, algebra, arrived, needed=above(net, [edge[0]]))
    return found[0]
