"""Losses made of rows: reweighted, clipped, and the reduction of token losses to examples."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rowgrad.parameters import Params
from rowgrad.rows.build import condensed_jacobian
from rowgrad.rows.factors import wide_dtype
from rowgrad.rows.matrix import Jacobian

logger = logging.getLogger("rowgrad")


@runtime_checkable
class NormBound(Protocol):
    """A bound that depends on the norms, such as `rowgrad.RunningQuantile`."""

    def update(self, norms: Tensor) -> float | Tensor:
        """The bound for a batch whose rows have these norms, shape (B,)."""
        ...


Bound = float | Tensor | NormBound


def clip_weights(norms: Tensor | Sequence[float], max_norm: float | Tensor, *, mode: str = "clip") -> Tensor:
    """Weights that bound each example's gradient norm.

    | norm            | "clip"            | "normalize"       |
    |-----------------|-------------------|-------------------|
    | 0               | 1                 | 0                 |
    | up to max_norm  | 1                 | max_norm / norm   |
    | above           | max_norm / norm   | max_norm / norm   |
    | inf             | 0                 | 0                 |
    | nan             | 0                 | 0                 |

    Args:
        norms: (B,), as `Jacobian.norms` gives them; whole numbers and sequences are read in the default dtype.
        max_norm: positive number or a tensor that broadcasts to (B,); inf clips nothing in mode "clip".
        mode: "clip" or "normalize".
    Returns:
        (B,), detached, of the norms' dtype. The share clipped is logged at debug level.
    Raises:
        TypeError: norms or max_norm are not numbers, for instance norms by group.
        ValueError: a norm is negative, max_norm is not positive or does not broadcast, or the mode is unknown.

    >>> import torch, rowgrad
    >>> rowgrad.clip_weights(torch.tensor([0.5, 2.0, torch.inf]), max_norm=1.0)
    tensor([1.0000, 0.5000, 0.0000])
    """
    norms = _numbers(norms)
    if (norms < 0).any():
        raise ValueError(f"norms: the smallest is {float(norms[norms < 0].min()):g}; norms are not negative")
    return _weights(norms, max_norm, mode)


def _weights(norms: Tensor, max_norm: float | Tensor, mode: str) -> Tensor:
    """As `clip_weights`, of norms that need no check."""
    if mode not in ("clip", "normalize"):
        raise ValueError(f'mode={mode!r}: expected "clip" or "normalize"')
    if not _is_bound(max_norm, norms, may_be_inf=mode == "clip"):
        raise ValueError(f"max_norm={max_norm!r}: expected a positive number" + (", finite" if mode != "clip" else ""))
    bound = max_norm.to(norms) if isinstance(max_norm, Tensor) else max_norm
    weights = bound / norms
    weights = weights.clamp_(max=1.0) if mode == "clip" else weights.masked_fill_(norms == 0, 0.0)
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("clipped %.3f of %d examples", share_clipped(norms, bound), norms.numel())
    return weights.nan_to_num_(nan=0.0, posinf=torch.inf)  # nan: of a norm that is nan, or inf under a bound of inf


def _is_bound(max_norm: float | Tensor, norms: Tensor, *, may_be_inf: bool) -> bool:
    """Whether a number, or all of a tensor's, can bound a norm; what is neither or does not broadcast is refused."""
    if isinstance(max_norm, Tensor):
        if max_norm.numel() != 1 and max_norm.shape != norms.shape:
            raise ValueError(
                f"max_norm has shape {tuple(max_norm.shape)}; expected one bound, or one for each of the {len(norms)} "
                "examples"
            )
        return bool((max_norm > 0).all()) and (may_be_inf or bool(max_norm.isfinite().all()))
    if not isinstance(max_norm, Real) or isinstance(max_norm, bool):
        raise TypeError(
            f"max_norm={max_norm!r} is a {type(max_norm).__name__}; expected a positive number or a tensor of them "
            "(clipped_loss also takes a RunningQuantile, or a mapping by group)"
        )
    return max_norm > 0 and (may_be_inf or max_norm < torch.inf)


def _numbers(norms: Tensor | Sequence[float]) -> Tensor:
    if isinstance(norms, Mapping):
        raise TypeError(
            f"norms is a mapping of {len(norms)} groups, expected a tensor of shape (B,): weigh each group by itself, "
            "or let clipped_loss do it, with max_norm={group: bound}"
        )
    try:
        found = torch.as_tensor(norms).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"norms is a {type(norms).__name__}, expected a tensor of shape (B,) ({error})") from error
    return found if found.is_floating_point() else found.to(torch.get_default_dtype())


def share_clipped(norms: Tensor, max_norm: float | Tensor) -> float:
    """Share of examples whose norm is above `max_norm` (or not finite); nan for an empty batch."""
    bound = max_norm.to(norms) if isinstance(max_norm, Tensor) else max_norm
    under = norms.detach() <= bound
    return (under.numel() - int(under.sum())) / under.numel() if under.numel() else float("nan")


def clipped_loss(
    losses: Tensor,
    params: Params,
    max_norm: Bound | Mapping[Any, Bound],
    *,
    mode: str = "clip",
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """A scalar whose gradient is the mean (or sum) of the examples' gradients, each clipped to `max_norm`.

    Use it in place of `losses.mean()`. With a mapping {group: bound}, each group of parameters is clipped by its own
    norm; groups must cover all parameters, each once. Examples with a non-finite gradient get weight 0; with
    a `loss_scale` they make the gradient nan, so that a GradScaler skips the step and lowers its scale.

    Args:
        losses, params, options: as for `rowgrad.jacobian`.
        max_norm: bound on the L2 norm of each example's gradient, in units of loss per parameter: a number, a tensor
            that broadcasts to (B,), or a `rowgrad.RunningQuantile`, which takes in the norms; or any of these by group.
        mode: "clip" or "normalize", see `clip_weights`.
        reduction: "mean" divides by B, "sum" does not.
    Returns:
        Scalar with value sum_j c_j losses_j; the attribute `share_clipped` on it tells the share of examples clipped
        (a dict for groups).
    Source: Goodfellow 2015, section 6.

    >>> import torch, rowgrad
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> losses = model(torch.tensor([[0.5], [4.0]])).squeeze(1)  # gradients 0.5 and 4
    >>> rowgrad.clipped_loss(losses, model, max_norm=1.0).backward()
    >>> model.weight.grad
    tensor([[0.7500]])
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction={reduction!r}: expected "mean" or "sum"')
    J = condensed_jacobian(losses, params, **options)
    # what overflows because of a scale has to reach the scaler, which lowers it
    nonfinite = "zero" if options.get("loss_scale", 1.0) == 1.0 else "propagate"
    size = max(1, len(J)) if reduction == "mean" else 1
    if not isinstance(max_norm, Mapping):
        norms = J.norms()
        bound = _bound(max_norm, norms)
        weights, shares = _weights(norms, bound, mode) / size, share_clipped(norms, bound)
    else:
        weights, shares = _by_group(J, max_norm, mode, size, drop_nonfinite=nonfinite == "zero")
    # of no examples the gradients are zeros, as of the plain loss: other processes may wait for them
    loss = J.loss(weights, nonfinite=nonfinite) if len(J) else losses.sum()
    loss.share_clipped = shares  # type: ignore[attr-defined]
    return loss


def _by_group(
    J: Jacobian, max_norm: Mapping[Any, Bound], mode: str, size: int, *, drop_nonfinite: bool
) -> tuple[dict[str, Tensor], dict[Any, float]]:
    """Weights for each parameter, and for each group the share clipped.

    drop_nonfinite: an example of which some part is not finite is left out of all groups.
    """
    names = {group: J.group_names(group) for group in max_norm}
    groups_of: dict[str, list[Any]] = {}
    for group, members in names.items():
        for name in members:
            groups_of.setdefault(name, []).append(group)
    left_out = [n for n in J.names if n not in groups_of]
    if left_out:
        raise ValueError(
            f"max_norm: no weights for {left_out[0]}"
            + (f" and {len(left_out) - 1} more" if len(left_out) > 1 else "")
            + "; the groups must cover every parameter"
        )
    for name, groups in groups_of.items():
        if len(groups) > 1:
            raise ValueError(
                f"max_norm: {name} is in {len(groups)} groups, {groups[0]!r} and {groups[1]!r} among them; one norm "
                "clips it, so groups must not overlap"
            )
    by_group = J.norms(by=names)
    bounds = {group: _bound(bound, by_group[group]) for group, bound in max_norm.items()}
    weights = {group: _weights(by_group[group], bound, mode) / size for group, bound in bounds.items()}
    shares = {group: share_clipped(by_group[group], bound) for group, bound in bounds.items()}
    if drop_nonfinite:
        finite = J.norms().isfinite()
        weights = {group: torch.where(finite, w, 0.0) for group, w in weights.items()}
    return {name: weights[group] for group in names for name in names[group]}, shares


def _bound(max_norm: Bound, norms: Tensor) -> float | Tensor:
    if isinstance(max_norm, (float, int, Tensor)) or not isinstance(max_norm, NormBound):
        return max_norm
    return max_norm.update(norms)


def per_example(token_losses: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Losses of positions (B, ...) to losses of examples (B,), differentiably.

    Args:
        token_losses: (B, *positions), for instance `F.cross_entropy(..., reduction="none")` reshaped to (B, T).
        mask: broadcastable to `token_losses`; True (or a weight) where a position counts.
        reduction: "mean" over the positions that count, or "sum".
    Returns:
        (B,); 0 for an example whose mask is empty. Masked positions may hold nan or inf.
    Raises:
        ValueError: no batch dimension, a mask that does not fit, an unknown reduction.

    >>> import torch, rowgrad
    >>> token_losses = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    >>> rowgrad.per_example(token_losses, mask=torch.tensor([[True, True], [True, False]]))
    tensor([2., 5.])
    """
    if token_losses.ndim == 0:
        raise ValueError("token_losses is a scalar, expected (B, ...)")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction={reduction!r}: expected "mean" or "sum"')
    flat = token_losses.reshape(len(token_losses), -1) if token_losses.numel() else token_losses.flatten(1)
    if mask is None:
        weights = torch.ones_like(flat)
    else:
        try:
            weights = mask.expand(token_losses.shape).reshape(flat.shape).to(flat.dtype)
        except RuntimeError as error:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} does not broadcast to the losses' {tuple(token_losses.shape)}"
            ) from error
    wide = wide_dtype(flat.dtype)  # sums of many positions leave half precision
    total = torch.where(weights != 0, flat * weights, 0.0).sum(1, dtype=wide)
    if reduction == "mean":
        total = total / weights.sum(1, dtype=wide).clamp(min=torch.finfo(wide).tiny) * (weights != 0).any(1)
    return total.to(flat.dtype)
