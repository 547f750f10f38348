"""Rules for fused recurrent layers, whose gates no node shows.

One layer in one direction over T steps is z_t = x_t W_ih^T + h_{t-1} W_hh^T + b followed by the gates. The node keeps x
and every h, so that the gates of all steps come from one product, and their cotangents from one scan backwards in
time. The four parameters then are a linear layer on x, one on the shifted h, and two biases.

Note [workspace]
    On the CPU in float32 the forward pass leaves the gates in its workspace, line by line in the order in which the
    steps were taken, each line filled up to whole vectors and sometimes by one more. Nothing documents that, so it is
    believed only if the first, the middle and the last step hold the gates that the products give; else, and in other
    precisions, the products of all steps are formed, which costs about a third of a step of training.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from rowgrad.rows.factors import Dense, Form, Outer, wide
from rowgrad.rows.ownership import Axis, Entries, Grouping
from rowgrad.rows.products import row_owners
from rowgrad.rows.site import Cotangents, Recipe, Site
from rowgrad.tape import Node

LSTM_MODE = 2


def lstm_parameter(site: Site, part: str) -> Recipe | None:
    """Weights and biases of the CPU's fused LSTM layer.

    `part` is "input", "hidden" or "bias".
    """
    if site.node.attribute("mode") != LSTM_MODE:
        return None
    group = site.tape.shared((site.node.index, "columns"), lambda: _grouping(site))
    if group is None:
        return None
    layer = site.tape.shared((site.node.index, "lstm"), lambda: _LstmLayer(site.node, group))
    shape = site.target_shape

    def build(cotangents: Cotangents) -> Form:
        zbar = layer.cotangents(cotangents)  # (B, T, 4 H)
        if part == "bias":
            return Dense(layer.summed)
        h = group(layer.x if part == "input" else layer.before)
        return Outer(
            zbar.unsqueeze(1),
            h.unsqueeze(1),
            shape,
            cotangent_left=True,
            positions=group.positions,
            cotangent_gram=lambda: layer.gram,
        )

    return Recipe(build, "recurrent")


def _grouping(site: Site) -> Grouping | None:
    """By example for (T, columns, .); None unless each column, all its steps and its last states, has one owner."""
    n_steps, n_columns, _ = site.node.shape()
    known = [site.layouts[site.node.index, nr] for nr in range(3) if (site.node.index, nr) in site.layouts]
    along = {layout.inner for layout in known if isinstance(layout, Axis)}
    if site.n_examples == 1:
        return Grouping.of(Axis(1, n_columns), (n_steps, n_columns), 2, 1)
    owners = [_column_owners(site, nr) for nr in range(3) if (site.node.index, nr) in site.layouts]
    if any(owner is None for owner in owners):
        return None
    owner = torch.stack([o for o in owners if o is not None]).amax(0)
    if any(bool(((o != owner) & (o >= 0)).any()) for o in owners if o is not None):
        return None
    if len(along) == 1 and all(not isinstance(layout, Entries) for layout in known):
        return Grouping.of(Axis(1, along.pop()), (n_steps, n_columns), 2, site.n_examples)
    return Grouping.of(Entries(owner.expand(n_steps, -1)), (n_steps, n_columns), 2, site.n_examples)


def _column_owners(site: Site, output_nr: int) -> Tensor | None:
    """Owner of each column of the sequence or of a last state, -1 where it is not read; None where one has several."""
    shape = site.node.shape(output_nr)
    owner = row_owners(site.layout(output_nr), shape, len(shape) - 1, site.n_examples, site.node.device(output_nr))
    if owner is None:
        return None
    owner = owner.reshape(-1, shape[-2])
    of_column = owner.amax(0)
    return of_column if bool(((owner == of_column) | (owner < 0)).all()) else None


class _LstmLayer:
    """Gates of one layer, and the cotangents of the pre-activations, in the order of the input."""

    def __init__(self, node: Node, group: Grouping) -> None:
        self.group = group
        self.reverse = bool(node.attribute("reverse"))
        self.x, self.hidden = wide(node.saved("input")), wide(node.saved("result0"))
        self.first, self.first_cell = wide(node.saved("hx_")), wide(node.saved("cx_"))
        n_weights = 4 if node.attribute("has_biases") else 2
        self.weights = [wide(node.saved(f"weight{i}")) for i in range(n_weights)]
        self.workspace = node.saved("result3")
        self._found: Tensor | None = None

    @cached_property
    def before(self) -> Tensor:
        """h of the step before each, (T, columns, H)."""
        first = self.first.unsqueeze(0)
        return torch.cat([self.hidden[1:], first] if self.reverse else [first, self.hidden[:-1]])

    def cotangents(self, cotangents: Cotangents) -> Tensor:
        """(B, T, 4 H); computed once for all parameters."""
        if self._found is None:
            self._found = self.group(self._scan(cotangents))
        return self._found

    @cached_property
    def summed(self) -> Tensor:
        """Over the steps, (B, 4 H); after `cotangents`."""
        assert self._found is not None
        return self._found.sum(1)

    @cached_property
    def gram(self) -> Tensor:
        """Of the steps of each example, (B, T, T); after `cotangents`."""
        assert self._found is not None
        return torch.bmm(self._found, self._found.mT)

    def _gates(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """i, f, g, o, each (T, columns, H); not to be written to."""
        gates = self._kept_gates()
        if gates is None:
            gates = self._activated(slice(None))
        i, f, g, o = gates.unbind(2)
        return i, f, g, o

    def _activated(self, steps: slice) -> Tensor:
        """(steps, columns, 4, H), from the input and the hidden states."""
        into, within, *biases = self.weights
        x, before = self.x[steps].flatten(0, 1), self.before[steps].flatten(0, 1)
        z = torch.addmm(biases[0] + biases[1], x, into.T) if biases else x @ into.T
        z = z.addmm_(before, within.T).view(*self.before[steps].shape[:2], 4, -1)
        z[:, :, :2].sigmoid_()
        z[:, :, 2].tanh_()
        z[:, :, 3].sigmoid_()
        return z

    def _kept_gates(self) -> Tensor | None:
        """The gates as the forward pass left them in its workspace. See Note [workspace]."""
        n_steps, columns, width = self.before.shape
        if self.workspace.dtype != torch.uint8 or self.hidden.dtype != torch.float32 or not self.before.numel():
            return None
        numbers = self.workspace[: self.workspace.numel() // 4 * 4].view(torch.float32)
        line = -(-4 * width // 16) * 16
        for row in (line, line + 16):
            if n_steps * columns * row <= numbers.numel():
                gates = numbers.as_strided((n_steps, columns, 4, width), (columns * row, row, width, 1))
                gates = gates.flip(0) if self.reverse else gates
                if all(self._agrees(gates, t) for t in {0, n_steps // 2, n_steps - 1}):
                    return gates
        return None

    def _agrees(self, gates: Tensor, t: int) -> bool:
        return torch.allclose(gates[t], self._activated(slice(t, t + 1))[0], atol=1e-4, equal_nan=True)

    def _scan(self, cotangents: Cotangents) -> Tensor:
        """(T, columns, 4 H): the local derivatives of the gates, overwritten step by step by their cotangents."""
        keep, into_cell, z = self._local_derivatives(*self._gates())
        n_steps, n, _, width = z.shape
        within = self.weights[1]
        sequence, last_hidden, last_cell = (None if c is None else wide(c) for c in cotangents[:3])
        dh = z.new_zeros(n, width) if last_hidden is None else last_hidden
        dc = z.new_zeros(n, width) if last_cell is None else last_cell
        through_cell, through_output, lines = z[:, :, :3].unbind(0), z[:, :, 3].unbind(0), z.flatten(2).unbind(0)
        keeps, into = keep.unbind(0), into_cell.unbind(0)
        arriving = [None] * n_steps if sequence is None else sequence.unbind(0)
        after: int | None = None
        for t in range(n_steps) if self.reverse else reversed(range(n_steps)):
            here = arriving[t]
            if after is None:
                dh = dh if here is None else dh + here
            else:
                dh = lines[after] @ within if here is None else torch.addmm(here, lines[after], within)
            dc = torch.addcmul(dc, dh, into[t])
            through_cell[t].mul_(dc.unsqueeze(1))
            through_output[t].mul_(dh)
            dc = dc * keeps[t]
            after = t
        return z.flatten(2)

    def _local_derivatives(self, i: Tensor, f: Tensor, g: Tensor, o: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the cell by the one before and of h by the cell, (T, columns, H), and by the gates' inputs.

        The last, (T, columns, 4, H), are of the cell by i, f, g and of h by o. With c the cell, s = tanh c and c' the
        cell of the step before: dc/di = g i (1 - i), dc/df = c' f (1 - f), dc/dg = i (1 - g^2), dh/do = s o (1 - o),
        dc/dc' = f, dh/dc = o (1 - s^2).
        """
        z = i.new_empty(*i.shape[:2], 4, i.shape[2])
        new = i * g
        previous, s = self._cells(f, new)
        torch.addcmul(new, new, i, value=-1, out=z[:, :, 0])
        torch.mul(previous, f, out=z[:, :, 1]).addcmul_(z[:, :, 1], f, value=-1)
        torch.addcmul(i, new, g, value=-1, out=z[:, :, 2])
        through = s * o
        torch.addcmul(through, through, o, value=-1, out=z[:, :, 3])
        return f, torch.addcmul(o, through, s, value=-1), z

    def _cells(self, keep: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """The cell before each step, and tanh of the cell after it."""
        n_steps = len(new)
        cells = new.new_empty(n_steps + 1, *new.shape[1:])
        edge = n_steps if self.reverse else 0
        cells[edge] = self.first_cell
        states, keeps, news = cells.unbind(0), keep.unbind(0), new.unbind(0)
        for t in reversed(range(n_steps)) if self.reverse else range(n_steps):
            source, target = (t + 1, t) if self.reverse else (t, t + 1)
            torch.addcmul(news[t], keeps[t], states[source], out=states[target])
        before, after = (cells[1:], cells[:-1]) if self.reverse else (cells[:-1], cells[1:])
        return before, after.tanh()
