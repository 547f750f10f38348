"""A bound on gradient norms that follows the norms."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, nan
from typing import Any

import torch
from torch import Tensor

from rowgrad.uses import expected
from rowgrad.uses.expected import Expected
from rowgrad.uses.processes import gathered

OPTIONS = {
    "q": expected.number("a number between 0 and 1", lambda v: 0 < v < 1),
    "window": expected.whole(1, what="at least one example, a whole number"),
    "distributed": expected.FLAG,
}
STATE = {
    "kind": expected.same("RunningQuantile"),
    "q": OPTIONS["q"],
    "window": OPTIONS["window"],
    "value": expected.number("a positive number, or nan before the first batch", lambda v: 0 < v < inf or v != v),
    "batches": Expected(
        "a list of tensors, (B,), of finite positive norms",
        lambda v: isinstance(v, list) and all(_are_norms(batch) for batch in v),
    ),
}


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
        expected.check("RunningQuantile", {"q": q, "window": window, "distributed": distributed}, OPTIONS)
        self.q, self.window, self.distributed = float(q), int(window), distributed
        self.reset()

    def reset(self) -> None:
        """Forget every norm."""
        self._batches: list[Tensor] = []
        self.value = nan

    def update(self, norms: Tensor) -> float:
        """Take in the norms of one batch, shape (B,), and return the bound for it.

        `rowgrad.clipped_loss` does this itself; `rowgrad.clip_weights` takes the bound.

        Raises:
            InputError: norms are not (B,), or one is negative; with distributed=True in all processes.
        """
        seen = torch.cat(gathered(lambda: expected.vector("norms", norms), self.distributed))
        self._batches.append(seen[seen.isfinite() & (seen > 0)])
        while sum(map(len, self._batches[1:])) >= self.window:
            del self._batches[0]
        known = torch.cat(self._batches)
        self.value = float(known.quantile(self.q)) if len(known) else 1.0
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers; `torch.load` reads them with weights_only=True."""
        plain = {"kind": "RunningQuantile", "q": self.q, "window": self.window, "value": self.value}
        return plain | {"batches": [batch.clone() for batch in self._batches]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, q and window included.

        Raises:
            InputError: the state lacks an entry, or holds one that it cannot have; nothing was loaded.
        """
        found = expected.checked_state("RunningQuantile", state, STATE)
        self.q, self.window, self.value = found["q"], found["window"], found["value"]
        self._batches = found["batches"]

    def __repr__(self) -> str:
        return f"RunningQuantile({self.q:g}, value {self.value:.4g}, {sum(map(len, self._batches))} norms)"


def _are_norms(value: Any) -> bool:
    return expected.is_tensor(value, torch.float64, -1) and bool((value.isfinite() & (value > 0)).all())
