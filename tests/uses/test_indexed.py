"""Positions beside examples, for each kind of item and through a loader."""

from __future__ import annotations

from collections import UserDict, namedtuple

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import rowgrad as rg
from rowgrad.errors import InputError

Pair = namedtuple("Pair", "x y")

ITEMS = {
    "tuple": ((1.0, 2), (5, 1.0, 2)),
    "list": ([1.0, 2], (5, 1.0, 2)),
    "named tuple": (Pair(1.0, 2), (5, 1.0, 2)),
    "dict": ({"x": 1.0}, {"x": 1.0, "index": 5}),
    "other mapping": (UserDict(x=1.0), {"x": 1.0, "index": 5}),
    "anything else": ("text", (5, "text")),
}


@pytest.mark.parametrize("kind", ITEMS)
def test_each_kind_of_item(kind: str) -> None:
    item, expected = ITEMS[kind]
    data = rg.Indexed([None] * 5 + [item])
    assert data[5] == data[-1] == data[torch.tensor(5)] == data.__getitems__([5])[0] == expected
    assert type(data[5]) is type(expected)
    assert len(data) == 6
    with pytest.raises(IndexError, match="position 6 of a data set with 6 examples"):
        data[6]


def test_an_example_is_left_as_it_was() -> None:
    item = {"x": 1}
    assert rg.Indexed([item])[0] == {"x": 1, "index": 0}
    assert item == {"x": 1}


@pytest.mark.parametrize("n_workers", [0, 2])
def test_through_a_loader(n_workers: int) -> None:
    x = torch.randn(10, 3)
    loader = DataLoader(rg.Indexed(TensorDataset(x, torch.arange(10) * 2)), batch_size=4, num_workers=n_workers)
    seen = []
    for index, batch, labels in loader:
        assert index.dtype == torch.int64
        assert torch.equal(batch, x[index])
        assert torch.equal(labels, 2 * index)
        seen += index.tolist()
    assert seen == list(range(10))


def test_several_at_once_are_asked_for_at_once() -> None:
    class Several(list):
        def __getitems__(self, indices):
            return [f"{len(indices)} with {k}" for k in indices]

    loader = DataLoader(rg.Indexed(Several([None] * 4)), batch_size=2)
    assert [texts for _, texts in loader] == [("2 with 0", "2 with 1"), ("2 with 2", "2 with 3")]


def test_a_stream_is_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            yield 1

    for data in (Stream(), (k for k in range(3))):
        with pytest.raises(InputError, match="gives no examples by position"):
            rg.Indexed(data)


def test_a_key_that_is_taken_is_refused() -> None:
    with pytest.raises(InputError, match='already has the key "index"'):
        rg.Indexed([{"index": 3}])[0]
