"""The noise scale against exact enumeration, a closed form and its laws."""

from __future__ import annotations

import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.errors import InputError

NAN = math.nan


def rows_as_data(rows: Tensor) -> rg.Jacobian:
    """Rows of our choice: each example's gradient is its input."""
    model = nn.Linear(rows.shape[1], 1, bias=False, dtype=rows.dtype)
    return rg.jacobian(model(rows).squeeze(1), model)


def measured(*batches: Tensor, **options: float) -> rg.NoiseScale:
    noise = rg.NoiseScale(**options)  # type: ignore[arg-type]
    for rows in batches:
        noise.update(rows_as_data(rows))
    return noise


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Unbiased


@pytest.mark.parametrize("b", [2, 3])
def test_the_mean_over_all_draws_is_exact(b: int) -> None:
    """All N^B draws with replacement, each once: the averages are |G|^2 and the trace to the last digits."""
    data = draw(5, 3) + 0.5
    mean = data.mean(0)
    noise = measured(*(data[list(chosen)] for chosen in itertools.product(range(5), repeat=b)))
    assert noise.updates == 5**b
    assert noise.total.sq_norm == pytest.approx(float(mean.square().sum()), rel=1e-12)
    assert noise.total.trace == pytest.approx(float((data - mean).square().sum(1).mean()), rel=1e-12)
    assert noise.total.scale == pytest.approx(noise.total.trace / noise.total.sq_norm, rel=1e-12)


@pytest.mark.parametrize("b", [2, 3, 4])
def test_the_mean_over_all_subsets_is_exact(b: int) -> None:
    """All subsets of B different examples. Draws without replacement have the covariance with N - 1 below, and
    E|mean row|^2 = |mean|^2 + (1/B - 1/N) of its trace: so the expectation of |G|^2 is smaller by that trace over N."""
    n = 6
    data = draw(n, 3) + 0.5
    mean = data.mean(0)
    trace = float((data - mean).square().sum() / (n - 1))
    noise = measured(*(data[list(chosen)] for chosen in itertools.combinations(range(n), b)))
    assert noise.total.trace == pytest.approx(trace, rel=1e-12)
    assert noise.total.sq_norm == pytest.approx(float(mean.square().sum()) - trace / n, rel=1e-12)


@pytest.mark.parametrize("b", [2, 3])
@pytest.mark.parametrize("micro", [False, True])
def test_the_mean_over_all_weighted_draws_is_exact(b: int, micro: bool) -> None:
    """All N^B draws with unequal probabilities, each counted as often as it comes, with the weights of the draws."""
    n = 4
    data = draw(n, 3) + 0.5
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    sq_norm = trace = plain = 0.0
    for chosen in itertools.product(range(n), repeat=b):
        rows, w = data[list(chosen)], 1 / (n * p[list(chosen)])
        often = float(p[list(chosen)].prod())
        noise, unweighted = rg.NoiseScale(), rg.NoiseScale()
        if micro:
            mean = (w[:, None] * rows).mean(0).norm()
            noise.update(norms=list(rows.norm(dim=1).split(1)), weights=list(w.split(1)), mean_norm=mean)
        else:
            noise.update(rows_as_data(rows), weights=w)
        unweighted.update(rows_as_data(rows))
        sq_norm, trace = sq_norm + often * noise.total.sq_norm, trace + often * noise.total.trace
        plain += often * unweighted.total.sq_norm
    mean = data.mean(0)
    assert sq_norm == pytest.approx(float(mean.square().sum()), rel=1e-12)
    assert trace == pytest.approx(float((data - mean).square().sum(1).mean()), rel=1e-12)
    assert plain != pytest.approx(sq_norm, rel=0.1)


def test_weights_of_one_change_nothing() -> None:
    weighted = rg.NoiseScale()
    for rows in batches():
        weighted.update(rows_as_data(rows), weights=torch.ones(len(rows)))
    assert weighted.compute() == pytest.approx(measured(*batches()).compute(), rel=1e-12)


def test_batches_drawn_by_norms_measure_the_scale_of_uniform_ones() -> None:
    """A few long rows: drawn by their norms and not weighted, they would hide most of the noise."""
    rng = torch.Generator().manual_seed(1)
    data = 0.3 * draw(300, 4) + 4 * torch.rand(300, 1, generator=rng, dtype=torch.float64) ** 9
    mean = data.mean(0)
    true = float((data - mean).square().sum(1).mean() / mean.square().sum())
    sampler = rg.NormSampler(300, switch=None)
    sampler.update(torch.arange(300), data.norm(dim=1))
    noise, unweighted = rg.NoiseScale(), rg.NoiseScale()
    for _ in range(30):
        for drawn in torch.utils.data.BatchSampler(sampler, 20, False):
            J, w = rows_as_data(data[[int(i) for i in drawn]]), torch.tensor([i.weight for i in drawn])
            noise.update(J, weights=w)
            unweighted.update(J)
    assert abs(noise.total.scale - true) < 3 * noise.total.error < 0.5 * true
    assert abs(unweighted.total.scale - true) > 5 * unweighted.total.error


# A closed form


def test_linear_regression_comes_out_as_the_closed_form_says() -> None:
    """y = x.w* + s e with x ~ N(0, I_d), e ~ N(0, 1), and losses (x.w - y)^2 / 2 at a distance r = |w - w*|.

    A row is x (x.delta - s e), so G = E[x x^T] delta = delta and |G|^2 = r^2. As E[|x|^2 (x.delta)^2] = (d + 2) r^2 and
    E[|x|^2] = d, E|row|^2 = (d + 2) r^2 + d s^2, and the scale is (E|row|^2 - r^2) / r^2 = d + 1 + d s^2 / r^2:
    with d = 20, s = 1/2 and r^2 = 50/23 it is 21 + 5 * 23/50 = 23.3.
    """
    d, s, r = 20, 0.5, math.sqrt(50 / 23)
    rng = torch.Generator().manual_seed(3)
    expected = d + 1 + d * s**2 / r**2
    assert expected == pytest.approx(23.3)
    best = torch.randn(d, dtype=torch.float64, generator=rng)
    delta = torch.randn(d, dtype=torch.float64, generator=rng)
    model = nn.Linear(d, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(best + r * delta / delta.norm())
    noise = rg.NoiseScale()
    for _ in range(1000):
        x = torch.randn(64, d, dtype=torch.float64, generator=rng)
        y = x @ best + s * torch.randn(64, dtype=torch.float64, generator=rng)
        noise.update(rg.jacobian((model(x).squeeze(1) - y).square() / 2, model))
    assert 0.05 < noise.total.error < 0.5
    assert abs(noise.total.scale - expected) < 2.5 * noise.total.error
    assert 2 * noise.total.error < noise.running.error < 4
    assert abs(noise.running.scale - expected) < 2.5 * noise.running.error


def test_the_error_is_that_of_repeated_measurements() -> None:
    found = [measured(*(draw(20, 8, 4, seed=k) + 1)).total for k in range(200)]
    spread = float(torch.tensor([noise.scale for noise in found]).std())
    assert float(torch.tensor([noise.error for noise in found]).median()) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_the_error_by_its_formula(decay: float) -> None:
    """Weights p_i that add up to 1, u_i = trace_i - R sq_norm_i: sum p^2 / (1 - sum p^2) sum p u^2 / sq_norm^2."""
    data = [rows + 1 for rows in batches()]
    alone = [measured(rows).total for rows in data]
    g, t = (torch.tensor([getattr(n, name) for n in alone], dtype=torch.float64) for name in ("sq_norm", "trace"))
    p = torch.tensor([decay ** (len(g) - i) for i in range(len(g))], dtype=torch.float64)
    p /= p.sum()
    u = t - (p @ t) / (p @ g) * g
    sq_error = (p @ p) / (1 - p @ p) * (p @ u**2) / (p @ g) ** 2
    noise = measured(*data, decay=0.7)
    found = noise.total if decay == 1 else noise.running
    assert found.scale == pytest.approx(float((p @ t) / (p @ g)), rel=1e-12)
    assert found.error == pytest.approx(float(sq_error.sqrt()), rel=1e-9)


# Laws


def batches() -> list[Tensor]:
    return [draw(12, 5, seed=k) + 0.3 for k in range(6)]


def test_permuting_examples_changes_nothing() -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert measured(*(rows[order] for rows in batches())).total.scale == pytest.approx(
        measured(*batches()).total.scale, rel=1e-12
    )


def test_scaling_the_losses_changes_no_ratio() -> None:
    plain, scaled = measured(*batches()), measured(*(1024 * rows for rows in batches()))
    assert scaled.total.scale == pytest.approx(plain.total.scale, rel=1e-12)
    assert scaled.running.error == pytest.approx(plain.running.error, rel=1e-9)
    assert scaled.total.sq_norm == pytest.approx(1024**2 * plain.total.sq_norm, rel=1e-12)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 8, 3), (12,)])
def test_splitting_into_micro_batches_changes_nothing(sizes: tuple[int, ...]) -> None:
    """With the norm of `.grad` after the last of them, each example counting 1 / 12."""
    noise = rg.NoiseScale()
    for rows in batches():
        model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
        norms = []
        for part in rows.split(sizes):
            J = rg.jacobian(model(part).squeeze(1), model)
            norms.append(J.norms())
            J.loss(1 / 12).backward()
        noise.update(norms=norms, mean_norm=nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    whole = measured(*batches())
    assert noise.total.scale == pytest.approx(whole.total.scale, rel=1e-12)
    assert noise.running.trace == pytest.approx(whole.running.trace, rel=1e-12)


def test_autocast_and_a_scaler_with_an_overflow_in_between() -> None:
    """Unscaled, the accumulated gradient is the mean again; the step that overflows is skipped, as the optimizer's."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    noise, expected = rg.NoiseScale(), rg.NoiseScale()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(3):
        x, y, norms = torch.randn(12, 4), torch.randint(3, (12,)), []
        x[0, 0] = math.inf if step == 1 else 1.0
        opt.zero_grad()
        for part in (slice(0, 6), slice(6, 12)):
            with torch.autocast("cpu", torch.bfloat16):
                losses = F.cross_entropy(model(x[part]), y[part], reduction="none")
            J = rg.jacobian(losses, model)
            norms.append(J.norms())
            scaler.scale(J.loss(1 / 6) / 2).backward()
        scaler.unscale_(opt)
        noise.update(norms=norms, mean_norm=nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        scaler.step(opt)
        scaler.update()
        with torch.autocast("cpu", torch.bfloat16):
            losses = F.cross_entropy(model(x), y, reduction="none")
        expected.update(rg.jacobian(losses, model))
    assert (noise.updates, noise.skipped) == (expected.updates, expected.skipped) == (2, 1)
    assert noise.total.trace == pytest.approx(expected.total.trace, rel=1e-5)


def test_running_averages_start_without_bias_and_forget() -> None:
    """Of two updates the older weighs decay / (1 + decay); long after a change of the data nothing is left of it."""
    first, later = batches()[0], 3 * batches()[1]
    old, new = measured(first).total, measured(later).total
    weighted = (0.8 * old.sq_norm + new.sq_norm) / 1.8
    assert measured(first, later, decay=0.8).running.sq_norm == pytest.approx(weighted, rel=1e-12)
    noise = measured(*[first] * 50, *[later] * 50, decay=0.8)
    assert noise.running.trace == pytest.approx(new.trace, rel=1e-3)
    assert noise.total.trace == pytest.approx((old.trace + new.trace) / 2)


def test_networks_with_tied_weights_and_token_losses() -> None:
    table = nn.Embedding(7, 4, dtype=torch.float64)
    ids = torch.randint(7, (6, 5))
    targets = ids.roll(-1, 1).masked_fill(ids == 0, -100)
    tokens = F.cross_entropy((table(ids) @ table.weight.T).transpose(1, 2), targets, reduction="none")
    J = rg.jacobian(rg.per_example(tokens, targets != -100), table)
    noise = rg.NoiseScale()
    noise.update(J)
    rows = J.dense()
    assert noise.total.trace == pytest.approx(float(rows.var(0).sum()), rel=1e-12)


# Where it is undefined


def test_before_the_first_update_everything_is_nan() -> None:
    assert all(map(math.isnan, rg.NoiseScale().compute().values()))


def test_one_batch_has_a_scale_and_no_error() -> None:
    found = measured(torch.tensor([[2.0], [4.0]]))
    assert found.total.sq_norm == 8
    assert found.total.trace == 2
    assert found.total.scale == 0.25
    assert math.isnan(found.total.error)


@pytest.mark.parametrize("b", [0, 1])
def test_fewer_than_two_examples_are_skipped(b: int) -> None:
    noise = measured(torch.ones(b, 3))
    assert (noise.updates, noise.skipped) == (0, 1)
    assert math.isnan(noise.running.scale)


@pytest.mark.parametrize(("norms", "mean"), [([1.0, math.inf], 1.0), ([1.0, NAN], 1.0), ([1.0, 2.0], math.inf)])
def test_an_overflow_is_skipped(norms: list[float], mean: float) -> None:
    noise = measured(*batches())
    before = noise.compute()
    noise.update(norms=torch.tensor(norms), mean_norm=mean)
    assert noise.skipped == 1
    assert noise.compute() == before


def test_a_negative_estimate_has_no_ratio() -> None:
    found = measured(torch.tensor([[1.0], [-1.0]])).total
    assert (found.sq_norm, found.trace) == (-1, 2)
    assert math.isnan(found.scale)
    assert math.isnan(found.error)


def test_next_to_zero_the_error_is_infinite() -> None:
    found = measured(torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [1.5]])).total
    assert found.sq_norm > 0
    assert found.error == math.inf


def test_zero_rows_have_no_ratio() -> None:
    assert math.isnan(measured(torch.zeros(4, 2)).total.scale)


# State and refusals


def test_state_goes_on_where_it_was() -> None:
    whole, begun = measured(*batches(), decay=0.5), measured(*batches()[:3], decay=0.5)
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    resumed = rg.NoiseScale()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for rows in batches()[3:]:
        resumed.update(rows_as_data(rows))
    assert resumed.compute() == whole.compute()
    assert repr(resumed) == repr(whole)
    assert repr(whole).endswith("6 updates, 0 skipped)")
    whole.reset()
    assert (whole.updates, whole.running.scale) != (6, resumed.running.scale)
    assert repr(whole) == "NoiseScale(running nan +- nan, 0 updates, 0 skipped)"


@pytest.mark.parametrize("decay", [-0.1, 1.0, NAN])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match="at least 0 and below 1"):
        rg.NoiseScale(decay)


@pytest.mark.parametrize("given", [{}, {"norms": torch.ones(2)}, {"mean_norm": 1.0}])
def test_half_of_what_is_needed_is_refused(given: dict) -> None:
    with pytest.raises(InputError, match="norms= and mean_norm= together"):
        rg.NoiseScale().update(**given)


def test_both_ways_at_once_are_refused() -> None:
    with pytest.raises(InputError, match=r"takes a Jacobian, update\(J\), or norms="):
        rg.NoiseScale().update(rows_as_data(torch.ones(2, 2)), mean_norm=1.0)


@pytest.mark.parametrize("norms", [[], torch.ones(2, 2), torch.tensor(1.0), [1.0, 2.0], 5.0, torch.ones(2) > 0])
def test_norms_of_another_shape_are_refused(norms: object) -> None:
    with pytest.raises(InputError, match=r"norms must be of shape \(B,\)"):
        rg.NoiseScale().update(norms=norms, mean_norm=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"norms": -torch.ones(3), "mean_norm": 0.5}, "norms: the smallest is -1; expected numbers that are not neg"),
        ({"norms": torch.ones(3), "mean_norm": -0.5}, "mean_norm=-0.5: expected a norm, which is not negative"),
        ({"norms": torch.ones(3), "mean_norm": "a"}, "mean_norm='a': expected one number"),
        ({"norms": torch.ones(3), "mean_norm": torch.ones(2)}, "mean_norm=a tensor of .* expected one number"),
        ({"norms": torch.ones(3), "mean_norm": 0.5, "weights": torch.ones(2)}, "a finite one for each of 3 examples"),
        ({"norms": torch.ones(3), "mean_norm": 0.5, "weights": torch.tensor([1.0, 1.0, NAN])}, "a finite one for each"),
        ({"norms": torch.ones(3), "mean_norm": 0.5, "weights": -torch.ones(3)}, "weights: the smallest is -1"),
        ({"J": torch.ones(3)}, r"was given a tensor of float32 .* expected rowgrad.jacobian\(losses, model\)"),
    ],
)
def test_what_is_no_norm_is_refused_and_nothing_taken_in(given: dict, message: str) -> None:
    noise = measured(*batches())
    before = noise.state_dict()
    with pytest.raises(InputError, match=message):
        noise.update(**given)
    assert noise.state_dict() == before


@pytest.mark.parametrize("options", [{"decay": "x"}, {"decay": None}, {"decay": True}, {"distributed": 2}])
def test_options_of_another_kind_are_refused(options: dict) -> None:
    with pytest.raises(InputError, match=r"NoiseScale: (decay|distributed)=.*, expected"):
        rg.NoiseScale(**options)


def test_a_gradient_that_is_no_mean_is_refused() -> None:
    """A mean is never longer than the root mean square of what it is the mean of; a sum or a scaled gradient may be."""
    noise = rg.NoiseScale()
    with pytest.raises(InputError, match="unscale a GradScaler's gradient"):
        noise.update(norms=torch.ones(4), mean_norm=2.0)
    assert (noise.updates, noise.skipped) == (0, 0)
    noise.update(norms=torch.ones(4), mean_norm=1.0)
    assert (noise.total.scale, noise.total.sq_norm) == (0.0, 1.0)


def test_without_processes_there_is_nothing_to_gather() -> None:
    with pytest.raises(InputError, match="init_process_group"):
        rg.NoiseScale(distributed=True).update(norms=torch.ones(2), mean_norm=1.0)


def test_nothing_is_left_behind(leaves_nothing_behind) -> None:
    model = nn.Linear(3, 1)
    J = rg.jacobian(model(torch.randn(4, 3)).squeeze(1), model)
    with leaves_nothing_behind(model):
        rg.NoiseScale().update(J)
    J.backward(0.25)
