"""Pretraining: each hidden layer first learns, alone, to describe what it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowgrad.errors import InputError, NonFiniteError
from rowgrad.layers.batchnorm import BATCH_NORMS
from rowgrad.layers.chains import is_chain
from rowgrad.layers.tied import TiedLinear

NORMALIZING = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)


def pretrain(
    model: nn.Sequential,
    inputs: Tensor,
    *,
    epochs: int = 20,
    lr: float = 1e-3,
    batch_size: int = 64,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, tuple[float, ...]]:
    """Start the hidden layers of a network as autoencoders, from the first to the last; labels are not needed.

    Each linear layer but the last, with all up to the next (activation, norm, dropout), encodes what the layers before
    it return, and the transpose of its own weight decodes it again (`TiedLinear`, thrown away afterwards). Both learn
    by Adam to make the mean squared error of the reconstruction small. Layers before stay fixed; the last linear layer
    stays as it is.

    Args:
        model: an `nn.Sequential`, nested or not, whose parameters are those of `nn.Linear` layers and norms.
        inputs: the training examples, shape (N, ...), as `model` takes them.
        epochs: passes over the examples for each layer; default 20.
        lr: rate of Adam; default its usual 1e-3.
        batch_size: default 64; a single example that would be left at the end of an epoch joins the last batch.
        noise: share of each layer's inputs set to 0 before they are encoded, drawn anew each time, while the
            reconstruction is compared with the whole (denoising); default 0, at most below 1.
        generator: of the order of the examples and the noise; default PyTorch's global generator, from which dropout
            draws in any case.
        progress: called after every epoch with the epochs done and the epochs in all.
    Returns:
        {name of the linear layer: mean squared error of its reconstruction}, without noise, before training and after
        each epoch: epochs + 1 numbers, in squared units of what the layer is given.
    Raises:
        InputError: no `nn.Sequential`, fewer than two linear layers, a layer of another kind with parameters, no
            examples, inputs that are not finite, or a number out of its range.
        NonFiniteError: the error overflowed; use a smaller rate.

    Source: Aggarwal 2018, sections 3.3 and 3.4, which name pretraining as a stronger initialization and leave it to a
    later lecture; layer by layer as in Bengio et al. 2007, with noise as in Vincent et al. 2008.

    >>> model = nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 2))
    >>> errors = pretrain(model, torch.randn(64, 8), epochs=5, lr=0.02)
    >>> list(errors), errors["0"][-1] < errors["0"][0]
    (['0'], True)
    """
    _check(epochs, lr, batch_size, noise)
    prefix, blocks = _blocks(model)
    if len(inputs) == 0:
        raise InputError("pretrain: no examples")
    if not bool(inputs.isfinite().all()):
        bad = (~inputs.isfinite()).reshape(len(inputs), -1).any(1).nonzero()
        raise InputError(f"pretrain: example {int(bad[0])} of the inputs holds inf or nan; leave it out, or repair it")
    modes = {module: module.training for module in model.modules()}
    errors: dict[str, tuple[float, ...]] = {}
    try:
        h = _run(prefix, inputs)
        for nr, (name, block) in enumerate(blocks.items()):
            autoencoder = nn.Sequential(*block, TiedLinear(block[0]))
            optimizer = torch.optim.Adam([p for p in autoencoder.parameters() if p.requires_grad], lr)
            found = [_error(autoencoder, h, name, lr)]
            for epoch in range(epochs):
                _epoch(autoencoder.train(), optimizer, h, batch_size, noise, generator)
                found.append(_error(autoencoder, h, name, lr))
                progress(nr * epochs + epoch + 1, len(blocks) * epochs)
            optimizer.zero_grad()
            errors[name], h = tuple(found), _run(block, h)
    finally:
        for module, training in modes.items():
            module.training = training
    return errors


def _check(epochs: int, lr: float, batch_size: int, noise: float) -> None:
    if epochs < 1:
        raise InputError(f"pretrain: epochs={epochs}, expected at least 1")
    if not (math.isfinite(lr) and lr > 0):
        raise InputError(f"pretrain: lr={lr}, expected a positive number")
    if batch_size < 1:
        raise InputError(f"pretrain: batch_size={batch_size}, expected at least 1")
    if not 0 <= noise < 1:
        raise InputError(f"pretrain: noise={noise}, expected the share of inputs to set to 0, at least 0 and below 1")


def _blocks(model: nn.Sequential) -> tuple[list[nn.Module], dict[str, list[Any]]]:
    """What comes before the first linear layer, and each linear layer but the last with what follows it, by name."""
    if not is_chain(model):
        raise InputError(f"pretrain goes through an nn.Sequential layer by layer, found a {type(model).__name__}")
    prefix: list[nn.Module] = []
    blocks: dict[str, list[Any]] = {}
    for name, module in _leaves(model):
        if isinstance(module, nn.Linear):
            blocks[name] = [module]
        elif next(module.parameters(), None) is not None and not isinstance(module, NORMALIZING):
            raise InputError(
                f"pretrain: {name} is a {type(module).__name__}; only nn.Linear layers can be pretrained, with norms "
                "and layers without parameters between them"
            )
        else:
            (blocks[next(reversed(blocks))] if blocks else prefix).append(module)
    if len(blocks) < 2:
        raise InputError(f"pretrain: found {len(blocks)} linear layers; it takes a hidden one and the output's")
    blocks.popitem()
    return prefix, blocks


def _leaves(chain: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    children = [(n, m) for n, m in chain.named_modules(remove_duplicate=False) if n and "." not in n]
    for name, module in children:
        if is_chain(module):
            yield from _leaves(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


@torch.enable_grad()
def _epoch(
    autoencoder: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    h: Tensor,
    batch_size: int,
    noise: float,
    generator: torch.Generator | None,
) -> None:
    place = generator.device if generator else None
    order = torch.randperm(len(h), generator=generator, device=place)
    for index in _batches(order.to(h.device), batch_size):
        given = h[index]
        drawn = torch.rand(given.shape, generator=generator, device=place).to(h.device)
        seen = given * (drawn >= noise) if noise else given
        optimizer.zero_grad()
        F.mse_loss(autoencoder(seen), given).backward()
        optimizer.step()


def _batches(order: Tensor, size: int) -> Iterator[Tensor]:
    """Batches of an order; a single example that would be left joins the last, since batch normalization has no
    variance of one."""
    n = max(1, len(order) // size + (len(order) % size > 1))
    return (order[k * size : (k + 1) * size if k + 1 < n else len(order)] for k in range(n))


@torch.no_grad()
def _run(layers: list[nn.Module], h: Tensor) -> Tensor:
    for layer in layers:
        h = layer.eval()(h)
    return h


def _error(autoencoder: nn.Sequential, h: Tensor, name: str, lr: float) -> float:
    error = float(F.mse_loss(_run(list(autoencoder), h), h))
    if not math.isfinite(error):
        raise NonFiniteError(f"pretrain: the reconstruction error of {name} is {error} at lr={lr:g}; use a smaller lr")
    return error
