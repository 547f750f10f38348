"""A table of weights from which positions are drawn in proportion, of any length, with cheap changes.

Note [no multinomial]: `torch.multinomial` takes at most 2^24 categories and reads all of them for every draw. Here the
table is cut into rows of 512 entries, their sums into rows of 512 again, up to one row; a draw reads one row a level (4
rows for 5 * 10^7 entries), a change writes one entry a level. Sums are made by the same cumulative sums, in float64,
that draws search, row by row: a changed tree and one built anew from the same table agree to the last bit.
"""

import torch
from torch import Tensor

FAN = 512
ROWS_AT_ONCE = 8192  # bounds the temporary memory of a build: 32 MiB


class SumTree:
    """Weights of shape (N,), float32, not negative; `total` is their sum."""

    def __init__(self, weights: Tensor) -> None:
        self.n = len(weights)
        self._levels = [_in_rows(weights)]
        while self._levels[-1].numel() > FAN:
            sums = torch.cat([_cumulative(rows)[:, -1] for rows in self._levels[-1].split(ROWS_AT_ONCE)])
            self._levels.append(_in_rows(sums))

    @property
    def weights(self) -> Tensor:
        """The table itself, shape (N,); change it by `write` alone."""
        return self._levels[0].view(-1)[: self.n]

    @property
    def total(self) -> float:
        return float(_cumulative(self._levels[-1])[0, -1])

    def write(self, index: Tensor, weights: Tensor) -> None:
        """Set entries; `index` of shape (B,) holds no position twice."""
        self._levels[0].view(-1)[index] = weights.to(torch.float32)
        for below, above in zip(self._levels, self._levels[1:], strict=False):
            index = (index // FAN).unique()
            above.view(-1)[index] = _cumulative(below[index])[:, -1]

    def find(self, shares: Tensor) -> Tensor:
        """The positions at which the cumulative sum, divided by the total, passes `shares` of [0, 1); both (B,)."""
        node, rest = torch.zeros(len(shares), dtype=torch.int64), shares.double() * self.total
        for level in reversed(self._levels):
            sums = _cumulative(level[node])
            # Rounding may leave a rest as large as the row's sum: the last entry that is not 0 takes it.
            rest = torch.minimum(rest, sums[:, -1].nextafter(torch.zeros((), dtype=torch.float64)))
            child = torch.searchsorted(sums, rest[:, None], right=True)
            before = sums.gather(1, (child - 1).clamp(min=0)).masked_fill(child == 0, 0.0)
            node, rest = node * FAN + child[:, 0], rest - before[:, 0]
        return node


def _in_rows(values: Tensor) -> Tensor:
    rows = values.new_zeros(max(1, -(-len(values) // FAN)), FAN)
    rows.view(-1)[: len(values)] = values
    return rows


def _cumulative(rows: Tensor) -> Tensor:
    return rows.double().cumsum(1)
