"""Layers that PyTorch lacks, how to start them, penalties on hidden units and batch normalization."""

from rowgrad.layers.activations import ACTIVATIONS, activation
from rowgrad.layers.batchnorm import BatchNorm, batch_norm_gradients, population_statistics
from rowgrad.layers.folding import fold
from rowgrad.layers.hidden import NORMS, hidden_layer
from rowgrad.layers.initialization import SCHEMES, initialize
from rowgrad.layers.maxout import Maxout
from rowgrad.layers.penalties import hidden_penalties
from rowgrad.layers.pretraining import pretrain
from rowgrad.layers.tied import TiedLinear, autoencoder

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "SCHEMES",
    "BatchNorm",
    "Maxout",
    "TiedLinear",
    "activation",
    "autoencoder",
    "batch_norm_gradients",
    "fold",
    "hidden_layer",
    "hidden_penalties",
    "initialize",
    "population_statistics",
    "pretrain",
]
