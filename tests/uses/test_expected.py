"""States that were damaged: each entry of each class that has a state is refused by name, and nothing is loaded."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rowgrad as rg
from rowgrad import uses
from rowgrad.errors import InputError
from rowgrad.uses.draws import Draw
from rowgrad.uses.expected import described, vector, whole

N = 12
NORMS = torch.arange(1.0, N + 1)


def used(kind: str, n_batches: int = 10, **options: Any) -> Any:
    """An object of the class after some updates, in the middle of an epoch."""
    if kind == "NoiseScale":
        found = rg.NoiseScale(**options)
        for k in range(n_batches):
            found.update(norms=NORMS + k, mean_norm=6.0)
        return found
    if kind == "RunningQuantile":
        found = rg.RunningQuantile(**options)
        for k in range(n_batches):
            found.update(NORMS + k)
        return found
    options = {"switch": None, **options}
    if kind == "NormSampler":
        found = rg.NormSampler(N, **options)
        batches = torch.utils.data.BatchSampler(found, 4, False)
    else:
        found = batches = uses.PoolSampler(N, lambda index: NORMS[index], batch_size=4, **options)
    done = 0
    while True:
        for drawn in batches:
            if done == n_batches:
                return found
            parts = (
                [int(i) for i in drawn],
                *([getattr(i, a) for i in drawn] for a in ("weight", "number", "by_norms")),
            )
            draw = Draw(*map(torch.tensor, parts))
            found.update(draw, NORMS[draw.index], grad_norm=1.0)
            done += 1


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a


KINDS = ("NormSampler", "PoolSampler", "NoiseScale", "RunningQuantile")
ENTRIES = [(kind, name) for kind in KINDS for name in used(kind).state_dict()]
SUMS = [
    ("NoiseScale", which, name) for which in ("running", "total") for name in used("NoiseScale").state_dict()[which]
]


def damages(value: Any) -> list[Any]:
    """What an entry must not be: another type, and by its own type out of shape, out of range or not finite."""
    found: list[Any] = [torch.ones(2, 2, 2, dtype=torch.complex64), object(), b"1"]
    found += [] if value is None else [None]
    found += [] if isinstance(value, bool) else [True]
    if isinstance(value, str):
        return [*found, value + "x"]
    if isinstance(value, bool):
        return [*found, 1, "True"]
    if isinstance(value, (int, float)):
        return [*found, -5, str(value), math.inf] + ([] if value != value or isinstance(value, float) else [math.nan])
    if isinstance(value, Tensor):
        found += [value[:-1] if value.ndim == 1 else value.T, value[None], value.short(), value.tolist(), value - 2000]
        if value.is_floating_point():
            found += [value * math.nan, value * math.inf, value.index_fill(-1, torch.tensor(0), math.nan)]
        return found
    if isinstance(value, dict):
        return [*found, {}, {**value, "x": 1.0}]
    if isinstance(value, list):
        return [*found, [None], [value[0] * math.nan], [value[0] - 100], [value[0].float()], value[0]]
    return [*found, 1]


def refused(kind: str, damaged: Any, name: str) -> None:
    fresh = used(kind, 4)
    before = fresh.state_dict()
    with pytest.raises(InputError, match=name):
        fresh.load_state_dict(damaged)
    assert same(before, fresh.state_dict()), f"{name} was refused after something was loaded"


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_a_damaged_entry_is_refused_by_name(kind: str, name: str) -> None:
    state = used(kind).state_dict()
    refused(kind, {k: v for k, v in state.items() if k != name}, name)
    for damage in damages(state[name]):
        refused(kind, state | {name: damage}, name)


@pytest.mark.parametrize(("kind", "which", "name"), SUMS)
def test_a_damaged_sum_is_refused_by_name(kind: str, which: str, name: str) -> None:
    state = used(kind).state_dict()
    refused(kind, state | {which: {k: v for k, v in state[which].items() if k != name}}, name)
    for damage in (None, "a", math.nan, math.inf, [1.0]):
        refused(kind, state | {which: state[which] | {name: damage}}, f"{which}: the state's {name}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", [None, [], 3, {}, "state"])
def test_what_is_no_state_is_refused(kind: str, state: Any) -> None:
    refused(kind, state, r"state_dict\(\) gave")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_a_state_of_another_class_is_refused(kind: str, other: str) -> None:
    if kind != other:
        refused(kind, used(other).state_dict(), "kind")


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_that_is_not_ours_is_refused(kind: str) -> None:
    refused(kind, used(kind).state_dict() | {"epochs": 3}, "'epochs', which is none of kind")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("NormSampler", {"mix": 0.2}),
        ("NormSampler", {"decay": 0.5}),
        ("NormSampler", {"max_weight": 3}),
        ("NormSampler", {"switch": (1.5, 1.0)}),
        ("NormSampler", {"window": 20}),
        ("NormSampler", {"rank": 1, "num_replicas": 2}),
        ("NormSampler", {"draws": 8}),
        ("PoolSampler", {"pool": 10}),
        ("PoolSampler", {"mix": 0.2}),
    ],
)
def test_options_that_would_change_the_draws_are_compared(kind: str, options: dict[str, Any]) -> None:
    """What was drawn with other options would not go on as without the stop."""
    made = used(kind, 1, **options)
    before = made.state_dict()
    with pytest.raises(InputError, match=r"the state's \w+ is .*, as here; make it with the options of the state"):
        made.load_state_dict(used(kind).state_dict())
    assert same(before, made.state_dict())
    made.load_state_dict(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_went_through_a_file_goes_on_and_is_a_copy(kind: str) -> None:
    file = io.BytesIO()
    state = used(kind).state_dict()
    torch.save(state, file)
    file.seek(0)
    fresh = used(kind, 1)
    read = torch.load(file, weights_only=True)
    fresh.load_state_dict(read)
    assert same(fresh.state_dict(), state)
    for value in read.values():
        if isinstance(value, Tensor):
            value.zero_()
    assert same(fresh.state_dict(), state)


def test_more_draws_than_an_epoch_has_are_refused() -> None:
    state = used("NormSampler").state_dict()
    refused("NormSampler", state | {"done": N}, "waiting holds 8 draws, with 12 done already")


def test_what_was_found_is_shown() -> None:
    assert described(torch.tensor([1.0, -2.0])) == "a tensor of float32 and shape (2,), from -2 to 1"
    assert described(torch.ones(0, 3)) == "a tensor of float32 and shape (0, 3)"
    assert described((1.0, "a")) == "(1.0, 'a')"
    assert described([1]) == "a list"
    assert whole(0, 0).fits(0)
    assert not whole(0, 0).fits(1)
    with pytest.raises(InputError, match=r"of shape \(B,\), one real number for each example; got a tensor of bool"):
        vector("norms", torch.tensor([True]))
