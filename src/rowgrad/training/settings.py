"""How the audit's model is trained, with defaults by the size of the data."""

import math
from dataclasses import dataclass

from rowgrad.errors import InputError

EPOCHS, MIN_EPOCHS, MANY = 40, 8, 20_000
MIN_BATCH, MID_BATCH, MAX_BATCH = 16, 64, 1024


@dataclass(frozen=True)
class Settings:
    """Training of a multilayer perceptron by Adam.

    epochs: passes over the audited examples; None takes 40, and beyond 20,000 examples fewer, by the square root of
        their number (13 for 200,000), but at least 8.
    batch_size: examples per step; None takes a tenth of the examples (a power of two from 16 to 64), and beyond
        128,000 examples a two-thousandth (at most 1024).
    lr: learning rate of Adam; a first layer of more than 32 inputs takes 32/inputs of it.
    hidden: width of each hidden layer.
    dropout: share of hidden units left out in a step; it slows the learning by heart of single labels.
    seed: of the split, the planted errors, the initialization and the order of the examples.
    """

    epochs: int | None = None
    batch_size: int | None = None
    lr: float = 3e-3
    hidden: tuple[int, ...] = (128, 128)
    dropout: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 1:
            raise InputError(f"--epochs {self.epochs}: at least one epoch is needed")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: at least one example per step is needed")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"--lr {self.lr:g}: the learning rate must be a positive number")
        if not 0 <= self.dropout < 1:
            raise InputError(f"--dropout {self.dropout:g}: the share must be at least 0 and below 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed}: the seed must be at least 0 and below 2**63")
        if any(width < 1 for width in self.hidden):
            raise InputError(f"--hidden {','.join(map(str, self.hidden))}: every layer needs a width of at least 1")

    def epochs_for(self, n: int) -> int:
        """The epochs for n examples."""
        if self.epochs is not None:
            return self.epochs
        return max(MIN_EPOCHS, round(EPOCHS * min(1, math.sqrt(MANY / n))))

    def batch_size_for(self, n: int) -> int:
        """The batch size for n examples."""
        if self.batch_size is not None:
            return min(self.batch_size, n)
        few = _power_of_two(n / 10, MIN_BATCH, MID_BATCH)
        return min(n, max(few, _power_of_two(n / 2000, 1, MAX_BATCH)))


def _power_of_two(size: float, low: int, high: int) -> int:
    """The power of two nearest to `size` in ratio, between `low` and `high`."""
    return max(low, min(high, 2 ** round(math.log2(max(size, 1)))))
