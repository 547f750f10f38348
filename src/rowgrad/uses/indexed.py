"""A data set whose examples say where they stand."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch.utils.data import Dataset, IterableDataset

from rowgrad.errors import InputError


class Indexed(Dataset):
    """A map-style data set that gives with each example its position, which `Audit.update` needs.

    A tuple (or list) becomes the tuple (index, *item); a mapping a dict with the further key "index"; anything else
    (index, item). Batches of PyTorch's default collation then hold the positions as an int64 tensor of shape (B,).

    Args:
        dataset: has `len` and gives items by position. Its `__getitems__`, if it has one, is used.
    Raises:
        InputError: it has no length or no positions, or a mapping already has the key "index".

    >>> Indexed([("a", 0), ("b", 1)])[1]
    (1, 'b', 1)
    >>> Indexed([{"text": "a"}])[0]
    {'text': 'a', 'index': 0}
    """

    def __init__(self, dataset: Any) -> None:
        has_positions = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if isinstance(dataset, IterableDataset) or not has_positions:
            raise InputError(
                f"{type(dataset).__name__} gives no examples by position; Indexed needs a data set with "
                "__getitem__ and __len__. Of a stream, yield a number with each example yourself"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        position = self._position(index)
        return _with_position(position, self.dataset[position])

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """Several examples at once, as a `DataLoader` asks for them."""
        positions = [self._position(index) for index in indices]
        several = getattr(self.dataset, "__getitems__", None)
        items = [self.dataset[position] for position in positions] if several is None else several(positions)
        return [_with_position(position, item) for position, item in zip(positions, items, strict=True)]

    def _position(self, index: Any) -> int:
        position = int(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of a data set with {len(self)} examples")
        return position % len(self)


def _with_position(position: int, item: Any) -> Any:
    if isinstance(item, Mapping):
        if "index" in item:
            raise InputError('an example already has the key "index"; rename it, or use it for the audit as it is')
        return dict(cast(Mapping[Any, Any], item)) | {"index": position}
    if isinstance(item, (tuple, list)):
        return (position, *item)
    return (position, item)
