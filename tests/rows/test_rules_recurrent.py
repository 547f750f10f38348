"""Recurrent layers: the CPU's fused LSTM node, and the steps that everything else decomposes into."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.rows.laws import assert_laws, energy, rows_in_double, trained
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rowgrad as rg
from rowgrad.rows import recurrent
from rowgrad.rows.ownership import Axis, Grouping
from rowgrad.tape import Tape

FUSED = 3e-5  # of the row's norm: the fused node computes in float32
HALF = 6e-2  # bfloat16 keeps 8 bits in every hidden state
LENGTHS = (5, 2, 4)


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def batch(b: int, n_steps: int = 5) -> Tensor:
    return torch.randn(b, n_steps, 3, generator=torch.Generator().manual_seed(b))


def read(layer: nn.RNNBase, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The sequence (B, T, .) and the states (B, layers, .)."""
    x = x.to(dtype_of(layer))
    out, state = layer(x if layer.batch_first else x.transpose(0, 1))
    states = state if isinstance(state, tuple) else (state,)
    return out if layer.batch_first else out.transpose(0, 1), [s.transpose(0, 1) for s in states]


def sequence(layer: nn.Module, x: Tensor) -> Tensor:
    return energy(read(layer, x)[0])


def last_states(layer: nn.Module, x: Tensor) -> Tensor:
    return sum(energy(s) for s in read(layer, x)[1])


def last_cell(layer: nn.Module, x: Tensor) -> Tensor:
    return energy(read(layer, x)[1][-1])


def sequence_and_states(layer: nn.Module, x: Tensor) -> Tensor:
    out, states = read(layer, x)
    return energy(out) + sum(energy(s) for s in states)


def packed(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.to(dtype_of(layer))
    together = pack_padded_sequence(x, torch.tensor(LENGTHS[: len(x)]), batch_first=True, enforce_sorted=False)
    out, _ = layer(together)
    assert isinstance(out, PackedSequence)
    return energy(pad_packed_sequence(out, batch_first=True, total_length=5)[0])


READS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "sequence": sequence,
    "last states": last_states,
    "last cell": last_cell,
    "both": sequence_and_states,
    "packed": packed,
}
OPTIONS: dict[str, dict] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "two layers, bidirectional": {"num_layers": 2, "bidirectional": True},
    "three layers": {"num_layers": 3, "batch_first": True},
}


def kinds_of_node(losses: Tensor) -> set[str]:
    return {node.kind for node in rg.tape.Tape(losses).nodes}


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("reading", READS)
@pytest.mark.parametrize("options", OPTIONS)
def test_fused_lstm(options: str, reading: str, b: int) -> None:
    """Against the same layer in float64, which takes the steps one by one."""
    layer, x = nn.LSTM(3, 4, **OPTIONS[options]), batch(b)
    losses = READS[reading](layer, x)
    assert ("MkldnnRnnLayerBackward0" in kinds_of_node(losses)) == (reading != "packed" or b == 1)
    rows = rows_in_double(layer, lambda m: READS[reading](m, x))
    assert_laws(losses, trained(layer), rows=rows, rtol=FUSED)


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("reading", READS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_steps_in_double_precision(kind: type[nn.RNNBase], options: str, reading: str, b: int) -> None:
    layer = kind(3, 4, **OPTIONS[options]).double()
    assert_laws(READS[reading](layer, batch(b)), trained(layer))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    layer, x = kind(3, 4).to(dtype), batch(3)
    rows = rows_in_double(layer, lambda m: sequence(m, x))
    losses = sequence(layer, x)
    assert_laws(losses.float(), trained(layer), rows=rows, rtol=FUSED if dtype == torch.float32 else HALF)


def test_projection() -> None:
    layer = nn.LSTM(3, 4, proj_size=2).double()
    assert_laws(sequence_and_states(layer, batch(3)), trained(layer))


def test_dropout_between_layers() -> None:
    layer = nn.LSTM(3, 4, num_layers=2, dropout=0.4)
    assert_laws(sequence(layer, batch(3)), trained(layer), rtol=FUSED)


def test_relu_in_place_of_tanh() -> None:
    layer = nn.RNN(3, 4, nonlinearity="relu", num_layers=2).double()
    assert_laws(sequence(layer, batch(3)), trained(layer))


def test_frozen_weights() -> None:
    layer, x = nn.LSTM(3, 4, num_layers=2), batch(3)
    layer.weight_ih_l0.requires_grad_(False)
    layer.bias_hh_l1.requires_grad_(False)
    rows = rows_in_double(layer, lambda m: sequence(m, x))
    assert_laws(sequence(layer, x), trained(layer), rows=rows, rtol=FUSED)


def test_one_layer_used_twice() -> None:
    layer, x = nn.LSTM(3, 4), batch(3)

    def losses(m: nn.Module) -> Tensor:
        return sequence(m, x) + last_states(m, 2 * x[:, :3])

    assert_laws(losses(layer), trained(layer), rows=rows_in_double(layer, losses), rtol=FUSED)


class Started(nn.Module):
    """First states learned, the same for all examples."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(3, 4, num_layers=2)
        self.h, self.c = nn.Parameter(torch.randn(2, 1, 4)), nn.Parameter(torch.randn(2, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.h.dtype).transpose(0, 1)
        states = tuple(s.expand(-1, x.shape[1], -1).contiguous() for s in (self.h, self.c))
        out, _ = self.layer(x, states if isinstance(self.layer, nn.LSTM) else states[0] + states[1])
        return energy(out.transpose(0, 1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_learned_first_states(kind: type[nn.RNNBase]) -> None:
    module, x = Started(kind), batch(3)
    assert_laws(module(x), trained(module), rows=rows_in_double(module, lambda m: m(x)), rtol=FUSED)


def test_a_first_state_for_each_example() -> None:
    """Parameters that belong to examples go the general path; the weights beside them keep their rule."""
    layer, x = nn.LSTM(3, 4), batch(3).transpose(0, 1)
    h, c = nn.Parameter(torch.randn(1, 3, 4)), nn.Parameter(torch.randn(1, 3, 4))
    params = {**trained(layer), "h": h, "c": c}
    J = assert_laws(energy(layer(x, (h, c))[0].transpose(0, 1)), params, rtol=FUSED, ruled=False)
    assert {name for name, _ in J.explain().slow_uses()} == {"h", "c"}


def test_examples_in_calls_of_their_own() -> None:
    layer, x = nn.LSTM(3, 4), batch(3)

    def losses(m: nn.Module) -> Tensor:
        return torch.stack([m(x_j.to(dtype_of(m)))[0].sin().sum() for x_j in x])

    assert_laws(losses(layer), trained(layer), rows=rows_in_double(layer, losses), rtol=FUSED)


@pytest.mark.parametrize("of_two", ["beside each other", "far apart"])
def test_examples_of_several_columns(of_two: str) -> None:
    """Each example has two sequences of the batch, in either order of flattening."""
    layer, x = nn.LSTM(3, 4), batch(6)

    def losses(m: nn.Module) -> Tensor:
        out = read(m, x)[0]
        return energy(
            out.unflatten(0, (3, 2)) if of_two == "beside each other" else out.view(2, 3, 5, 4).transpose(0, 1)
        )

    assert_laws(losses(layer), trained(layer), rows=rows_in_double(layer, losses), rtol=FUSED)


def test_examples_of_columns_in_no_order() -> None:
    """Owners known entry by entry, and one column that no loss reads."""
    layer, x = nn.LSTM(3, 4), batch(6)
    owner = torch.tensor([2, 0, -1, 1, 0, 2])

    def losses(m: nn.Module) -> Tensor:
        each = sequence_and_states(m, x)
        return torch.stack([each[owner == j].sum() for j in range(3)])

    J = assert_laws(losses(layer), trained(layer), rows=rows_in_double(layer, losses), rtol=FUSED)
    _, _, owners = J.factors("weight_ih_l0")[0]
    assert owners.bincount().tolist() == [10, 5, 10]


def test_losses_along_time_go_the_general_path() -> None:
    """A loss for each step: a column is shared by all examples, and the hidden cotangents are mixed."""
    layer = nn.LSTM(3, 4)
    out = layer(batch(2).transpose(0, 1))[0]
    J = assert_laws(energy(out), trained(layer), rtol=FUSED, ruled=False)
    assert len(J.explain().slow_uses()) == 4


def test_the_sequence_and_the_states_of_different_examples() -> None:
    """Column j is read by example j at its steps and by another at its end."""
    layer = nn.LSTM(3, 4)
    out, states = read(layer, batch(3))
    losses = energy(out) + energy(states[0]).roll(1)
    J = assert_laws(losses, trained(layer), rtol=FUSED, ruled=False)
    assert len(J.explain().slow_uses()) == 4


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cells(kind: type[nn.RNNCellBase], bias: bool, dtype: torch.dtype) -> None:
    cell, x = kind(3, 4, bias=bias).to(dtype), batch(3)

    def losses(m: nn.Module) -> Tensor:
        state = None
        for x_t in x.to(dtype_of(m)).unbind(1):
            state = m(x_t, state)
        return energy(state[0] if isinstance(state, tuple) else state)

    rtol = 1e-10 if dtype == torch.float64 else FUSED
    assert_laws(losses(cell), trained(cell), rows=rows_in_double(cell, losses), rtol=rtol)


def test_long_sequences_stay_accurate() -> None:
    layer, x = nn.LSTM(3, 16), batch(3, 200)
    rows = rows_in_double(layer, lambda m: sequence(m, x))
    assert_laws(sequence(layer, x), trained(layer), rows=rows, rtol=FUSED)


def test_the_gates_are_scanned_once_for_all_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    scans = []
    scan = recurrent._LstmLayer._scan
    monkeypatch.setattr(recurrent._LstmLayer, "_scan", lambda layer, z: scans.append(layer) or scan(layer, z))
    layer = nn.LSTM(3, 4, bidirectional=True)
    rg.grad_norms(sequence(layer, batch(3)), layer)
    assert len(scans) == len(set(scans)) == 2


def fused_layers(*sizes: int, **options: bool) -> list[recurrent._LstmLayer]:
    """Those of one LSTM in both directions, read from its graph."""
    n_steps, b, d, width = sizes
    generator = torch.Generator().manual_seed(0)
    layer = nn.LSTM(d, width, bidirectional=True, **options)
    losses = layer(torch.randn(n_steps, b, d, generator=generator))[0].square().mean((0, 2))
    tape = Tape(losses)
    whole = Grouping.of(Axis(1), (n_steps, b), 2, b)
    assert whole is not None
    return [recurrent._LstmLayer(node, whole) for node in tape.nodes if node.kind == "MkldnnRnnLayerBackward0"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(5, 3, 4, 6), (7, 4, 8, 16), (4, 2, 3, 64), (3, 2, 5, 256), (1, 3, 2, 5)])
def test_the_workspace_keeps_the_gates(sizes: tuple[int, ...], bias: bool) -> None:
    for layer in fused_layers(*sizes, bias=bias):
        found = layer._kept_gates()
        assert found is not None
        torch.testing.assert_close(found, layer._activated(slice(None)))


def test_a_workspace_of_another_layout_is_not_believed() -> None:
    for layer in fused_layers(5, 3, 4, 6):
        layer.workspace = layer.workspace.roll(4)
        assert layer._kept_gates() is None
        layer.workspace = layer.workspace[:64]
        assert layer._kept_gates() is None


@pytest.mark.parametrize("options", OPTIONS)
def test_gates_from_products(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent._LstmLayer, "_kept_gates", lambda self: None)
    layer, x = nn.LSTM(3, 4, **OPTIONS[options]), batch(3)
    rows = rows_in_double(layer, lambda m: sequence_and_states(m, x))
    assert_laws(sequence_and_states(layer, x), trained(layer), rows=rows, rtol=FUSED)
