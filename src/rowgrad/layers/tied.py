"""Autoencoders whose decoder shares the weights of the encoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from rowgrad.errors import InputError
from rowgrad.layers.activations import activation


class TiedLinear(nn.Module):
    """The transpose of another linear layer, with a bias of its own: W^T h + c for an encoder W x + b.

    The weight stays the encoder's: it is read at every call, stands once among the model's parameters and in its
    `state_dict`, and follows when it is replaced or parametrized. Its gradient is the sum over both copies (eq. 7),
    each of which `Graph.decompose(weight, by="use")` shows.

    Args:
        encoder: the layer to be undone, shape of its weight (hidden, inputs). It must be elsewhere in the model.
        bias: whether to add c, shape (inputs,), zeros at first; default True.
        device, dtype: of c; default those of the encoder's weight.
    Shapes: input (..., hidden), output (..., inputs).
    Raises:
        InputError: `encoder` is not an `nn.Linear`, or a lazy one that has no shape yet.

    Source: Aggarwal 2018, section 3.2, "Handling Shared Weights", eq. 7: dL/dw = sum over the copies of dL/dw_i.

    >>> encoder = nn.Linear(5, 2)
    >>> model = nn.Sequential(encoder, nn.Tanh(), TiedLinear(encoder))
    >>> [name for name, _ in model.named_parameters()]
    ['0.weight', '0.bias', '2.bias']
    >>> model(torch.ones(3, 5)).shape
    torch.Size([3, 5])
    """

    def __init__(
        self,
        encoder: nn.Linear,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Linear):
            raise InputError(f"TiedLinear needs the torch.nn.Linear it undoes, found a {type(encoder).__name__}")
        if isinstance(encoder.weight, UninitializedParameter):
            raise InputError("TiedLinear: the encoder has no shape yet: run it once, then tie it")
        self._encoder = (encoder,)  # in a tuple, so that its parameters are not registered a second time
        like = encoder.weight
        c = torch.zeros(encoder.in_features, dtype=dtype or like.dtype, device=device or like.device)
        self.bias = nn.Parameter(c) if bias else None

    @property
    def encoder(self) -> nn.Linear:
        """The layer whose weight this one shares."""
        return self._encoder[0]

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.encoder.weight.t(), self.bias)

    def extra_repr(self) -> str:
        return f"{self.encoder.out_features}, {self.encoder.in_features}, bias={self.bias is not None}"


def autoencoder(
    widths: Sequence[int], name: str = "relu", *, tied: bool = True, alpha: float | None = None
) -> nn.Sequential:
    """A network that reproduces its input through layers that get narrower and wider again.

    Args:
        widths: of the input, of each hidden layer and last of the code: (64, 32, 8) is 64-32-8-32-64.
        name: of the activation behind every layer but the output's, one of `ACTIVATIONS`.
        tied: whether each decoding layer uses the transpose of its encoding layer's weight (`TiedLinear`); default
            True, half of the weights.
        alpha: for "leaky_relu", the slope for v <= 0.
    Returns:
        `nn.Sequential` of `encoder` and `decoder`.
    Raises:
        InputError: fewer than two widths, one below 1, or an activation that does not exist.

    Source: Aggarwal 2018, section 3.2, "Handling Shared Weights".

    >>> model = autoencoder((5, 3, 2), "tanh")
    >>> model.encoder(torch.ones(4, 5)).shape, model(torch.ones(4, 5)).shape
    (torch.Size([4, 2]), torch.Size([4, 5]))
    """
    if len(widths) < 2 or min(widths) < 1:
        raise InputError(f"autoencoder: widths {tuple(widths)}, expected those of the input and of at least one layer")
    encoder: list[nn.Module] = []
    decoder: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layer = nn.Linear(n_in, n_out)
        encoder += [layer, activation(name, alpha=alpha)]
        back = TiedLinear(layer) if tied else nn.Linear(n_out, n_in)
        decoder = [back, activation(name, alpha=alpha), *decoder]
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["encoder"], parts["decoder"] = nn.Sequential(*encoder), nn.Sequential(*decoder[:-1])
    return nn.Sequential(parts)
