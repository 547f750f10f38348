"""Questions asked while a backward pass runs, and losses of general rows used in any kind of pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.rows.laws import energy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import rowgrad as rg
from rowgrad.errors import ConsumedJacobianError, GraphError, OpaqueGraphError

pytestmark = pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")


def by_a_plain_pass(loss: Tensor, p: Tensor) -> Tensor:
    loss.backward()
    assert p.grad is not None
    return p.grad


def by_a_pass_to_some(loss: Tensor, p: Tensor) -> Tensor:
    loss.backward(inputs=[p])
    assert p.grad is not None
    return p.grad


def by_grad(loss: Tensor, p: Tensor) -> Tensor:
    return torch.autograd.grad(loss, p)[0]


PASSES = {"backward": by_a_plain_pass, "backward to some": by_a_pass_to_some, "grad": by_grad}
each_pass = pytest.mark.parametrize("run", PASSES.values(), ids=list(PASSES))


@pytest.fixture
def p() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 3, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(5, 4, dtype=torch.float64)


def computed(x: Tensor, p: Tensor) -> Tensor:
    return energy(x @ torch.sin(torch.tanh(p)))


def normalized_over_the_batch(x: Tensor, p: Tensor) -> Tensor:
    return energy(torch.nn.functional.batch_norm(x @ p, None, None, training=True))


def recomputed(x: Tensor, p: Tensor) -> Tensor:
    return energy(checkpoint(lambda t: t @ torch.tanh(p), x, use_reentrant=False))


GRAPHS = [computed, normalized_over_the_batch, recomputed]


@each_pass
@pytest.mark.parametrize("max_bytes", [None, 0])
@pytest.mark.parametrize("losses", GRAPHS)
def test_rows_that_are_not_kept_in_any_pass(
    losses: Callable[[Tensor, Tensor], Tensor], max_bytes: int | None, run: Callable, x: Tensor, p: Tensor
) -> None:
    expected = torch.autograd.grad(losses(x, p).sum() * 3, p)[0]
    loss = rg.clipped_loss(losses(x, p), [p], 1e9, reduction="sum", max_bytes=max_bytes) * 3
    torch.testing.assert_close(run(loss, p), expected)


@each_pass
def test_weights_by_layer(run: Callable, x: Tensor, p: Tensor) -> None:
    L = computed(x, p)
    J = rg.jacobian(L, {"p": p}, max_bytes=0, retain_graph=True)
    c = torch.linspace(-1, 2, 5, dtype=torch.float64)
    loss = J.loss({"p": c})
    torch.testing.assert_close(loss, (c * L).sum())
    torch.testing.assert_close(run(loss, p), torch.autograd.grad((c * L).sum(), p)[0])
    with pytest.raises(ConsumedJacobianError):
        J.gram()


def test_a_question_from_a_hook_is_answered_or_refused(x: Tensor, p: Tensor) -> None:
    """Nodes called by themselves answer only what the pass around asks: rows that need it are refused."""
    other = torch.ones(2, requires_grad=True)
    slope = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    plain, general = energy(x @ p), computed(x, p)
    scaled = energy(torch.nn.functional.prelu(x @ p, slope))
    expected = rg.grad_norms(plain, [p], retain_graph=True)
    answers: list[Tensor] = []

    def ask(_: Tensor) -> None:
        answers.append(rg.grad_norms(plain, [p], retain_graph=True))
        for losses in (general, scaled):
            with pytest.raises(GraphError, match=r"middle of a backward pass.*Ask before the pass, or after it"):
                rg.grad_norms(losses, [p, slope], retain_graph=True)

    for run in (lambda t: t.backward(), lambda t: torch.autograd.grad(t, other)):
        between = other * 2
        between.register_hook(ask)
        run(between.sum())
    assert len(answers) == 2
    assert all(torch.equal(found, expected) for found in answers)


def test_graphs_with_a_part_in_common_asked_at_once() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(8, 32), nn.PReLU(), nn.Linear(32, 32), nn.PReLU())
    head = nn.Linear(32, 3)
    shared = trunk(torch.randn(64, 8))
    losses = [((head(shared) + k) * (k + 1)).square().sum(1) for k in range(4)]
    expected = [rg.grad_norms(each, trunk, retain_graph=True) for each in losses]

    def ask(k: int) -> bool:
        found = [rg.grad_norms(losses[k], trunk, retain_graph=True) for _ in range(60)]
        return all(torch.allclose(norms, expected[k]) for norms in found)

    def disturb(_: int) -> bool:
        for _ in range(120):
            torch.autograd.grad(shared.sum(), list(trunk.parameters()), retain_graph=True)
        return True

    with ThreadPoolExecutor(5) as pool:
        assert all([*pool.map(ask, range(4)), *pool.map(disturb, range(1))])


def test_a_selectively_checkpointed_region_is_refused(x: Tensor, p: Tensor) -> None:
    save = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    losses = energy(checkpoint(lambda t: (t @ p).tanh(), x, use_reentrant=False, context_fn=save))
    with pytest.raises(OpaqueGraphError, match="selectively checkpointed"):
        rg.grad_norms(losses, [p])


def test_inference_mode_around_a_call(x: Tensor, p: Tensor) -> None:
    losses = energy((x @ p).tanh() @ p.T)
    expected = rg.grad_norms(losses, [p], retain_graph=True)
    with torch.inference_mode():
        assert torch.equal(rg.grad_norms(losses, [p], retain_graph=True), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("verify", ["cached", "always"])
def test_nested_tensors_are_refused(layout: torch.layout, verify: str) -> None:
    layer = nn.Linear(4, 3)
    ragged = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=layout)
    losses = torch.stack([t.square().sum() for t in layer(ragged).unbind()])
    with pytest.raises(GraphError, match=r"nested tensor.*Pad the examples"):
        rg.grad_norms(losses, layer, verify=verify)
