"""How close two ways to the same derivative come."""

from __future__ import annotations

import torch

from rowgrad.tape import Tape

# Error allowed, over the norm of the row, for the narrowest dtype in the graph. In float64 1e-7, for PyTorch computes
# single factors of float64 gradients in float32: the weight of the mean of an EmbeddingBag.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def tolerance(tape: Tape) -> float:
    """By the narrowest floating-point numbers in a graph."""
    dtypes = {node.dtype(nr) for node in tape.nodes for nr in range(node.n_outputs) if node.is_traced(nr)}
    return max((TOLERANCE.get(d, TOLERANCE[torch.float32]) for d in dtypes if d.is_floating_point), default=1e-4)
