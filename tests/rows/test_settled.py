"""Graphs whose layouts follow from structure: proved once, exact, and read in one pass from then on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.reference import assert_rows_close, rows_by_grad
from tests.rows.laws import counted_passes
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import FreedGraphError
from rowgrad.rows.listed import laid_out
from rowgrad.rows.ownership import MIXED, Axis, Prover
from rowgrad.rows.plan import forget
from rowgrad.rows.structure import infer
from rowgrad.tape import Tape

B = 6
Losses = Callable[[], Tensor]


def data(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def energy(out: Tensor) -> Tensor:
    return (out.reshape(B, -1).sin() - 0.3).square().sum(1)


def pairs_in_one_forward_pass() -> tuple[nn.Module, Losses]:
    tower = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def losses() -> Tensor:
        one, other = tower(torch.cat([data(B, 3), data(B, 3)])).chunk(2)
        return (one - other).square().sum(1)

    return tower, losses


def pairs_by_slices() -> tuple[nn.Module, Losses]:
    tower = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def losses() -> Tensor:
        out = tower(data(2 * B, 3)).log_softmax(1)
        return -F.logsigmoid(out[:B, 0] - out[-B:, 0])

    return tower, losses


def towers_joined() -> tuple[nn.Module, Losses]:
    parts = nn.ModuleList([nn.Linear(3, 4), nn.Linear(5, 4), nn.Linear(4, 2)]).double()

    def losses() -> Tensor:
        joined = parts[2](torch.cat([parts[0](data(B, 3)), parts[1](data(2 * B, 5))]).tanh())
        first, rest = joined.split([B, 2 * B])
        return energy(first) + sum(part.square().sum(1) for part in rest.split(B))

    return parts, losses


def pooled(scale: Callable[[Tensor], Tensor], channels_last: bool = False) -> tuple[nn.Module, Losses]:
    memory = torch.channels_last if channels_last else torch.contiguous_format
    parts = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Linear(8, 2)]).double().to(memory_format=memory)
    return parts, lambda: energy(parts[1](scale(parts[0](data(B, 3, 5, 5).to(memory_format=memory))).amax((2, 3))))


def averaged_in_channels_last() -> tuple[nn.Module, Losses]:
    return pooled(nn.AdaptiveAvgPool2d(1), channels_last=True)


def shuffled_pixels() -> tuple[nn.Module, Losses]:
    model = nn.Conv2d(3, 8, 3).double()
    return model, lambda: energy(F.pixel_shuffle(model(data(B, 3, 5, 5)), 2))


def resampled() -> tuple[nn.Module, Losses]:
    model = nn.Conv2d(3, 2, 3).double()
    return model, lambda: energy(F.grid_sample(model(data(B, 3, 5, 5)), data(B, 2, 2, 2).tanh(), align_corners=False))


def upsampled(mode: str, n_dims: int) -> tuple[nn.Module, Losses]:
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][n_dims - 1](2, 3, 2).double()
    return layer, lambda: energy(F.interpolate(layer(data(B, 2, *[3] * n_dims)), scale_factor=2, mode=mode))


def padded_behind() -> tuple[nn.Module, Losses]:
    model = nn.Linear(3, 4).double()
    return model, lambda: energy(F.pad(model(data(B, 2, 3)), (0, 1, 1, 0, 0, 0)))


def connectionist() -> tuple[nn.Module, Losses]:
    model = nn.Linear(3, 5).double()
    targets, lengths = torch.randint(1, 5, (B, 2)), torch.full((B,), 2)

    def losses() -> Tensor:
        return F.ctc_loss(model(data(7, B, 3)).log_softmax(2), targets, torch.full((B,), 7), lengths, reduction="none")

    return model, losses


def by_frequencies() -> tuple[nn.Module, Losses]:
    model = nn.Linear(3, 8).double()
    return model, lambda: energy(torch.view_as_real(torch.fft.rfft(model(data(B, 3)))))


def slope_in_the_loss() -> tuple[nn.Module, Losses]:
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 1)).double()

    def losses() -> Tensor:
        x = data(B, 2).requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return slope.square().sum(1)

    return net, losses


def instances_normalized() -> tuple[nn.Module, Losses]:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True)).double()
    return model, lambda: energy(model(data(B, 2, 6)))


def quantized() -> tuple[nn.Module, Losses]:
    model = nn.Linear(3, 4)
    return model, lambda: energy(torch.fake_quantize_per_tensor_affine(model(data(B, 3).float()), 0.1, 0, -128, 127))


SETTLED: dict[str, Callable[[], tuple[nn.Module, Losses]]] = {
    "pairs in one forward pass": pairs_in_one_forward_pass,
    "pairs by slices": pairs_by_slices,
    "towers joined": towers_joined,
    "averaged in channels last": averaged_in_channels_last,
    "shuffled pixels": shuffled_pixels,
    "resampled": resampled,
    **{f"upsampled, {m}": lambda m=m, d=d: upsampled(m, d) for m, d in [
        ("linear", 1), ("nearest", 1), ("nearest-exact", 2), ("bilinear", 2), ("bicubic", 2), ("trilinear", 3),
        ("nearest", 3)]},
    "padded behind": padded_behind,
    "connectionist": connectionist,
    "by frequencies": by_frequencies,
    "slope in the loss": slope_in_the_loss,
    "instances normalized": instances_normalized,
    "quantized": quantized,
}  # fmt: skip


@pytest.mark.parametrize("name", SETTLED)
def test_is_proved_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    torch.manual_seed(0)
    model, losses = SETTLED[name]()
    narrow = next(model.parameters()).dtype == torch.float32
    taken = counted_passes(monkeypatch)
    for call in range(3):
        L = losses()
        expected = rows_by_grad(L, dict(model.named_parameters()))
        taken.clear()
        found = rg.jacobian(L, model, retain_graph=True)
        assert len(taken) == 1 if call else len(taken) > 1
        assert_rows_close(found.dense(as_dict=True), expected, 1e-5 if narrow else 1e-10)


@pytest.mark.parametrize("name", SETTLED)
def test_what_is_settled_holds(name: str) -> None:
    torch.manual_seed(0)
    L = SETTLED[name]()[1]()
    tape = Tape(L)
    settled = infer(tape, B)
    prover = Prover(tape, torch.ones_like(L.detach()), torch.Generator().manual_seed(1), allow_rounding=False)
    assert MIXED not in prover.look(list(settled), {e: laid_out(tape, e, a) for e, a in settled.items()}).values()


def rolled_by_slices() -> Tensor:
    h = nn.Linear(3, 2).double()(data(B, 3))
    return energy(torch.cat([h[2:], h[:2]]))


def halves_exchanged() -> Tensor:
    h = nn.Linear(3, 2).double()(data(B, 3))
    return energy(torch.cat(h.split([4, 2])[::-1]))


def every_second() -> Tensor:
    h = nn.Linear(3, 2).double()(data(2 * B, 3))
    return energy(h[::2])


def strides_set_at_will() -> Tensor:
    h = nn.Linear(3, B).double()(data(B, 3)).reshape(B, B, 1, 1)
    return energy(h.as_strided((B, B, 1, 1), (1, B, 1, 1)))


def strides_of_a_pool_on_something_else() -> Tensor:
    h = nn.Linear(3, B).double()(data(B, 3)).T.reshape(B, B, 1, 1)
    return energy(h.as_strided((B, B, 1, 1), (B, 1, B, B)))


def one_id_for_all() -> Tensor:
    h = nn.Linear(3, B).double()(data(B, 3))
    return h[torch.arange(1), torch.randperm(B)].sin()


def chosen_by_a_mask_of_bytes() -> Tensor:
    h = nn.Linear(3, B).double()(data(2 * B * 4, 3)).reshape(2, B, 4, B)  # the examples last
    return energy(h[torch.randint(2, (2, B), dtype=torch.uint8)].movedim(2, 0))


def after_a_constant() -> Tensor:
    h = nn.Linear(3, 2).double()(data(2 * B - 2, 3))
    return energy(torch.cat([data(2, 2), h])[:B])


@pytest.mark.parametrize(
    "losses",
    [
        rolled_by_slices,
        halves_exchanged,
        every_second,
        strides_set_at_will,
        strides_of_a_pool_on_something_else,
        one_id_for_all,
        chosen_by_a_mask_of_bytes,
        after_a_constant,
    ],
)
@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8 is now deprecated")
def test_what_moves_the_examples_settles_nothing_for_other_calls(losses: Losses) -> None:
    """At most a list of owners, which is right."""
    torch.manual_seed(0)
    L = losses()
    tape = Tape(L)
    lowest = [n for n in tape.nodes if n.kind == "AddmmBackward0"]
    assert lowest
    settled = infer(tape, len(L))
    assert not any(isinstance(settled.get((n.index, 0)), Axis) for n in lowest)
    prover = Prover(tape, torch.ones_like(L.detach()), torch.Generator().manual_seed(1), allow_rounding=False)
    assert MIXED not in prover.look(list(settled), {e: laid_out(tape, e, a) for e, a in settled.items()}).values()


@pytest.mark.parametrize("name", ["low-rank update of nothing", "gate closed", "head of zeros"])
def test_a_layer_that_begins_with_zeros_is_settled_soon(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    torch.manual_seed(0)
    first, head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    A, U, gate = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((4, 2), (2, 4), ()))
    zero = {"low-rank update of nothing": U, "gate closed": gate, "head of zeros": head.weight}[name]
    with torch.no_grad():
        zero.zero_()
    params = {"A": A, "U": U, "gate": gate, "first": first.weight, "head": head.weight}
    taken = counted_passes(monkeypatch)
    counts = []
    for _ in range(4):
        h = first(data(B, 3)).tanh()
        L = energy(head(h + gate * ((h @ A).tanh() @ U)))
        expected = rows_by_grad(L, params)
        taken.clear()
        J = rg.jacobian(L, params, retain_graph=True)
        counts.append(len(taken))
        assert_rows_close(J.dense(as_dict=True), expected, 1e-10)
        with torch.no_grad():
            for p in params.values():
                p.add_(0.1 * torch.randn_like(p))
    assert counts[0] > 1
    assert counts[2:] == [1, 1]


def scored_by_label() -> tuple[nn.Module, Losses]:
    model = nn.Linear(3, 4).double()
    return model, lambda: -model(data(B, 3)).log_softmax(1)[torch.arange(B), torch.randint(4, (B,))]


def last_token() -> tuple[nn.Module, Losses]:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, lambda: energy(model(data(B, 4, 3))[torch.arange(B), torch.randint(4, (B,))])


def features_chosen() -> tuple[nn.Module, Losses]:
    model = nn.Linear(3, 6).double()
    return model, lambda: energy(model(data(B, 4, 3))[:, [0, 2, 2]][..., torch.randperm(6)])


def features_chosen_apart() -> tuple[nn.Module, Losses]:
    model = nn.Linear(3, 6).double()
    ids = torch.randint(2, (3, 1)), torch.randint(6, (4,))
    return model, lambda: energy(model(data(2, B, 3))[ids[0], :, ids[1]].movedim(2, 0))


INDEXED = [scored_by_label, last_token, features_chosen, features_chosen_apart]


@pytest.mark.parametrize("make", INDEXED)
def test_ids_that_only_count_or_lie_elsewhere_settle(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTLED, "indexed", make)
    test_is_proved_once("indexed", monkeypatch)
    test_what_is_settled_holds("indexed")


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
def test_ids_that_count_no_longer_are_another_structure() -> None:
    """Same shapes, kinds and dtypes; only what the ids say, or which dimension they index, differs."""
    forget()
    torch.manual_seed(0)
    layer = nn.Linear(3, B).double()
    count, moved = torch.arange(B), torch.tensor([1, 2, 3, 4, 5, 0])
    columns = torch.tensor([3, 0, 1, 4, 2, 5])
    choices = [(count, columns), (moved, columns), (count, columns), (columns, count), (count,), (moved,)]
    choices += [(slice(None), moved), (moved,), (slice(None), count), (count,)]
    for _ in range(2):
        for chosen in choices:
            h = layer(data(B, 3))
            L = energy(h[chosen]) if len(chosen) == 1 or chosen[0] == slice(None) else h[chosen].sin()
            found = rg.jacobian(L, layer, retain_graph=True)
            expected = rows_by_grad(L, dict(layer.named_parameters()))
            assert_rows_close(found.dense(as_dict=True), expected, 1e-10)


def test_a_freed_graph_with_ids_is_refused_as_any_other() -> None:
    model, losses = scored_by_label()
    for _ in range(2):
        rg.grad_norms(losses(), model)
        L = losses()
        L.sum().backward()
        with pytest.raises(FreedGraphError):
            rg.grad_norms(L, model)
