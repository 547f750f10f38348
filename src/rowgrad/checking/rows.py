"""Are these rows the gradients that autograd itself gives?

Note [what the three comparisons see]
    Row by row, against a backward pass per example on the same graph: a wrong rule, a wrong owner, and which of them.
    J^T u against one backward pass with the same random u: a wrong owner in any row, also in rows that were not
    compared one by one; the sum of the rows alone would be right in all these cases.
    That backward pass against the graph's nodes called one after the other (see `tape`): calls run no hooks, so a
    difference is a hook inside the model that changes gradients on their way. No product of rows can tell it, for the
    passes that yield the rows run the same hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from math import hypot, isnan
from typing import Any

import torch
from torch import Tensor

from rowgrad.checking.report import Report
from rowgrad.errors import NonFiniteError
from rowgrad.graph.sweep import Cotangents, above, walk
from rowgrad.parameters import Parameters, Params, named
from rowgrad.repeat import check_closure
from rowgrad.rounding import tolerance
from rowgrad.rows.build import check_losses, jacobian
from rowgrad.rows.matrix import Jacobian
from rowgrad.rows.rules import RULES
from rowgrad.rows.site import Rule
from rowgrad.tape import Node, Tape

EDGES_AT_A_TIME = 64  # cotangents held while the place of a hook is looked for

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class RowFinding:
    """The worst error found for one parameter: where, and how that parameter was handled."""

    parameter: str
    error: float  # over the norm of the whole row
    example: int
    how: str
    ok: bool

    def cells(self) -> tuple[str, ...]:
        return self.parameter, f"{self.error:.1e}", str(self.example), self.how

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_rows(
    closure: Callable[[], Tensor],
    params: Params,
    *,
    examples: Sequence[int] | None = None,
    rtol: float | None = None,
    rules: Mapping[tuple[str, int], Rule] = RULES,
    generator: torch.Generator | None = None,
) -> Report[RowFinding]:
    """Compare the rows of the Jacobian with one backward pass per example, on the same graph.

    J^T u for a random u is compared too, with `losses.backward(u)`: it sees an example's part in another's row, also
    in rows that were not compared one by one, and hooks inside the model that change gradients. Rows are formed one at
    a time. Nothing is left in `.grad` and no random number is drawn but by `closure`.

    Args:
        closure: the forward pass; returns the losses, shape (B,). Called once.
        params: as for `rowgrad.jacobian`.
        examples: which rows to compare one by one, as indices into the losses; default all.
        rtol: error allowed in a row, over that row's norm; default by the narrowest dtype in the graph: 1e-7 in
            float64, 1e-4 in float32, 5e-2 in bfloat16, 2e-2 in float16.
        rules: the table under test.
        generator: for u, on the CPU; default one of its own, seeded.
    Returns:
        A `Report`: `ok`, a table as its `str`, `to_dict()`, `to_html()`. Per parameter it holds the worst error and
        its example, and the nodes and rules at which the parameter is used.
    Raises:
        TypeError: `closure` cannot be called.
        IndexError: `examples` holds an index outside the losses.
        NonFiniteError: a loss or a gradient is not finite, so that ordinary passes prove nothing.
        RowgradError: as for `rowgrad.jacobian`.

    >>> import torch, rowgrad
    >>> model = torch.nn.Linear(3, 1)
    >>> rowgrad.check_rows(lambda: model(torch.eye(3)).squeeze(1).square(), model).ok
    True
    """
    check_closure(closure)
    with torch.enable_grad():
        losses = closure()
    check_losses(losses)
    chosen = _indices(examples, len(losses))
    parameters = named(params)
    tape = Tape(losses)
    allowed = tolerance(tape) if rtol is None else rtol
    J = jacobian(losses, parameters.by_name, rules=rules, retain_graph=True, verify="always")
    _check_finite(losses.detach(), J)
    findings = _compare_rows(losses, parameters, J, chosen, allowed)
    notes = _compare_passes(tape, parameters, J, allowed, generator or torch.Generator().manual_seed(0))
    return Report(
        f"{len(chosen)} of {len(losses)} rows, one backward pass each",
        f"relative errors up to {allowed:.0e} allowed",
        ("parameter", "worst error", "example", "how"),
        findings,
        notes,
    )


def _indices(examples: Sequence[int] | None, n: int) -> list[int]:
    if examples is None:
        return list(range(n))
    outside = [j for j in examples if not -n <= j < n]
    if outside:
        raise IndexError(f"examples: {outside[0]} is not among the {n} losses")
    return [int(j) % n for j in examples]


def _check_finite(losses: Tensor, J: Jacobian) -> None:
    norms = J.norms()
    bad = (~(losses.isfinite() & norms.isfinite())).nonzero().squeeze(1).tolist()
    if bad:
        raise NonFiniteError(
            f"loss or gradient of {len(bad)} of {len(J)} examples is not finite (first: example {bad[0]}, loss "
            f"{float(losses[bad[0]]):g}). A backward pass carries it to other examples (0 * inf is nan), so nothing "
            "can be compared with it; check on other data"
        )


# Row by row


def _compare_rows(
    losses: Tensor, parameters: Parameters, J: Jacobian, examples: Sequence[int], tolerance: float
) -> tuple[RowFinding, ...]:
    worst: dict[str, tuple[float, int]] = {}
    for j in examples:
        expected = _backward(losses, parameters, _only(j, losses))
        found = J[[j]].dense(as_dict=True)
        norm = hypot(*map(_norm, expected.values()))
        for name, row in expected.items():
            error = _over(_error(found[name][0], row), norm)
            if name not in worst or error > worst[name][0]:
                worst[name] = error, j
    how = {entry.name: str(entry).partition(": ")[2] for entry in J.explain().entries}
    return tuple(
        RowFinding(name, error, j, how.get(name, ""), error <= tolerance) for name, (error, j) in worst.items()
    )


def _only(j: int, losses: Tensor) -> Tensor:
    seed = torch.zeros_like(losses.detach())
    seed[j] = 1
    return seed


def _backward(losses: Tensor, parameters: Parameters, seed: Tensor) -> Gradients:
    """What `losses.backward(seed)` adds to each parameter, zeros where nothing arrives; `.grad` stays as it is."""
    tensors = list(parameters.by_name.values())
    found = torch.autograd.grad(losses, tensors, seed, retain_graph=True, allow_unused=True)
    return {name: _written(g, p) for (name, p), g in zip(parameters.by_name.items(), found, strict=True)}


def _written(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Dense, zeros for None."""
    if gradient is None:
        return torch.zeros_like(like.detach())
    return gradient.to_dense() if gradient.is_sparse else gradient


def _norm(t: Tensor) -> float:
    return float(t.detach().double().norm())


def _error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference; inf where it is not a number."""
    error = _norm(_written(found, expected).double() - expected.double())
    return float("inf") if isnan(error) else error


def _over(error: float, norm: float) -> float:
    if error == 0:
        return 0.0
    return error / norm if norm > 0 else float("inf")


# One pass with a random weight for each example


def _compare_passes(
    tape: Tape, parameters: Parameters, J: Jacobian, tolerance: float, generator: torch.Generator
) -> tuple[str, ...]:
    """Notes on J^T u, on the engine's pass with u, and on the graph's nodes called with u."""
    u = torch.randn(len(J), generator=generator, dtype=torch.float64).to(J.losses)
    real = _backward(tape.output, parameters, u)
    norms = J.norms()
    size = max(_norm(u * norms), hypot(*map(_norm, real.values())))
    note = _note_on_hooks(tape, parameters, real, u, size, tolerance)
    if note is not None:
        return (note,)
    errors = {name: _over(_error(g, real[name]), size) for name, g in J.weighted_sum(u).items()}
    return tuple(
        f"FAILED {name}: J^T u for a random u is off by {error:.1e} from losses.backward(u)"
        for name, error in errors.items()
        if error > tolerance
    )


def _note_on_hooks(
    tape: Tape, parameters: Parameters, real: Gradients, u: Tensor, size: float, tolerance: float
) -> str | None:
    """What to say of hooks inside the model that change gradients; None where there are none."""
    names = {tape.leaves[id(p)]: name for name, p in parameters.by_name.items() if id(p) in tape.leaves}
    unhooked = {names[i]: z for (i, _), z in _cotangents_by_calls(tape, u, names) if i in names}
    size = max(size, hypot(*map(_norm, unhooked.values())))
    bent = {name: _over(_error(real[name], g), size) for name, g in unhooked.items()}
    name = max(bent, key=lambda n: bent[n])
    if bent[name] <= tolerance:
        return None
    node = _hooked_node(tape, u, names, tolerance)
    place = "inside the model" if node is None else f"at an output of {node!r}"
    return (
        f"FAILED {name}: a tensor or module hook {place} changes gradients on their way, in losses.backward(u) by "
        f"{bent[name]:.1e} of the whole. Hooks are no part of the derivative, and rows follow them only by chance: "
        "remove the hook, or make the change an operation of the model, for instance a torch.autograd.Function"
    )


def _cotangents_by_calls(
    tape: Tape, seed: Tensor, leaves: Mapping[int, str]
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """((node, output), cotangent) in topological order, by calling nodes: no hook runs."""
    for node, own in walk(tape, {tape.root_slot: seed}, Cotangents(tape), needed=above(tape, leaves)):
        yield from (((node.index, nr), z) for nr, z in enumerate(own) if z is not None)


def _hooked_node(tape: Tape, u: Tensor, leaves: Mapping[int, str], tolerance: float) -> Node | None:
    """The first node whose cotangent the engine's pass changes.

    The engine hands out a cotangent before its hooks if the pass goes on below, after them if it ends there. So the
    first that differs may lie one node below the hook: those above it are asked for again, one pass each.
    """
    cotangents = _cotangents_by_calls(tape, u, leaves)
    while block := dict(islice(cotangents, EDGES_AT_A_TIME)):
        real = tape.cotangents(list(block), u)
        for (edge, unhooked), z in zip(block.items(), real, strict=True):
            if not _agree(z, unhooked, tolerance):
                return _first_bent(tape, u, edge[0], leaves, tolerance)
    return None


def _first_bent(tape: Tape, u: Tensor, below: int, leaves: Mapping[int, str], tolerance: float) -> Node:
    readers = {node.index for node in tape.nodes if any(t is not None and t[0] == below for t in node.slots)}
    for edge, unhooked in _cotangents_by_calls(tape, u, leaves):
        if edge[0] in readers and not _agree(tape.cotangents([edge], u)[0], unhooked, tolerance):
            return tape.nodes[edge[0]]
    return tape.nodes[below]


def _agree(found: Tensor | None, expected: Tensor, tolerance: float) -> bool:
    found = _written(found, expected)
    return _over(_error(found, expected), _norm(expected)) <= tolerance
