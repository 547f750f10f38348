"""What is asked of each parameter by itself, found while the cotangents pass, so that little of them is held."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import Tensor

from rowgrad.rows.block import Block
from rowgrad.rows.factors import Dense, Form, in_type, wide_dtype
from rowgrad.rows.frontier import Use
from rowgrad.rows.matrix import Jacobian
from rowgrad.rows.pack import is_small, small_form
from rowgrad.rows.placement import Place, settle
from rowgrad.rows.reading import Reading

_T = TypeVar("_T")


class Arrivals(ABC, Generic[_T]):
    """Takes the forms at the uses as they come, and answers for each parameter once its last use is there.

    Only where every use has a recipe.
    """

    def __init__(self, reading: Reading) -> None:
        assert reading.plan is not None
        self._reading = reading
        self._parameters = reading.parameters.by_name
        self._places = reading.plan.places
        self._alone = reading.plan.ownership.alone if reading.loss_scale == 1 else frozenset()
        self._open: dict[int, int] = {}  # uses to come, by leaf
        self._parts: dict[int, list[tuple[Form, Place]]] = {}
        self._seeds: dict[Use, Form] = {}
        for use, place in self._places.items():
            if use not in self._alone:
                self._open[place.leaf] = self._open.get(place.leaf, 0) + 1
        for leaf in reading.plan.ownership.held:
            self._open[leaf] = self._open.get(leaf, 0) + 1  # closed at the end

    def after_pass(self, retain_graph: bool) -> _T:
        """The answers of all parameters, from the pass."""
        self._reading.read(retain_graph, self.take)
        return self.finished()

    def take(self, use: Use, form: Form | None) -> bool:
        """Whether it keeps the form."""
        place = self._places.get(use)
        if place is None:
            if form is not None:
                self._seeds[use] = form
            return True
        leaf = place.leaf
        if use in self._alone:
            return form is not None and self._take_alone(self._reading.leaves[leaf], form, place)
        if form is not None:
            form, place = self._reading.placed(form, place)
            self._parts.setdefault(leaf, []).append((form.condensed(), place))
        self._open[leaf] -= 1
        if not self._open[leaf]:
            self._close(leaf)
        return True

    def _close(self, leaf: int) -> None:
        name = self._reading.leaves[leaf]
        self._take_block(name, self._block(name, self._parts.pop(leaf, [])))

    def _block(self, name: str, parts: list[tuple[Form, Place]]) -> Block:
        return Block.of(self._parameters[name], parts, self._reading.n_examples)

    def finished(self) -> _T:
        """The answers, once all has arrived."""
        below = self._reading.pushed_down(self._seeds) if self._seeds else {}
        for leaf, parts in below.items():
            self._parts.setdefault(leaf, []).extend(parts)
        for leaf, n_open in self._open.items():
            if n_open:  # held, or a use that no cotangent reached
                self._close(leaf)
        return self._answers()

    @abstractmethod
    def _take_alone(self, name: str, form: Form, place: Place) -> bool:
        """The only use of a parameter, which sees all of it; returns whether the form is kept."""

    @abstractmethod
    def _take_block(self, name: str, block: Block) -> None:
        """All uses of a parameter."""

    @abstractmethod
    def _answers(self) -> _T: ...


class Norms(Arrivals[Jacobian]):
    """Squared norms by parameter; small rows are kept instead."""

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading)
        self._sq_norms: dict[str, Tensor] = {}
        self._small: dict[str, Dense] = {}

    def _take_alone(self, name: str, form: Form, place: Place) -> bool:
        if is_small(form):
            self._small[name] = form
            return True
        self._sq_norms[name] = in_type(form.sq_norms(), wide_dtype(self._parameters[name].dtype))
        return False

    def _take_block(self, name: str, block: Block) -> None:
        form = small_form(block)
        if form is None:
            self._sq_norms[name] = block.sq_norms()
        else:
            self._small[name] = form

    def _answers(self) -> Jacobian:
        return Jacobian.of_norms(self._reading.losses, self._reading.parameters, self._sq_norms, self._small)


class WrittenOut(Arrivals[dict[str, Tensor]]):
    """All rows by parameter, (B, *shape)."""

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading)
        self._rows: dict[str, Tensor] = {}

    def _take_alone(self, name: str, form: Form, place: Place) -> bool:
        self._take_block(name, self._block(name, [settle(form, place)]))
        return False

    def _take_block(self, name: str, block: Block) -> None:
        self._rows[name] = block.dense()

    def _answers(self) -> dict[str, Tensor]:
        for name in self._parameters.keys() - self._rows.keys():  # no loss hangs on them
            self._take_block(name, self._block(name, []))
        return {name: self._rows[name] for name in self._parameters}
