"""Layers that PyTorch lacks, how to start them, penalties on hidden units and batch normalization."""

from rowgrad.layers.activations import ACTIVATIONS, activation
from rowgrad.layers.initialization import SCHEMES, initialize
from rowgrad.layers.maxout import Maxout
from rowgrad.layers.tied import TiedLinear

__all__ = ["ACTIVATIONS", "SCHEMES", "Maxout", "TiedLinear", "activation", "initialize"]
