"""Maxout: each unit is the largest of several linear functions of its inputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowgrad.errors import InputError


class Maxout(nn.Module):
    """A linear layer and its activation in one: max(W_1 x + b_1, ..., W_k x + b_k), entry by entry.

    With two pieces, W_2 = 0 makes it a ReLU and W_2 = alpha W_1 (0 < alpha < 1) a leaky ReLU. It has k times the
    parameters of `nn.Linear`; in each example a unit uses, and trains, one of its pieces. Where several are largest,
    one of them gets all of the gradient, as the maximum in the table of section 3.2 copies to the maximal input.

    Args:
        in_features, out_features: as in `nn.Linear`.
        pieces: k, at least 2; default 2, as in the source.
        bias: whether pieces have biases; default True, the source writes none.
        device, dtype: as in `nn.Linear`.
    Attributes:
        weight: shape (pieces * out_features, in_features), piece by piece.
        bias: shape (pieces * out_features,), or None.
    Shapes: input (..., in_features), output (..., out_features).
    Raises:
        InputError: fewer than two pieces.

    Source: Aggarwal 2018, section 3.4, "Maxout".

    >>> layer = Maxout(3, 4)
    >>> sum(p.numel() for p in layer.parameters()) / sum(p.numel() for p in nn.Linear(3, 4).parameters())
    2.0
    >>> with torch.no_grad():
    ...     _ = layer.piece(1).zero_(), layer.bias.zero_()
    >>> x = torch.randn(5, 3)
    >>> torch.allclose(layer(x), (x @ layer.piece(0).T).relu())
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        pieces: int = 2,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if pieces < 2:
            raise InputError(f"Maxout with pieces={pieces}: a maximum needs at least 2; for one use torch.nn.Linear")
        self.in_features, self.out_features, self.pieces = in_features, out_features, pieces
        n = pieces * out_features
        self.weight = nn.Parameter(torch.empty(n, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(n, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Linear` draws them: uniform within 1/sqrt(in_features)."""
        bound = 1 / math.sqrt(max(1, self.in_features))
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    def piece(self, k: int) -> Tensor:
        """W_{k+1}, a view of shape (out_features, in_features)."""
        return self.weight.unflatten(0, (self.pieces, self.out_features))[k]

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.weight, self.bias)
        return z.unflatten(-1, (self.pieces, self.out_features)).max(-2).values

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, pieces={self.pieces}, bias={self.bias is not None}"
