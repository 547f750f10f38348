"""What a case is: a small model, a batch with the examples along the first dimension, a loss for each example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tests.reference import trainable


@dataclass(frozen=True)
class Setup:
    """A case made ready: `losses()` is a fresh forward pass, the same each time, dropout included."""

    model: nn.Module
    batch: tuple[Tensor, ...]
    loss_fn: Callable[..., Tensor]
    seed: int = 0

    def losses(self) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return self.loss_fn(self.model, *self.batch)

    @property
    def params(self) -> dict[str, Tensor]:
        return trainable(self.model)

    def take(self, index: Tensor | list[int] | slice) -> Setup:
        """The same model on other examples of the batch, in that order."""
        return replace(self, batch=tuple(t[index] for t in self.batch))


class Make:
    """Raw material for a case: tensors for `n` examples and modules with parameters away from their special values."""

    def __init__(self, n: int, dtype: torch.dtype, seed: int) -> None:
        self.n = n
        self.dtype = dtype
        self.seed = seed

    def x(self, *shape: int) -> Tensor:
        return torch.randn(self.n, *shape, dtype=self.dtype)

    def ids(self, n_ids: int, *shape: int) -> Tensor:
        return torch.randint(n_ids, (self.n, *shape))

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype)

    def model(self, module: nn.Module) -> nn.Module:
        module = module.to(self.dtype)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return module

    def bag(self, **shapes: tuple[int, ...]) -> nn.Module:
        """A module that only holds parameters of these shapes."""
        module = nn.Module()
        for name, shape in shapes.items():
            module.register_parameter(name, nn.Parameter(0.5 * torch.randn(shape)))
        return self.model(module)

    def setup(self, model: nn.Module, *batch: Tensor, loss: Callable[..., Tensor]) -> Setup:
        return Setup(model, batch, loss)


Build = Callable[[Make], Setup]


@dataclass(frozen=True)
class Case:
    """One line of the table.

    independent: row j depends on example j alone, so that batches of one give the same rows.
    deterministic: nothing is drawn in the forward pass.
    fast: every parameter takes a rule, nothing is computed example by example for want of one.
    n, dtype, rtol: number of examples, dtype of model and data, and how close rows must come, by default.
    """

    name: str
    make: Build
    independent: bool = True
    deterministic: bool = True
    fast: bool = False
    n: int = 4
    dtype: torch.dtype = torch.float64
    rtol: float = 1e-10
    tags: frozenset[str] = frozenset()

    def build(self, seed: int = 0, dtype: torch.dtype | None = None, n: int | None = None) -> Setup:
        with torch.random.fork_rng():
            torch.manual_seed(1000 + seed)
            made = self.make(Make(self.n if n is None else n, dtype or self.dtype, seed))
        return replace(made, seed=seed)


CASES: dict[str, Case] = {}


def case(name: str, *, tags: str = "", **flags: object) -> Callable[[Build], Build]:
    """Enter a function that builds a setup into the table; `tags` are separated by spaces."""

    def enter(make: Build) -> Build:
        if name in CASES:
            raise ValueError(f"two cases are named {name!r}")
        CASES[name] = Case(name, make, tags=frozenset(tags.split()), **flags)  # type: ignore[arg-type]
        return make

    return enter


def plain(name: str, module: Callable[[], nn.Module], *shape: int, fast: bool = True, **flags: object) -> None:
    """A case that is a module on inputs of one shape, with the mean square of its outputs as losses."""

    @case(name, fast=fast, **flags)
    def _(make: Make) -> Setup:
        return make.setup(make.model(module()), make.x(*shape), loss=energy_of_output)


def energy_of_output(model: nn.Module, x: Tensor) -> Tensor:
    return energy(model(x))


def energy(out: Tensor) -> Tensor:
    """(B, ...) -> (B,): mean square distance from 0.3, whose gradient has no symmetry to hide behind."""
    return (out.reshape(len(out), out[0].numel() if len(out) else 1) - 0.3).square().mean(1)


class Apply(nn.Module):
    """A function as a module, for use in `nn.Sequential`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
