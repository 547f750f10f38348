"""Where the examples must lie by the structure of the graph alone, whatever the numbers.

The proof by codes (rows/ownership.py) speaks of one call. It may be kept for later calls only where no tensor's
contents could make it false: where the layout of every cotangent above the uses follows from the losses' own layout
by kinds, shapes and saved attributes. `infer` derives those layouts, one kind at a time, from an allow-list. Where ids
move the examples, it reads them and derives for this call which entry is whose (rows/listed.py). A kind that is not
listed settles nothing, and the graph is proved again at every call.

Note [flat layouts]
    `Axis(dim, inner)` says that entry f in row-major order belongs to (f // stride) % B, stride = inner * (product of
    the sizes behind dim). A reshape keeps f, hence the stride.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from types import MappingProxyType

import torch

from rowgrad.rows.listed import MOVES, Listed, place_of_ids, slice_start
from rowgrad.rows.ownership import Axis, Edge, owners_along
from rowgrad.tape import INDEX, Node, Tape, index_pattern, signed

Shape = Sequence[int]
Transfer = Callable[[Node, int, Axis, Shape, Shape, int], Axis | None]
# (node, slot, layout of the output's cotangent, output shape, input shape, B) -> layout of the input's cotangent


def infer(
    tape: Tape,
    n_examples: int,
    wanted: Sequence[bool] | None = None,
    known: Mapping[Edge, Listed] = MappingProxyType({}),
) -> dict[Edge, Axis | Listed]:
    """Layouts that follow from structure, and those that follow from it with the ids in the graph: lists of owners.
    Edges that are missing are not settled.

    wanted: the nodes of which to tell the layouts, all if None; what the others saved may be gone.
    known: what was proved of this graph, as lists, so that no more than a list follows from it.
    """
    return _Inference(tape, n_examples, wanted or [True] * len(tape), known).found


def opaque(tape: Tape) -> list[Edge]:
    """Edges of which structure tells nothing, since a node of a kind that is not listed sends to them."""
    return list(dict.fromkeys(t for node in tape.nodes if not _is_known(node) for t in node.slots if t is not None))


def _is_known(node: Node) -> bool:
    return node.kind in TRANSFERS or node.kind in SEEING or node.kind in MOVES


class _Inference:
    """From the losses down, each node once all that is sent to it is known."""

    def __init__(self, tape: Tape, n_examples: int, wanted: Sequence[bool], known: Mapping[Edge, Listed]) -> None:
        self._tape, self._n = tape, n_examples
        self._shapes = [
            [node.shape(nr) if node.is_traced(nr) else () for nr in range(node.n_outputs)] for node in tape.nodes
        ]
        self._senders: dict[Edge, list[tuple[int, int]]] = {}
        for node in tape.nodes:
            for slot, target in enumerate(node.slots):
                if target is not None:
                    self._senders.setdefault(target, []).append((node.index, slot))
        self.found: dict[Edge, Axis | Listed] = {**known}
        if tape.root_slot not in self._senders:
            self.found[tape.root_slot] = Axis(0)
        for node in tape.nodes:
            for nr, shape in enumerate(self._shapes[node.index]):
                edge = (node.index, nr)
                if wanted[edge[0]] and edge in self._senders and edge not in known and node.is_traced(nr):
                    parts = [self._sent(tape.nodes[i], slot, shape) for i, slot in self._senders[edge]]
                    layout = self._of_sum(parts, shape)
                    if layout is not None:
                        self.found[edge] = layout

    def _sent(self, node: Node, slot: int, into: Shape) -> Axis | Listed | None:
        """Layout in which one node sends a cotangent to one of its inputs, whatever outputs of it are read."""
        if not _is_known(node):
            return None
        parts: list[Axis | Listed | None] = []
        for nr, out in enumerate(self._shapes[node.index]):
            edge = (node.index, nr)
            if edge in self.found:
                parts.append(self._moved(node, nr, slot, self.found[edge], out, into))
            elif edge in self._senders or edge == self._tape.root_slot:
                return None
        return self._of_sum(parts, into)

    def _of_sum(self, parts: Sequence[Axis | Listed | None], shape: Shape) -> Axis | Listed | None:
        """Layout of a sum of cotangents; None where one is not known or they do not lie alike."""
        total, *rest = parts or [None]
        for part in rest:
            if total is None or part is None:
                return None
            if part != total:
                total = Listed.of(total, shape, self._n).merged(Listed.of(part, shape, self._n))
        return total

    def _moved(
        self, node: Node, nr: int, slot: int, layout: Axis | Listed, out: Shape, into: Shape
    ) -> Axis | Listed | None:
        """Layout of an input's cotangent, as far as one output's goes."""
        transfer = partial(SEEING[node.kind], self._tape) if node.kind in SEEING else TRANSFERS.get(node.kind)
        if transfer is not None and isinstance(layout, Axis):
            axis = _transferred(transfer, node, slot, layout, out, into, self._n)
            if axis is not None:
                return axis
        listed = Listed.of(layout, out, self._n)
        move = MOVES.get(node.kind)
        moved = move(self._tape, node, nr, slot, listed, out, into) if move is not None else None
        if moved is None and transfer is not None:
            moved = _carried(transfer, node, slot, listed, out, into)
        return moved


def _carried(transfer: Transfer, node: Node, slot: int, a: Listed, out: Shape, into: Shape) -> Listed | None:
    """Where a transfer takes each single index of the list's dimension, it takes its owner."""
    n = len(a.owners)
    axis = _transferred(transfer, node, slot, Axis(a.dim), out, into, n) if n else None
    if axis is None:
        return None
    if axis.inner == 1 and into[axis.dim] == n:
        return a if axis.dim == a.dim else Listed(axis.dim, a.owners)
    return Listed(axis.dim, a.owners[owners_along(axis, into, n, torch.device("cpu"))])


def _transferred(transfer: Transfer, node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    try:
        found = transfer(node, slot, a, out, into, n)
    except AttributeError:
        return None  # this version of torch saves other attributes for the kind: nothing is settled
    return found if found and found.dim < len(into) and into[found.dim] % (n * found.inner) == 0 else None


def _stride(layout: Axis, shape: Shape) -> int:
    return layout.inner * prod(shape[layout.dim + 1 :])


def _from_stride(stride: int, shape: Shape, n: int) -> Axis | None:
    """The dimension of `shape` that holds the examples' digit of the row-major index, if one alone does."""
    if not stride or 0 in shape:
        return None  # nothing there
    behind = 1
    for dim in reversed(range(len(shape))):
        size = shape[dim]
        if stride % behind == 0 and size % n == 0 and (behind * size) % (stride * n) == 0:
            return Axis(dim, stride // behind)
        behind *= size
    return None


def _same(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """Elementwise with broadcasting: aligned from the right, not summed over the examples."""
    dim = a.dim - (len(out) - len(into))
    return Axis(dim, a.inner) if dim >= 0 and into[dim] == out[a.dim] else None


def _reshape(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    return _from_stride(_stride(a, out), into, n)


def _permuted(order: Sequence[int], a: Axis) -> Axis:
    """`order[k]` is the input dimension behind output dimension k."""
    return Axis(order[a.dim], a.inner)


def _transpose(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    order = list(range(len(out)))
    i, j = node.dim("dim0", len(out)), node.dim("dim1", len(out))
    order[i], order[j] = j, i
    return _permuted(order, a)


def _permute(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    return _permuted([signed(d) % len(out) for d in node.attribute("dims")], a)


def _t(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    return _permuted(range(len(out))[::-1], a)


def _along(name: str) -> Transfer:
    """Mixes along one dimension only, shape kept: softmax, cumulative sums, sorting."""

    def transfer(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
        return a if len(out) == len(into) and node.dim(name, len(out)) != a.dim and into[a.dim] == out[a.dim] else None

    return transfer


def _reduce(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """Sum, mean, maximum, norm over some dimensions."""
    if slot != 0:
        return None
    dims = node.attribute("dim")
    dims = dims if isinstance(dims, (list, tuple)) else (dims,)
    gone = {signed(d) % len(into) for d in dims or ()} or set(range(len(into)))
    if node.attribute("keepdim"):
        return None if a.dim in gone else a
    kept = [d for d in range(len(into)) if d not in gone]
    return Axis(kept[a.dim], a.inner) if a.dim < len(kept) else None


def _period(a: Axis, n: int) -> int:
    """Entries along the examples' dimension after which it begins with the first example again."""
    return a.inner * n


def _slice(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """A part of one dimension: of the examples' own it must begin where the first example does."""
    if node.dim("dim", len(into)) != a.dim:
        return a if out[a.dim] == into[a.dim] else None
    return a if node.attribute("step") == 1 and slice_start(node, into[a.dim]) % _period(a, n) == 0 else None


def _split(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """All parts of one dimension: of the examples' own each must begin where the first example does."""
    if node.dim("dim", len(into)) != a.dim:
        return a if out[a.dim] == into[a.dim] else None
    sizes = node.attribute("split_sizes") if node.has_saved("split_sizes") else [node.attribute("split_size")]
    return a if all(size % _period(a, n) == 0 for size in sizes) else None


def _joined(tape: Tape, node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """Concatenation: along the examples' own dimension each part must begin where the first example does."""
    if len(into) != len(out) or node.dim("dim", len(out)) != a.dim:
        return a if len(into) == len(out) and out[a.dim] == into[a.dim] else None
    shapes = [t and tape.nodes[t[0]].shape(t[1]) for t in node.slots[:slot]]
    before = [shape[a.dim] if shape and a.dim < len(shape) else None for shape in shapes]
    return a if all(size is not None and size % _period(a, n) == 0 for size in before) else None


def _take(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """One index of a dimension (select, unbind): the output has a dimension less."""
    dim = node.dim("dim", len(into))
    return Axis(a.dim + (a.dim >= dim), a.inner)


def _stack(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    dim = node.dim("dim", len(out))
    return None if a.dim == dim else Axis(a.dim - (a.dim > dim), a.inner)


def _pad(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    pads = node.attribute("pad") if node.has_saved("pad") else node.attribute("padding")
    last = 2 * (len(out) - 1 - a.dim)  # pads are listed from the last dimension on
    return a if not any(pads[last : last + 2]) else None


def _avoiding(name: str) -> Transfer:
    def transfer(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
        dims = node.attribute(name)
        dims = dims if isinstance(dims, (list, tuple)) else (dims,)
        return a if dims and a.dim not in {signed(d) % len(out) for d in dims} and tuple(out) == tuple(into) else None

    return transfer


def _mm(first: int) -> Transfer:
    """Products of (stacks of) matrices, operands in slots `first` and `first + 1`; a summand before them."""

    def transfer(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
        if slot < first:
            return _same(node, slot, a, out, into, n)
        rows, columns = len(out) - 2, len(out) - 1
        mixed = columns if slot == first else rows
        return (
            a if slot <= first + 1 and len(into) == len(out) and a.dim != mixed and into[a.dim] == out[a.dim] else None
        )

    return transfer


def _mv(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    return a if slot == 0 else None


def _batch(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """Convolution, pooling, group normalization: dimension 0 is a batch, everything else may mix."""
    return a if slot == 0 and a.dim == 0 and len(out) == len(into) and out[0] == into[0] else None


def _images(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """Images and where they are looked at, both by example."""
    return a if a.dim == 0 and out[0] == into[0] else None


def _spatial(n_dims: int) -> Transfer:
    def transfer(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
        batched = len(out) == len(into) == n_dims + 2
        return a if batched and slot == 0 and a.dim <= 1 and out[a.dim] == into[a.dim] else None

    return transfer


def _layer_norm(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    return a if slot == 0 and a.dim < len(out) - len(node.attribute("normalized_shape")) else None


def _batch_norm(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """Examples along the channels is what instance normalization makes of it, with repeated scales and shifts."""
    if slot == 0:
        return a if a.dim == 1 or not node.attribute("training") else None
    return Axis(0, a.inner) if a.dim == 1 else None


def _pooled_alike(tape: Tape, node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """Strides set anew on means over whole images, which lie in memory as these strides say."""
    target, channels = node.slots[slot], out[1] if len(out) == 4 else 0
    is_mean = target is not None and tape.nodes[target[0]].kind == "MeanBackward1"
    is_pooled = tuple(out) == tuple(into) and tuple(out[2:]) == (1, 1)
    strides = tuple(node.attribute("stride")) == (channels, 1, channels, channels)
    return a if is_mean and is_pooled and strides and not node.attribute("storage_offset") else None


def _transformed(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """Fourier transforms."""
    dims = {signed(d) % len(out) for d in node.attribute("dim")}
    return a if a.dim not in dims and out[a.dim] == into[a.dim] else None


def _ctc(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """Sequences (T, B, classes) to losses (B,)."""
    return Axis(1, a.inner) if slot == 0 and len(into) == 3 and out[0] == into[1] else None


def _parts(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """Real and imaginary parts along a last dimension of their own, or back."""
    return a if a.dim < min(len(out), len(into)) and out[a.dim] == into[a.dim] else None


def _attention(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    return a if len(out) == len(into) == 4 and a.dim <= 1 and out[a.dim] == into[a.dim] else None


def _recurrent(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """Sequences (T, B, .) and states (B, .); the slots between them are the weights."""
    if slot not in (0, 5, 6) or a.dim != len(out) - 2 or into[-2] != out[-2]:
        return None
    return Axis(len(into) - 2, a.inner)


def _unreduced(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    return _same(node, slot, a, out, into, n) if node.attribute("reduction") == 0 else None


def _nll(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    if slot != 0 or node.attribute("reduction") != 0 or len(into) != len(out) + 1:
        return None
    return Axis(a.dim + (a.dim >= 1), a.inner)


def _gather(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    dim = node.dim("dim", len(into))
    return a if slot == 0 and len(out) == len(into) and a.dim != dim and out[a.dim] == into[a.dim] else None


def _indexed(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    """Tensors of ids for some dimensions. Of the others nothing is moved, nor where the ids only count."""
    ids = {d: t for d, t in enumerate(index_pattern(node.fn)) if t is not None}
    if slot != 0 or not ids or any(dtype not in (torch.long, torch.int) for _, dtype, _ in ids.values()):
        return None  # masks
    begin, n_dims = place_of_ids(ids), max(ndim for ndim, _, _ in ids.values())
    if begin <= a.dim < begin + n_dims:
        counting = [d for d, (_, _, n_ids) in ids.items() if n_dims == 1 and n_ids == into[d] == out[a.dim]]
        return Axis(counting[0], a.inner) if counting else None
    kept = [d for d in range(len(into)) if d not in ids]
    return Axis(kept[a.dim if a.dim < begin else a.dim - n_dims], a.inner)


def _repeat(node: Node, slot: int, a: Axis, out: Shape, into: Shape, n: int) -> Axis | None:
    repeats = node.attribute("repeats")
    return _same(node, slot, a, out, into, n) if repeats[a.dim] == 1 else None


def _numbered(names: str, transfer: Transfer, numbers: int = 4) -> dict[str, Transfer]:
    return {f"{name}Backward{i}": transfer for name in names.split() for i in range(numbers)}


# fmt: off
# With broadcasting: each entry of an output depends on the entries of the inputs in its place.
ELEMENTWISE = frozenset(_numbered(
    "Abs Acos Acosh Add Addcdiv Addcmul Asin Asinh Atan Atan2 Atanh Bernoulli Celu Ceil Clamp ClampMax ClampMin"
    " Clone Copy Copysign Cos Cosh Digamma Div Elu Erf Erfc Erfinv Exp Exp2 Expm1 Fill Floor Fmod Frac Gelu"
    " Hardsigmoid Hardswish Hardtanh Hypot LeakyRelu Lerp Lgamma Log Log10 Log1P Log2 LogSigmoid LogAddExp"
    " Logaddexp Logit MaskedFill Maximum Minimum Mish Mul NanToNum NativeDropout Neg Pow PreluKernel Reciprocal"
    " Relu Relu6 Remainder Round Rrelu RreluWithNoise Rsqrt Rsub Selu Sgn Sigmoid Sign Silu Sin Sinc Sinh Softplus"
    " Softshrink Hardshrink Sqrt Square Sub Tan Tanh Threshold ToCopy Tril Triu Where Xlogy Expand Alias"
    " Real Imag Conj Complex Polar Angle"
    " FakeQuantizePerTensorAffineCachemask FakeQuantizePerTensorAffineCachemaskTensorQparams"
    # of gradients that are part of the loss
    " TanhBackward SigmoidBackward SoftplusBackward SiluBackward GeluBackward EluBackward LeakyReluBackward"
    " MishBackward HardtanhBackward LogSigmoidBackward ThresholdBackward", _same))

TRANSFERS: dict[str, Transfer] = {
    **dict.fromkeys(ELEMENTWISE, _same),
    **_numbered("ViewAsReal ViewAsComplex", _parts),
    **_numbered("FftR2C FftC2C FftC2R", _transformed),
    **_numbered("View UnsafeView ReshapeAlias Unsqueeze Squeeze", _reshape),
    **_numbered("Transpose", _transpose),
    **_numbered("Permute", _permute),
    **_numbered("T", _t),
    **_numbered("Softmax SafeSoftmax LogSoftmax Cumsum LogCumSumExp Logcumsumexp Cumprod Sort", _along("dim")),
    **_numbered("Glu", lambda nd, s, a, out, into, n: a if nd.dim("dim", len(out)) != a.dim else None),
    "TopkBackward0":              _along("dim"),
    "SumBackward1":               _reduce,
    "MeanBackward1":              _reduce,
    "VarBackward0":               _reduce,
    "StdBackward0":               _reduce,
    "AmaxBackward0":              _reduce,
    "AminBackward0":              _reduce,
    "MaxBackward0":               _reduce,
    "MinBackward0":               _reduce,
    "LogsumexpBackward0":         _reduce,
    "LinalgVectorNormBackward0":  _reduce,
    "NormBackward1":              _reduce,
    "ProdBackward1":              _reduce,
    "MedianBackward1":            _reduce,
    **_numbered("Slice", _slice),
    **_numbered("Split UnsafeSplit SplitWithSizes UnsafeSplitWithSizes", _split),
    **_numbered("Select Unbind", _take),
    **_numbered("Stack", _stack),
    **_numbered("ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D"
                " ReplicationPad3D", _pad),
    **_numbered("Flip Roll", _avoiding("dims")),
    **_numbered("Repeat", _repeat),
    INDEX:                        _indexed,
    **_numbered("Gather IndexSelect", _gather),
    "MmBackward0":                _mm(0),
    "BmmBackward0":               _mm(0),
    "AddmmBackward0":             _mm(1),
    "BaddbmmBackward0":           _mm(1),
    "MvBackward0":                _mv,
    "ConvolutionBackward0":       _batch,
    "NativeGroupNormBackward0":   _batch,
    "NativeLayerNormBackward0":   _layer_norm,
    "NativeBatchNormBackward0":   _batch_norm,
    "MaxPool1DBackward0":         _spatial(1),
    "AvgPool2DBackward0":         _spatial(2),
    "MaxPool2DWithIndicesBackward0": _spatial(2),
    "AvgPool3DBackward0":         _spatial(3),
    "MaxPool3DWithIndicesBackward0": _spatial(3),
    "AdaptiveAvgPool2DBackward0": _spatial(2),
    "AdaptiveMaxPool2DBackward0": _spatial(2),
    "AdaptiveAvgPool3DBackward0": _spatial(3),
    **_numbered("UpsampleNearest1D UpsampleNearestExact1D UpsampleLinear1D", _spatial(1)),
    **_numbered("UpsampleNearest2D UpsampleNearestExact2D UpsampleBilinear2D UpsampleBicubic2D", _spatial(2)),
    **_numbered("UpsampleNearest3D UpsampleNearestExact3D UpsampleTrilinear3D", _spatial(3)),
    **_numbered("PixelShuffle PixelUnshuffle Im2Col Col2Im", _batch),
    "GridSampler2DBackward0":     _images,
    "GridSampler3DBackward0":     _images,
    "ScaledDotProductFlashAttentionForCpuBackward0":  _attention,
    "ScaledDotProductFlashAttentionBackward0":        _attention,
    "ScaledDotProductEfficientAttentionBackward0":    _attention,
    "ScaledDotProductCudnnAttentionBackward0":        _attention,
    "MkldnnRnnLayerBackward0":    _recurrent,
    "MseLossBackward0":           _unreduced,
    "SmoothL1LossBackward0":      _unreduced,
    "HuberLossBackward0":         _unreduced,
    "BinaryCrossEntropyBackward0": _unreduced,
    "BinaryCrossEntropyWithLogitsBackward0": _unreduced,
    "SoftMarginLossBackward0":    _unreduced,
    "NllLossBackward0":           _nll,
    "NllLoss2DBackward0":         _nll,
    "CtcLossBackward0":           _ctc,
    "CtcLossBackward1":           _ctc,
}
# Transfers that look at the nodes around, too.
SEEING: dict[str, Callable[[Tape, Node, int, Axis, Shape, Shape, int], Axis | None]] = {
    "CatBackward0":               _joined,
    "AsStridedBackward1":         _pooled_alike,
}
# fmt: on
