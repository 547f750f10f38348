"""`Graph`: the computational graph of a live loss, to be looked at, swept and asked about."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Literal

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
from rowgrad.graph.shares import Shares, shares
from rowgrad.graph.sweep import Cotangents, sweep
from rowgrad.graph.units import Unit, Units
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
        level: what a variable is for `count_paths`, `paths`, `path_gradient`, `depth` and `decompose`. "vector", the
            default: what an operation returned. "unit": each entry of it, a scalar, so that z(i, j) of eqs. 3 and 4 is
            a number, w_ij between a hidden unit and a pre-activation, Phi'_i between a pre-activation and its hidden
            unit. For small nets of linear layers, functions of single entries, products, sums, means, maxima, softmax
            and selections. A unit is asked for as `"0.weight[2,0]"`; a variable with one entry needs no brackets. Each
            example of a batch has units of its own.
    Attributes:
        vertices: all variables, the loss first, each before those it was computed from.
        parameters: {name: vertex} of those in the graph.
        leaves: {name: tensor} of all parameters that `model` named, in its order, also those no path reaches.
        outputs: (vertex index, output number) of each loss.
        units: at level="unit" all scalar variables, in the order of the vertices; else empty.
    Raises:
        GraphError: at level="unit", an operation that has no unit form, or more than 2 million units and edges.
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
        self,
        loss: Tensor | Sequence[Tensor],
        model: Params | None = None,
        *,
        trace: Scopes | None = None,
        level: Literal["vector", "unit"] = "vector",
    ) -> None:
        super().__init__(loss, model, trace=trace)
        if level not in ("vector", "unit"):
            raise GraphError(f'level={level!r}: expected "vector" or "unit"')
        units = Units(self) if level == "unit" else None
        self.units: tuple[Unit, ...] = units.nodes if units else ()
        self.level: Level = units or Vectors(self)

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

    def count_paths(self, key: Key | Edge | Unit) -> int:
        """How many paths lead from a variable to the losses: |P| of eq. 3, exact however large.

        One sweep with integers in place of cotangents. An edge counts whether its derivative is zero or not; `w * w`
        reads `w` twice, two paths. 0 for a parameter of the model that is not in the graph. At level="unit" the paths
        of the seed: 10^6 from an input through three hidden layers of 100 units.

        >>> import torch, rowgrad
        >>> w = torch.tensor(1.01, requires_grad=True)
        >>> o = w
        >>> for _ in range(100):
        ...     o = o * o
        >>> rowgrad.Graph(o, {"w": w}).count_paths("w")
        1267650600228229401496703205376
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> x = torch.ones(3, requires_grad=True)
        >>> graph = rowgrad.Graph(model(x), {"x": x, **dict(model.named_parameters())}, level="unit")
        >>> graph.count_paths("x[0]"), graph.count_paths("0.weight[2,0]")
        (4, 1)
        """
        return paths.count_paths(self.level, key)

    def depth(self, key: Key | Edge | Unit | None = None) -> int:
        """Operations on the longest path from a variable to the losses, or from any; those that only move entries
        (`Vertex.steps` = 0) count nothing.

        Raises:
            GraphError: no path leads from this variable.
        """
        return paths.depth(self.level, key)

    def paths(self, key: Key | Edge | Unit, *, limit: int | None = 10_000) -> Iterator[Path]:
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

    def decompose(
        self, key: Key | Edge | Unit, *, by: By = "length", max_classes: int = 1000
    ) -> dict[Hashable, Tensor]:
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

    def shares(self, key: Key | Edge) -> Shares:
        """Each edge's share of |g|^2, where g is the gradient of a variable: what comes along it, measured along g.

        Law: over any cut between the variable and the losses the shares add up to 1, as skip and block do at a
        residual addition; a share is 1 - <g, g'> / |g|^2, where g' is the gradient with the edge cut (from eq. 3).
        Costs one backward pass and two calls of each operation more: all cotangents are held. An operation that cannot
        be differentiated twice, as fused ones, is called once for each entry of its outputs, with a warning.

        Args:
            key: the variable. One that is itself a loss keeps the share of its own seed, which is no edge.
        Returns:
            `Shares`: {(operation, input): share}, without unit, for every edge on a path from the variable; negative
            where what comes along an edge works against the rest. `shares["fc1: add", 0]` finds one, `print(shares)`
            shows all.
        Raises:
            GraphError: no path leads from the variable, its gradient is zero, or an operation whose outputs have more
                than 10 000 entries cannot be differentiated twice.
            NonFiniteError: the gradient holds inf or nan.

        >>> import torch, rowgrad
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> h = w * 3
        >>> print(rowgrad.Graph(h + h.square(), {"w": w}).shares("w"))
        shares of |dO/d w|^2 = 1521
        100.0 %  w -> w: mul
         92.3 %  w: mul -> after w: pow
         92.3 %  after w: pow -> after w: add (input 1)
          7.7 %  w: mul -> after w: add (input 0)
        """
        return shares(self, key)
