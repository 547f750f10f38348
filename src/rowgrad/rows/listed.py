"""Examples listed along one dimension, and how ids move them.

Packed sequences, graphs of nodes and edges, routed tokens: which entry is whose follows from ids that the graph holds.
A list tells for each index of one dimension whose entries lie there. The moves below follow a list from the cotangent
of a node's output to that of an input, reading the node's ids. They speak of one call: ids are contents of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from rowgrad.rows.ownership import MIXED, ZERO, Axis, Edge, Entries, Layout, owners_along
from rowgrad.tape import INDEX, Node, Tape, signed

Shape = Sequence[int]
NOBODY = -1


@dataclass(frozen=True, eq=False)
class Listed:
    """Along dimension `dim`, entries at index i belong to example `owners[i]`, or are zero where that is NOBODY."""

    dim: int
    owners: Tensor  # (size of the dimension,), on the CPU
    groupings: dict = field(default_factory=dict, repr=False)  # see `Entries`

    @classmethod
    def of(cls, layout: Axis | Listed, shape: Shape, n_examples: int) -> Listed:
        if isinstance(layout, Listed):
            return layout
        return cls(layout.dim, owners_along(layout, shape, n_examples, torch.device("cpu")))

    @classmethod
    def of_proved(cls, layout: Layout, shape: Shape, n_examples: int) -> Listed | None:
        """None where no dimension alone tells the owners, or there are several."""
        if not shape or layout is MIXED:
            return None
        if layout is ZERO:
            return cls(0, torch.full((shape[0],), NOBODY))
        if isinstance(layout, Axis):
            return cls.of(layout, shape, n_examples)
        assert isinstance(layout, Entries)
        return _of_block(layout.owner.cpu(), 0)

    def merged(self, other: Listed) -> Listed | None:
        """For the sum of two cotangents; None where an index belongs to two examples."""
        if self.dim != other.dim:
            return None
        if self.owners is other.owners or torch.equal(self.owners, other.owners):
            return self
        theirs = self.owners == NOBODY
        both = torch.where(theirs, other.owners, self.owners)
        return Listed(self.dim, both) if bool(((both == other.owners) | (other.owners == NOBODY)).all()) else None

    @cached_property
    def nobody(self) -> Tensor:
        """Indices that belong to no example."""
        return (self.owners == NOBODY).nonzero().squeeze(1)


def laid_out(tape: Tape, edge: Edge, layout: Axis | Listed) -> Axis | Entries:
    """The layout of a cotangent, with an owner for each entry where they are listed."""
    if isinstance(layout, Axis):
        return layout
    node, nr = tape.nodes[edge[0]], edge[1]
    return Entries(_along(layout.owners.to(node.device(nr)), layout.dim, node.shape(nr)), layout.groupings)


def _along(owners: Tensor, dim: int, shape: Shape) -> Tensor:
    return owners.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(tuple(shape))


def _by_index(t: Tensor, dim: int) -> Tensor:
    """(size of the dimension, all the others)."""
    size = t.shape[dim]
    return t.movedim(dim, 0).reshape(size, t.numel() // max(1, size))


Move = Callable[[Tape, Node, int, int, Listed, Shape, Shape], Listed | None]
# (tape, node, output, slot, list of the output's cotangent, its shape, shape of the input); None: not told by this


def _part_of(owners: Tensor, size: int, index: Tensor | slice) -> Tensor:
    """Owners of a dimension of which a part belongs to these, and the rest to nobody."""
    found = owners.new_full((size,), NOBODY)
    found[index] = owners
    return found


def slice_start(node: Node, size: int) -> int:
    """Where a slice of a dimension of this size begins."""
    start = signed(node.attribute("start") or 0)
    return min(max(start + size if start < 0 else start, 0), size)


def place_of_ids(dims: Collection[int]) -> int:
    """Where the dimensions of the ids that index some dimensions come in the result."""
    first = min(dims)
    return first if max(dims) - first == len(dims) - 1 else 0  # apart from each other: first of all


def _slice(tape: Tape, node: Node, nr: int, slot: int, a: Listed, out: Shape, into: Shape) -> Listed | None:
    if node.dim("dim", len(into)) != a.dim:
        return None
    start, step, size = slice_start(node, into[a.dim]), signed(node.attribute("step")), into[a.dim]
    return Listed(a.dim, _part_of(a.owners, size, slice(start, start + step * out[a.dim], step)))


def _split(tape: Tape, node: Node, nr: int, slot: int, a: Listed, out: Shape, into: Shape) -> Listed | None:
    if node.dim("dim", len(into)) != a.dim:
        return None
    sizes = node.attribute("split_sizes") if node.has_saved("split_sizes") else [node.attribute("split_size")] * nr
    start = sum(sizes[:nr])
    return Listed(a.dim, _part_of(a.owners, into[a.dim], slice(start, start + out[a.dim])))


def _cat(tape: Tape, node: Node, nr: int, slot: int, a: Listed, out: Shape, into: Shape) -> Listed | None:
    if len(into) != len(out) or node.dim("dim", len(out)) != a.dim:
        return None
    before, after = (_size(tape, part, a.dim) for part in (node.slots[:slot], node.slots[slot + 1 :]))
    if before is None and after is None:
        return None
    start = before if before is not None else out[a.dim] - into[a.dim] - (after or 0)
    return Listed(a.dim, a.owners[start : start + into[a.dim]])


def _size(tape: Tape, slots: Sequence[tuple[int, int] | None], dim: int) -> int | None:
    """Of several operands along a dimension; None where one is a constant, whose size does not show."""
    if None in slots:
        return None
    shapes = [tape.nodes[t[0]].shape(t[1]) for t in slots if t is not None]
    return sum(shape[dim] for shape in shapes) if all(dim < len(shape) for shape in shapes) else None


def _stack(tape: Tape, node: Node, nr: int, slot: int, a: Listed, out: Shape, into: Shape) -> Listed | None:
    if not into or node.dim("dim", len(out)) != a.dim:
        return None
    return Listed(0, a.owners[slot].expand(into[0]))


def _one(tape: Tape, node: Node, nr: int, slot: int, a: Listed, out: Shape, into: Shape) -> Listed | None:
    """All of one index of a dimension, which belongs to one example."""
    if not len(a.owners) or bool((a.owners != a.owners[0]).any()):
        return None
    dim = node.dim("dim", len(into))
    index = signed(node.attribute("index")) % into[dim] if node.has_saved("index") else nr
    return Listed(dim, _part_of(a.owners[:1], into[dim], slice(index, index + 1)))


def _flip(tape: Tape, node: Node, nr: int, slot: int, a: Listed, out: Shape, into: Shape) -> Listed | None:
    flipped = {signed(d) % len(into) for d in node.attribute("dims")}
    return Listed(a.dim, a.owners.flip(0)) if a.dim in flipped else None


def _view(tape: Tape, node: Node, nr: int, slot: int, a: Listed, out: Shape, into: Shape) -> Listed | None:
    """One dimension that was several."""
    before, size = prod(out[: a.dim]), out[a.dim]
    for begin in range(len(into)):
        for end in range(begin + 2, len(into) + 1):
            if prod(into[:begin]) == before and prod(into[begin:end]) == size:
                return _of_block(a.owners.view(tuple(into[begin:end])), begin)
    return None


def _pad(tape: Tape, node: Node, nr: int, slot: int, a: Listed, out: Shape, into: Shape) -> Listed | None:
    pads = [signed(p) for p in node.attribute("pad")]
    last = 2 * (len(out) - 1 - a.dim)  # pads are listed from the last dimension on
    here = pads[last : last + 2]
    return Listed(a.dim, a.owners[here[0] : here[0] + into[a.dim]]) if here and min(here) >= 0 else None


def _ids(node: Node, name: str = "index") -> Tensor | None:
    """None where reading them would run a checkpointed region again."""
    return None if node.unpacks(name) else node.saved_as_it_is(name).cpu().long()


def _looked_up(owners: Tensor, ids: Tensor, size: int) -> Tensor | None:
    """Owners of `size` rows that were looked up at `ids`; None where one was by several examples."""
    real = owners != NOBODY
    ids, owners = (ids % size)[real], owners[real]  # negative ones count from the end
    found = _part_of(owners, size, ids)
    return found if torch.equal(found[ids], owners) else None


def _ids_along(node: Node, dim: int) -> Tensor | None:
    """Ids for a dimension: given as such, or for each entry and the same along all other dimensions."""
    index = _ids(node)
    if index is None or index.ndim <= 1:
        return None if index is None else index.reshape(-1)
    index = _by_index(index, dim)
    return index[:, 0] if index.numel() and bool((index == index[:, :1]).all()) else None


def _select(tape: Tape, node: Node, nr: int, slot: int, a: Listed, out: Shape, into: Shape) -> Listed | None:
    """Some of the entries along a dimension, by ids: the entries that were selected."""
    is_along = slot == 0 and len(into) == len(out) and node.dim("dim", len(into)) == a.dim
    ids = _ids_along(node, a.dim) if is_along else None
    owners = _looked_up(a.owners, ids, into[a.dim]) if ids is not None else None
    return None if owners is None else Listed(a.dim, owners)


def _add(tape: Tape, node: Node, nr: int, slot: int, a: Listed, out: Shape, into: Shape) -> Listed | None:
    """Added to, or put in the place of, the entries at some ids: first what was there, then what is added."""
    if slot == 0:
        return a
    if len(into) != len(out):
        return None
    if node.dim("dim", len(out)) != a.dim:
        return a if into[a.dim] == out[a.dim] else None
    ids = _ids_along(node, a.dim)
    return Listed(a.dim, a.owners[ids]) if ids is not None and len(ids) == into[a.dim] else None


def _index(tape: Tape, node: Node, nr: int, slot: int, a: Listed, out: Shape, into: Shape) -> Listed | None:
    """The entries looked up at ids, which may stand for several dimensions of either side."""
    found = _block(node, into)
    if slot != 0 or found is None:
        return None
    ids, begin, shape = found
    if not begin <= a.dim < begin + len(shape):
        return None
    owners = _along(a.owners, a.dim - begin, shape).reshape(-1)
    for dim, of_dim in ids.items():
        rows = _looked_up(owners, of_dim.expand(shape).reshape(-1), into[dim])
        if rows is not None:
            return Listed(dim, rows)
    return None


def _put(tape: Tape, node: Node, nr: int, slot: int, a: Listed, out: Shape, into: Shape) -> Listed | None:
    """Values put or added at ids."""
    if slot == 0:
        return a
    found = _block(node, out)
    if found is None:
        return None
    ids, begin, shape = found
    kept = [d for d in range(len(out)) if d not in ids]
    if tuple(into) != (*(out[d] for d in kept[:begin]), *shape, *(out[d] for d in kept[begin:])):
        return None  # broadcast
    if a.dim not in ids:
        place = kept.index(a.dim)
        return Listed(place if place < begin else place + len(shape), a.owners)
    return _of_block(a.owners[ids[a.dim].expand(shape)], begin)


def _of_block(owners: Tensor, begin: int) -> Listed | None:
    """Of some dimensions with an owner for each index, where one of them alone tells it."""
    for dim, size in enumerate(owners.shape):
        along = _by_index(owners, dim)
        told = along.amax(1) if along.numel() else along.new_full((size,), NOBODY)
        if bool(((along == told.unsqueeze(1)) | (along == NOBODY)).all()):
            return Listed(begin + dim, told)
    return None


def _block(node: Node, shape: Shape) -> tuple[dict[int, Tensor], int, torch.Size] | None:
    """Ids by the dimension of a tensor of this shape that they index, the place of their own dimensions among the
    others, and what these are."""
    if node.unpacks("indices"):
        return None
    ids: dict[int, Tensor] = {}
    dim = 0
    for given in node.saved_as_it_is("indices"):
        if given is None:
            dim += 1
            continue
        given = given.cpu()
        is_mask = given.dtype in (torch.bool, torch.uint8)
        for column in given.nonzero(as_tuple=True) if is_mask else (given.long(),):
            ids[dim] = column
            dim += 1
    if not ids or any(dim >= len(shape) for dim in ids):
        return None
    return ids, place_of_ids(ids), torch.broadcast_shapes(*(t.shape for t in ids.values()))


def _pack(tape: Tape, node: Node, nr: int, slot: int, a: Listed, out: Shape, into: Shape) -> Listed | None:
    """Sequences of examples, the longest first, laid step by step one behind the other."""
    sizes = None if node.unpacks("result1") else node.saved_as_it_is("result1")
    if a.dim != 0 or sizes is None:
        return None
    dim = 0 if node.attribute("batch_first") else 1
    ids = torch.cat([torch.arange(n) for n in sizes.tolist()])
    owners = _looked_up(a.owners, ids, into[dim]) if len(ids) == out[0] else None
    return None if owners is None else Listed(dim, owners)


# fmt: off
MOVES: dict[str, Move] = {
    "SliceBackward0":               _slice,
    "SplitBackward0":               _split,
    "UnsafeSplitBackward0":         _split,
    "SplitWithSizesBackward0":      _split,
    "UnsafeSplitWithSizesBackward0": _split,
    "CatBackward0":                 _cat,
    "StackBackward0":               _stack,
    "SelectBackward0":              _one,
    "UnbindBackward0":              _one,
    "FlipBackward0":                _flip,
    "ViewBackward0":                _view,
    "UnsafeViewBackward0":          _view,
    "ReshapeAliasBackward0":        _view,
    "ConstantPadNdBackward0":       _pad,
    INDEX:                          _index,
    "IndexSelectBackward0":         _select,
    "GatherBackward0":              _select,
    "IndexAddBackward0":            _add,
    "IndexCopyBackward0":           _add,
    "IndexPutBackward0":            _put,
    "IndexPutImplBackward0":        _put,
    "ScatterBackward0":             _add,
    "ScatterAddBackward0":          _add,
    "ScatterReduceBackward0":       _add,
    "PackPaddedSequenceBackward0":  _pack,
}
# fmt: on
