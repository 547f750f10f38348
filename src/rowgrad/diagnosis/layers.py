"""Layers and activations of a graph: where weights meet data, and what stands between.

Note [layers of a graph]
    A layer is an operation in which a weight (two dimensions or more) meets data: a product, a convolution, a fused
    recurrent layer, a lookup in a table. What is made of parameters alone on the way there (a transposed weight, a
    merged low-rank update, weight norm) belongs to the layer. A weight used several times makes as many layers. The
    level of a layer is the number of layers on the longest path from the data up to and including it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rowgrad.graph.graph import Graph
from rowgrad.graph.values import COMMON, INPUTS
from rowgrad.graph.vertices import Vertex, module_of

PRODUCTS = frozenset(
    {
        "addmm", "addmv", "addbmm", "baddbmm", "bmm", "mm", "mv", "linear", "convolution", "mkldnn_convolution",
        "cudnn_convolution", "embedding", "embedding_bag", "trilinear", "mkldnn_rnn_layer", "cudnn_rnn",
    }
)  # fmt: skip
RECTIFIERS = frozenset({"relu"})
# Activations that flatten out at both ends: the slope in terms of the output o, and the largest there is.
SQUASHING = {"sigmoid": 0.25, "tanh": 1.0}


@dataclass(frozen=True)
class Layer:
    """One use of a weight.

    Attributes:
        name: the module's name, or the weight's where a module has several; `cell.weight_hh #3` for the third use.
        weights: names of the parameters of two dimensions or more that enter.
        node: index of the operation.
        data: (input slot, name under which the operation keeps it) of the data; None where it is kept nowhere.
        level: layers on the longest path from the data up to and including this one.
        inputs: whether the data comes from outside the graph.
    """

    name: str
    weights: tuple[str, ...]
    node: int
    op: str
    data: tuple[int, str] | None
    level: int
    inputs: bool


@dataclass(frozen=True)
class Unit:
    """An activation function: its operation, the layer before it, and the dimension along which units lie."""

    name: str
    node: int
    op: str
    layer: Layer
    dim: int


@dataclass(frozen=True)
class Layers:
    """All layers and activation functions of a graph, in the order of the forward pass."""

    layers: tuple[Layer, ...]
    units: tuple[Unit, ...]
    depth: int


def find_layers(graph: Graph) -> Layers:
    """Read the structure of a graph. See Note [layers of a graph]."""
    made_of = _made_of_parameters(graph)
    found: list[Layer] = []
    level = [0] * len(graph)  # of each vertex
    last: list[Layer | None] = [None] * len(graph)  # the layer last passed on the way to it
    for v in reversed(graph.vertices):
        before = [t[0] for t in v.inputs if t is not None and made_of[t[0]] is None]
        nearest = max(before, key=lambda i: level[i], default=None)
        if nearest is not None:
            level[v.index], last[v.index] = level[nearest], last[nearest]
        layer = _layer(graph, v, made_of)
        if layer is not None:
            level[v.index] += 1
            found.append(replace(layer, level=level[v.index]))
            last[v.index] = found[-1]
    found = _named(found)
    names = {layer.node: layer for layer in found}
    units = tuple(_units(graph, names, last, _before_a_layer(graph, names)))
    return Layers(tuple(found), units, max((layer.level for layer in found), default=0))


def _made_of_parameters(graph: Graph) -> list[tuple[str, ...] | None]:
    """For each vertex the parameters it is computed from, None if data enters."""
    names = {v.index: name for name, v in graph.parameters.items()}
    found: list[tuple[str, ...] | None] = [None] * len(graph)
    for v in reversed(graph.vertices):
        if v.is_leaf:
            found[v.index] = (names[v.index],) if v.index in names else None
            continue
        sources = [found[t[0]] for t in v.inputs if t is not None]
        known = [s for s in sources if s is not None]
        if known and len(known) == len(sources) and not _data_may_enter(graph, v):
            found[v.index] = tuple(dict.fromkeys(name for s in known for name in s))
    return found


def _data_may_enter(graph: Graph, v: Vertex) -> bool:
    """Whether a constant operand may be data: it stands beside a weight in a product, or it makes the result larger."""
    if v.op == "embedding":
        return True
    if all(t is not None for t in v.inputs):
        return False
    sizes = [graph.vertices[t[0]].shapes[t[1]].numel() for t in v.inputs if t is not None]
    return v.op in PRODUCTS or v.shapes[0].numel() > max(sizes)


def _layer(graph: Graph, v: Vertex, made_of: list[tuple[str, ...] | None]) -> Layer | None:
    if v.op not in PRODUCTS or made_of[v.index] is not None:
        return None
    entering = {slot: made_of[t[0]] or () for slot, t in enumerate(v.inputs) if t is not None}
    weights = [n for names in entering.values() for n in names if graph.leaves[n].ndim >= 2]
    if not weights:
        return None
    operands = [(slot, name) for name, slot in INPUTS.get(v.op, COMMON) if not entering.get(slot)]
    node = graph.tape.nodes[v.index]
    data = next(((slot, name) for slot, name in operands if node.has_saved(name)), None)
    outside = data is None or v.inputs[data[0]] is None
    return Layer("", tuple(dict.fromkeys(weights)), v.index, v.op, data, 0, outside)


def _named(layers: list[Layer]) -> list[Layer]:
    modules = Counter(module_of(w) for w in dict.fromkeys(layer.weights for layer in layers) for w in w[:1])
    plain = [_plain_name(layer.weights, modules) for layer in layers]
    total, seen, found = Counter(plain), Counter[str](), []
    for layer, name in zip(layers, plain, strict=True):
        seen[name] += 1
        found.append(replace(layer, name=f"{name} #{seen[name]}" if total[name] > 1 else name))
    return found


def _plain_name(weights: tuple[str, ...], modules: Counter[str]) -> str:
    module = module_of(weights[0])
    return module if module and modules[module] == 1 else weights[0]


def _units(
    graph: Graph, layers: dict[int, Layer], last: list[Layer | None], before_a_layer: list[bool]
) -> Iterator[Unit]:
    for v in reversed(graph.vertices):
        layer = last[v.index]
        if layer is None or not (v.op in RECTIFIERS or v.op in SQUASHING) or not before_a_layer[v.index]:
            continue
        is_image = "convolution" in layer.op and len(v.shapes[0]) > 2
        yield Unit(v.name, v.index, v.op, layers[layer.node], 1 if is_image else len(v.shapes[0]) - 1)


def _before_a_layer(graph: Graph, layers: dict[int, Layer]) -> list[bool]:
    """Whether a layer reads, directly or through other operations, what a vertex holds."""
    found = [False] * len(graph)
    for v in graph.vertices:
        for t in v.inputs:
            if t is not None and (v.index in layers or found[v.index]):
                found[t[0]] = True
    return found
