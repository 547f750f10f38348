"""What is measured under DistributedDataParallel, run as a program of its own: two processes, gloo, localhost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.rows.distributed import as_one_of_two, build
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import rowgrad as rg
from rowgrad.errors import InputError


def data(step: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(step)
    return torch.randn(10, 4, generator=rng, dtype=torch.float64), torch.randint(3, (10,), generator=rng)


def noise(rank: int) -> None:
    """Halves of each batch on two processes measure what one process measures on all of it."""
    alone, found = rg.NoiseScale(), rg.NoiseScale(distributed=True)
    model = DistributedDataParallel(build())
    for step in range(3):
        x, y = data(step)
        plain = build()
        alone.update(rg.jacobian(cross_entropy(plain(x), y, reduction="none"), plain))
        mine = slice(5 * rank, 5 * rank + 5)
        model.zero_grad()
        J = rg.jacobian(cross_entropy(model(x[mine]), y[mine], reduction="none"), model)
        norms = J.norms()
        J.loss(1 / 5).backward()
        found.update(norms=norms, mean_norm=nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    expected, got = torch.tensor(list(alone.compute().values())), torch.tensor(list(found.compute().values()))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0, equal_nan=True)


def clipping(rank: int) -> None:
    """Both processes clip at the quantile of all norms; the gradients are those of one process; parts may differ."""
    model, bound = DistributedDataParallel(build()), rg.RunningQuantile(0.5, distributed=True)
    plain, bound_alone = build(), rg.RunningQuantile(0.5)
    for step in range(2):
        x, y = data(step)
        mine = slice(0, 6) if rank == 0 else slice(6, 10)
        model.zero_grad()
        losses = cross_entropy(model(x[mine]), y[mine], reduction="none")
        (rg.clipped_loss(losses, model, bound, reduction="sum") * 2 / 10).backward()  # DDP divides by 2
        plain.zero_grad()
        rg.clipped_loss(cross_entropy(plain(x), y, reduction="none"), plain, bound_alone).backward()
        assert abs(bound.value / bound_alone.value - 1) < 1e-12
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


def sampling(rank: int) -> None:
    """Ranks are known from torch.distributed; weighted halves measure what one process measures on all draws."""
    sampler = rg.NormSampler(20)
    assert (sampler.rank, sampler.num_replicas, len(sampler)) == (rank, 2, 10)
    rng = torch.Generator().manual_seed(5)
    rows, weights = torch.randn(8, 4, generator=rng, dtype=torch.float64), torch.rand(8, generator=rng) + 0.5
    mean_norm = (weights[:, None] * rows).mean(0).norm()
    alone, found = rg.NoiseScale(), rg.NoiseScale(distributed=True)
    alone.update(norms=rows.norm(dim=1), mean_norm=mean_norm, weights=weights)
    mine = slice(0, 3) if rank == 0 else slice(3, 8)
    found.update(norms=rows[mine].norm(dim=1), mean_norm=mean_norm, weights=weights[mine])
    assert found.state_dict() == alone.state_dict()


def errors(rank: int) -> None:
    """What is wrong in one process alone is an error of both, and they go on together; dtypes may differ."""
    noise, bound = rg.NoiseScale(distributed=True), rg.RunningQuantile(0.5, distributed=True)
    ones, model = torch.ones(4), build()
    J = rg.jacobian(model(torch.ones(2, 4, dtype=torch.float64)).sum(1), model)
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("norms must be of shape", lambda: noise.update(norms=ones[:, None] if rank else ones, mean_norm=0.5)),
        ("mean_norm='a'", lambda: noise.update(norms=ones, mean_norm="a" if rank else 0.5)),  # type: ignore[arg-type]
        ("for each of 4 examples", lambda: noise.update(norms=ones, mean_norm=0.5, weights=ones[rank:])),
        ("needs the latter", lambda: noise.update(J) if rank else noise.update(norms=ones, mean_norm=0.5)),
        ("norms must be of shape", lambda: bound.update(ones[:, None] if rank else ones)),
    ]
    for message, act in refused:
        with pytest.raises(InputError, match=f"in process 1: .*{message}"):
            act()
    with pytest.raises(InputError, match=r"mean_norm runs from 0.5 to 0.8 over the processes"):
        noise.update(norms=ones, mean_norm=0.8 if rank else 0.5)
    assert (noise.updates, noise.skipped, math.isnan(bound.value)) == (0, 0, True)

    dtype = torch.float64 if rank else torch.bfloat16
    noise.update(norms=(2 * ones).to(dtype), mean_norm=0.5)
    assert noise.total.trace == 8 * (4 - 0.25) / 7
    assert bound.update((ones * (rank + 1)).to(dtype)) == 1.5


def everything(rank: int) -> None:
    noise(rank)
    clipping(rank)
    sampling(rank)
    errors(rank)


if __name__ == "__main__":
    as_one_of_two({"all": everything})
