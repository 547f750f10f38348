"""What one backward sweep found: the cotangent of every variable, and statistics of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rowgrad.graph.variables import Key, Variables
from rowgrad.graph.vertices import Edge, Vertex

# Operations that change each entry by itself, as activations do.
ELEMENTWISE = frozenset(
    {
        "celu", "clamp", "clamp_max", "clamp_min", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh",
        "leaky_relu", "log_sigmoid", "mish", "prelu_kernel", "relu", "rrelu_with_noise", "sigmoid", "silu", "softplus",
        "softshrink", "tanh", "threshold",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Activation:
    """An activation function in the decoupled view: its input and output as two variables (Aggarwal 2018, part III).

    delta and Delta obey delta = Delta . Phi' (eqs. 5 and 6).
    """

    pre: Vertex
    post: Vertex
    delta: Tensor  # derivative with respect to the value before the activation
    Delta: Tensor  # derivative with respect to the value behind it


@dataclass(frozen=True)
class Size:
    """How large one variable and its cotangent are: root mean squares, nan for a value nobody kept."""

    vertex: Vertex
    value: float
    cotangent: float
    share_zero: float  # of the cotangent's entries
    finite: bool


class Flow(Mapping[str, Tensor]):
    """Derivatives of the losses with respect to every variable, by name: S(i, o) of eq. 4.

    `flow[key]` takes a name, an index, a `Vertex` or the live tensor; `flow.at(key, nr)` one output of several. A
    parameter that no path reaches has a zero gradient in `gradients` and is no key.

    >>> import torch, rowgrad
    >>> w = torch.tensor(0.0, requires_grad=True)
    >>> flow = rowgrad.Graph(2 * w.sigmoid(), {"w": w}).backward()
    >>> flow["w"], flow["after w: mul"]
    (tensor(0.5000), tensor(1.))
    >>> [(float(a.delta), float(a.Delta)) for a in flow.activations]
    [(0.5, 2.0)]
    """

    def __init__(self, graph: Variables, cotangents: Mapping[Edge, Tensor]) -> None:
        self.graph = graph
        self.cotangents = dict(cotangents)

    def __getitem__(self, key: Key) -> Tensor:
        return self._of(self.graph.edge(key))

    def __iter__(self) -> Iterator[str]:
        return (self.graph.vertices[i].name for i in sorted({i for i, _ in self.cotangents}))

    def __len__(self) -> int:
        return len({i for i, _ in self.cotangents})

    def at(self, key: Key, output: int = 0) -> Tensor:
        """The cotangent of one output of an operation with several."""
        return self._of((self.graph.edge(key)[0], output))

    def _of(self, edge: Edge) -> Tensor:
        if edge not in self.cotangents:
            raise KeyError(f"{self.graph.vertices[edge[0]].name}: no cotangent arrived at output {edge[1]}")
        return self.cotangents[edge]

    @property
    def gradients(self) -> dict[str, Tensor]:
        """{parameter: its gradient}, zeros where no path leads."""
        leaves = self.graph.leaves
        edges = {name: (v.index, 0) for name, v in self.graph.parameters.items()}
        return {
            name: self.cotangents[edges[name]] if edges.get(name) in self.cotangents else torch.zeros_like(p)
            for name, p in leaves.items()
        }

    @property
    def activations(self) -> list[Activation]:
        """delta and Delta of every activation function, in the order of the forward pass."""
        found = []
        for post in reversed(self.graph.vertices):
            source = post.inputs[0] if post.op in ELEMENTWISE else None
            edge = (post.index, 0)
            if source is not None and source in self.cotangents and edge in self.cotangents:
                pre = self.graph.vertices[source[0]]
                found.append(Activation(pre, post, self.cotangents[source], self.cotangents[edge]))
        return found

    @property
    def sizes(self) -> list[Size]:
        """Of every variable, in the order of the forward pass; the first output of each."""
        return [self._size(v) for v in reversed(self.graph.vertices) if (v.index, 0) in self.cotangents]

    def _size(self, vertex: Vertex) -> Size:
        z, value = self.cotangents[vertex.index, 0], self.graph.value(vertex)
        return Size(
            vertex,
            float("nan") if value is None else rms(value),
            rms(z),
            float((z == 0).double().mean()) if z.numel() else 0.0,
            bool(z.isfinite().all()),
        )


def rms(t: Tensor) -> float:
    """Root mean square, in float64."""
    return (
        float(torch.linalg.vector_norm(t, dtype=torch.float64 if t.dtype.is_floating_point else None))
        / max(t.numel(), 1) ** 0.5
    )
