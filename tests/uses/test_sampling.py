"""Drawing by norms: unbiased, of the variance that the closed form says, measured, switched, and resumed exactly."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import rowgrad as rg
from rowgrad import uses
from rowgrad.errors import InputError
from rowgrad.uses.draws import Draw, DrawnIndex
from rowgrad.uses.gain import GainMeter
from rowgrad.uses.sumtree import FAN, SumTree

N, DIM = 60, 5


def rows(spread: float = 1.5) -> Tensor:
    """Made-up gradients (N, DIM) of very different lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = (spread * torch.randn(N, 1, generator=generator, dtype=torch.float64)).exp()
    return lengths * torch.randn(N, DIM, generator=generator, dtype=torch.float64)


def filled(norms: Tensor, **options: Any) -> rg.NormSampler:
    sampler = rg.NormSampler(len(norms), **{"switch": None, "decay": 1.0, **options})
    sampler.update(torch.arange(len(norms)), norms)
    return sampler


def drawn(sampler: rg.NormSampler, n_epochs: int = 1) -> Draw:
    return together([i for _ in range(n_epochs) for i in sampler])


def together(drawn: list[DrawnIndex]) -> Draw:
    """As a batch."""
    return Draw(
        torch.tensor([int(i) for i in drawn]),
        torch.tensor([i.weight for i in drawn], dtype=torch.float64),
        torch.tensor([i.number for i in drawn]),
        torch.tensor([i.by_norms for i in drawn]),
    )


def loaded(state: dict[str, Any], **options: Any) -> rg.NormSampler:
    """A new sampler with a state that went through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    sampler = rg.NormSampler(state["n"], **options)
    sampler.load_state_dict(torch.load(file, weights_only=True))
    return sampler


# The law


@pytest.mark.parametrize("mix", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("stale", [False, True])
def test_draws_are_unbiased(mix: float, stale: bool) -> None:
    """Over 10^5 draws the weighted mean is the mean within its error, each example comes as often as it should."""
    g = rows()
    sampler = filled(g.norm(dim=1).roll(1) if stale else g.norm(dim=1), mix=mix)
    p = sampler.probabilities()
    draws = 100_000 // N + 1
    found = drawn(sampler, draws)
    counts = torch.bincount(found.index, minlength=N)
    expected = p * counts.sum()
    chi_square = ((counts - expected).square() / expected).sum()
    assert abs(chi_square - N) < 5 * (2 * N) ** 0.5
    torch.testing.assert_close(found.weight, 1 / (N * p[found.index]))

    weighted = found.weight[:, None] * g[found.index]
    error = weighted.std(0) / len(weighted) ** 0.5
    assert (weighted.mean(0) - g.mean(0)).abs().div(error).max() < 4


def test_variance_is_that_of_the_closed_form() -> None:
    norms = rows().norm(dim=1).float().double()  # what the table holds
    nearly = filled(norms, mix=1e-12).probabilities()
    second_moment = (norms.square() / nearly).sum() / N**2
    torch.testing.assert_close(second_moment, (norms.sum() / N) ** 2, rtol=1e-10, atol=0)

    uniform = norms.square().sum() / N
    assert second_moment < uniform / 2
    for mix in (0.05, 0.3, 0.9):
        mixed = (norms.square() / filled(norms, mix=mix).probabilities()).sum() / N**2
        assert second_moment < mixed < uniform


def test_simulated_variance_is_the_closed_form() -> None:
    g = rows(0.7)
    sampler = filled(g.norm(dim=1), mix=0.1)
    p = sampler.probabilities()
    expected = (g.norm(dim=1).square() / p).sum() / N**2 - g.mean(0).square().sum()
    found = drawn(sampler, 1500)
    off = (found.weight[:, None] * g[found.index] - g.mean(0)).square().sum(1)
    assert abs(off.mean() - expected) < 4 * off.std() / len(off) ** 0.5


def test_weights_are_bounded_by_the_mix_and_the_cap() -> None:
    norms = rows().norm(dim=1)
    assert drawn(filled(norms, mix=0.1), 20).weight.max() <= 10 + 1e-9
    capped = drawn(filled(norms, mix=0.1, max_weight=2.0), 20)
    assert capped.weight.max() == 2.0
    free = drawn(filled(norms, mix=0.1), 20)
    assert torch.equal(free.index, capped.index)
    assert torch.equal(free.weight.clamp(max=2.0), capped.weight)


def test_equal_and_zero_norms_draw_evenly() -> None:
    for norms in (torch.ones(N), torch.zeros(N)):
        sampler = filled(norms)
        torch.testing.assert_close(sampler.probabilities(), torch.full((N,), 1 / N, dtype=torch.float64))
        assert drawn(sampler).weight.sub(1).abs().max() < 1e-12


def test_off_it_is_a_shuffle() -> None:
    sampler = rg.NormSampler(N)
    first, second = drawn(sampler), drawn(sampler)
    for found in (first, second):
        assert torch.equal(found.index.sort().values, torch.arange(N))
        assert torch.equal(found.weight, torch.ones(N, dtype=torch.float64))
    assert not torch.equal(first.index, second.index)


# The table


def test_norms_not_seen_for_an_epoch_move_towards_the_mean() -> None:
    sampler = filled(torch.tensor([1.0, 2.0, 3.0, 6.0]), decay=0.5, mix=1e-9)
    next(iter(sampler))  # all were seen before: nothing ages
    torch.testing.assert_close(sampler.probabilities() * 12, torch.tensor([1.0, 2, 3, 6]).double(), rtol=1e-6, atol=0)
    sampler.update(torch.tensor([3]), torch.tensor([6.0]))
    next(iter(sampler))  # the mean is 3
    torch.testing.assert_close(
        sampler.probabilities() * 13.5, torch.tensor([2.0, 2.5, 3, 6]).double(), rtol=1e-6, atol=0
    )


def test_examples_never_seen_are_the_mean_of_the_others() -> None:
    sampler = rg.NormSampler(4, switch=None, mix=1e-9)
    next(iter(sampler))
    sampler.update(torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
    assert not sampler.active
    next(iter(sampler))
    torch.testing.assert_close(sampler.probabilities() * 8, torch.tensor([1.0, 3, 2, 2]).double(), rtol=1e-6, atol=0)


def test_an_example_twice_in_a_batch_keeps_the_later_norm_and_inf_is_left_out() -> None:
    sampler = filled(torch.ones(4), mix=1e-9)
    sampler.update(torch.tensor([2, 0, 2, 3, 1]), torch.tensor([9.0, 1.0, 5.0, torch.inf, torch.nan]))
    torch.testing.assert_close(sampler.probabilities() * 8, torch.tensor([1.0, 1, 5, 1]).double(), rtol=1e-6, atol=0)
    sampler.update(torch.tensor([2], dtype=torch.int32), torch.tensor([3.0], dtype=torch.bfloat16, requires_grad=True))
    torch.testing.assert_close(sampler.probabilities()[2] * 6, torch.tensor(3.0).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [1, FAN - 1, FAN + 1, FAN * FAN + 3])
def test_the_tree_finds_what_the_cumulative_sum_says(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(n, generator=generator)
    weights[torch.rand(n, generator=generator) < 0.3] = 0
    weights[0], weights[n // 2] = 0, 1
    tree = SumTree(weights.clone())
    index = torch.randint(n, (50,), generator=generator).unique()
    weights[index] = torch.rand(len(index), generator=generator)
    tree.write(index, weights[index])
    assert torch.equal(tree.weights, weights)
    for changed, anew in zip(tree._levels, SumTree(weights)._levels, strict=True):
        assert torch.equal(changed, anew)

    sums = weights.double().cumsum(0)
    assert abs(tree.total - float(sums[-1])) < 1e-12 * n
    shares = torch.rand(1000, dtype=torch.float64, generator=generator)
    shares[:2] = torch.tensor([0.0, 1 - 2**-53])
    expected = torch.searchsorted(sums, shares * sums[-1], right=True).clamp(max=n - 1)
    found = tree.find(shares)
    assert bool((weights[found] > 0).all())
    assert (found != expected).sum() <= 1  # a share that rounding puts on either side


def test_beyond_the_limit_of_multinomial() -> None:
    n = 2**24 + 1000
    sampler = rg.NormSampler(n, switch=None, mix=1e-6)
    state = sampler.state_dict()
    state["table"][[5, n - 1]] = torch.tensor([1.0, 3.0])
    sampler.load_state_dict(state | {"built": True})
    index, weights, _ = sampler._next_block(1000)
    index = index.long()
    assert set(index.tolist()) == {5, n - 1}
    assert abs((index == n - 1).double().mean() - 0.75) < 0.06
    torch.testing.assert_close(weights, 1 / (n * sampler.probabilities(index)))


# Gain and switch


def test_gain_is_the_ratio_of_variances() -> None:
    """Within its error, switched off and on, with stale norms, with and without the mean gradient."""
    g = rows(1.0) + 0.5
    norms = g.norm(dim=1)
    table = norms * torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).add(0.5)
    for known in (False, True):
        for on in (False, True):
            sampler = filled(table, switch=None if on else (1e9, 1e9), window=400)
            p = sampler.probabilities()
            squared_mean = g.mean(0).square().sum() if known else 0.0
            by_norms = (norms.square() / p).sum() / N**2 - squared_mean
            expected = (norms.square().mean() - squared_mean) / by_norms
            for _ in range(60):
                found = drawn(sampler)
                for index, weight, number, _ in zip(*(part.split(12) for part in found), strict=True):
                    grad = (weight[:, None] * g[index]).mean(0)
                    sampler._meter.add(weight, 1 / (N * p[index]), norms[index], float(grad.norm()) if known else None)
                    assert len(number) == 12
            gain = sampler.gain
            assert expected > 1.1
            assert abs(gain.ratio - expected) < 4 * gain.error
            assert gain.error < 0.1 * expected


def fitted_digits() -> tuple[Tensor, Tensor, nn.Sequential, Tensor]:
    """500 digits, a network that has learned most of them, and the norms of a little earlier."""
    bunch = load_digits()
    x, y = torch.tensor(bunch.data[:500] / 16), torch.tensor(bunch.target[:500])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    earlier = torch.ones(500)
    for step in range(60):
        if step == 52:
            earlier = rg.grad_norms(F.cross_entropy(model(x), y, reduction="none"), model)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return x, y, model, earlier


@pytest.mark.parametrize("switch", [None, (1e9, 1e9)], ids=["on", "off"])
def test_gain_on_digits_is_the_true_ratio(switch: Any) -> None:
    """The table begins with norms of some steps before and is filled with those of now, batch by batch."""
    x, y, model, earlier = fitted_digits()
    J = rg.jacobian(F.cross_entropy(model(x), y, reduction="none"), model)
    norms, mean = J.norms(), float(torch.cat([g.flatten() for g in J.weighted_sum(1 / 500).values()]).norm()) ** 2
    uniform = norms.square().mean() - mean
    sampler = filled(earlier, switch=switch, window=48)
    by_norms = []
    for (inputs, labels), draw in DataLoader(rg.Weighted(TensorDataset(x, y)), 32, sampler=sampler):
        by_norms.append((norms.square() / sampler.probabilities()).sum() / 500**2 - mean)
        J = rg.jacobian(F.cross_entropy(model(inputs), labels, reduction="none"), model)
        grad = J.weighted_sum(draw.weight / len(draw.weight)).values()
        sampler.update(draw, J.norms(), grad_norm=torch.cat([g.flatten() for g in grad]).norm())
    true = uniform / torch.stack(by_norms).mean()
    gain = sampler.gain
    assert true > 2
    assert abs(gain.ratio - true) < 3 * gain.error
    assert gain.error < 0.25 * true


def test_it_switches_itself_on_and_off() -> None:
    spread, even = rows().norm(dim=1), torch.ones(N)
    sampler = rg.NormSampler(N, window=10)
    data = TensorDataset(torch.arange(N))
    loader = DataLoader(rg.Weighted(data), batch_size=12, sampler=sampler)
    states: list[bool] = []
    for epoch in range(12):
        norms = spread if epoch < 6 else even
        for _, draw in loader:
            sampler.update(draw, norms[draw.index])
        states.append(sampler.active)
        if epoch == 0:
            assert sampler.gain.ratio == 1.0
    assert not states[0]
    assert states[5]
    assert not states[-1]  # all norms equal: gain 1, less than nothing while the table lags behind


# Weights travel


class Words(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        assert type(index) is int
        return {"ids": torch.full((3,), index), "label": torch.tensor(index % 4)}


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_arrive_with_their_examples(workers: int) -> None:
    norms = rows().norm(dim=1)
    sampler = filled(norms)
    p = sampler.probabilities()
    loader = DataLoader(
        rg.Weighted(Words()),
        batch_size=7,
        sampler=sampler,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    numbers = []
    for batch, draw in loader:
        assert isinstance(draw, Draw)
        assert torch.equal(batch["ids"][:, 0], draw.index)
        torch.testing.assert_close(draw.weight, (1 / (N * p[draw.index])).float())
        numbers += draw.number.tolist()
    assert numbers == list(range(N))


def test_a_draw_survives_pickling_and_is_an_int() -> None:
    draw = pickle.loads(pickle.dumps(DrawnIndex(7, 0.25, 3, True)))  # noqa: S301
    assert (draw, draw.weight, draw.number, draw.by_norms) == (7, 0.25, 3, True)
    assert ["a", "b"][DrawnIndex(1)] == "b"


def test_a_collate_function_of_ones_own_and_data_read_in_lots() -> None:
    class Lots(Words):
        def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
            return [self[i] for i in indices]

    data = rg.Weighted(Lots(), collate_fn=lambda items: [int(item["label"]) for item in items])
    labels, draw = next(iter(DataLoader(data, batch_size=5, sampler=rg.NormSampler(N), collate_fn=data.collate)))
    assert labels == (draw.index % 4).tolist()
    item, draw = data[DrawnIndex(3)]
    assert type(draw.index) is int
    assert (int(item["label"]), draw.index, float(draw.weight)) == (3, 3, 1.0)


def test_processes_share_a_shuffle_and_draw_differently() -> None:
    shards = [drawn(rg.NormSampler(N, rank=r, num_replicas=3)) for r in range(3)]
    assert torch.equal(torch.cat([s.index for s in shards]).sort().values, torch.arange(N))

    norms = rows().norm(dim=1)
    by_rank = [drawn(filled(norms, rank=r, num_replicas=2), 100) for r in range(2)]
    counts = [torch.bincount(d.index, minlength=N) for d in by_rank]
    p = filled(norms).probabilities()
    alike = (by_rank[0].index == by_rank[1].index).double().mean()
    assert abs(alike - p.square().sum()) < 0.03  # as often as by chance
    assert ((counts[0] + counts[1]) / (100 * N) - p).abs().max() < 0.02


def test_processes_that_switched_at_different_times_share_the_shuffle_again() -> None:
    """Each measures its own gain; once all are off, an epoch visits every example as if none had been on."""
    samplers = [rg.NormSampler(N, rank=r, num_replicas=2) for r in range(2)]
    for sampler in samplers:
        sampler.update(torch.arange(N), rows().norm(dim=1))
    for on in ((False, False), (True, False), (True, True), (False, False), (False, False)):
        for sampler, wanted in zip(samplers, on, strict=True):
            sampler._wanted = wanted
        visited = torch.cat([drawn(sampler).index for sampler in samplers])
        assert any(on) or torch.equal(visited.sort().values, torch.arange(N)), on


def test_pools_of_processes_share_a_shuffle_and_draw_differently() -> None:
    def make(rank: int, **options: Any) -> uses.PoolSampler:
        return uses.PoolSampler(N, lambda index: torch.ones(len(index)), batch_size=7, rank=rank, **options)

    shards = [make(r, num_replicas=2) for r in range(2)]
    batches = [list(shard) for shard in shards]
    assert [len(shard) for shard in shards] == [len(found) for found in batches] == [5, 5]
    assert sorted(int(i) for found in batches for batch in found for i in batch) == [*range(N)]

    by_rank = [[int(i) for _ in range(40) for b in make(r, num_replicas=2, switch=None) for i in b] for r in range(2)]
    alike = sum(a == b for a, b in zip(*by_rank, strict=True)) / len(by_rank[0])
    assert alike < 0.05  # 1 / 60 by chance


@pytest.mark.parametrize("kind", ["NormSampler", "PoolSampler"])
def test_rank_and_number_of_processes_are_those_of_torch_distributed(kind: str, monkeypatch: Any) -> None:
    def make(**options: Any) -> Any:
        if kind == "NormSampler":
            return rg.NormSampler(N, **options)
        return uses.PoolSampler(N, lambda index: torch.ones(len(index)), batch_size=6, **options)

    early = make()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    found = make()
    assert (found.rank, found.num_replicas, found.draws) == (1, 3, 20)
    assert len(list(found)) == len(found)
    alone = make(rank=0, num_replicas=1)
    assert len(list(alone)) == len(alone)
    assert alone.draws == N
    with pytest.warns(rg.RowgradWarning, match=f"{kind}: made before torch.distributed was initialized"):
        next(iter(early))


# A loop


def problem() -> tuple[TensorDataset, nn.Sequential]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return TensorDataset(x, y), model


class Run:
    """A training loop that can be stopped after any batch and begun anew from what it saved."""

    def __init__(self, workers: int, saved: dict[str, Any] | None = None) -> None:
        data, self.model = problem()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.sampler = rg.NormSampler(N, window=8)
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self.sampler = loaded(saved["sampler"], window=8)
        self.loader = DataLoader(
            rg.Weighted(data),
            batch_size=7,
            sampler=self.sampler,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),
        )
        self.draws: list[tuple[int, float]] = []

    def epochs(self, n: int, save_at: int | None = None) -> dict[str, Any] | None:
        saved, step = None, 0
        for _ in range(n):
            for (x, y), draw in self.loader:
                losses = F.cross_entropy(self.model(x), y, reduction="none")
                J = rg.jacobian(losses, self.model)
                self.sampler.update(draw, J.norms())
                self.optimizer.zero_grad()
                J.loss(draw.weight / len(losses)).backward()
                self.optimizer.step()
                self.draws += zip(draw.index.tolist(), draw.weight.tolist(), strict=True)
                step += 1
                if step == save_at:
                    model = {name: value.clone() for name, value in self.model.state_dict().items()}
                    saved = {"model": model, "sampler": self.sampler.state_dict()}
        return saved


@pytest.mark.parametrize(("workers", "save_at"), [(0, 4), (0, 40), (0, 45), (2, 40)])
def test_a_state_goes_on_with_the_same_draws(workers: int, save_at: int) -> None:
    """Nine batches an epoch; 40 is in the middle of the fifth, 45 at its end, 4 in the first."""
    whole = Run(workers)
    saved = whole.epochs(7, save_at)
    assert whole.sampler.active
    again = Run(workers, saved)
    again.epochs(7 - save_at // 9)
    seen = save_at // 9 * N + save_at % 9 * 7
    assert again.draws == whole.draws[seen:]
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["drop_last", "break", "pool"])
def test_an_epoch_of_fewer_draws_is_over_where_the_loop_is(kind: str, workers: int) -> None:
    """60 examples in batches of 16: a state after the third batch begins a new epoch, as the unstopped loop does."""

    def loop(sampler: Any, n_epochs: int) -> list[list[int]]:
        data = rg.Weighted(TensorDataset(torch.arange(N)))
        how: dict[str, Any] = {"batch_sampler": sampler}
        if kind != "pool":
            how = {"batch_size": 16, "sampler": sampler, "drop_last": kind == "drop_last"}
        loader = DataLoader(data, num_workers=workers, multiprocessing_context="fork" if workers else None, **how)
        found = []
        for _ in range(n_epochs):
            for k, (_, draw) in enumerate(loader, start=1):
                sampler.update(draw, torch.ones(len(draw.index)))
                found.append(draw.index.tolist())
                if kind == "break" and k == 3:
                    break
        return found

    def make() -> Any:
        if kind == "pool":
            return uses.PoolSampler(N, lambda index: torch.ones(len(index)), batch_size=16, draws=48)
        return rg.NormSampler(N, draws=48)

    whole, begun, again = make(), make(), make()
    expected = loop(whole, 3)
    assert [len(batch) for batch in expected] == [16] * 9
    assert len(whole) == (3 if kind == "pool" else 48)
    assert loop(begun, 1) == expected[:3]
    again.load_state_dict(begun.state_dict())
    assert loop(again, 2) == expected[3:]


def test_batches_without_an_update_are_drawn_again() -> None:
    sampler = rg.NormSampler(N)
    numbers = iter(sampler)
    first = [next(numbers) for _ in range(20)]
    sampler.update(Draw(torch.tensor(first[5:10]), torch.ones(5), torch.arange(5, 10)), torch.ones(5))
    rest = [int(i) for i in loaded(sampler.state_dict())]
    assert rest[:10] == [int(i) for i in first[10:]]
    assert len(rest) == N - 10


def test_no_other_generator_is_touched(leaves_nothing_behind: Any) -> None:
    before = torch.get_rng_state()
    drawn(filled(rows().norm(dim=1)), 2)
    drawn(rg.NormSampler(N))
    assert torch.equal(before, torch.get_rng_state())
    generator = torch.Generator().manual_seed(5)
    same = [drawn(filled(rows().norm(dim=1), generator=torch.Generator().manual_seed(5))) for _ in range(2)]
    assert torch.equal(same[0].index, same[1].index)
    state = generator.get_state()
    drawn(rg.NormSampler(N, generator=generator))
    assert not torch.equal(generator.get_state(), state)


# Out of a pool


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4)])
def test_norms_in_the_outputs_are_those_of_the_derivative(shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape, dtype=torch.float64)
    labels = torch.randint(4, shape[:-1])

    def loss(z: Tensor) -> Tensor:
        return rg.per_example(F.cross_entropy(z.flatten(0, -2), labels.flatten(), reduction="none").view(shape[:-1]))

    by_hand = (outputs.softmax(-1) - F.one_hot(labels, 4)) / (1 if len(shape) == 2 else shape[1])
    with torch.no_grad():
        torch.testing.assert_close(uses.output_norms(loss, outputs), by_hand.flatten(1).norm(dim=1))
    assert outputs.grad is None


def test_batches_out_of_a_pool_are_unbiased_and_vary_as_measured() -> None:
    """The mean over batches within its error; the variance of batches against what `gain` says of it."""
    g = rows(1.0) + 1.0
    norms, mean, size = g.norm(dim=1), g.mean(0), 8
    for known in (True, False):
        sampler = uses.PoolSampler(N, lambda index: norms[index], batch_size=size, pool=80, switch=None, window=5000)
        estimates = []
        for _ in range(200):
            for batch in sampler:
                draw = together(batch)
                grad = (draw.weight[:, None] * g[draw.index]).mean(0)
                if len(batch) == size:
                    sampler._measure(
                        draw, draw.weight, norms[draw.index], float(grad.norm()) if known else None, 1 / sampler.pool
                    )
                    estimates.append(grad)
        found = torch.stack(estimates)
        assert ((found.mean(0) - mean).abs() / (found.std(0) / len(found) ** 0.5)).max() < 4
        squares = (found - mean).square().sum(1)
        uniform = (norms.square().mean() - mean.square().sum()) / size
        true, gain = uniform / squares.mean(), sampler.gain
        spread = true * squares.std() / len(squares) ** 0.5 / squares.mean()
        assert true > 1.2
        error = (gain.error**2 + spread**2) ** 0.5
        assert gain.error < 0.05
        assert abs(gain.ratio - true) < 4 * error if known else 1 < gain.ratio < true


@pytest.mark.parametrize("known", [True, False])
def test_equal_scores_gain_nothing_out_of_a_pool(known: bool) -> None:
    """All weights are 1, as in a shuffle, but the batch varies by the pool, too; tried in a few batches of a window."""
    g = rows(1.5)
    norms = g.norm(dim=1)
    options: dict[str, Any] = {"batch_size": 8, "window": 60}
    for score, switch in ((torch.ones, "cost"), (torch.zeros, "cost"), (torch.ones, None)):
        sampler = uses.PoolSampler(N, lambda index, score=score: score(len(index)), switch=switch, **options)
        estimates, active = [], []
        for _ in range(40):
            for batch in sampler:
                draw = together(batch)
                assert torch.equal(draw.weight, torch.ones(len(batch), dtype=torch.float64))
                grad = (draw.weight[:, None] * g[draw.index]).mean(0)
                active.append(bool(draw.by_norms.all()))
                assert active[-1] == bool(draw.by_norms.any())
                estimates.append(grad)
                sampler.update(draw, norms[draw.index], grad_norm=grad.norm() if known else None)
        if switch is None:
            assert all(active)
            assert sampler.gain.ratio < 1
        else:
            assert 0 < sum(active) < 0.2 * len(active)


def test_batches_of_one_example_do_not_make_the_gain_inexact() -> None:
    """With 65 examples in batches of 8 the last one is alone; the gain is that of the other batches."""
    g = rows(1.0)[: N - 4] + 2.0  # 56
    g = torch.cat([g, g[:9]])
    norms = g.norm(dim=1)
    found = []
    for drop in (False, True):
        sampler = filled(norms, window=4000)
        for _ in range(40):
            for draw in map(together, torch.utils.data.BatchSampler(sampler, 8, drop)):
                grad = (draw.weight[:, None] * g[draw.index]).mean(0)
                sampler.update(draw, norms[draw.index], grad_norm=grad.norm())
        found.append(sampler.gain)
    squared_mean = g.mean(0).square().sum()
    by_norms = (norms.square() / sampler.probabilities()).sum() / len(g) ** 2 - squared_mean
    true = float((norms.square().mean() - squared_mean) / by_norms)
    second_moments = float(norms.square().mean() / (by_norms + squared_mean))
    assert found[0] == found[1]
    assert abs(found[0].ratio - true) < 4 * found[0].error < 0.5 * (true - second_moments)


def test_batches_of_one_example_alone_give_the_second_moments() -> None:
    norms = rows(1.0).norm(dim=1)
    known, unknown = filled(norms), filled(norms)
    for sampler, grad_norm in ((known, 1.0), (unknown, None)):
        for i in sampler:
            sampler.update(together([i]), norms[[int(i)]], grad_norm=grad_norm)
    assert known.gain == unknown.gain
    assert known.gain.ratio > 1


def test_of_equal_gradients_the_whole_is_subtracted() -> None:
    """The mean gradient's part of both second moments, where the batch came out of a pool and where not."""
    weights = torch.ones(8).double()
    for pooled in (0.0, 0.1):
        meter = GainMeter(10)
        norms = torch.full((8,), 3.0).double()
        meter.add(weights, weights, norms, 3.0, per_pool=pooled, out_of_pool=pooled > 0)
        expected = 72 * torch.tensor([[1.0, 1 + 7 * pooled]]).double()
        torch.testing.assert_close(meter.sums, expected.repeat(1, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pool_in_a_loop_switches_itself_on_and_resumes(workers: int) -> None:
    norms = rows(1.5).norm(dim=1)

    def loop(sampler: uses.PoolSampler, epochs: int, save_at: int = -1) -> tuple[list[Any], Any]:
        draws, saved = [], None
        loader = DataLoader(
            rg.Weighted(Words()),
            batch_sampler=sampler,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )
        for _ in range(epochs):
            for batch, draw in loader:
                assert torch.equal(batch["ids"][:, 0], draw.index)
                sampler.update(draw, norms[draw.index])
                draws.append((draw.index.tolist(), draw.weight.tolist()))
                if len(draws) == save_at:
                    saved = sampler.state_dict()
        return draws, saved

    options: dict[str, Any] = {"batch_size": 7, "switch": (1.05, 1.0), "window": 20}
    sampler = uses.PoolSampler(N, lambda index: norms[index], **options)
    draws, saved = loop(sampler, 6, 40)
    assert sampler.active
    assert draws[0][1] == [1.0] * 7
    assert len({w for _, weights in draws[-5:] for w in weights}) > 5
    again = uses.PoolSampler(N, lambda index: norms[index], **options)
    again.load_state_dict(saved)
    assert loop(again, 2)[0] == draws[40:]


def test_scores_that_do_not_fit() -> None:
    for score, message in (
        (lambda index: torch.ones(3), r"\(3,\), from 1 to 1 for 10 examples"),
        (lambda index: torch.ones(0), r"shape \(0,\) for 10"),
        (lambda index: -torch.ones(len(index)), "not negative"),
        (lambda index: torch.full((len(index),), torch.inf), "gave inf"),
        (lambda index: [1.0] * len(index), "gave a list for 10 examples; expected a tensor"),
        (lambda index: None, "gave None"),
    ):
        with pytest.raises(rg.RowgradError, match=message):
            next(iter(uses.PoolSampler(N, score, batch_size=2, switch=None)))
    with pytest.raises(rg.RowgradError, match="a pool as large"):
        uses.PoolSampler(N, torch.tensor, batch_size=4, pool=3)
    with pytest.raises(rg.RowgradError, match=r"pool=10.5, expected a whole number"):
        uses.PoolSampler(N, torch.tensor, batch_size=4, pool=10.5)  # type: ignore[arg-type]
    with pytest.raises(rg.RowgradError, match=r"batch_size=2.5, expected a whole number"):
        uses.PoolSampler(N, torch.tensor, batch_size=2.5)  # type: ignore[arg-type]
    with pytest.raises(rg.RowgradError, match="score=None, expected a function"):
        uses.PoolSampler(N, None, batch_size=4)  # type: ignore[arg-type]
    with pytest.raises(rg.RowgradError, match=r"PoolSampler.update was given a tensor of int64 .* expected the draw"):
        uses.PoolSampler(N, torch.tensor, batch_size=4).update(torch.arange(4), torch.ones(4))  # type: ignore[arg-type]
    with pytest.raises(rg.RowgradError, match='expected "cost"'):
        uses.PoolSampler(N, torch.tensor, batch_size=4, switch="auto")
    with pytest.raises(rg.RowgradError, match="one loss per example"):
        uses.output_norms(torch.mean, torch.ones(2, 3))


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "number of examples"),
        ({"n": [1, 2]}, "n=a list, .*len\\(dataset\\)"),
        ({"n": 10.5}, "n=10.5, .*len\\(dataset\\)"),
        ({"n": None}, "n=None"),
        ({"n": True}, "n=True"),
        ({"mix": 0.0}, "mix=0.0"),
        ({"mix": "a"}, "mix='a'"),
        ({"mix": torch.nan}, "mix=nan"),
        ({"decay": 1.5}, "decay=1.5"),
        ({"max_weight": 0}, "max_weight=0"),
        ({"switch": (1.0, 2.0)}, "on at least off"),
        ({"switch": 1.2}, "switch=1.2, expected two numbers"),
        ({"window": 3}, "at least 8"),
        ({"window": 8.5}, "window=8.5"),
        ({"generator": 0}, "generator=0, expected a torch.Generator"),
        ({"draws": 4}, "draws=4, expected a whole number from 1 to 3"),
        ({"draws": 0}, "draws=0"),
        ({"rank": 0}, "rank=0 and num_replicas=None: expected both"),
        ({"rank": 0, "num_replicas": 0}, "num_replicas=0"),
        ({"rank": 2, "num_replicas": 2}, "rank=2"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rg.NormSampler(**{"n": 3, **options})


@pytest.mark.parametrize(
    ("index", "norms", "message"),
    [
        ([0, 1], [1.0], "one of each"),
        ([0, N], [1.0, 1.0], f"0 to {N - 1}"),
        ([0, -1], [1.0, 1.0], "run from -1"),
        ([0, 1], [1.0, -2.0], "not negative"),
        ([True, False], [1.0, 2.0], "a tensor of bool .* or a tensor of positions, whole numbers"),
        ([2.9], [1.0], "a tensor of float32"),
        ([0, 1], [1 + 1j, 1], "norms must be of shape"),
        ([[0, 1]], [[1.0, 1.0]], r"norms must be of shape \(B,\)"),
    ],
)
def test_updates_that_do_not_fit(index: list[Any], norms: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rg.NormSampler(N).update(torch.tensor(index), torch.tensor(norms))


@pytest.mark.parametrize(
    ("draw", "norms", "message"),
    [
        ([0, 1], torch.ones(2), "was given a list; expected the draw"),
        ((torch.arange(2), torch.ones(2)), torch.ones(2), "was given a tuple; expected the draw"),
        (torch.arange(2), [1.0, 2.0], "one real number for each example; got a list"),
        (Draw(1, 1.0, 0), torch.ones(2), "was given 1; expected the draw"),
    ],
)
def test_updates_with_what_is_no_tensor(draw: Any, norms: Any, message: str) -> None:
    sampler = rg.NormSampler(N)
    with pytest.raises(InputError, match=message):
        sampler.update(draw, norms)


@pytest.mark.parametrize("grad_norm", ["a", -1.0, torch.ones(2), None])
def test_the_norm_of_the_gradient_is_one_number(grad_norm: Any) -> None:
    sampler = rg.NormSampler(N)
    draw = together([i for _, i in zip(range(2), sampler, strict=False)])
    if grad_norm is None:
        return sampler.update(draw, torch.ones(2), grad_norm=torch.tensor([0.5]))
    with pytest.raises(InputError, match=r"grad_norm=.*: expected"):
        sampler.update(draw, torch.ones(2), grad_norm=grad_norm)
    assert sampler.state_dict()["done"] == 0  # nothing was taken in
    return None


def test_samplers_and_loaders_that_do_not_fit_are_told_apart() -> None:
    data = rg.Weighted(TensorDataset(torch.arange(20.0)))
    pool = uses.PoolSampler(20, lambda index: torch.ones(len(index)), batch_size=4)
    with pytest.raises(InputError, match=r"whole batches, as PoolSampler does; use DataLoader\(..., batch_sampler="):
        next(iter(DataLoader(data, batch_size=4, sampler=pool)))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"single examples, as NormSampler does; use DataLoader\(..., batch_size="):
        next(iter(DataLoader(data, batch_sampler=rg.NormSampler(20))))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a position is 1.5; expected a whole number"):
        data[1.5]  # type: ignore[index]
    with pytest.raises(
        IndexError, match=r"position 2\d of a data set of 20 examples, in rg.Weighted; make the sampler"
    ):
        list(DataLoader(data, batch_size=4, sampler=rg.NormSampler(25)))
    assert [int(draw.index) for _, draw in data] == [*range(20)]
    assert data[-1][1].index == 19


def test_a_state_of_another_size_and_two_loops_at_once() -> None:
    with pytest.raises(InputError, match="the state's n is 3, expected 60"):
        rg.NormSampler(N).load_state_dict(rg.NormSampler(3).state_dict())
    sampler = rg.NormSampler(N)
    first = iter(sampler)
    next(first)
    next(iter(sampler))
    with pytest.raises(InputError, match="one loader at a time"):
        next(first)


def test_draws_that_lost_their_weights_are_refused() -> None:
    """Another wrapper around `Weighted` hands it plain positions."""
    data = TensorDataset(torch.arange(20.0))
    sampler = rg.NormSampler(20, switch=None)
    _, draw = next(
        iter(DataLoader(torch.utils.data.Subset(rg.Weighted(data), range(20)), batch_size=5, sampler=sampler))
    )
    with pytest.raises(InputError, match=r"lost their numbers and weights .* rg.Weighted be the outermost"):
        sampler.update(draw, torch.ones(5))


def test_norms_beyond_float32_are_left_out_of_the_table() -> None:
    sampler = rg.NormSampler(10, switch=None)
    sampler.update(torch.arange(10), torch.tensor([1.0] * 9 + [1e39], dtype=torch.float64))
    assert bool(sampler.probabilities(torch.arange(10)).isfinite().all())
