"""Weights computed from parameters: rows reach the parameters in factors, and agree with autograd loss by loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.rows.laws import assert_laws, energy
from torch import Tensor
from torch.nn.utils import parametrizations, prune

import rowgrad as rg
from rowgrad.errors import StaleJacobianError
from rowgrad.rows import factors
from rowgrad.rows.general import GeneralPath
from rowgrad.rows.hadamard import Hadamard

P = dict[str, Tensor]
SHAPES = {"W": (4, 3), "A": (4, 2), "B": (2, 3), "g": (4, 1), "k": (3,), "s": (), "U": (5, 3), "V": (5, 4)}
IDS = torch.tensor([0, 2, 2, 4])
MASK = (torch.arange(12).view(4, 3) % 5 > 1).double()
ROWS, COLUMNS = torch.arange(1.0, 5.0, dtype=torch.float64).unsqueeze(1), torch.arange(1.0, 4.0, dtype=torch.float64)
NOISE = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    return torch._weight_norm(v, g, dim)


# fmt: off
# name -> weight (4, 3) of a layer from 3 to 4
WEIGHTS: dict[str, Callable[[P], Tensor]] = {
    "merged low-rank update":       lambda p: p["W"] + 0.5 * (p["A"] @ p["B"]),
    "update subtracted":            lambda p: p["W"] - p["A"] @ p["B"],
    "sub with alpha":               lambda p: torch.sub(p["W"], p["A"] @ p["B"], alpha=3),
    "product of three":             lambda p: p["V"].T @ p["U"] @ (p["W"].T @ p["W"]),
    "learned scale":                lambda p: p["s"] * p["W"],
    "scale of the rows":            lambda p: p["g"] * p["W"],
    "scale of the columns":         lambda p: p["W"] * p["k"],
    "divided by a number":          lambda p: p["W"] / (2 + p["s"]),
    "divided by a narrower number": lambda p: p["W"] / torch.tensor(3.0),
    "divided by a whole number":    lambda p: p["W"] / torch.tensor(3),
    "shared factor":                lambda p: p["W"] + p["W"] @ (p["A"] @ p["B"]).T @ p["W"],
    "weight norm":                  lambda p: _weight_norm(p["W"], p["g"], 0),
    "weight norm of an update":     lambda p: _weight_norm(p["W"] + p["A"] @ p["B"], p["g"], 0),
    "norm of the columns":          lambda p: _weight_norm(p["W"], p["k"].reshape(1, 3), 1),
    "looked up":                    lambda p: F.embedding(IDS, p["U"]),
    "looked up with padding":       lambda p: F.embedding(IDS, p["U"], padding_idx=2),
    "looked up, sparse":            lambda p: F.embedding(IDS, p["U"], padding_idx=2, sparse=True),
    "indexed":                      lambda p: p["U"][IDS],
    "indexed twice":                lambda p: (p["U"] @ p["W"].T)[IDS[:, None], torch.tensor([0, -1, 3])],
    "masked":                       lambda p: p["W"] * MASK,
    "masked twice":                 lambda p: MASK * (p["W"] * MASK.T.reshape(4, 3)),
    "masked update":                lambda p: (p["W"] + p["A"] @ p["B"]).masked_fill(MASK == 0, 0.5),
    "masked weight norm":           lambda p: _weight_norm(p["W"], p["g"], 0) * MASK,
    "masked, looked up":            lambda p: F.embedding(IDS, p["U"] * MASK.repeat(2, 1)[:5]),
    "masked after looking up":      lambda p: F.embedding(IDS, p["U"]) * MASK,
    "entry by entry":               lambda p: p["W"] * p["V"].T[:, :3],
    "divided entry by entry":       lambda p: p["W"] / (2 + MASK),
    "divided row by row":           lambda p: p["W"] / ROWS,
    "divided column by column":     lambda p: p["W"] / COLUMNS,
    "squashed":                     lambda p: F.softplus(p["W"]),
    "squashed and scaled":          lambda p: p["s"] * (p["W"].tanh().exp() * p["k"]),
    "drawn around a mean":          lambda p: p["W"] + NOISE * F.softplus(p["U"][1:]),
    "lower triangle":               lambda p: p["W"].tril(-1) + p["A"] @ p["B"].triu(),
    "chosen":                       lambda p: torch.where(MASK > 0, p["W"], -p["U"][:4] ** 2),
    "clamped":                      lambda p: p["W"].clamp(-0.5, 0.5),
    "quantized":                    lambda p: torch.fake_quantize_per_tensor_affine(p["W"], 0.1, 0, -20, 20),
    "divided by a number of Python": lambda p: p["W"] / 1.7,
    "rows scaled, then reshaped":   lambda p: (p["W"] * ROWS).view(3, 4).T,
    "columns scaled, then reshaped": lambda p: (p["W"] / COLUMNS).view(12, 1).view(2, 6).reshape(4, 3),
    "negated, reshaped, copied":    lambda p: (-p["A"] @ p["B"]).clone().view(2, 2, 3).reshape(4, 3),
}
# fmt: on


def _params(dtype: torch.dtype = torch.float64) -> P:
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in SHAPES.items()}


def _reached(losses: Tensor, params: P) -> P:
    grads = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True, retain_graph=True)
    return {name: p for (name, p), g in zip(params.items(), grads, strict=True) if g is not None}


@pytest.fixture
def no_general_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("rows were written out")

    monkeypatch.setattr(GeneralPath, "written_out", refuse)
    monkeypatch.setattr(GeneralPath, "row", refuse)


@pytest.mark.parametrize("positions", [1, 2, 6])
@pytest.mark.parametrize("name", WEIGHTS)
def test_computed_weight(name: str, positions: int) -> None:
    params = _params()
    x = torch.randn(5, positions, 3, dtype=torch.float64)
    losses = energy(F.linear(x, WEIGHTS[name](params)).tanh())
    assert_laws(losses, _reached(losses, params))


@pytest.mark.parametrize("name", WEIGHTS)
def test_is_pushed_in_factors(name: str, no_general_path: None) -> None:
    params = _params()
    losses = energy(F.linear(torch.randn(5, 3, dtype=torch.float64), WEIGHTS[name](params)).tanh())
    assert rg.jacobian(losses, params, retain_graph=True).norms().isfinite().all()
    assert rg.grad_norms(losses, params).isfinite().all()


def test_low_rank_factors_are_as_thin_as_the_update() -> None:
    params = _params()
    losses = energy(F.linear(torch.randn(5, 3, dtype=torch.float64), params["W"] + params["A"] @ params["B"]))
    J = rg.jacobian(losses, {n: params[n] for n in "WAB"})
    ((h, zbar, _),) = J.factors("A")
    assert (h.shape, zbar.shape) == ((5, 2), (5, 4))
    ((h, zbar, _),) = J.factors("B")
    assert (h.shape, zbar.shape) == ((5, 3), (5, 2))


COMPLEX = torch.randn(4, 3, dtype=torch.cdouble, generator=torch.Generator().manual_seed(0))
# name -> complex weight (4, 3), of real parameters
COMPLEX_WEIGHTS: dict[str, Callable[[P], Tensor]] = {
    "cast": lambda p: p["W"].to(torch.cdouble),
    "cast of a view": lambda p: p["W"].T[:, :].to(torch.cdouble).T,
    "made of two": lambda p: torch.complex(p["W"], p["A"] @ p["B"]),
    "times a constant": lambda p: torch.complex(p["W"], p["W"]) * (1 + 2j),
    "times a matrix": lambda p: torch.complex(p["W"], -p["W"]) @ COMPLEX[:3],
    "a matrix times": lambda p: (COMPLEX @ COMPLEX.mH) @ torch.complex(p["W"], 2 * p["W"]),
    "divided": lambda p: torch.complex(p["W"], p["W"]) / torch.tensor(2 - 1j),
    "by an angle": lambda p: torch.polar(p["W"].exp(), p["A"] @ p["B"]) * (2 + 1j),
}


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
@pytest.mark.parametrize("times", ["real", "complex", "elementwise"])
@pytest.mark.parametrize("name", COMPLEX_WEIGHTS)
def test_complex_weight_of_real_parameters(name: str, times: str) -> None:
    """The derivative of a real loss: conjugated on the way, and of what reaches a parameter the real part."""
    params = _params()
    weight = COMPLEX_WEIGHTS[name](params)
    x = torch.randn(5, 3, dtype=torch.double if times == "real" else torch.cdouble)
    out = x.unsqueeze(1) * weight if times == "elementwise" else F.linear(x.to(weight.dtype), weight)
    losses = energy((out + 1j).abs())
    J = assert_laws(losses, _reached(losses, params), ruled=False)
    assert J.dense().dtype == torch.float64


def test_embedding_table_with_an_update() -> None:
    params = _params()
    ids = torch.tensor([[0, 1, 1], [3, 3, 3], [2, 0, 2]])
    losses = energy(F.embedding(ids, params["W"] + params["A"] @ params["B"]))
    assert_laws(losses, {n: params[n] for n in "WAB"})


def test_stack_of_updates() -> None:
    torch.manual_seed(0)
    params = {
        n: torch.randn(s, dtype=torch.float64).requires_grad_() for n, s in {"X": (2, 3, 1), "Y": (2, 1, 4)}.items()
    }
    x = torch.randn(2, 5, 3, dtype=torch.float64)  # experts, examples
    losses = energy((x @ (params["X"] @ params["Y"])).tanh().transpose(0, 1))
    assert_laws(losses, params)


@pytest.mark.parametrize("dim", [0, 2])
def test_convolution_with_weight_norm(dim: int, no_general_path: None) -> None:
    torch.manual_seed(0)
    model = parametrizations.weight_norm(torch.nn.Conv1d(2, 3, 2), dim=dim).double()
    losses = energy(model(torch.randn(4, 2, 5, dtype=torch.float64)))
    params = dict(model.named_parameters())
    rows = {n: torch.stack(gs) for n, gs in _rows(losses, params).items()}
    J = rg.jacobian(losses, params, retain_graph=True)
    for name, row in J.dense(as_dict=True).items():
        torch.testing.assert_close(row, rows[name], rtol=1e-10, atol=1e-12)


def _rows(losses: Tensor, params: P) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {n: [] for n in params}
    for loss in losses:
        for n, g in zip(params, torch.autograd.grad(loss, list(params.values()), retain_graph=True), strict=True):
            found[n].append(g)
    return found


@pytest.mark.parametrize("distance", [0, 1e-7])
def test_rows_almost_along_the_weight(distance: float) -> None:
    """What is left of them is small: it is not taken as the difference of two squares."""
    v = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64).requires_grad_()
    x = v.detach() + distance * torch.tensor([[1.0, 1, -1], [2.0, 1, -1]], dtype=torch.float64)
    losses = energy(F.linear(x, torch._weight_norm(v, torch.ones(1, 1).double(), 0)))
    rows = torch.stack(_rows(losses, {"v": v})["v"]).flatten(1).norm(dim=1)
    torch.testing.assert_close(rg.grad_norms(losses, {"v": v}), rows, rtol=1e-6, atol=1e-14)


def test_spectral_norm(no_general_path: None) -> None:
    torch.manual_seed(0)
    model = parametrizations.spectral_norm(torch.nn.Linear(4, 5)).double().eval()
    losses = energy(model(torch.randn(3, 4, dtype=torch.float64)))
    assert_rows = rg.jacobian(losses, model, retain_graph=True).dense(as_dict=True)
    for name, rows in _rows(losses, dict(model.named_parameters())).items():
        torch.testing.assert_close(assert_rows[name], torch.stack(rows), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("positions", [1, 2])
def test_stack_of_masked_matrices(positions: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    x = torch.randn(2, positions * 5, 3, dtype=torch.float64)  # experts, positions of examples
    losses = energy((x @ (w * NOISE.T)).tanh().transpose(0, 1)).view(positions, 5).sum(0)
    J = assert_laws(losses, {"w": w})
    assert J.explain().entries[0].stuck is None


@pytest.mark.parametrize("model", [
    lambda: torch.nn.Conv1d(2, 3, 2),
    lambda: torch.nn.Conv2d(4, 4, 2, groups=2, stride=2),
    lambda: torch.nn.ConvTranspose1d(2, 3, 2),
    lambda: torch.nn.Linear(5, 3),
], ids=["convolution", "groups", "transposed", "linear"])  # fmt: skip
def test_pruned_layers(model: Callable[[], torch.nn.Module]) -> None:
    torch.manual_seed(0)
    layer = model().double()
    for name in ("weight", "bias"):
        prune.random_unstructured(layer, name, 0.5)
    shape = (3, 4, 5, 5) if isinstance(layer, torch.nn.Conv2d) else (3, 2, 5)
    losses = energy(layer(torch.randn(shape, dtype=torch.float64)).tanh())
    J = assert_laws(losses, dict(layer.named_parameters()))
    assert not any(entry.stuck for entry in J.explain().entries)


@pytest.mark.parametrize("shape", [(1, 12), (12, 1), (2, 6), (6, 2), (3, 4)])
@pytest.mark.parametrize("scale", [
    lambda p: p["W"] * ROWS, lambda p: p["W"] / ROWS, lambda p: p["W"] * COLUMNS, lambda p: p["W"] / COLUMNS,
    lambda p: p["W"] * p["g"], lambda p: p["W"] * p["k"],
], ids=["rows", "by rows", "columns", "by columns", "learned rows", "learned columns"])  # fmt: skip
def test_scaled_in_another_shape_than_used(scale: Callable[[P], Tensor], shape: tuple[int, int]) -> None:
    params = _params()
    weight = scale(params).view(shape)
    losses = energy((torch.randn(5, shape[1], dtype=torch.float64) @ weight.T).tanh())
    assert_laws(losses, _reached(losses, params))


@pytest.mark.parametrize("weight", [
    lambda p: (p["A"] @ p["B"]) * MASK,
    lambda p: torch.where(MASK > 0, p["A"] @ p["B"], MASK),
    lambda p: (p["A"] @ p["B"]) / (MASK + 1),
    lambda p: torch.add(MASK, p["A"] @ p["B"]),
], ids=["masked", "chosen", "divided", "added"])  # fmt: skip
def test_factors_narrower_than_what_is_made_of_them(weight: Callable[[P], Tensor]) -> None:
    params = {name: p for name, p in _params(torch.float32).items() if name in "AB"}
    losses = energy((torch.randn(5, 3, dtype=torch.float64) @ weight(params).T).tanh())
    assert_laws(losses, params, rtol=1e-6)


@pytest.mark.parametrize(("of_data", "of_losses"), [(1e10, 1e-24), (1e-24, 1e12), (1e-12, 1e12)])
def test_sides_whose_squares_are_out_of_range(of_data: float, of_losses: float) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(4, 3).requires_grad_(), torch.randn(5, 3) * of_data
    losses = (x @ (w * NOISE.float()).T).sum(1) * of_losses
    rows = torch.stack(_rows(losses, {"w": w})["w"]).double()
    torch.testing.assert_close(rg.grad_norms(losses, {"w": w}).double(), rows.flatten(1).norm(dim=1), rtol=1e-5, atol=0)


def test_derivatives_out_of_the_range_of_half_precision() -> None:
    w = torch.full((4, 3), 1e-5).half().requires_grad_()
    losses = ((torch.randn(2, 3) * 0.1).half() @ w.log().T * 0.1).sum(1)
    rows = torch.stack(_rows(losses, {"w": w})["w"]).double()
    norms = rg.jacobian(losses, {"w": w}, loss_scale=1.0).norms().double()
    torch.testing.assert_close(norms, rows.flatten(1).norm(dim=1), rtol=2e-3, atol=0)


def test_a_masked_weight_used_often_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses are put together before they pass the mask."""
    asked: list[int] = []
    written_out = Hadamard.dense
    monkeypatch.setattr(Hadamard, "dense", lambda self: asked.append(self.n_examples) or written_out(self))
    w = torch.randn(4, 4, dtype=torch.float64).requires_grad_()
    h = torch.randn(5, 2, 4, dtype=torch.float64)
    masked = w * NOISE[:, :1]  # scales keep factors
    masked = masked * (torch.arange(16).view(4, 4) % 3 > 0)
    for _ in range(6):
        h = torch.tanh(h @ masked)
    losses = energy(h)
    rows = torch.stack(_rows(losses, {"w": w})["w"])
    torch.testing.assert_close(rg.grad_norms(losses, {"w": w}), rows.flatten(1).norm(dim=1))
    assert asked == []


def test_with_rows_of_the_same_weight_in_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "CHUNK_BYTES", 1)
    w = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    one = energy(torch.randn(5, 3, dtype=torch.float64) @ (w * MASK).T)
    other = energy(torch.randn(2, 6, dtype=torch.float64) @ (w * MASK).view(2, 6).T)
    left, right = (torch.stack(_rows(losses, {"w": w})["w"]).flatten(1) for losses in (one, other))
    torch.testing.assert_close(rg.jacobian(one, {"w": w}).gram(rg.jacobian(other, {"w": w})), left @ right.T)


def test_factors_of_a_masked_weight_lie_as_the_parameter_does() -> None:
    w = torch.randn(5, 2, dtype=torch.float64).requires_grad_()
    losses = energy(torch.randn(3, 5, dtype=torch.float64) @ (w.T * torch.rand(2, 5, dtype=torch.float64)).T)
    J = assert_laws(losses, {"w": w})
    ((_, rows, _),) = J.factors("w")
    torch.testing.assert_close(rows, torch.stack(_rows(losses, {"w": w})["w"]))


@pytest.mark.parametrize("layer", [torch.nn.LayerNorm(5), torch.nn.GroupNorm(1, 5), torch.nn.RMSNorm(5)], ids=str)
def test_weight_norm_of_single_entries(layer: torch.nn.Module) -> None:
    torch.nn.init.normal_(layer.double().weight)
    parametrizations.weight_norm(layer)
    losses = energy(layer(torch.randn(3, 5, dtype=torch.float64)).sin())
    assert_laws(losses, dict(layer.named_parameters()))


def test_masks_that_are_changed_are_noticed() -> None:
    mask, w = torch.ones(4, 3), torch.randn(4, 3).requires_grad_()
    J = rg.jacobian(energy(torch.randn(5, 3) @ (w * mask).T), {"w": w})
    mask[0] = 0
    with pytest.raises(StaleJacobianError):
        J.norms()


@pytest.mark.parametrize("max_bytes", [0, None])
def test_rows_of_masked_weights_stay_where_there_is_room(max_bytes: int | None) -> None:
    w = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    losses = energy((torch.randn(5, 9, 3, dtype=torch.float64) @ (w * NOISE).T).tanh())
    rows = torch.stack(_rows(losses, {"w": w})["w"])
    J = rg.jacobian(losses, {"w": w}, max_bytes=max_bytes)
    assert J._blocks is not None
    for _ in range(2):
        torch.testing.assert_close(J.sq_norms("parameter")["w"], rows.flatten(1).square().sum(1))
        torch.testing.assert_close(J.weighted_sum(1.0)["w"], rows.sum(0))
        assert bool(J._blocks.by_name["w"].formed_bytes) == (max_bytes is None)
    torch.testing.assert_close(J.dense(as_dict=True)["w"], rows)
    assert J._blocks.by_name["w"].formed_bytes == 0


def test_function_of_a_parameter_that_is_broadcast() -> None:
    params = _params()
    losses = energy(torch.randn(5, 3, dtype=torch.float64) @ torch.where(MASK > 0, params["W"], params["k"]).T)
    assert_laws(losses, _reached(losses, params))


@pytest.mark.parametrize("width", [4, 600])
def test_a_weight_that_keeps_no_factors_is_told(width: int) -> None:
    layer = torch.nn.Linear(width, width)
    losses = energy(F.linear(torch.randn(3, width), layer.weight.cumsum(1)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told = rg.jacobian(losses, layer).explain()
    assert [str(w.message)[:21] for w in caught] == ([] if width == 4 else ["weight at CumsumBackw"])
    assert "pushed down" in str(told)
    assert "example by example from CumsumBackward0#" in str(told)
    (entry,) = (e for e in told.entries if e.name == "weight")
    assert entry.stuck is not None
    assert told.slow_uses() == []
