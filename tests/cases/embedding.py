"""Looked-up rows of a table, one by one or in bags."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.table import Make, Setup, case, energy


def _lookup(model: nn.Module, ids: Tensor) -> Tensor:
    return energy(model(ids))


def _tokens(name: str, n_ids: int, t: int, *, fast: bool = True, tags: str = "", **options: object) -> None:
    @case(name, fast=fast, tags=tags)
    def _(make: Make) -> Setup:
        model = nn.Sequential(nn.Embedding(n_ids, 4, **options), nn.Tanh(), nn.Linear(4, 3))  # type: ignore[arg-type]
        return make.setup(make.model(model), make.ids(n_ids, t), loss=_lookup)


_tokens("embedding", 11, 5, tags="smoke")
_tokens("embedding with repeated ids", 3, 9)
_tokens("embedding with padding", 4, 6, padding_idx=1)
_tokens("embedding, sparse", 11, 5, sparse=True)
_tokens("embedding, sparse, padding and repeated ids", 3, 7, sparse=True, padding_idx=0)
_tokens("embedding on long sequences", 40, 300)
_tokens("embedding renormalized", 6, 5, max_norm=0.8, tags="writes")


@case("embedding of one id", fast=True)
def _(make: Make) -> Setup:
    return make.setup(make.model(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))), make.ids(5), loss=_lookup)


@case("embedding of a grid of ids", fast=True)
def _(make: Make) -> Setup:
    return make.setup(make.model(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))), make.ids(5, 2, 3), loss=_lookup)


@case("embedding, sequence first", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return energy(model(ids.T).tanh().transpose(0, 1))

    return make.setup(make.model(nn.Embedding(5, 3)), make.ids(5, 6), loss=loss)


@case("embedding scaled by the frequency of ids in the batch", independent=False, tags="attack")
def _(make: Make) -> Setup:
    """The backward divides by counts over the whole batch, so a batch of one is not the same."""
    return make.setup(make.model(nn.Embedding(3, 4, scale_grad_by_freq=True)), make.ids(3, 5), loss=_lookup)


@case("table indexed by ids", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return energy(model.table[ids].sin())

    return make.setup(make.bag(table=(6, 3)), make.ids(6, 4), loss=loss)


@case("table read by index_select and gather")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        rows = model.table.index_select(0, ids.flatten()).view(*ids.shape, -1)
        return energy(rows.tanh()) + energy(model.bias.expand(len(ids), -1).gather(1, ids))

    return make.setup(make.bag(table=(6, 3), bias=(6,)), make.ids(6, 4), loss=loss)


@case("one-hot times a table", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return energy((F.one_hot(ids, 6).to(model.table.dtype) @ model.table).tanh())

    return make.setup(make.bag(table=(6, 3)), make.ids(6, 4), loss=loss)


def _bag(name: str, mode: str, **options: object) -> None:
    @case(name, fast=True)
    def _(make: Make) -> Setup:
        model = nn.Sequential(nn.EmbeddingBag(6, 4, mode=mode, **options), nn.Tanh(), nn.Linear(4, 2))  # type: ignore[arg-type]
        return make.setup(make.model(model), make.ids(6, 5), loss=_lookup)


_bag("embedding bag, sum", "sum")
_bag("embedding bag, mean", "mean")
_bag("embedding bag, max", "max")
_bag("embedding bag, sum, padding", "sum", padding_idx=2)
_bag("embedding bag, mean, padding", "mean", padding_idx=2)
_bag("embedding bag, sum, sparse", "sum", sparse=True)
_bag("embedding bag, mean, sparse", "mean", sparse=True)


def _ragged(name: str, mode: str, **options: object) -> None:
    @case(name, fast=True, tags="ragged")
    def _(make: Make) -> Setup:
        def loss(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
            flat = torch.cat([row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)])
            return energy(model(flat, lengths.cumsum(0) - lengths).tanh())

        model = make.model(nn.EmbeddingBag(6, 4, mode=mode, **options))  # type: ignore[arg-type]
        return make.setup(model, make.ids(6, 5), 1 + make.ids(5), loss=loss)


_ragged("embedding bag of ragged bags, sum", "sum")
_ragged("embedding bag of ragged bags, mean", "mean")
_ragged("embedding bag of ragged bags, max", "max")


@case("embedding bag with empty bags", fast=True, tags="ragged")
def _(make: Make) -> Setup:
    def loss(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
        flat = torch.cat([row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)])
        return energy(model(flat, lengths.cumsum(0) - lengths))

    return make.setup(make.model(nn.EmbeddingBag(6, 4, mode="sum")), make.ids(6, 5), make.ids(3), loss=loss)


@case("embedding bag with weights", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
        return energy(model(ids, per_sample_weights=weights).tanh())

    return make.setup(make.model(nn.EmbeddingBag(6, 4, mode="sum")), make.ids(6, 5), make.x(5), loss=loss)


@case("embedding bag with learned weights", fast=True)
def _(make: Make) -> Setup:
    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        weights = model["weight"](ids).squeeze(2).sigmoid()
        return energy(model["bag"](ids, per_sample_weights=weights).tanh())

    model = nn.ModuleDict({"bag": nn.EmbeddingBag(6, 4, mode="sum"), "weight": nn.Embedding(6, 1)})
    return make.setup(make.model(model), make.ids(6, 5), loss=loss)


@case("factorization machine", fast=True)
def _(make: Make) -> Setup:
    """Linear terms and products of pairs, from two tables."""

    def loss(model: nn.Module, ids: Tensor, y: Tensor) -> Tensor:
        v = model["pairs"](ids)
        pairs = (v.sum(1).square() - v.square().sum(1)).sum(1) / 2
        return (model["linear"](ids).sum((1, 2)) + pairs - y).square()

    model = nn.ModuleDict({"linear": nn.Embedding(6, 1), "pairs": nn.Embedding(6, 3)})
    return make.setup(make.model(model), make.ids(6, 4), make.x(), loss=loss)
