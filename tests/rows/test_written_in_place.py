"""Hooks and custom Functions that write to the gradient they are given, which the engine gave to others, too: hooks are
refused, Functions kept apart."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.reference import assert_rows_close, rows_by_grad, trainable
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rowgrad as rg
from rowgrad import tape
from rowgrad.errors import OpaqueGraphError

B, T, D = 5, 7, 6


class Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


class Doubled(Copied):
    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream.mul_(2)


class DoubledUnseen(Copied):
    """Writes in a way of which no version tells."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        upstream.data.mul_(2)
        return upstream


class DoubledAnew(Copied):
    """The same derivative, and no write."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream * 2


def anew(h: Tensor) -> Tensor:
    return DoubledAnew.apply(h)  # type: ignore[no-any-return]


def by_function(h: Tensor) -> Tensor:
    return Doubled.apply(h)  # type: ignore[no-any-return]


def unseen(h: Tensor) -> Tensor:
    return DoubledUnseen.apply(h)  # type: ignore[no-any-return]


def by_hook(h: Tensor) -> Tensor:
    h.register_hook(lambda z: z.mul_(2))
    return h


def by_clamping(h: Tensor) -> Tensor:
    h.register_hook(lambda z: z.clamp_(-0.1, 0.1))
    return h


QUESTIONS: dict[str, Callable[[Tensor, nn.Module], object]] = {
    "norms": rg.grad_norms,
    "rows": lambda losses, model: rg.jacobian(losses, model).dense(),
    "clipped": lambda losses, model: rg.clipped_loss(losses, model, 0.5).backward(),
}


@pytest.fixture
def model() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(D, D) for _ in range(3)).double()


def x() -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64)


@pytest.mark.parametrize("write", [by_hook, by_clamping])
@pytest.mark.parametrize(
    ("question", "waiting"),
    [*((question, tape.WAITING_BYTES) for question in QUESTIONS), ("rows", 0)],
)
def test_a_cotangent_that_is_no_longer_what_arrived_is_refused(
    question: str,
    waiting: int,
    write: Callable[[Tensor], Tensor],
    model: nn.ModuleList,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tape, "WAITING_BYTES", waiting)
    first, second, third = model
    data = x()
    for _ in range(2):
        losses = (write(first(data)) + third(second(data))).square().sum((1, 2))
        with pytest.raises(OpaqueGraphError, match=r"written to in the middle of the pass.*return a new tensor"):
            QUESTIONS[question](losses, model)


@pytest.mark.parametrize("waiting", [0, tape.WAITING_BYTES])
def test_sums_that_the_engine_takes_in_place_are_no_such_case(
    waiting: int, model: nn.ModuleList, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It adds what arrives by several ways to the first, where nobody else holds that."""
    monkeypatch.setattr(tape, "WAITING_BYTES", waiting)
    bias = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    params = {"bias": bias, **dict(model.named_parameters())}
    for _ in range(2):
        h = model[0](x())
        h = (h + bias) + model[1](h).tanh() + model[2](h).tanh() + h
        losses = (h + h.tanh()).square().sum((1, 2))
        expected = rows_by_grad(losses, params)
        norms = rg.grad_norms(losses, params, retain_graph=True)
        torch.testing.assert_close(norms, sum(r.flatten(1).square().sum(1) for r in expected.values()).sqrt())
        assert_rows_close(rg.jacobian(losses, params).dense(as_dict=True), expected)


Write = Callable[[Tensor], Tensor]


class Bias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(D))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.bias


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.table(torch.arange(B * T).view(B, T) % 9)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(T, T, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "bias": Bias,
    "embedding": Embedding,
    "convolution": Convolution,
    "layer norm": lambda: nn.LayerNorm(D),
}


def layer_first(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
    v = a(data)
    return write(b(data)) + v


def layer_last(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
    u = write(b(data))
    return u + a(data)


def layer_on_the_left(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
    u = write(b(data))
    return a(data) + u


def function_on_the_right(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
    v = a(data)
    return v + write(b(data))


def deeper(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
    h = b(data)
    return torch.tanh(layer_last(a, b, h, write)) + h


def within_views(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
    u = write(b(data)).flatten(1)
    return u + a(data).flatten(1)


def with_its_turn_to_come(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
    """No layer is given what is written to: the gradient of tanh is a new tensor, and wrong."""
    v = a(data).tanh()
    return write(b(data)) + v


def beside_it(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
    """Its gradient is a part of one that is cut up."""
    return torch.cat([write(a(data)), b(data)], 2)


SHARED = [
    layer_first,
    layer_last,
    layer_on_the_left,
    function_on_the_right,
    deeper,
    within_views,
    with_its_turn_to_come,
    beside_it,
]


def with_its_turn_over(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
    u = write(b(data))
    return u + a(data).tanh()


def in_a_row(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
    return write(a(b(data).tanh())).tanh()


def beside_a_way_around(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
    h = b(data)
    return h + write(a(h.tanh())).tanh()


def below_a_view(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
    return write(a(b(data).tanh())).flatten(1).tanh()


def where_examples_meet(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
    h = write(a(b(data).tanh())).transpose(1, 2)
    return F.batch_norm(h, None, None, training=True)


def on_the_way_to_a_weight(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
    """What a node called by itself is given, another is given, too."""
    first, second = (next(m.parameters()) for m in (a, b))
    weight = first.tanh() + write(second.tanh())
    return data @ weight if weight.ndim == 2 else data * weight


ALONE = [with_its_turn_over, in_a_row, beside_a_way_around, below_a_view, where_examples_meet]
GRAPHS = SHARED + ALONE

Graph = Callable[[nn.Module, nn.Module, Tensor, Write], Tensor]


def two(kind: str) -> nn.ModuleList:
    """The lowest layer of a branch, and a linear one."""
    torch.manual_seed(0)
    return nn.ModuleList([LAYERS[kind](), nn.Linear(D, D)]).double()


def losses_of(graph: Graph, model: nn.ModuleList, data: Tensor, write: Write) -> Tensor:
    return graph(model[0], model[1], data, write).square().flatten(1).sum(1)


def answer(question: str, losses: Tensor, model: nn.Module) -> Tensor:
    found = QUESTIONS[question](losses, model)
    if isinstance(found, Tensor):
        return found.reshape(len(found), -1)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable(model).values()]
    clipped = torch.cat([g.flatten() for g in gradients])
    model.zero_grad()
    return clipped[None]


def expected(question: str, losses: Tensor, model: nn.Module) -> Tensor:
    rows = torch.cat([r.flatten(1) for r in rows_by_grad(losses, trainable(model)).values()], 1)
    norms = rows.norm(dim=1, keepdim=True)
    clipped = (rows * (0.5 / norms).clamp(max=1)).mean(0, keepdim=True)
    return {"norms": norms, "rows": rows, "clipped": clipped}[question]


WRITES = [by_function, unseen, anew]
each_write = pytest.mark.parametrize("write", WRITES)
each_question = pytest.mark.parametrize("question", QUESTIONS)


@pytest.mark.filterwarnings("ignore::rowgrad.errors.RowgradWarning")
@each_question
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("graph", GRAPHS)
@each_write
def test_a_function_may_write_to_what_it_is_given(write: Write, graph: Graph, kind: str, question: str) -> None:
    model, data = two(kind), x()
    truth = expected(question, losses_of(graph, model, data, anew), model)
    for _ in range(2):
        assert_rows_close(answer(question, losses_of(graph, model, data, write), model), truth)


@each_question
@pytest.mark.parametrize("kind", ["linear", "bias"])
def test_a_node_called_by_itself_may_write(kind: str, question: str) -> None:
    model, data = two(kind), x()
    if kind == "bias":
        model[1] = Bias().double()
    truth = expected(question, losses_of(on_the_way_to_a_weight, model, data, anew), model)
    for _ in range(2):
        found = answer(question, losses_of(on_the_way_to_a_weight, model, data, by_function), model)
        assert_rows_close(found, truth)


@pytest.mark.parametrize("graph", SHARED)
@each_write
def test_it_may_in_inference_mode(write: Write, graph: Graph) -> None:
    model, data = two("linear"), x()
    truth = expected("rows", losses_of(graph, model, data, anew), model)
    for _ in range(2):
        losses = losses_of(graph, model, data, write)
        with torch.inference_mode():
            assert_rows_close(rg.jacobian(losses, model).dense(), truth)


@each_question
@each_write
def test_it_may_write_to_the_seed(write: Write, question: str) -> None:
    model, data = two("linear"), x()

    def losses(by: Write) -> Tensor:
        return by(model[0](data).square().sum((1, 2)))

    truth = expected(question, losses(anew), model)
    for _ in range(2):
        assert_rows_close(answer(question, losses(write), model), truth)


@each_question
def test_a_write_to_a_view_of_a_value_hands_on_copies(question: str) -> None:
    def half_replaced(a: nn.Module, b: nn.Module, data: Tensor, write: Write) -> Tensor:
        h = a(data).clone()
        h[..., :2] = write(b(data)[..., :2])
        return h + a(data)

    model, data = two("linear"), x()
    truth = expected(question, losses_of(half_replaced, model, data, anew), model)
    for _ in range(2):
        assert_rows_close(answer(question, losses_of(half_replaced, model, data, by_function), model), truth)


@pytest.mark.parametrize("graph", SHARED)
@each_write
def test_it_may_in_a_checkpointed_region_which_answers_again(write: Write, graph: Graph) -> None:
    model, data = two("linear"), x()

    def region(h: Tensor) -> Tensor:
        return graph(model[0], model[1], h, write)

    for _ in range(2):
        losses = checkpoint(region, data, use_reentrant=False).square().flatten(1).sum(1)  # type: ignore[attr-defined]
        truth = expected("rows", losses_of(graph, model, data, anew), model)
        assert_rows_close(rg.grad_norms(losses, model, retain_graph=True)[:, None], truth.norm(dim=1, keepdim=True))
        J = rg.jacobian(losses, model, retain_graph=True)
        assert_rows_close(J.dense(), truth)
        if write is not anew:
            continue  # by itself PyTorch keeps nothing apart
        losses.sum().backward()
        summed = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert_rows_close(summed[None], truth.sum(0, keepdim=True))
        model.zero_grad()


@pytest.mark.parametrize("write", [by_function, anew])
def test_what_a_function_is_given_is_not_kept(write: Write) -> None:
    model, data = two("linear"), x()
    gradients: list[weakref.ref[Tensor]] = []
    h = with_its_turn_over(model[0], model[1], data, write)
    h.register_hook(lambda z: gradients.append(weakref.ref(z)))
    losses = h.square().flatten(1).sum(1)
    rg.grad_norms(losses, model, retain_graph=True)
    gc.collect()
    assert gradients
    assert not [z for z in gradients if z() is not None]


class Reused(Copied):
    """Doubles into memory that is written to again at every call."""

    memory: Tensor

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        Reused.memory.data.copy_(upstream * 2)
        return Reused.memory


@pytest.mark.filterwarnings("ignore::rowgrad.errors.RowgradWarning")
@pytest.mark.parametrize("n", [1, B])
@each_question
@pytest.mark.parametrize("graph", [in_a_row, with_its_turn_over, deeper, on_the_way_to_a_weight])
def test_a_function_may_return_what_it_returned_before(graph: Graph, question: str, n: int) -> None:
    model, data = two("linear"), x()[:n]

    def twice(write: Write) -> Tensor:
        return losses_of(lambda a, b, h, w: w(graph(a, b, w(h @ b.weight), w)), model, data, write)

    if graph is on_the_way_to_a_weight:
        Reused.memory = torch.empty(D, D, dtype=torch.float64)
        losses = partial(losses_of, graph, model, data)
    else:
        Reused.memory = torch.empty(n, T, D, dtype=torch.float64)
        losses = twice
    truth = expected(question, losses(anew), model)
    for _ in range(2):
        found = answer(question, losses(lambda h: Reused.apply(h)), model)
        assert_rows_close(found.reshape(truth.shape), truth)


class Counting(Copied):
    """Its derivative is what it keeps, which it changes at every call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.factor = torch.full_like(x, 2.0)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        found = upstream * ctx.factor
        ctx.factor *= 3
        return found


class Random(Copied):
    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream * torch.rand_like(upstream)


class Shuffled(Copied):
    """The same numbers, elsewhere each time."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream[..., torch.randperm(upstream.shape[-1])]


class OtherAtFirst(Copied):
    calls = 0

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        OtherAtFirst.calls += 1
        return upstream * (3 if OtherAtFirst.calls == 1 else 1)


class CountingProduct(torch.autograd.Function):
    """The lowest node of its branch, which no proof passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.x = x.clone()
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        found = upstream.flatten(0, 1).T @ ctx.x.flatten(0, 1)
        ctx.x.mul_(2)
        return None, found


@pytest.mark.filterwarnings("ignore::rowgrad.errors.RowgradWarning")
@each_question
@pytest.mark.parametrize("function", [Counting, Random, Shuffled])
@pytest.mark.parametrize("graph", [in_a_row, with_its_turn_over, deeper, on_the_way_to_a_weight])
def test_a_function_that_answers_otherwise_each_time_is_refused(
    graph: Graph, function: type[Copied], question: str
) -> None:
    model, data = two("linear"), x()
    losses = losses_of(graph, model, data, lambda h: function.apply(h))  # type: ignore[no-any-return]
    with pytest.raises(OpaqueGraphError, match=rf"{function.__name__}Backward#.* answers differently each time"):
        answer(question, losses, model)


@pytest.mark.filterwarnings("ignore::rowgrad.errors.RowgradWarning")
@pytest.mark.parametrize("verify", ["cached", "always"])
def test_also_where_only_the_first_answer_is_another(verify: str) -> None:
    OtherAtFirst.calls = 0
    model = two("linear")[0]
    losses = OtherAtFirst.apply(model(x())).square().flatten(1).sum(1)
    with pytest.raises(OpaqueGraphError, match="answers differently each time"):
        rg.jacobian(losses, model, verify=verify)


class LateProduct(CountingProduct):
    """Right until it was asked for most rows."""

    calls = 0

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        LateProduct.calls += 1
        return None, upstream.flatten(0, 1).T @ ctx.x.flatten(0, 1) * max(1, LateProduct.calls - B + 2)


@pytest.mark.filterwarnings("ignore::rowgrad.errors.RowgradWarning")
@each_question
def test_also_where_only_late_answers_are_others(question: str) -> None:
    LateProduct.calls = 0
    model = nn.Linear(D, D, bias=False).double()
    losses = LateProduct.apply(x(), model.weight).square().flatten(1).sum(1)
    with pytest.raises(OpaqueGraphError, match=r"LateProductBackward#.* answers differently each time"):
        answer(question, losses, model)


@pytest.mark.filterwarnings("ignore::rowgrad.errors.RowgradWarning")
@pytest.mark.parametrize("n", [1, B])
@each_question
def test_so_is_one_that_holds_a_parameter(question: str, n: int) -> None:
    model = nn.Linear(D, D, bias=False).double()
    losses = CountingProduct.apply(x()[:n], model.weight).square().flatten(1).sum(1)
    with pytest.raises(OpaqueGraphError, match=r"CountingProductBackward#.* answers differently each time"):
        answer(question, losses, model)


@pytest.mark.filterwarnings("ignore::rowgrad.errors.RowgradWarning")
def test_a_function_is_not_blamed_for_a_hook_that_draws() -> None:
    model = two("linear")[0]
    h = anew(model(x())) * 1
    h.register_hook(lambda z: z * (1 + torch.rand_like(z)))
    assert rg.grad_norms(h.square().flatten(1).sum(1), model).isfinite().all()
