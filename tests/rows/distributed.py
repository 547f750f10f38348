"""Training on two processes, run as a script by `test_edges.py`: what DDP leaves in `.grad`, with rows and without."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rowgrad as rg

ROOT = Path(__file__).parents[2]


def run_on_two_processes(what: str, module: str = "tests.rows.distributed") -> None:
    """Start this file, or another like it, twice; both must end well within a minute and a half."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", module, what, f"file://{folder}/store"]
        processes = [
            subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        try:
            errors = [p.communicate(timeout=90)[1] for p in processes]
        finally:
            for p in processes:
                p.kill()
    for rank, (process, error) in enumerate(zip(processes, errors, strict=True)):
        assert process.returncode == 0, f"process {rank} failed:\n{error}"


def as_one_of_two(parts: dict[str, Callable[[int], None]]) -> None:
    """What each of the two programs does: join the other, run its part and leave.

    It leaves without Python's own end. DistributedDataParallel keeps gloo's threads past `destroy_process_group`, and
    one that lets go of a collective's last tensor while Python ends aborts the process (PyTorch 2.13).
    """
    torch.set_num_threads(1)
    what, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    parts[what](rank)
    dist.destroy_process_group()
    os._exit(0)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).double()


def data(rank: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rank)
    return torch.randn(5, 4, generator=rng, dtype=torch.float64), torch.randint(3, (5,), generator=rng)


def by_losses(losses: Tensor, model: nn.Module, c: Tensor) -> None:
    losses.backward(c)


def by_rows(losses: Tensor, model: nn.Module, c: Tensor) -> None:
    rg.jacobian(losses, model).backward(c)


def by_loss_of_rows(losses: Tensor, model: nn.Module, c: Tensor) -> None:
    rg.jacobian(losses, model).loss(c).backward()


Backward = Callable[[Tensor, nn.Module, Tensor], None]


def gradients(backward: Backward, rank: int, *, steps: int, bucket_cap_mb: float) -> list[Tensor]:
    """Gradients after a few steps of training with DDP, where the last step's are left in place."""
    model = DistributedDataParallel(build(), bucket_cap_mb=bucket_cap_mb)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = data(rank)
    c = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    for step in range(steps):
        opt.zero_grad()
        losses = F.cross_entropy(model(x + step), y, reduction="none")
        backward(losses, model, c)
        opt.step()
    return [p.grad.clone() for p in model.parameters()]


def accumulated(backward: Backward, rank: int) -> list[Tensor]:
    """Two micro-batches: the first without reduction."""
    model = DistributedDataParallel(build())
    x, y = data(rank)
    c = torch.full((5,), 0.2, dtype=torch.float64)
    with model.no_sync():
        backward(F.cross_entropy(model(x), y, reduction="none"), model, c)
    backward(F.cross_entropy(model(2 * x), y, reduction="none"), model, c)
    return [p.grad.clone() for p in model.parameters()]


def ddp(rank: int) -> None:
    for bucket_cap_mb in (25, 1e-4):
        expected = gradients(by_losses, rank, steps=3, bucket_cap_mb=bucket_cap_mb)
        for backward in (by_rows, by_loss_of_rows):
            found = gradients(backward, rank, steps=3, bucket_cap_mb=bucket_cap_mb)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    expected = accumulated(by_losses, rank)
    for backward in (by_rows, by_loss_of_rows):
        torch.testing.assert_close(accumulated(backward, rank), expected, rtol=1e-10, atol=1e-14)
    own = [p.grad for p in _alone(rank).parameters()]
    assert any(not torch.allclose(a, b) for a, b in zip(own, expected, strict=True)), "nothing was reduced"
    model = DistributedDataParallel(build())
    J = rg.jacobian(F.cross_entropy(model(data(rank)[0]), data(rank)[1], reduction="none"), model)
    assert J.names[0] == "0.weight"
    assert len(J) == 5


def _alone(rank: int) -> nn.Module:
    """The accumulated gradients of one process by itself."""
    model = build()
    x, y = data(rank)
    for scale in (1, 2):
        (0.2 * F.cross_entropy(model(scale * x), y, reduction="none")).sum().backward()
    return model


if __name__ == "__main__":
    as_one_of_two({"ddp": ddp})
