"""What to do for a graph, decided before the pass that yields the cotangents, and kept where that is safe.

Note [what may be kept]
    The layouts at the uses and the frontier are kept for graphs of equal signature (everything but the contents of
    tensors) only if every layout above the uses follows from the structure alone (rows/structure.py), and those at the
    uses were confirmed by numbers, which a cotangent that is zero throughout cannot be. For any other graph that is
    found anew at every call: where ids in the graph tell the owners (rows/listed.py), from these, if numbers confirmed
    it for the structure; for other edges, by a proof. If numbers contradict the structure, nothing of it is believed.
    What is kept is confirmed again at every 200th call, what is not kept is tried again at the first, second, fourth,
    ... later call: cotangents may be zero only as long as a weight is. The kept part holds no tensor.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from rowgrad.errors import GraphError, NonFiniteError
from rowgrad.rows.explain import Explanation
from rowgrad.rows.factors import Form
from rowgrad.rows.frontier import Frontier, Use, edges_to_prove, find_uses, needed_nodes, static_nodes
from rowgrad.rows.listed import Listed, laid_out
from rowgrad.rows.ownership import MIXED, ZERO, Axis, Edge, Entries, Layout, Prover
from rowgrad.rows.placement import Place, place_of
from rowgrad.rows.site import Cotangents, Recipe, Rule, Site
from rowgrad.rows.structure import infer, opaque
from rowgrad.tape import RecomputedOnce, Tape, Watch, forget_structures

KEPT_CHOICES = 64  # of parameters, for each structure
PROVE_EVERY = 200  # calls; a proof costs about one and a half plain steps, so under 1% of the time


@dataclass
class Ownership:
    """Where the examples lie at the uses, how that is known, and which part of a parameter each use sees."""

    frontier: Frontier
    layouts: dict[Edge, Layout]
    places: dict[Use, Place]
    proof: str
    by_node: dict[int, list[Use]]
    watch: Watch  # of the nodes with uses
    held: frozenset[int]  # leaves of parameters below a use that sees no strided part of them
    alone: frozenset[Use]  # of parameters that have no other, and are seen whole
    nobody: dict[int, list[tuple[int, int, Tensor]]]  # node -> (output, dimension, indices) that no example reaches
    told: dict[tuple, Explanation] = field(default_factory=dict)
    recipes: dict[Use, tuple[Rule, Recipe]] = field(default_factory=dict)  # that hold nothing of a graph


@dataclass
class _Kept:
    ownership: Ownership | None  # None: to be proved at every call
    settled: dict[Edge, Axis]  # proved once and settled by structure
    listed: frozenset[Edge]  # proved once and settled by structure with the ids of a graph
    calls: int = 0

    @property
    def is_due(self) -> bool:
        """Whether to confirm it anew. What zeros left unsettled (a layer that begins with zeros) soon shows."""
        is_open = self.ownership is None and not self.calls & (self.calls - 1)
        return is_open or self.calls % PROVE_EVERY == 0


@dataclass
class Plan:
    """Uses of the parameters with their recipes; a use without a recipe or place goes the general path."""

    ownership: Ownership
    recipes: dict[Use, Recipe]
    places: dict[Use, Place]
    tape: Tape
    saved: dict[Use, list[Any]] = field(default_factory=dict)  # read for the recipes
    unread: set[int] = field(default_factory=set)  # nodes of which to read when they are passed
    _once: RecomputedOnce = field(default_factory=RecomputedOnce)

    @property
    def uses(self) -> list[Use]:
        return self.ownership.frontier.uses

    @property
    def is_ruled(self) -> bool:
        """Whether every use has a recipe."""
        return len(self.recipes) == len(self.uses)

    @property
    def needs_graph(self) -> bool:
        """Whether nodes that the pass executes are called after it, so that their saved tensors must outlive it.

        Below the uses the pass executes nothing, and what is not executed keeps its tensors.
        """
        return not self.is_ruled or any(r.needs_graph for r in self.recipes.values())

    def read_before(self) -> None:
        """What the nodes saved, but where it is recomputed or fetched, which is done when they are passed."""
        nodes = self.tape.nodes
        saved = [(use.node, recipe.saved or ()) for use, recipe in self.recipes.items()]
        self.unread = {node for node, names in saved if any(map(nodes[node].unpacks, names))}
        if self.unread and torch.is_inference_mode_enabled():
            raise GraphError(
                "asked in inference mode, in which checkpointed regions of the graph cannot be recomputed. Ask outside"
            )
        for use in self.recipes:
            if use.node not in self.unread:
                self._read(use)

    def read(self, node: int) -> int:
        """What a node saved, where it is not read yet; returns its bytes."""
        if node not in self.unread:
            return 0
        self.unread.remove(node)
        uses = [use for use in self.ownership.by_node[node] if use in self.recipes]
        with self._once:
            for use in uses:
                self._read(use)
        return sum([t.nbytes for use in uses for t in self.saved[use] if isinstance(t, Tensor)])

    def read_all(self) -> None:
        """For cotangents that come when the graph may be gone."""
        for node in list(self.unread):
            self.read(node)

    def _read(self, use: Use) -> None:
        node = self.tape.nodes[use.node]
        self.saved[use] = [_strided(node.saved_as_it_is(name)) for name in self.recipes[use].saved or ()]

    def form(self, use: Use, cotangents: Cotangents) -> Form | None:
        """The form, to be asked for once; None where no cotangent arrived. Lets go of what the node saved."""
        self.read(use.node)
        recipe, saved = self.recipes[use], self.saved.pop(use)
        if recipe.saved is None:
            self.recipes[use] = replace(recipe, build=_spent)
        for z in cotangents:
            if z is not None:
                return recipe.build(cotangents, *saved)
        return None

    def check_nobody(self, node: int, cotangents: Cotangents) -> None:
        """What no example reaches was not looked at in this call."""
        for nr, dim, indices in self.ownership.nobody.pop(node, ()):
            z = cotangents[nr]
            if z is not None and bool(z.index_select(dim, indices).any()):
                raise NonFiniteError(
                    f"{self.tape.nodes[node]!r}: the gradient is not zero where no example reaches it (zero times "
                    "infinity in a padded row, or a hook that adds to it), and would be part of every example's row. "
                    'Mask such rows before what makes them infinite, or ask with verify="always"'
                )


def _strided(value: Any) -> Any:
    """Sparse data, written out: it is rearranged by example."""
    return value.to_dense() if isinstance(value, Tensor) and value.layout != torch.strided else value


def _spent(cotangents: Cotangents) -> Form:
    raise AssertionError("bug in rowgrad, please report: a form was asked for twice")


def forget() -> None:
    """Drop everything kept from earlier calls."""
    forget_structures()


def make_plan(
    tape: Tape, seed: Tensor, leaves: Mapping[int, str], rules: Mapping[tuple[str, int], Rule], verify: str
) -> Plan:
    """Find the uses, how the examples lie there, and a recipe for each where the rules have one."""
    ownership = _ownership(tape, seed, leaves, verify)
    uses, places = ownership.frontier.uses, ownership.places
    recipes = _recipes(tape, ownership, rules, seed.shape[0])
    if len(recipes) < len(uses):
        places = {use: place for use, place in places.items() if use in recipes}
    plan = Plan(ownership, recipes, places, tape)
    plan.read_before()
    return plan


def _recipes(
    tape: Tape, ownership: Ownership, rules: Mapping[tuple[str, int], Rule], n_examples: int
) -> dict[Use, Recipe]:
    """Of all uses for which there are some. What holds nothing of the graph is kept for the next one."""
    found: dict[Use, Recipe] = {}
    for use in ownership.frontier.uses:
        node = tape.nodes[use.node]
        rule = rules.get((node.kind, use.slot))
        if rule is None:
            continue
        of_rule, recipe = ownership.recipes.get(use, (None, None))
        if of_rule is not rule:
            recipe = rule(Site(tape, node, use.slot, ownership.layouts, n_examples))
            if recipe is not None and recipe.saved is not None:
                ownership.recipes[use] = (rule, recipe)
        if recipe is not None:
            found[use] = recipe
    return found


def _ownership(tape: Tape, seed: Tensor, leaves: Mapping[int, str], verify: str) -> Ownership:
    if verify == "always" or seed.shape[0] == 1:
        return _Proof(tape, seed, leaves).ownership({})
    key = (tuple(sorted(leaves)), seed.dtype)
    of_structure: dict[tuple, _Kept] = tape.structure.kept
    kept = of_structure.get(key)
    if kept is not None:
        kept.calls += 1
        if not kept.is_due:
            return kept.ownership or _Proof(tape, seed, leaves).again(kept)
    proof = _Proof(tape, seed, leaves)
    told, mixed = proof.confirmed(proof.inferred())
    ownership = proof.ownership(told, mixed)
    n_calls = kept.calls if kept is not None else 0
    settled = {e: layout for e, layout in told.items() if isinstance(layout, Axis)}
    of_structure[key] = _Kept(_lasting(ownership, settled), settled, frozenset(told.keys() - settled.keys()), n_calls)
    for oldest in list(of_structure)[:-KEPT_CHOICES]:
        of_structure.pop(oldest, None)
    return ownership


class _Proof:
    """The layouts of one graph's edges, for one call."""

    def __init__(self, tape: Tape, seed: Tensor, leaves: Mapping[int, str]) -> None:
        self.tape, self.leaves = tape, leaves
        self.n_examples = seed.shape[0]
        self.static, self.needed = static_nodes(tape), needed_nodes(tape, leaves)
        generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7)))
        self._proved: dict[Edge, Layout] = {}  # beyond what structure tells
        self.prover = Prover(tape, seed, generator, allow_rounding=seed.device.type != "cpu")

    def _edges(self, settled: Mapping[Edge, Axis | Listed]) -> list[Edge]:
        return edges_to_prove(self.tape, self.static, self.needed, settled)

    def _told(self, edges: Iterable[Edge], settled: Mapping[Edge, Axis | Listed]) -> dict[Edge, Axis | Entries]:
        """Of some edges, as far as they are settled."""
        return {e: laid_out(self.tape, e, settled[e]) for e in edges if e in settled}

    def inferred(self) -> dict[Edge, Axis | Listed]:
        """What follows from structure and ids; beyond nodes of kinds not listed, from what numbers show below them."""
        wanted = [needed and not static for needed, static in zip(self.needed, self.static, strict=True)]
        found = infer(self.tape, self.n_examples, wanted)
        if all(e in found for e in self._edges(found)):
            return found
        edges = [e for e in opaque(self.tape) if wanted[e[0]] and self.tape.nodes[e[0]].is_traced(e[1])]
        known: dict[Edge, Listed] = {}
        self._proved = self.prover.layouts(edges)
        for (i, nr), layout in self._proved.items():
            listed = Listed.of_proved(layout, self.tape.nodes[i].shape(nr), self.n_examples)
            if listed is not None:
                known[i, nr] = listed
        return infer(self.tape, self.n_examples, wanted, known) if known else found

    def again(self, kept: _Kept) -> Ownership:
        """With what was settled for the structure, and what this graph's ids make of it."""
        if not kept.listed:
            return self.ownership(kept.settled)
        inferred = self.inferred()
        return self.ownership(kept.settled | {e: layout for e, layout in inferred.items() if e in kept.listed})

    def confirmed(self, inferred: Mapping[Edge, Axis | Listed]) -> tuple[dict[Edge, Axis | Listed], dict[Edge, Layout]]:
        """What is settled by structure and confirmed by numbers, nothing if they contradict; and what surely mixes."""
        settled = dict(inferred)
        found: dict[Edge, Layout | None] = {}
        while edges := [e for e in self._edges(settled) if e not in found]:  # again where a zero settles nothing
            found |= self.prover.look(edges, self._told(edges, settled))
            if any(layout is MIXED and e in settled for e, layout in found.items()):
                return {}, {}
            found |= {e: None for e in edges if e not in found}
            settled = {e: layout for e, layout in settled.items() if found.get(e) is not ZERO}
        return settled, {e: MIXED for e, layout in found.items() if layout is MIXED}

    def ownership(
        self, settled: Mapping[Edge, Axis | Listed], known: Mapping[Edge, Layout] = MappingProxyType({})
    ) -> Ownership:
        """Prove the layout of every edge that matters and is neither settled nor known, and find the uses."""
        edges = self._edges(settled)
        layouts: dict[Edge, Layout] = {e: layout for e in edges if (layout := known.get(e)) is not None}
        layouts |= {e: self._proved[e] for e in edges if e in self._proved}
        layouts |= self._told([e for e in edges if e not in layouts], settled)
        layouts |= self.prover.layouts([e for e in edges if e not in layouts])
        frontier = find_uses(self.tape, layouts, self.static, self.needed, self.n_examples)
        places = {use: place for use in frontier.uses if (place := place_of(self.tape, use.target)) is not None}
        proof = "within rounding" if self.prover.rounded else "exact"
        by_node: dict[int, list[Use]] = {}
        for use in frontier.uses:
            by_node.setdefault(use.node, []).append(use)
        nodes = [self.tape.nodes[i] for i in sorted(by_node)]
        watch = self.tape.watch([(n.index, nr) for n in nodes for nr in range(n.n_outputs) if n.is_traced(nr)])
        held = self._leaves_below(use.target[0] for use in frontier.uses if use not in places)
        n_uses = Counter(place.leaf for place in places.values())
        alone = frozenset(
            use
            for use, place in places.items()
            if place.leaf not in held and n_uses[place.leaf] == 1 and place.numel == self._variable(place.leaf).numel()
        )
        nobody = self._nobody(by_node, settled)
        return Ownership(frontier, layouts, places, proof, by_node, watch, held, alone, nobody)

    def _leaves_below(self, nodes: Iterable[int]) -> frozenset[int]:
        """Of the parameters asked for, those at or below some nodes."""
        below = set(nodes)
        for node in self.tape.nodes:
            if node.index in below:
                below |= {target[0] for target in node.slots if target is not None}
        return frozenset(below & self.leaves.keys())

    def _nobody(
        self, nodes: Iterable[int], settled: Mapping[Edge, Axis | Listed]
    ) -> dict[int, list[tuple[int, int, Tensor]]]:
        found: dict[int, list[tuple[int, int, Tensor]]] = {}
        for node in nodes:
            for nr in range(self.tape.nodes[node].n_outputs):
                layout = settled.get((node, nr))
                if isinstance(layout, Listed) and len(indices := layout.nobody):
                    device = self.tape.nodes[node].device(nr)
                    found.setdefault(node, []).append((nr, layout.dim, indices.to(device)))
        return found

    def _variable(self, leaf: int) -> Tensor:
        variable = self.tape.nodes[leaf].variable
        assert variable is not None
        return variable


def _lasting(ownership: Ownership, settled: Mapping[Edge, Axis]) -> Ownership | None:
    """The part that holds for every graph of the signature, None where there is more. See Note [what may be kept]."""
    above = {e: layout for e, layout in ownership.layouts.items() if not ownership.frontier.tainted[e[0]]}
    if any(e not in settled for e in above):
        return None
    return replace(ownership, layouts=above, proof=f"{ownership.proof}, kept", told={}, recipes={})
