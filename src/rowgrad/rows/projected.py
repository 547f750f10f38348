"""The form of a weight that is normalized along its rows: an outer product less its part along fixed directions.

Row j of the Jacobian, whose own rows i are those of a matrix: o_ji - <o_ji, u_i> u_i, with o an `Outer` and |u_i| = 1.
A projection takes nothing but that part away, so that inner products need no rows written out:
<p_j, p_k> = <o_j, o_k> - sum_i <o_ji, u_i> <o_ki, u_i>. Where little is left, the rows are written out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rowgrad.rows.factors import CANCELLATION, Dense, Outer, energies


@dataclass
class Projected:
    """`outer` of one group, without its part along the rows of `directions` (a, b), which have length 1."""

    outer: Outer
    directions: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.outer.shape

    @property
    def held(self) -> tuple[Tensor, ...]:
        return (*self.outer.held, self.directions)

    @property
    def n_examples(self) -> int:
        return self.outer.n_examples

    @cached_property
    def along(self) -> Tensor:
        """<o_ji, u_i>, shape (B, a)."""
        return (self.outer.left[:, 0] * (self.outer.right[:, 0] @ self._unit.T)).sum(1)

    @property
    def _unit(self) -> Tensor:
        return self.directions.to(self.outer.left.dtype)

    @property
    def _formed(self) -> Tensor | None:
        return self.outer._formed

    @_formed.setter
    def _formed(self, rows: Tensor | None) -> None:
        self.outer._formed = rows

    def sq_norms(self, keep: bool = False) -> Tensor:
        whole = self.outer.sq_norms(keep)
        found = whole - self.along.square().sum(1)
        if not bool((found < CANCELLATION * whole).any()):
            return found
        found = torch.empty_like(found)
        for s in self.outer.chunks(2 * self.shape.numel() * self._unit.element_size()):
            found[s] = energies(self._written_out(s))
        return found

    def weighted_sum(self, c: Tensor) -> Tensor:
        c = c.to(self._unit.dtype)
        return self.outer.weighted_sum(c) - (c @ self.along).unsqueeze(1) * self._unit

    def dot(self, direction: Tensor) -> Tensor:
        direction = direction.to(self._unit.dtype)
        part = (direction * self._unit).sum(1, keepdim=True) * self._unit
        return self.outer.dot(direction - part)

    def dense(self) -> Tensor:
        return self._written_out(slice(None))

    def _written_out(self, piece: slice) -> Tensor:
        rows = self.outer.left[piece, 0].mT @ self.outer.right[piece, 0]
        return rows - (rows * self._unit).sum(2, keepdim=True) * self._unit

    def select(self, index: Tensor) -> Projected:
        return Projected(self.outer.select(index), self.directions)

    def scaled(self, weights: Tensor) -> Projected:
        return Projected(self.outer.scaled(weights), self.directions)

    def factors(self) -> tuple[None, Tensor, Tensor]:
        return self.plain().factors()

    def with_cotangents(self, transform: Callable[[Tensor], Tensor]) -> Projected:
        return replace(self, outer=self.outer.with_cotangents(transform))

    def plain(self) -> Dense:
        return Dense(self.dense())

    def condensed(self) -> Projected:
        return self

    def route(self) -> str:
        return f"{self.outer.route()}, less the part along the weight"
