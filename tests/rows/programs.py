"""Random networks as short programs: a list of steps that any interpreter can run, shrink and print.

A value is a tensor with B examples, T positions and D features in one of several layouts. Steps take two small numbers
that choose among what is there, so that every program means something and smaller numbers mean simpler programs.
Parameters are made when first asked for; asked for again by the same name they are shared.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Program:
    """Sizes, steps and how the losses are made; `str` of it can be pasted into a test."""

    b: int
    t: int
    d: int
    steps: tuple[tuple[str, int, int], ...]
    loss: tuple[str, int]


@dataclass(frozen=True)
class Value:
    """A tensor and where its examples (b), positions (t) and features (d) lie; brackets are flattened together."""

    tensor: Tensor
    layout: str

    def map(self, f: Callable[[Tensor], Tensor]) -> Value:
        return replace(self, tensor=f(self.tensor))


LAYOUTS = ("btd", "tbd", "(bt)d", "(tb)d", "bdt", "dbt", "tdb")


@dataclass
class Machine:
    """Runs a program on the data of one `content` seed, which also chooses permutations and masks."""

    program: Program
    content: int
    params: nn.ParameterDict
    values: list[Value] = field(default_factory=list)

    def run(self) -> Tensor:
        p = self.program
        self.content_rng = torch.Generator().manual_seed(self.content)
        x = torch.randn(p.b, p.t, p.d, generator=self.content_rng, dtype=torch.float64)
        self.values = [self.linear(Value(x, "btd"), p.d, "first")]
        for name, i, j in p.steps:
            self.values.append(STEPS[name](self, self.values[-1], i, j))
        return LOSSES[p.loss[0]](self, p.loss[1])

    # -- layouts -------------------------------------------------------------------------------------------------------

    def plain(self, v: Value) -> Tensor:
        """In layout btd."""
        t, (b, n, d) = v.tensor, self.sizes(v)
        if v.layout.startswith("(bt)"):
            return t.view(b, n, d)
        if v.layout.startswith("(tb)"):
            return t.view(n, b, d).transpose(0, 1)
        return t.permute(*(v.layout.index(letter) for letter in "btd"))

    def sizes(self, v: Value) -> tuple[int, int, int]:
        shape, b = v.tensor.shape, self.program.b
        if v.layout.startswith("("):
            return b, shape[0] // b, shape[1]
        return b, shape[v.layout.index("t")], shape[v.layout.index("d")]

    def laid(self, plain: Tensor, layout: str) -> Value:
        if layout == "(bt)d":
            return Value(plain.flatten(0, 1), layout)
        if layout == "(tb)d":
            return Value(plain.transpose(0, 1).flatten(0, 1), layout)
        return Value(plain.permute(*("btd".index(letter) for letter in layout)), layout)

    def on_plain(self, v: Value, f: Callable[[Tensor], Tensor]) -> Value:
        """Apply a function of (B, T, D) and return to the layout."""
        return self.laid(f(self.plain(v)), v.layout)

    def features_last(self, v: Value) -> Value:
        return v if v.layout.endswith("d") else self.laid(self.plain(v), "btd")

    # -- parameters ----------------------------------------------------------------------------------------------------

    def parameter(self, name: str, *shape: int) -> Tensor:
        key = f"{name}_{'x'.join(map(str, shape))}"
        if key not in self.params:
            rng = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            self.params[key] = nn.Parameter(0.7 * torch.randn(shape, generator=rng, dtype=torch.float64) + 0.1)
        return self.params[key]

    def linear(self, v: Value, p: int, name: str) -> Value:
        v = self.features_last(v)
        d = v.tensor.shape[-1]
        return v.map(lambda t: F.linear(t, self.parameter(f"{name}W", p, d), self.parameter(f"{name}b", p)))


Step = Callable[[Machine, Value, int, int], Value]
STEPS: dict[str, Step] = {}
LOSSES: dict[str, Callable[[Machine, int], Tensor]] = {}


def step(f: Step) -> Step:
    STEPS[f.__name__] = f
    return f


def loss(f: Callable[[Machine, int], Tensor]) -> Callable[[Machine, int], Tensor]:
    LOSSES[f.__name__] = f
    return f


_ELEMENTWISE = (
    torch.tanh,
    torch.sin,
    F.relu,
    lambda t: t.softmax(-1),
    F.softplus,
    lambda t: (t + 1).relu_(),
    lambda t: t.square() / (1 + t.square()),
    lambda t: torch.fft.fft(t).abs(),
)


@step
def elementwise(m: Machine, v: Value, i: int, j: int) -> Value:
    return v.map(_ELEMENTWISE[i % len(_ELEMENTWISE)])


@step
def linear(m: Machine, v: Value, i: int, j: int) -> Value:
    return m.linear(v, 1 + i % 4, "LMN"[j % 3])


@step
def product(m: Machine, v: Value, i: int, j: int) -> Value:
    """A product with a weight, written in one of many ways."""
    b, t, d = m.sizes(v)
    p = 1 + j % 3
    W, A, B, g = (m.parameter(n, *s) for n, s in {"W": (d, p), "A": (d, 2), "B": (2, p), "g": (d, 1)}.items())
    packed, tied, stack = m.parameter("P", 2 * d + 1, p), m.parameter("V", p, d), m.parameter("S", t, d, p)
    h = m.plain(v)
    ways = (
        lambda: h @ W,
        lambda: h @ tied.T,
        lambda: torch.einsum("dp,btd->btp", W, h),
        lambda: torch.addmm(m.parameter("c", p), h.flatten(0, 1), W, beta=2, alpha=0.5).view(b, t, p),
        lambda: (W.T @ h.flatten(0, 1).T).T.reshape(b, t, p),
        lambda: torch.bmm(h.transpose(0, 1), stack).transpose(0, 1),
        lambda: torch.bmm(h, W.expand(b, d, p)),
        lambda: h @ (W + A @ B),
        lambda: h @ (g.sigmoid() * W),
        lambda: h @ packed[:d] + h.sin() @ packed[d : 2 * d] + packed[-1],
        lambda: h @ packed[::2][:d] + h @ packed[1 : 1 + d],
        lambda: h @ W[:, [q % p for q in range(p)][::-1]],
        lambda: F.conv1d(h.mT, tied.unsqueeze(2)).mT,
    )
    return m.laid(ways[i % len(ways)](), v.layout)


@step
def convolution(m: Machine, v: Value, i: int, j: int) -> Value:
    d = m.sizes(v)[2]
    p, width = 1 + i % 2, 1 + j % 3
    kernel = m.parameter("K", p * d, 1 if i % 3 == 0 else d, width)
    return m.on_plain(
        v, lambda h: F.conv1d(h.mT, kernel, padding=width // 2, groups=d if i % 3 == 0 else 1, dilation=1 + j % 2).mT
        if h.shape[1] + 2 * (width // 2) > (width - 1) * (1 + j % 2)
        else h,
    )  # fmt: skip


@step
def normalization(m: Machine, v: Value, i: int, j: int) -> Value:
    v = m.features_last(v)
    d = v.tensor.shape[-1]
    scale, shift = m.parameter("scale", d), m.parameter("shift", d)
    if i % 3 == 0:
        return v.map(lambda t: F.layer_norm(t, (d,), scale, shift, eps=0.1))
    if i % 3 == 1 or m.sizes(v)[1:] == (1, 1):
        return v.map(lambda t: F.rms_norm(t, (d,), scale, eps=0.1))
    return m.on_plain(v, lambda h: F.group_norm(h.mT, 1, scale, shift, eps=0.1).mT)


@step
def affine(m: Machine, v: Value, i: int, j: int) -> Value:
    """Parameters of many shapes, broadcast over the examples."""
    _, t, d = m.sizes(v)
    shapes = ((d,), (), (1,), (t, 1), (t, d), (1, 1, d), (1, t, 1))
    a, b = m.parameter("a", *shapes[i % 7]), m.parameter("s", *shapes[j % 7])
    return m.on_plain(v, lambda h: h * a + b if i % 2 else (h - b) / (1 + a.square()))


@step
def layout(m: Machine, v: Value, i: int, j: int) -> Value:
    plain, name = m.plain(v), LAYOUTS[i % len(LAYOUTS)]
    return m.laid(plain.contiguous() if j % 2 else plain, name)


@step
def residual(m: Machine, v: Value, i: int, j: int) -> Value:
    """Add or multiply an earlier value, cut or repeated to the size of this one."""
    other = m.plain(m.values[i % len(m.values)])
    h = m.plain(v)
    other = other.repeat(1, h.shape[1], h.shape[2])[:, : h.shape[1], : h.shape[2]]
    return m.laid((h + other, h * other.tanh(), torch.maximum(h, other), h - other)[j % 4], v.layout)


@step
def join(m: Machine, v: Value, i: int, j: int) -> Value:
    h, other = m.plain(v), m.plain(m.values[i % len(m.values)])
    if j % 2:
        return m.laid(torch.cat([h, other[:, :1].expand(-1, h.shape[1], -1)], 2)[..., :5], v.layout)
    return m.laid(torch.cat([h, other.repeat(1, 1, h.shape[2])[..., : h.shape[2]]], 1)[:, :5], v.layout)


@step
def over_positions(m: Machine, v: Value, i: int, j: int) -> Value:
    ways = (
        lambda h: h.cumsum(1),
        lambda h: h.flip(1),
        lambda h: h - h.mean(1, keepdim=True),
        lambda h: h.sum(1, keepdim=True),
        lambda h: h.max(1, keepdim=True)[0],
        lambda h: h[:, : 1 + j % h.shape[1]],
        lambda h: h[:, j % h.shape[1]].unsqueeze(1).expand_as(h),
        lambda h: h.sort(1)[0],
        lambda h: h.repeat_interleave(1 + j % 2, 1),
    )
    return m.on_plain(v, ways[i % len(ways)])


@step
def over_features(m: Machine, v: Value, i: int, j: int) -> Value:
    ways = (
        lambda h: h.flip(2),
        lambda h: h.sum(2, keepdim=True) * h.sin(),
        lambda h: h.cumsum(2),
        lambda h: torch.cat([c.tanh() for c in h.chunk(2, 2)], 2),
        lambda h: F.normalize(h, dim=2, eps=0.5),
        lambda h: h.index_select(2, torch.arange(h.shape[2]).flip(0)),
    )
    return m.on_plain(v, ways[i % len(ways)])


@step
def attention(m: Machine, v: Value, i: int, j: int) -> Value:
    d = m.sizes(v)[2]
    packed = m.parameter("QKV", 3 * d, d)

    def attend(h: Tensor) -> Tensor:
        q, k, w = F.linear(h, packed).chunk(3, 2)
        if i % 2:
            return F.scaled_dot_product_attention(q, k, w, is_causal=j % 2 == 1)
        return (q @ k.mT).softmax(2) @ w

    return m.on_plain(v, attend)


@step
def lookup(m: Machine, v: Value, i: int, j: int) -> Value:
    """Rows of a table at ids taken from the content."""
    b, t, d = m.sizes(v)
    table = m.parameter("E", 3, d)
    ids = torch.randint(3, (b, t), generator=m.content_rng)
    rows = F.embedding(ids, table, padding_idx=1 if i % 3 == 1 else None) if j % 2 else table[ids]
    return m.on_plain(v, lambda h: h.tanh() + rows)


@step
def recurrence(m: Machine, v: Value, i: int, j: int) -> Value:
    d = m.sizes(v)[2]
    U, W = m.parameter("U", d, 2), m.parameter("R", 2, 2)

    def unroll(h: Tensor) -> Tensor:
        state, states = h.new_zeros(len(h), 2), []
        for h_t in h.unbind(1):
            state = (h_t @ U + state @ W).tanh()
            states.append(state)
        return torch.stack(states, 1)

    return m.on_plain(v, unroll)


@step
def recomputed(m: Machine, v: Value, i: int, j: int) -> Value:
    name = ("linear", "attention", "normalization", "product")[i % 4]
    sizes: list[str] = []

    def inner(t: Tensor) -> Tensor:
        found = STEPS[name](m, Value(t, v.layout), j, i)
        sizes.append(found.layout)
        return found.tensor

    return Value(checkpoint(inner, v.tensor, use_reentrant=False), sizes[0])


@step
def gate(m: Machine, v: Value, i: int, j: int) -> Value:
    """Squeeze over positions, excite by features."""
    d = m.sizes(v)[2]
    G = m.parameter("G", d, d)
    return m.on_plain(v, lambda h: h * (h.mean(1, keepdim=True) @ G).sigmoid())


@step
def routed(m: Machine, v: Value, i: int, j: int) -> Value:
    """Tokens go through one of two weights, by their content."""
    d = m.sizes(v)[2]
    X = m.parameter("X", 2, d, d)

    def route(h: Tensor) -> Tensor:
        tokens = h.reshape(-1, d)
        out = torch.zeros_like(tokens)
        for e in range(2):
            index = ((tokens[:, 0] > 0) == bool(e)).nonzero().squeeze(1)
            out = out.index_add(0, index, tokens[index] @ X[e])
        return out.view_as(h)

    return m.on_plain(v, route)


@step
def across_examples(m: Machine, v: Value, i: int, j: int) -> Value:
    """Examples change places: owned by others, not mixed."""
    order = torch.randperm(m.program.b, generator=m.content_rng)
    ways = (
        lambda h: h[order],
        lambda h: h.flip(0),
        lambda h: h.roll(1, 0),
        lambda h: h[order][order.argsort()],
        lambda h: torch.cat([h[..., :1], h[..., 1:].flip(0)], 2),
        lambda h: torch.cat([h[:1].sin(), h[1:]]),
        lambda h: h.sort(0)[0],
    )
    return m.on_plain(v, ways[i % len(ways)])


@step
def mixing_examples(m: Machine, v: Value, i: int, j: int) -> Value:
    strength = 10.0 ** -(3 * (j % 4))
    ring = torch.eye(m.program.b, dtype=torch.float64)[torch.randperm(m.program.b, generator=m.content_rng)]
    ways = (
        lambda h: h + strength * h.mean(0),
        lambda h: h + strength * h.flip(0),
        lambda h: torch.einsum("ab,btd->atd", ring, h),
        lambda h: h - h.max(0)[0],
        lambda h: h.softmax(0),
        lambda h: h.cumsum(0),
        lambda h: h + F.relu(h.mean(0) - 3 * (j % 2)),
        lambda h: h + strength * h * h.mean((0, 1)).detach(),
        lambda h: F.batch_norm(h.mT, None, None, training=True, eps=0.1).mT if h.shape[0] * h.shape[1] > 1 else h,
    )
    return m.on_plain(v, ways[i % len(ways)])


def _own(v: Tensor) -> Tensor:
    return (v.flatten(1) - 0.3).square().mean(1)


@loss
def last_value(m: Machine, i: int) -> Tensor:
    return _own(m.plain(m.values[-1]))


@loss
def every_value(m: Machine, i: int) -> Tensor:
    return torch.stack([_own(m.plain(v)) for v in m.values]).sum(0)


@loss
def token_by_token(m: Machine, i: int) -> Tensor:
    v = m.laid(m.plain(m.values[-1]), "(tb)d" if i % 2 else "(bt)d")
    tokens = (v.tensor - 0.3).square().sum(1)
    return tokens.view(-1, m.program.b).mean(0) if i % 2 else tokens.view(m.program.b, -1).mean(1)


@loss
def with_penalty(m: Machine, i: int) -> Tensor:
    return last_value(m, i) + 0.1 * sum(p.square().sum() for p in m.params.values())


@loss
def classes(m: Machine, i: int) -> Tensor:
    out = m.plain(m.values[-1]).sum(1)
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[1], reduction="none") + last_value(m, i)


@loss
def in_another_order(m: Machine, i: int) -> Tensor:
    return last_value(m, i)[torch.randperm(m.program.b, generator=m.content_rng)]


@loss
def stacked(m: Machine, i: int) -> Tensor:
    return torch.stack([(h - 0.3).square().mean() for h in m.plain(m.values[-1])])


@loss
def relative(m: Machine, i: int) -> Tensor:
    own = last_value(m, i)
    return own * (1 + own.detach().sum()) if i % 2 else own + 0.5 * own.mean()


small = st.integers(0, 7)
steps = st.tuples(st.sampled_from(sorted(STEPS)), small, small)
programs = st.builds(
    Program,
    b=st.integers(1, 5),
    t=st.integers(1, 5),
    d=st.integers(1, 4),
    steps=st.lists(steps, min_size=1, max_size=8).map(tuple),
    loss=st.tuples(st.sampled_from(sorted(LOSSES)), small),
)
