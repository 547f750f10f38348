"""An audit says the same in every kind of loop: dicts, padding, autocast, accumulation, several processes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tests.rows.distributed import run_on_two_processes
from tests.uses.auditing import CLASSES, N, audited, build, equal, labels, points
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import rowgrad as rg
from rowgrad.errors import InputError, RowgradWarning


def test_the_plain_loop() -> None:
    audit, model = rg.Audit(N, CLASSES), build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for index, x, y in DataLoader(rg.Indexed(TensorDataset(points(), labels())), batch_size=4):
            logits = model(x)
            J = rg.jacobian(F.cross_entropy(logits, y, reduction="none"), model)
            audit.update(index, losses=J.losses, norms=J.norms(), logits=logits, labels=y)
            optimizer.zero_grad()
            J.loss(1 / len(J)).backward()
            optimizer.step()
    equal(audit.compute(), audited().compute())


class Dicts(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        return {"x": points()[k], "y": labels()[k]}


def test_batches_of_dicts() -> None:
    audit, model = rg.Audit(N, CLASSES), build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for batch in DataLoader(rg.Indexed(Dicts()), batch_size=4):
            logits = model(batch["x"])
            J = rg.jacobian(F.cross_entropy(logits, batch["y"], reduction="none"), model)
            audit.update(batch["index"], losses=J.losses, norms=J.norms(), logits=logits, labels=batch["y"])
            optimizer.zero_grad()
            J.loss(1 / len(J)).backward()
            optimizer.step()
    equal(audit.compute(), audited().compute())


def test_without_norms_the_rest_is_the_same() -> None:
    audit, model = rg.Audit(N, CLASSES), build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for index, x, y in DataLoader(rg.Indexed(TensorDataset(points(), labels())), batch_size=4):
            logits = model(x)
            losses = F.cross_entropy(logits, y, reduction="none")
            audit.update(index, losses=losses, logits=logits, labels=y)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
    found, expected = audit.compute(), audited().compute()
    assert found.mean_norm is None
    none = dict.fromkeys(("mean_norm", "final_norm", "peak_norm", "peak_visit", "self_influence"))
    equal(found, dataclasses.replace(expected, **none))


class Tagger(nn.Module):
    """Words to words, with one table for both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 5)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.table(ids)) @ self.table.weight.T


def test_padded_sentences_are_as_each_by_itself() -> None:
    """`ignore_index` and padding: the audit is that of sentences of their own length, one backward pass for each."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 5, 1, 4, 2, 5])
    ids = torch.randint(7, (6, 5), generator=rng)
    targets = torch.randint(7, (6, 5), generator=rng).masked_fill(torch.arange(5) >= lengths[:, None], -100)
    padded, alone, model = rg.Audit(6), rg.Audit(6), Tagger()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for index, words, y in DataLoader(rg.Indexed(TensorDataset(ids, targets)), batch_size=3):
            tokens = F.cross_entropy(model(words).transpose(1, 2), y, reduction="none", ignore_index=-100)
            J = rg.jacobian(rg.per_example(tokens, y != -100), model)
            padded.update(index, losses=J.losses, norms=J.norms())
            for k in index.tolist():
                n = int(lengths[k])
                loss = F.cross_entropy(model(ids[k : k + 1, :n])[0], targets[k, :n])
                (row,) = torch.autograd.grad(loss, [*model.parameters()])
                alone.update(torch.tensor([k]), losses=loss[None], norms=row.norm()[None], lr=1 / len(index))
            optimizer.zero_grad()
            J.loss(1 / len(J)).backward()
            optimizer.step()
    equal(padded.compute(), alone.compute(), rtol=1e-6)


def test_accumulated_micro_batches_are_one_batch() -> None:
    audit, model = rg.Audit(N, CLASSES), build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for step, (index, x, y) in enumerate(DataLoader(rg.Indexed(TensorDataset(points(), labels())), batch_size=2)):
            logits = model(x)
            J = rg.jacobian(F.cross_entropy(logits, y, reduction="none"), model)
            audit.update(index, losses=J.losses, norms=J.norms(), logits=logits, labels=y, lr=1 / 2)
            (J.loss(1 / len(J)) / 2).backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
    equal(audit.compute(), audited().compute())


def test_autocast_and_a_scaler_that_skips_a_step() -> None:
    """The scale, a power of two, changes nothing; a step whose gradient overflows is skipped and its losses count.

    bfloat16 has 8 bits: against the loop without autocast the losses agree to a hundredth or so.
    """

    def trained(scaled: bool) -> rg.Audit:
        audit, model = rg.Audit(N, CLASSES), build().float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6, enabled=scaled)
        for epoch in range(3):
            for index, x, y in DataLoader(rg.Indexed(TensorDataset(points().float(), labels())), batch_size=4):
                skipped = epoch == 1 and 0 in index
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(x)
                    losses = F.cross_entropy(logits, y, reduction="none")
                J = rg.jacobian(losses, model)
                audit.update(index, losses=losses, norms=J.norms(), logits=logits, labels=y)
                optimizer.zero_grad()
                scaler.scale(J.loss(1 / len(J))).backward()
                if skipped:
                    next(model.parameters()).grad[0, 0] = torch.inf
                if scaled or not skipped:
                    scaler.step(optimizer)
                scaler.update()
        return audit

    equal(trained(True).compute(), trained(False).compute())
    # without autocast, but with the same step left out
    found, plain = trained(True).compute(), audited(skip=(1, 0)).compute()
    torch.testing.assert_close(found.mean_loss, plain.mean_loss, rtol=0.03, atol=0.01)
    torch.testing.assert_close(found.mean_norm, plain.mean_norm, rtol=0.03, atol=0.01)
    assert not torch.equal(found.mean_loss, plain.mean_loss)


def test_float16_whose_scale_is_too_large_at_first() -> None:
    """The scaler skips steps and lowers its scale; the audit leaves the same batches' overflows out and goes on."""
    audit, model = rg.Audit(N, CLASSES), build().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler, scales = torch.amp.GradScaler("cpu", init_scale=2.0**24), [2.0**24]

    def epoch() -> None:
        for index, x, y in DataLoader(rg.Indexed(TensorDataset(points().float(), labels())), batch_size=4):
            with torch.autocast("cpu", torch.float16):
                logits = model(x)
                losses = F.cross_entropy(logits, y, reduction="none")
            J = rg.jacobian(losses, model, loss_scale=scaler.get_scale())
            audit.update(index, losses=losses, norms=J.norms(), logits=logits, labels=y, lr=0.1)
            optimizer.zero_grad()
            scaler.scale(J.loss(1 / len(J))).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())

    with pytest.warns(RowgradWarning, match="its norms are not finite.*usual under a GradScaler"):
        epoch()
    for _ in range(5):
        epoch()  # without a further word
    n_skipped = len(set(scales)) - 1
    assert 0 < audit.skipped <= 4 * n_skipped
    scores = audit.compute()
    assert scores.times_seen.sum() == 6 * N - audit.skipped
    assert scores.mean_norm.isfinite().all()
    assert scores.self_influence.isfinite().all()


@pytest.mark.parametrize("what", ["audit", "flips", "refusals", "overflow"])
def test_two_processes_hold_the_audit_of_one(what: str) -> None:
    run_on_two_processes(what, "tests.uses.auditing")


def test_gathering_needs_processes() -> None:
    with pytest.raises(InputError, match=r"gather=True needs torch.distributed.init_process_group"):
        rg.Audit(N, CLASSES, gather=True)


@pytest.mark.parametrize("calibrate", [0.0, 0.25])
def test_planted_labels_are_those_that_are_trained_on(calibrate: float) -> None:
    scores = audited(calibrate=calibrate).compute()
    changed = scores.given != labels()
    assert int(changed.sum()) == round(calibrate * N)
    assert (scores.planted is None) is (calibrate == 0)
