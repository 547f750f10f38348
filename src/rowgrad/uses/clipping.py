"""A bound on gradient norms that follows the norms."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from typing import Any

import torch
from torch import Tensor

from rowgrad.errors import InputError
from rowgrad.uses.processes import gathered


class RunningQuantile:
    """A quantile of the gradient norms of the last examples, as `max_norm` for `rowgrad.clipped_loss`.

    The bound for a batch is the quantile over this batch and those before it, as many whole batches as are needed for
    `window` norms. Being exact it needs no first guess and no learning rate: from the first batch on, about the share
    1 - q of the examples is clipped, and the bound falls as the norms do. (Andrew et al. 2021 move a bound by a factor
    at every step instead, because in private training only a noisy share of clipped examples may be known.)

    Law: losses multiplied by a number give a bound multiplied by it; permuting the examples of a batch changes nothing.

    | norms          | what happens                                                                            |
    |----------------|-----------------------------------------------------------------------------------------|
    | 0, inf, nan    | left out: a row of 0 needs no bound, and the others get weight 0 whatever the bound is  |
    | none is left   | the bound is 1; nothing depends on it                                                   |

    Args:
        q: between 0 and 1; .5 clips about half of the examples, .9 the tenth with the longest gradients.
        window: how many examples' norms are remembered, at least; each takes 8 bytes.
        distributed: the norms of all processes count, so that all clip at the same bound; each process calls `update`
            equally often.
    Attributes:
        value: the last bound; nan before the first batch.
    Raises:
        InputError: q or window is out of range.

    >>> import torch, rowgrad
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> bound = rowgrad.RunningQuantile(0.5)
    >>> losses = model(torch.tensor([[1.0], [2.0], [9.0]])).squeeze(1)  # gradients 1, 2 and 9
    >>> rowgrad.clipped_loss(losses, model, max_norm=bound).backward()
    >>> bound
    RunningQuantile(0.5, value 2, 3 norms)
    >>> model.weight.grad * 3  # 1 + 2 + 2
    tensor([[5.]])
    """

    def __init__(self, q: float = 0.5, *, window: int = 1024, distributed: bool = False) -> None:
        if not 0 < q < 1:
            raise InputError(f"RunningQuantile: q={q!r}, expected a number between 0 and 1")
        if window < 1:
            raise InputError(f"RunningQuantile: window={window!r}, expected at least one example")
        self.q, self.window, self.distributed = q, window, distributed
        self.reset()

    def reset(self) -> None:
        """Forget every norm."""
        self._batches: list[Tensor] = []
        self.value = nan

    def update(self, norms: Tensor) -> float:
        """Take in the norms of one batch, shape (B,), and return the bound for it.

        `rowgrad.clipped_loss` does this itself; `rowgrad.clip_weights` takes the bound.
        """
        seen = gathered(norms.detach()) if self.distributed else norms.detach()
        seen = seen.cpu().double()
        self._batches.append(seen[seen.isfinite() & (seen > 0)])
        while sum(map(len, self._batches[1:])) >= self.window:
            del self._batches[0]
        known = torch.cat(self._batches)
        self.value = float(known.quantile(self.q)) if len(known) else 1.0
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers; `torch.load` reads them with weights_only=True."""
        return {"q": self.q, "window": self.window, "value": self.value, "batches": [b.clone() for b in self._batches]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, q and window included."""
        self.q, self.window, self.value = state["q"], state["window"], state["value"]
        self._batches = [batch.clone() for batch in state["batches"]]

    def __repr__(self) -> str:
        return f"RunningQuantile({self.q:g}, value {self.value:.4g}, {sum(map(len, self._batches))} norms)"
