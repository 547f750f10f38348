"""What samplers by norm share: the shuffle while they are off, the switch, the draws under way, their state.

Note [what is not yet done is drawn already]: workers are ahead of the loop, and weights belong to the draw (Note
[weights at the draw]). So a state holds the draws that no `update` has come for. A sampler that goes on from it gives
these first and draws the next ones from the same table as without the stop.

Note [one shuffle for all processes]: the shuffle of an epoch comes from a seed drawn at the start and the number of the
epoch, never from the generator: draws by norms move that on, in each process as often as it was switched on.
"""

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from rowgrad.errors import InputError
from rowgrad.uses.draws import Draw, DrawnIndex
from rowgrad.uses.gain import Gain, GainMeter


class WeightedSampler(Sampler[Any]):
    """Draws of an epoch in blocks: in the order of a shuffle with weights 1, or, when switched on, by norms."""

    def __init__(
        self,
        n: int,
        mix: float,
        max_weight: float | None,
        switch: tuple[float, float] | None,
        window: int,
        generator: torch.Generator | None,
    ) -> None:
        _check(n, mix, max_weight, switch, window)
        self.n, self.mix, self.max_weight, self.switch = n, mix, max_weight, switch
        self.rank, self.num_replicas = 0, 1
        self._generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self._meter = GainMeter(window)
        self._wanted = switch is None
        self._epoch, self._drawn, self._done, self._resumes = 0, 0, 0, False
        # Drawn, from number `_first` on, and no update came yet: positions, weights, whether by norms; (3, block).
        self._waiting: deque[Tensor] = deque()
        self._first = 0
        self._seed = int(torch.randint(2**62, (), generator=self._generator))
        self._shuffle_at = 0
        self._shuffle: Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether examples are drawn by their norms now."""
        return self._wanted

    @property
    def gain(self) -> Gain:
        """What drawing by norms does to the variance of a batch's gradient, measured over the last batches.

        Returns:
            (ratio, error): the variance with uniform draws divided by that with draws by norms, and the standard error
            (jackknife). Without `grad_norm` in the updates, and with batches of one example, it is the ratio of the
            second moments: nearer to 1 than the ratio of variances, which subtract the squared norm of the mean
            gradient from both.
        """
        return self._meter.estimate()

    def state_dict(self) -> dict[str, Any]:
        """Everything the next draws depend on: tensors and plain values, which `weights_only=True` loads.

        Taken after the `update` of a batch, in the middle of an epoch, also with workers: draws are given again from
        the first that no update has come for. With `drop_last=True` the rest of an epoch may be less than a batch.
        """
        waiting = torch.cat([torch.zeros(3, 0, dtype=torch.float64), *self._waiting], 1)
        return {
            "n": self.n,
            "meter": self._meter.sums.clone(),
            "wanted": self._wanted,
            "epoch": self._epoch,
            "done": self._done,
            "waiting": waiting[:, self._done - self._first :].clone(),
            "seed": self._seed,
            "shuffle_at": self._shuffle_at,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the next `iter` continues its epoch.

        Raises:
            InputError: the state is of a data set of another size.
        """
        if state["n"] != self.n:
            raise InputError(f"the state is of a sampler for {state['n']} examples, this one has {self.n}")
        self._meter.sums = state["meter"].clone()
        self._wanted, self._epoch = state["wanted"], state["epoch"]
        self._done = self._first = state["done"]
        waiting = state["waiting"].clone()
        self._drawn = self._done + waiting.shape[1]
        self._waiting = deque([waiting] if waiting.numel() else [])
        self._seed, self._shuffle_at, self._shuffle = state["seed"], state["shuffle_at"], None
        self._generator.set_state(state["generator"])
        self._resumes = self._epoch > 0 and self._done < self._n_draws

    @property
    def _n_draws(self) -> int:
        """Draws in an epoch of one process."""
        return -(-self.n // self.num_replicas)

    def _draws(self, block: int) -> Iterator[DrawnIndex]:
        """The draws of an epoch, or what is left of one, `block` of them at a time.

        The epoch begins with the first draw: a DataLoader with workers makes an iterator that it never reads.
        """
        if not self._resumes:
            self._begin()
        self._resumes = False
        epoch, number, blocks = self._epoch, self._done, [*self._waiting]
        while True:
            for drawn in blocks:
                for index, weight, by_norms in zip(*drawn.tolist(), strict=True):
                    yield DrawnIndex(index, weight, number, bool(by_norms))
                    number += 1
                    if epoch != self._epoch:
                        raise InputError("the sampler began another epoch; go over it with one loader at a time")
            if number >= self._n_draws:
                return
            blocks = [self._next_block(min(block, self._n_draws - number))]

    def _begin(self) -> None:
        self._epoch += 1
        self._drawn = self._done = self._first = 0
        self._waiting.clear()
        self._shuffle_at, self._shuffle = 0, None

    def _next_block(self, size: int) -> Tensor:
        index, weights = self._by_norms(size) if self.active else self._shuffled(size)
        block = torch.stack([index.double(), weights, torch.full_like(weights, self.active)])
        self._waiting.append(block)
        self._drawn += size
        return block

    @abstractmethod
    def _by_norms(self, size: int) -> tuple[Tensor, Tensor]:
        """Positions and weights, both (size,)."""

    def _shuffled(self, size: int) -> tuple[Tensor, Tensor]:
        if self._shuffle is None:
            seed = self._seed + self._epoch
            self._shuffle = torch.randperm(self.n, generator=torch.Generator().manual_seed(seed))
        at = torch.arange(self._shuffle_at, self._shuffle_at + size) * self.num_replicas + self.rank
        self._shuffle_at += size
        return self._shuffle[at % self.n], torch.ones(size, dtype=torch.float64)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=self._generator)

    def _capped(self, weights: Tensor) -> Tensor:
        return weights if self.max_weight is None else weights.clamp(max=self.max_weight)

    def _finish(self, draw: Draw) -> None:
        """No draw up to the last of the batch is given again."""
        if bool((draw.number < 0).any()):
            raise InputError(
                "these draws lost their numbers and weights on the way: let rg.Weighted be the outermost data set, "
                "around any other wrapper, as in rg.Weighted(rg.Indexed(dataset))"
            )
        if len(draw.number):
            self._done = max(self._done, min(int(draw.number.max()) + 1, self._drawn))
        while self._waiting and self._first + self._waiting[0].shape[1] <= self._done:
            self._first += self._waiting.popleft().shape[1]

    def _measure(
        self, draw: Draw, would: Tensor, norms: Tensor, grad_norm: float | Tensor | None, per_pool: float = 0.0
    ) -> None:
        """A batch, weights that norms would give, norms; see `GainMeter.add`. Left out if not finite."""
        mean = None if grad_norm is None else float(grad_norm)
        if not len(norms) or not bool(norms.isfinite().all()) or not math.isfinite(mean or 0.0):
            return
        weights, by_norms = draw.weight.detach().cpu().double(), bool(torch.as_tensor(draw.by_norms).any())
        self._meter.add(weights, would, norms, mean, per_pool=per_pool, out_of_pool=by_norms)
        if self.switch is not None:
            gain, (on, off) = self.gain, self.switch
            self._wanted = gain.ratio >= off if self._wanted else gain.ratio - 2 * gain.error > on

    def _checked(self, index: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        index, norms = index.detach().to("cpu", torch.int64), norms.detach().to("cpu", torch.float64)
        if index.ndim != 1 or index.shape != norms.shape:
            raise InputError(
                f"update was given positions of shape {tuple(index.shape)} and norms of shape {tuple(norms.shape)}; "
                "expected one of each for an example, (B,)"
            )
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.n:
            raise InputError(
                f"positions run from {index.min()} to {index.max()}; the sampler has examples 0 to {self.n - 1}"
            )
        if bool((norms < 0).any()):
            raise InputError(f"a norm is {float(norms.min()):g}; expected norms, which are not negative")
        return index, norms


def _check(n: int, mix: float, max_weight: float | None, switch: tuple[float, float] | None, window: int) -> None:
    if isinstance(n, Sized) or n < 1:
        raise InputError(f"n={n!r}: expected the number of examples, len(dataset)")
    if not 0 < mix <= 1:
        raise InputError(f"mix={mix}: expected a share in (0, 1]; without uniform draws an example may never return")
    if max_weight is not None and not max_weight > 0:
        raise InputError(f"max_weight={max_weight}: expected a positive number, or None for no cap")
    if switch is not None and not switch[0] >= switch[1]:
        raise InputError(f"switch={switch}: expected (on, off) with on at least off, or None for always on")
    if window < GainMeter.LEAST:
        raise InputError(f"window={window}: expected at least {GainMeter.LEAST} batches")
