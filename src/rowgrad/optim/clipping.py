"""Clipping of the gradient before a step, with a record of how often it acted."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isfinite
from numbers import Real

import torch
from torch import Tensor

from rowgrad.errors import InputError, NonFiniteError
from rowgrad.parameters import Params, named

MODES = ("value", "norm", "normalize")


class GradientClip:
    """Clip `.grad` by value or by norm, and count how often that changed it.

    | mode        | each entry g_i becomes             | a gradient of 0 | inf    | nan    |
    |-------------|------------------------------------|-----------------|--------|--------|
    | "value"     | the nearer end of [-bound, bound]  | stays           | bound  | raises |
    | "norm"      | g_i min(1, bound / norm)           | stays           | raises | raises |
    | "normalize" | g_i bound / norm                   | stays           | raises | raises |

    "norm" caps the L2 norm of the whole gradient; "normalize" divides the gradient by it whatever its size, as Aggarwal
    2018 has it. The gradients of single examples are clipped by `rowgrad.clipped_loss`.

    Args:
        params: as for `rowgrad.jacobian`; parameters without `.grad` count as 0, as do the entries that a sparse
            gradient leaves out.
        bound: positive and finite.
        mode: "value", "norm" or "normalize".
    Call it after `backward` (and after `GradScaler.unscale_`), before `optimizer.step()`. It returns the norm
    from before.
    Attributes:
        calls, acted: how often it was called, and how often it changed the gradient. `share` is acted / calls.
        entries_clipped: share of all entries that lay outside, in mode "value".
        largest: the largest norm seen.
    Raises:
        InputError: an unknown mode, or a bound that is not positive.
        NonFiniteError: see the table; no gradient is changed then.
    Source: Aggarwal 2018, "Gradient Clipping for Exploding Gradients".

    >>> import torch
    >>> from rowgrad.optim import GradientClip
    >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> clip = GradientClip([w], 1.0)
    >>> for scale in (1.0, 0.1):
    ...     w.grad = scale * torch.tensor([3.0, 4.0])
    ...     norm = clip()
    >>> clip
    GradientClip(1.0, 'norm'): acted in 1 of 2 calls (50.0%), largest norm 5
    """

    def __init__(self, params: Params, bound: float, mode: str = "norm") -> None:
        if mode not in MODES:
            raise InputError(f"GradientClip: mode={mode!r}, expected one of: {', '.join(MODES)}")
        if not (isinstance(bound, Real) and 0 < bound < inf):
            raise InputError(f"GradientClip: bound={bound!r}, expected a positive finite number")
        self._parameters = named(params).by_name
        self.bound, self.mode = bound, mode
        self.calls = self.acted = self._entries = self._outside = 0
        self.largest = 0.0

    @property
    def share(self) -> float:
        """Share of the calls in which the gradient was changed; nan before the first."""
        return self.acted / self.calls if self.calls else float("nan")

    @property
    def entries_clipped(self) -> float:
        """Share of the entries that lay outside, in mode "value"; nan before the first call and in the other modes."""
        return self._outside / self._entries if self._entries else float("nan")

    def __repr__(self) -> str:
        share = f" ({self.share:.1%})" if self.calls else ""
        record = f"acted in {self.acted} of {self.calls} calls{share}, largest norm {self.largest:.4g}"
        return f"GradientClip({self.bound!r}, {self.mode!r}): {record}"

    @torch.no_grad()
    def __call__(self) -> float:
        gradients = {name: _entries(p) for name, p in self._parameters.items() if p.grad is not None}
        norm = _norm(gradients)
        self._refuse_non_finite(gradients, norm)
        has_acted = self._clip_values(gradients) if self.mode == "value" else self._scale(gradients, norm)
        self.calls += 1
        self.acted += has_acted
        self.largest = max(self.largest, norm)
        return norm

    def _refuse_non_finite(self, gradients: Mapping[str, Tensor], norm: float) -> None:
        if isfinite(norm):
            return
        for name, g in gradients.items():
            if bool(g.isnan().any()) or (self.mode != "value" and bool(g.isinf().any())):
                raise NonFiniteError(
                    f"GradientClip: the gradient of {name} holds inf or nan, and no {self.mode} bounds that; no "
                    "gradient was changed. Leave this step out, or look for its birthplace with rowgrad.diagnose"
                )
        if self.mode != "value":
            raise NonFiniteError("GradientClip: every gradient is finite, but their norm overflows; use float64")

    def _clip_values(self, gradients: Mapping[str, Tensor]) -> bool:
        outside = 0
        for name, g in gradients.items():
            outside += int((g.abs() > self.bound).sum())
            self._entries += self._parameters[name].numel()
            g.clamp_(-self.bound, self.bound)
        self._outside += outside
        return outside > 0

    def _scale(self, gradients: Mapping[str, Tensor], norm: float) -> bool:
        if norm == 0 or norm == self.bound or (norm < self.bound and self.mode == "norm"):
            return False
        for g in gradients.values():
            g.mul_(self.bound / norm)
        return True

    def state_dict(self) -> dict[str, float]:
        """The record, to go on with after a restart."""
        return {name: getattr(self, name) for name in ("calls", "acted", "largest", "_entries", "_outside")}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on with a record."""
        for name in self.state_dict():
            setattr(self, name, state[name])


def _entries(p: Tensor) -> Tensor:
    """What `.grad` holds, to be changed in place: of a sparse one the entries that are not 0, each once."""
    assert p.grad is not None
    if p.grad.layout is not torch.sparse_coo:
        return p.grad
    p.grad = p.grad.coalesce()
    return p.grad.values()


def _norm(gradients: Mapping[str, Tensor]) -> float:
    """The L2 norm of all entries together."""
    norms = [float(g.norm(dtype=torch.promote_types(g.dtype, torch.float32))) for g in gradients.values()]
    return float(torch.tensor(norms, dtype=torch.float64).norm())
