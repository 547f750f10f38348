"""The running quantile by its window, its laws, and inside a clipped loss."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.nn.functional as F
from tests.rows.distributed import run_on_two_processes
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import InputError


def batches(*sizes: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.rand(n, dtype=torch.float64, generator=rng) + 0.1 for n in sizes]


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_it_is_the_quantile_of_the_last_whole_batches(q: float) -> None:
    """As few of them as hold ten norms."""
    bound, all_norms = rg.RunningQuantile(q, window=10), batches(4, 4, 4, 30, 4, 4)
    remembered = [all_norms[:1], all_norms[:2], all_norms[:3], all_norms[3:4], all_norms[3:5], all_norms[3:6]]
    for norms, expected in zip(all_norms, remembered, strict=True):
        assert bound.update(norms) == bound.value == pytest.approx(float(torch.cat(expected).quantile(q)), rel=1e-15)


def test_permuting_a_batch_changes_nothing_and_scaling_scales() -> None:
    plain, permuted, scaled = (rg.RunningQuantile(0.3, window=6) for _ in range(3))
    for norms in batches(4, 5, 3, 8):
        expected = plain.update(norms)
        assert permuted.update(norms.flip(0)) == expected
        assert scaled.update(1024 * norms) == 1024 * expected


def test_norms_that_need_no_bound_are_left_out() -> None:
    bound = rg.RunningQuantile(0.5)
    assert bound.update(torch.zeros(3)) == 1.0
    assert bound.update(torch.tensor([])) == 1.0
    assert bound.update(torch.tensor([0.0, 3.0, math.inf, math.nan])) == 3.0
    assert repr(bound) == "RunningQuantile(0.5, value 3, 1 norms)"


def net() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, 3 * torch.randn(9, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("mode", ["clip", "normalize"])
def test_a_clipped_loss_takes_its_bound_from_it(mode: str) -> None:
    model, x, y = net()

    def losses() -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    norms = rg.grad_norms(losses(), model)
    bound = rg.RunningQuantile(0.75)
    loss = rg.clipped_loss(losses(), model, bound, mode=mode)
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    assert bound.value == pytest.approx(float(norms.quantile(0.75)), rel=1e-12)
    assert loss.share_clipped == pytest.approx(2 / 9)
    model.zero_grad()
    rg.clipped_loss(losses(), model, float(norms.quantile(0.75)), mode=mode).backward()
    for p, g in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-12, atol=1e-15)


def test_groups_follow_each_their_own_norms() -> None:
    model, x, y = net()
    norms = rg.grad_norms(F.cross_entropy(model(x), y, reduction="none"), model, by={"0": "0", "2": "2"})
    bounds = {"0": rg.RunningQuantile(0.5), "2": rg.RunningQuantile(0.9)}
    loss = rg.clipped_loss(F.cross_entropy(model(x), y, reduction="none"), model, bounds)
    assert bounds["0"].value == pytest.approx(float(norms["0"].quantile(0.5)), rel=1e-12)
    assert bounds["2"].value == pytest.approx(float(norms["2"].quantile(0.9)), rel=1e-12)
    assert loss.share_clipped == {"0": pytest.approx(4 / 9), "2": pytest.approx(1 / 9)}


def test_the_bound_falls_with_the_norms_in_a_training() -> None:
    model, x, y = net()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    bound = rg.RunningQuantile(0.5, window=9)
    values = []
    for _ in range(100):
        opt.zero_grad()
        loss = rg.clipped_loss(F.cross_entropy(model(x), y, reduction="none"), model, bound)
        loss.backward()
        opt.step()
        values.append(bound.value)
        assert 0.3 < loss.share_clipped < 0.7
    assert values[-1] < values[0] / 4


def test_state_goes_on_where_it_was() -> None:
    whole, begun = rg.RunningQuantile(0.4, window=7), rg.RunningQuantile(0.4, window=7)
    for norms in batches(3, 4, 5):
        whole.update(norms)
        begun.update(norms)
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    resumed = rg.RunningQuantile()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert repr(resumed) == repr(whole)
    for norms in batches(2, 2, 9):
        assert resumed.update(norms) == whole.update(norms)
    whole.reset()
    assert repr(whole) == "RunningQuantile(0.4, value nan, 0 norms)"


@pytest.mark.parametrize("q", [0.0, 1.0, -1.0, math.nan])
def test_a_quantile_out_of_range_is_refused(q: float) -> None:
    with pytest.raises(InputError, match="expected a number between 0 and 1"):
        rg.RunningQuantile(q)


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="at least one example"):
        rg.RunningQuantile(window=0)


@pytest.mark.parametrize("norms", [[1.0, 2.0], torch.ones(2, 2), torch.tensor(1.0), None, -torch.ones(3)])
def test_what_is_no_norm_is_refused(norms: object) -> None:
    bound = rg.RunningQuantile()
    with pytest.raises(InputError, match=r"norms must be of shape \(B,\)|not negative"):
        bound.update(norms)  # type: ignore[arg-type]
    assert repr(bound) == "RunningQuantile(0.5, value nan, 0 norms)"


@pytest.mark.parametrize("options", [{"q": "a"}, {"q": None}, {"window": 8.5}, {"distributed": "yes"}])
def test_options_of_another_kind_are_refused(options: dict) -> None:
    with pytest.raises(InputError, match=r"RunningQuantile: (q|window|distributed)=.*, expected"):
        rg.RunningQuantile(**options)


def test_two_processes_measure_and_clip_as_one_does() -> None:
    """The noise scale too; and what is refused in one process is refused in both."""
    run_on_two_processes("all", "tests.uses.distributed")


def test_nothing_is_left_behind(leaves_nothing_behind) -> None:
    model, x, y = net()
    losses = F.cross_entropy(model(x), y, reduction="none")
    with leaves_nothing_behind(model, losses):
        rg.clipped_loss(losses, model, rg.RunningQuantile(0.5))
