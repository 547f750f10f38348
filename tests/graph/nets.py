"""Nets large enough to be worth a drawing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rowgrad as rg


class Residual(nn.Module):
    """Two convolutions around which the input is added again."""

    def __init__(self, d: int, p: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(d, p, 3, stride, 1, bias=False), nn.GroupNorm(2, p)
        self.conv2, self.norm2 = nn.Conv2d(p, p, 3, 1, 1, bias=False), nn.GroupNorm(2, p)
        self.skip = nn.Conv2d(d, p, 1, stride, bias=False) if d != p else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


class ResNet18(nn.Module):
    """Eight residual blocks as in ResNet-18, narrow, with GroupNorm."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.GroupNorm(2, width)
        sizes = [width * 2**stage for stage in range(4)]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(Residual(d, p, 1 if stage == 0 else 2), Residual(p, p, 1))
                for stage, (d, p) in enumerate(zip([width, *sizes], sizes, strict=False))
            )
        )
        self.head = nn.Linear(sizes[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(F.relu(self.norm(self.stem(x))))
        return self.head(h.mean((2, 3)))


class Block(nn.Module):
    """Attention and a perceptron, each added to the stream."""

    def __init__(self, d: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(b, t, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + self.out(h)
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """A small language model of four blocks whose head is tied to its embedding."""

    def __init__(self, n_ids: int = 20, length: int = 6, d: int = 8, n_blocks: int = 4) -> None:
        super().__init__()
        self.ids, self.places = nn.Embedding(n_ids, d), nn.Embedding(length, d)
        self.blocks = nn.Sequential(*(Block(d, 2) for _ in range(n_blocks)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, n_ids, bias=False)
        self.head.weight = self.ids.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.ids(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Recurrent(nn.Module):
    """One cell run over a sequence."""

    def __init__(self, d: int = 3, p: int = 4) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(d, p), nn.Linear(p, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), self.cell.hidden_size, dtype=x.dtype)
        for x_t in x.unbind(1):
            h = self.cell(x_t, h)
        return self.head(h)


def graph_of(model: nn.Module, *inputs: Tensor, traced: bool = True) -> rg.Graph:
    """The graph of a loss on this model's outputs, in double precision."""
    model.double()
    with rg.trace(model) as scopes:
        loss = model(*inputs).square().mean()
    return rg.Graph(loss, model, trace=scopes if traced else None)


def resnet(traced: bool = True) -> rg.Graph:
    """Of three small pictures."""
    return graph_of(ResNet18(), torch.randn(3, 3, 16, 16, dtype=torch.float64), traced=traced)


def gpt(traced: bool = True) -> rg.Graph:
    """Of two sequences of six positions."""
    return graph_of(GPT(), torch.randint(20, (2, 6)), traced=traced)


def recurrent(n_steps: int = 64, traced: bool = True) -> rg.Graph:
    """Of two sequences."""
    return graph_of(Recurrent(), torch.randn(2, n_steps, 3, dtype=torch.float64), traced=traced)
