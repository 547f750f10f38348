"""Rows that one question forms stay for the next within a bound, and every answer is the same whatever it is."""

from __future__ import annotations

import math

import pytest
import torch
from tests.rows.laws import assert_products, energy, trained
from torch import Tensor, nn

import rowgrad as rg
from rowgrad.rows import factors, patches
from rowgrad.rows.factors import Outer
from rowgrad.rows.pairs import inner

B = 3


@pytest.fixture
def model() -> nn.Sequential:
    """Three layers whose norms form rows: 1,728 and 2,304 entries of float64 an example, and 720."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(12, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 32, 3, padding=1, groups=2), nn.Flatten(2)]
    return nn.Sequential(*layers, nn.Linear(144, 5), nn.Tanh()).double()


@pytest.fixture(autouse=True)
def formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches.Convolved, "_gram_cost", math.inf)
    monkeypatch.setattr(Outer, "prefers_gram", False)


def jacobian(model: nn.Module, max_bytes: int | None) -> tuple[rg.Jacobian, dict[str, Tensor]]:
    x = torch.randn(B, 12, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = energy(model(x))
    rows = rg.jacobian(losses, model, rules={}, retain_graph=True).dense(as_dict=True)
    return rg.jacobian(losses, model, max_bytes=max_bytes), rows


def kept_bytes(J: rg.Jacobian) -> dict[str, int]:
    blocks = J._live().by_name
    return {name: n for name, block in blocks.items() if (n := block.formed_bytes)}


BYTES = {"0.weight": B * 1728 * 8, "2.weight": B * 2304 * 8, "4.weight": B * 720 * 8}
BOUNDS = {
    0: [],
    BYTES["4.weight"]: ["4.weight"],
    BYTES["0.weight"]: ["0.weight"],
    BYTES["2.weight"] - 1: ["0.weight"],
    BYTES["0.weight"] + BYTES["4.weight"]: ["0.weight", "4.weight"],
    sum(BYTES.values()) - 1: ["0.weight", "2.weight"],
    sum(BYTES.values()): list(BYTES),
}


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
@pytest.mark.parametrize(("max_bytes", "kept"), BOUNDS.items())
def test_norms_keep_rows_up_to_the_bound(model: nn.Module, max_bytes: int, kept: list[str]) -> None:
    J, rows = jacobian(model, max_bytes)
    for _ in range(2):
        assert_products(J, rows, 1e-10)
    J, rows = jacobian(model, max_bytes)
    J.norms()
    assert kept_bytes(J) == {name: BYTES[name] for name in kept}


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
@pytest.mark.parametrize("max_bytes", BOUNDS)
def test_no_question_leaves_more(model: nn.Module, max_bytes: int) -> None:
    asked = {
        "diag_gram": lambda J, other: J.diag_gram(other),
        "gram": lambda J, _: J.gram(),
        "gram of two": lambda J, other: J.gram(other),
        "norms": lambda J, _: J.norms(),
        "norms of three examples": lambda J, _: J[[0, 2, 1]].norms(),
    }
    together = [jacobian(model, max_bytes)[0] for _ in range(2)]
    for ask in asked.values():
        for J, other in (together, [jacobian(model, max_bytes)[0] for _ in range(2)]):
            ask(J, other)
            assert sum(kept_bytes(J).values()) <= max_bytes
            assert sum(kept_bytes(other).values()) <= max_bytes
    for key in ("2.weight", [0, 2, 1]):
        part = jacobian(model, max_bytes)[0][key]
        part.norms()
        assert sum(kept_bytes(part).values()) <= max_bytes


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
@pytest.mark.parametrize(("max_bytes", "kept"), BOUNDS.items())
def test_rows_without_room_are_never_there_at_once(
    model: nn.Module, max_bytes: int, kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    J, _ = jacobian(model, max_bytes)
    sizes = []
    for kind in (Outer, patches.Convolved):
        form = kind.form
        monkeypatch.setattr(kind, "form", lambda self, form=form: sizes.append(self.formed_bytes) or form(self))
    J.norms()
    assert sizes == [BYTES[name] for name in kept]


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
def test_what_was_let_go_takes_no_room(model: nn.Module) -> None:
    J, _ = jacobian(model, BYTES["2.weight"])
    J["2.weight"].norms()  # shares its rows with J, and the room
    J.norms()
    assert kept_bytes(J) == {"2.weight": BYTES["2.weight"]}
    J, other = (jacobian(model, BYTES["4.weight"])[0] for _ in range(2))
    J.diag_gram(other)
    J.norms({"last": "4.weight"})
    assert kept_bytes(J) == {"4.weight": BYTES["4.weight"]}


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
def test_rows_of_the_general_path_count(model: nn.Module) -> None:
    """Written out they take 8 bytes for each of the first layer's 1,744 entries, and what is left is not enough."""
    x = torch.randn(B, 12, 12, 12, dtype=torch.float64)
    rules = {key: rule for key, rule in rg.RULES.items() if "Convolution" not in key[0]}
    convolutions = sum(p.numel() for name, p in trained(model).items() if name[0] in "02")
    written = B * convolutions * 8
    for max_bytes, kept in ((written + BYTES["4.weight"], 1), (written + BYTES["4.weight"] - 1, 0), (written - 1, 1)):
        J = rg.jacobian(energy(model(x)), model, rules=rules, max_bytes=max_bytes)
        J.norms()
        assert len(kept_bytes(J)) == kept


def test_cross_terms_are_formed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    f, g = (Outer(torch.randn(B, 2, 9, 4), torch.randn(B, 2, 9, 3), torch.Size((2, 4, 3)), True) for _ in range(2))
    expected = (f.dense() * g.dense()).sum((1, 2, 3))
    torch.testing.assert_close(inner(f, g), expected)
    assert f._formed is not None
    g = g.select(torch.arange(B))
    factors.let_go(f)
    monkeypatch.setattr(factors, "CHUNK_BYTES", 1)
    torch.testing.assert_close(inner(f, g), expected)


@pytest.mark.parametrize("max_bytes", [-1, 1.5, math.inf, "1 GiB", True])
@pytest.mark.parametrize(
    "entry", [rg.jacobian, rg.grad_norms, rg.grad_rows, lambda *a, **k: rg.clipped_loss(*a, 1.0, **k)]
)
def test_a_bound_that_is_none_is_refused(entry, max_bytes) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"max_bytes=.*expected a whole number of bytes"):
        entry(model(torch.ones(2, 2)).squeeze(1), model, max_bytes=max_bytes)


class Computed(nn.Module):
    """Convolutions whose kernels are products or have their norms apart."""

    def __init__(self, n: int, kind: str, c: int = 4) -> None:
        super().__init__()
        self.u, self.v, self.g = (
            nn.ParameterList(torch.randn(shape, dtype=torch.float64) for _ in range(n))
            for shape in ((c, 2), (2, c * 9), (c, 1, 1, 1))
        )
        self.kind, self.c = kind, c

    def forward(self, x: Tensor) -> Tensor:
        for u, v, g in zip(self.u, self.v, self.g, strict=True):
            kernel = (u @ v).view(self.c, self.c, 3, 3)
            if self.kind == "norms apart":
                kernel = torch._weight_norm(kernel, g, 0)
            x = torch.conv2d(x, kernel, padding=1).tanh()
        return x


def held_bytes(J: rg.Jacobian) -> int:
    """Of rows that are written out, wherever they are held: large tensors with a row for each example."""
    blocks = J._live()
    forms = [f for b in blocks.by_name.values() for r in b.regions for f in r.forms]
    forms += [f for _, f in blocks.general.seeds] if blocks.general is not None else []
    rows = [factors.formed(f) for f in forms] + [f.values for f in forms if isinstance(f, factors.Dense)]
    return sum({t.data_ptr(): t.nbytes for t in rows if t is not None and t[0].numel() >= 100}.values())


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
@pytest.mark.parametrize("n_rows", [0, 1, 3, 100])
@pytest.mark.parametrize("kind", ["products", "norms apart"])
def test_rows_written_out_on_the_way_to_a_parameter_count_together(kind: str, n_rows: int) -> None:
    torch.manual_seed(0)
    model = Computed(4, kind)
    bound = n_rows * 5 * 4 * 4 * 9 * 8
    losses = energy(model(torch.randn(5, 4, 6, 6, dtype=torch.float64)))
    rows = rg.jacobian(losses, model, rules={}, retain_graph=True).dense(as_dict=True)
    J = rg.jacobian(losses, model, max_bytes=bound, retain_graph=True)
    assert held_bytes(J) <= bound
    assert_products(J, rows, 1e-10)
    assert held_bytes(J) <= bound


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
def test_parts_by_name_count_together(model: nn.Module) -> None:
    bound = BYTES["0.weight"] + BYTES["4.weight"]
    J, _ = jacobian(model, bound)
    for name in J.names:
        J[name].norms()
    assert kept_bytes(J) == {name: BYTES[name] for name in ("0.weight", "4.weight")}
    J[["2.weight", "0.weight"]].gram()
    assert sum(kept_bytes(J).values()) <= bound


@pytest.mark.filterwarnings("ignore::rowgrad.RowgradWarning")
def test_parts_by_example_copy_no_rows(model: nn.Module) -> None:
    J, rows = jacobian(model, None)
    J.norms()
    part = J[[0, 2]]
    assert kept_bytes(J)
    assert not kept_bytes(part)
    assert_products(part, {name: r[[0, 2]] for name, r in rows.items()}, 1e-10)
