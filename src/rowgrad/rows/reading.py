"""One graph with its plan: the engine pass, the forms it brings, and the Jacobian they make."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rowgrad.errors import RowgradWarning
from rowgrad.parameters import Parameters
from rowgrad.rows.block import Block
from rowgrad.rows.explain import Entry, Explanation
from rowgrad.rows.factors import Dense, Form, Multiples
from rowgrad.rows.frontier import Use
from rowgrad.rows.general import GeneralPath
from rowgrad.rows.matrix import Jacobian
from rowgrad.rows.ownership import Axis, Edge
from rowgrad.rows.pack import KEPT_BYTES, Blocks
from rowgrad.rows.placement import Place, settle
from rowgrad.rows.plan import Plan
from rowgrad.rows.push import push, written_out_bytes
from rowgrad.rows.site import Cotangents
from rowgrad.tape import Node, Tape, version, written_to

SLOW_ROWS = 2**20  # numbers in the rows of a parameter, from which it takes time to write them out

_warned: set[tuple] = set()  # one warning per graph, not per step


@dataclass
class Reading:
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
        warnings.warn(
            f"{name} at {kind}{more}: {why} See Jacobian.explain()", RowgradWarning, stacklevel=_level_of_caller()
        )

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


def _level_of_caller() -> int:
    """Of the first call from outside the package, for a warning where this is asked."""
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "rowgrad":
        level, frame = level + 1, frame.f_back
    return level
