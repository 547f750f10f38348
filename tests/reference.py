"""The slow truths: rows one at a time, and how close is close enough.

Rows are `{name: (B, *shape)}`. Nothing here is clever, on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that require grad, each once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def rows_by_grad(losses: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Row j by asking autograd for the gradient of `losses[j]`, on the same graph. Zeros for unused parameters."""
    found = {name: torch.zeros(len(losses), *p.shape, dtype=p.dtype) for name, p in params.items()}
    for j in range(len(losses)):
        gradients = torch.autograd.grad(losses[j], list(params.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(params, gradients, strict=True):
            if gradient is not None:
                found[name][j] = gradient.to_dense() if gradient.is_sparse else gradient
    return found


def rows_by_loop(model: nn.Module, batch: Sequence[Tensor], loss_fn: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Row j from a batch that holds example j alone; the truth only where examples are independent."""
    params = trainable(model)
    rows = [rows_by_grad(loss_fn(model, *(t[j : j + 1] for t in batch)), params) for j in range(len(batch[0]))]
    return {name: torch.cat([r[name] for r in rows]) for name in params}


def flat(rows: Mapping[str, Tensor]) -> Tensor:
    """(B, P), in float64."""
    return torch.cat([r.detach().double().reshape(len(r), r.shape[1:].numel()) for r in rows.values()], 1)


def relative_errors(found: Mapping[str, Tensor] | Tensor, expected: Mapping[str, Tensor] | Tensor) -> Tensor:
    """Error of each row over that row's own norm, (B,): 0 where both are zero, inf where only the truth is."""
    found, expected = (flat(r) if isinstance(r, Mapping) else r.detach().double() for r in (found, expected))
    assert found.shape == expected.shape, f"shapes differ: found {tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert torch.equal(found.isfinite(), expected.isfinite()), "finite in one and not in the other"
    error, norm = (found - expected).nan_to_num().norm(dim=1), expected.nan_to_num().norm(dim=1)
    return torch.where(error > 0, error / norm, torch.zeros_like(error))


def assert_rows_close(
    found: Mapping[str, Tensor] | Tensor, expected: Mapping[str, Tensor] | Tensor, rtol: float = 1e-10
) -> None:
    """Every row within `rtol` of the truth, scaled by that row's own norm; a zero row must be exactly zero."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        assert list(found) == list(expected), f"names differ: found {list(found)}, expected {list(expected)}"
    errors = relative_errors(found, expected)
    if errors.numel() and float(errors.max()) > rtol:
        j = int(errors.argmax())
        off = f"row {j} is off by {float(errors[j]):.2g} of its norm (allowed {rtol:.0e})"
        raise AssertionError(off + _where(found, expected, j))


def _where(found: Mapping[str, Tensor] | Tensor, expected: Mapping[str, Tensor] | Tensor, j: int) -> str:
    if not (isinstance(found, Mapping) and isinstance(expected, Mapping)):
        return ""
    worst = max(expected, key=lambda n: float((found[n][j].double() - expected[n][j].double()).nan_to_num().norm()))
    norms = [float(r[worst][j].double().norm()) for r in (found, expected)]
    return f"; most of it in {worst}: norm {norms[0]:.3g}, expected {norms[1]:.3g}"


def assert_scaled_close(found: Tensor, expected: Tensor, scale: Tensor, rtol: float = 1e-10) -> None:
    """Entry by entry within `rtol * scale`, for products of rows whose rounding is set by the rows' norms."""
    assert found.shape == expected.shape, f"shapes differ: found {tuple(found.shape)}, expected {tuple(expected.shape)}"
    error = (found.detach().double() - expected.double()).abs()
    over = error > rtol * scale
    assert not bool(over.any()), f"off by {float((error / scale)[over].max()):.2g} of the scale (allowed {rtol:.0e})"
