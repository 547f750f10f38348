"""From losses to rows: checks, plan, one engine pass. The entry points of the core."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, overload

import torch
from torch import Tensor

from rowgrad.errors import NoGraphError, NotAVectorError, OpaqueGraphError, ParameterError
from rowgrad.parameters import Parameters, Params, named
from rowgrad.rows.arrivals import Norms, WrittenOut
from rowgrad.rows.matrix import Jacobian
from rowgrad.rows.ownership import Edge
from rowgrad.rows.pack import KEPT_BYTES
from rowgrad.rows.plan import make_plan
from rowgrad.rows.reading import Reading
from rowgrad.rows.rules import RULES
from rowgrad.rows.site import Rule
from rowgrad.tape import Tape

_NOTHING = nullcontext()


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
        if reading.streams(max_bytes):
            J = Norms(reading).after_pass(retain_graph)
        else:
            J = reading.jacobian(retain_graph, max_bytes)
    return J.norms(by)


def grad_rows(
    losses: Tensor,
    params: Params,
    *,
    verify: str = "cached",
    rules: Mapping[tuple[str, int], Rule] = RULES,
    loss_scale: float = 1.0,
    retain_graph: bool = False,
    max_bytes: int | None = None,
) -> dict[str, Tensor]:
    """Each example's gradient, written out: {name: (B, *shape)}, B times as large as the parameters.

    Law: equals `jacobian(losses, params).dense(as_dict=True)`; the same arguments and errors. They are written as the
    pass comes by, and each cotangent is freed afterwards, so that little memory is needed beside them. Norms, sums,
    dot products and Gram matrices need none of them: ask `jacobian`.

    >>> import torch, rowgrad
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> rowgrad.grad_rows(model(torch.eye(2)).squeeze(1), model)["weight"]
    tensor([[[1., 0.]],
    <BLANKLINE>
            [[0., 1.]]])
    """
    max_bytes = _bound(max_bytes)
    with _reading(losses, params, verify, rules, loss_scale) as reading:
        if reading.streams(max_bytes):
            return WrittenOut(reading).after_pass(retain_graph)
        return reading.jacobian(retain_graph, max_bytes).dense(as_dict=True)


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
        reading, norms = self._reading, Norms(self._reading)
        assert reading.plan is not None
        tape, parameters = reading.tape, reading.parameters
        with torch.no_grad(), _no_autocast(tape.output), _grad_untouched(parameters, tape):
            for node, uses in reading.plan.ownership.by_node.items():
                own = [cotangents.get((node, nr)) for nr in range(reading.tape.nodes[node].n_outputs)]
                reading.plan.check_nobody(node, own)
                for use in uses:
                    norms.take(use, reading.plan.form(use, own))
            return norms.finished().norms()


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
    if losses.is_meta:
        raise NoGraphError("losses are on the device meta and have no values; compute them on a device that has")
    if losses.is_inference():
        raise NoGraphError("losses were computed in inference mode and have no graph; run the forward pass outside it")
    if losses.grad_fn is None:
        why = "they are a leaf" if losses.requires_grad else "they were detached or computed under torch.no_grad()"
        raise NoGraphError(f"losses have no graph: {why}. Pass the result of a forward pass with gradients enabled")


@contextmanager
def _reading(
    losses: Tensor, params: Params, verify: str, rules: Mapping[tuple[str, int], Rule], loss_scale: float
) -> Iterator[Reading]:
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
        yield Reading(tape, parameters, leaves, plan, seed, loss_scale)


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
