"""Checkpointed regions and offloaded tensors: what is saved is unpacked when the pass comes by, once for all of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from tests.reference import assert_rows_close, rows_by_grad
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import GraphExecGroup, checkpoint

import rowgrad as rg
from rowgrad import tape
from rowgrad.errors import GraphError
from rowgrad.rows.build import Prepared

B, D, REGIONS = 4, 5, 6


class Held:
    """How many of some tensors' values are in memory."""

    def __init__(self) -> None:
        self._storages: list[weakref.ref[torch.UntypedStorage]] = []

    def add(self, t: Tensor) -> int:
        """With this one."""
        self._storages.append(weakref.ref(t.untyped_storage()))
        return len([s for s in self._storages if s() is not None])


class Watched(nn.Module):
    """Regions in a row; counts how often each is run, and how many are held at once."""

    def __init__(self, n_regions: int = REGIONS) -> None:
        super().__init__()
        self.regions = nn.ModuleList(
            nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.LayerNorm(D), nn.Linear(D, D)) for _ in range(n_regions)
        )
        self.runs = [0] * n_regions
        self.most_held = 0
        self._values = Held()

    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.regions)):
            x = checkpoint(self._region, x, i, use_reentrant=False)  # type: ignore[assignment]
        return x.square().sum(1)

    def _region(self, x: Tensor, i: int) -> Tensor:
        self.runs[i] += 1
        linear, tanh, norm, last = self.regions[i]
        h = tanh(linear(x))
        self.most_held = max(self.most_held, self._values.add(h))
        return last(norm(h))


@pytest.fixture
def model() -> Watched:
    torch.manual_seed(0)
    return Watched().double()


def x() -> Tensor:
    return torch.randn(B, D, dtype=torch.float64)


def clip(losses: Tensor, model: nn.Module) -> None:
    rg.clipped_loss(losses, model, 0.5).backward()


@pytest.mark.parametrize("ask", [rg.grad_norms, rg.grad_rows, rg.jacobian, clip])
def test_a_region_is_recomputed_once_for_its_values_and_once_by_the_pass(
    ask: Callable[..., object], model: Watched
) -> None:
    ask(model(x()), model)  # proves
    losses = model(x())
    model.runs = [0] * REGIONS
    ask(losses, model)
    assert model.runs == [2] * REGIONS


@pytest.mark.parametrize("ask", [rg.grad_norms, rg.grad_rows])
def test_what_streams_holds_few_regions_at_once(
    ask: Callable[..., object], model: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tape, "WAITING_BYTES", 0)
    ask(model(x()), model)
    losses = model(x())
    model.most_held = 0
    ask(losses, model)
    assert 1 <= model.most_held <= 2


def test_rows_of_regions_within_a_group_of_the_users(model: Watched) -> None:
    """Each saved value is read once in a group; ours is another."""
    for _ in range(2):  # proved in the group, then known
        losses = model(x())
        expected = rows_by_grad(losses, dict(model.named_parameters()))
        with GraphExecGroup():
            rg.grad_norms(losses, model, retain_graph=True)
            assert_rows_close(rg.jacobian(losses, model, retain_graph=True).dense(as_dict=True), expected)
            losses.sum().backward()


IDS = torch.tensor([3, 1, 0, 2, 2])
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "ids": lambda: nn.Linear(D, D),
    "lstm": lambda: nn.LSTM(D, D, batch_first=True),
    "linear": lambda: nn.Linear(D, D),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_region_may_be_asked_of_in_the_middle_of_a_pass(name: str) -> None:
    """What is read there is not taken from the pass around."""
    torch.manual_seed(0)
    layer = LAYERS[name]()

    def region(t: Tensor) -> Tensor:
        h = layer(t)
        return h[..., IDS].tanh() if name == "ids" else h[0] if name == "lstm" else h.tanh()

    out = checkpoint(region, torch.randn(B, 3, D), use_reentrant=False)
    assert isinstance(out, Tensor)
    losses = out.square().sum((1, 2))
    expected = rg.grad_norms(losses, layer, retain_graph=True)
    found: list[Tensor] = []
    total = losses.sum()  # a hook on something that our own pass goes by would ask again and again
    total.register_hook(lambda _: found.append(rg.grad_norms(losses, layer, retain_graph=True)))
    total.backward(retain_graph=True)
    torch.testing.assert_close(found[0], expected)


def test_recomputation_in_inference_mode_is_refused(model: Watched) -> None:
    rg.grad_norms(model(x()), model)
    losses = model(x())
    with torch.inference_mode(), pytest.raises(GraphError, match=r"inference mode.*Ask outside"):
        rg.grad_norms(losses, model)
    assert torch.isfinite(rg.grad_norms(losses, model)).all()


def test_a_graph_that_is_kept_can_be_asked_again(model: Watched) -> None:
    losses = model(x())
    first = rg.grad_norms(losses, model, retain_graph=True)
    for _ in range(3):
        assert torch.equal(rg.grad_norms(losses, model, retain_graph=True), first)
    torch.testing.assert_close(rg.jacobian(losses, model).norms(), first)


def test_cotangents_may_come_when_the_graph_is_gone(model: Watched) -> None:
    losses = model(x())
    expected = rg.grad_norms(losses, model, retain_graph=True)
    prepared = Prepared(losses, model)
    assert prepared.edges is not None
    flow = rg.Graph(losses, model).backward({losses: torch.ones_like(losses)})
    cotangents = {edge: flow.cotangents.get(edge) for edge in prepared.edges}
    losses.sum().backward()
    torch.testing.assert_close(prepared.norms(cotangents), expected)


def test_offloaded_tensors_are_fetched_as_the_pass_comes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "WAITING_BYTES", 0)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(REGIONS))).double()
    fetched, held = Held(), []

    def unpack(kept: Tensor) -> Tensor:
        copy = kept.clone()
        held.append(fetched.add(copy))
        return copy

    def losses() -> Tensor:
        with saved_tensors_hooks(lambda t: t.detach(), unpack):
            return layers(x()).square().sum(1)

    asked = losses()
    expected = rows_by_grad(asked, dict(layers.named_parameters()))
    assert_rows_close(rg.jacobian(asked, layers, retain_graph=True).dense(as_dict=True), expected)
    held.clear()
    rg.grad_norms(losses(), layers)
    assert len(held) > 2 * REGIONS
    assert max(held) < REGIONS
