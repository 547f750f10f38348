"""`Graph`: the computational graph of a live loss, to be looked at, swept and asked about."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

from torch import Tensor

from rowgrad.errors import GraphError
from rowgrad.graph import paths
from rowgrad.graph.decomposition import By, decompose
from rowgrad.graph.draw import Drawable
from rowgrad.graph.flow import Flow
from rowgrad.graph.levels import Level, Vectors
from rowgrad.graph.local import LocalJacobian, local_jacobian
from rowgrad.graph.paths import Path
from rowgrad.graph.scopes import Scopes
from rowgrad.graph.sweep import Cotangents, sweep
from rowgrad.graph.variables import Key
from rowgrad.graph.vertices import Edge
from rowgrad.parameters import Params
from rowgrad.tape import Node


class Graph(Drawable):
    """The computational graph behind a loss: vector variables joined by local derivatives (Aggarwal 2018, ch. 3.2).

    Reads the graph that the forward pass left behind; runs no hook, changes nothing, frees nothing. Make it before
    `backward()`, or keep the graph with `retain_graph=True`.

    Args:
        loss: the output, of any shape; several as a sequence.
        model: whose parameters give the names: a module, `optimizer.param_groups`, tensors or a mapping of names to
            tensors; default None, then leaves have no names.
        trace: what `rowgrad.trace` yielded for this forward pass; default None, then modules are inferred.
    Attributes:
        vertices: all variables, the loss first, each before those it was computed from.
        parameters: {name: vertex} of those in the graph.
        leaves: {name: tensor} of all parameters that `model` named, in its order, also those no path reaches.
        outputs: (vertex index, output number) of each loss.
    Raises:
        NoGraphError: a loss has no graph: detached, under `no_grad`, or itself a parameter.

    >>> import torch, rowgrad
    >>> w = torch.tensor(2.0, requires_grad=True)
    >>> graph = rowgrad.Graph((w * w).cos(), {"w": w})
    >>> [v.name for v in graph.vertices]
    ['after w: cos', 'w: mul', 'w']
    >>> graph.backward()["w"]
    tensor(3.0272)
    """

    def __init__(
        self, loss: Tensor | Sequence[Tensor], model: Params | None = None, *, trace: Scopes | None = None
    ) -> None:
        super().__init__(loss, model, trace=trace)
        self.level: Level = Vectors(self)

    def backward(self, seeds: Mapping[Key, Tensor] | None = None) -> Flow:
        """S(i), the derivative of the losses with respect to every variable (eq. 4), by one sweep of our own.

        Args:
            seeds: {variable: tensor of its shape}. At a loss it replaces the seed of ones; at a variable inside the
                graph it is added to what arrives there, which is how a penalty on hidden units enters.
        Returns:
            A `Flow`: the cotangent of each variable, gradients of parameters among them. Holds all of them: as much
            memory as the activations.
        Raises:
            GraphError: a seed whose shape is not its variable's.
            FreedGraphError: a backward pass freed the graph before.

        Law: equal to `torch.autograd.grad` to rounding; hooks do not run.
        """
        found: dict[Edge, Tensor] = {}

        def arrived(node: Node, own: list[Tensor | None]) -> None:
            found.update({(node.index, nr): z for nr, z in enumerate(own) if z is not None})

        sweep(self.tape, self._seeds(seeds or {}), Cotangents(self.tape), arrived)
        return Flow(self, found)

    def _seeds(self, given: Mapping[Key, Tensor]) -> dict[Edge, Tensor]:
        seeds = {edge: self.ones(edge) for edge in self.outputs}
        for key, seed in given.items():
            edge = self.edge(key)
            shape = self.vertices[edge[0]].shapes[edge[1]]
            if seed.shape != shape:
                raise GraphError(
                    f"seed at {self.vertices[edge[0]].name}: shape {tuple(seed.shape)}, expected the variable's, "
                    f"{tuple(shape)}"
                )
            seeds[edge] = seed.detach()
        return seeds

    def local_jacobian(
        self, key: Key, slot: int = 0, output: int | None = None, *, limit: int = 10_000_000
    ) -> LocalJacobian:
        """The matrix of local derivatives of one operation in one of its inputs: J of eq. 10.

        Law: the cotangent at the input is J^T times the one at the output (eqs. 9 and 11).

        Args:
            key: the operation.
            slot: which of its inputs, as they stand in `Vertex.inputs`.
            output: which of its outputs; default the one `key` is, else 0.
            limit: the most entries the matrix may have; each row costs one call of the operation.
        Raises:
            GraphError: a leaf, a constant input, a complex variable, or more entries than `limit`.

        >>> import torch, rowgrad
        >>> z = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> h = z.relu()
        >>> rowgrad.Graph(h.sum()).local_jacobian(h).matrix
        tensor([[0., 0.],
                [0., 1.]])
        """
        index, own = self.edge(key)
        return local_jacobian(self, self.vertices[index], slot, own if output is None else output, limit)

    def count_paths(self, key: Key | Edge) -> int:
        """How many paths lead from a variable to the losses: |P| of eq. 3, exact however large.

        One sweep with integers in place of cotangents. An edge counts whether its derivative is zero or not; `w * w`
        reads `w` twice, two paths. 0 for a parameter of the model that is not in the graph.

        >>> import torch, rowgrad
        >>> w = torch.tensor(1.01, requires_grad=True)
        >>> o = w
        >>> for _ in range(100):
        ...     o = o * o
        >>> rowgrad.Graph(o, {"w": w}).count_paths("w")
        1267650600228229401496703205376
        """
        return paths.count_paths(self.level, key)

    def depth(self, key: Key | Edge | None = None) -> int:
        """Operations on the longest path from a variable to the losses, or from any; those that only move entries
        (`Vertex.steps` = 0) count nothing.

        Raises:
            GraphError: no path leads from this variable.
        """
        return paths.depth(self.level, key)

    def paths(self, key: Key | Edge, *, limit: int | None = 10_000) -> Iterator[Path]:
        """Every path from a variable to the losses, one after the other.

        Args:
            limit: the most paths there may be; None for no limit. Their number is known before the first is made.
        Raises:
            GraphError: there are more than `limit`.

        >>> import torch, rowgrad
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> y = w * w
        >>> for path in rowgrad.Graph(y.sin() + y.cos(), {"w": w}).paths("w", limit=4):
        ...     print(path)
        w -> w: mul (input 0) -> after w: sin -> after w: add
        w -> w: mul (input 1) -> after w: sin -> after w: add
        w -> w: mul (input 0) -> after w: cos -> after w: add
        w -> w: mul (input 1) -> after w: cos -> after w: add
        """
        return paths.paths(self.level, key, limit)

    def path_gradient(self, path: Path) -> Tensor:
        """The product of the local derivatives along one path: one term of eq. 3, in the shape of the variable.

        Law: over all `paths(w)` these add up to the gradient of `w`.

        Raises:
            GraphError: the path is of another graph.
        """
        return paths.path_gradient(self.level, path)

    def decompose(self, key: Key | Edge, *, by: By = "length", max_classes: int = 1000) -> dict[Hashable, Tensor]:
        """The gradient of a variable, split exactly over all its paths grouped by a label.

        Law: the parts add up to the gradient. One sweep with {label: cotangent} in place of a cotangent: the cost is
        that of as many backward passes as there are labels where most meet, not one for each path.

        Args:
            by: what makes a path's label.
                "length": operations on it, those that only move entries not counted (`Path.length`).
                "use": the name of the operation it begins with, views of the variable being looked through: one class
                for each copy of a shared weight (eq. 7).
                "time": those uses numbered from 0 in the order of the forward pass.
                a function of (label, vertex): called for each operation from the loss down, first with None, returns
                the label behind the operation; anything hashable.
                a sequence of module names: the set of those that the path passes through. Exact under `trace`; else
                an operation belongs to the module of the nearest parameter before it.
            max_classes: the most labels that may meet at an operation.
        Returns:
            {label: tensor of the variable's shape}, by growing length or in the order of the uses; empty for a
            parameter that no path reaches.
        Raises:
            GraphError: too many classes, an unknown `by`, or a module in which nothing ran.

        >>> import torch, rowgrad
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> h = w * 3
        >>> rowgrad.Graph(h + h.square(), {"w": w}).decompose("w", by="length")
        {2: tensor(3.), 3: tensor(36.)}
        """
        return decompose(self.level, key, by, max_classes)
