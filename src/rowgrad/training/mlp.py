"""The multilayer perceptron that the audit trains."""

import itertools

import torch
from torch import nn


def mlp(n_inputs: int, hidden: tuple[int, ...], n_outputs: int, seed: int) -> nn.Sequential:
    """Linear layers with ReLU between them, initialized as PyTorch does; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise((n_inputs, *hidden)):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear((n_inputs, *hidden)[-1], n_outputs))
