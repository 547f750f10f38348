"""Penalties at hidden nodes (Aggarwal 2018, section 3.2, "Losses at Arbitrary Nodes")."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.reference import assert_rows_close, rows_by_loop
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import InputError
from rowgrad.layers import hidden_penalties

F64 = torch.float64


class Net(nn.Module):
    """Its ReLU is no module."""

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2, self.inplace = nn.Linear(3, 4), nn.Linear(4, 2), inplace

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x), inplace=self.inplace))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head, self.lstm = nn.Linear(2, 2), nn.Linear(2, 2), nn.LSTM(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 2, dtype=x.dtype)
        for t in range(3):
            h = self.cell(x[:, t] + h).tanh()
        return self.head(h) + self.lstm(x)[0][:, -1]


@pytest.fixture
def net() -> Net:
    return Net().double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, dtype=F64)


def squares(h: Tensor) -> Tensor:
    return 0.3 * h.square().sum(1)


@pytest.mark.parametrize(
    ("penalties", "by_hand"),
    [
        ({"fc1": 0.2}, lambda z, h: 0.2 * z.abs().sum(1)),
        ({"after fc1: relu": 0.2}, lambda z, h: 0.2 * h.abs().sum(1)),
        ({"fc1: addmm": 0.2}, lambda z, h: 0.2 * z.abs().sum(1)),
        ({"after fc1: relu": squares}, lambda z, h: 0.3 * h.square().sum(1)),
        ({"fc1": squares, "after fc1: relu": 0.2}, lambda z, h: 0.3 * z.square().sum(1) + 0.2 * h.sum(1)),
    ],
)
def test_penalties_are_added_to_the_loss_of_each_example(
    net: Net, x: Tensor, penalties: dict, by_hand: Callable[[Tensor, Tensor], Tensor]
) -> None:
    with hidden_penalties(net, penalties) as penalized:
        losses = net(x).square().sum(1)
    z = net.fc1(x)
    expected = net(x).square().sum(1) + by_hand(z, z.relu())
    found = penalized(losses)
    torch.testing.assert_close(found, expected)
    parameters = list(net.parameters())
    for ours, theirs in zip(
        *(torch.autograd.grad(t.sum(), parameters, retain_graph=True) for t in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_penaltys_derivative_is_added_to_S(net: Net, x: Tensor) -> None:
    """At the hidden node, after S(i, o) of the losses is complete: as with a seed of `Graph.backward`."""
    with hidden_penalties(net, {"after fc1: relu": squares}) as penalized:
        losses = net(x).square().sum(1)
    graph = rg.Graph(losses, net)
    h = graph.value("after fc1: relu")
    seeded = graph.backward(seeds={"after fc1: relu": 2 * 0.3 * h})
    whole = rg.Graph(penalized(losses), net).backward()
    for name in ("after fc1: relu", "fc1: addmm", "fc1.weight", "fc2.weight"):
        torch.testing.assert_close(whole[name], seeded[name])
    assert not torch.allclose(whole["fc1.weight"], graph.backward()["fc1.weight"])


def test_rows_of_penalized_losses(net: Net, x: Tensor) -> None:
    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        with hidden_penalties(model, {"fc1": 0.2, "after fc1: relu": squares}) as penalized:
            losses = model(x).square().sum(1)
        return penalized(losses)

    found = rg.jacobian(loss_fn(net, x), net).dense(as_dict=True)
    assert_rows_close(found, rows_by_loop(net, [x], loss_fn))


def test_every_run_of_a_module_is_penalized() -> None:
    model, x = Recurrent().double(), torch.randn(4, 3, 2, dtype=F64)
    with hidden_penalties(model, {"cell": 1.0}) as penalized:
        losses = model(x).square().sum(1)
    h, expected = torch.zeros(4, 2, dtype=F64), losses
    for t in range(3):
        z = model.cell(x[:, t] + h)
        h, expected = z.tanh(), expected + z.abs().sum(1)
    torch.testing.assert_close(penalized(losses), expected)


def test_a_vector_of_hidden_values_has_one_for_each_example() -> None:
    model, x = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double(), torch.randn(5, 3, dtype=F64)
    with hidden_penalties(model, {"1": 0.5}) as penalized:
        losses = model(x).square()
    torch.testing.assert_close(penalized(losses), losses + 0.5 * model(x).abs())


def test_the_model_stays_as_it_is(net: Net, x: Tensor, leaves_nothing_behind) -> None:
    with leaves_nothing_behind(net), hidden_penalties(net, {"fc1": 0.2, "after fc1: relu": 0.1}) as penalized:
        losses = net(x).square().sum(1)
    with leaves_nothing_behind(net, losses):
        penalized(losses)


def test_hooks_go_after_an_error(net: Net, leaves_nothing_behind) -> None:
    with leaves_nothing_behind(net), pytest.raises(RuntimeError, match="shapes"), hidden_penalties(net, {"fc1": 0.2}):
        net(torch.ones(5, 7, dtype=F64))


def test_an_output_changed_in_place_is_refused(x: Tensor) -> None:
    """The module would be penalized behind the ReLU; the operation's name finds it there."""
    net = Net(inplace=True).double()
    with hidden_penalties(net, {"fc1": 0.2}) as penalized:
        losses = net(x).square().sum(1)
    with pytest.raises(InputError, match=r"penalty at fc1: its output was changed in place afterwards"):
        penalized(losses)
    with hidden_penalties(net, {"fc1: addmm": 0.2}) as penalized:
        losses = net(x).square().sum(1)
    with pytest.raises(InputError, match=r"penalty at fc1: addmm: its value was not seen inside the block"):
        penalized(losses)
    with hidden_penalties(net, {"after fc1: relu": 0.2}) as penalized:
        losses = net(x).square().sum(1)
    torch.testing.assert_close(penalized(losses), losses + 0.2 * net.fc1(x).relu().sum(1))


@pytest.mark.parametrize(
    ("penalties", "message"),
    [
        ({"fc3": 0.1}, r"penalty at 'fc3': no module of the model, and 'fc3' is no variable of this graph; near it"),
        ({"fc1.weight": 0.1}, r"fc1\.weight: its value was not seen inside the block, because it is a parameter"),
        ({"fc1": lambda h: h.abs().sum()}, r"fc1: the function returned shape \(\), expected one number for each of"),
        ({"fc1": lambda h: 3.0}, r"fc1: the function returned a float, expected"),
    ],
)
def test_penalties_that_are_refused(net: Net, x: Tensor, penalties: dict, message: str) -> None:
    with hidden_penalties(net, penalties) as penalized:
        losses = net(x).square().sum(1)
    with pytest.raises(InputError, match=message):
        penalized(losses)


def test_modules_that_are_refused() -> None:
    model, x = Recurrent().double(), torch.randn(4, 3, 2, dtype=F64)
    for name, message in (
        ("lstm", "lstm: the module returned a tuple, no tensor"),
        ("unused", "unused: this module did not run inside the block"),
    ):
        model.unused = nn.Linear(2, 2)
        with hidden_penalties(model, {name: 1.0}) as penalized:
            losses = model(x).square().sum(1)
        with pytest.raises(InputError, match=message):
            penalized(losses)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "a", None])
def test_strengths_that_are_refused(net: Net, strength: object) -> None:
    said = f"penalty at fc1: {strength!r}, expected a finite number, or a function of hidden units"
    with pytest.raises(InputError, match=said), hidden_penalties(net, {"fc1": strength}):  # type: ignore[dict-item]
        pass


def test_no_penalties_are_refused(net: Net) -> None:
    with pytest.raises(InputError, match="no penalties; give"), hidden_penalties(net, {}):
        pass


def test_a_mean_loss_and_other_layouts_are_refused(net: Net, x: Tensor) -> None:
    with hidden_penalties(net, {"fc1": 0.2}) as penalized:
        losses = net(x).square().sum(1)
    with pytest.raises(InputError, match=r'found shape \(\); use reduction="none"'):
        penalized(losses.mean())
    with pytest.raises(InputError, match=r"hidden units of shape \(5, 4\) for 3 examples, which are looked for along"):
        penalized(losses[:3])
