"""Entries that ids give to the examples: read from the graph, and as autograd has them, loss by loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.rows.laws import assert_laws, energy
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import NonFiniteError
from rowgrad.rows.listed import Listed
from rowgrad.rows.ownership import MIXED, ZERO, Axis, Entries, Prover
from rowgrad.rows.plan import forget

B, N, D = 4, 11, 3
OWNER = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 2])  # of N rows
FIRST = torch.tensor([0, 2, 5, 6])  # row of each example


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("owners were decoded from numbers")

    monkeypatch.setattr(Prover, "_prove", refuse)


class Rows(nn.Module):
    """A layer on rows, something done to them, another layer, and the sum of each example's rows."""

    def __init__(self, then: Callable[[Tensor], tuple[Tensor, Tensor]], n: int = N) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(D, 5).double(), nn.Linear(5, 2).double()
        self.x, self.then = torch.randn(n, D, dtype=torch.float64), then

    def forward(self) -> Tensor:
        """Losses (B,); `then` gives rows (n, 5) and their owners."""
        rows, owner = self.then(self.first(self.x).tanh())
        found = self.second(rows).sin().square().sum(1)
        return torch.zeros(B, dtype=found.dtype).index_add(0, owner, found)


def _kept(h: Tensor) -> tuple[Tensor, Tensor]:
    return h, OWNER


def _with(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda h: (change(h), OWNER)


def _chosen(ids: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda h: (h[ids], OWNER[ids])


def _across(ids: Tensor, like: Tensor) -> Tensor:
    return ids.unsqueeze(1).expand(-1, like.shape[1])


IDS = torch.tensor([3, 3, 0, 9, 7, -1, 5])
SOURCE, TARGET = torch.tensor([0, 3, 2, 7, 9, 5]), torch.tensor([1, 4, 4, 6, 6, 10])  # edges within examples
MASK = torch.arange(N) % 3 > 0
PLACES = (torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 2]), torch.tensor([0, 1, 0, 1, 2, 0, 0, 1, 2, 3, 1]))


def _padded(h: Tensor, width: int = 4) -> Tensor:
    return torch.zeros(B, width, h.shape[1], dtype=h.dtype).index_put(PLACES, h)


def _attended(h: Tensor) -> Tensor:
    padded = _padded(h)
    absent = ~torch.zeros(B, 4, dtype=torch.bool).index_put(PLACES, torch.tensor(True))
    scores = (padded @ padded.mT).masked_fill(absent.unsqueeze(1), float("-inf"))
    return (scores.softmax(-1) @ padded)[PLACES]


# fmt: off
# name -> from the rows (N, 5) of a layer to rows and their owners
CASES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "as they are":            _kept,
    "looked up":              _chosen(IDS),
    "looked up, masked":      lambda h: (h[MASK], OWNER[MASK]),
    "looked up, then cut":    lambda h: (h[torch.cat([IDS, IDS.flip(0) * 0])][:7], OWNER[IDS]),
    "apart from each other":  lambda h: (torch.stack([torch.stack([h, h.sin()])] * 2, 3)[:, IDS, :, IDS * 0].sum(1),
                                         OWNER[IDS]),
    "one of two":             _with(lambda h: torch.stack([h, h.sin()])[1]),
    "pairs":                  _with(lambda h: h.repeat_interleave(2, 0).view(N, 2, 5).cumsum(1).view(2 * N, 5)[::2]),
    "looked up twice":        lambda h: (h[IDS][torch.tensor([6, 0, 1])], OWNER[IDS][torch.tensor([6, 0, 1])]),
    "several ids each":       _with(lambda h: h[torch.stack([FIRST, FIRST + 0], 1)[OWNER]].sum(1)),
    "rows and columns":       _with(lambda h: h + h.sin()[torch.arange(N)[:, None], torch.tensor([4, 0, 0, 1, 2])]),
    "columns of the other side": _with(lambda h: h.T[:, torch.arange(N).flip(0)].T.flip(0).contiguous()),
    "selected":               lambda h: (h.index_select(0, IDS % N), OWNER[IDS]),
    "selected along columns": _with(lambda h: h.T.index_select(1, torch.arange(N)).T.index_select(1, IDS[2:] % 5)),
    "repeated":               lambda h: (h.repeat_interleave(torch.arange(N) % 3, 0),
                                         OWNER.repeat_interleave(torch.arange(N) % 3)),
    "gathered":               lambda h: (h.gather(0, _across(IDS % N, h)), OWNER[IDS]),
    "gathered along columns": _with(lambda h: h.gather(1, torch.arange(5).flip(0).expand(N, -1))),
    "added":                  _with(lambda h: h.index_add(0, TARGET, h[SOURCE].exp(), alpha=2)),
    "added along columns":    _with(lambda h: h.T.index_add(1, TARGET, h[SOURCE].T).T),
    "copied":                 _with(lambda h: h.index_copy(0, TARGET[[0, 2, 3]], h[SOURCE[[0, 2, 3]]] ** 2)),
    "put":                    _with(lambda h: h.index_put((TARGET[[0, 2, 3]],), h[SOURCE[[0, 2, 3]]] ** 2)),
    "put and added":          _with(lambda h: h.index_put((TARGET,), h[SOURCE] ** 2, accumulate=True)),
    "put in a rectangle":     _with(lambda h: _padded(h).cumsum(1)[PLACES]),
    "put by a mask":          lambda h: (torch.zeros(20, 5).double().index_put((torch.arange(20) % 20 < N,), h)[:N],
                                         OWNER),
    "scattered":              _with(lambda h: h.scatter(0, _across(TARGET[[0, 2, 3]], h), h[SOURCE[[0, 2, 3]]].sin())),
    "scattered and added":    _with(lambda h: h.scatter_add(0, _across(TARGET, h), h[SOURCE].sin())),
    "scattered, largest":     _with(lambda h: h.scatter_reduce(0, _across(TARGET, h), h[SOURCE].sin(), "amax")),
    "scattered, mean":        _with(lambda h: h.scatter_reduce(0, _across(TARGET, h), h[SOURCE].sin(), "mean")),
    "sliced":                 lambda h: (h[2:9:3], OWNER[2:9:3]),
    "sliced from the end":    lambda h: (h[-4:], OWNER[-4:]),
    "split":                  _with(lambda h: torch.cat([p * (i + 1) for i, p in enumerate(h.split(4))])),
    "split by sizes":         _with(lambda h: torch.cat([p.sin() for p in h.split([1, 7, 3])[::-1]][::-1])),
    "one part of a split":    lambda h: (h.split([1, 7, 3])[1], OWNER[1:8]),
    "cut":                    _with(lambda h: torch.cat([h.narrow(0, 0, 3), h[3:]])),
    "joined, constants first": lambda h: (torch.cat([torch.ones(2, 5).double(), h]), torch.cat([OWNER[:2], OWNER])),
    "stacked":                lambda h: (torch.stack([h[int(i)] for i in FIRST]).sin(), torch.arange(B)),
    "padded":                 lambda h: (F.pad(h, (0, 0, 2, 3))[1:-1], torch.cat([OWNER[:1], OWNER, OWNER[:2]])),
    "turned and reshaped":    _with(lambda h: h.view(N, 5, 1).permute(1, 2, 0).reshape(5, N).T.unsqueeze(0).squeeze(0)),
    "unbound":                _with(lambda h: torch.stack([row * i for i, row in enumerate(h.unbind(0))])),
    "flattened":              lambda h: (torch.stack([h, h.sin()], 1).reshape(2 * N, 5), OWNER.repeat_interleave(2)),
    "split in two dimensions": lambda h: (torch.stack([h, h.sin()]).view(2, 1, N, 5).flatten(0, 2), OWNER.repeat(2)),
    "normalized":             _with(lambda h: F.layer_norm(h, (5,)).softmax(1).cumsum(1)),
    "attention":              _with(_attended),
    "to its own example":     _with(lambda h: h * torch.zeros(B, 5).double().index_add(0, OWNER, h)[OWNER].sigmoid()),
}
# fmt: on


@pytest.mark.parametrize("name", CASES)
def test_rows_moved_by_ids(name: str, no_decoding: None) -> None:
    forget()
    model = Rows(CASES[name])
    J = rg.jacobian(model(), model, retain_graph=True)
    assert J.couplings == ()
    assert J.explain().slow_uses() == []


@pytest.mark.parametrize("name", CASES)
def test_laws(name: str) -> None:
    model = Rows(CASES[name])
    for _ in range(3):  # proved, and settled
        assert_laws(model(), dict(model.named_parameters()))


def test_other_ids_in_a_structure_that_is_known(no_decoding: None) -> None:
    forget()
    owner, source = OWNER.clone(), torch.zeros(6, dtype=torch.long)
    model = Rows(lambda h: (h.index_add(0, source, h[source].sin()), owner))
    for k in range(6):
        torch.manual_seed(k)
        owner.copy_(torch.randint(B, (N,)))
        source.copy_(torch.randint(N, (6,)))
        losses = model()
        rows = [torch.autograd.grad(loss, model.first.weight, retain_graph=True)[0] for loss in losses]
        torch.testing.assert_close(rg.jacobian(losses, model).dense(as_dict=True)["first.weight"], torch.stack(rows))


def test_joined_with_constants_of_sizes_that_do_not_show() -> None:
    ones = torch.ones(2, 5, dtype=torch.float64)
    model = Rows(lambda h: (torch.cat([ones, h, ones])[1:13], torch.cat([OWNER[:1], OWNER])))
    assert_laws(model(), dict(model.named_parameters()))


# fmt: off
MEETING: dict[str, Callable[[Tensor], Tensor]] = {
    "added":              lambda h: h.index_add(0, TARGET, h[SOURCE + 1]),
    "looked up":          lambda h: h[OWNER.flip(0)],
    "put":                lambda h: h.index_put((TARGET,), h[SOURCE + 1], accumulate=True),
    "scattered":          lambda h: h.scatter_add(0, _across(TARGET, h), h[SOURCE + 1]),
    "gathered by entry":  lambda h: h.gather(0, (torch.arange(N)[:, None] + torch.arange(5)) % N),
    "scattered by entry": lambda h: h.scatter_add(0, (torch.arange(N)[:, None] + torch.arange(5)) % N, h.sin()),
    "rotated":            lambda h: torch.cat([h[1:], h[:1]]),
    "summed":             lambda h: h * h.sum(0),
}
# fmt: on


# name -> with ids for each entry (N, 5), those of the column 0 for whole rows
WITH_IDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gathered": lambda h, ids: h.gather(0, ids),
    "scattered and added": lambda h, ids: h.scatter_add(0, ids, h.sin()),
    "scattered, largest": lambda h, ids: h.scatter_reduce(0, ids, h.sin(), "amax"),
    "looked up": lambda h, ids: h + h.sin()[ids[:, 0]],
    "selected": lambda h, ids: h + h.sin().index_select(0, ids[:, 0]),
    "added": lambda h, ids: h.index_add(0, ids[:, 0], h.sin()),
    "put and added": lambda h, ids: h.index_put((ids[:, 0],), h.sin(), accumulate=True),
}


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
@pytest.mark.parametrize("to", ["entries of their own example", "entries of others", "rows of others"])
@pytest.mark.parametrize("name", WITH_IDS)
def test_a_known_structure_of_which_no_number_is_looked_at(name: str, to: str) -> None:
    """The fourth call reads nothing but the ids."""
    forget()
    same = torch.arange(N).unsqueeze(1).expand(-1, 5)
    ids = same.clone()
    model = Rows(_with(lambda h: WITH_IDS[name](h, ids)))
    for call in range(5):
        losses = model()
        rows = [torch.autograd.grad(loss, model.first.weight, retain_graph=True)[0] for loss in losses]
        torch.testing.assert_close(rg.jacobian(losses, model).dense(as_dict=True)["first.weight"], torch.stack(rows))
        if call == 2:
            within = torch.tensor([1, 0, 3, 4, 2, 10, 7, 8, 9, 6, 5]).unsqueeze(1)
            mine = torch.where(torch.arange(5) % 2 == 0, within, same)
            ids = {"entries of their own example": mine, "entries of others": (same + torch.arange(5)) % N}.get(
                to, (same + 1) % N
            )


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
@pytest.mark.parametrize("name", MEETING)
def test_examples_that_meet(name: str) -> None:
    model = Rows(_with(MEETING[name]))
    for _ in range(3):
        assert_laws(model(), dict(model.named_parameters()), ruled=False)


LENGTHS = torch.tensor([6, 2, 4, 1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
def test_packed_sequences(kind: type[nn.RNNBase], options: dict, no_decoding: None) -> None:
    forget()
    torch.manual_seed(0)
    table, rnn = nn.Embedding(9, 3).double(), kind(3, 4, batch_first=True, **options).double()
    model, ids = nn.ModuleList([table, rnn]), torch.randint(9, (B, 6))
    for lengths, is_sorted in ((LENGTHS, False), (LENGTHS.sort(descending=True)[0], True), (LENGTHS.flip(0), False)):
        packed = nn.utils.rnn.pack_padded_sequence(table(ids), lengths, batch_first=True, enforce_sorted=is_sorted)
        last = rnn(packed)[1]
        last = last[0] if isinstance(last, tuple) else last
        losses = energy(last.transpose(0, 1).tanh())
        J = rg.jacobian(losses, model, retain_graph=True)
        assert J.explain().slow_uses() == []
        for name, p in model.named_parameters():
            rows = torch.stack([torch.autograd.grad(loss, p, retain_graph=True)[0] for loss in losses])
            torch.testing.assert_close(J.dense(as_dict=True)[name], rows, rtol=1e-10, atol=1e-13)


def test_time_first(no_decoding: None) -> None:
    forget()
    torch.manual_seed(0)
    first, rnn = nn.Linear(2, 3).double(), nn.GRU(3, 4).double()
    x = torch.randn(6, B, 2, dtype=torch.float64)
    packed = nn.utils.rnn.pack_padded_sequence(first(x), LENGTHS, enforce_sorted=False)
    losses = energy(rnn(packed)[1][0])
    rows = torch.stack([torch.autograd.grad(loss, first.weight, retain_graph=True)[0] for loss in losses])
    torch.testing.assert_close(rg.jacobian(losses, first).dense(as_dict=True)["weight"], rows)


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
def test_zero_times_infinity_where_no_example_is() -> None:
    """The gradient of the length of a padded row is part of every row, as autograd has it, and not left out."""
    scale = torch.ones(N + 2, 1, dtype=torch.float64)
    model = Rows(lambda h: ((h * scale / (h * scale).norm(dim=1, keepdim=True))[:N], OWNER), N + 2)
    for scale_of_padding in (0.0, 1.0):
        forget()
        scale[N:] = scale_of_padding
        for _ in range(3):
            assert bool(rg.grad_norms(model(), model).isfinite().all()) == (scale_of_padding == 1)
    scale[N:] = 0
    with pytest.raises(NonFiniteError, match=r"not zero where no example reaches it"):
        rg.grad_norms(model(), model)
    losses = model()
    assert rg.grad_norms(losses, model, verify="always", retain_graph=True).isnan().all()
    rows = [torch.autograd.grad(loss, model.first.weight, retain_graph=True)[0] for loss in losses]
    assert all(row.isnan().any() for row in rows)


class Twice(torch.autograd.Function):
    """Of a kind of which structure tells nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


class Exchanged(Twice):
    """The same, and the first two rows exchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.cat([x[1:2], x[:1], x[2:]])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.cat([grads[0][1:2], grads[0][:1], grads[0][2:]])


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
@pytest.mark.parametrize("function", [Twice, Exchanged])
@pytest.mark.parametrize("n_zero", [0, 3, N])
def test_below_code_of_a_users(function: type[Twice], n_zero: int) -> None:
    """What numbers show there is carried on by structure and ids, also where it is zero."""
    forget()
    ids, scale = torch.randperm(N), torch.ones(N, 1, dtype=torch.float64)
    model = Rows(lambda h: (function.apply((h.sin() * scale)[ids].cos().exp()), owner))
    for k in range(4):
        torch.manual_seed(k)
        owner, _ = torch.randint(B, (N,)), ids.copy_(torch.randperm(N))
        scale[:n_zero] = float(k % 2)
        assert_laws(model(), dict(model.named_parameters()), ruled=False)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_and_padded_again(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    first, rnn, head = nn.Linear(2, 3).double(), kind(3, 4, batch_first=True).double(), nn.Linear(4, 2).double()
    model, data = nn.ModuleList([first, rnn, head]), torch.randn(B, 6, 2, dtype=torch.float64)
    for lengths in (LENGTHS, LENGTHS.flip(0), LENGTHS):
        packed = nn.utils.rnn.pack_padded_sequence(first(data), lengths, batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(rnn(packed)[0], batch_first=True)
        present = torch.arange(6) < lengths.unsqueeze(1)
        losses = (head(out).square().sum(2) * present).sum(1)
        params = dict(model.named_parameters())
        rows = {n: [torch.autograd.grad(x, p, retain_graph=True)[0] for x in losses] for n, p in params.items()}
        J = rg.jacobian(losses, model)
        for name, found in J.dense(as_dict=True).items():
            torch.testing.assert_close(found, torch.stack(rows[name]), rtol=1e-10, atol=1e-13)
        assert J.explain().slow_uses() == []


def test_lists_of_what_was_proved() -> None:
    owner = torch.tensor([[0, -1], [1, 1], [-1, -1]])
    found = Listed.of_proved(Entries(owner), (3, 2), 2)
    assert found is not None
    assert (found.dim, found.owners.tolist()) == (0, [0, 1, -1])
    found = Listed.of_proved(Entries(owner.T), (2, 3), 2)
    assert found is not None
    assert (found.dim, found.owners.tolist()) == (1, [0, 1, -1])
    assert Listed.of_proved(Entries(torch.tensor([[0, 1], [1, 0]])), (2, 2), 2) is None
    assert Listed.of_proved(MIXED, (3, 2), 2) is None
    found = Listed.of_proved(Axis(1, 2), (3, 4), 2)
    assert found is not None
    assert (found.dim, found.owners.tolist()) == (1, [0, 0, 1, 1])
    found = Listed.of_proved(ZERO, (3, 4), 2)
    assert found is not None
    assert found.nobody.tolist() == [0, 1, 2]


@pytest.mark.parametrize("call", range(4))
def test_only_ids_on_the_way_to_a_parameter_are_read(call: int) -> None:
    """What the rest of the graph saved may be gone."""
    model = Rows(_with(lambda h: h[torch.arange(N).flip(0)].flip(0)))
    rows = model.first(model.x).tanh()[IDS]
    losses = torch.zeros(B, dtype=rows.dtype).index_add(0, OWNER[IDS], model.second(rows).sin().square().sum(1))
    torch.autograd.grad(rows.sum(), model.first.weight)
    assert_laws(losses, {"weight": model.second.weight})


@pytest.mark.parametrize("losses", [
    lambda w: w.sum().gather(0, torch.zeros(2, dtype=torch.long)) * torch.arange(2),
    lambda w: torch.ops.aten.slice(torch.ones(4, 3).double() @ w, 0, None, 2, 1).square().sum(1),
    lambda w: torch.cat([w.sum() * torch.zeros(0), (torch.ones(3, 3).double() @ w).T], 1).square().sum(0),
], ids=["gathered from a number", "sliced from nowhere", "joined with nothing"])  # fmt: skip
def test_unusual_operands(losses: Callable[[Tensor], Tensor]) -> None:
    w = torch.randn(3, 2, dtype=torch.float64).requires_grad_()
    assert_laws(losses(w), {"w": w}, ruled=False)


def test_a_sum_of_lists() -> None:
    a, b = Listed(0, torch.tensor([0, -1, 1])), Listed(0, torch.tensor([-1, 2, 1]))
    merged = a.merged(b)
    assert merged is not None
    assert merged.owners.tolist() == [0, 2, 1]
    assert a.merged(Listed(0, torch.tensor([1, -1, 1]))) is None
    assert a.merged(Listed(1, a.owners)) is None
    assert a.merged(Listed(0, a.owners.clone())) is a
