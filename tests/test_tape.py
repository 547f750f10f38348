"""The graph as it is read: a graph of a known structure is read as any other, and no other is taken for it."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rowgrad import tape
from rowgrad.tape import Node, Tape

B, D = 4, 3


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    tape.forget_structures()
    yield
    tape.forget_structures()


def weight(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def data(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def facts(node: Node) -> tuple:
    return id(node.fn), node.index, node.kind, node.slots, id(node.variable)


def read_anew(losses: Tensor) -> Tape:
    tape.forget_structures()
    return Tape(losses)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return x + y, x - y

    @staticmethod
    def backward(ctx, *upstream):
        return sum(upstream), upstream[0] - upstream[1]


def layers() -> Tensor:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * (D + 1), 2)).double()
    return F.cross_entropy(model(data(B, 2, D + 3)), torch.zeros(B, dtype=torch.long), reduction="none")


def attention() -> Tensor:
    q, k, v = (data(B, D, 6) @ weight(6, 6)).chunk(3, 2)
    return F.scaled_dot_product_attention(q, k, v).sum((1, 2))


GRAPHS: dict[str, Callable[[], Tensor]] = {
    "one product": lambda: data(B, D) @ weight(D),
    "layers": layers,
    "attention": attention,
    "custom": lambda: sum(Twice.apply(data(B, D) @ weight(D), weight(1).expand(B))),  # type: ignore[arg-type, return-value]
    "recomputed": lambda: checkpoint(lambda x, W: (x @ W).sum(1), data(B, D), weight(D, 2), use_reentrant=False),  # type: ignore[return-value]
    "indexed": lambda: weight(9, D)[torch.tensor([0, 2, 2, 5])].sum(1),
    "an output of several": lambda: weight(B, 2).double().unbind(1)[1],
    "with a nan": lambda: (data(B, D) @ weight(D)).clamp(max=float("nan")),
    "in place": lambda: (data(B, D) @ weight(D, D)).index_fill_(1, torch.tensor([0]), 1.0).sum(1),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_alike_share_a_structure(name: str) -> None:
    first, second = GRAPHS[name](), GRAPHS[name]()
    structure = Tape(first).structure
    again = Tape(second)
    assert again._structure is structure
    slow = read_anew(second)
    assert slow._structure is None
    assert list(map(facts, again.nodes)) == list(map(facts, slow.nodes))
    assert (again.root_slot, again.leaves) == (slow.root_slot, slow.leaves)
    assert again.edge_of(second) == slow.edge_of(second)


def shared(same: bool) -> Tensor:
    W = weight(D, D)
    return (data(B, D) @ W @ (W if same else weight(D, D))).sum(1)


def value_shared(same: bool) -> Tensor:
    x, W = data(B, D), weight(D)
    y = torch.tanh(x @ W)
    return y * (y if same else torch.tanh(x @ W))


def turned(order: tuple[int, ...]) -> Tensor:
    return (data(B, D, D) @ weight(D, D)).permute(*order).flatten(1).sum(1)


def checked(n_layers: int) -> Tensor:
    y = data(B, D)
    for _ in range(n_layers):
        y = torch.tanh(y @ weight(D, D))
    return y.sum(1)


PAIRS: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
    "operation": (lambda: torch.sin(data(B, D) @ weight(D)), lambda: torch.cos(data(B, D) @ weight(D))),
    "dimensions": (lambda: turned((0, 1, 2)), lambda: turned((0, 2, 1))),
    "attribute": (
        lambda: torch.add(data(B), weight(B), alpha=2),
        lambda: torch.add(data(B), weight(B), alpha=3),
    ),
    "size of the data": (lambda: (data(B, 2, D) @ weight(D)).sum(1), lambda: (data(B, 5, D) @ weight(D)).sum(1)),
    "size of a weight": (lambda: (data(B, D) @ weight(D, 2)).sum(1), lambda: (data(B, D) @ weight(D, 5)).sum(1)),
    "size of a weight alone": (lambda: (data(B, D) * weight(D)).sum(1), lambda: (data(B, D) * weight(1)).sum(1)),
    "a computed weight": (lambda: data(B) * weight(B), lambda: data(B) * weight(B).sin()),
    "examples": (lambda: data(B, D) @ weight(D), lambda: data(B + 1, D) @ weight(D)),
    "dtype": (
        lambda: data(B, D) @ weight(D),
        lambda: data(B, D, dtype=torch.float32) @ weight(D, dtype=torch.float32),
    ),
    "dtype on the way": (
        lambda: (data(B, D) @ weight(D, D)).float().square().double().sum(1),
        lambda: (data(B, D) @ weight(D, D)).half().square().double().sum(1),
    ),
    "a parameter used again": (lambda: shared(True), lambda: shared(False)),
    "separate parameters": (lambda: shared(False), lambda: shared(True)),
    "a value used again": (lambda: value_shared(True), lambda: value_shared(False)),
    "separate values": (lambda: value_shared(False), lambda: value_shared(True)),
    "which operand": (lambda: data(B) - weight(B), lambda: weight(B) - data(B)),
    "a constant operand": (lambda: weight(B) * weight(B), lambda: weight(B) * data(B)),
    "an operand": (lambda: weight(B) * data(B), lambda: weight(B) * weight(B)),
    "which output": (lambda: weight(B, 2).sin().unbind(1)[0], lambda: weight(B, 2).sin().unbind(1)[1]),
    "which output, below": (
        lambda: weight(B, 2).sin().unbind(1)[0].cos(),
        lambda: weight(B, 2).sin().unbind(1)[1].cos(),
    ),
    "depth": (lambda: checked(3), lambda: checked(2)),
    "number of operands": (
        lambda: torch.cat([weight(2), weight(2)]),
        lambda: torch.cat([weight(2), weight(1), weight(1)]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_graphs_that_differ_do_not(name: str) -> None:
    known, other = PAIRS[name][0](), PAIRS[name][1]()
    structure = Tape(known).structure
    found = Tape(other)
    assert found._structure is None
    assert found.structure is not structure
    assert Tape(known)._structure is structure
    assert list(map(facts, Tape(other).nodes)) == list(map(facts, read_anew(other).nodes))


def test_the_structures_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "KNOWN_NODES", 6)  # three structures of two
    structures = [Tape(data(n, D) @ weight(D)).structure for n in (1, 2, 3)]
    Tape(data(1, D) @ weight(D))
    assert [s for _, s in tape._recent] == [structures[i] for i in (0, 2, 1)]
    newest = Tape(data(9, D) @ weight(D)).structure
    assert [s for _, s in tape._recent] == [newest, *(structures[i] for i in (0, 2, 1))][: tape.TRIED_STRUCTURES]
    assert list(tape._known.values()) == [structures[2], structures[0], newest]


def test_a_structure_larger_than_all_that_is_kept_is_kept_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "KNOWN_NODES", 1)
    for n in (1, 2):
        structure = Tape(data(n, D) @ weight(D)).structure
        assert list(tape._known.values()) == [structure]


def test_structures_of_equal_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "hash", lambda _: 0, raising=False)
    one, other = (Tape(data(n, D) @ weight(D)).structure for n in (1, 2))
    assert one is not other
    tape._recall(())
    assert Tape(data(2, D) @ weight(D)).structure is other


def test_a_function_defined_in_a_step_is_let_go() -> None:
    def step() -> weakref.ref[type]:
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return 2 * x

            @staticmethod
            def backward(ctx: Any, z: Tensor) -> Tensor:
                return 2 * z

        Tape(Double.apply(weight(D))).structure  # noqa: B018
        return weakref.ref(Double)

    function = step()
    tape.forget_structures()
    gc.collect()
    assert function() is None


def test_among_many_a_structure_is_found_by_its_signature() -> None:
    sizes = range(1, 2 * tape.TRIED_STRUCTURES)
    structures = [Tape(data(n, D) @ weight(D)).structure for n in sizes]
    oldest = Tape(data(1, D) @ weight(D))
    assert oldest._structure is None
    assert oldest.structure is structures[0]
    assert Tape(data(1, D) @ weight(D))._structure is structures[0]


def test_threads_may_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "KNOWN_NODES", 6)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def read(first: int) -> int:
        return sum(len(Tape(data(1 + (first + i) % 7, D) @ weight(D)).structure.kinds) for i in range(150))

    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(read, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert found == [300] * 4


def test_where_python_may_run_in_a_backward_pass() -> None:
    w, x = weight(D), data(B, D)
    assert not Tape((x * w).tanh().sum(1)).runs_python
    for _ in range(2):  # node by node, then by its structure
        read = Tape(Twice.apply(x * w, w)[1].sum(1))
        assert read.runs_python
        assert read.structure.runs_python
    assert Tape(Twice.apply(x * w, w)[0].sum(1)).runs_python
    h = x * w
    h[:, 0].mul_(2)
    assert Tape(h.sum(1)).runs_python
