"""Convolutions: every geometry, by every route, in every layout of the images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.reference import assert_scaled_close, flat, rows_by_grad
from tests.rows.laws import assert_laws, energy, rows_in_double, trained
from tests.rows.sizes import Largest
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.rows import patches
from rowgrad.rows.build import condensed_jacobian
from rowgrad.rows.factors import Dense
from rowgrad.rows.patches import Convolved

SINGLE = 2e-5  # of the row's norm, float32 against the same network in float64
HALF = 6e-2  # bfloat16 keeps 8 bits of every activation and cotangent

Patch = pytest.MonkeyPatch

# name -> layer, shape of one example
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(2, 3, 3), (2, 7)),
    "1d, without bias": (lambda: nn.Conv1d(2, 3, 3, bias=False), (2, 7)),
    "1d, strided, dilated": (lambda: nn.Conv1d(2, 3, 3, stride=2, dilation=3, padding=4), (2, 9)),
    "1d, one position": (lambda: nn.Conv1d(2, 3, 5), (2, 5)),
    "2d": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 6)),
    "2d, kernel of one": (lambda: nn.Conv2d(4, 3, 1), (4, 3, 4)),
    "2d, patches that do not overlap": (lambda: nn.Conv2d(2, 3, 2, stride=2), (2, 6, 4)),
    "2d, padded": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2)), (2, 4, 3)),
    "2d, padding same": (lambda: nn.Conv2d(2, 3, (3, 4), padding="same", dilation=(2, 1)), (2, 5, 5)),
    "2d, padding valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 4, 4)),
    "2d, padding circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    "2d, padding reflect": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 4)),
    "2d, padding replicate": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), (2, 4, 4)),
    "2d, strided with a rest": (lambda: nn.Conv2d(2, 3, 3, stride=(2, 3)), (2, 8, 9)),
    "2d, stride above the kernel": (lambda: nn.Conv2d(2, 3, 2, stride=3, padding=1), (2, 7, 7)),
    "2d, dilated above the stride": (lambda: nn.Conv2d(2, 3, 3, stride=2, dilation=(3, 2)), (2, 9, 8)),
    "2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 4)),
    "2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, stride=2), (4, 5, 5)),
    "2d, depthwise with a multiplier": (lambda: nn.Conv2d(3, 6, 2, groups=3, bias=False), (3, 4, 4)),
    "3d": (lambda: nn.Conv3d(2, 3, (2, 1, 3), stride=(1, 2, 1), padding=(1, 0, 1)), (2, 3, 4, 3)),
    "3d, depthwise, dilated": (lambda: nn.Conv3d(2, 4, 2, groups=2, dilation=(1, 2, 1)), (2, 3, 4, 3)),
    "1d, transposed": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4)),
    "2d, transposed": (lambda: nn.ConvTranspose2d(2, 3, (2, 3), bias=False), (2, 3, 4)),
    "2d, transposed, grouped, strided": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, padding=1), (4, 3, 3)),
    "2d, transposed, with a rest": (lambda: nn.ConvTranspose2d(2, 3, 3, dilation=2, output_padding=1), (2, 4, 4)),
    "3d, transposed": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 2, 3)),
}


def _by_gram(patch: Patch) -> None:
    patch.setattr(Convolved, "_gram_cost", 0)
    patch.setattr(patches, "CANCELLATION", 0.0)


def _formed_of_patches(patch: Patch) -> None:
    patch.setattr(Convolved, "_gram_cost", math.inf)


def _formed(patch: Patch) -> None:
    """In single precision by folding, however few the channels."""
    _formed_of_patches(patch)
    patch.setattr(patches, "FEW_CHANNELS", 0)


def _formed_in_pieces(patch: Patch) -> None:
    _formed(patch)
    patch.setattr(patches, "CACHE_BYTES", 1)
    patch.setattr(patches, "KEEP_BYTES", 0)


ROUTES: dict[str, Callable[[Patch], None]] = {
    "by Gram": _by_gram,
    "formed": _formed,
    "formed of patches": _formed_of_patches,
    "formed, in pieces": _formed_in_pieces,
}


def network(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(len(name))
    return nn.Sequential(LAYERS[name][0](), nn.Tanh()).to(dtype)


def images(name: str, n: int) -> Tensor:
    return torch.randn(n, *LAYERS[name][1], dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def losses_of(net: nn.Module, x: Tensor) -> Tensor:
    with warnings.catch_warnings():  # PyTorch remarks, once a process, that it copies the input for some paddings
        warnings.simplefilter("ignore")
        return energy(net(x.to(next(net.parameters()).dtype)))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_geometries(name: str, n: int) -> None:
    net = network(name)
    assert_laws(losses_of(net, images(name, n)), trained(net))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", LAYERS)
def test_routes_in_double_precision(name: str, route: str, monkeypatch: Patch) -> None:
    ROUTES[route](monkeypatch)
    net = network(name)
    losses = losses_of(net, images(name, 3))
    assert_laws(losses, trained(net))
    norms = flat(rows_by_grad(losses, trained(net))).norm(dim=1)
    assert_scaled_close(rg.grad_norms(losses, net), norms, norms)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", LAYERS)
def test_routes_in_single_precision(name: str, route: str, monkeypatch: Patch) -> None:
    """Here rows may be formed by folding the examples into groups."""
    ROUTES[route](monkeypatch)
    net, x = network(name, torch.float32), images(name, 3)
    rows = rows_in_double(net, lambda twin: losses_of(twin, x))
    assert_laws(losses_of(net, x), trained(net), rtol=SINGLE, rows=rows)


@pytest.mark.parametrize("name", [n for n in LAYERS if not n.startswith("3d")])
def test_half_precision(name: str) -> None:
    net, x = network(name, torch.bfloat16), images(name, 3)
    rows = rows_in_double(net, lambda twin: losses_of(twin, x))
    J = assert_laws(losses_of(net, x).float(), trained(net), rtol=HALF, rows=rows)
    assert {g.dtype for g in J.weighted_sum(1.0).values()} == {torch.bfloat16}


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias"])
@pytest.mark.parametrize("name", ["2d", "2d, depthwise", "1d, transposed"])
def test_frozen(name: str, frozen: str) -> None:
    net = network(name)
    net.get_parameter(frozen).requires_grad_(False)
    J = assert_laws(losses_of(net, images(name, 3)), trained(net))
    assert frozen not in J.names


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", ["1d", "2d", "2d, kernel of one", "2d, depthwise", "2d, transposed", "3d"])
def test_used_twice(name: str, n: int) -> None:
    """On inputs of two sizes, so that no two positions correspond."""
    net, x = network(name), images(name, n)
    larger = torch.cat([x, x.cos(), x.sin()], -1)
    assert_laws(losses_of(net, x) + losses_of(net, larger), trained(net))


@pytest.mark.parametrize("route", ROUTES)
def test_used_three_times_in_a_row(route: str, monkeypatch: Patch) -> None:
    ROUTES[route](monkeypatch)
    layer = nn.Conv2d(3, 3, 3, padding=1).double()
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    for _ in range(3):
        x = layer(x).tanh()
    assert_laws(energy(x), trained(layer))


@pytest.mark.parametrize("name", ["2d", "2d, patches that do not overlap", "2d, transposed"])
def test_scaled_losses_and_transformed_cotangents(name: str) -> None:
    net, x = network(name), images(name, 3)
    rows = rows_by_grad(losses_of(net, x), trained(net))
    norms = flat(rows).norm(dim=1)
    assert_scaled_close(rg.jacobian(losses_of(net, x), net, loss_scale=8.0).norms(), norms, norms)
    rg.jacobian(losses_of(net, x), net).backward(1.0, transform=lambda _, zbar: 3 * zbar)
    for parameter, row in rows.items():
        torch.testing.assert_close(net.get_parameter(parameter).grad, 3 * row.sum(0))


# -- layouts -----------------------------------------------------------------------------------------------------------


def _consecutive(z: Tensor, n: int) -> Tensor:
    return z.unflatten(0, (n, -1))


def _interleaved(z: Tensor, n: int) -> Tensor:
    return z.unflatten(0, (-1, n)).transpose(0, 1)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("by_example", [_consecutive, _interleaved])
@pytest.mark.parametrize("name", ["1d", "2d", "2d, grouped", "2d, patches that do not overlap", "2d, transposed"])
def test_frames_folded_into_the_batch(name: str, by_example: Callable, route: str, monkeypatch: Patch) -> None:
    ROUTES[route](monkeypatch)
    net = network(name)
    assert_laws(energy(by_example(net(images(name, 12)), 3)), trained(net))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["1d", "2d", "2d, depthwise", "2d, transposed"])
def test_examples_with_different_numbers_of_images(name: str, route: str, monkeypatch: Patch) -> None:
    ROUTES[route](monkeypatch)
    net = network(name)
    owner = torch.tensor([2, 0, 0, 1, 2, 2, 0])
    losses = torch.zeros(3, dtype=torch.float64).index_add(0, owner, energy(net(images(name, 7))))
    J = assert_laws(losses, trained(net))
    for part, n_images in ((J, [3, 1, 3]), (J[[1, 0]], [1, 3])):
        of_image = part.factors("0.weight")[0][2]
        assert torch.bincount(of_image).tolist() == [n * len(of_image) // sum(n_images) for n in n_images]


def test_one_image_at_a_time_without_a_batch_dimension() -> None:
    net, x = network("2d"), images("2d", 3)
    assert_laws(torch.stack([net(image).square().sum() for image in x]), trained(net))


def test_examples_along_the_positions() -> None:
    """A kernel of one moves along the batch."""
    layer, x = nn.Conv1d(4, 3, 1).double(), torch.randn(5, 4, dtype=torch.float64)
    assert_laws(energy(layer(x.T.unsqueeze(0)).squeeze(0).T), trained(layer))


def test_channels_last() -> None:
    net = network("2d, padded").to(memory_format=torch.channels_last)
    assert_laws(losses_of(net, images("2d, padded", 3).to(memory_format=torch.channels_last)), trained(net))


def test_a_weight_seen_through_a_permutation_and_a_slice() -> None:
    weight = nn.Parameter(torch.randn(3, 3, 5, 6, dtype=torch.float64))
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    assert_laws(energy(F.conv2d(x, weight.permute(3, 2, 0, 1)[1:5])), {"weight": weight})


def test_no_examples_are_left() -> None:
    net = network("2d")
    J = rg.jacobian(losses_of(net, images("2d", 3)), net)[[]]
    assert J.norms().shape == (0,)
    assert J.dense().shape == (0, J.shape[1])
    assert not any(g.any() for g in J.weighted_sum(1.0).values())


# -- digits and bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["norms", "grad_norms"])
def test_positions_that_cancel_keep_their_digits(by: str) -> None:
    """Two images of an example cancel to 1e-7, so that the Gram route alone would keep two digits of the square."""
    layer = nn.Conv2d(16, 16, 3, bias=False).double()
    image = torch.randn(3, 1, 16, 4, 4, dtype=torch.float64)
    x = torch.cat([image, -image * (1 - 1e-7)], 1).flatten(0, 1)
    losses = layer(x).reshape(3, -1).sum(1)
    norms = flat(rows_by_grad(losses, trained(layer))).norm(dim=1)
    J = rg.jacobian(losses, layer, retain_graph=True)
    assert "Gram" in str(J.explain())
    found = J.norms() if by == "norms" else rg.grad_norms(losses, layer)
    assert_scaled_close(found, norms, norms, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ask", ["norms", "weighted_sum", "dot"])
def test_neither_rows_nor_patches_are_held(ask: str, dtype: torch.dtype) -> None:
    """One layer with many positions, where patches would be 9 times the input, and one with few, but large rows."""
    net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.AvgPool2d(8), nn.Conv2d(32, 256, 3, padding=1)).to(dtype)
    x = torch.randn(64, 32, 32, 32, dtype=dtype)
    J = rg.jacobian(energy(net(x)), net)
    arguments = {"norms": (), "weighted_sum": (1.0,), "dot": (list(net.parameters()),)}[ask]
    with Largest() as largest:
        getattr(J, ask)(*arguments)
    assert 64 * net[2].weight.nbytes > 2 * x.nbytes
    assert largest.bytes < 1.2 * x.nbytes


@pytest.mark.parametrize(("side", "channels", "kind"), [
    (16, 8, Dense),
    (16, 32, Convolved),  # 9,216 entries a row, 8,192 cotangents
    (4, 1, Convolved),  # positions so few that the sum forms no rows
])  # fmt: skip
def test_rows_are_written_out_early_where_they_take_no_more_than_cotangents(
    side: int, channels: int, kind: type, monkeypatch: Patch
) -> None:
    _formed(monkeypatch)
    layer, x = nn.Conv2d(channels, channels, 3, padding=1), torch.randn(4, channels, side, side)
    losses = energy(layer(x))
    (form,) = condensed_jacobian(losses, layer, retain_graph=True)._blocks.by_name["weight"].regions[0].forms
    assert type(form) is kind
    monkeypatch.setattr(Convolved, "_gram_cost", 0)
    (form,) = condensed_jacobian(losses, layer)._blocks.by_name["weight"].regions[0].forms
    assert isinstance(form, Convolved)


@pytest.mark.parametrize(("channels", "side", "prefers_gram", "keeps"), [
    (64, 8, True, False),  # few positions: a sum without rows is cheaper than rows
    (128, 12, True, False),
    (128, 16, True, True),  # by Gram matrices, unless a sum is asked for next
    (16, 16, False, True),
    (2, 16, False, True),  # products with patches
])  # fmt: skip
def test_norms_form_rows_that_they_do_not_need_where_the_sum_does(
    channels: int, side: int, prefers_gram: bool, keeps: bool
) -> None:
    layer, x = nn.Conv2d(channels, channels, 3, padding=1), torch.randn(4, channels, side, side)
    losses = energy(layer(x))
    for keep in (False, True):
        J = rg.jacobian(losses, layer, retain_graph=True)
        (form,) = J._blocks.by_name["weight"].regions[0].forms
        assert isinstance(form, Convolved)
        assert form.prefers_gram == prefers_gram
        found = form.sq_norms(keep=keep)
        assert (form._formed is not None) == (keep and keeps)
        torch.testing.assert_close(found, form.dense().flatten(1).square().sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("channels", "groups", "folds"), [
    ((5, 6), 1, True), ((4, 6), 1, False), ((6, 4), 1, False), ((4, 4), 4, True),
])  # fmt: skip
def test_hardly_any_channels_are_not_folded(channels: tuple[int, int], groups: int, folds: bool) -> None:
    layer = nn.Conv2d(*channels, 3, groups=groups)
    J = rg.jacobian(energy(layer(torch.randn(3, channels[0], 9, 9))), layer)
    (form,) = J._blocks.by_name["weight"].regions[0].forms
    assert isinstance(form, Convolved)
    assert form._folds == folds


def test_folded_rows_are_formed_in_pieces(monkeypatch: Patch) -> None:
    _formed(monkeypatch)
    layer, x = nn.Conv2d(64, 128, 3), torch.randn(64, 64, 4, 4)
    J = rg.jacobian(energy(layer(x)), layer)
    with Largest() as largest:
        J.norms()
    assert largest.bytes <= patches.CACHE_BYTES < 64 * layer.weight.nbytes / 4
