"""What is measured under DistributedDataParallel, run as a program of its own: two processes, gloo, localhost."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from tests.rows.distributed import build
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import rowgrad as rg


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=sys.argv[2], rank=int(sys.argv[3]), world_size=2)
    noise(int(sys.argv[3]))
    clipping(int(sys.argv[3]))
    dist.destroy_process_group()
