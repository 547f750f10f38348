"""Attacks on ownership: graphs that try to pass one example's derivative off as another's.

Each attack compares every row with the slow truth on the same graph. Sequences of calls share one signature, so that a
layout kept from an earlier call would be used where it no longer holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import FunctionType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.reference import assert_rows_close, rows_by_grad
from tests.rows.laws import counted_passes
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.rows import plan, structure
from rowgrad.rows.ownership import (
    MIXED,
    ZERO,
    Axis,
    Entries,
    Grouping,
    Prover,
    axis_candidates,
    codebook,
    detectable_ratio,
    mask,
)
from rowgrad.rows.site import Recipe
from rowgrad.tape import Tape

pytestmark = pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
B, D = 5, 4


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    plan.forget()
    yield
    plan.forget()


def assert_exact(losses: Tensor, params: dict[str, Tensor], rtol: float = 1e-10) -> rg.Jacobian:
    expected = rows_by_grad(losses, params)
    J = rg.jacobian(losses, params, retain_graph=True)
    assert_rows_close(J.dense(as_dict=True), expected, rtol)
    return J


def weight(dtype: torch.dtype = torch.float64, *shape: int) -> Tensor:
    return torch.randn(*(shape or (D, D)), dtype=dtype).requires_grad_()


# -- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 16, 20, 64, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_pair_is_told_apart_in_both_directions(n: int, dtype: torch.dtype) -> None:
    book = codebook(n, [dtype], torch.ones(n, dtype=dtype), torch.Generator().manual_seed(0))
    seeds = torch.stack([code.seed.double() for code in book.passes], 1)  # (n, passes)
    assert len(torch.unique(book.words, dim=0)) == n
    separation = (detectable_ratio(dtype) or 1e-300) ** -1 * torch.finfo(dtype).eps
    for j in range(n):
        higher = (seeds > 0) & ((seeds[j] == 0) | (seeds >= seeds[j] * separation / 2**4))
        higher[j] = True
        assert bool(higher.any(1).all())


def test_detectable_ratio_is_below_the_smallest_planted_coupling() -> None:
    assert max(detectable_ratio(d) for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)) < 1e-20


# -- weak mixing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", range(3, 21))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weak_coupling_is_not_lost_where_it_is_everything(dtype: torch.dtype, exponent: int) -> None:
    """Loss j reads its neighbor with weight 10^-exponent; two examples read nothing else."""
    torch.manual_seed(exponent)
    W, x = weight(dtype), torch.randn(B, D, dtype=dtype)
    own = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=dtype)
    h = x @ W
    losses = own * h.sum(1) + 10.0**-exponent * h.square().sum(1).roll(1)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    J = assert_exact(losses, {"W": W}, tolerance)
    assert J.couplings


def test_weak_coupling_in_half_precision() -> None:
    W, x = weight(torch.float16), torch.randn(B, D, dtype=torch.float16)
    h = x @ W
    losses = torch.tensor([1.0, 0, 1, 1, 0], dtype=torch.float16) * h.sum(1) + 1e-3 * h.sum(1).roll(1)
    assert_exact(losses, {"W": W}, 1e-2)


def test_canceling_seeds_do_not_look_like_zero() -> None:
    """The sum of the rows 1, -1, 2, -2 is zero under a seed of ones."""
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    losses = torch.tensor([1.0, -1, 2, -2], dtype=torch.float64) * (w * 3).sin()
    assert_exact(losses, {"w": w})


# -- sequences of calls with one signature -----------------------------------------------------------------------------

Step = Callable[[int], tuple[Tensor, dict[str, Tensor]]]
SEQUENCES: dict[str, Callable[[], Step]] = {}


def sequence(make: Callable[[], Step]) -> Callable[[], Step]:
    SEQUENCES[make.__name__] = make
    return make


@sequence
def batchnorm_eval_then_train() -> Step:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 1)).double()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        model.train(i % 2 == 1)
        return model(torch.randn(B, D, dtype=torch.float64)).squeeze(1), dict(model.named_parameters())

    return step


@sequence
def permuted_batch() -> Step:
    W = weight()
    orders = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 0, 3, 2, 4]]

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.randn(B, D, dtype=torch.float64) @ W
        return h[torch.tensor(orders[i % 3])].square().sum(1), {"W": W}

    return step


@sequence
def as_many_positions_as_examples() -> Step:
    W = weight()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.tanh(torch.randn(B, B, D, dtype=torch.float64) @ W)
        return h.square().sum((1, 2) if i % 2 == 0 else (0, 2)), {"W": W}

    return step


@sequence
def mixing_matrix_first_the_identity() -> Step:
    W = weight()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        A = torch.eye(B, dtype=torch.float64) if i == 0 else torch.randn(B, B, dtype=torch.float64)
        return (A @ torch.tanh(torch.randn(B, D, dtype=torch.float64) @ W)).sum(1), {"W": W}

    return step


@sequence
def trained_mixing_matrix_first_the_identity() -> Step:
    W, M = weight(), torch.eye(B, dtype=torch.float64).requires_grad_()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            M.add_(torch.randn_like(M) * (i > 0))
        return (M @ torch.tanh(torch.randn(B, D, dtype=torch.float64) @ W)).sum(1), {"W": W, "M": M}

    return step


@sequence
def gate_first_closed() -> Step:
    W, gate = weight(), torch.zeros((), dtype=torch.float64, requires_grad=True)

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            gate.fill_(float(i))
        h = torch.tanh(torch.randn(B, D, dtype=torch.float64) @ W)
        return (h + gate * (h - h.mean(0))).sum(1), {"W": W, "gate": gate}

    return step


@sequence
def gate_by_channel_first_half_closed() -> Step:
    W = weight()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.tanh(torch.randn(B, D, dtype=torch.float64) @ W)
        gate = torch.tensor([0.0, 0, 0, 1 if i else 0], dtype=torch.float64)
        return (h * (1 - gate) + gate * h.flip(0)).sum(1), {"W": W}

    return step


@sequence
def total_read_by_one_example_then_another() -> Step:
    W = weight()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.tanh(torch.randn(B, D, dtype=torch.float64) @ W)
        reads = F.one_hot(torch.tensor(i % B), B).double()
        return h.sum(1) + reads * h.square().sum(), {"W": W}

    return step


@sequence
def attention_over_the_batch_first_one_hot() -> Step:
    W = weight()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.randn(B, D, dtype=torch.float64) @ W
        scores = torch.eye(B, dtype=torch.float64) * (1e9 if i == 0 else 1.0)
        return (torch.softmax(scores, 1) @ h).square().sum(1), {"W": W}

    return step


@sequence
def chosen_by_data_with_where() -> Step:
    W = weight()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.tanh(torch.randn(B, D, dtype=torch.float64) @ W)
        pick = torch.full((B, 1), i == 0) if i != 2 else torch.tensor([[True], [False], [True], [False], [True]])
        return torch.where(pick, h, h.flip(0)).square().sum(1), {"W": W}

    return step


@sequence
def masked_by_data() -> Step:
    W = weight()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.tanh(torch.randn(B, D, dtype=torch.float64) @ W)
        masks = [torch.eye(B), torch.ones(B, B), torch.eye(B).roll(1, 0)]
        pooled = (h.unsqueeze(0) * masks[i % 3].double().unsqueeze(2)).sum(1)
        return pooled.square().sum(1), {"W": W}

    return step


@sequence
def routed_experts() -> Step:
    experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3)).double()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.randn(B * 2, D, dtype=torch.float64)
        route = torch.randperm(B * 2, generator=torch.Generator().manual_seed(i)) % 3
        out = torch.zeros_like(x)
        for k, expert in enumerate(experts):
            rows = (route == k).nonzero().squeeze(1)
            out = out.index_add(0, rows, torch.tanh(expert(x[rows])))
        return out.reshape(B, 2, D).square().sum((1, 2)), dict(experts.named_parameters())

    return step


@sequence
def packed_lengths_change() -> Step:
    W = weight()
    lengths = [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [3, 3, 3, 3, 3]]

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        owner = torch.repeat_interleave(torch.arange(B), torch.tensor(lengths[i % 3]))
        token = torch.tanh(torch.randn(15, D, dtype=torch.float64) @ W).square().sum(1)
        return torch.zeros(B, dtype=torch.float64).index_add(0, owner, token), {"W": W}

    return step


@sequence
def packed_sequence() -> Step:
    model = nn.LSTM(D, 3, batch_first=True).double()
    lengths = [[4, 3, 2, 1, 1], [4, 4, 1, 1, 1], [3, 2, 2, 2, 2]]

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.randn(B, 4, D, dtype=torch.float64)
        order = torch.randperm(B)
        packed = nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor(lengths[i % 3])[order], batch_first=True, enforce_sorted=False
        )
        out, _ = nn.utils.rnn.pad_packed_sequence(model(packed)[0], batch_first=True)
        return out.square().sum((1, 2)), dict(model.named_parameters())

    return step


@sequence
def last_batch_is_smaller() -> Step:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1)).double()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        n = [6, 6, 2, 1, 3][i % 5]
        return model(torch.randn(n, D, dtype=torch.float64)).squeeze(1), dict(model.named_parameters())

    return step


@sequence
def dead_branch_comes_alive() -> Step:
    """At the proving call no gradient enters the branch that mixes."""
    W, V = weight(), weight()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.randn(B, D, dtype=torch.float64)
        h = torch.tanh(x @ W)
        branch = torch.relu(h.abs() @ V.abs() - (1e6 if i == 0 else 0))
        return h.sum(1) + (branch - branch.mean(0)).square().sum(1), {"W": W, "V": V}

    return step


@sequence
def losses_all_zero_first() -> Step:
    W = weight()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.randn(B, D, dtype=torch.float64) @ W
        return float(i) * (h + h.cumsum(0)).square().sum(1), {"W": W}

    return step


@sequence
def convolution_over_the_batch_first_pointwise() -> Step:
    W = weight()
    kernel = torch.zeros(1, 1, 3, dtype=torch.float64, requires_grad=True)

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            kernel.copy_(torch.tensor([[[0.0 + i, 1.0, 0.0]]]))
        h = (torch.randn(B, D, dtype=torch.float64) @ W).sum(1)
        return F.conv1d(h.reshape(1, 1, B), kernel, padding=1).reshape(B).square(), {"W": W, "kernel": kernel}

    return step


@sequence
def custom_function_changes_its_mind() -> Step:
    W = weight()

    class Maybe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h: Tensor, mix: bool) -> Tensor:
            ctx.mix = mix
            return h.flip(0) if mix else h.clone()

        @staticmethod
        def backward(ctx, g: Tensor):
            return (g.flip(0) if ctx.mix else g), None

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.tanh(torch.randn(B, D, dtype=torch.float64) @ W)
        return Maybe.apply(h, i % 2 == 1).square().sum(1), {"W": W}

    return step


@sequence
def sorted_over_the_batch() -> Step:
    W = weight()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.randn(B, D, dtype=torch.float64) @ W + (torch.arange(B).double().unsqueeze(1) * 100 if i == 0 else 0)
        return h.sort(0).values.square().sum(1), {"W": W}

    return step


@sequence
def one_per_example_gathered() -> Step:
    W = weight()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.randn(B, D, dtype=torch.float64) @ W
        index = (torch.arange(B) + i) % B
        return h.gather(0, index.unsqueeze(1).expand(B, D)).square().sum(1), {"W": W}

    return step


@sequence
def reshaped_across_examples() -> Step:
    W = weight()

    def step(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.tanh(torch.randn(4, 4, dtype=torch.float64) @ W)
        return (h if i % 2 == 0 else h.t().contiguous()).reshape(4, 4).square().sum(1), {"W": W}

    return step


@pytest.mark.parametrize("name", SEQUENCES)
def test_no_call_of_a_sequence_gives_a_wrong_row(name: str) -> None:
    torch.manual_seed(0)
    step = SEQUENCES[name]()
    for i in range(6):
        losses, params = step(i)
        assert_exact(losses, params)


# -- adversarial search ------------------------------------------------------------------------------------------------

KNOBS = ("identity", "permutation", "zeros", "one_hot", "random")


def knob(kind: str, n: int) -> Tensor:
    """A matrix that moves or mixes n things more or less, on a whim."""
    made = {
        "identity": torch.eye(n),
        "permutation": torch.eye(n)[torch.randperm(n)],
        "zeros": torch.zeros(n, n),
        "one_hot": F.one_hot(torch.randint(n, (n,)), n),
        "random": torch.randn(n, n),
    }
    return made[kind].double()


OPERATIONS: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "linear": lambda h, W, k: h @ W,
    "tanh": lambda h, W, k: torch.tanh(h),
    "relu": lambda h, W, k: torch.relu(h),
    "left product": lambda h, W, k: knob(k, h.shape[0]) @ h,
    "right product": lambda h, W, k: h @ knob(k, h.shape[1]),
    "gate over examples": lambda h, W, k: h * knob(k, h.shape[0])[0].unsqueeze(1),
    "gated mean": lambda h, W, k: h + knob(k, h.shape[0])[0].unsqueeze(1) * h.mean(0),
    "gated center": lambda h, W, k: h - knob(k, h.shape[1])[0] * h.mean(0),
    "transpose": lambda h, W, k: h.t() if h.shape[0] == h.shape[1] else h,
    "reshape": lambda h, W, k: h.t().reshape(h.shape),
    "softmax over examples": lambda h, W, k: torch.softmax(h + 50 * knob(k, 5)[: h.shape[0], :4], 0),
    "softmax": lambda h, W, k: torch.softmax(h, 1),
    "index": lambda h, W, k: h[knob(k, h.shape[0]).argmax(1)],
    "where": lambda h, W, k: torch.where(knob(k, h.shape[0])[0].unsqueeze(1) > 0, h, h.flip(0)),
    "cumulative": lambda h, W, k: h.cumsum(1),
    "cumulative over examples": lambda h, W, k: (h * knob(k, h.shape[0])[0].unsqueeze(1)).cumsum(0),
    "normalize": lambda h, W, k: F.layer_norm(h, (h.shape[1],)),
    "batch normalize": lambda h, W, k: F.batch_norm(h, None, None, training=True),
    "split and join": lambda h, W, k: torch.cat([h[:, :2], h[:, 2:].flip(0)], 1),
    "residual": lambda h, W, k: h + torch.tanh(h @ W),
    "outer": lambda h, W, k: torch.einsum("bi,ci->bc", h, h) @ h if k == "random" else h * h.mean(1, keepdim=True),
}


@st.composite
def programs(draw: st.DrawFn) -> tuple[int, list[str], list[list[str]], int]:
    n = draw(st.sampled_from([2, 3, 4, 5]))
    names = draw(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=6))
    calls = draw(st.lists(st.lists(st.sampled_from(KNOBS), min_size=6, max_size=6), min_size=2, max_size=4))
    return n, names, calls, draw(st.integers(0, 2**16))


def run(program: tuple[int, list[str], list[list[str]], int]) -> None:
    """The same program several times, its matrices different in kind at each call."""
    n, names, calls, seed = program
    plan.forget()
    torch.manual_seed(seed)
    W = weight(torch.float64, 4, 4)
    for kinds in calls:
        h = torch.randn(n, 4, dtype=torch.float64) @ W
        for name, kind in zip(names, kinds, strict=False):
            h = OPERATIONS[name](h, W, kind)
        losses = h.square().sum(1) if seed % 2 else (h * torch.arange(1.0, 5)).sum(1)
        expected = rows_by_grad(losses, {"W": W})
        scale = expected["W"].flatten(1).norm(dim=1)
        found = rg.jacobian(losses, {"W": W}, retain_graph=True).dense(as_dict=True)["W"].flatten(1)
        error = (found - expected["W"].flatten(1)).norm(dim=1)
        rounding = 1e-12 * float(h.detach().abs().max() * scale.max() + 1)  # a row that cancels to zero keeps rounding
        assert bool((error <= 1e-9 * scale + rounding * 1e-2).all()), f"{program}: errors {error}, norms {scale}"


FAST = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LONG = settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@FAST
@given(programs())
def test_search_for_a_graph_that_fools_the_cache(program: tuple[int, list[str], list[list[str]], int]) -> None:
    run(program)


@pytest.mark.long
@LONG
@given(programs())
def test_long_search_for_a_graph_that_fools_the_cache(program: tuple[int, list[str], list[list[str]], int]) -> None:
    run(program)


# -- the cache ---------------------------------------------------------------------------------------------------------


def passes_of(
    losses: Callable[[], Tensor], params: object, monkeypatch: pytest.MonkeyPatch, **options: str
) -> list[int]:
    """Engine passes taken by four successive calls."""
    counts, taken = [], counted_passes(monkeypatch)
    for _ in range(4):
        taken.clear()
        rg.jacobian(losses(), params, **options)  # type: ignore[arg-type]
        counts.append(len(taken))
    return counts


def everything_kept() -> list[plan._Kept]:
    return [kept for structure in rg.tape._known.values() for kept in structure.kept.values()]


def test_a_settled_graph_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))
    counts = passes_of(lambda: model(torch.randn(B, D)).squeeze(1), model, monkeypatch)
    assert counts == [4, 1, 1, 1]  # as it is, two halves silent, and the rows themselves


def test_texts_of_many_lengths_are_proved_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1)), counted_passes(monkeypatch)
    for expected in (4, 1):
        for length in range(1, 101):
            taken.clear()
            rg.grad_norms(model(torch.randn(B, length, D)).sum((1, 2)), model)
            assert len(taken) == expected
    assert len(everything_kept()) == 100


def test_of_many_choices_of_parameters_the_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "KEPT_CHOICES", 2)
    model, taken = nn.Sequential(*(nn.Linear(D, D) for _ in range(3))), counted_passes(monkeypatch)

    def passes(i: int) -> int:
        taken.clear()
        rg.grad_norms(model(torch.randn(B, D)).sum(1), model[i])
        return len(taken)

    counts = [passes(i) for i in (0, 1, 2, 2, 1, 0)]
    assert [n > 1 for n in counts] == [True, True, True, False, False, True]
    assert len(everything_kept()) == 2


def test_a_parameter_that_all_examples_share_needs_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cotangent of a looked-up position mixes all examples: the first look shows it."""
    model = nn.ModuleList([nn.Embedding(4, D), nn.Linear(D, 1)])
    counts = passes_of(
        lambda: model[1](torch.randn(B, 4, D) + model[0](torch.arange(4))).tanh().sum((1, 2)), model, monkeypatch
    )
    assert counts == [4, 1, 1, 1]


def test_a_structure_read_wrongly_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers contradict it: rows are exact and nothing of the structure is used, in later calls either."""
    monkeypatch.setitem(structure.TRANSFERS, "RollBackward0", structure.TRANSFERS["AddBackward0"])
    model, x = nn.Linear(D, 1, dtype=torch.float64), torch.randn(B, D, dtype=torch.float64)

    def losses() -> Tensor:
        h = model(x).squeeze(1).tanh()
        return h + 0.5 * h.roll(1, 0)

    for _ in range(3):
        graph = losses()
        expected = rows_by_grad(graph, dict(model.named_parameters()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rg.RowgradWarning)
            found = rg.jacobian(graph, model).dense(as_dict=True)
        assert_rows_close(found, expected)
    assert not [kept.settled for kept in everything_kept() if kept.settled or kept.ownership]


def test_always_means_always(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(D, 1)
    counts = passes_of(lambda: model(torch.randn(B, D)).squeeze(1), model, monkeypatch, verify="always")
    assert min(counts) > 1


def test_a_graph_moved_by_data_is_proved_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(D, 1)
    counts = passes_of(
        lambda: (torch.eye(B)[torch.randperm(B)] @ model(torch.randn(B, D))).squeeze(1), model, monkeypatch
    )
    assert min(counts) > 1


def test_what_is_kept_is_proved_again_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PROVE_EVERY", 3)
    model = nn.Linear(D, 1)
    counts = passes_of(lambda: model(torch.randn(B, D)).squeeze(1), model, monkeypatch)
    assert [c > 1 for c in counts] == [True, False, False, True]


def test_the_cache_holds_no_tensor() -> None:
    layers = [nn.Conv1d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(2 * (D - 2), 4), nn.LayerNorm(4)]
    model = nn.Sequential(*layers, nn.Linear(4, 1))
    for _ in range(2):  # what was proved, then with what was kept
        rg.jacobian(model(torch.randn(B, 1, D)).squeeze(1), model)

    def tensors(thing: object, seen: set[int]) -> bool:
        if id(thing) in seen:
            return False
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            return True
        if isinstance(thing, type):
            return False
        if isinstance(thing, dict):
            return any(tensors(v, seen) for pair in thing.items() for v in pair)
        if isinstance(thing, (list, tuple, set)):
            return any(tensors(v, seen) for v in thing)
        if isinstance(thing, Recipe):
            return tensors([thing.build, thing.saved], seen)
        if isinstance(thing, FunctionType):
            return tensors([cell.cell_contents for cell in thing.__closure__ or ()], seen)
        return any(tensors(v, seen) for v in vars(thing).values()) if hasattr(thing, "__dict__") else False

    (kept,) = everything_kept()
    assert kept.ownership is not None
    assert len(kept.ownership.recipes) == 10
    assert not tensors([rg.tape._known, rg.tape._recent], set())


# -- layouts -----------------------------------------------------------------------------------------------------------


def proved(losses: Tensor, *edges: int) -> list[object]:
    tape = Tape(losses)
    prover = Prover(tape, torch.ones_like(losses.detach()), torch.Generator().manual_seed(1), allow_rounding=False)
    found = prover.layouts([(i, 0) for i in edges])
    return [found[i, 0] for i in edges]


def test_layouts_are_named() -> None:
    W = weight()
    h = torch.randn(B, 3, D, dtype=torch.float64) @ W
    assert proved(h.sum((1, 2)), 1, 2) == [Axis(0), Axis(0, 3)]
    flat = torch.randn(3 * B, D, dtype=torch.float64) @ W
    assert proved(flat.reshape(3, B, D).sum((0, 2)), 2) == [Axis(0)]
    owner = torch.tensor([0, 1, 1, 2, 2, 2, 3, 4])
    token = (torch.randn(8, D, dtype=torch.float64) @ W).sum(1)
    (layout,) = proved(torch.zeros(B, dtype=torch.float64).index_add(0, owner, token), 1)
    assert isinstance(layout, Entries)
    assert torch.equal(layout.owner, owner)
    losses = (flat - flat.mean(0))[:B].sum(1)
    product = next(node.index for node in Tape(losses).nodes if node.kind == "MmBackward0")
    assert proved(losses, product) == [MIXED]
    dead = torch.relu(-(h * h).sum((1, 2)) - 1)
    assert proved(dead, 1)[0] is ZERO


@pytest.mark.parametrize("layout", [Axis(0), Axis(0, 2), Axis(1), Axis(1, 2)], ids=str)
def test_grouping_puts_every_entry_with_its_owner(layout: Axis) -> None:
    shape = [6, 6]
    n = 3
    owner = (torch.arange(shape[layout.dim]) // layout.inner % n).reshape(
        [-1 if d == layout.dim else 1 for d in (0, 1)]
    )
    values = torch.randn(*shape, 2)
    for described in (layout, Entries(owner.expand(shape).unsqueeze(-1).expand(*shape, 2))):
        group = Grouping.of(described, [*shape, 2], 2, n)
        assert group is not None
        found = group(values)
        for j in range(n):
            own = values[(owner == j).expand(shape)]
            assert torch.equal(found[j].sum(0).sort().values, own.sum(0).sort().values) or torch.allclose(
                found[j].sum(0), own.sum(0)
            )
            masked = mask(values, described, j, n)
            assert torch.equal(masked[(owner == j).expand(shape)], own)
            assert not bool(masked[(owner != j).expand(shape)].any())


def test_grouping_refuses_owners_along_features() -> None:
    assert Grouping.of(Axis(1), [4, 3], 1, 3) is None
    assert Grouping.of(Entries(torch.tensor([[0, 1], [1, 1]])), [2, 2], 1, 2) is None
    assert axis_candidates([4, 6], 2) == [Axis(0), Axis(0, 2), Axis(1), Axis(1, 3)]


def test_ragged_rows_carry_no_gradient_in_their_padding() -> None:
    owner = torch.tensor([[2], [0], [2], [-1]])
    group = Grouping.of(Entries(owner), [4, 1], 1, 3)
    assert group is not None
    assert group.positions is not None
    assert group.positions.tolist() == [[True, False], [False, False], [True, True]]
    assert group(torch.tensor([[1.0], [2], [3], [4]])).squeeze(-1).tolist() == [[2, 0], [0, 0], [1, 3]]


def test_nothing_is_warned_about_when_rows_are_in_factors() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rg.jacobian(model(torch.randn(B, D)).squeeze(1), model).norms()


def test_a_silent_layout_that_fits_no_axis_lies_where_its_cotangent_does() -> None:
    with torch.device("meta"):  # another default device
        group = Grouping.of(ZERO, (3,), 1, 2)
    assert group is not None
    assert group.positions.device.type == "cpu"
    assert not group.positions.any()
