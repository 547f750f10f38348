"""The multilayer perceptron that the audit trains."""

import itertools

import torch
from torch import nn

WIDE = 32  # inputs beyond which the first layer learns more slowly


def mlp(n_inputs: int, hidden: tuple[int, ...], n_outputs: int, dropout: float) -> nn.Sequential:
    """Linear layers, with ReLU and dropout between them; drawn from the global generator, as PyTorch does."""
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise((n_inputs, *hidden)):
        layers += [nn.Linear(width_in, width_out), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear((n_inputs, *hidden)[-1], n_outputs))


def adam(model: nn.Sequential, lr: float) -> torch.optim.Adam:
    """Adam with a lower rate for a first layer of many inputs.

    A step of Adam changes each weight by about `lr`, so that it moves a pre-activation in proportion to the number of
    inputs. Without the correction a network on thousands of pixels learns wrong labels by heart in a few epochs.
    """
    first, *others = model.parameters()
    groups = [{"params": [first], "lr": lr * min(1, WIDE / first.shape[1])}, {"params": others}]
    return torch.optim.Adam(groups, lr=lr)
