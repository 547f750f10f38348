"""`rowgrad.Monitor`: findings over time, records, the log, what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.diagnosis.healthy import HEALTHY, batches, losses_of, made
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.diagnosis.history import read_log
from rowgrad.errors import NotAVectorError, ParameterError

F64 = torch.float64


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).double()


def train(monitor: rg.Monitor, model: nn.Module, optimizer: torch.optim.Optimizer, n: int, batch: int = 12) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        x = torch.randn(batch, 4, dtype=F64, generator=generator)
        losses = F.cross_entropy(model(x), (x[:, 0] > 0).long(), reduction="none")
        monitor.observe(losses)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        monitor.update()


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_training_is_found_healthy(name: str) -> None:
    model, optimizer = made(name, 1)
    monitor = rg.Monitor(model, optimizer, every=3, window=3, initial=True)
    for x, y in list(batches(0))[:20]:
        losses = losses_of(model, x, y)
        monitor.observe(losses)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        monitor.update()
    assert monitor.ok, str(monitor)
    assert [r["step"] for r in monitor.records] == list(range(0, 20, 3))
    assert (monitor.no_norms is None) == ("BatchNorm" not in name)


def test_the_update_is_that_of_the_real_step() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    monitor = rg.Monitor(model, optimizer, every=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(monitor, model, optimizer, 1)
    expected = {n: float((p.detach() - before[n]).norm() / before[n].norm()) for n, p in model.named_parameters()}
    assert monitor.records[0]["updates"] == pytest.approx({n: expected[n] for n in ("0.weight", "2.weight")})


def test_norms_and_noise_scale_are_those_of_the_examples_gradients() -> None:
    model = net()
    monitor = rg.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1)
    losses = F.cross_entropy(model(torch.randn(40, 4, dtype=F64)), torch.randint(3, (40,)), reduction="none")
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(t, model.parameters(), retain_graph=True)])
            for t in losses
        ]
    )
    monitor.observe(losses)
    monitor.update()
    record = monitor.records[0]
    norms = rows.norm(dim=1)
    assert record["norms"]["median"] == pytest.approx(float(norms.quantile(0.5)))
    assert (record["norms"]["min"], record["norms"]["max"]) == pytest.approx((float(norms.min()), float(norms.max())))
    trace = float(rows.var(0).sum())
    sq_gradient = float(rows.mean(0).square().sum()) - trace / 40
    assert record["noise_scale"] == pytest.approx(trace / sq_gradient)
    assert monitor.noise_scale == record["noise_scale"]


def test_the_curves_are_those_of_diagnose() -> None:
    model = net()
    monitor = rg.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1)
    losses = F.cross_entropy(model(torch.randn(9, 4, dtype=F64)), torch.randint(3, (9,)), reduction="none")
    curves = rg.diagnose(losses, model).curves
    monitor.observe(losses)
    monitor.update()
    for point in curves:
        sizes = {"activation": point.activation, "cotangent": point.cotangent, "gradient": point.gradient}
        assert monitor.records[0]["layers"][point.layer.name] == pytest.approx(sizes)


def test_observing_leaves_everything_as_it_was(leaves_nothing_behind) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(9, 4, dtype=F64), torch.randint(3, (9,))
    monitor = rg.Monitor(model, optimizer, every=1)
    for _ in range(2):
        losses = F.cross_entropy(model(x), y, reduction="none")
        with leaves_nothing_behind(model, losses):
            monitor.observe(losses)
        losses.mean().backward()
        optimizer.step()
        with leaves_nothing_behind(model):
            monitor.update()


def test_a_training_with_a_monitor_is_the_same_training() -> None:
    weights = []
    for every in (1, 10**9):
        torch.manual_seed(0)
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        train(rg.Monitor(model, optimizer, every=every), model, optimizer, 5)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_units_that_are_dead_for_a_window_and_whose_weights_stand_still() -> None:
    model = net()
    with torch.no_grad():
        model[0].bias[:8] = -100
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)  # shrinks them, but does not turn them
    monitor = rg.Monitor(model, optimizer, every=2, window=4)
    train(monitor, model, optimizer, 9)
    (seen,) = (s for s in monitor.findings if s.finding.kind == "dead")
    assert seen.first == 8  # the fifth observation closes the first window
    assert seen.finding.value == 0.5
    assert "8 of 16 units were 0 for each of 60 examples (0, 1, 2, 3, 4 and 3 more)" in seen.finding.evidence
    assert "have not moved" in seen.finding.evidence


def test_silent_units_whose_weights_move_are_not_dead_yet() -> None:
    model = net()
    with torch.no_grad():
        model[0].bias[:8] = -100
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = rg.Monitor(model, optimizer, every=1, window=3)
    for _ in range(8):
        train(monitor, model, optimizer, 1)
        with torch.no_grad():
            model[0].weight[:8] += 0.1 * torch.randn(8, 4, dtype=F64)
    assert not [s for s in monitor.findings if s.finding.kind == "dead"]


def test_drift_from_window_to_window() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = rg.Monitor(model, optimizer, every=1, window=3)
    train(monitor, model, optimizer, 3)
    with torch.no_grad():
        model[0].bias += 200
    train(monitor, model, optimizer, 2)
    (seen,) = (s for s in monitor.findings if s.finding.kind == "drift")
    assert (seen.first, seen.finding.where) == (3, "the input of 2")
    assert seen.finding.value > 20


@pytest.mark.parametrize("rate", [1e-7, 30.0])
def test_steps_of_the_wrong_size_are_found_once_five_were_seen(rate: float) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    monitor = rg.Monitor(model, optimizer, every=1)
    train(monitor, model, optimizer, 4)
    assert not [s for s in monitor.findings if s.finding.kind == "update"]
    train(monitor, model, optimizer, 3)
    (seen,) = (s for s in monitor.findings if s.finding.kind == "update")
    assert (seen.first, seen.times) == (4, 3)
    usual = [r["updates"] for r in monitor.records[2:]]
    middle = {n: sorted(u[n] for u in usual)[2] for n in usual[0]}
    assert seen.finding.value == pytest.approx(sum(middle.values()) / 2)


def test_a_warm_up_from_zero_is_no_finding() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monitor = rg.Monitor(model, optimizer, every=1)
    for k in range(8):
        optimizer.param_groups[0]["lr"] = 0.05 * k / 8
        train(monitor, model, optimizer, 1)
    assert monitor.ok, str(monitor)


def test_nan_losses_are_found_at_any_step_once_and_where_they_began() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = rg.Monitor(model, optimizer, every=50)
    train(monitor, model, optimizer, 7)
    x = torch.randn(6, 4, dtype=F64)

    def losses() -> Tensor:
        return model(x).log().sum(1)

    (finding,) = monitor.observe(losses())
    assert (finding.kind, finding.where) == ("not finite", "after 2: log")
    assert f"{int((model(x) <= 0).sum())} entries of its argument" in finding.evidence
    assert monitor.observe(losses()) == ()
    monitor.observe(model(x).square().sum(1))
    assert len(monitor.observe(losses())) == 1  # another one
    (seen,) = monitor.findings
    assert (seen.first, seen.last, seen.times) == (7, 10, 2)
    assert [r["step"] for r in monitor.records] == [0, 7, 10]


def test_a_gradient_that_is_not_finite_behind_finite_losses() -> None:
    model = net()
    monitor = rg.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1)
    (finding,) = monitor.observe((0 * model(torch.randn(6, 4, dtype=F64))).sqrt().sum(1))
    assert finding.where == "after 2: sqrt"


def test_what_stays_as_it_was_built_is_said_at_the_first_observation() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.05)
    monitor = rg.Monitor(model, optimizer, every=2)
    train(monitor, model, optimizer, 5)
    seen = {s.finding.kind: s for s in monitor.findings}
    assert {"unused", "bias before BatchNorm", "mixed"} <= set(seen)
    assert (seen["unused"].times, seen["unused"].finding.value) == (1, 4)
    assert "depends on others" in monitor.no_norms
    assert monitor.records[0]["norms"] is None


def test_scalar_losses_have_no_norms() -> None:
    model = net()
    monitor = rg.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1)
    monitor.observe(model(torch.randn(6, 4, dtype=F64)).square().mean())
    assert "a scalar" in monitor.no_norms


# Log


def test_the_log_is_one_line_for_each_observation(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / "run.jsonl"
    monitor = rg.Monitor(model, optimizer, every=2, log=path)
    train(monitor, model, optimizer, 5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[1]["updates"]["0.weight"] > 0
    assert read_log(path) == monitor.records


def test_a_log_that_was_cut_short_is_continued(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / "run.jsonl"
    train(rg.Monitor(model, optimizer, every=1, log=path), model, optimizer, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    monitor = rg.Monitor(model, optimizer, every=1, log=path)
    assert [r["step"] for r in monitor.records] == [0, 1]
    monitor.step = 2
    train(monitor, model, optimizer, 2)
    assert [r["step"] for r in read_log(path)] == [0, 1, 2, 3]
    assert [r["step"] for r in monitor.records] == [0, 1, 2, 3]


def test_numbers_that_are_not_finite_survive_the_log(tmp_path: Path) -> None:
    model = net()
    path = tmp_path / "run.jsonl"
    monitor = rg.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1, log=path)
    monitor.observe(model(torch.randn(6, 4, dtype=F64)).sum(1) * float("inf"))
    (record,) = read_log(path)
    assert record["loss"] != record["loss"] or record["loss"] in (float("inf"), -float("inf"))
    assert record["findings"][0]["value"] != record["findings"][0]["value"]
    json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))


class Recorder:
    """Stands for a SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.texts: list[tuple[str, str, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.setdefault(tag, []).append((step, value))

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, text, step))


def test_a_writer_is_given_finite_scalars_and_findings() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[1:] = model[0].weight[:1]
        model[0].bias.zero_()
        model[2].weight[:] = model[2].weight[:, :1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    writer = Recorder()
    monitor = rg.Monitor(model, optimizer, every=2, writer=writer)
    train(monitor, model, optimizer, 5)
    assert [step for step, _ in writer.scalars["rowgrad/loss"]] == [0, 2, 4]
    assert writer.scalars["rowgrad/cotangent/0"][1][1] == monitor.records[1]["layers"]["0"]["cotangent"]
    assert {"rowgrad/norms/median", "rowgrad/noise_scale", "rowgrad/update/0.weight"} <= set(writer.scalars)
    assert all(v == v and abs(v) < float("inf") for column in writer.scalars.values() for _, v in column)
    assert writer.texts[0][0] == "rowgrad/symmetric"


def test_a_writer_is_given_no_number_that_is_not_finite() -> None:
    model, writer = net(), Recorder()
    monitor = rg.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1, writer=writer)
    monitor.observe(model(torch.randn(6, 4, dtype=F64)).log().sum(1))
    assert "rowgrad/loss" not in writer.scalars
    assert writer.texts[0][::2] == ("rowgrad/not finite", 0)


def test_an_observation_without_an_update_is_recorded_at_the_next() -> None:
    model = net()
    monitor = rg.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), every=2)
    for _ in range(2):
        monitor.observe(model(torch.randn(6, 4, dtype=F64)).square().sum(1))
    assert [(r["step"], r["updates"]) for r in monitor.records] == [(0, {})]


# Bad input


def test_errors_say_what_was_found() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="every=0, norms_every=4, window=20: expected whole numbers from 1 up"):
        rg.Monitor(model, optimizer, every=0)
    with pytest.raises(ParameterError, match="optimizer is a float"):
        rg.Monitor(model, 0.1)
    with pytest.raises(ParameterError, match="writer is a str"):
        rg.Monitor(model, optimizer, writer="runs")
    with pytest.raises(NotAVectorError, match=r"losses has shape \(6, 3\)"):
        rg.Monitor(model, optimizer).observe(model(torch.randn(6, 4, dtype=F64)))


def test_an_update_without_an_observation_says_nothing() -> None:
    model = net()
    monitor = rg.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert monitor.update() == ()
    assert monitor.records == []
    assert monitor.noise_scale != monitor.noise_scale
