"""Which entries an operation's output entries read: its form at the level of scalar units.

Note [the form of an operation]
    An entry of an output reads entries of the inputs, whether its derivative in them is zero or not: a ReLU that is off
    reads its input, a maximum reads all it compares. This is a property of the kind of operation and of its shapes, so
    it stands in a table; the derivatives z(i, j) on these edges come from the operation itself. Where an operation has
    a single output entry it reads all there is, whatever it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Size, Tensor

from rowgrad.errors import GraphError
from rowgrad.graph.flow import ELEMENTWISE
from rowgrad.graph.tangents import push
from rowgrad.graph.vertices import MOVES, operation
from rowgrad.tape import Node, Tape, signed

Reads = dict[
    int, Tensor
]  # by slot, shape (*output's shape, reads of an entry): flat entries of that input, -1 for none


@dataclass(frozen=True)
class Call:
    """One output of one operation of a recorded graph."""

    tape: Tape
    node: Node
    output: int

    @property
    def shape(self) -> Size:
        return self.node.shape(self.output)

    def inputs(self) -> dict[int, Size]:
        """Shapes of the inputs that have a derivative, by slot."""
        nodes = self.tape.nodes
        return {slot: nodes[t[0]].shape(t[1]) for slot, t in enumerate(self.node.slots) if t is not None}

    def ones(self) -> list[Tensor | None]:
        """Cotangents: ones at this output, nothing at others."""
        node, nr = self.node, self.output
        found: list[Tensor | None] = [None] * node.n_outputs
        found[nr] = torch.ones(node.shape(nr), dtype=node.dtype(nr), device=node.device(nr))
        return found


def _entries(shape: Size) -> Tensor:
    return torch.arange(shape.numel()).view(shape)


def _each(call: Call) -> Reads:
    """Each entry by itself, inputs broadcast; or a mean or sum of that."""
    if call.shape.numel() == 1:
        return _all(call)
    return {slot: _entries(shape).expand(call.shape)[..., None] for slot, shape in call.inputs().items()}


def _all(call: Call) -> Reads:
    return {slot: _entries(s).reshape(*call.shape, s.numel()) for slot, s in call.inputs().items()}


def _product(*slots: int) -> Callable[[Call], Reads]:
    """Sums of products over one dimension, of the inputs in two slots; what stands in a third is added."""
    first, second = slots

    def reads(call: Call) -> Reads:
        *batch, n, m = (*call.shape, *(1,) * (2 - len(call.shape)))
        found: Reads = {}
        for slot, shape in call.inputs().items():
            if slot == first:
                k = shape.numel() // max(prod(batch) * n, 1)
                lines = _entries(shape).reshape(*batch, n, 1, k).expand(*batch, n, m, k)
            elif slot == second:
                k = shape.numel() // max(prod(batch) * m, 1)
                lines = _entries(shape).reshape(*batch, k, m).mT[..., None, :, :].expand(*batch, n, m, k)
            else:
                lines = _entries(shape).expand(call.shape)[..., None]
            found[slot] = lines.reshape(*call.shape, lines.shape[-1])
        return found

    return reads


def _reduced(call: Call) -> Reads:
    """All entries along the operation's dimensions."""
    return {slot: _lines(call, shape).reshape(*call.shape, -1) for slot, shape in call.inputs().items()}


def _within(call: Call) -> Reads:
    """All entries of the line that the output's entry stands in."""
    found: Reads = {}
    for slot, shape in call.inputs().items():
        dim = _dims(call.node, shape)[0]
        found[slot] = _lines(call, shape).unsqueeze(dim).expand(*shape, -1)
    return found


def _lines(call: Call, shape: Size) -> Tensor:
    """Entries along the operation's dimensions as the last one, the others before it."""
    dims = _dims(call.node, shape)
    rest = [d for d in range(len(shape)) if d not in dims]
    return _entries(shape).permute(*rest, *dims).reshape(*(shape[d] for d in rest), -1)


def _dims(node: Node, shape: Size) -> list[int]:
    """The dimensions that an operation names, all where it names none."""
    dim = node.attribute("dim") if node.has_saved("dim") else None
    dims = (dim,) if isinstance(dim, int) else dim
    return sorted({signed(d) % max(len(shape), 1) for d in dims} if dims and shape else range(len(shape)))


def _picked(call: Call) -> Reads:
    """The entry of each line that was picked: where the derivative is not zero."""
    (z,) = (z for z in call.tape.local_gradients(call.node, call.ones()) if z is not None)
    found: Reads = {}
    for slot, shape in call.inputs().items():
        lines = torch.where(z != 0, _entries(shape), -1)
        found[slot] = lines.reshape(-1) if call.shape.numel() == 1 else lines
    return {slot: lines.reshape(*call.shape, -1) for slot, lines in found.items()}


BASE = 128  # whole numbers below it are exact in every dtype


def _moved(call: Call) -> Reads:
    """Entries that are only moved: numbered, they are sent through the operation digit by digit."""
    found: Reads = {}
    for slot, shape in call.inputs().items():
        moved = _forward(call, slot, torch.ones(shape))
        if not ((moved == 0) | (moved == 1)).all():
            raise GraphError(f'{call.node!r} scales what it moves and has no unit form. Use level="vector"')
        left, scale, read = _entries(shape), 1, moved.long() - 1
        while scale < shape.numel():
            read += scale * _forward(call, slot, left % BASE).long()
            left, scale = left // BASE, scale * BASE
        found[slot] = read[..., None]
    return found


def _forward(call: Call, slot: int, numbers: Tensor) -> Tensor:
    target = call.node.slots[slot] or (0, 0)
    of = call.tape.nodes[target[0]]
    tangents: list[Tensor | None] = [None] * len(call.node.slots)
    tangents[slot] = numbers.to(of.device(target[1]), of.dtype(target[1]))
    pushed = push(call.tape, call.node, call.ones(), tangents).tangents[call.output]
    return torch.zeros(call.shape) if pushed is None else pushed.cpu()


_FUNCTIONS = [
    "abs", "acos", "acosh", "add", "addcdiv", "addcmul", "asin", "asinh", "atan", "atan2", "atanh", "cos", "cosh",
    "div", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "fmax", "fmin", "frac", "hypot", "lerp", "lgamma",
    "log", "log10", "log1p", "log2", "logaddexp", "logit", "masked_fill", "maximum", "minimum", "mul",
    "native_dropout", "neg", "pow", "reciprocal", "rsqrt", "rsub", "sin", "sinc", "sinh", "sqrt", "sub", "tan",
    "where", "xlogy", "binary_cross_entropy", "binary_cross_entropy_with_logits", "huber_loss", "mse_loss",
    "smooth_l1_loss", "soft_margin_loss",
]  # fmt: skip
_REDUCTIONS = ["amax", "amin", "linalg_vector_norm", "logsumexp", "max", "mean", "min", "prod", "std", "sum", "var"]
_SELECTIONS = ["constant_pad_nd", "embedding", "gather", "index", "index_select", "tril", "triu"]
FORMS: dict[str, Callable[[Call], Reads]] = {
    **dict.fromkeys([*ELEMENTWISE, *_FUNCTIONS], _each),
    **dict.fromkeys([*MOVES, *_SELECTIONS], _moved),
    **dict.fromkeys(["mm", "bmm", "mv", "dot"], _product(0, 1)),
    **dict.fromkeys(["addmm", "baddbmm", "addmv"], _product(1, 2)),
    **dict.fromkeys(_REDUCTIONS, _reduced),
    **dict.fromkeys(["log_softmax", "softmax"], _within),
    "nll_loss": _picked,
}
MOVED = frozenset(op for op, form in FORMS.items() if form is _moved)


def reads_of(call: Call, name: str) -> Reads:
    """What each entry of an output reads.

    Raises:
        GraphError: an operation whose entries cannot be told apart, or a complex one.
    """
    targets = [t for t in call.node.slots if t is not None]
    if any(call.tape.nodes[i].dtype(nr).is_complex for i, nr in [*targets, (call.node.index, call.output)]):
        raise GraphError(f'{name} is complex and has no unit form. Use level="vector"')
    form = FORMS.get(operation(call.node))
    if form is None and call.shape.numel() == 1:
        form = _all
    if form is None:
        raise GraphError(
            f"{name} {tuple(call.shape)} has no unit form: {operation(call.node)} is none of the operations that can "
            "be expanded (linear layers, functions of single entries, products, sums, means, maxima, softmax, "
            'selections). Use level="vector", or write the operation in terms of these'
        )
    return form(call)
