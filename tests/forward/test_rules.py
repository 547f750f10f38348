"""Each rule against PyTorch's own formulas, in every combination of what moves, and that each is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.reference import flat, rows_by_grad
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.forward import rules


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., Any]]:
    """The calls whose rules gave a result."""
    calls: list[Callable[..., Any]] = []

    def watched(call: Callable[..., Any], rule: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            found = rule(*args, **kwargs)
            if found is not NotImplemented:
                calls.append(call)
            return found

        return wrapped

    for call, rule in list(rules.RULES.items()):
        monkeypatch.setitem(rules.RULES, call, watched(call, rule))
    return calls


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(randn(*shape))


def check(closure: Callable[[], Tensor], params: Mapping[str, Tensor], moved: list[str]) -> None:
    v = {name: torch.randn_like(params[name]) for name in moved}
    torch.testing.assert_close(rg.jvp(closure, params, v)[1], by_rows(closure, v, params), rtol=1e-10, atol=1e-12)


def by_rows(closure: Callable[[], Tensor], v: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Tensor:
    return flat({name: rows_by_grad(closure(), params)[name] for name in v}) @ flat({"v": cat(v)[None]})[0]


def cat(v: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in v.values()])


LAYERS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    # call of (h, W, b), shapes of h, W, b
    "linear": (F.linear, (4, 5), (40, 5), (40,)),
    "linear by keywords": (lambda h, W, b: F.linear(input=h, weight=W, bias=b), (4, 5), (40, 5), (40,)),
    "linear on sequences": (F.linear, (4, 3, 5), (40, 5), (40,)),
    "linear on long sequences": (F.linear, (4, 30, 5), (40, 5), (40,)),
    "linear of few rows": (F.linear, (20, 5), (40, 5), (40,)),
    "linear with few outputs": (F.linear, (4, 30, 5), (2, 5), (2,)),
    "linear to one number": (F.linear, (4, 30, 5), (1, 5), (1,)),
    "layer norm": (lambda h, W, b: F.layer_norm(h, (5,), W, b), (4, 3, 5), (5,), (5,)),
    "layer norm of two dimensions": (lambda h, W, b: F.layer_norm(h, (3, 5), W, b, 0.1), (4, 3, 5), (3, 5), (3, 5)),
    "layer norm, not contiguous": (
        lambda h, W, b: F.layer_norm(h.transpose(1, 2), (5,), W, b), (4, 5, 3), (5,), (5,),
    ),
    "group norm": (lambda h, W, b: F.group_norm(h, 3, W, b, 0.1), (4, 6, 2, 5), (6,), (6,)),
    "group norm without places": (lambda h, W, b: F.group_norm(h, 3, W, b), (4, 6), (6,), (6,)),
    "group norm, channels last": (
        lambda h, W, b: F.group_norm(h.contiguous(memory_format=torch.channels_last), 2, W, b), (4, 6, 2, 5), (6,), (6,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("moved", ["h", "W", "b", "hW", "hb", "Wb", "hWb"])
@pytest.mark.parametrize("given", ["hWb", "hW"])
def test_layers(layer: str, moved: str, given: str, taken: list) -> None:
    """`moved` are those with a tangent among those that are given."""
    call, *shapes = LAYERS[layer]
    h, W, b = (parameter(*shape) for shape in shapes)
    params = {"h": h, "W": W, "b": b} if "b" in given else {"h": h, "W": W}
    names = [name for name in moved if name in given] or ["h"]

    def losses() -> Tensor:
        z = call(h.sin(), W, params.get("b"))
        return (z * z).tanh().reshape(len(z), -1).sum(1)

    check(losses, params, names)
    assert bool(taken) == ("norm" in layer or names != ["b"])


@pytest.mark.parametrize("rows", [4, 20, 40])
def test_values_of_wide_layers_are_the_closures_bit_for_bit(rows: int, taken: list) -> None:
    """Their entries are many, and meet kinks."""
    model = nn.Sequential(nn.Linear(777, 512), nn.ReLU(), nn.Linear(512, 300))
    x = torch.randn(rows, 777)
    closure = lambda: model(x).relu().sum(1)  # noqa: E731
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    assert torch.equal(rg.jvp(closure, model, v)[0], closure())
    assert taken == [F.linear, F.linear]


def test_linear_of_one_vector_and_of_none(taken: list) -> None:
    W, b = parameter(3, 5), parameter(3)
    x = randn(5)
    check(lambda: F.linear(x, W, b).sin(), {"W": W, "b": b}, ["W", "b"])
    nothing = parameter(3, 0)
    check(lambda: F.linear(randn(4, 2, 0), nothing, b).sin().sum((1, 2)), {"W": nothing, "b": b}, ["W", "b"])
    assert taken == [F.linear, F.linear]


@pytest.mark.parametrize("outputs", [3, 40])
def test_linear_with_a_bias_by_position(outputs: int, taken: list) -> None:
    x, W, b = randn(4, 12, 7).transpose(0, 1), parameter(outputs, 7), parameter(4, outputs)
    check(lambda: F.linear(x, W, b).sin().sum((1, 2)), {"W": W, "b": b}, ["W", "b"])
    assert taken == [F.linear]


def test_a_vector_as_weight(taken: list) -> None:
    h, W = parameter(4, 5), parameter(5)
    for moved in (["h"], ["W"], ["h", "W"]):
        check(lambda: F.linear(h.sin(), W).sin(), {"h": h, "W": W}, moved)
    assert len(taken) == 3


def test_normalization_without_scale_and_shift(taken: list) -> None:
    W = parameter(6, 5)
    x = randn(4, 5)
    check(lambda: F.layer_norm(x @ W.T, (6,)).sin().sum(1), {"W": W}, ["W"])
    check(lambda: F.layer_norm(x @ W.T, [6]).sin().sum(1), {"W": W}, ["W"])
    check(lambda: F.group_norm(x @ W.T, 2).sin().sum(1), {"W": W}, ["W"])
    assert taken.count(F.layer_norm) == 2
    assert taken.count(F.group_norm) == 1


@pytest.mark.parametrize(
    "multiply",
    [torch.matmul, Tensor.matmul, lambda a, b: a @ b, torch.mm],
    ids=["matmul", "method", "operator", "mm"],
)
def test_products_of_what_moves_with_what_stands_still(multiply: Callable, taken: list) -> None:
    W, x = parameter(5, 3), randn(4, 5)
    check(lambda: multiply(x, W).sin().sum(1), {"W": W}, ["W"])
    assert len(taken) == 1
    check(lambda: multiply(W.T, x.T).sin().sum(0), {"W": W}, ["W"])
    assert len(taken) == 2
    check(lambda: multiply(x, W * 2).sin().mm(W.T).sum(1), {"W": W}, ["W"])
    assert len(taken) == 3


def test_products_by_keyword_are_left_to_pytorch(taken: list) -> None:
    W, x = parameter(5, 3), randn(4, 5)
    check(lambda: torch.mm(x, mat2=W).sin().sum(1), {"W": W}, ["W"])
    check(lambda: torch.matmul(x, other=W).sin().sum(1), {"W": W}, ["W"])
    assert taken == [torch.matmul]


def test_stacked_products(taken: list) -> None:
    W, x = parameter(4, 5, 3), randn(4, 2, 5)
    check(lambda: torch.bmm(x, W).sin().sum((1, 2)), {"W": W}, ["W"])
    assert taken == [torch.bmm]


@pytest.mark.parametrize("padding", [None, 0, 3, -2])
@pytest.mark.parametrize("by_frequency", [False, True])
def test_lookups(padding: int | None, by_frequency: bool) -> None:
    W, ids = parameter(6, 3), torch.tensor([[0, 3, 4, 4], [4, 4, 1, 3], [5, 5, 0, 2]])

    def losses() -> Tensor:
        return F.embedding(ids, W, padding, scale_grad_by_freq=by_frequency).sin().sum((1, 2))

    check(losses, {"W": W}, ["W"])


@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize("where", ["autocast", "recorded"])
def test_lookups_that_are_no_plain_calls(where: str, by_frequency: bool) -> None:
    W, ids = parameter(6, 3), torch.tensor([[0, 3, 4, 4], [4, 4, 1, 3], [5, 5, 0, 2]])
    one = torch.ones((), dtype=torch.float64, requires_grad=where == "recorded")

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "autocast"):
            return F.embedding(ids, W * one, 3, scale_grad_by_freq=by_frequency).sin().sum((1, 2))

    check(losses, {"W": W}, ["W"])


def test_lookups_under_vmap() -> None:
    W, ids = parameter(6, 3), torch.tensor([[0, 3, 4, 4], [4, 4, 1, 3], [5, 5, 0, 2]])
    check(lambda: torch.func.vmap(lambda row: F.embedding(row, W, 3).sin().sum())(ids), {"W": W}, ["W"])


def test_lookups_that_shorten_rows() -> None:
    W, ids = parameter(6, 3), torch.tensor([[0, 3], [4, 1], [5, 2]])
    V, v = nn.Parameter(W.detach().clone()), {"W": randn(6, 3)}
    losses = rg.jvp(lambda: F.embedding(ids, W, 0, max_norm=0.5).sin().sum((1, 2)), {"W": W}, v)
    expected = by_rows(lambda: F.embedding(ids, V, 0, max_norm=0.5).sin().sum((1, 2)), v, {"W": V})
    torch.testing.assert_close(losses[1], expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(W, V)
    assert float(W.detach()[ids].norm(dim=2).max()) < 0.5001


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("ragged", [False, True])
def test_bags(mode: str, ragged: bool, taken: list) -> None:
    W, ids, starts = parameter(6, 3), torch.tensor([[0, 3, 4], [4, 4, 1], [5, 0, 2]]), torch.tensor([0, 2, 2])

    def losses() -> Tensor:
        if ragged:
            return F.embedding_bag(ids.flatten(), W, starts, mode=mode, padding_idx=4).sin().sum(1)
        return F.embedding_bag(ids, W, mode=mode).sin().sum(1)

    check(losses, {"W": W}, ["W"])
    assert taken == [F.embedding_bag]


@pytest.mark.filterwarnings("ignore:.*no rule for how the examples meet")
def test_bags_that_are_not_linear_or_scale_gradients(taken: list) -> None:
    ids = torch.tensor([[0, 3, 4], [4, 4, 1], [5, 0, 2]])
    every: list[dict[str, Any]] = [
        {"mode": "max"}, {"mode": "sum", "scale_grad_by_freq": True}, {"mode": "sum", "max_norm": 0.1},
    ]  # fmt: skip
    for options in every:
        W = parameter(6, 3)
        with pytest.warns(rg.RowgradWarning, match="_embedding_bag"):
            check(lambda W=W, o=options: F.embedding_bag(ids, W, **o).sin().sum(1), {"W": W}, ["W"])
    assert not taken


@pytest.mark.parametrize("moved", [["W"], ["a"], ["W", "a"]], ids=str)
def test_bags_with_weights(moved: list[str], taken: list) -> None:
    W, a, ids = parameter(6, 3), parameter(3, 3), torch.tensor([[0, 3, 4], [4, 4, 1], [5, 0, 2]])
    check(lambda: F.embedding_bag(ids, W, mode="sum", per_sample_weights=a).sin().sum(1), {"W": W, "a": a}, moved)
    assert taken == [F.embedding_bag]


def test_no_rule_where_a_backward_pass_is_recorded(taken: list) -> None:
    """A slope in the input, whose own derivative needs the tangents of what the backward pass reads."""
    model = nn.Sequential(nn.Linear(3, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 1)).double()
    x = randn(4, 3)

    def losses() -> Tensor:
        at = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(at).sum(), at, create_graph=True)
        return slope.square().sum(1)

    check(losses, dict(model.named_parameters()), [name for name, _ in model.named_parameters()])
    assert not taken


def test_no_rule_under_autocast(taken: list) -> None:
    model = nn.Sequential(nn.Linear(8, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 40))
    x, v = torch.randn(4, 8), {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().sum(1)

    found, expected = rg.jvp(losses, model, v)[1], by_rows(losses, v, dict(model.named_parameters()))
    assert not taken
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    rg.jvp(lambda: model(x).square().sum(1), model, v)
    assert taken


def test_no_rule_under_vmap(taken: list) -> None:
    W, x = parameter(40, 5), randn(4, 5)
    check(lambda: torch.func.vmap(lambda row: F.linear(row, W).sin().sum())(x), {"W": W}, ["W"])
    assert not taken


@pytest.mark.parametrize("moved", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("near", [1, 30, 2**20])
def test_attention(moved: str, options: dict[str, Any], near: int, taken: list, monkeypatch) -> None:
    """Of 5 queries and 3 keys, for 4 examples with 2 heads each, some pieces at a time."""
    monkeypatch.setattr(rules, "NEAR", near)
    params = {"q": parameter(4, 2, 5, 6), "k": parameter(4, 2, 3, 6), "v": parameter(4, 3, 2, 7)}

    def losses() -> Tensor:
        q, k, v = params["q"], params["k"], params["v"].transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, **options).sin().sum((1, 2, 3))

    check(losses, params, list(moved))
    assert taken == [F.scaled_dot_product_attention]


@pytest.mark.parametrize("kind", ["mask", "learned mask", "dropout", "grouped queries", "shared keys"])
def test_attention_left_to_pytorch(kind: str, taken: list) -> None:
    params = {"q": parameter(3, 4, 5, 6), "k": parameter(3, 4, 5, 6), "v": parameter(3, 4, 5, 6), "m": parameter(5, 5)}
    q, k, v, m = params.values()

    def losses() -> Tensor:
        torch.manual_seed(0)
        given: dict[str, tuple[Tensor, Tensor, dict[str, Any]]] = {
            "mask": (k, v, {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()}),
            "learned mask": (k, v, {"attn_mask": m}),
            "dropout": (k, v, {"dropout_p": 0.3}),
            "grouped queries": (k[:, :2], v[:, :2], {"enable_gqa": True}),
            "shared keys": (k[:1, :1], v[:1, :1], {}),
        }
        keys, values, options = given[kind]
        return F.scaled_dot_product_attention(q, keys, values, **options).sin().sum((1, 2, 3))

    check(losses, params, ["q", "k", "v", "m"])
    assert not taken
