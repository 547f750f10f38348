"""Rows of networks that nobody wrote, against gradients taken one loss at a time."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from tests.reference import flat, rows_by_grad
from tests.rows.programs import Machine, Program, programs
from torch import Tensor, nn

import rowgrad as rg

RTOL = 1e-10
FLOOR = (
    1e-12  # a row that is zero but for rounding: entries of the networks, and of their derivatives, are of order one
)
RESULT = Path(__file__).with_name("random_graphs_result.json")
LONG = 5000
SEED = 20_240_601


@dataclass
class Tally:
    """What was run and how far off it was, at worst."""

    programs: int = 0
    graphs: int = 0
    coupled: int = 0
    by_rules_alone: int = 0
    worst: float = 0.0
    worst_program: str = ""
    steps: Counter[str] = field(default_factory=Counter)

    def close(self, found: Tensor, expected: Tensor, scale: Tensor, program: Program, what: str) -> None:
        """Within RTOL of the scale; rows (or products) that are rounding themselves within FLOOR."""
        assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        error = (found.detach() - expected).abs()
        allowed = RTOL * scale + FLOOR
        assert bool((error <= allowed).all()), (
            f"{what}: off by {float(error.max()):.2g} (scale {float(scale.max()):.2g})"
        )
        solid = (scale > 1e-2).expand_as(error)
        if bool(solid.any()):
            worst = float((error / scale)[solid].max())
            if worst > self.worst:
                self.worst, self.worst_program = worst, f"{what}: {program}"


def check(program: Program, tally: Tally) -> None:
    params = nn.ParameterDict()
    for content in (0, 1):  # the second call may find the structure of the first
        losses = Machine(program, content, params).run()
        if not losses.isfinite().all():
            return
        named = dict(params)
        expected = rows_by_grad(losses, named)
        if not flat(expected).isfinite().all():
            return
        J = rg.jacobian(losses, named, retain_graph=True)
        _check_products(J, expected, program, tally)
        if content == 1:
            _check_other_ways(losses, named, expected, program, tally)
        tally.graphs += 1
        tally.coupled += bool(J.couplings)
        tally.by_rules_alone += not J.explain().slow_uses()
    tally.programs += 1
    tally.steps.update(name for name, _, _ in program.steps)


def _check_products(J: rg.Jacobian, expected: dict[str, Tensor], program: Program, tally: Tally) -> None:
    A = flat(expected)
    norms = A.norm(dim=1)
    n = len(A)
    tally.close((J.dense() - A).norm(dim=1), torch.zeros(n, dtype=A.dtype), norms, program, "dense")
    tally.close(J.norms().square(), norms.square(), norms.square(), program, "norms")
    for name, sq in J.sq_norms("parameter").items():
        tally.close(sq, flat({name: expected[name]}).square().sum(1), norms.square(), program, f"sq_norms of {name}")
    v = torch.linspace(-1, 1, A.shape[1], dtype=A.dtype)
    parts = v.split([p[0].numel() for p in expected.values()])
    direction = {name: part.view(p.shape[1:]) for (name, p), part in zip(expected.items(), parts, strict=True)}
    tally.close(J @ direction, A @ v, norms * v.norm(), program, "dot")
    c = torch.linspace(-1, 2, n, dtype=A.dtype)
    total = torch.cat([g.to_dense().flatten() for g in J.weighted_sum(c).values()])
    tally.close(total, c @ A, (c.abs() * norms).sum(), program, "weighted sum")
    tally.close(J.gram(), A @ A.T, torch.outer(norms, norms), program, "gram")
    tally.close(J.diag_gram(J), norms.square(), norms.square(), program, "diag_gram")
    tally.close(J[[n - 1, 0]].norms().square(), norms[[n - 1, 0]].square(), norms.square().max(), program, "part")


def _check_other_ways(
    losses: Tensor, named: dict[str, Tensor], expected: dict[str, Tensor], program: Program, tally: Tally
) -> None:
    A = flat(expected)
    norms = A.norm(dim=1)
    zero = torch.zeros_like(norms)
    general = rg.jacobian(losses, named, retain_graph=True, rules={})
    tally.close((general.dense() - A).norm(dim=1), zero, norms, program, "general path")
    streamed = rg.grad_norms(losses, named, retain_graph=True)
    tally.close(streamed.square(), norms.square(), norms.square(), program, "grad_norms")
    written = rg.grad_rows(losses, named, retain_graph=True)
    tally.close((flat(written) - A).norm(dim=1), zero, norms, program, "grad_rows")
    proved = rg.jacobian(losses, named, verify="always")
    proved.loss(1.0).backward()
    total = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad.to_dense()).flatten() for p in named.values()]
    )
    tally.close(total, A.sum(0), norms.sum(), program, "loss")
    for p in named.values():
        p.grad = None


quiet = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), max_examples=300)


@given(program=programs)
@quiet
def test_rows_of_random_graphs(program: Program) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rg.RowgradWarning)
        check(program, Tally())


@pytest.mark.long
def test_rows_of_very_many_random_graphs() -> None:
    """As above on thousands of programs; what was found is written beside this file."""
    tally = Tally()

    @seed(SEED)
    @settings(quiet, max_examples=int(os.environ.get("ROWGRAD_EXAMPLES", LONG)), derandomize=False)
    @given(program=programs)
    def run(program: Program) -> None:
        check(program, tally)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rg.RowgradWarning)
        run()
    _write(tally)


def _write(tally: Tally) -> None:
    result = {
        "programs": tally.programs,
        "graphs": tally.graphs,
        "graphs whose examples are coupled": tally.coupled,
        "graphs by rules alone": tally.by_rules_alone,
        "seed": SEED,
        "torch": torch.__version__,
        "allowed relative error": RTOL,
        "worst relative error": tally.worst,
        "worst at": tally.worst_program,
        "programs with each step": dict(sorted(tally.steps.items())),
    }
    with tempfile.NamedTemporaryFile("w", dir=RESULT.parent, suffix=".json", delete=False) as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    os.replace(file.name, RESULT)


def test_the_result_of_the_long_run_is_there_and_good() -> None:
    result = json.loads(RESULT.read_text())
    assert result["programs"] >= LONG * 0.99  # a program whose numbers overflow is passed over
    assert result["worst relative error"] <= RTOL
