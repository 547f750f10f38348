"""Two forms at a time: rows of one with rows of the other.

`inner(f, g)` pairs row j with row j, `gram(f, g)` every row with every row. Law: each equals the same question asked of
`dense()`. `gram(f, f)` is symmetric, and where products dominate only its block triangle is computed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from rowgrad.rows import memory
from rowgrad.rows.factors import (
    CHUNK_BYTES,
    KEEP_BYTES,
    Dense,
    Form,
    Multiples,
    Outer,
    Rows,
    energies,
    in_dtype,
    step_bytes,
)

Lent = AbstractContextManager[Tensor]
PAIR_WEIGHT = 16  # measured on a CPU: a product of two looked-up rows, against one of a matrix product
LONG_ROW = 2**14  # numbers, from which a product with few rows is a matter of reading them
PARTS = 16
REMEMBERED = 3  # products: of a layer's weight, and of the bias that follows it
# Rows that half a symmetric product needs, long ones and others, and numbers of all: smaller products are slow enough
# to lose what they leave out.
FEWEST_LONG_ROWS = 16
FEWEST_ROWS = 128
FEWEST_NUMBERS = 2**18


def inner(f: Form, g: Form) -> Tensor:
    """<row j of f, row j of g> for every j, shape (B,)."""
    if f is g or not f.n_examples:
        return f.sq_norms()
    f, g = _in_one_dtype(f, g)
    for one, other in ((f, g), (g, f)):
        if isinstance(one, Multiples):
            return one.weights * other.dot(one.direction.reshape(other.shape))
    if (type(f), type(g)) in INNER and _same_split(f, g):
        return INNER[type(f), type(g)](f, g)
    f, g = f.plain(), g.plain()
    if _same_split(f, g):
        if (type(f), type(g)) in INNER:
            return INNER[type(f), type(g)](f, g)
        if (type(g), type(f)) in INNER:
            return INNER[type(g), type(f)](g, f)
    return (Dense(f.dense()).flat * Dense(g.dense()).flat).sum(1)


def gram(f: Form, g: Form) -> Tensor:
    """<row j of f, row k of g> for every j and k, shape (B, B')."""
    for form in (f, g):
        if not form.n_examples:
            return form.sq_norms().new_zeros(f.n_examples, g.n_examples)
    f, g = _in_one_dtype(f, g)
    if isinstance(f, Multiples):
        return torch.outer(f.weights, g.dot(f.direction.reshape(g.shape)))
    if isinstance(g, Multiples):
        return torch.outer(f.dot(g.direction.reshape(f.shape)), g.weights)
    if (type(f), type(g)) in GRAM and _same_split(f, g):
        return GRAM[type(f), type(g)](f, g)
    if f is g and isinstance(f, Dense):
        return of_itself(f.flat)
    same, f = g is f, f.plain()
    g = f if same else g.plain()
    if _same_split(f, g):
        if (type(f), type(g)) in GRAM:
            return GRAM[type(f), type(g)](f, g)
        if (type(g), type(f)) in GRAM:
            return GRAM[type(g), type(f)](g, f).T
    left = Dense(f.dense()).flat
    return product(left, left if g is f else Dense(g.dense()).flat)


def _in_one_dtype(f: Form, g: Form) -> tuple[Form, Form]:
    mine, theirs = f.held[0].dtype, g.held[0].dtype
    if mine == theirs:
        return f, g
    both = torch.promote_types(mine, theirs)
    return f if mine == both else in_dtype(f, both), g if theirs == both else in_dtype(g, both)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T, for left (n, p) and right (m, p)."""
    return _with_itself(left) if left is right else _in_parts(left, right)


def _with_itself(rows: Tensor) -> Tensor:
    """rows rows^T from the products of all rows with the later half, and of the earlier half with itself.

    Many rows and few columns cost less than few rows and many columns.
    """
    n, length = rows.shape
    half = n // 2
    if half < (FEWEST_LONG_ROWS if length >= LONG_ROW else FEWEST_ROWS) or rows.numel() < FEWEST_NUMBERS:
        return _in_parts(rows, rows)
    found = rows.new_empty(n, n)
    late = _in_parts(rows, rows[half:])
    found[:, half:], found[half:, :half] = late, late[:half].T
    found[:half, :half] = _with_itself(rows[:half])
    return found


def _in_parts(left: Tensor, right: Tensor) -> Tensor:
    """left right^T. Of long rows, which are read once, threads take a part each."""
    length = left.shape[1]
    n_bytes = PARTS * len(left) * len(right) * left.element_size()  # of what the parts give
    if length < LONG_ROW or n_bytes > CHUNK_BYTES or left.device.type != "cpu":
        return left @ right.T
    whole = length - length % PARTS
    parts = [side[:, :whole].unflatten(1, (PARTS, -1)).transpose(0, 1) for side in (left, right)]
    found = (parts[0] @ parts[1].mT).sum(0)
    return found if whole == length else found.addmm_(left[:, whole:], right[:, whole:].T)


def product_of_lent(left: Lent, right: Lent | None) -> Tensor:
    """`product` of rows that are lent for it; with themselves where `right` is None."""
    with left as rows:
        if right is None:
            return product(rows, rows)
        with right as others:
            return product(rows, others)


class _Remembered(threading.local):
    """The last products of a matrix with itself, with the matrix, whose memory is not used again meanwhile."""

    products: OrderedDict[tuple, tuple[Tensor, Tensor]] | None = None


_remembered = _Remembered()


@contextmanager
def remembering() -> Iterator[None]:
    """Within one question: a layer's bias has the cotangents that are one side of its weight."""
    _remembered.products = OrderedDict()
    try:
        yield
    finally:
        _remembered.products = None


def of_itself(rows: Tensor) -> Tensor:
    """rows rows^T for (n, p), not to be written to. The rows are not written to either while it is remembered."""
    products = _remembered.products
    if products is None or len(rows) ** 2 * rows.element_size() > CHUNK_BYTES:
        return product(rows, rows)
    key = (rows.data_ptr(), rows.dtype, rows.shape, rows.stride())
    if key not in products:
        products[key] = rows, product(rows, rows)
        if len(products) > REMEMBERED:
            products.popitem(last=False)
    return products[key][1]


def _same_split(f: Form, g: Form) -> bool:
    """Whether two forms see the block as the same stack of matrices."""
    return _split(f) == _split(g)


def _split(f: Form) -> tuple[int, ...]:
    if isinstance(f, Outer):
        _, groups, _, a, b = f.sizes
        return (groups, a, b)
    return (1, *f.shape)


def _inner_outer_outer(f: Outer, g: Outer) -> Tensor:
    _, _, t, a, b = f.sizes
    s = g.sizes[2]
    formed = f._formed is not None or g._formed is not None
    if formed or t * s * (a + b) > (t + s) * a * b or f.cancels() or g.cancels():
        pieces = f.chunks(2 * f.formed_bytes // max(1, f.n_examples))
        return torch.cat([(f.rows_of(piece) * g.rows_of(piece)).sum((1, 2, 3)) for piece in pieces])
    return ((f.left @ g.left.transpose(-1, -2)) * (f.right @ g.right.transpose(-1, -2))).sum((1, 2, 3))


def _inner_outer_rows(f: Outer, g: Rows) -> Tensor:
    if f._formed is not None:
        index = g.ids.unsqueeze(2).expand(-1, -1, g.rows.shape[2])
        return (f._formed[:, 0].gather(1, index) * g.rows).sum((1, 2))
    found = f.left.new_empty(f.n_examples)
    for s in f.chunks(2 * f.sizes[2] * g.ids.shape[1] * f.left.element_size()):
        left, right = f.left[s, 0], f.right[s, 0]
        index = g.ids[s].unsqueeze(1).expand(-1, left.shape[1], -1)
        found[s] = left.gather(2, index).mul_(right @ g.rows[s].transpose(1, 2)).sum((1, 2))
    return found


def _inner_rows_rows(f: Rows, g: Rows) -> Tensor:
    if not f.rows.numel() or not g.rows.numel():
        return f.rows.new_zeros(f.n_examples)
    joined = Rows(torch.cat([f.ids, g.ids], 1), torch.cat([f.rows, g.rows], 1), f.shape)
    keys, inverse = torch.unique(joined._keys(), return_inverse=True)
    split = f.ids.numel()
    inverse = inverse.reshape(f.n_examples, -1)
    sides = [f.rows.new_zeros(len(keys), f.shape[1]) for _ in range(2)]
    width = f.ids.shape[1]
    sides[0].index_add_(0, inverse[:, :width].reshape(-1), f.rows.reshape(split, -1))
    sides[1].index_add_(0, inverse[:, width:].reshape(-1), g.rows.reshape(-1, f.shape[1]))
    owner = keys // f.shape[0]
    return f.rows.new_zeros(f.n_examples).index_add_(0, owner, (sides[0] * sides[1]).sum(1))


def _gram_outer_outer(f: Outer, g: Outer) -> Tensor:
    b, groups, t, a, d = f.sizes
    other, _, s, _, _ = g.sizes
    if t == 1 and s == 1 and groups == 1:
        return _gram_of_vectors(f, g)
    by_gram = b * t * other * s * (a + d)
    by_form = (b * t + (other * s if g is not f else 0) + b * other) * a * d
    if by_gram < by_form and f._formed is None and not (f.cancels() or g.cancels()):
        return _gram_by_positions(f, g)
    if f._formed is not None:
        left = f.form().reshape(b, -1)
        return product(left, left if g is f else g.form().reshape(other, -1))
    found = f.left.new_zeros(b, other)
    of_right, length = a < d, min(a, d)
    step = lines_at_once(max(b, other), groups * length, f.left)
    for i in range(0, max(a, d), step):
        part = formed_part(f, i, step, of_right)
        found += product_of_lent(part, None if g is f else formed_part(g, i, step, of_right))
    return found


def lines_at_once(n: int, length: int, like: Tensor) -> int:
    """How many lines of each row's matrix, of n rows, are written out together.

    An odd number, for where rows are a power of two apart in memory, there are few places for them in a cache.
    """
    step = step_bytes(like) // max(1, n * length * like.element_size())
    return max(1, step - 1 + step % 2)


@contextmanager
def formed_part(f: Outer, start: int, step: int, of_right: bool = False) -> Iterator[Tensor]:
    """Some lines of each row's matrix, written out: (B, G * step * d), or columns, (B, G * step * a)."""
    side, other = (f.right, f.left) if of_right else (f.left, f.right)
    side = side[..., start : start + step].mT
    with memory.scratch((*side.shape[:-1], other.shape[3]), side) as formed:
        yield torch.matmul(side, other, out=formed).reshape(f.n_examples, -1)


def _gram_of_vectors(f: Outer, g: Outer) -> Tensor:
    """One position each: <a b^T, c d^T> = <a, c> <b, d>."""
    sides = [
        (x.flatten(1), x.flatten(1) if g is f else y.flatten(1)) for x, y in zip(_sides(f), _sides(g), strict=True)
    ]
    (a, c), (b, d) = sides
    if g is f:
        return of_itself(a) * of_itself(b)
    return (a @ c.T).mul_(b @ d.T)


def _sides(f: Outer) -> tuple[Tensor, Tensor]:
    return f.left, f.right


def _gram_by_positions(f: Outer, g: Outer) -> Tensor:
    """Chunks of rows of f; of g, where it is f, only the rows before."""
    b, groups, t, _, _ = f.sizes
    other, _, s, _, _ = g.sizes
    found = f.left.new_zeros(b, other)
    for piece in f.chunks(2 * groups * t * other * s * f.left.element_size()):
        columns = slice(0, piece.stop) if g is f else slice(None)
        products = [_rows_of(x[piece]) @ _rows_of(y[columns]).mT for x, y in zip(_sides(f), _sides(g), strict=True)]
        both = products[0].mul_(products[1]).sum(0)
        found[piece, columns] = both.reshape(len(f.left[piece]), t, len(g.left[columns]), s).sum((1, 3))
    if g is f:
        return found.tril() + found.tril(-1).T
    return found


def _rows_of(side: Tensor) -> Tensor:
    """(B, G, T, a) to (G, B T, a)."""
    return side.transpose(0, 1).flatten(1, 2)


def _gram_outer_rows(f: Outer, g: Rows) -> Tensor:
    b, _, t, a, d = f.sizes
    other, s = g.ids.shape
    found = f.left.new_zeros(b, other)
    columns, ids = g.rows.flatten(0, 1), g.ids.reshape(-1)
    if f._formed is not None or (a * d * t < t * other * s * d and f.formed_bytes <= KEEP_BYTES):
        for j, row in enumerate(f.form()[:, 0]):
            found[j] = (row.index_select(0, ids) * columns).reshape(other, -1).sum(1)
        return found
    for piece in f.chunks(2 * t * other * s * f.left.element_size()):
        both = f.left[piece, 0][..., ids] * (f.right[piece, 0] @ columns.T)
        found[piece] = both.reshape(len(f.left[piece]), t, other, s).sum((1, 3))
    return found


def _gram_rows_rows(f: Rows, g: Rows) -> Tensor:
    if g is not f:
        return _gram_of_entries(f, f.factors(), g, g.factors())
    ids, rows, owner = f.factors()
    shared = _shared_entries(ids)
    alone = energies(rows).index_fill(0, shared, 0.0)
    entries = ids[shared], rows.index_select(0, shared), owner[shared]
    found = _gram_of_entries(f, entries, f, entries)
    found.diagonal().index_add_(0, owner, alone)
    return found


def _shared_entries(ids: Tensor) -> Tensor:
    """Positions of the ids that occur more than once."""
    order = ids.argsort()
    ids = ids[order]
    as_before = F.pad(ids[1:] == ids[:-1], (1, 0))[: len(ids)]
    return order[as_before | F.pad(as_before[1:], (0, 1))[: len(ids)]]


Entries = tuple[Tensor, Tensor, Tensor]  # ids (n,), rows (n, d), owners (n,)


def _gram_of_entries(f: Rows, own: Entries, g: Rows, other: Entries) -> Tensor:
    """Ids that many positions share, by matrix products over the examples; the others pair by pair."""
    (ids, rows, owner), (other_ids, other_rows, other_owner) = own, other
    order = other_ids.argsort()
    other_ids = other_ids[order]
    first = torch.searchsorted(other_ids, ids)
    n_met = torch.searchsorted(other_ids, ids, right=True) - first
    n_own = n_met if g is f else _occurrences(ids)
    often = n_met * n_own * PAIR_WEIGHT > f.n_examples * g.n_examples
    found = _gram_by_ids(f, g, torch.unique(ids[often]))
    flat = found.view(-1)
    rare = (~often & (n_met > 0)).nonzero().squeeze(1)
    for piece in _by_size(rare, n_met[rare], CHUNK_BYTES // (2 * f.shape[1] * rows.element_size())):
        n = n_met[piece]
        left = piece.repeat_interleave(n)
        within = torch.arange(len(left), device=ids.device) - (n.cumsum(0) - n).repeat_interleave(n)
        right = order[first[left] + within]
        products = torch.linalg.vecdot(rows.index_select(0, left), other_rows.index_select(0, right))
        flat.index_add_(0, owner[left] * g.n_examples + other_owner[right], products)
    return found


def _occurrences(ids: Tensor) -> Tensor:
    """How often each id occurs, entry by entry."""
    _, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    return counts[inverse]


def _by_size(index: Tensor, sizes: Tensor, largest: int) -> Iterator[Tensor]:
    """Consecutive parts of `index` with at most about `largest` in all."""
    if len(index):
        part = (sizes.cumsum(0) - 1) // max(1, largest)
        yield from index.split(torch.unique_consecutive(part, return_counts=True)[1].tolist())


def _gram_by_ids(f: Rows, g: Rows, ids: Tensor) -> Tensor:
    """`ids`: those that both have, ascending."""
    found = f.rows.new_zeros(f.n_examples, g.n_examples)
    step = max(1, CHUNK_BYTES // max(1, (f.n_examples + g.n_examples) * f.shape[1] * f.rows.element_size()))
    for piece in ids.split(step) if len(ids) else ():
        left = f.at(piece)
        found += left @ (left if g is f else g.at(piece)).T
    return found


INNER: dict[tuple[type, type], Callable] = {
    (Outer, Outer): _inner_outer_outer,
    (Outer, Rows): _inner_outer_rows,
    (Rows, Rows): _inner_rows_rows,
}
# Forms of other files add their own.
GRAM: dict[tuple[type, type], Callable] = {
    (Outer, Outer): _gram_outer_outer,
    (Outer, Rows): _gram_outer_rows,
    (Rows, Rows): _gram_rows_rows,
}
