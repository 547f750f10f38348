"""Attention and transformer blocks, in either layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.table import Make, Setup, case, energy, plain


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence with itself, in the layout it asks for."""

    def __init__(self, need_weights: bool = False, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)  # type: ignore[arg-type]
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        out, weights = self.attention(x, x, x, need_weights=self.need_weights)
        out = out if self.attention.batch_first else out.transpose(0, 1)
        return out if weights is None else torch.cat([out, weights.square()], 2)


plain("attention, batch first", lambda: SelfAttention(batch_first=True), 5, 4, tags="smoke")
plain("attention, sequence first", lambda: SelfAttention(), 5, 4)
plain("attention, batch first, weights read", lambda: SelfAttention(need_weights=True, batch_first=True), 5, 4)
plain("attention, sequence first, weights read", lambda: SelfAttention(need_weights=True), 5, 4)
plain("attention without bias", lambda: SelfAttention(batch_first=True, bias=False), 5, 4)
plain("attention with learned key and value", lambda: SelfAttention(batch_first=True, add_bias_kv=True), 5, 4)
plain("attention, as many tokens as examples", lambda: SelfAttention(batch_first=True), 4, 4, tags="square")
plain("attention, sequence first, as many tokens as examples", lambda: SelfAttention(), 4, 4, tags="square")
plain("transformer encoder layer", lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), 5, 4)
plain(
    "transformer encoder layer, sequence first", lambda: Flipped(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0)), 5, 4
)
plain(
    "transformer encoder layer, norm first, gelu",
    lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"),
    5,
    4,
)
plain(
    "transformer encoder layer, dropout",
    lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True),
    5,
    4,
    deterministic=False,
)
plain(
    "transformer encoder, two layers",
    lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    ),
    3,
    4,
)


class Flipped(nn.Module):
    """A sequence-first module on batch-first input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


@case("attention with other keys and values, masked", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        padded = torch.arange(k.shape[1]) >= lengths.unsqueeze(1)
        out, _ = model(q, k, v, key_padding_mask=padded, need_weights=False)
        return energy(out)

    model = make.model(nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True))
    return make.setup(model, make.x(3, 4), make.x(6, 3), make.x(6, 5), 1 + make.ids(6), loss=loss)


@case("transformer decoder layer", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return energy(model(x, memory, tgt_mask=mask, tgt_is_causal=True))

    model = make.model(nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True))
    return make.setup(model, make.x(3, 4), make.x(5, 4), loss=loss)


class Causal(nn.Module):
    """Causal attention by `scaled_dot_product_attention`, with one packed projection."""

    def __init__(self, d: int, n_heads: int, n_groups: int | None = None) -> None:
        super().__init__()
        self.n_heads, self.n_groups, self.size = n_heads, n_groups or n_heads, d // n_heads
        self.sizes = [d, self.n_groups * self.size, self.n_groups * self.size]
        self.packed, self.out = nn.Linear(d, sum(self.sizes)), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (-1, self.size)).transpose(1, 2) for t in self.packed(x).split(self.sizes, 2))
        grouped = self.n_groups != self.n_heads
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.out(out.transpose(1, 2).flatten(2))


plain("causal fused attention", lambda: Causal(4, 2), 5, 4)
plain("causal fused attention, grouped queries", lambda: Causal(8, 4, 2), 3, 8)


@case("fused attention with a learned bias of positions", fast=True)
def _(make: Make) -> Setup:
    """A table of relative positions, as in T5, added to the scores of every example."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        t = x.shape[1]
        distance = (torch.arange(t).unsqueeze(1) - torch.arange(t)).clamp(-2, 2) + 2
        bias = model.table[distance].permute(2, 0, 1).unsqueeze(0)
        q, k, v = (x @ w for w in model.packed)
        heads = [h.unflatten(2, (2, -1)).transpose(1, 2) for h in (q, k, v)]
        return energy(F.scaled_dot_product_attention(*heads, attn_mask=bias))

    return make.setup(make.bag(packed=(3, 4, 4), table=(5, 2)), make.x(4, 4), loss=loss)


@case("attention by hand, with rotated positions", fast=True)
def _(make: Make) -> Setup:
    def rotate(h: Tensor) -> Tensor:
        angle = torch.arange(h.shape[1], dtype=h.dtype).unsqueeze(1)
        a, b = h.chunk(2, 2)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 2)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        q, k, v = rotate(x @ model.Q), rotate(x @ model.K), x @ model.V
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (q @ k.mT).masked_fill(~mask, float("-inf"))
        return energy(scores.softmax(2) @ v)

    return make.setup(make.bag(Q=(4, 4), K=(4, 4), V=(4, 4)), make.x(5, 4), loss=loss)


@case("pooling by a learned query", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        keys = x @ model.K
        weights = (keys @ model.query).softmax(1)
        return energy(torch.einsum("bt,btd->bd", weights, x @ model.V))

    return make.setup(make.bag(K=(4, 3), query=(3,), V=(4, 2)), make.x(5, 4), loss=loss)


@case("cross attention from learned queries", fast=True)
def _(make: Make) -> Setup:
    """Latent vectors, the same for all examples, attend to each example."""

    class Latents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(3, 4))
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.latents.expand(len(x), -1, -1), x, x, need_weights=False)[0]

    return make.setup(make.model(Latents()), make.x(5, 4), loss=lambda m, x: energy(m(x)))


@case("linear attention", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (x @ model.Q).exp(), (x @ model.K).exp(), x @ model.V
        states = torch.einsum("btd,btp->btdp", k, v).cumsum(1)
        return energy(torch.einsum("btd,btdp->btp", q, states) / (q * k.cumsum(1)).sum(2, keepdim=True))

    return make.setup(make.bag(Q=(4, 3), K=(4, 3), V=(4, 2)), make.x(5, 4), loss=loss)


@case("attention over the batch", independent=False, tags="attack coupled")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = (x @ model.W).tanh()
        return energy((h @ model.Q @ h.T).softmax(1) @ h)

    return make.setup(make.bag(W=(4, 3), Q=(3, 3)), make.x(4), loss=loss)


@case("attention module given the wrong layout", independent=False, tags="attack coupled square")
def _(make: Make) -> Setup:
    """Batch-first data in a sequence-first module: it attends over the batch, silently, with T = B."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return energy(model(x, x, x, need_weights=False)[0])

    return make.setup(make.model(nn.MultiheadAttention(4, 2)), make.x(4, 4), loss=loss)
