"""Rows of all parameters, and those of the small ones side by side.

Biases, scales and shifts have few numbers each and are many: what a product with them costs is what it costs to start
it. Whole norms, sums with one weight for all parameters, directions and Gram matrices take them in one product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeGuard

import torch
from torch import Tensor

from rowgrad.rows.block import Block
from rowgrad.rows.factors import Dense, Form, energies, reshaped
from rowgrad.rows.general import GeneralPath

SMALL = 2**14  # numbers in all rows of a parameter, above which to bring them together costs more than it saves
FEWEST = 4  # parameters
KEPT_BYTES = 2**30  # rows of all parameters that are formed on the way and stay


@dataclass
class Pack:
    """Rows of several parameters, each of `shapes`, side by side."""

    shapes: dict[str, torch.Size]
    rows: Dense  # (B, all their numbers)

    @classmethod
    def of(cls, rows: Mapping[str, Dense], shapes: Mapping[str, torch.Size]) -> Pack | None:
        """Of those of the kind that most are of; None where these are too few to matter.

        rows: small ones, by parameter; shapes: of the parameters.
        """
        kinds: dict[tuple[torch.dtype, torch.device], dict[str, Dense]] = {}
        for name, form in rows.items():
            kinds.setdefault((form.values.dtype, form.values.device), {})[name] = form
        chosen = max(kinds.values(), key=len, default={})
        if len(chosen) < FEWEST:
            return None
        return cls({n: shapes[n] for n in chosen}, Dense(torch.cat([form.flat for form in chosen.values()], 1)))

    def sq_norms(self) -> dict[str, Tensor]:
        """(B,) by name."""
        parts = self.rows.flat.split([shape.numel() for shape in self.shapes.values()], 1)
        return {name: energies(part) for name, part in zip(self.shapes, parts, strict=True)}

    def weighted_sum(self, c: Tensor) -> dict[str, Tensor]:
        """By name. They are handed out, and so share no memory."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts: tuple[Tensor, ...] = torch.split_with_sizes_copy(self.rows.weighted_sum(c), sizes)  # pyright: ignore[reportAssignmentType]
        return {n: reshaped(part, shape) for (n, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def dot(self, direction: Mapping[str, Tensor]) -> Tensor:
        return self.rows.dot(torch.cat([direction[name].detach().reshape(-1) for name in self.shapes]))


def is_small(form: Form) -> TypeGuard[Dense]:
    """Whether rows are written out anyway, small, and no part of something large."""
    return isinstance(form, Dense) and form.values.untyped_storage().nbytes() <= SMALL * form.values.element_size()


def small_form(block: Block) -> Dense | None:
    """The one form of a parameter whose rows are small."""
    if not block.is_plain or len(block.regions[0].forms) != 1:
        return None
    form = block.regions[0].forms[0]
    return form if is_small(form) else None


@dataclass
class Blocks:
    """Rows of all parameters: in forms, and below the general path.

    Rows that one question forms may stay for the next, up to `max_bytes` in all.
    """

    by_name: dict[str, Block]
    general: GeneralPath | None
    general_names: set[str] = field(default_factory=set)
    max_bytes: int = KEPT_BYTES
    _kept: dict[str, int] = field(default_factory=dict, init=False, repr=False)  # bytes, where there are any

    def part(self, names: Iterable[str]) -> Blocks:
        """Of some parameters. What stays of these is counted together with what stays here."""
        chosen = {name: self.by_name[name] for name in names}
        found = Blocks(chosen, self.general, self.general_names & chosen.keys(), self.max_bytes)
        found._kept = self._kept
        return found

    def held(self) -> list[tuple[str, Tensor, int]]:
        """(parameter, tensor, its version) of what the forms hold; some of it the model's caller may write to."""
        return [
            (name, t, t._version)
            for name, block in self.by_name.items()
            for region in block.regions
            for form in region.forms
            for t in form.held
            if not t.is_inference()
        ]

    def sq_norms(self, name: str) -> Tensor:
        """(B,) of one parameter."""
        block = self.by_name[name]
        self._kept.pop(name, None)
        found = block.sq_norms(keep=sum(self._kept.values()) + block.bytes <= self.max_bytes)
        self._settle(name)
        return found

    def gram(self, name: str, other: Blocks) -> Tensor:
        """(B, B') of one parameter, with the rows of `other`."""
        found = self.by_name[name].gram(other.by_name[name])
        self._settle(name)
        other._settle(name)
        return found

    def inner(self, name: str, other: Blocks) -> Tensor:
        """(B,) of one parameter: row j with row j of `other`."""
        found = self.by_name[name].inner(other.by_name[name])
        self._settle(name)
        other._settle(name)
        return found

    def _settle(self, name: str) -> None:
        """Let go of the rows that a question left formed where they are too many."""
        self._kept.pop(name, None)
        n_bytes = self.by_name[name].formed_bytes
        if not n_bytes:
            return
        if sum(self._kept.values()) + n_bytes <= self.max_bytes:
            self._kept[name] = n_bytes
        else:
            self.by_name[name].let_go()

    @cached_property
    def _pack(self) -> Pack | None:
        blocks = {n: b for n, b in self.by_name.items() if n not in self.general_names}
        small = {n: form for n, b in blocks.items() if (form := small_form(b)) is not None}
        return Pack.of(small, {n: blocks[n].shape for n in small})

    def packed(self, names: Iterable[str]) -> tuple[Pack | None, list[str]]:
        """The pack, where all of it is among these names, and the names that are left."""
        names, pack = list(names), self._pack
        if pack is None or not pack.shapes.keys() <= set(names):
            return None, names
        return pack, [n for n in names if n not in pack.shapes]
