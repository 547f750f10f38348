"""Which operations of a graph are layers, and what they are called."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.diagnosis.layers import find_layers

F64 = torch.float64


def names_and_levels(losses: Tensor, model: nn.Module) -> list[tuple[str, int]]:
    return [(layer.name, layer.level) for layer in find_layers(rg.Graph(losses, model)).layers]


def test_layers_of_a_net_by_module_and_level() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)).double()
    assert names_and_levels(model(torch.randn(3, 1, 5, 5, dtype=F64)).sum(1), model) == [("0", 1), ("4", 2)]


def test_two_branches_share_a_level() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "c": nn.Linear(4, 1)}).double()
    x = torch.randn(5, 3, dtype=F64)
    out = model["c"](F.relu(model["a"](x)) + model["b"](x))
    assert sorted(names_and_levels(out.squeeze(1), model)) == [("a", 1), ("b", 1), ("c", 2)]


def test_a_weight_used_twice_is_two_layers() -> None:
    layer = nn.Linear(4, 4).double()
    model = nn.ModuleDict({"same": layer})
    out = layer(torch.tanh(layer(torch.randn(5, 4, dtype=F64))))
    assert names_and_levels(out.sum(1), model) == [("same #1", 1), ("same #2", 2)]


def test_what_is_made_of_parameters_alone_belongs_to_the_layer() -> None:
    """A low-rank update: W + A B meets the data as one weight."""
    parts = {
        "w": torch.randn(4, 3, dtype=F64, requires_grad=True),
        "a": torch.randn(4, 2, dtype=F64, requires_grad=True),
        "b": torch.randn(2, 3, dtype=F64, requires_grad=True),
    }
    losses = F.linear(torch.randn(5, 3, dtype=F64), parts["w"] + parts["a"] @ parts["b"]).sum(1)
    (layer,) = find_layers(rg.Graph(losses, parts)).layers
    assert set(layer.weights) == {"w", "a", "b"}
    assert layer.inputs


def test_an_attention_score_is_no_layer() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(3, 5, 8, dtype=F64)
    losses = model(x, x, x, need_weights=False)[0].mean((1, 2))
    found = find_layers(rg.Graph(losses, model)).layers
    assert [layer.weights for layer in found] == [("in_proj_weight",), ("out_proj.weight",)]


def test_an_embedding_is_the_first_layer() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 1)).double()
    losses = model(torch.randint(7, (5, 6))).mean((1, 2))
    assert names_and_levels(losses, model) == [("0", 1), ("1", 2)]
    curves = rg.diagnose(losses, model).curves
    assert curves[0].activation != curves[0].activation  # ids have no size
    assert curves[1].activation > 0


def test_activations_know_the_layer_before_them_and_the_last_is_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).double()
    found = find_layers(rg.Graph(model(torch.randn(3, 4, dtype=F64)).sum(1), model))
    assert [(u.op, u.layer.name, u.dim) for u in found.units] == [("tanh", "0", 1)]
