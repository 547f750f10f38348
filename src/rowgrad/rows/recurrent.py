"""Rules for fused recurrent layers, whose gates no node shows.

One layer in one direction over T steps is z_t = x_t W_ih^T + h_{t-1} W_hh^T + b followed by the gates. The node keeps x
and every h, so z and the gates of all steps come from one product, and their cotangents from one scan backwards in
time. The four parameters then are a linear layer on x, one on the shifted h, and two biases.
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
            return Dense(zbar.sum(1))
        h = group(layer.x if part == "input" else layer.before)
        return Outer(zbar.unsqueeze(1), h.unsqueeze(1), shape, cotangent_left=True, positions=group.positions)

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
    """Gates of one layer, and the cotangents of the pre-activations, in the order of time of the recursion."""

    def __init__(self, node: Node, group: Grouping) -> None:
        self.group = group
        self.reverse = bool(node.attribute("reverse"))
        self.x, self.hidden = wide(node.saved("input")), wide(node.saved("result0"))
        self.first, self.first_cell = wide(node.saved("hx_")), wide(node.saved("cx_"))
        n_weights = 4 if node.attribute("has_biases") else 2
        self.weights = [wide(node.saved(f"weight{i}")) for i in range(n_weights)]
        self._found: Tensor | None = None

    @cached_property
    def before(self) -> Tensor:
        """h of the step before each, (T, columns, H), in the order of the input."""
        first = self.first.unsqueeze(0)
        return torch.cat([self.hidden[1:], first] if self.reverse else [first, self.hidden[:-1]])

    def cotangents(self, cotangents: Cotangents) -> Tensor:
        """(B, T, 4 H), in the order of the input; computed once for all parameters."""
        if self._found is None:
            self._found = self.group(self._scan(cotangents))
        return self._found

    def _pre_activations(self) -> Tensor:
        """(T, columns, 4, H)."""
        into, within, *biases = self.weights
        x, before = self.x.flatten(0, 1), self.before.flatten(0, 1)
        z = torch.addmm(biases[0] + biases[1], x, into.T) if biases else x @ into.T
        return z.addmm_(before, within.T).view(*self.before.shape[:2], 4, -1)

    def _scan(self, cotangents: Cotangents) -> Tensor:
        """(T, columns, 4 H): the local derivatives of the gates, overwritten step by step by their cotangents."""
        z = self._pre_activations()
        keep, into_cell = self._local_derivatives(z)
        within = self.weights[1]
        n_steps, n, _, width = z.shape
        sequence, last_hidden, last_cell = (None if c is None else wide(c) for c in cotangents[:3])
        dh = z.new_zeros(n, width) if last_hidden is None else last_hidden
        dc = z.new_zeros(n, width) if last_cell is None else last_cell
        for t in range(n_steps) if self.reverse else reversed(range(n_steps)):
            if sequence is not None:
                dh = dh + sequence[t]
            dc = torch.addcmul(dc, dh, into_cell[t])
            z[t, :, :3] *= dc.unsqueeze(1)
            z[t, :, 3] *= dh
            dc = dc * keep[t]
            dh = z[t].flatten(1) @ within
        return z.flatten(2)

    def _local_derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrites z by the derivatives of the cell by i, f, g and of h by o; returns those of the cell and h by c.

        With c the cell and s = tanh c: dc/di = g i (1 - i), dc/df = c' f (1 - f), dc/dg = i (1 - g^2),
        dh/do = s o (1 - o), dc/dc' = f, dh/dc = o (1 - s^2); c' is the cell of the step before.
        """
        z[:, :, :2].sigmoid_()
        z[:, :, 2].tanh_()
        z[:, :, 3].sigmoid_()
        i, f, g, o = z.unbind(2)
        keep, new = f.contiguous(), i * g
        previous, s = self._cells(keep, new)
        into_cell = (s * s).mul_(o).neg_().add_(o)
        o.addcmul_(o, o, value=-1).mul_(s)
        f.addcmul_(f, f, value=-1).mul_(previous)
        g.mul_(new).neg_().add_(i)
        i.mul_(new).neg_().add_(new)
        return keep, into_cell

    def _cells(self, keep: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """The cell before each step, and tanh of the cell after it."""
        previous, after = torch.empty_like(new), torch.empty_like(new)
        cell, n_steps = self.first_cell, len(new)
        for t in reversed(range(n_steps)) if self.reverse else range(n_steps):
            previous[t] = cell
            cell = torch.addcmul(new[t], keep[t], cell, out=after[t])
        return previous, after.tanh_()
