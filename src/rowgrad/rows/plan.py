"""What to do for a graph, decided before the pass that yields the cotangents, and kept where that is safe.

Note [what may be kept]
    The layouts at the uses and the frontier are kept for graphs of equal signature (everything but the contents of
    tensors) only if every layout above the uses follows from the structure alone (rows/structure.py) and agrees with
    the proof by numbers, and no cotangent above the uses was zero throughout. Any other graph is proved at every call,
    for the edges that the structure does not settle. What is kept is proved again at every 50th call. The kept part
    holds no tensor.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rowgrad.rows.frontier import Frontier, Use, edges_to_prove, find_uses, needed_nodes, static_nodes
from rowgrad.rows.ownership import Axis, Edge, Layout, Prover
from rowgrad.rows.placement import Place, place_of
from rowgrad.rows.site import Recipe, Rule, Site
from rowgrad.rows.structure import infer
from rowgrad.tape import Tape

KEPT_SIGNATURES = 64
PROVE_EVERY = 50  # calls


@dataclass
class Ownership:
    """Where the examples lie at the uses, and how that is known."""

    frontier: Frontier
    layouts: dict[Edge, Layout]
    proof: str


@dataclass
class _Kept:
    ownership: Ownership | None  # None: to be proved at every call
    settled: dict[Edge, Axis]  # proved once and settled by structure
    calls: int = 0


@dataclass
class Plan:
    """Uses of the parameters with their recipes; a use without a recipe or place goes the general path."""

    ownership: Ownership
    recipes: dict[Use, Recipe]
    places: dict[Use, Place]

    @property
    def uses(self) -> list[Use]:
        return self.ownership.frontier.uses

    def edges(self, tape: Tape) -> list[Edge]:
        nodes = sorted({use.node for use in self.uses})
        return [(i, nr) for i in nodes for nr in range(tape.nodes[i].n_outputs) if tape.nodes[i].is_traced(nr)]

    @property
    def is_ruled(self) -> bool:
        """Whether every use has a recipe."""
        return all(use in self.recipes for use in self.uses)

    @property
    def is_direct(self) -> bool:
        """Whether every use has a recipe and sees a strided part of one parameter."""
        return all(use in self.recipes and use in self.places for use in self.uses)

    @property
    def needs_graph(self) -> bool:
        """Whether nodes are called after the pass, so that their saved tensors must outlive it."""
        return not self.is_direct or any(r.needs_graph for r in self.recipes.values())


_kept: OrderedDict[tuple, _Kept] = OrderedDict()


def forget() -> None:
    """Drop everything kept from earlier calls."""
    _kept.clear()


def make_plan(
    tape: Tape, seed: Tensor, leaves: Mapping[int, str], rules: Mapping[tuple[str, int], Rule], verify: str
) -> Plan:
    """Find the uses, how the examples lie there, and a recipe for each where the rules have one."""
    ownership = _ownership(tape, seed, leaves, verify)
    recipes: dict[Use, Recipe] = {}
    places: dict[Use, Place] = {}
    for use in ownership.frontier.uses:
        node = tape.nodes[use.node]
        rule = rules.get((node.kind, use.slot))
        recipe = rule(Site(tape, node, use.slot, ownership.layouts, len(seed))) if rule is not None else None
        if recipe is not None:
            recipes[use] = recipe
            place = place_of(tape, use.target)
            if place is not None:
                places[use] = place
    return Plan(ownership, recipes, places)


def _ownership(tape: Tape, seed: Tensor, leaves: Mapping[int, str], verify: str) -> Ownership:
    if verify == "always" or len(seed) == 1:
        return _prove(tape, seed, leaves, {}, {})
    key = (tape.signature(), tuple(sorted(leaves)), seed.dtype, len(seed))
    kept = _kept.get(key)
    if kept is not None:
        _kept.move_to_end(key)
        kept.calls += 1
        if kept.calls % PROVE_EVERY:
            return kept.ownership or _prove(tape, seed, leaves, kept.settled, kept.settled)
    inferred = infer(tape, len(seed))
    ownership = _prove(tape, seed, leaves, {}, inferred)
    _kept[key] = _what_to_keep(tape, ownership, inferred)
    while len(_kept) > KEPT_SIGNATURES:
        _kept.popitem(last=False)
    return ownership


def _prove(
    tape: Tape, seed: Tensor, leaves: Mapping[int, str], settled: Mapping[Edge, Axis], expected: Mapping[Edge, Axis]
) -> Ownership:
    """Prove the layout of every edge that is not settled, and find the uses."""
    static, needed = static_nodes(tape), needed_nodes(tape, leaves)
    edges = edges_to_prove(tape, static, needed)
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7)))
    prover = Prover(tape, seed, generator, allow_rounding=seed.device.type != "cpu")
    layouts: dict[Edge, Layout] = {e: settled[e] for e in edges if e in settled}
    layouts |= prover.layouts([e for e in edges if e not in settled], expected)
    return Ownership(
        find_uses(tape, layouts, static, needed, len(seed)), layouts, "within rounding" if prover.rounded else "exact"
    )


def _what_to_keep(tape: Tape, ownership: Ownership, inferred: Mapping[Edge, Axis]) -> _Kept:
    """See Note [what may be kept]."""
    above = {e: layout for e, layout in ownership.layouts.items() if not ownership.frontier.tainted[e[0]]}
    settled = {e: a for e, a in inferred.items() if above.get(e) == a}
    if len(settled) < len(above):
        return _Kept(None, settled)
    return _Kept(replace(ownership, layouts=dict(above), proof=f"{ownership.proof}, kept"), settled)
