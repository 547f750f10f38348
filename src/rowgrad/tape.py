"""Reading autograd's graph: nodes, edges, saved values, one engine pass, one node called by itself.

This is the only file that knows autograd's private names. A `Tape` is a snapshot of the graph behind a tensor, its
nodes in topological order from the tensor towards the leaves.

Note [a node called by itself]
    `node(*cotangents)` is the local derivative, un-reduced: broadcasting is not summed away, a complex gradient of a
    real input keeps its imaginary part, the dtype may be wider than the input's. The engine repairs all three between
    nodes, and so does `Tape.local_gradients`. Calling a node runs no hook and frees nothing. `AccumulateGrad` must
    never be called: it would write `.grad`.

Note [a gradient that is written to]
    The engine gives one tensor to all who are to have it. Where the backward of a custom Function writes to it in
    place, the others read what was written, if their turn comes later or if they keep it: other layers, and what a pass
    hands over. Who else holds it cannot be told for certain, so Functions are given copies. What they return is copied,
    too: it may be memory that they write to again when they are called the next time. Hooks cannot be kept apart in
    this way: what is handed over, and what is kept of it, is compared with its version at the time.

Note [one answer]
    Graphs with custom Functions are passed through several times, to prove whose each entry is and to find the rows.
    A Function that changes what it works with gives other numbers each time. So its answers to the seed of the first
    pass, which is asked again after the proof and by the last pass, are compared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils import checkpoint

from rowgrad.answers import agree, answered_otherwise, fingerprint
from rowgrad.errors import FreedGraphError, GraphError, OpaqueGraphError

_T = TypeVar("_T")
# By node, fingerprints of what it was given and of what it answered.
_Answers = dict[int, tuple[list[Tensor | None], list[Tensor | None]]]
ACCUMULATE = "torch::autograd::AccumulateGrad"
KNOWN_NODES = 2**17  # of all structures that are kept, about 1 kB each: several hundred lengths of a text's batch
TRIED_STRUCTURES = 4  # used last: a graph is compared with them before it is read node by node
WAITING_BYTES = 2**20  # of cotangents, and what is recomputed for them, that a pass collects before it hands them over
COPY_SLICES = "torch::autograd::CopySlices"
INDEX = "IndexBackward0"
_PYTHON_NODE = torch.autograd.function.BackwardCFunction
_NOTHING = nullcontext()


@dataclass(slots=True, eq=False)
class Node:
    """One operation of the graph, seen from its backward side.

    `slots[i]` is where the gradient of the i-th input goes: (node index, output number), or None for a constant.
    """

    fn: Any
    index: int
    kind: str
    slots: tuple[tuple[int, int] | None, ...]
    variable: Tensor | None

    def __repr__(self) -> str:
        return f"{self.kind.rsplit(':', 1)[-1]}#{self.index}"

    @property
    def is_leaf(self) -> bool:
        return self.variable is not None

    @property
    def is_python(self) -> bool:
        return isinstance(self.fn, _PYTHON_NODE)

    @property
    def time(self) -> int:
        """When the operation was recorded: a count within its thread; leaves carry the largest number."""
        return self.fn._sequence_nr()

    @property
    def n_outputs(self) -> int:
        return len(self.fn._input_metadata)

    def shape(self, output_nr: int = 0) -> torch.Size:
        """Shape of one output of the forward operation, which is the shape of its cotangent."""
        shape = self.fn._input_metadata[output_nr].shape
        return torch.Size(shape)

    def dtype(self, output_nr: int = 0) -> torch.dtype:
        return self.fn._input_metadata[output_nr].dtype

    def device(self, output_nr: int = 0) -> torch.device:
        return self.fn._input_metadata[output_nr].device

    def is_traced(self, output_nr: int) -> bool:
        """False for an output that is not a differentiable tensor and has no metadata worth reading."""
        metadata = self.fn._input_metadata[output_nr]
        return metadata.dtype.is_floating_point or metadata.dtype.is_complex

    def saved(self, name: str) -> Any:
        """A value the forward operation kept. Under checkpointing each access recomputes: read once."""
        if not self.unpacks(name) or isinstance(_group(), _Group):
            return self.saved_as_it_is(name)
        with RecomputedOnce():  # in somebody's pass, or a group of the user's, it would be taken from them
            return self.saved_as_it_is(name)

    def saved_as_it_is(self, name: str) -> Any:
        """As `saved`, where it does not unpack, or within `RecomputedOnce`."""
        with engine_errors():
            found = getattr(self.fn, f"_saved_{name}")
        if isinstance(found, (tuple, list)):
            return [t.detach() if isinstance(t, Tensor) else t for t in found]
        return found.detach() if isinstance(found, Tensor) else found

    def unpacks(self, name: str) -> bool:
        """Whether code runs to read it: a checkpointed region is recomputed, an offloaded tensor fetched.

        False where this PyTorch has no way to read it in the middle of a pass that reads it, too.
        """
        if _ExecGroup is object:
            return False
        with engine_errors():
            raw = getattr(self.fn, f"_raw_saved_{name}", None)
        return any(map(_unpacks, raw)) if isinstance(raw, (tuple, list)) else _unpacks(raw)

    def has_saved(self, name: str) -> bool:
        return hasattr(type(self.fn), f"_saved_{name}")

    def attribute(self, name: str) -> Any:
        return getattr(self.fn, f"_saved_{name}")

    def dim(self, name: str, ndim: int) -> int:
        """A saved dimension, wrapped to 0..ndim-1 (autograd shows negative ones as unsigned)."""
        return signed(self.attribute(name)) % max(ndim, 1)


def _unpacks(raw: Any) -> bool:
    return getattr(raw, "unpack_hook", None) is not None


def signed(value: int) -> int:
    """Undo the unsigned view in which autograd shows negative integers."""
    return value - 2**64 if value >= 2**63 else value


_readers: WeakKeyDictionary[type, Callable[[Any], Any] | None] = WeakKeyDictionary()  # functions may be local classes


def _attributes(kind: type) -> Callable[[Any], Any] | None:
    """Reads all saved values of a node that are not tensors: dims, sizes, flags, scalars."""
    if kind not in _readers:
        _readers[kind] = _reader(kind)
    return _readers[kind]


def _reader(kind: type) -> Callable[[Any], Any] | None:
    if kind.__name__ == INDEX:
        return index_pattern
    names = dir(kind)
    tensors = {name.replace("_raw_saved_", "_saved_") for name in names if name.startswith("_raw_saved_")}
    plain = [n for n in names if n.startswith("_saved_") and n not in tensors and n != "_saved_tensors"]
    return attrgetter(*plain) if plain else None


def index_pattern(fn: Any) -> tuple[tuple[int, torch.dtype, int] | None, ...]:
    """Which dimensions are indexed: for each None, or the dimensions and dtype of its tensor of ids and how many they
    are if they only count (0, 1, 2, ...), else 0. Ids that count are part of a structure; others are contents.

    Nothing for a graph that was freed, which the pass complains of.
    """
    try:
        with RecomputedOnce():
            found = fn._saved_indices
        return tuple([None if ids is None else (ids.ndim, ids.dtype, _counted(ids)) for ids in found])
    except RuntimeError:
        return ()


def _counted(ids: Tensor) -> int:
    if ids.ndim != 1 or ids.dtype != torch.long:
        return 0
    return len(ids) if torch.equal(ids, torch.arange(len(ids), device=ids.device)) else 0


_PLAIN = {int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
_metadata = attrgetter("shape", "dtype", "device")


def _hashable(value: Any) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return repr(value)


def _repeatable(value: Any) -> bool:
    """Whether a value read again can be compared as it is; others are compared as `_hashable` has them."""
    if isinstance(value, (list, tuple)):
        return all(map(_repeatable, value))
    return type(value) in _PLAIN or (type(value) is float and value == value)


class _Facts(NamedTuple):
    """What is known of a node without its tensors."""

    cls: type
    kind: str
    slots: tuple[tuple[int, int] | None, ...]
    read: Callable[[Any], Any] | None
    attributes: Any
    metadata: list[tuple[Any, ...]]

    @classmethod
    def of(cls, node: Node) -> _Facts:
        read = _attributes(type(node.fn))
        attributes = None if read is None else read(node.fn)
        if read is not None and not _repeatable(attributes):
            read = _read_hashable(read)
            attributes = read(node.fn)
        return cls(type(node.fn), node.kind, node.slots, read, attributes, list(map(_metadata, _described(node.fn))))

    @property
    def signature(self) -> tuple:
        return self.kind, self.slots, _hashable(self.attributes), _hashable(self.metadata)


def _read_hashable(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda fn: _hashable(read(fn))


def _described(fn: Any) -> Sequence[Any]:
    """What has the shape, dtype and device of each output of a node."""
    return (fn.variable,) if fn.name() == ACCUMULATE else fn._input_metadata


def _is_nested(node: Node) -> bool:
    if node.variable is not None:
        return node.variable.is_nested
    return any(m.is_nested_tensor for m in node.fn._input_metadata)


def may_run_python(node: Node) -> bool:
    return _may_run_python(type(node.fn), node.kind)


def _may_run_python(cls: type, kind: str) -> bool:
    return issubclass(cls, _PYTHON_NODE) or kind == COPY_SLICES


class Structure:
    """Everything about a graph but the contents of its tensors; there is one for all graphs that are alike in it.

    Each parameter has one leaf, so that the slots also tell where one is used again. Holds no part of a graph.

    Attributes:
        kept: what else is to be kept for graphs of this structure, as long as it is.
    """

    def __init__(self, facts: Sequence[_Facts], key: int) -> None:
        self.kept: dict[Any, Any] = {}
        self.key = key
        self.kinds = [f.kind for f in facts]
        self.slots = [f.slots for f in facts]
        # a class that is called as the kind is of no other
        self._steps: list[tuple[Any, ...]] = [(*f, f.kind == ACCUMULATE, f.cls.__name__ == f.kind) for f in facts]
        self.runs_python = any(_may_run_python(f.cls, f.kind) for f in facts)

    def is_of(self, facts: Sequence[_Facts]) -> bool:
        known = [(cls, kind, slots, attributes, meta) for cls, kind, slots, _, attributes, meta, *_ in self._steps]
        return known == [(f.cls, f.kind, f.slots, f.attributes, f.metadata) for f in facts]

    def found_in(self, root: Any) -> tuple[list[Any], list[Tensor | None]] | None:
        """The nodes of a graph and the variables of its leaves, by index; None if its structure is another."""
        n = len(self._steps)
        fns: list[Any] = [None] * n
        variables: list[Tensor | None] = [None] * n
        fns[0] = root
        for i, (cls, kind, slots, read, attributes, metadata, is_leaf, is_told) in enumerate(self._steps):
            fn = fns[i]
            if type(fn) is not cls:
                return None
            if is_leaf:
                variable = variables[i] = fn.variable
                if _metadata(variable) != metadata[0]:
                    return None
                continue
            targets = fn.next_functions
            if len(targets) != len(slots) or not (is_told or fn.name() == kind):
                return None
            for (target, nr), slot in zip(targets, slots, strict=True):
                if target is None or slot is None:
                    if target is not slot:
                        return None
                    continue
                index, expected_nr = slot
                if nr != expected_nr:
                    return None
                if fns[index] is None:
                    fns[index] = target
                elif fns[index] is not target:
                    return None
            if read is not None and read(fn) != attributes:
                return None
            if list(map(_metadata, fn._input_metadata)) != metadata:
                return None
        return (fns, variables) if len(set(fns)) == n else None


_known: OrderedDict[int, Structure] = OrderedDict()  # by the hash of root and signature, the one used last at the end
_recent: tuple[tuple[int, Structure], ...] = ()  # with the root's output, the one used last first; replaced as a whole


def forget_structures() -> None:
    """Read every graph node by node again."""
    _known.clear()
    _recall(())


def _recall(recent: Iterable[tuple[int, Structure]]) -> None:
    global _recent
    _recent = tuple(recent)[:TRIED_STRUCTURES]


def _recognized(output: Tensor) -> tuple[Structure, list[Any], list[Tensor | None]] | None:
    """One of the structures used last, if the graph has it, with the graph's nodes and the variables of its leaves."""
    recent = _recent
    for i, (nr, structure) in enumerate(recent):
        found = structure.found_in(output.grad_fn) if nr == output.output_nr else None
        if found is not None:
            if i:
                _recall((recent[i], *recent[:i], *recent[i + 1 :]))
                _use(structure)
            return structure, *found
    return None


def _use(structure: Structure) -> None:
    with suppress(KeyError):  # another thread dropped it
        _known.move_to_end(structure.key)


def _remember(structure: Structure) -> None:
    """And let go of those used long ago, if they are too many."""
    _known[structure.key] = structure
    _use(structure)
    n_nodes = sum([len(s.kinds) for s in list(_known.values())])
    while n_nodes > KNOWN_NODES and len(_known) > 1:
        n_nodes -= len(_known.popitem(last=False)[1].kinds)


class Watch(NamedTuple):
    """What a pass must be asked to show the cotangents of some edges; it holds no part of the graph."""

    edges: tuple[tuple[int, int], ...]
    passed: tuple[int, ...]  # nodes that the pass executes
    ends: tuple[tuple[int, int], ...]  # edges at which it ends
    lowest: tuple[tuple[int, int], ...]  # the nodes of the ends, with their number of outputs


class Tape:
    """The graph behind one output or several, as a list of nodes, each before the nodes its gradients go to."""

    def __init__(self, output: Tensor, *others: Tensor) -> None:
        self.output = output
        found = None if others else _recognized(output)
        self.nodes: list[Node]
        if found is None:
            order = _topological_order(list(dict.fromkeys(o.grad_fn for o in (output, *others))))
            index = {fn: i for i, fn in enumerate(order)}
            self._structure = None
            self.nodes = [_node(fn, i, index) for i, fn in enumerate(order)]
            self.root_slot = (index[output.grad_fn], output.output_nr)
        else:
            self._structure, order, variables = found
            kinds, slots = self._structure.kinds, self._structure.slots
            self.nodes = list(map(Node, order, range(len(order)), kinds, slots, variables))
            self.root_slot = (0, output.output_nr)
        self._shared: dict[Any, Any] = {}
        self._asked: Tensor | None = None  # the first pass's seed
        self._answers: _Answers = {}  # to it, of nodes that run code of a user's
        self.leaves = {id(node.variable): node.index for node in self.nodes if node.is_leaf}

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def _index(self) -> dict[Any, int]:
        return {node.fn: node.index for node in self.nodes}

    @property
    def structure(self) -> Structure:
        """Of a graph with one output. Further graphs of the structure are recognized by it, which is quicker."""
        if self._structure is None:
            facts = [_Facts.of(node) for node in self.nodes]
            key = hash((self.root_slot[1], *[f.signature for f in facts]))
            found = _known.get(key)
            if found is not None and found.is_of(facts):
                _use(found)
            else:
                found = Structure(facts, key)
                _remember(found)
            self._structure = found
            _recall([(self.root_slot[1], found), *(r for r in _recent if r[1] is not found)])
        return self._structure

    @property
    def runs_python(self) -> bool:
        """Whether a node's backward is Python code, which may do anything, or a write to a view, which may hold it."""
        if self._structure is not None:
            return self._structure.runs_python
        return any(map(may_run_python, self.nodes))

    def _functions_apart(self, seed: Tensor) -> AbstractContextManager[None]:
        """See Note [a gradient that is written to], Note [one answer]."""
        if not self.runs_python:
            return _NOTHING
        if self._asked is None:
            self._asked = seed
        answers = self._answers if seed is self._asked else None
        return _apart([n for n in self.nodes if n.is_python], answers)

    def refuse_hidden(self) -> None:
        """
        Raises:
            OpaqueGraphError: a node runs a graph of its own when it is called, which nothing here can see.
            GraphError: a nested tensor, whose sizes its nodes do not tell.
        """
        if self._structure is not None:
            return  # refused before it was kept
        for node in self.nodes:
            if node.kind == "CheckpointFunctionBackward":
                raise OpaqueGraphError(
                    f"{node!r}: reentrant checkpointing hides the parameters inside it. Use "
                    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                )
            if _is_nested(node):
                raise GraphError(
                    f"{node!r} works on a nested tensor, of which rows are not known. Pad the examples to one length "
                    "(torch.nested.to_padded_tensor) and mask what is padding"
                )

    def edge_of(self, tensor: Tensor) -> tuple[int, int] | None:
        """(node index, output number) of a tensor of this graph, None for any other."""
        index = self.leaves.get(id(tensor)) if tensor.grad_fn is None else self._index.get(tensor.grad_fn)
        return None if index is None else (index, tensor.output_nr)

    def shared(self, key: Any, make: Callable[[], _T]) -> _T:
        """Something made once for several uses of one node, dropped with the tape."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def cotangents(
        self,
        edges: Sequence[tuple[int, int]],
        seed: Tensor,
        *,
        retain_graph: bool = True,
        root: Tensor | None = None,
    ) -> list[Tensor | None]:
        """d<seed, output>/d(edge) for many edges in one engine pass that forms no parameter's gradient.

        `root`: stands for the output, right above it.
        """
        if not edges:
            return []
        wanted = tuple([GradientEdge(self.nodes[i].fn, nr) for i, nr in edges])
        with engine_errors(), self._functions_apart(seed):
            return list(_pass((self.output if root is None else root,), (seed,), wanted, retain_graph))

    def watch(self, edges: Sequence[tuple[int, int]]) -> Watch:
        """How to see the cotangents of these edges in one pass, for `stream`."""
        wanted = sorted({i for i, _ in edges})
        lowest = self._lowest(wanted)
        return Watch(
            tuple(edges),
            tuple([i for i in wanted if i not in lowest]),
            tuple([e for e in edges if e[0] in lowest]),
            tuple([(i, self.nodes[i].n_outputs) for i in sorted(lowest)]),
        )

    def stream(
        self,
        watch: Watch,
        seed: Tensor,
        arrived: Callable[[int, Sequence[Tensor | None]], None],
        *,
        retain_graph: bool,
        passing: Callable[[int], int] | None = None,
    ) -> None:
        """As `cotangents`, but hands over each node's cotangents soon after they come and keeps none of them.

        Nodes with wanted nodes below them are executed by the pass, so a hook before them sees their cotangents; the
        lowest ones are not, and their cotangents are the pass's result.

        Args:
            watch: of this graph, or of another with the same signature.
            passing: called right before the pass executes a node, when it still has what it saved. Returns how many
                bytes it took for what is to be done with the node's cotangents.
        """
        root: Tensor | None = None
        waiting = _Waiting(arrived, passing)
        handles = []
        try:
            if watch.passed:
                root, node = _above(self.output)
                handles.append(node.register_prehook(waiting.begin))
                for i in watch.passed:
                    handles.append(self.nodes[i].fn.register_prehook(partial(waiting.take, i)))
            cotangents = self.cotangents(watch.ends, seed, retain_graph=retain_graph, root=root)
        finally:
            for handle in handles:
                handle.remove()
        waiting.hand_over()
        found = dict(zip(watch.ends, cotangents, strict=True))
        for i, n_outputs in watch.lowest:
            arrived(i, [found.get((i, nr)) for nr in range(n_outputs)])

    def _lowest(self, wanted: Sequence[int]) -> set[int]:
        """Those of the wanted nodes below which there is no other."""
        members, below, lowest = set(wanted), [False] * len(self.nodes), set()
        for node in reversed(self.nodes):
            under = any(t is not None and below[t[0]] for t in node.slots)
            if node.index in members and not under:
                lowest.add(node.index)
            below[node.index] = under or node.index in members
        return lowest

    def local_gradients(
        self, node: Node, cotangents: Sequence[Tensor | None], *, differentiable: bool = False
    ) -> list[Tensor | None]:
        """Gradient of each input of one node, repaired as the engine does. See Note [a node called by itself].

        `differentiable`: the results have a graph behind them that leads to the cotangents.
        """
        raw = self.raw_local_gradients(node, cotangents, differentiable=differentiable)
        return [
            None if gradient is None or target is None else self._repair(gradient, target)
            for gradient, target in zip(raw, node.slots, strict=True)
        ]

    def raw_local_gradients(
        self, node: Node, cotangents: Sequence[Tensor | None], *, differentiable: bool = False
    ) -> list[Tensor | None]:
        """As the node returns them: not summed over broadcast dimensions, one entry per slot."""
        if node.is_leaf:
            raise AssertionError(f"bug in rowgrad, please report: {node!r} was about to be called")
        if _running() != _NO_PASS:
            raise GraphError(
                f"asked in the middle of a backward pass (from a hook, or a custom Function's backward), where "
                f"{node!r} answers only what that pass asks of it. Ask before the pass, or after it"
            )
        with torch.set_grad_enabled(differentiable), engine_errors(), RecomputedOnce():
            if node.is_python:
                return self._call_python(node, cotangents)
            result = node.fn(*cotangents)
        result = list(result) if isinstance(result, (tuple, list)) else [result]
        return result + [None] * (len(node.slots) - len(result))

    def _call_python(self, node: Node, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """With copies, to which it may write: other nodes may be called with the same tensors."""
        filled = [
            torch.zeros(node.shape(nr), dtype=node.dtype(nr), device=node.device(nr)) if c is None else c.clone()
            for nr, c in enumerate(cotangents)
        ]
        result = node.fn.apply(*filled)
        result = list(_copied(result if isinstance(result, (tuple, list)) else [result]))
        needs = list(node.fn.needs_input_grad)
        if len(result) == len(node.slots):
            return result
        differentiable = [r for r, n in zip(result, needs, strict=False) if n]
        live = [i for i, target in enumerate(node.slots) if target is not None]
        if len(differentiable) != len(live):
            raise OpaqueGraphError(
                f"{node!r} returned {len(differentiable)} gradients for {len(live)} differentiable inputs; rowgrad "
                "cannot tell which belongs to which. Pass the tensors as separate arguments of the Function"
            )
        aligned: list[Tensor | None] = [None] * len(node.slots)
        for i, gradient in zip(live, differentiable, strict=True):
            aligned[i] = gradient
        return aligned

    def _repair(self, gradient: Tensor, target: tuple[int, int]) -> Tensor:
        node, nr = self.nodes[target[0]], target[1]
        dtype = node.dtype(nr)
        if gradient.is_sparse:
            return gradient.to(dtype)
        if gradient.is_complex() and not dtype.is_complex:
            gradient = gradient.real
        shape = node.shape(nr)
        if gradient.shape != shape:
            gradient = gradient.sum_to_size(shape)
        return gradient.to(dtype)


class _Waiting:
    """Cotangents of one pass on their way, handed over a few at a time: where there is little to do, to change between
    the engine and Python at every node takes longer than either."""

    def __init__(
        self, arrived: Callable[[int, Sequence[Tensor | None]], None], passing: Callable[[int], int] | None
    ) -> None:
        self._arrived, self._passing = arrived, passing
        self._pass = _NO_PASS
        self._waiting: list[tuple[int, Sequence[Tensor | None], list[int]]] = []
        self._n_bytes = 0

    def begin(self, _: object) -> None:
        self._pass = _running()

    def take(self, node: int, cotangents: Sequence[Tensor | None]) -> None:
        """A hook before a node, under which the engine records nothing. A node of several graphs may be passed by
        others at the same time.

        What is large need not wait: nobody can have written to it yet.
        """
        if _running() != self._pass:
            return
        n_bytes = 0 if self._passing is None else self._passing(node)
        for z in cotangents:
            if z is not None:
                n_bytes += z.numel() * z.element_size()
        if n_bytes > WAITING_BYTES and not self._waiting:
            self._arrived(node, cotangents)
            return
        self._n_bytes += n_bytes
        self._waiting.append((node, cotangents, list(map(version, cotangents))))
        if self._n_bytes > WAITING_BYTES:
            self.hand_over()

    def hand_over(self) -> None:
        waiting, self._waiting, self._n_bytes = self._waiting, [], 0
        waiting.reverse()
        while waiting:  # none of them is kept longer than it takes
            node, cotangents, versions = waiting.pop()
            if list(map(version, cotangents)) != versions:
                raise written_to()
            self._arrived(node, cotangents)


def version(t: Tensor | None) -> int:
    """Larger once a tensor, or one that shares its memory, was written to."""
    return 0 if t is None or t.is_inference() else t._version


@contextmanager
def _apart(nodes: Iterable[Node], answers: _Answers | None) -> Iterator[None]:
    """These nodes are given copies, and what they return is copied, and compared with what they answered before."""
    handles = []
    for node in nodes:
        handles.append(node.fn.register_prehook(_copied))
        handles.append(node.fn.register_hook(partial(_answered, node, answers)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _answered(
    node: Node, answers: _Answers | None, found: Sequence[Tensor | None], given: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """A hook after a node. What a hook above gives it otherwise each time is not its own doing."""
    if answers is not None:
        asked, now = list(map(fingerprint, given)), list(map(fingerprint, found))
        asked_before, before = answers.setdefault(node.index, (asked, now))
        if agree(asked_before, asked) and not agree(before, now):
            raise answered_otherwise(repr(node))
    return _copied(found)


def _copied(cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple([None if z is None else z.clone() for z in cotangents])


def written_to() -> OpaqueGraphError:
    """What to raise where a cotangent that the pass handed over is no longer what it was."""
    return OpaqueGraphError(
        "the gradient that arrived at a layer was written to in the middle of the pass: a hook, or the backward of a "
        "custom autograd Function, changes in place what it is given, and others were given it, too. Let it return a "
        "new tensor"
    )


_ExecGroup: Any = getattr(checkpoint, "GraphExecGroup", object)  # older PyTorch has none
_group: Callable[[], Any] = getattr(torch._C, "_get_graph_exec_group", lambda: None)
_set_group: Callable[[Any], None] = getattr(torch._C, "_set_graph_exec_group", lambda _: None)


class _Group(_ExecGroup):
    """A group of ours: what it reads of a checkpointed region is recomputed once."""


class _Within:
    """In this group, None for none, and then in the one around again, which may be the user's."""

    def __init__(self, group: _Group | None) -> None:
        self._group = group
        self._around: Any = None

    def __enter__(self) -> None:
        self._around = _group()
        _set_group(self._group)

    def __exit__(self, *_: object) -> None:
        _set_group(self._around)


class RecomputedOnce(_Within):
    """Within, a checkpointed region is recomputed once for all that is read of it, each saved value at most once.

    Outside of passes PyTorch recomputes it for each value. What is recomputed and not read stays until the pass frees
    the node that saved it, or with the graph.
    """

    def __init__(self) -> None:
        super().__init__(_Group())


class engine_errors:
    """Turn autograd's complaint about a freed graph, or one that cannot be kept, into ours."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if not isinstance(error, RuntimeError):
            return
        text = str(error)
        if "second time" in text or "already been freed" in text:
            raise FreedGraphError(
                "the graph behind the losses was already freed by an earlier backward pass. Call rowgrad first, or "
                "keep the graph with retain_graph=True"
            ) from error
        if "backward an extra time" in text:
            raise OpaqueGraphError(
                "a selectively checkpointed region of the graph (context_fn=...) answers one backward pass, and "
                "separating the examples needs several. Checkpoint that region as a whole"
            ) from error
        if "donated buffers" in text:
            raise OpaqueGraphError(
                "a compiled region of the graph frees its buffers after one backward pass, and separating the examples "
                "needs several. Set torch._functorch.config.donated_buffer = False before compiling, or leave that "
                "region eager"
            ) from error


def gradients(output: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """As `torch.autograd.grad` with `allow_unused`, but not announced to function modes: those around this call see
    what the backward pass itself calls (recomputed layers, custom backwards), as far as it runs in this thread."""
    return _pass((output,), (torch.ones_like(output),), tuple(inputs), False)


def _pass(
    outputs: tuple[Tensor, ...], seeds: tuple[Tensor, ...], inputs: tuple[Any, ...], retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """What `torch.autograd.grad` does once it has looked at its arguments, which takes it as long as a small pass."""
    run = torch.autograd.graph._engine_run_backward
    with _Within(None):  # a group answers one pass, and that is the user's
        return run(outputs, seeds, retain_graph, False, inputs, allow_unreachable=True, accumulate_grad=False)


_running = torch._C._current_graph_task_id  # pyright: ignore[reportPrivateImportUsage]
_NO_PASS = -1


def _above(output: Tensor) -> tuple[Tensor, Any]:
    """The same values, with a node of their own that no other graph shares."""
    with torch.inference_mode(False), torch.enable_grad():
        root = output.view_as(output)
    return root, root.grad_fn


def is_differentiable(tensors: Iterable[Tensor]) -> bool:
    """False where a custom function marked `once_differentiable` stands in the graph: the engine goes around it, and
    what it would have added is missing without an error."""
    roots = [t.grad_fn for t in tensors if t.grad_fn is not None]
    return all(fn.name() != "torch::autograd::Error" for fn in _topological_order(roots))


def _node(fn: Any, index: int, index_of: Mapping[Any, int]) -> Node:
    kind = fn.name()
    if kind == ACCUMULATE:
        return Node(fn, index, kind, (), fn.variable)
    return Node(fn, index, kind, tuple([None if f is None else (index_of[f], nr) for f, nr in fn.next_functions]), None)


def clock() -> int:
    """The number that the next operation recorded by this thread will carry, see `Node.time`."""
    return torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateImportUsage]


def _topological_order(roots: Sequence[Any]) -> list[Any]:
    """Consumers before producers: reversed depth-first post-order, without recursion."""
    order: list[Any] = []
    entered: set[Any] = set()
    left: set[Any] = set()
    stack = list(reversed(roots))
    while stack:
        fn = stack[-1]
        if fn not in entered:
            entered.add(fn)
            stack += [child for child, _ in reversed(fn.next_functions) if child is not None and child not in entered]
            continue
        stack.pop()
        if fn not in left:
            left.add(fn)
            order.append(fn)
    return order[::-1]
