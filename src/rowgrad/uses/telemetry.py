"""What a batch is made of, in a few numbers for a logger."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

import torch
from torch import Tensor

from rowgrad.errors import InputError
from rowgrad.rows.matrix import Jacobian
from rowgrad.uses.expected import described, is_number


def batch_statistics(
    J: Jacobian, *, quantiles: Sequence[float] = (0.05, 0.5, 0.95), conflicts: bool = True
) -> dict[str, float]:
    """How the rows of one batch differ in length and direction.

    | key                          | what it is                                            | nan or inf           |
    |------------------------------|-------------------------------------------------------|----------------------|
    | `gradient_diversity`         | sum_j |row_j|^2 / |sum_j row_j|^2: 1/B if they agree, | inf if they cancel,  |
    |                              | 1 if orthogonal, larger if they oppose each other     | nan if all are 0     |
    | `mean_cosine`                | of the angles in all pairs of different examples      | nan without a pair   |
    | `share_conflicting`          | of these pairs, those with a negative cosine          | nan without a pair   |
    | `norm_mean`, `norm_q50`, ... | mean and quantiles of the norms                       | nan without rows     |
    | `share_nonfinite`            | of the examples, those whose row holds inf or nan     | nan without examples |

    Rows that are not finite are left out of all but the last, rows of 0 out of the pairs. The values change with no
    permutation of the examples; multiplying all losses by a number changes the norms alone.

    Args:
        J: rows of the batch, B of them; they are read, not used up.
        quantiles: which ones of the norms, each between 0 and 1.
        conflicts: whether to look at each pair. It is what takes a Gram matrix, B^2 numbers; the others take two
            weighted sums.
    Raises:
        InputError: J is no Jacobian, or a quantile is out of range.
    Source: Yin et al. 2018, "Gradient Diversity: a Key Ingredient for Scalable Distributed Learning",
    arXiv:1706.05699.

    >>> import torch, rowgrad
    >>> from rowgrad.uses import batch_statistics
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> J = rowgrad.jacobian(model(torch.tensor([[3.0, 4.0], [4.0, -3.0], [-3.0, -4.0]])).squeeze(1), model)
    >>> found = batch_statistics(J)
    >>> found["gradient_diversity"], round(found["mean_cosine"], 3), round(found["share_conflicting"], 3)
    (3.0, -0.333, 0.333)
    """
    if not isinstance(J, Jacobian):
        raise InputError(f"batch_statistics was given {described(J)}; expected rowgrad.jacobian(losses, model)")
    if not all(is_number(q) and 0 <= q <= 1 for q in quantiles):
        raise InputError(f"batch_statistics: quantiles={tuple(quantiles)}, expected numbers from 0 to 1")
    norms = J.norms()
    finite = norms.isfinite()
    share_nonfinite = int((~finite).sum()) / len(norms) if len(norms) else nan
    if share_nonfinite > 0:
        J, norms = J[finite], norms[finite]
    lengths = norms.cpu().double()  # some devices have no float64
    pointing = norms > 0
    directed = J if pointing.all() else J[pointing]
    found = {"gradient_diversity": _ratio(float(lengths.square().sum()), sq_norm_of_sum(J, torch.ones_like(norms)))}
    n = len(directed)
    twice_cosines = sq_norm_of_sum(directed, 1 / norms[pointing]) - n
    found["mean_cosine"] = twice_cosines / (n * (n - 1)) if n > 1 else nan
    if conflicts:
        found["share_conflicting"] = float((directed.gram() < 0).sum()) / (n * (n - 1)) if n > 1 else nan
    found["norm_mean"] = float(lengths.mean())
    for q in quantiles:
        found[f"norm_q{100 * q:g}"] = float(lengths.quantile(q)) if len(norms) else nan
    return found | {"share_nonfinite": share_nonfinite}


def sq_norm_of_sum(J: Jacobian, c: float | Tensor) -> float:
    """|sum_j c_j row_j|^2."""
    parts = J.weighted_sum(c).values() if len(J) else []
    wide = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in parts)
    return sum(float(torch.linalg.vector_norm(p)) ** 2 for p in wide)


def _ratio(above: float, below: float) -> float:
    if below == 0:
        return inf if above > 0 else nan
    return above / below
