"""Recurrent networks, fused and unrolled."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.cases.table import Make, Setup, case, energy

SINGLE = {"dtype": torch.float32, "rtol": 2e-5}  # the fused nodes of the CPU exist in single precision only


class Reader(nn.Module):
    """A recurrent layer read at every step and in its last state."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        size = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
        self.head = nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        out = out if self.layer.batch_first else out.transpose(0, 1)
        states = state if isinstance(state, tuple) else (state,)
        last = torch.cat([s.transpose(0, 1).flatten(1) for s in states], 1)
        return torch.cat([self.head(out).flatten(1), last.sin()], 1)


def _recurrent(
    name: str, kind: type[nn.RNNBase], *, deterministic: bool = True, fast: bool = True, single: bool = True, **options
) -> None:
    for suffix, flags in (("", {}), (", float32", SINGLE))[: 1 + single]:

        @case(
            name + suffix,
            fast=fast,
            deterministic=deterministic,
            tags="recurrent" if single else "recurrent double",
            **flags,
        )
        def _(make: Make) -> Setup:
            layer = kind(3, 4, **{"batch_first": True, **options})
            return make.setup(make.model(Reader(layer)), make.x(5, 3), loss=lambda m, x: energy(m(x)))


_recurrent("lstm", nn.LSTM)
_recurrent("lstm, sequence first", nn.LSTM, batch_first=False)
_recurrent("lstm without bias", nn.LSTM, bias=False)
_recurrent("lstm, two layers", nn.LSTM, num_layers=2)
_recurrent("lstm, two layers, bidirectional", nn.LSTM, num_layers=2, bidirectional=True)
_recurrent("lstm, dropout between layers", nn.LSTM, num_layers=2, dropout=0.3, deterministic=False)
_recurrent("lstm with projection", nn.LSTM, proj_size=2, single=False)
_recurrent("gru", nn.GRU)
_recurrent("gru, two layers, bidirectional", nn.GRU, num_layers=2, bidirectional=True)
_recurrent("rnn, tanh", nn.RNN)
_recurrent("rnn, relu, two layers", nn.RNN, nonlinearity="relu", num_layers=2)
_recurrent("rnn, bidirectional, sequence first", nn.RNN, bidirectional=True, batch_first=False)


def _packed(name: str, kind: type[nn.RNNBase], **options: object) -> None:
    for suffix, flags in (("", {}), (", float32", SINGLE)):

        @case(name + suffix, fast=True, tags="recurrent ragged", **flags)
        def _(make: Make) -> Setup:
            def loss(model: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
                packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
                out, _ = pad_packed_sequence(model(packed)[0], batch_first=True, total_length=x.shape[1])
                return energy(out.sin())

            model = make.model(kind(3, 4, batch_first=True, **options))  # type: ignore[arg-type]
            return make.setup(model, make.x(6, 3), 1 + make.ids(6), loss=loss)


_packed("lstm, packed", nn.LSTM)
_packed("lstm, packed, bidirectional, two layers", nn.LSTM, bidirectional=True, num_layers=2)
_packed("gru, packed", nn.GRU)
_packed("rnn, packed", nn.RNN)


@case("lstm with a learned first state", fast=True, tags="recurrent")
def _(make: Make) -> Setup:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True)
            self.h, self.c = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 1, 4))

        def forward(self, x: Tensor) -> Tensor:
            state = [s.expand(1, len(x), 4).contiguous() for s in (self.h, self.c)]
            return self.lstm(x, tuple(state))[0]

    return make.setup(make.model(Learned()), make.x(5, 3), loss=lambda m, x: energy(m(x)))


def _cell(name: str, kind: type[nn.RNNCellBase]) -> None:
    @case(name, fast=True, tags="recurrent reused")
    def _(make: Make) -> Setup:
        def loss(model: nn.Module, x: Tensor) -> Tensor:
            state = None
            for x_t in x.unbind(1):
                state = model(x_t, state)
            return energy(state[0] if isinstance(state, tuple) else state)

        return make.setup(make.model(kind(3, 4)), make.x(5, 3), loss=loss)


_cell("lstm cell, unrolled", nn.LSTMCell)
_cell("gru cell, unrolled", nn.GRUCell)
_cell("rnn cell, unrolled", nn.RNNCell)


@case("recurrence by hand, read at every step", fast=True, tags="recurrent reused")
def _(make: Make) -> Setup:
    """h_t = tanh(U x_t + W h_(t-1) + b), o_t = V h_t + c: seed form of a recurrent net."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        total = x.new_zeros(len(x))
        for x_t in x.unbind(1):
            h = torch.tanh(x_t @ model.U + h @ model.W + model.b)
            total = total + energy(h @ model.V + model.c)
        return total

    return make.setup(make.bag(U=(3, 4), W=(4, 4), b=(4,), V=(4, 2), c=(2,)), make.x(5, 3), loss=loss)


@case("lstm stopped by truncation", fast=True, tags="recurrent reused")
def _(make: Make) -> Setup:
    """The state is detached halfway: gradients of the second half do not reach the first."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        first, state = model(x[:, :3])
        second, _ = model(x[:, 3:], tuple(s.detach() for s in state))
        return energy(first) + energy(second)

    return make.setup(make.model(nn.LSTM(3, 4, batch_first=True)), make.x(6, 3), loss=loss)


@case("encoder and decoder", fast=True, tags="recurrent")
def _(make: Make) -> Setup:
    class Translate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.encoder, self.decoder = nn.GRU(4, 5, batch_first=True), nn.GRU(4, 5, batch_first=True)
            self.head = nn.Linear(5, 7)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            _, state = self.encoder(self.table(source))
            out, _ = self.decoder(self.table(target[:, :-1]), state)
            return nn.functional.cross_entropy(self.head(out).mT, target[:, 1:], reduction="none").mean(1)

    return make.setup(make.model(Translate()), make.ids(7, 5), make.ids(7, 4), loss=lambda m, *ids: m(*ids))
