"""From losses to rows: checks, plan, one engine pass, forms, blocks. The entry points of the core."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from rowgrad.errors import NoGraphError, NotAVectorError, OpaqueGraphError, ParameterError, RowgradWarning
from rowgrad.parameters import Parameters, Params, named
from rowgrad.rows.block import Block
from rowgrad.rows.explain import Entry, Explanation
from rowgrad.rows.factors import Dense, Form, Multiples, in_type, wide_dtype
from rowgrad.rows.frontier import Use
from rowgrad.rows.general import GeneralPath
from rowgrad.rows.matrix import Jacobian
from rowgrad.rows.ownership import Axis, Edge
from rowgrad.rows.pack import KEPT_BYTES, Blocks, is_small, small_form
from rowgrad.rows.placement import Place, settle
from rowgrad.rows.plan import Plan, make_plan
from rowgrad.rows.push import push, written_out_bytes
from rowgrad.rows.rules import RULES
from rowgrad.rows.site import Cotangents, Rule
from rowgrad.tape import Node, Tape, version, written_to

SLOW_ROWS = 2**20  # numbers in the rows of a parameter, from which it takes time to write them out

_NOTHING = nullcontext()
_warned: set[tuple] = set()  # one warning per graph, not per step


def jacobian(
    losses: Tensor,
    params: Params,
    *,
    verify: str = "cached",
    rules: Mapping[tuple[str, int], Rule] = RULES,
    loss_scale: float = 1.0,
    retain_graph: bool = False,
    max_bytes: int | None = None,
) -> Jacobian:
    """The gradient of each loss with respect to the parameters, in factors, from one backward pass.

    Law: `jacobian(losses, params).dense()[j]` equals `autograd.grad(losses[j], params)`, for every graph. What has no
    rule is computed example by example, exactly, with a warning; what cannot be exact raises.

    Args:
        losses: one loss per example, shape (B,), not averaged, with its graph.
        params: a module, `optimizer.param_groups`, or an iterable or mapping of leaf tensors. Frozen ones are left out.
        verify: "cached" reuses the proof of which entry belongs to which example for graphs of the same structure,
            where the structure alone settles it; "always" proves it at every call.
        rules: the table of rules, `RULES | {...}` to add some, `{}` to send everything the general path.
        loss_scale: the losses are scaled by this for the pass (float16); rows are in units of `losses` all the same.
        retain_graph: keep the graph for further backward passes.
        max_bytes: bound on the rows that are kept written out, those of the general path and those that one question
            forms and the next can use; default 1 GiB. Above it they are computed anew for each product.
    Raises:
        NotAVectorError: `losses` is a scalar or has more than one dimension.
        NoGraphError: `losses` has no graph.
        FreedGraphError: its graph was freed.
        ParameterError: a parameter is not a real leaf tensor, or none of them is in the graph.
        ValueError: an option is not what it may be.
        OpaqueGraphError: part of the graph hides its parameters.
    Source: Goodfellow 2015, "Efficient per-example gradient computations", section 4, for linear layers.

    >>> import torch, rowgrad
    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> losses = model(torch.ones(2, 3)).squeeze(1)
    >>> rowgrad.jacobian(losses, model).sq_norms()
    tensor([3., 3.])
    """
    max_bytes = _bound(max_bytes)
    with _reading(losses, params, verify, rules, loss_scale) as reading:
        return reading.jacobian(retain_graph, max_bytes)


@overload
def grad_norms(
    losses: Tensor,
    params: Params,
    *,
    by: None = None,
    verify: str = "cached",
    rules: Mapping[tuple[str, int], Rule] = RULES,
    loss_scale: float = 1.0,
    retain_graph: bool = False,
    max_bytes: int | None = None,
) -> Tensor: ...
@overload
def grad_norms(
    losses: Tensor,
    params: Params,
    *,
    by: str | Mapping[str, Any],
    verify: str = "cached",
    rules: Mapping[tuple[str, int], Rule] = RULES,
    loss_scale: float = 1.0,
    retain_graph: bool = False,
    max_bytes: int | None = None,
) -> dict[str, Tensor]: ...
def grad_norms(
    losses: Tensor,
    params: Params,
    *,
    by: str | Mapping[str, Any] | None = None,
    verify: str = "cached",
    rules: Mapping[tuple[str, int], Rule] = RULES,
    loss_scale: float = 1.0,
    retain_graph: bool = False,
    max_bytes: int | None = None,
) -> Tensor | dict[str, Tensor]:
    """L2 norm of each example's gradient, shape (B,), without forming any gradient.

    Law: equals `jacobian(losses, params).norms(by)`; the same arguments and errors. The pass streams: each cotangent is
    freed as soon as its norms are read, so that little memory is needed beyond the forward pass's own.

    Source: Goodfellow 2015, section 4.

    >>> import torch, rowgrad
    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> rowgrad.grad_norms(model(2 * torch.eye(3)).squeeze(1), model)
    tensor([2., 2., 2.])
    """
    max_bytes = _bound(max_bytes)
    with _reading(losses, params, verify, rules, loss_scale) as reading:
        streams = reading.streams(max_bytes)
        J = reading.streamed_norms(retain_graph) if streams else reading.jacobian(retain_graph, max_bytes)
    return J.norms(by)


def condensed_jacobian(
    losses: Tensor,
    params: Params,
    *,
    verify: str = "cached",
    rules: Mapping[tuple[str, int], Rule] = RULES,
    loss_scale: float = 1.0,
    retain_graph: bool = False,
    max_bytes: int | None = None,
) -> Jacobian:
    """As `jacobian`, to be asked for norms and then for sums, and not for factors, nor where the rows came from.

    Rows that both would form are written out as the cotangents arrive, where that leaves less to be held.
    """
    max_bytes = _bound(max_bytes)
    with _reading(losses, params, verify, rules, loss_scale) as reading:
        return reading.jacobian(retain_graph, max_bytes, condense=True)


class Prepared:
    """Rows of losses whose cotangents somebody else finds: where they meet, what to keep, and the norms from that.

    Positions are those on `Tape(losses)`.

    Args:
        losses, params: as for `jacobian`.
        scale: the cotangents handed over will be those of `scale * losses.sum()`.
    Attributes:
        meeting: nodes at which examples meet.
        edges: (node, output) whose cotangents `norms` needs; None where a use has no rule, and so no norms come cheap.
    Raises:
        RowgradError: as `jacobian`.
    """

    def __init__(self, losses: Tensor, params: Params, scale: float = 1.0) -> None:
        with _reading(losses, params, "cached", RULES, scale) as self._reading:
            plan = self._reading.plan
            if plan is not None:
                plan.read_all()
        self.meeting: tuple[int, ...] = () if plan is None else plan.ownership.frontier.couplings
        is_cheap = plan is not None and self._reading.streams(KEPT_BYTES)
        self.edges: list[Edge] | None = list(plan.ownership.watch.edges) if plan is not None and is_cheap else None

    def norms(self, cotangents: Mapping[Edge, Tensor | None]) -> Tensor:
        """L2 norm of each row, shape (B,), as `grad_norms`. To be asked once, and only if there are `edges`."""
        reading, waiting = self._reading, _Arrivals(self._reading)
        assert reading.plan is not None
        tape, parameters = reading.tape, reading.parameters
        with torch.no_grad(), _no_autocast(tape.output), _grad_untouched(parameters, tape):
            for node, uses in reading.plan.ownership.by_node.items():
                own = [cotangents.get((node, nr)) for nr in range(reading.tape.nodes[node].n_outputs)]
                reading.plan.check_nobody(node, own)
                for use in uses:
                    waiting.take(use, reading.plan.form(use, own))
            return Jacobian.of_norms(reading.losses, reading.parameters, *waiting.finished()).norms()


def _bound(max_bytes: int | None) -> int:
    if max_bytes is None:
        return KEPT_BYTES
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 0:
        raise ValueError(f"max_bytes={max_bytes!r}: expected a whole number of bytes, 0 to keep nothing written out")
    return max_bytes


def check_vector(losses: Tensor) -> None:
    """Refuse what is not a vector of losses."""
    if not isinstance(losses, Tensor):
        raise NotAVectorError(f"losses is a {type(losses).__name__}, expected a tensor of shape (B,)")
    if losses.ndim == 0:
        raise NotAVectorError(
            'losses is a scalar: the examples were already averaged. Compute the loss with reduction="none" to keep '
            "one entry per example"
        )
    if losses.ndim > 1:
        raise NotAVectorError(
            f"losses has shape {tuple(losses.shape)}, expected (B,). Reduce all but the examples, for instance with "
            "rowgrad.per_example(losses, mask)"
        )
    if not losses.dtype.is_floating_point:
        raise NotAVectorError(f"losses are {losses.dtype}, expected real floating point numbers")


def check_losses(losses: Tensor) -> None:
    """Refuse what is not a vector of losses with a graph."""
    check_vector(losses)
    if losses.is_inference():
        raise NoGraphError("losses were computed in inference mode and have no graph; run the forward pass outside it")
    if losses.grad_fn is None:
        why = "they are a leaf" if losses.requires_grad else "they were detached or computed under torch.no_grad()"
        raise NoGraphError(f"losses have no graph: {why}. Pass the result of a forward pass with gradients enabled")


@contextmanager
def _reading(
    losses: Tensor, params: Params, verify: str, rules: Mapping[tuple[str, int], Rule], loss_scale: float
) -> Iterator[_Reading]:
    """The graph with its plan, in plain numbers, with an eye on `.grad`."""
    if verify not in ("cached", "always"):
        raise ValueError(f'verify={verify!r}: expected "cached" or "always"')
    if not 0 < loss_scale < float("inf"):
        raise ValueError(f"loss_scale={loss_scale!r}: expected a positive finite number")
    check_losses(losses)
    if loss_scale > torch.finfo(losses.dtype).max:
        raise ValueError(
            f"loss_scale={loss_scale!r}: losses are {losses.dtype}, which ends at {torch.finfo(losses.dtype).max:g}; "
            "lower it, or compute the losses in float32"
        )
    parameters = named(params)
    tape = Tape(losses)
    tape.refuse_hidden()
    with torch.no_grad(), _no_autocast(losses), _grad_untouched(parameters, tape):
        leaves = {tape.leaves[id(p)]: name for name, p in parameters.by_name.items() if id(p) in tape.leaves}
        if not leaves:
            raise ParameterError(
                f"none of the {len(parameters.by_name)} parameters is in the graph of the losses (first: "
                f"{next(iter(parameters.by_name))}). Is this the model the losses came from, and not a copy of it?"
            )
        seed = torch.full_like(losses, loss_scale)
        plan = make_plan(tape, seed, leaves, rules, verify) if losses.shape[0] else None
        yield _Reading(tape, parameters, leaves, plan, seed, loss_scale)


def _no_autocast(losses: Tensor) -> AbstractContextManager[None]:
    devices = [device for device in {"cpu", losses.device.type} if torch.is_autocast_enabled(device)]
    return _autocast_off(devices) if devices else _NOTHING


@contextmanager
def _autocast_off(devices: Iterable[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _grad_untouched(parameters: Parameters, tape: Tape) -> AbstractContextManager[None]:
    """Notice a node that runs a backward pass of its own, which writes `.grad`; whatever was there is put back.

    Only Python code does, and only where there is some is `.grad` touched: other threads may be at work with it.
    """
    return _grad_put_back(parameters) if tape.runs_python else _NOTHING


@contextmanager
def _grad_put_back(parameters: Parameters) -> Iterator[None]:
    before = [(p, grad) for p in parameters.by_name.values() if (grad := p.grad) is not None]
    for p, _ in before:
        p.grad = None
    written: list[str] = []
    try:
        yield
    finally:
        for name, p in parameters.by_name.items():
            if p.grad is not None:
                written.append(name)
                p.grad = None
        for p, grad in before:
            p.grad = grad
    if written:
        raise OpaqueGraphError(
            f"reading the graph wrote {written[0]}.grad: a custom autograd Function calls backward() inside its own "
            "backward (reversible layers, reentrant checkpointing), so its parameters are hidden. Use "
            "torch.autograd.grad inside the Function, or non-reentrant checkpointing"
        )


@dataclass
class _Reading:
    """One graph with its plan, before the pass."""

    tape: Tape
    parameters: Parameters
    leaves: dict[int, str]
    plan: Plan | None  # None for an empty batch
    seed: Tensor
    loss_scale: float

    @property
    def n_examples(self) -> int:
        return self.seed.shape[0]

    @property
    def losses(self) -> Tensor:
        """The Jacobian's own: the tensor that was given may be written to."""
        return self.tape.output.detach().clone()

    def jacobian(self, retain_graph: bool, max_bytes: int, condense: bool = False) -> Jacobian:
        if self.plan is None:
            return self._finished({}, None, Explanation([]), max_bytes)
        places = self.plan.places
        direct: dict[Use, tuple[Form, Place]] = {}
        computed: dict[Use, Form] = {}  # at computed parameters

        def take(use: Use, form: Form | None) -> bool:
            if form is None:
                return False
            if use not in places:
                computed[use] = form
                return True
            form, place = self.placed(form, places[use])
            direct[use] = (form.condensed() if condense else form, place)
            return True

        left = self.read(retain_graph, take)
        by_leaf: dict[int, list[tuple[Form, Place]]] = {}
        for use, place in places.items():
            if use in direct:
                by_leaf.setdefault(place.leaf, []).append(direct[use])
        seeds, n_bytes = self._pushed(computed, by_leaf, max_bytes)
        max_bytes = max(0, max_bytes - n_bytes)
        general = self._general(seeds, left)
        general = general and self._without_scalars(general, by_leaf)
        stuck = {} if general is None else self._stuck(general)
        if general is not None and (n_bytes := general.bytes(self.parameters.by_name)) <= max_bytes:
            self._write_out(general, by_leaf)
            general, max_bytes = None, max_bytes - n_bytes
        self._warn_if_slow(stuck)
        if condense:
            return self._finished(by_leaf, general, Explanation([]), max_bytes)
        forms = computed | {use: form for use, (form, _) in direct.items()}
        return self._finished(by_leaf, general, self._explanation(forms, stuck), max_bytes)

    def read(self, retain_graph: bool, take: Callable[[Use, Form | None], bool]) -> dict[int, Cotangents]:
        """The pass. Hands over the form at each use with a recipe as soon as its cotangents arrive.

        take: tells whether it keeps the form.

        Returns the cotangents of the nodes where other uses are.
        """
        assert self.plan is not None
        plan, uses, recipes = self.plan, self.plan.ownership.by_node, self.plan.recipes
        waiting: dict[int, Cotangents] = {}
        held: list[tuple[weakref.ref[Tensor], int]] = []  # what is kept, with its version

        def keep(tensors: Iterable[Tensor | None]) -> None:
            held.extend([(weakref.ref(t), version(t)) for t in tensors if t is not None])

        def arrived(node: int, cotangents: Cotangents) -> None:
            plan.check_nobody(node, cotangents)
            for use in uses[node]:
                recipe = recipes.get(use)
                if recipe is None or recipe.needs_graph:
                    waiting[node] = cotangents  # a node called during the pass answers only what the pass asks
                    keep(cotangents)
                    continue
                form = plan.form(use, cotangents)
                if take(use, form) and form is not None:
                    keep(form.held)

        retain_graph = retain_graph or plan.needs_graph
        passing = plan.read if plan.unread else None
        self.tape.stream(plan.ownership.watch, self.seed, arrived, retain_graph=retain_graph, passing=passing)
        if any(version(t) != v for of, v in held if (t := of()) is not None):
            raise written_to()
        for node, cotangents in waiting.items():
            for use in uses[node]:
                if use in recipes and recipes[use].needs_graph:
                    take(use, plan.form(use, cotangents))
        return {node: z for node, z in waiting.items() if any(use not in recipes for use in uses[node])}

    @staticmethod
    def _write_out(general: GeneralPath, by_leaf: dict[int, list[tuple[Form, Place]]]) -> None:
        for leaf, rows in general.written_out().items():
            by_leaf.setdefault(leaf, []).append((Dense(rows), Place.whole(leaf, rows.shape[1:])))

    def streams(self, max_bytes: int) -> bool:
        """Whether norms can be read while the cotangents pass: every use has a recipe, and little is to be held.

        Norms of leaves below a use that sees no strided part of them wait until all uses are in.
        """
        if self.plan is None or not self.plan.is_ruled:
            return False
        held = [self.parameters.by_name[self.leaves[leaf]] for leaf in self.plan.ownership.held]
        return sum(self.n_examples * p.numel() * max(4, p.element_size()) for p in held) <= max_bytes

    def pushed_down(self, forms: Mapping[Use, Form]) -> dict[int, list[tuple[Form, Place]]]:
        """Forms at uses of computed parameters, to the parameters they are computed from."""
        by_leaf: dict[int, list[tuple[Form, Place]]] = {}
        seeds, _ = self._pushed(forms, by_leaf, KEPT_BYTES)
        general = self._general(seeds, {})
        general = general and self._without_scalars(general, by_leaf)
        if general is not None:
            self._write_out(general, by_leaf)
        return by_leaf

    def streamed_norms(self, retain_graph: bool) -> Jacobian:
        """Norms alone, each use read as its cotangent arrives; only where every use has a recipe."""
        waiting = _Arrivals(self)
        self.read(retain_graph, waiting.take)
        return Jacobian.of_norms(self.losses, self.parameters, *waiting.finished())

    def _finished(
        self,
        by_leaf: Mapping[int, list[tuple[Form, Place]]],
        general: GeneralPath | None,
        explanation: Explanation,
        max_bytes: int,
    ) -> Jacobian:
        leaf_of = {name: leaf for leaf, name in self.leaves.items()}
        blocks = {
            name: Block.of(p, by_leaf.get(leaf_of.get(name, -1), []), self.n_examples)
            for name, p in self.parameters.by_name.items()
        }
        streamed = {self.leaves[leaf] for leaf in general.reached()} if general is not None else set()
        return Jacobian(self.losses, self.parameters, Blocks(blocks, general, streamed, max_bytes), explanation)

    def placed(self, form: Form, place: Place) -> tuple[Form, Place]:
        """Back in units of the losses, turned to the parameter's own order."""
        if self.loss_scale != 1:
            unit = torch.full((self.n_examples,), 1 / self.loss_scale, dtype=torch.float64, device=self.seed.device)
            form = form.scaled(unit)
        return settle(form, place)

    def _pushed(
        self, forms: Mapping[Use, Form], by_leaf: dict[int, list[tuple[Form, Place]]], max_bytes: int
    ) -> tuple[list[tuple[Edge, Form]], int]:
        """Add the forms at computed parameters that reach parameters as forms.

        Returns where the others got to, and what those take that arrived written out.
        """
        assert self.plan is not None
        seeds = [(use.target, forms[use]) for use in self.plan.uses if use in forms and use not in self.plan.places]
        placed, left = push(self.tape, seeds, self.plan.ownership.frontier.needed, max_bytes)
        for place, form in placed:
            by_leaf.setdefault(place.leaf, []).append(self.placed(form, place))
        return left, sum(written_out_bytes(form) for _, form in placed)

    def _general(self, seeds: list[tuple[Edge, Form]], left: Mapping[int, Cotangents]) -> GeneralPath | None:
        """Everything else, or None where there is nothing else."""
        assert self.plan is not None
        by_node = self.plan.ownership.by_node
        masked = {
            node: ([use.slot for use in by_node[node] if use not in self.plan.recipes], list(cotangents))
            for node, cotangents in left.items()
            if any(z is not None for z in cotangents)
        }
        if not seeds and not masked:
            return None
        ownership = self.plan.ownership
        return GeneralPath(
            self.tape,
            list(range(self.n_examples)),
            self.n_examples,
            ownership.layouts,
            ownership.frontier.needed,
            seeds,
            masked,
            self.leaves,
            self.loss_scale,
        )

    def _stuck(self, general: GeneralPath) -> dict[str, Node]:
        """Names of the parameters from which a weight is computed in a way that takes no factors, with the node that
        does not."""
        found: dict[str, Node] = {}
        for (node, _), _ in general.seeds:
            for name in self._names_below[node]:
                found.setdefault(name, self.tape.nodes[node])
        return {name: found[name] for name in self.parameters.by_name if name in found}

    def _warn_if_slow(self, stuck: Mapping[str, Node]) -> None:
        assert self.plan is not None
        if self.n_examples == 1:
            return
        if not self.plan.is_ruled:
            reach, recipes = self._reach(), self.plan.recipes
            unruled = [u for u in self.plan.uses if u not in recipes]
            names, nodes = self.parameters.by_name, self.tape.nodes
            slow = [(n, repr(nodes[u.node])) for n in names for u in unruled if n in reach[u]]
            tokens = (
                f" Are these {self.n_examples} losses tokens rather than examples? rowgrad.per_example adds them up "
                "first."
                if self._looks_like_tokens()
                else ""
            )
            self._warn(
                slow,
                "no rule for how the examples meet here, so rows are computed one by one, exactly, in "
                f"{self.n_examples} partial backward passes.{tokens}{self._underflow()}",
            )
        large = [n for n in stuck if self.n_examples * self.parameters.by_name[n].numel() >= SLOW_ROWS]
        self._warn(
            [(n, repr(stuck[n])) for n in large],
            "a weight is computed from it, and this step of it keeps no factors, so the rows are written out, exactly, "
            f"and taken through it {self.n_examples} times.",
        )

    def _warn(self, slow: list[tuple[str, str]], why: str) -> None:
        """slow: (parameter, node)."""
        key = (self.n_examples, tuple(slow))
        if not slow or key in _warned:
            return
        _warned.add(key)
        name, kind = slow[0]
        more = f" and {len(slow) - 1} more" if len(slow) > 1 else ""
        warnings.warn(f"{name} at {kind}{more}: {why} See Jacobian.explain()", RowgradWarning, stacklevel=5)

    def _underflow(self) -> str:
        halves = any(n.dtype() == torch.float16 for n in self.tape.nodes if not n.is_leaf and n.is_traced(0))
        return " Cotangents may underflow in float16, which hides owners: pass loss_scale." if halves else ""

    def _looks_like_tokens(self) -> bool:
        """Whether some value has two leading dimensions whose product is the number of losses."""
        shapes = [node.shape() for node in self.tape.nodes if not node.is_leaf and node.is_traced(0)]
        return any(len(s) >= 3 and 1 < s[0] < self.n_examples == s[0] * s[1] for s in shapes)

    def _without_scalars(
        self, general: GeneralPath, by_leaf: dict[int, list[tuple[Form, Place]]]
    ) -> GeneralPath | None:
        """Uses that pass through one number (a penalty on the weights): every row is a multiple of one gradient, where
        all below is linear in the cotangent: real, and no code of a user's."""
        kept: list[tuple[Edge, Form]] = []
        for edge, form in general.seeds:
            node, nr = self.tape.nodes[edge[0]], edge[1]
            if form.shape.numel() != 1 or node.dtype(nr).is_complex or general.runs_python(edge):
                kept.append((edge, form))
                continue
            weights = form.dense().reshape(self.n_examples) / self.loss_scale
            for leaf, gradient in general.pushed_once(edge).items():
                by_leaf.setdefault(leaf, []).append((Multiples(weights, gradient), Place.whole(leaf, gradient.shape)))
        return replace(general, seeds=kept) if kept or general.masked else None

    def _explanation(self, forms: Mapping[Use, Form], stuck: Mapping[str, Node]) -> Explanation:
        """Kept with the layouts, for what it says follows from what they are kept for."""
        assert self.plan is not None
        told = self.plan.ownership.told
        routes = tuple((use, recipe.route, use in forms) for use, recipe in self.plan.recipes.items())
        key = (tuple(self.leaves.items()), tuple(self.parameters.by_name), routes, tuple(stuck))
        if key not in told:
            told[key] = self._table(forms, stuck)
        return told[key]

    def _table(self, forms: Mapping[Use, Form], stuck: Mapping[str, Node]) -> Explanation:
        assert self.plan is not None
        reach = self._reach()
        entries = [
            Entry(
                name,
                tuple(p.shape),
                [self._explained(use, forms) for use in self.plan.uses if name in reach[use]],
                repr(stuck[name]) if name in stuck else None,
            )
            for name, p in self.parameters.by_name.items()
        ]
        couplings = tuple(repr(self.tape.nodes[i]) for i in self.plan.ownership.frontier.couplings)
        return Explanation(entries, couplings)

    def _explained(self, use: Use, forms: Mapping[Use, Form]) -> Entry.Use:
        assert self.plan is not None
        recipe = self.plan.recipes.get(use)
        return Entry.Use(
            kind=repr(self.tape.nodes[use.node]),
            rule=recipe.route if recipe else None,
            route=forms[use].route() if use in forms else "",
            direct=use in self.plan.places,
            layout=str(self.plan.ownership.layouts.get((use.node, 0), Axis(0))),
            proof=self.plan.ownership.proof,
        )

    def _reach(self) -> dict[Use, set[str]]:
        """Names of the parameters below each use."""
        assert self.plan is not None
        return {use: self._names_below[use.target[0]] for use in self.plan.uses}

    @cached_property
    def _names_below(self) -> list[set[str]]:
        """Names of the parameters at and below each node."""
        assert self.plan is not None
        below: list[set[str]] = [set() for _ in self.tape.nodes]
        for node in reversed(self.tape.nodes):
            if node.index in self.leaves:
                below[node.index].add(self.leaves[node.index])
            elif self.plan.ownership.frontier.tainted[node.index]:
                for target in node.slots:
                    if target is not None:
                        below[node.index] |= below[target[0]]
        return below


class _Arrivals:
    """Squared norms by parameter, each computed once the last of its uses has arrived; small rows are kept instead."""

    def __init__(self, reading: _Reading) -> None:
        assert reading.plan is not None
        self._reading = reading
        self._places = reading.plan.places
        self._alone = reading.plan.ownership.alone if reading.loss_scale == 1 else frozenset()
        self._open: dict[int, int] = {}
        self._parts: dict[int, list[tuple[Form, Place]]] = {}
        self._seeds: dict[Use, Form] = {}
        self._sq_norms: dict[str, Tensor] = {}
        self._small: dict[str, Dense] = {}
        for use, place in self._places.items():
            if use not in self._alone:
                self._open[place.leaf] = self._open.get(place.leaf, 0) + 1
        for leaf in reading.plan.ownership.held:
            self._open[leaf] = self._open.get(leaf, 0) + 1  # closed at the end

    def take(self, use: Use, form: Form | None) -> bool:
        """Whether it keeps the form."""
        place = self._places.get(use)
        if place is None:
            if form is not None:
                self._seeds[use] = form
            return True
        leaf = place.leaf
        if use in self._alone:
            return form is not None and self._take_alone(leaf, form)
        if form is not None:
            form, place = self._reading.placed(form, place)
            self._parts.setdefault(leaf, []).append((form.condensed(), place))
        self._open[leaf] -= 1
        if not self._open[leaf]:
            self._close(leaf, self._parts.pop(leaf, []))
        return True

    def _take_alone(self, leaf: int, form: Form) -> bool:
        """Read the norms, which do not depend on where the entries lie, or keep small rows; whether they were kept."""
        name = self._reading.leaves[leaf]
        if is_small(form):
            self._small[name] = form
            return True
        self._sq_norms[name] = in_type(form.sq_norms(), wide_dtype(self._reading.parameters.by_name[name].dtype))
        return False

    def _close(self, leaf: int, parts: list[tuple[Form, Place]]) -> None:
        name = self._reading.leaves[leaf]
        block = Block.of(self._reading.parameters.by_name[name], parts, self._reading.n_examples)
        form = small_form(block)
        if form is None:
            self._sq_norms[name] = block.sq_norms()
        else:
            self._small[name] = form

    def finished(self) -> tuple[dict[str, Tensor], dict[str, Dense]]:
        below = self._reading.pushed_down(self._seeds) if self._seeds else {}
        for leaf, parts in below.items():
            self._parts.setdefault(leaf, []).extend(parts)
        for leaf, n_open in self._open.items():
            if n_open:  # held, or a use that no cotangent reached
                self._close(leaf, self._parts.pop(leaf, []))
        return self._sq_norms, self._small
