"""Checks against the slow truth, for users: are these rows the gradients that autograd itself gives?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rowgrad.rows.build import check_losses, jacobian
from rowgrad.rows.matrix import Jacobian
from rowgrad.rows.parameters import Parameters, Params, named
from rowgrad.rows.rules import RULES
from rowgrad.rows.site import Rule

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Finding:
    """The worst row of one parameter: its error over the whole row's norm, and where the parameter is used."""

    parameter: str
    error: float
    example: int
    how: str
    ok: bool


@dataclass(frozen=True)
class Report:
    """What a check found, one line a parameter; `ok` if all of it is within tolerance."""

    title: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    tolerance: float

    @property
    def ok(self) -> bool:
        return not self.notes and all(f.ok for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        width = max([len(f.parameter) for f in self.findings], default=9)
        lines = [f"{self.title}: {'ok' if self.ok else 'FAILED'} (relative error up to {self.tolerance:.0e} allowed)"]
        for f in self.findings:
            mark = "ok    " if f.ok else "FAILED"
            lines.append(f"{mark} {f.parameter:<{width}}  {f.error:.1e} at example {f.example}  {f.how}")
        return "\n".join([*lines, *self.notes])


def check_rows(
    closure: Callable[[], Tensor],
    params: Params,
    *,
    examples: Sequence[int] | None = None,
    rtol: float | None = None,
    rules: Mapping[tuple[str, int], Rule] = RULES,
    generator: torch.Generator | None = None,
) -> Report:
    """Compare the rows of the Jacobian with one backward pass per example, on the same graph.

    Each row is also asked for as part of J^T u with a random u, against an ordinary `losses.backward(u)`: that sees
    every error of ownership, and tensor hooks inside the model that change gradients. Nothing is left in `.grad`.

    Args:
        closure: a fresh forward pass; returns the losses, shape (B,). Called once.
        params: as for `rowgrad.jacobian`.
        examples: which rows to compare one by one; default all.
        rtol: allowed error of a row over that row's norm; default by dtype, 1e-9 in float64 and 1e-4 in float32.
        rules: the table under test.
        generator: for u; default a generator of its own.
    Returns:
        A `Report` with `ok`, `to_dict()` and a table as its `str`.

    >>> import torch, rowgrad
    >>> model = torch.nn.Linear(3, 1)
    >>> rowgrad.check_rows(lambda: model(torch.eye(3)).squeeze(1).square(), model).ok
    True
    """
    losses = closure()
    check_losses(losses)
    parameters = named(params)
    tolerance = rtol if rtol is not None else _tolerance(losses, parameters)
    J = jacobian(losses, parameters.by_name, rules=rules, retain_graph=True, verify="always")
    chosen = range(len(losses)) if examples is None else examples
    findings = _compare_rows(losses, parameters, J, chosen, tolerance)
    notes = _compare_backward(losses, parameters, J, tolerance, generator or torch.Generator().manual_seed(0))
    return Report(f"rows of {len(losses)} examples", findings, notes, tolerance)


def _tolerance(losses: Tensor, parameters: Parameters) -> float:
    dtypes = {losses.dtype, *(p.dtype for p in parameters.by_name.values())}
    return max(TOLERANCE.get(d, 1e-4) for d in dtypes)


def _compare_rows(
    losses: Tensor, parameters: Parameters, J: Jacobian, examples: Sequence[int], tolerance: float
) -> tuple[Finding, ...]:
    worst: dict[str, tuple[float, int]] = dict.fromkeys(parameters.by_name, (0.0, 0))
    for j in examples:
        expected = _row(losses, parameters, j)
        found = J[[j]].dense(as_dict=True)
        assert isinstance(found, dict)
        norm = torch.stack([e.double().square().sum() for e in expected.values()]).sum().sqrt()
        for name, row in expected.items():
            error = _relative(found[name][0], row, norm)
            worst[name] = max(worst[name], (error, j))
    how = {e.name: str(e) for e in J.explain().entries}
    return tuple(
        Finding(name, error, j, how[name].partition(": ")[2], error <= tolerance) for name, (error, j) in worst.items()
    )


def _row(losses: Tensor, parameters: Parameters, j: int) -> dict[str, Tensor]:
    tensors = list(parameters.by_name.values())
    found = torch.autograd.grad(losses[j], tensors, retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g)
        for (name, p), g in zip(parameters.by_name.items(), found, strict=True)
    }


def _relative(found: Tensor, expected: Tensor, norm: Tensor) -> float:
    """Error over the norm of the whole row; inf where one is finite and the other is not."""
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return float("inf")
    error = (found.double() - expected.double()).nan_to_num(0, 0, 0).norm()
    if not bool(error > 0):
        return 0.0
    return float(error / norm) if bool(norm > 0) else float("inf")


def _compare_backward(
    losses: Tensor, parameters: Parameters, J: Jacobian, tolerance: float, generator: torch.Generator
) -> tuple[str, ...]:
    u = torch.randn(len(losses), generator=generator, dtype=torch.float64).to(losses)
    tensors = list(parameters.by_name.values())
    real = torch.autograd.grad(losses, tensors, u, retain_graph=True, allow_unused=True)
    notes = []
    norms = J.norms()
    assert isinstance(norms, Tensor)
    size = float((u.abs() * norms).nan_to_num(0, 0, 0).sum())
    for (name, ours), g in zip(J.weighted_sum(u).items(), real, strict=True):
        theirs = torch.zeros_like(ours) if g is None else g
        theirs = theirs.to_dense() if theirs.is_sparse else theirs
        ours = ours.to_dense() if ours.is_sparse else ours
        error = float((ours - theirs).norm())
        if error > 4 * tolerance * size:
            notes.append(
                f"FAILED {name}: J^T u and losses.backward(u) differ by {error / size if size else error:.1e}. Where "
                "single rows agree, a tensor hook inside the model may change gradients on their way"
            )
    return tuple(notes)
