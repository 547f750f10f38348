"""Models by a word: `mlp:64,64`, `cnn:16,32`, `lstm:64`, `autoencoder:32,8`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from rowgrad.errors import InputError
from rowgrad.layers.activations import activation
from rowgrad.layers.batchnorm import BatchNorm
from rowgrad.layers.hidden import hidden_layer


@dataclass(frozen=True)
class Form:
    """What a model is made for, and how its layers look.

    Attributes:
        shape: of one example: (d,), (channels, height, width), or (steps, d) for sequences.
        n_outputs: numbers it answers with.
        act: activation of hidden layers, see `rowgrad.layers.activation`; or "maxout".
        alpha: of "leaky_relu".
        norm: see `rowgrad.layers.hidden_layer`.
        dropout: share of hidden units left out in a step.
    """

    shape: tuple[int, ...]
    n_outputs: int
    act: str = "relu"
    alpha: float | None = None
    norm: str = "none"
    dropout: float = 0.0


def build(spec: str, form: Form) -> nn.Module:
    """A model of this kind, drawn from the global generator as PyTorch draws.

    Args:
        spec: a kind and, after a colon, the widths of its layers. `mlp`: hidden units; works on every example, laid
            out flat. `cnn`: channels of 3 x 3 convolutions, each with max pooling as long as the image has two rows
            and columns; images. `lstm`: units of stacked layers, the last step's state is read; sequences, given as
            (examples, lengths). `autoencoder`: units of the encoder, mirrored in the decoder; answers with its input.
    Raises:
        InputError: a kind or a width that does not exist, or that does not fit the examples.

    >>> form = Form((64,), 10)
    >>> sum(p.numel() for p in build("mlp:32", form).parameters())
    2410
    """
    kind, _, text = spec.partition(":")
    if kind not in KINDS:
        raise InputError(f"--model {spec}: {kind!r} is no kind of model; there are {', '.join(KINDS)}")
    if not 0 <= form.dropout < 1:
        raise InputError(f"--dropout {form.dropout:g}: the share must be at least 0 and below 1")
    return KINDS[kind](_widths(spec, text), form)


def _widths(spec: str, text: str) -> tuple[int, ...]:
    parts = [part for part in text.split(",") if part.strip()]
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"--model {spec}: expected widths of 1 or more separated by commas, such as mlp:64,64")
    return tuple(int(part) for part in parts)


def _flat(form: Form) -> int:
    return int(torch.Size(form.shape).numel())


def _hidden(n_in: int, n_out: int, form: Form) -> list[nn.Module]:
    layer = hidden_layer(n_in, n_out, form.act, norm=form.norm, alpha=form.alpha)
    return [*layer, *([nn.Dropout(form.dropout)] if form.dropout else [])]


def _refuse_hidden(kind: str, form: Form, example: str) -> None:
    """Options of hidden layers where there is none."""
    plain = Form(form.shape, form.n_outputs)
    for name in ("act", "alpha", "norm", "dropout"):
        given = getattr(form, name)
        if given != getattr(plain, name):
            raise InputError(
                f"--{name} {given}: --model {kind} has no hidden layer; name its widths, such as {example}"
            )


def _mlp(widths: Sequence[int], form: Form) -> nn.Module:
    if not widths:
        _refuse_hidden("mlp", form, "mlp:64,64")
    layers: list[nn.Module] = [nn.Flatten()] if len(form.shape) > 1 else []
    for n_in, n_out in pairwise((_flat(form), *widths)):
        layers += _hidden(n_in, n_out, form)
    return nn.Sequential(*layers, nn.Linear((_flat(form), *widths)[-1], form.n_outputs))


def _cnn(channels: Sequence[int], form: Form) -> nn.Module:
    if len(form.shape) != 3:
        raise InputError(f"--model cnn needs images, the examples have shape {form.shape}; use mlp")
    if form.act == "maxout":
        raise InputError("--act maxout: for mlp and autoencoder alone")
    if not channels:
        _refuse_hidden("cnn", form, "cnn:16,32")
    depth, *size = form.shape
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise((depth, *channels)):
        pre = {"batch-pre": [BatchNorm(n_out)], "layer": [nn.GroupNorm(1, n_out)]}.get(form.norm, [])
        post = [BatchNorm(n_out)] if form.norm == "batch-post" else []
        convolution = nn.Conv2d(n_in, n_out, 3, padding=1, bias=form.norm != "batch-pre")
        layers += [convolution, *pre, activation(form.act, alpha=form.alpha), *post]
        layers += [nn.Dropout2d(form.dropout)] if form.dropout else []
        if min(size) >= 2:
            layers.append(nn.MaxPool2d(2))
            size = [length // 2 for length in size]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear((depth, *channels)[-1] * size[0] * size[1], form.n_outputs))


class SequenceReader(nn.Module):
    """Stacked LSTM layers over sequences of different lengths, and a linear layer on the state after the last step."""

    def __init__(self, n_inputs: int, widths: Sequence[int], n_outputs: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(a, b, batch_first=True) for a, b in pairwise((n_inputs, *widths)))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], n_outputs)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Of sequences, shape (B, T, d), the first `lengths` steps of each (default all); outputs (B, n_outputs)."""
        for layer in self.layers:
            x = self.dropout(layer(x)[0])
        last = torch.full((len(x),), x.shape[1] - 1, device=x.device) if lengths is None else lengths.to(x.device) - 1
        return self.head(x[torch.arange(len(x), device=x.device), last])


def _lstm(widths: Sequence[int], form: Form) -> nn.Module:
    if len(form.shape) != 2:
        raise InputError(f"--model lstm needs sequences of shape (steps, d), the examples have shape {form.shape}")
    if form.norm != "none" or form.act != "relu":
        raise InputError("--model lstm has its own activations and no normalization; leave out --act and --norm")
    if not widths:
        raise InputError("--model lstm: name the units of its layers, such as lstm:64")
    return SequenceReader(form.shape[1], widths, form.n_outputs, form.dropout)


class Autoencoder(nn.Sequential):
    """An `encoder` to the code and a `decoder` back; outputs are laid out flat, (B, d)."""

    def __init__(self, encoder: nn.Sequential, decoder: nn.Sequential) -> None:
        super().__init__(OrderedDict(encoder=encoder, decoder=decoder))
        self.encoder: nn.Sequential
        self.decoder: nn.Sequential


def _autoencoder(widths: Sequence[int], form: Form) -> nn.Module:
    if len(form.shape) == 2:
        raise InputError("--model autoencoder is for tables and images, the examples are sequences; use lstm or mlp")
    if not widths:
        raise InputError("--model autoencoder: name the units of the encoder, such as autoencoder:32,8")
    n = _flat(form)
    encoder: list[nn.Module] = [nn.Flatten()] if len(form.shape) > 1 else []
    for n_in, n_out in pairwise((n, *widths)):
        encoder += _hidden(n_in, n_out, form)
    decoder: list[nn.Module] = []
    for n_in, n_out in pairwise(reversed(widths)):
        decoder += _hidden(n_in, n_out, form)
    return Autoencoder(nn.Sequential(*encoder), nn.Sequential(*decoder, nn.Linear(widths[0], n)))


KINDS: dict[str, Callable[[Sequence[int], Form], nn.Module]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "lstm": _lstm,
    "autoencoder": _autoencoder,
}
