"""Mini-batch and full gradient: the Gram matrix against gradients written out, and what the seed says of both."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from examples.batch_and_full import SIZES, Moment, cosine, draw, predicted, run, table
from torch import Tensor, nn

import rowgrad as rg

EARLY, LATE = 0, 10


@pytest.fixture
def losses_and_net() -> tuple[Tensor, nn.Module]:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
    return F.cross_entropy(net(x), y, reduction="none"), net


def test_the_cosine_is_that_of_two_gradients_of_autograd(losses_and_net: tuple[Tensor, nn.Module]) -> None:
    losses, net = losses_and_net
    batches = torch.tensor([[0, 3, 7], [8, 1, 2]])
    J = rg.jacobian(losses, net, retain_graph=True)
    found = cosine(J.gram(), batches)

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)])

    full = gradient(losses.mean())
    expected = torch.stack([F.cosine_similarity(gradient(losses[b].mean()), full, dim=0) for b in batches])
    torch.testing.assert_close(found, expected)
    weights = F.one_hot(batches, 9).sum(1) / 3.0
    along = J @ J.weighted_sum(1 / 9)  # g_i . g, by a direction in place of the Gram matrix
    norms = torch.stack([gradient(losses[b].mean()).norm() for b in batches])
    torch.testing.assert_close((weights.double() @ along) / norms / full.norm(), expected)


def test_the_prediction_has_the_mean_square_of_all_batches(losses_and_net: tuple[Tensor, nn.Module]) -> None:
    """Over all 84 batches of 3 of 9 examples the law holds without error; of 9 the cosine is 1."""
    gram = rg.jacobian(*losses_and_net).gram()
    blocks = [gram[list(b)][:, list(b)].mean() for b in combinations(range(9), 3)]
    assert predicted(gram, 3) ** 2 == pytest.approx(float(gram.mean() / torch.stack(blocks).mean()), rel=1e-12)
    assert predicted(gram, 9) == pytest.approx(1, rel=1e-12)
    assert predicted(gram, 1) < predicted(gram, 3) < 1


@pytest.fixture(scope="module")
def moments() -> list[Moment]:
    return run((EARLY, 3, LATE), n_batches=200)


def test_early_a_small_batch_has_the_direction_and_later_it_has_not(moments: list[Moment]) -> None:
    """Section 3.3: of batches of 32 it falls from above 0.6 to below 0.2; late 128 do worse than 8 did early."""
    early, between, late = moments
    assert early.of(32).mean > 0.6 > 0.3 > between.of(32).mean > 0.2 > late.of(32).mean
    assert late.of(128).mean < early.of(8).mean
    assert late.norm < early.norm / 5
    assert early.noise < 60 < 600 < late.noise


def test_the_cosines_are_those_predicted(moments: list[Moment]) -> None:
    for moment in moments:
        for size in (32, 128):
            assert moment.of(size).mean == pytest.approx(moment.of(size).predicted, abs=0.03)
        means = [c.mean for c in moment.cosines[1:]]
        assert means == sorted(means)
        assert all(c.spread > 0 for c in moment.cosines)


def test_the_table_and_the_figure(moments: list[Moment], tmp_path: Path) -> None:
    lines = table(moments).splitlines()
    assert len(lines) == 1 + len(moments) * len(SIZES)
    assert lines[3].split()[4:6] == ["32", f"{moments[0].of(32).mean:.3f}"]
    draw(moments, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
