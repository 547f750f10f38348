"""A loop that is stopped anywhere and resumed gives the same bits; a checkpoint gives back what it was given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from rowgrad.errors import InputError, NonFiniteError
from rowgrad.training.checkpoint import load_state, same, save_state
from rowgrad.training.loop import Loop, seed_of

N, BATCH = 22, 5  # the last batch of an epoch is smaller


def make(optimizer: str = "adam", n: int = N, batch_size: int = BATCH, seed: int = 0) -> Loop:
    g = torch.Generator().manual_seed(7)
    x, y = torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))
    made = {
        "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True),
    }[optimizer](model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(made, 0.9)

    def losses(index: Tensor) -> Tensor:
        return F.cross_entropy(model(x[index]), y[index], reduction="none")

    return Loop(model, made, losses, n, batch_size, seed, scheduler)


def steps(loop: Loop, n: int, epochs: int = 3) -> list[Tensor]:
    found = []
    for losses in loop.run(epochs):
        found.append(losses)
        if len(found) == n:
            break
    return found


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop"])
@pytest.mark.parametrize("stop", [1, 4, 5, 7, 14])
def test_a_resumed_run_gives_the_same_bits(optimizer: str, stop: int, tmp_path: Path) -> None:
    whole = make(optimizer)
    losses = steps(whole, 100)
    assert len(losses) == 3 * 5
    first = make(optimizer)
    before = steps(first, stop)
    save_state(tmp_path / "c.safetensors", first.state_dict())
    torch.manual_seed(12345)  # the resumed run is another process, with other random numbers
    second = make(optimizer)
    with torch.no_grad():
        for p in second.model.parameters():
            p.normal_()
    second.load_state_dict(load_state(tmp_path / "c.safetensors"))
    assert same(before + steps(second, 100), losses)
    assert same(second.state_dict(), whole.state_dict())


def test_every_example_is_used_once_an_epoch_in_an_order_of_its_own() -> None:
    loop = make()
    orders = [loop.order(epoch) for epoch in range(3)]
    assert all(torch.equal(order.sort().values, torch.arange(N)) for order in orders)
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[1], make().order(1))
    assert not torch.equal(orders[1], make(seed=1).order(1))
    assert [len(losses) for losses in steps(loop, 5)] == [5, 5, 5, 5, 2]


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    loop = make()
    torch.set_rng_state(before)
    steps(loop, 6)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_schedule_steps_with_the_epochs() -> None:
    loop = make()
    steps(loop, 4)
    assert loop.optimizer.param_groups[0]["lr"] == 1e-2
    steps(loop, 2)
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(9e-3)
    assert (loop.epoch, loop.step) == (1, 6)


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    loop = make()
    steps(loop, 3)
    state = loop.state_dict()
    kept = {k: v.clone() for k, v in loop.model.state_dict().items() if "running" not in k and "num" not in k}
    good, loop.losses = loop.losses, lambda i: loop_losses(i) / 0
    loop_losses = good
    with pytest.raises(NonFiniteError, match=r"step 3: the loss of example \d+ is inf; the step was not taken"):
        steps(loop, 1)
    assert loop.step == state["step"] == 3
    assert all(torch.equal(v, loop.model.state_dict()[k]) for k, v in kept.items())


def test_a_state_of_another_run_is_refused() -> None:
    state = make().state_dict()
    with pytest.raises(InputError, match="the checkpoint is of a run with batch_size 5, this one has 4"):
        make(batch_size=4).load_state_dict(state)
    with pytest.raises(InputError, match="a run with n 22, this one has 21"):
        make(n=21).load_state_dict(state)
    with pytest.raises(ValueError, match="n=0, batch_size=5"):
        Loop(nn.Linear(1, 1), make().optimizer, lambda i: i, 0, 5)


def test_seeds_of_different_uses_differ() -> None:
    seeds = {seed_of(s, kind, number) for s in range(20) for kind in range(2) for number in range(200)}
    assert len(seeds) == 20 * 2 * 200
    assert all(0 <= s < 2**63 for s in seeds)


# Checkpoints

STATE: dict[str, Any] = {
    "numbers": [1, 2.5, -0.0, 1e300, True, None, "text"],
    "odd": (math.inf, -math.inf, (1, [2, ()])),
    "by number": {0: {"exp_avg": torch.randn(3, 2)}, 1: {"step": torch.tensor(5.0)}},
    "tensors": [torch.arange(3), torch.zeros(0, 4), torch.tensor(True), torch.randn(2).bfloat16(), torch.randn(2, 3).T],
    "": {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}},
}


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save_state(tmp_path / "s", STATE)
    found = load_state(tmp_path / "s")
    assert same(found, STATE)
    assert math.copysign(1, found["numbers"][2]) == -1
    save_state(tmp_path / "nan", {"nan": math.nan})
    assert math.isnan(load_state(tmp_path / "nan")["nan"])


def test_same_tells_what_differs() -> None:
    for a, b in [(1, 1.0), ([1], (1,)), ({"a": 1}, {"b": 1}), (torch.ones(2), torch.ones(2).double()), ("a", "b")]:
        assert not same(a, b)
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same(torch.tensor([math.nan]), torch.tensor([math.nan]))


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    save_state(path, {"a": torch.ones(2)})
    with pytest.raises(TypeError, match="state/b/0 is a set"):
        save_state(path, {"b": [{1, 2}]})
    with pytest.raises(TypeError, match=r"the key \(1, 2\) is a tuple"):
        save_state(path, {(1, 2): 3})  # pyright: ignore[reportArgumentType]

    def broken(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("rowgrad.training.checkpoint.os.fsync", broken)
    with pytest.raises(InputError, match=r"s: cannot be written \(disk full\); make room"):
        save_state(path, {"a": torch.zeros(2)})
    assert torch.equal(load_state(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint"):
        load_state(tmp_path / "none")
    (tmp_path / "text").write_text(json.dumps({"a": 1}))
    with pytest.raises(InputError, match="not a checkpoint, or a damaged one"):
        load_state(tmp_path / "text")
    save_file({"a": torch.ones(1)}, tmp_path / "plain")
    with pytest.raises(InputError, match="not a checkpoint of this version"):
        load_state(tmp_path / "plain")
    save_state(tmp_path / "good", STATE)
    data = (tmp_path / "good").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="damaged"):
        load_state(tmp_path / "cut")
