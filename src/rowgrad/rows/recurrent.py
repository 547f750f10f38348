"""Rules for fused recurrent layers, whose gates no node shows.

One layer in one direction over T steps is z_t = x_t W_ih^T + h_{t-1} W_hh^T + b followed by the gates. The node keeps x
and every h, so z and the gates of all steps come from one product, and their cotangents from one scan backwards in
time. The four parameters then are a linear layer on x, one on the shifted h, and two biases.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rowgrad.rows.factors import Dense, Form, Outer, wide
from rowgrad.rows.ownership import Axis, Grouping
from rowgrad.rows.site import Cotangents, Recipe, Site
from rowgrad.tape import Node

LSTM_MODE = 2


def lstm_parameter(site: Site, part: str) -> Recipe | None:
    """Weights and biases of the CPU's fused LSTM layer.

    `part` is "input", "hidden" or "bias".
    """
    group = _grouping(site)
    if group is None or site.node.attribute("mode") != LSTM_MODE:
        return None
    layer = site.tape.shared((site.node.index, "lstm"), lambda: _LstmLayer(site.node))
    shape = site.target_shape

    def build(cotangents: Cotangents) -> Form:
        zbar = group(layer.cotangents(cotangents))  # (B, T, 4 H)
        if part == "bias":
            return Dense(zbar.sum(1))
        h = group(layer.x if part == "input" else layer.before)
        return Outer(zbar.unsqueeze(1), h.unsqueeze(1), shape, cotangent_left=True)

    return Recipe(build, "recurrent")


def _grouping(site: Site) -> Grouping | None:
    """By example for (T, B, .), from whichever outputs are read: the sequence or the last states (B, .)."""
    inner = set()
    for nr in range(3):
        layout = site.layouts.get((site.node.index, nr))
        if isinstance(layout, Axis):
            if site.n_examples > 1 and layout.dim != (1 if nr == 0 else 0):
                return None
            inner.add(layout.inner if site.n_examples > 1 else site.node.shape()[1])
        elif layout is not None and str(layout) != "zero":
            return None
    if len(inner) > 1:
        return None
    return Grouping.of(Axis(1, inner.pop() if inner else 1), site.node.shape(), 2, site.n_examples)


class _LstmLayer:
    """Gates of one layer, and the cotangents of the pre-activations, in the order of time of the recursion."""

    def __init__(self, node: Node) -> None:
        self.reverse = bool(node.attribute("reverse"))
        x, hidden = wide(node.saved("input")), wide(node.saved("result0"))
        first, self.first_cell = wide(node.saved("hx_")), wide(node.saved("cx_"))
        n_weights = 4 if node.attribute("has_biases") else 2
        self.weights = [wide(node.saved(f"weight{i}")) for i in range(n_weights)]
        before = torch.cat([first.unsqueeze(0), self._in_time(hidden)[:-1]])
        self.x, self.before = x, self._in_time(before)
        self._found: Tensor | None = None

    def _in_time(self, t: Tensor) -> Tensor:
        return t.flip(0) if self.reverse else t

    def cotangents(self, cotangents: Cotangents) -> Tensor:
        """(T, B, 4 H), in the order of the input; computed once for all parameters."""
        if self._found is None:
            self._found = self._in_time(self._scan(cotangents))
        return self._found

    def _scan(self, cotangents: Cotangents) -> Tensor:
        x, before = self._in_time(self.x), self._in_time(self.before)
        into, within, *biases = self.weights
        n_steps, n, width = before.shape
        z = x @ into.T + before @ within.T
        for bias in biases:
            z += bias
        i, f, g, o = (t.contiguous() for t in z.unflatten(2, (4, width)).unbind(2))
        i, f, g, o = i.sigmoid_(), f.sigmoid_(), g.tanh_(), o.sigmoid_()
        cells = self._cells(i, f, g)
        squashed = cells.tanh()
        previous = torch.cat([self.first_cell.unsqueeze(0), cells[:-1]])
        through_cell = torch.stack([g * i * (1 - i), previous * f * (1 - f), i * (1 - g * g)], 2)  # (T, B, 3, H)
        through_output = squashed * o * (1 - o)
        into_cell = o * (1 - squashed * squashed)
        sequence, last_hidden, last_cell = (None if c is None else wide(c) for c in cotangents[:3])
        sequence = z.new_zeros(n_steps, n, width) if sequence is None else self._in_time(sequence)
        found = z.new_empty(n_steps, n, 4, width)
        dh = z.new_zeros(n, width) if last_hidden is None else last_hidden
        dc = z.new_zeros(n, width) if last_cell is None else last_cell
        for t in reversed(range(n_steps)):
            dh = dh + sequence[t]
            dc = torch.addcmul(dc, dh, into_cell[t])
            torch.mul(dc.unsqueeze(1), through_cell[t], out=found[t, :, :3])
            torch.mul(dh, through_output[t], out=found[t, :, 3])
            dc = dc * f[t]
            dh = found[t].flatten(1) @ within
        return found.flatten(2)

    def _cells(self, i: Tensor, f: Tensor, g: Tensor) -> Tensor:
        new, cells = i * g, torch.empty_like(i)
        cell = self.first_cell
        for t in range(len(i)):
            cell = torch.addcmul(new[t], f[t], cell, out=cells[t])
        return cells
