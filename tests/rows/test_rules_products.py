"""Products of every kind with a parameter as an operand, in the layouts that einsum and routing give them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tests.rows.laws import assert_laws, energy, rows_in_double, trained
from torch import Tensor, nn

from rowgrad.rows.factors import Dense

SINGLE = 1e-5  # of the row's norm
HALF = 3e-2


class Function(nn.Module):
    """Parameters of given shapes and a function of them and B."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], outputs: Callable[..., Tensor], b: int) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.outputs, self.n, self.seed = outputs, b, 0

    def data(self, *shape: int) -> Tensor:
        """The same numbers in any dtype, others at each call of one forward pass."""
        self.seed += 1
        made = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        return made.to(next(self.parameters()).dtype)

    def forward(self) -> Tensor:
        self.seed = 0
        return energy(self.outputs(self, partial(self.data, self.n)).reshape(self.n, -1))


PATTERNS: dict[str, tuple[str, tuple[int, ...], list[tuple[int, ...]]]] = {
    # name: (equation with the parameter last, its shape, shapes of the data behind B)
    "linear": ("bti,oi->bto", (5, 4), [(3, 4)]),
    "heads of their own": ("bhtd,hde->bhte", (2, 4, 5), [(2, 3, 4)]),
    "heads from one input": ("btd,hdk->bhtk", (2, 4, 5), [(3, 4)]),
    "heads from one input, side by side": ("btd,dhk->bthk", (4, 2, 5), [(3, 4)]),
    "heads into one output": ("bthk,hkd->btd", (2, 5, 4), [(3, 2, 5)]),
    "heads of their own into one output": ("bhtk,hkd->bhtd", (2, 5, 4), [(2, 3, 5)]),
    "pixels": ("bchw,oc->bohw", (5, 4), [(4, 2, 3)]),
    "groups of channels": ("bnchw,noc->bnohw", (2, 5, 4), [(2, 4, 2, 3)]),
    "two stacks": ("bghd,ghde->bghe", (2, 3, 4, 5), [(2, 3, 4)]),
    "experts with a capacity": ("becd,edf->becf", (2, 5, 4), [(2, 3, 5)]),
    "a matrix for each step": ("btd,tde->bte", (3, 4, 5), [(3, 4)]),
    "one vector": ("btd,d->bt", (4,), [(3, 4)]),
    "a vector for each step": ("btd,td->bt", (3, 4), [(3, 4)]),
    "over all": ("btd,td->b", (3, 4), [(3, 4)]),
    "nothing in common": ("bi,jk->bijk", (2, 4), [(3,)]),
    "bilinear form": ("bi,bj,ij->b", (4, 5), [(4,), (5,)]),
    "bilinear forms": ("bi,bj,oij->bo", (3, 4, 5), [(4,), (5,)]),
    "attention with a metric": ("btd,bse,de->bts", (4, 5), [(3, 4), (2, 5)]),
    "the diagonal": ("bi,ii->b", (4, 4), [(4,)]),
}


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("name", PATTERNS)
def test_einsum(name: str, b: int) -> None:
    equation, shape, shapes = PATTERNS[name]
    module = Function({"W": shape}, lambda m, x: torch.einsum(equation, *(x(*s) for s in shapes), m.W), b).double()
    assert_laws(module(), trained(module))


def test_einsum_of_a_sequence_first() -> None:
    def outputs(m: Function, x: Callable[..., Tensor]) -> Tensor:
        return torch.einsum("tbhd,hde->tbhe", x(5, 2, 4).transpose(0, 1), m.W).transpose(0, 1)

    module = Function({"W": (2, 4, 3)}, outputs, 3).double()
    assert_laws(module(), trained(module))


Outputs = Callable[[Function, Callable[..., Tensor]], Tensor]
PRODUCTS: dict[str, tuple[dict[str, tuple[int, ...]], Outputs]] = {
    "mv, vector": ({"v": (4,)}, lambda m, x: torch.mv(x(4), m.v)),
    "mv, matrix": ({"W": (5, 4)}, lambda m, x: torch.stack([torch.mv(m.W, x_j) for x_j in x(4)])),
    "addmv, vector": ({"b": (1,), "v": (4,)}, lambda m, x: torch.addmv(m.b, x(4), m.v, alpha=0.5, beta=2)),
    "addmv, matrix": (
        {"b": (5,), "W": (5, 4)},
        lambda m, x: torch.stack([torch.addmv(m.b, m.W, x_j, alpha=0.5, beta=2) for x_j in x(4)]),
    ),
    "dot": ({"v": (4,)}, lambda m, x: torch.stack([torch.dot(x_j, m.v) for x_j in x(4)])),
    "dot, first": ({"v": (4,)}, lambda m, x: torch.stack([torch.dot(m.v, x_j) for x_j in x(4)])),
    "vdot": (
        {"v": (4,), "w": (4,)},
        lambda m, x: torch.stack([torch.vdot(x_j, m.v) * torch.vdot(m.w, x_j) for x_j in x(4)]),
    ),
    "addr": ({"M": (4,), "v": (4,)}, lambda m, x: torch.addr(m.M, x(2).flatten(), m.v, alpha=0.5, beta=2)),
    "addr, first": ({"M": (4, 1), "v": (4,)}, lambda m, x: torch.addr(m.M, m.v, x(2).flatten(), alpha=0.5, beta=2).T),
    "outer": ({"v": (4,)}, lambda m, x: torch.outer(x(2).flatten(), m.v)),
    "addmm": ({"b": (5,), "W": (4, 5)}, lambda m, x: torch.addmm(m.b, x(4), m.W, alpha=0.5, beta=2)),
    "addmm, first": ({"b": (5, 1), "W": (5, 4)}, lambda m, x: torch.addmm(m.b, m.W, x(4).T, alpha=0.5, beta=2).T),
    "addbmm": (
        {"b": (5,), "W": (2, 4, 5)},
        lambda m, x: torch.addbmm(m.b, x(3, 2, 4).flatten(0, 1).transpose(0, 1), m.W, alpha=0.5, beta=2),
    ),
    "addbmm, first": (
        {"b": (5, 1), "W": (2, 5, 4)},
        lambda m, x: torch.addbmm(m.b, m.W, x(3, 2, 4).flatten(0, 1).permute(1, 2, 0), alpha=0.5, beta=2).T,
    ),
    "baddbmm": (
        {"b": (5,), "W": (2, 4, 5)},
        lambda m, x: torch.baddbmm(m.b, x(2, 4).transpose(0, 1), m.W, alpha=0.5, beta=2).transpose(0, 1),
    ),
    "baddbmm, first": (
        {"b": (5, 1), "W": (2, 5, 4)},
        lambda m, x: torch.baddbmm(m.b, m.W, x(2, 4).permute(1, 2, 0), alpha=0.5, beta=2).permute(2, 0, 1),
    ),
    "matmul, a stack of heads": ({"W": (3, 4, 5)}, lambda m, x: x(1, 7, 4) @ m.W),
    "matmul, matrix first": ({"W": (5, 7)}, lambda m, x: m.W @ x(7, 4)),
    "matmul, four dimensions": ({"W": (4, 5)}, lambda m, x: x(2, 3, 4) @ m.W),
    "matmul, vector first": ({"v": (7,)}, lambda m, x: m.v @ x(7, 4)),
    "tensordot over two": ({"W": (3, 4, 5)}, lambda m, x: torch.tensordot(x(3, 4), m.W, 2)),
    "kron": ({"W": (2, 3)}, lambda m, x: torch.kron(x(3), m.W)),
    "inner": ({"W": (5, 4)}, lambda m, x: torch.inner(x(3, 4), m.W)),
    "bilinear": ({"W": (5, 4, 3), "b": (5,)}, lambda m, x: F.bilinear(x(4), x(3), m.W, m.b)),
    "bilinear, several positions": ({"W": (5, 4, 3)}, lambda m, x: F.bilinear(x(2, 4), x(2, 3), m.W)),
    "vmapped": ({"W": (5, 4)}, lambda m, x: torch.vmap(lambda x_j: m.W @ x_j)(x(4))),
    "vmapped product": ({"W": (5, 4)}, lambda m, x: torch.vmap(lambda x_j: (m.W * x_j).sum(1))(x(4))),
    "expanded to each example": ({"W": (4, 5)}, lambda m, x: torch.bmm(x(3, 4), m.W.expand(m.n, 4, 5))),
    "repeated for each example": ({"W": (4, 5)}, lambda m, x: torch.bmm(x(3, 4), m.W.repeat(m.n, 1, 1))),
    "patches": ({"W": (5, 8)}, lambda m, x: m.W @ F.unfold(x(2, 4, 4), 2)),
    "used twice": ({"W": (4, 4)}, lambda m, x: torch.einsum("bhtd,de->bhte", (x(2, 3, 4) @ m.W).tanh(), m.W)),
    "both operands": ({"W": (4, 5), "V": (5, 3)}, lambda m, x: torch.linalg.multi_dot([x(4), m.W, m.V])),
}  # fmt: skip


def product(name: str, b: int) -> Function:
    shapes, outputs = PRODUCTS[name]
    return Function(shapes, outputs, b)


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, b: int) -> None:
    module = product(name, b).double()
    assert_laws(module(), trained(module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["mv, matrix", "addbmm", "addbmm, first", "baddbmm", "bilinear", "matmul, a stack of heads"]
)
def test_products_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    module = product(name, 3).to(dtype)
    rows = rows_in_double(module, lambda m: m())
    assert_laws(module().float(), trained(module), rows=rows, rtol=SINGLE if dtype == torch.float32 else HALF)


@pytest.mark.parametrize("frozen", ["b", "W"])
@pytest.mark.parametrize("name", ["addbmm", "addmv, matrix", "baddbmm, first", "bilinear"])
def test_products_with_a_frozen_operand(name: str, frozen: str) -> None:
    module = product(name, 3).double()
    module.get_parameter(frozen).requires_grad_(False)
    assert_laws(module(), trained(module))


@pytest.mark.parametrize("name", ["expanded to each example", "repeated for each example"])
def test_copies_for_each_example_are_held_once(name: str) -> None:
    """The cotangent of B copies is (B, d, p) in plain autograd too: the rows take no more than that."""
    module = product(name, 3).double()
    J = assert_laws(module(), trained(module))
    (form,) = J._blocks.by_name["W"].regions[0].forms
    assert isinstance(form, Dense)
    assert form.values.shape == (3, 4, 5)


# -- experts -----------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Tokens sent to one of several matrices each; an expert may stay without tokens."""

    def __init__(self, how: str, b: int, *, scale: float = 1, d: int = 16) -> None:
        super().__init__()
        self.how, self.b, self.scale, self.d = how, b, scale, d
        self.W = nn.Parameter(torch.randn(3, d, d) / 4)

    def forward(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.b)
        n = 4 * self.b
        tokens = torch.randn(n, self.d, generator=generator).to(self.W.dtype)
        expert = torch.randint(0, 2, (n,), generator=generator) * 2  # none goes to the second
        order = expert.argsort(stable=True)
        out = getattr(self, self.how)(tokens[order], expert[order])
        return energy(torch.zeros_like(out).index_copy(0, order, out).view(self.b, 4, self.d))

    def capacity(self, tokens: Tensor, expert: Tensor) -> Tensor:
        """A slot for each token in (experts, capacity): owners vary along both dimensions."""
        slot = torch.cat([torch.arange(int(n)) for n in expert.bincount(minlength=3)])
        stacked = tokens.new_zeros(3, len(tokens), self.d).index_put((expert, slot), tokens)
        return self.product(stacked)[expert, slot]

    def product(self, stacked: Tensor) -> Tensor:
        if self.scale == 1:
            return torch.bmm(stacked, self.W)
        return torch.baddbmm(torch.zeros_like(stacked), stacked, self.W, alpha=self.scale)

    def capacity_first(self, tokens: Tensor, expert: Tensor) -> Tensor:
        slot = torch.cat([torch.arange(int(n)) for n in expert.bincount(minlength=3)])
        stacked = tokens.new_zeros(3, len(tokens), self.d).index_put((expert, slot), tokens)
        return torch.bmm(self.W, stacked.mT).mT[expert, slot]

    def grouped(self, tokens: Tensor, expert: Tensor) -> Tensor:
        return torch._grouped_mm(tokens, self.W, offs=self.ends(expert))

    def grouped_first(self, tokens: Tensor, expert: Tensor) -> Tensor:
        return torch._grouped_mm(self.W, tokens.T, offs=self.ends(expert)).T

    def by_loop(self, tokens: Tensor, expert: Tensor) -> Tensor:
        return torch.cat([tokens[expert == e] @ self.W[e] for e in range(3)])

    def by_loop_first(self, tokens: Tensor, expert: Tensor) -> Tensor:
        return torch.cat([(self.W[e] @ tokens[expert == e].T).T for e in range(3)])

    @staticmethod
    def ends(expert: Tensor) -> Tensor:
        return expert.bincount(minlength=3).cumsum(0).int()


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("scale", [1, 0.5])
@pytest.mark.parametrize("how", ["capacity", "capacity_first", "by_loop"])
def test_experts(how: str, scale: float, b: int) -> None:
    module = Experts(how, b, scale=scale).double()
    assert_laws(module(), trained(module))


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["grouped", "grouped_first"])
def test_grouped_products(how: str, dtype: torch.dtype, b: int) -> None:
    """The grouped product has no float64: against the loop over the experts in float64."""
    module = Experts(how, b).to(dtype)
    rows = rows_in_double(module, lambda m: _as(m, how.replace("grouped", "by_loop"))())
    assert_laws(module().float(), trained(module), rows=rows, rtol=SINGLE if dtype == torch.float32 else HALF)


def test_rows_behind_the_last_group_take_no_part() -> None:
    """What the product writes there is undefined, and so is the loss; its gradient is not."""
    W, x, weights = nn.Parameter(torch.randn(3, 16, 16)), torch.randn(12, 16), torch.randn(12, 16)
    out = torch._grouped_mm(x, W, offs=torch.tensor([4, 4, 9], dtype=torch.int32))
    losses = (out * weights).view(3, -1).sum(1)
    assert_laws(losses, {"W": W}, rtol=SINGLE)


def _as(module: Experts, how: str) -> Experts:
    module.how = how
    return module


def test_grouped_product_without_offsets() -> None:
    """Two stacks of matrices, group by group."""

    class Stacks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.randn(3, 16, 16) / 4)

        def forward(self) -> Tensor:
            x = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0)).to(self.W.dtype)
            out = torch._grouped_mm(x, self.W) if self.W.dtype == torch.float32 else torch.bmm(x, self.W)
            return energy(out.view(3, 4, 2, 16).transpose(0, 1))

    module = Stacks()
    assert_laws(module(), trained(module), rows=rows_in_double(module, lambda m: m()), rtol=SINGLE)


@pytest.mark.parametrize("cut", [2, 3])
def test_a_vector_shared_by_two_examples_goes_the_general_path(cut: int) -> None:
    W, x = nn.Parameter(torch.randn(4, 3, dtype=torch.float64)), torch.randn(3, dtype=torch.float64)
    z = torch.mv(W, x).sin()
    J = assert_laws(torch.stack([z[:cut].sum(), z[cut:].sum()]), {"W": W}, ruled=False)
    assert [name for name, _ in J.explain().slow_uses()] == ["W"]
