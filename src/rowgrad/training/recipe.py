"""All that a training depends on besides its data: the options of `rowgrad train`, checked and resolved."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import isfinite
from typing import Any

from rowgrad.errors import InputError
from rowgrad.layers.hidden import NORMS
from rowgrad.layers.initialization import SCHEMES

INITS = (*SCHEMES, "pretrain")
BATCH_SIZES = (32, 256)  # powers of two between which the default lies
MIN_STEPS = 20  # in an epoch, as long as the smallest batch allows
RATES = {"sgd": 0.1, "momentum": 0.05, "nesterov": 0.05, "adagrad": 0.01, "rmsprop": 1e-3, "rmsprop-nesterov": 1e-3}


@dataclass(frozen=True)
class Recipe:
    """How to train. Every field is an option of `rowgrad train`.

    Attributes:
        model: see `rowgrad.training.architectures.build`.
        act, alpha, norm, dropout: of its hidden layers.
        init: how its weights begin: drawn by a scheme of `rowgrad.layers.initialize`, or "pretrain", each hidden layer
            as an autoencoder of the training part (`rowgrad.layers.pretrain`); None as PyTorch draws them.
        optimizer, lr: by name, see `rowgrad.optim.make`; lr None takes one that suits the optimizer.
        decay, decay_rate: of the rate by the epoch, "exponential" or "inverse"; None keeps it.
        l2: penalty on weights, not on biases and norms.
        clip_norm, clip_value: bounds on the gradient of a batch; None does not clip.
        prepare: "none", "center", "standardize" or "whiten".
        batch_size: None takes a power of two from 32 to 256 by the number of examples.
        epochs: at most.
        val: share of the examples that are held out, to stop early and to choose the epoch.
        patience: epochs without a better validation loss after which training stops; 0 never stops.
        seed: of everything random.
    """

    model: str = "mlp:64,64"
    act: str = "relu"
    alpha: float | None = None
    norm: str = "none"
    dropout: float = 0.0
    init: str | None = None
    optimizer: str = "adam"
    lr: float | None = None
    decay: str | None = None
    decay_rate: float = 0.01
    l2: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    prepare: str = "standardize"
    batch_size: int | None = None
    epochs: int = 100
    val: float = 0.2
    patience: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("val", 0, 1), ("dropout", 0, 1)):
            if not low <= getattr(self, name) < high:
                raise InputError(f"--{name} {getattr(self, name):g}: a share of at least 0 and below 1")
        for name in ("lr", "decay_rate", "l2", "clip_norm", "clip_value"):
            value = getattr(self, name)
            least = value is not None and (value < 0 if name in {"decay_rate", "l2"} else value <= 0)
            if value is not None and (least or not isfinite(value)):
                raise InputError(f"--{name.replace('_', '-')} {value:g}: expected a positive number")
        for name, low in (("epochs", 1), ("patience", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise InputError(f"--{name} {getattr(self, name)}: at least {low}")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: at least 1")
        if self.norm not in NORMS:
            raise InputError(f"--norm {self.norm}: there are {', '.join(NORMS)}")
        if self.init is not None and self.init not in INITS:
            raise InputError(f"--init {self.init}: there are {', '.join(INITS)}")
        if self.patience and not self.val:
            raise InputError("--patience needs examples held out: give --val a share, or set --patience 0")

    @property
    def kind(self) -> str:
        """Of the model: `mlp` for `mlp:64,64`."""
        return self.model.partition(":")[0]

    @property
    def rate(self) -> float | None:
        """The learning rate; None leaves it to the optimizer."""
        if self.lr is not None:
            return self.lr
        return RATES.get(self.optimizer, 1e-3 if self.optimizer.endswith("adam") else None)

    def batch_size_for(self, n: int) -> int:
        """The batch size for n training examples."""
        if self.batch_size is not None:
            return min(self.batch_size, n)
        size, largest = BATCH_SIZES
        while size * 2 <= min(largest, n // MIN_STEPS):
            size *= 2
        return min(size, n)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Options that differ, as `--lr 0.1 instead of 0.01`."""
    old, new = a.to_dict(), b.to_dict()
    return [f"--{k.replace('_', '-')} {new[k]} instead of {old[k]}" for k in old if old[k] != new[k]]
