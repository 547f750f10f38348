"""Which entry of a gradient is wrong, and which operation makes it so.

Note [following a fault]
    The derivative of the loss with respect to a value inside the network can be checked like a parameter's: the value
    is moved where the forward pass makes it, and the cotangent says what should happen. On a chain of operations from
    a parameter whose gradient is wrong to the loss there is a last value whose cotangent is wrong, with all that is
    computed from it right: what reads it is at fault. Halving the chain finds it in few forward passes; if a value
    beside the chain is wrong too, the search goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from rowgrad.checking.landscape import Landscape, Step, random_unit
from rowgrad.checking.probe import Probe, Prober
from rowgrad.graph.graph import Graph
from rowgrad.graph.scopes import Scopes, trace
from rowgrad.graph.vertices import Edge
from rowgrad.parameters import Params

# One entry


def wrong_entry(prober: Prober, name: str, gradient: Tensor, generator: torch.Generator) -> tuple[int, ...] | None:
    """A single wrong entry of a parameter's gradient, by halving; None where no half shows the fault by itself."""
    entries = range(gradient.numel())
    while len(entries) > 1:
        middle = len(entries) // 2
        halves = entries[:middle], entries[middle:]
        wrong = next((half for half in halves if not prober.along(name, gradient, half, generator).ok), None)
        if wrong is None:
            return None
        entries = wrong
    return prober.along(name, gradient, entries[0], generator).place


# One operation


class _Place(NamedTuple):
    """Where a value stands in the forward pass: among the results of a call of a PyTorch function, or its arguments."""

    call: int
    is_result: bool
    position: int


class _Calls(TorchFunctionMode):
    """Numbers the calls of PyTorch's functions; says where values stand, or moves them there."""

    def __init__(self, moves: Mapping[_Place, Tensor]) -> None:
        super().__init__()
        self.moves, self.n = moves, 0
        self.seen: dict[_Place, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.n += 1
        number = self.n
        given = self._through(number, False, (args, kwargs or {}))
        return self._through(number, True, func(*given[0], **given[1]))

    def _through(self, number: int, is_result: bool, values: Any) -> Any:
        flat, spec = tree_flatten(values)
        for position, value in enumerate(flat):
            place = _Place(number, is_result, position)
            if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
                continue
            if place in self.moves:
                flat[position] = value + self.moves[place]
            elif not self.moves and value.grad_fn is not None:
                self.seen[place] = value
        return tree_unflatten(flat, spec)


class _Inside(Landscape):
    """The same loss as a function of a value inside the network; a step is {"": direction}, moved at some places."""

    def __init__(self, whole: Landscape, places: Sequence[_Place]) -> None:
        self.run, self.parameters, self.held, self.origin = whole.run, whole.parameters, whole.held, whole.origin
        self.places = places

    @contextmanager
    def moved(self, step: Step, t: float) -> Iterator[None]:
        with _Calls(dict.fromkeys(self.places, t * step[""])):
            yield


class _Search:
    """One recorded forward pass, and the derivatives of the loss with respect to the values in it."""

    def __init__(self, prober: Prober, model: Params, generator: torch.Generator) -> None:
        self.prober, self.generator = prober, generator
        landscape = prober.landscape
        watch = trace(model) if isinstance(model, nn.Module) else nullcontext(Scopes())
        with watch as scopes, _Calls({}) as calls:
            losses = landscape.losses()
        self.graph = Graph(losses, landscape.parameters, trace=scopes if isinstance(model, nn.Module) else None)
        self.places: dict[Edge, list[_Place]] = {}
        for place, value in calls.seen.items():
            edge = self.graph.tape.edge_of(value)
            if edge is not None and self.graph.vertices[edge[0]].shapes[edge[1]] == value.shape:
                self.places.setdefault(edge, []).append(place)
        self.readers: dict[int, list[int]] = {}
        for v in self.graph.vertices:
            for target in v.inputs:
                if target is not None and v.index not in self.readers.setdefault(target[0], []):
                    self.readers[target[0]].append(v.index)
        self.cotangents = torch.ones_like(losses)
        self._known: dict[int, bool | None] = {}

    def fault(self, name: str) -> tuple[int, list[int]]:
        """The last variable whose derivative is wrong, and the nearest ones behind it that are right."""
        wrong = self.graph.parameters[name].index
        while True:
            wrong = self._last_wrong(self._chain(wrong))
            behind = self._next(wrong)
            beside = next((i for i in behind if self._is_wrong(i)), None)
            if beside is None:
                return wrong, behind
            wrong = beside

    def _last_wrong(self, chain: list[int]) -> int:
        """By halving a chain whose first variable is wrong and whose last, the loss, is right."""
        while len(chain) > 2:
            middle = len(chain) // 2
            answer = self._is_wrong(chain[middle])
            if answer is None:
                del chain[middle]
            else:
                chain = chain[middle:] if answer else chain[: middle + 1]
        return chain[0]

    def _is_wrong(self, index: int) -> bool | None:
        """Whether a variable's derivative is wrong; None where it cannot be moved, or moving it tells nothing."""
        if index not in self._known:
            verdicts = {self._verdict((index, nr)) for nr in range(self.graph.vertices[index].n_outputs)}
            told = verdicts - {"blind", "kink"}
            self._known[index] = None if not told else told != {"ok"}
        return self._known[index]

    def _verdict(self, edge: Edge) -> str:
        if edge not in self.places:
            return "blind"
        z = self.graph.tape.cotangents([edge], self.cotangents)[0]
        z = torch.zeros_like(self.graph.ones(edge)) if z is None else z
        step = random_unit(z.numel(), self.generator).view(z.shape).to(z.device)
        results = [place for place in self.places[edge] if place.is_result][:1]
        inside = _Inside(self.prober.landscape, results or self.places[edge])
        probe = Probe("", None, float((z.double() * step).sum()), 0.0, 0.0, "blind")
        return replace(self.prober, landscape=inside)(probe, {"": step}, 1.0, 0.0).verdict

    def _chain(self, start: int) -> list[int]:
        """The variables on a longest path from one to the loss."""
        steps: dict[int, tuple[int, int | None]] = {}  # index: length of the longest path to a loss, next on it
        for v in self.graph.vertices:
            ways = [(steps[r][0] + 1, r) for r in self.readers.get(v.index, [])]
            steps[v.index] = max(ways, default=(0, None))
        path, at = [start], steps[start][1]
        while at is not None:
            path.append(at)
            at = steps[at][1]
        return path

    def _next(self, index: int) -> list[int]:
        """The nearest variables computed from one of which something can be told, or the loss."""
        found, seen, open_ = [], set(), list(self.readers.get(index, []))
        while open_:
            i = open_.pop()
            if i in seen:
                continue
            seen.add(i)
            if i not in self.readers or self._is_wrong(i) is not None:
                found.append(i)
            else:
                open_ += self.readers[i]
        return sorted(found, reverse=True)

    def between(self, start: int, ends: Sequence[int]) -> list[int]:
        """Operations behind a variable up to some others, these included, in the order of the forward pass."""
        inside, open_ = set(), [start]
        while open_:
            for r in self.readers.get(open_.pop(), []):
                if r not in inside:
                    inside.add(r)
                    if r not in ends:
                        open_.append(r)
        return sorted(inside, reverse=True)


def locate(prober: Prober, names: Sequence[str], model: Params, generator: torch.Generator) -> str:
    """Where the fault lies that makes the gradients of these parameters wrong, in words."""
    search = _Search(prober, model, generator)
    absent = [name for name in names if name not in search.graph.parameters]
    if absent:
        return (
            f"before {absent[0]}: it changes the loss, but no path leads there from the loss. Look for detach(), "
            "no_grad(), .data, .item() or numpy() between the two"
        )
    wrong, behind = search.fault(min(names, key=lambda k: search.graph.parameters[k].index))
    operations = [repr(search.graph.vertices[i].name) for i in search.between(wrong, behind)]
    return (
        f"in what is computed from {search.graph.vertices[wrong].name!r}: {', '.join(operations)}, or in a use of it "
        "outside of the graph (detach(), no_grad(), .data)"
    )
