"""The loop that audits are compared with; run as a program, one of two processes that audit together (gloo)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tests.rows.distributed import as_one_of_two
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import rowgrad as rg
from rowgrad.errors import InputError, RowgradWarning
from rowgrad.uses.scores import AuditScores

N, CLASSES = 16, 3


def points() -> Tensor:
    return torch.randn(N, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def labels() -> Tensor:
    return torch.randint(CLASSES, (N,), generator=torch.Generator().manual_seed(2))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def norms_one_by_one(losses: Tensor, model: nn.Module) -> Tensor:
    parameters = [*model.parameters()]
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])


def audited(*, calibrate: float = 0.0, skip: tuple[int, int] | None = None) -> rg.Audit:
    """Three epochs in order of position, without rows; the step `skip`, (epoch, step), is audited and not taken."""
    audit, model = rg.Audit(N, CLASSES, calibrate=calibrate), build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(3):
        for step, index in enumerate(torch.arange(N).split(4)):
            y = audit.plant(index, labels()[index])
            logits = model(points()[index])
            losses = F.cross_entropy(logits, y, reduction="none")
            audit.update(index, losses=losses, norms=norms_one_by_one(losses, model), logits=logits, labels=y)
            optimizer.zero_grad()
            losses.mean().backward()
            if (epoch, step) != skip:
                optimizer.step()
    return audit


def equal(one: AuditScores, other: AuditScores, rtol: float = 1e-6) -> None:
    """Field by field; sums of floats may be rounded otherwise."""
    for field in dataclasses.fields(one):
        values, expected = getattr(one, field.name), getattr(other, field.name)
        if isinstance(values, Tensor):
            torch.testing.assert_close(values, expected, rtol=rtol, atol=1e-9, equal_nan=True, msg=field.name)
        else:
            assert values == expected, field.name


def audit(rank: int) -> None:
    """Each process trains on every other example; both hold the audit of one process with batches twice as large."""
    found = rg.Audit(N, CLASSES, gather=True)
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dataset = rg.Indexed(TensorDataset(points(), labels()))
    for _ in range(3):
        for index, x, y in DataLoader(dataset, batch_size=2, sampler=DistributedSampler(dataset, shuffle=False)):
            logits = model(x)
            J = rg.jacobian(F.cross_entropy(logits, y, reduction="none"), model)
            found.update(index, losses=J.losses, norms=J.norms(), logits=logits, labels=y)
            optimizer.zero_grad()
            J.loss(1 / len(J)).backward()
            optimizer.step()
    equal(found.compute(), audited().compute())
    assert int(index[0]) % 2 == rank, "both processes saw the same examples"


def flips(rank: int) -> None:
    """The labels that are flipped are those of the first process, whatever generator the others have."""
    rng = torch.Generator().manual_seed(rank)
    found = rg.Audit(N, CLASSES, calibrate=0.5, generator=rng, gather=True)
    expected = rg.Audit(N, CLASSES, calibrate=0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.plant(torch.arange(N), labels()), expected.plant(torch.arange(N), labels()))


def refusals(rank: int) -> None:
    """What one process may not pass is refused in both, and both go on together."""
    found = rg.Audit(N, CLASSES, gather=True)
    index = torch.arange(rank, N, 2)
    logits = torch.zeros(len(index), CLASSES, dtype=torch.float64)
    good = {"losses": torch.ones(len(index)), "logits": logits, "labels": labels()[index]}
    for change, error in (
        ({"losses": torch.ones(1)}, InputError),
        ({"lr": "0.1"}, InputError),
        ({"labels": labels()[index] + CLASSES}, InputError),
    ):
        with pytest.raises(error, match="in process 1: "):
            found.update(index, **(good | (change if rank == 1 else {})))
        assert found.compute().times_seen.sum() == 0
    found.update(index, **good)
    assert found.compute().times_seen.tolist() == [1] * N


def overflow(rank: int) -> None:
    """What one process cannot use is left out in both, and told in both."""
    found = rg.Audit(N, CLASSES, gather=True)
    index = torch.arange(rank, N, 2)
    losses = torch.ones(len(index))
    losses[0] = torch.nan if rank == 1 else 1.0
    with pytest.warns(RowgradWarning, match="example 1: its losses are not finite"):
        found.update(index, losses=losses, logits=torch.zeros(len(index), CLASSES), labels=labels()[index])
    assert found.compute().times_seen.tolist() == [1, 0] + [1] * (N - 2)
    assert found.skipped == 1


if __name__ == "__main__":
    as_one_of_two({"audit": audit, "flips": flips, "refusals": refusals, "overflow": overflow})
