"""What a rule sees of a use, what it answers, and the rules for parameters broadcast over the examples.

A rule looks at a use before the cotangents exist and returns a `Recipe`, or None where the examples lie in a way it
does not know. The recipe turns the node's cotangents, and what the node saved, into a form. What no rule takes goes the
general path. A rule's form has the shape of the input it speaks of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowgrad.rows.factors import Dense, Form, reshaped, wide
from rowgrad.rows.ownership import Axis, Edge, Entries, Grouping, Layout
from rowgrad.tape import Node, Tape

Cotangents = Sequence[Tensor | None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make a form: `build(cotangents, *saved)`, with the cotangents of the node's outputs.

    `saved` names what the node saved and is to be read before the pass, each value once. Such a recipe follows from
    layouts, shapes and attributes alone, holds neither a tensor nor the tape, and is kept as long as the layouts are.
    One without is for a single graph.
    """

    build: Callable[..., Form]
    route: str  # one word for `explain`
    saved: tuple[str, ...] | None = None
    needs_graph: bool = False  # calls the node, so its saved tensors must outlive the pass


@dataclass(frozen=True)
class Site:
    """A use as a rule sees it."""

    tape: Tape
    node: Node
    slot: int
    layouts: Mapping[Edge, Layout]
    n_examples: int

    @property
    def _target(self) -> Edge:
        target = self.node.slots[self.slot]
        assert target is not None
        return target

    @property
    def target_shape(self) -> torch.Size:
        return self.tape.nodes[self._target[0]].shape(self._target[1])

    @property
    def target_is_complex(self) -> bool:
        return self.tape.nodes[self._target[0]].dtype(self._target[1]).is_complex

    def layout(self, output_nr: int = 0) -> Layout:
        return self.layouts[self.node.index, output_nr]

    def grouping(self, n_positions: int, order: Sequence[int] | None = None, output_nr: int = 0) -> Grouping | None:
        """By example, for tensors whose leading dimensions are those of the cotangent (permuted by `order`).

        None where the owners are not told by those dimensions, and for complex cotangents, which no product rule knows.
        """
        if self.node.dtype(output_nr).is_complex:
            return None
        shape = self.node.shape(output_nr)
        order, device = order or range(len(shape)), self.node.device(output_nr)
        return grouping_of(self.layout(output_nr), shape, order, n_positions, self.n_examples, device)


def grouping_of(
    layout: Layout,
    shape: Sequence[int],
    order: Sequence[int],
    n_positions: int,
    n_examples: int,
    device: torch.device,
) -> Grouping | None:
    """The grouping of a tensor of this layout and shape once its dimensions are permuted to `order`."""
    if isinstance(layout, Axis) and n_examples > 1:
        layout = Axis(list(order).index(layout.dim), layout.inner)
    elif isinstance(layout, Entries) and tuple(order) != tuple(range(len(order))):
        layout = Entries(layout.owner.permute(tuple(order)))
    return Grouping.of(layout, [shape[d] for d in order], n_positions, n_examples, device)


Rule = Callable[[Site], Recipe | None]


def only(cotangents: Cotangents) -> Tensor:
    """The cotangent of a node with one output."""
    (z,) = cotangents
    assert z is not None
    return z


def scalar(value: object) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]


def _as_target(gradient: Tensor, is_complex: bool) -> Tensor:
    """Of a complex gradient of something real the real part counts."""
    return gradient.real if gradient.is_complex() and not is_complex else gradient


def elementwise(site: Site) -> Recipe | None:
    """A parameter broadcast over the examples: the node's own gradient before the broadcast is summed away."""
    z_shape, shape, is_complex = site.node.shape(), site.target_shape, site.target_is_complex
    reduce = reduce_broadcast(site, z_shape, shape)
    if reduce is None:
        return None

    def build(cotangents: Cotangents) -> Form:
        raw = site.tape.raw_local_gradients(site.node, cotangents)[site.slot]
        assert raw is not None
        if raw.shape != z_shape:
            raise AssertionError(f"bug in rowgrad, please report: {site.node!r} sums over the examples by itself")
        return Dense(reduce(wide(_as_target(raw, is_complex))))

    return Recipe(build, "elementwise", needs_graph=True)


def factor(site: Site) -> Recipe | None:
    """A parameter multiplied with something: scale, temperature, gate."""
    if site.node.dtype().is_complex:
        return elementwise(site)
    reduce = reduce_broadcast(site, site.node.shape(), site.target_shape)
    if reduce is None:
        return None

    def build(cotangents: Cotangents, other: Tensor) -> Form:
        return Dense(reduce(wide(only(cotangents)) * wide(other)))

    return Recipe(build, "product", saved=("self" if site.slot else "other",))


def summand(site: Site, scale: str | None = None, sign: int = 1) -> Recipe | None:
    """A parameter added to something, times a constant: its gradient is the cotangent, summed over the broadcast."""
    if site.node.dtype().is_complex and scale is not None:
        return elementwise(site)
    reduce, is_complex = reduce_broadcast(site, site.node.shape(), site.target_shape), site.target_is_complex
    if reduce is None:
        return None
    factor = sign * (scalar(site.node.attribute(scale)) if scale else 1)

    def build(cotangents: Cotangents) -> Form:
        found = reduce(wide(_as_target(only(cotangents), is_complex)))
        return Dense(found if factor == 1 else factor * found)

    return Recipe(build, "sum", saved=())


def reduce_broadcast(
    site: Site, z_shape: torch.Size, shape: torch.Size, layout: Layout | None = None
) -> Callable[[Tensor], Tensor] | None:
    """Sum (z_shape) to (B, *shape), each example by itself; None where `shape` itself runs along the examples."""
    n = site.n_examples
    layout = site.layout() if layout is None else layout
    padded = (1,) * (len(z_shape) - len(shape)) + tuple(shape)
    if n == 1:
        return lambda t: t.sum_to_size(shape).unsqueeze(0)
    if isinstance(layout, Axis) and padded[layout.dim] == 1:
        outer = z_shape[layout.dim] // (n * layout.inner)
        sizes: list[tuple[int, bool]] = []  # of all dimensions, and whether it is summed
        for dim, size in enumerate(z_shape):
            if dim == layout.dim:
                sizes += [(outer, True), (n, False), (layout.inner, True)]
            else:
                sizes.append((size, padded[dim] == 1))
        sizes = [(size, is_summed) for size, is_summed in sizes if size != 1 or not is_summed]
        split, summed = tuple([size for size, _ in sizes]), [d for d, (_, is_summed) in enumerate(sizes) if is_summed]
        dim_left = sum(padded[d] != 1 for d in range(layout.dim))  # of the examples, once the others are summed
        whole = (n, *shape)

        def reduce(t: Tensor) -> Tensor:
            t = reshaped(t, split)
            if summed:
                t = t.sum(summed)
            return reshaped(t.movedim(dim_left, 0) if dim_left else t, whole)

        return reduce
    positions = [d for d, size in enumerate(padded) if size == 1]
    order = positions + [d for d, size in enumerate(padded) if size != 1]
    group = grouping_of(layout, z_shape, order, len(positions), n, site.node.device())
    if group is None:
        return None
    return lambda t: group(t.permute(order)).sum(1).reshape(n, *shape)
