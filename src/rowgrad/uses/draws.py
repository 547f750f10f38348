"""Positions that carry the weight of their draw from a sampler into the batch.

Note [weights at the draw]: the weight of a draw belongs to the probability at which it was drawn. Workers fetch batches
ahead, and the table of norms has changed by the time a batch arrives; a weight computed then would be biased. So each
position carries its weight, from the sampler through the data set and the workers into the batch, and with it whether
it was drawn by norms at all: a weight of 1 does not tell, where all scores are equal.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from rowgrad.errors import InputError
from rowgrad.uses.expected import is_whole


class DrawnIndex(int):
    """A position in the data set that carries its draw: the weight, the number in the epoch, whether by norms."""

    weight: float
    number: int
    by_norms: bool

    def __new__(cls, index: int, weight: float = 1.0, number: int = -1, by_norms: bool = False) -> "DrawnIndex":
        drawn = super().__new__(cls, index)
        drawn.weight, drawn.number, drawn.by_norms = weight, number, by_norms
        return drawn


class Draw(NamedTuple):
    """The draws of a batch, each (B,): positions in the data set, weights (float32), numbers in the epoch, and whether
    the draw was by norms (or scores) rather than from a shuffle."""

    index: Any
    weight: Any
    number: Any
    by_norms: Any = False


class Weighted(Dataset):
    """A data set whose items are pairs (item, draw); batches become (batch, draw), and `draw.weight` has shape (B,).

    Items may be anything, also dicts. A `collate_fn` of yours goes here instead of into the DataLoader:
    `DataLoader(data, sampler=sampler, collate_fn=data.collate)`.

    Args:
        dataset: with positions 0 to N - 1 and a length; its `__getitems__` is used where there is one.
        collate_fn: makes a batch of a list of items; PyTorch's default without it.
    Raises:
        IndexError: a position is none of the data set, as when a sampler was made for a larger one.
        InputError: the sampler's batches came as positions, or its positions as batches.

    >>> import torch, rowgrad
    >>> data = rowgrad.Weighted(torch.utils.data.TensorDataset(torch.arange(6.0)))
    >>> sampler = rowgrad.NormSampler(len(data))
    >>> (x,), draw = next(iter(torch.utils.data.DataLoader(data, batch_size=3, sampler=sampler)))
    >>> bool((x == draw.index).all()), draw.weight
    (True, tensor([1., 1., 1.]))
    """

    def __init__(self, dataset: Any, collate_fn: Any = None) -> None:
        self.dataset, self._collate_fn = dataset, collate_fn

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Draw]:
        draw = self._draw(index)
        return self.dataset[draw.index], draw

    def __getitems__(self, indices: Iterable[int]) -> list[tuple[Any, Draw]]:
        if not isinstance(indices, Iterable):
            raise InputError(
                f"a batch is the position {indices!r}: the sampler gives single examples, as NormSampler does; use "
                "DataLoader(..., batch_size=..., sampler=sampler), not batch_sampler="
            )
        draws = [self._draw(index) for index in indices]
        plain = [draw.index for draw in draws]
        together = getattr(self.dataset, "__getitems__", None)
        items = [self.dataset[index] for index in plain] if together is None else together(plain)
        return list(zip(items, draws, strict=True))

    def collate(self, items: Sequence[tuple[Any, Draw]]) -> tuple[Any, Draw]:
        """A batch (batch, draw) of a list of items, the first part of it by `collate_fn`."""
        collate = self._collate_fn or torch.utils.data.default_collate
        return collate([item for item, _ in items]), torch.utils.data.default_collate([draw for _, draw in items])

    def _draw(self, index: Any) -> Draw:
        if not is_whole(index):
            raise InputError(
                f"a position is {index!r}: the sampler gives whole batches, as PoolSampler does; use "
                "DataLoader(..., batch_sampler=sampler), not sampler="
                if isinstance(index, (list, tuple))
                else f"a position is {index!r}; expected a whole number"
            )
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"position {int(index)} of a data set of {len(self)} examples, in rg.Weighted; make the sampler for as "
                "many, rg.NormSampler(len(dataset))"
            )
        drawn = index if isinstance(index, DrawnIndex) else DrawnIndex(index)
        weight = torch.tensor(drawn.weight, dtype=torch.float32)
        return Draw(int(drawn) % len(self), weight, drawn.number, drawn.by_norms)
