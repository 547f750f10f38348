"""All that a training depends on besides its data: the options of `rowgrad train`, checked and resolved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from rowgrad.errors import InputError
from rowgrad.layers.activations import ACTIVATIONS
from rowgrad.layers.hidden import NORMS
from rowgrad.layers.initialization import SCHEMES
from rowgrad.optim.factory import OPTIMIZERS, SECOND_ORDER
from rowgrad.optim.rates import DECAYS
from rowgrad.training.architectures import KINDS

INITS = (*SCHEMES, "pretrain")
CLIP_MODES = ("norm", "normalize")
BN_STATISTICS = ("running", "population")
REMEMBERING = ("bfgs", "lbfgs")  # optimizers whose steps build on the curvature seen in earlier ones
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
        optimizer_options: the optimizer's other options by name, such as {"momentum": 0.95} or {"eps_inside": True}.
        l2: penalty on weights, not on biases and norms.
        clip_norm, clip_value: bounds on the gradient of a batch; None does not clip.
        clip_mode: "norm": clip_norm caps the norm; "normalize": every gradient is given that norm.
        bn_statistics: what batch normalization uses outside training: "running" averages over the batches, or the
            "population" statistics of the training part, taken anew after each epoch.
        prepare: see `rowgrad.data.preparation.prepare`.
        batch_size: None takes a power of two from 32 to 256 by the number of examples; with an optimizer of second
            order the whole training part, so that an epoch is one step.
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
    clip_mode: str = "norm"
    clip_value: float | None = None
    bn_statistics: str = "running"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
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
                expected = "number of at least 0" if name in {"decay_rate", "l2"} else "positive number"
                raise InputError(f"--{name.replace('_', '-')} {value:g}: expected a {expected}")
        for name, low in (("epochs", 1), ("patience", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise InputError(f"--{name} {getattr(self, name)}: at least {low}")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: at least 1")
        for name, known in (("act", (*ACTIVATIONS, "maxout")), ("norm", NORMS), ("optimizer", tuple(OPTIMIZERS))):
            if getattr(self, name) not in known:
                raise InputError(f"--{name} {getattr(self, name)}: there are {', '.join(known)}")
        if self.kind not in KINDS:
            raise InputError(f"--model {self.model}: {self.kind!r} is no kind of model; there are {', '.join(KINDS)}")
        if self.alpha is not None and self.act != "leaky_relu":
            raise InputError(f"--alpha {self.alpha:g}: is the slope of --act leaky_relu, not of {self.act}")
        if self.init is not None and self.init not in INITS:
            raise InputError(f"--init {self.init}: there are {', '.join(INITS)}")
        if self.patience and not self.val:
            raise InputError("--patience needs examples held out: give --val a share, or set --patience 0")
        if self.decay is not None and self.decay not in DECAYS:
            raise InputError(f"--decay {self.decay}: there are {', '.join(DECAYS)}")
        if self.decay is None and self.decay_rate != Recipe.decay_rate:
            raise InputError(f"--decay-rate {self.decay_rate:g} needs --decay: one of {', '.join(DECAYS)}")
        if self.clip_mode not in CLIP_MODES:
            raise InputError(f"--clip-mode {self.clip_mode}: there are {', '.join(CLIP_MODES)}")
        if self.clip_mode != "norm" and self.clip_norm is None:
            raise InputError(f"--clip-mode {self.clip_mode} needs the norm: give --clip-norm")
        for name, option in (("lr", "--lr"), ("weight_decay", "--l2")):
            if name in self.optimizer_options:
                raise InputError(f"--optimizer-option {name}: give it as {option}")
        self._check_batch_norm()
        if self.is_second_order:
            self._check_second_order()

    def _check_batch_norm(self) -> None:
        if self.bn_statistics not in BN_STATISTICS:
            raise InputError(f"--bn-statistics {self.bn_statistics}: there are {', '.join(BN_STATISTICS)}")
        if not self.has_batch_norm and self.bn_statistics != "running":
            raise InputError(
                f"--bn-statistics {self.bn_statistics} needs batch normalization: give --norm batch-pre or batch-post"
            )
        if self.has_batch_norm and self.batch_size == 1:
            raise InputError(f"--batch-size 1 with --norm {self.norm}: one example has no variance; at least 2")

    def _check_second_order(self) -> None:
        """Refuse what does not fit a loss that is computed several times a step, and gradients that are not kept."""
        name = self.optimizer
        if self.dropout:
            raise InputError(
                f"--dropout {self.dropout:g}: {name} needs a loss that is the same each time it is computed; use --l2, "
                "or an optimizer of first order such as adam"
            )
        for option, value in (("--clip-norm", self.clip_norm), ("--clip-value", self.clip_value)):
            if value is not None:
                raise InputError(f"{option} {value:g}: {name} sets the length of its steps itself; leave it out")
        if self.decay is not None:
            raise InputError(f"--decay {self.decay}: {name} has no rate that falls by the epoch; leave it out")
        if self.has_batch_norm and self.bn_statistics == "running":
            raise InputError(
                f"--norm {self.norm}: the running averages would take in all that {name} tries in a step; add "
                "--bn-statistics population, or use --norm layer"
            )
        if self.batch_size is not None and name in REMEMBERING:
            raise InputError(
                f"--batch-size {self.batch_size}: {name} keeps what it learned of the curvature from step to step, "
                "which batches would mix; leave it out, or use conjugate-gradient, gauss-newton or newton"
            )
        if "residuals" in self.optimizer_options:
            raise InputError(f"--optimizer-option residuals: {name} is given losses here, not residuals; leave it out")

    @property
    def is_second_order(self) -> bool:
        """Whether the optimizer takes the loss as a function."""
        return self.optimizer in SECOND_ORDER

    @property
    def has_batch_norm(self) -> bool:
        return self.norm.startswith("batch")

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
        if self.is_second_order:
            return n
        size, largest = BATCH_SIZES
        while size * 2 <= min(largest, n // MIN_STEPS):
            size *= 2
        return min(size, n)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"optimizer_options": dict(self.optimizer_options)}


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Options that differ, as `--lr 0.1 instead of 0.01`."""
    old, new = a.to_dict(), b.to_dict()
    return [f"--{k.replace('_', '-')} {new[k]} instead of {old[k]}" for k in old if old[k] != new[k]]
