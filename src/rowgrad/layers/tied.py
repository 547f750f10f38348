"""A decoder that shares its encoder's weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowgrad.errors import InputError


class TiedLinear(nn.Module):
    """The transpose of another linear layer, with a bias of its own: W^T h + c for an encoder W x + b.

    The weight stays the encoder's: it is read at every call, stands once among the model's parameters and in its
    `state_dict`, and follows when it is replaced or parametrized. Its gradient is the sum over both copies (eq. 7),
    each of which `Graph.decompose(weight, by="use")` shows.

    Args:
        encoder: the layer to be undone, shape of its weight (hidden, inputs). It must be elsewhere in the model.
        bias: whether to add c, shape (inputs,), zeros at first; default True.
    Shapes: input (..., hidden), output (..., inputs).
    Raises:
        InputError: `encoder` is not an `nn.Linear`.

    Source: Aggarwal 2018, section 3.2, "Handling Shared Weights", eq. 7: dL/dw = sum over the copies of dL/dw_i.

    >>> encoder = nn.Linear(5, 2)
    >>> model = nn.Sequential(encoder, nn.Tanh(), TiedLinear(encoder))
    >>> [name for name, _ in model.named_parameters()]
    ['0.weight', '0.bias', '2.bias']
    >>> model(torch.ones(3, 5)).shape
    torch.Size([3, 5])
    """

    def __init__(self, encoder: nn.Linear, *, bias: bool = True) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Linear):
            raise InputError(f"TiedLinear needs the torch.nn.Linear it undoes, found a {type(encoder).__name__}")
        self._encoder = (encoder,)  # in a tuple, so that its parameters are not registered a second time
        like = encoder.weight
        c = torch.zeros(encoder.in_features, dtype=like.dtype, device=like.device)
        self.bias = nn.Parameter(c) if bias else None

    @property
    def encoder(self) -> nn.Linear:
        """The layer whose weight this one shares."""
        return self._encoder[0]

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.encoder.weight.t(), self.bias)

    def extra_repr(self) -> str:
        return f"{self.encoder.out_features}, {self.encoder.in_features}, bias={self.bias is not None}"
