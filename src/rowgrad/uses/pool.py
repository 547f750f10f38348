"""Draw each batch out of a larger pool, by a bound on the gradients that costs a forward pass and no table."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rowgrad.errors import InputError, NonFiniteError, NotAVectorError
from rowgrad.uses import expected
from rowgrad.uses.draws import Draw, DrawnIndex
from rowgrad.uses.expected import described
from rowgrad.uses.weighted import WeightedSampler


def output_norms(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """Norm of the derivative of each example's loss in the network's outputs: a bound on its gradient, nearly free.

     Law: entry j is ||d losses_j / d outputs_j||, without a backward pass through the network. The norm of the whole
    gradient is at most this times a factor that depends on the network and is about the same for all examples, so it
    ranks examples; it is no norm of a gradient itself.

    Args:
        loss: function of outputs that gives one loss per example, (B,).
        outputs: what the last layer gives, (B, ...), with a graph or without; not written to.
    Returns:
        (B,), detached, in float32 at least.
    Raises:
        NotAVectorError: the losses are not (B,).
    Source: Katharopoulos and Fleuret 2018 (arXiv:1803.00942), the upper bound on the gradient norm.

    >>> import torch
    >>> from rowgrad import uses
    >>> uses.output_norms(lambda z: (z - 1).square().sum(1), torch.tensor([[1.0, 1.0], [4.0, 5.0]]))
    tensor([ 0., 10.])
    """
    with torch.enable_grad():
        leaf = outputs.detach().clone().requires_grad_()
        losses = loss(leaf)
        if losses.shape != (len(outputs),):
            raise NotAVectorError(
                f"the loss has shape {tuple(losses.shape)} for outputs of {tuple(outputs.shape)}; "
                f'expected one loss per example, ({len(outputs)},): use reduction="none", and per_example for positions'
            )
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=torch.promote_types(grad.dtype, torch.float32))


class PoolSampler(WeightedSampler):
    """Draws each batch by a score out of a pool of uniform draws; a `batch_sampler` for DataLoader.

    Law: a pool of K examples is drawn uniformly, then B of it with p_i = (1 - mix) s_i / sum(s) + mix / K, with
    replacement and with weights w_i = 1 / (K p_i). The weighted mean of the batch's gradients is unbiased. It varies at
    least as the mean of the pool does: the gain is below K / (B - 1) whatever the scores.

    Needs no earlier look at an example, as a table of norms does (`NormSampler`), but reads K examples and runs the
    network forward on them for every batch: about K / (3 B) of a step. It begins switched off, as an ordinary shuffle
    with weights 1, and by default switches itself on where the gain exceeds this cost. While it is off it measures what
    the batch's own norms would give as scores, the best a score can do; while it is on, what the scores gave. Scores
    that fall short of the norms are therefore tried for a few batches in every window, and switched off again.

        def score(index):
            x, y = default_collate([dataset[i] for i in index])
            return uses.output_norms(lambda z: F.cross_entropy(z, y, reduction="none"), model(x))

        sampler = uses.PoolSampler(len(dataset), score, batch_size=32)
        loader = DataLoader(rg.Weighted(dataset), batch_sampler=sampler)

    and in the loop as with `NormSampler`. With workers a batch is scored when ordered, some steps before it comes.

    Args:
        n: how many examples the data set has.
        score: function of K positions (a list) that gives their scores, (K,), not negative; called without gradients.
        batch_size: B, the last batch of an epoch may be smaller.
        pool: K; 5 * batch_size by default.
        mix, max_weight, window, rank, num_replicas, draws, generator: as for `NormSampler`. Processes share the
            shuffle, and each draws pools of its own.
        switch: (on, off): on once the gain less two errors exceeds the first, off once it is below the second; by
            default both are the cost of a step, 1 + K / (3 B). None for always on.
    Raises:
        InputError: an argument is out of range or of another kind, or the scores do not fit the pool.
        NonFiniteError: a score is inf or nan.
    Source: Katharopoulos and Fleuret 2018 (arXiv:1803.00942).

    >>> import torch
    >>> from rowgrad import uses
    >>> sampler = uses.PoolSampler(100, lambda index: torch.tensor(index) % 2, batch_size=4, switch=None)
    >>> odd = [i % 2 for batch in sampler for i in batch]
    >>> len(odd), sum(odd) > 80
    (100, True)
    """

    def __init__(
        self,
        n: int,
        score: Callable[[list[int]], Tensor],
        *,
        batch_size: int,
        pool: int | None = None,
        mix: float = 0.1,
        max_weight: float | None = None,
        switch: tuple[float, float] | str | None = "cost",
        window: int = 64,
        rank: int | None = None,
        num_replicas: int | None = None,
        draws: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._check({"batch_size": batch_size}, {"batch_size": expected.whole(1)})
        pool = 5 * batch_size if pool is None else pool
        self._check({"pool": pool}, {"pool": expected.whole(batch_size, what="a whole number, a pool as large as B")})
        if not callable(score):
            raise InputError(f"PoolSampler: score={described(score)}, expected a function of positions")
        if isinstance(switch, str):
            if switch != "cost":
                raise InputError(f'switch="{switch}": expected "cost", (on, off), or None for always on')
            cost = 1 + pool / (3 * batch_size)
            switch = (cost, cost)
        super().__init__(
            n,
            mix=mix,
            max_weight=max_weight,
            switch=switch,
            window=window,
            rank=rank,
            num_replicas=num_replicas,
            draws=draws,
            generator=generator,
        )
        self._score, self.batch_size, self.pool = score, int(batch_size), int(pool)

    def __len__(self) -> int:
        """Batches in an epoch of one process."""
        return -(-self.draws // self.batch_size)

    def __iter__(self) -> Iterator[list[DrawnIndex]]:
        return self._batches(self._draws(self.batch_size))

    def update(self, draw: Draw, norms: Tensor, *, grad_norm: float | Tensor | None = None) -> None:
        """Measure the gain from the norms of a batch's examples.

        Args:
            draw: what came with the batch.
            norms: of their gradients (B,), not weighted; any dtype and device.
            grad_norm: norm of the batch's weighted mean gradient, for the exact ratio of variances.
        Raises:
            InputError: the shapes do not agree, a position is out of range, a norm is negative, or it is no draw.
        """
        _, norms, mean_norm = self._checked(draw, norms, grad_norm)
        self._finish(draw)
        out_of_pool = bool(torch.as_tensor(draw.by_norms).any())
        would = draw.weight.detach().cpu().double() if out_of_pool else 1 / (len(norms) * self._shares(norms))
        self._measure(draw, would, norms, mean_norm, 1 / self.pool)

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"batch_size": self.batch_size, "pool": self.pool}

    def _batches(self, draws: Iterator[DrawnIndex]) -> Iterator[list[DrawnIndex]]:
        while batch := [i for _, i in zip(range(self.batch_size), draws, strict=False)]:
            yield batch

    def _by_norms(self, size: int) -> tuple[Tensor, Tensor]:
        pool = (self._uniform(self.pool) * self.n).long()
        shares = self._shares(self._scores(pool))
        at = shares.cumsum(0)
        chosen = torch.searchsorted(at, self._uniform(size) * at[-1], right=True).clamp(max=self.pool - 1)
        return pool[chosen], self._capped(1 / (self.pool * shares[chosen]))

    def _scores(self, pool: Tensor) -> Tensor:
        with torch.no_grad():
            given = self._score(pool.tolist())
        if not isinstance(given, Tensor) or given.shape != pool.shape or given.is_complex() or bool((given < 0).any()):
            raise InputError(
                f"score gave {described(given)} for {len(pool)} examples; expected a tensor with one score for each, "
                f"({len(pool)},), not negative"
            )
        scores = given.detach().cpu().double()
        if not bool(scores.isfinite().all()):
            bad = int((~scores.isfinite()).nonzero()[0])
            raise NonFiniteError(f"score gave {float(scores[bad]):g} for example {int(pool[bad])} of the data set")
        return scores

    def _shares(self, scores: Tensor) -> Tensor:
        """Probabilities by scores, mixed with even ones."""
        total, n = float(scores.sum()), len(scores)
        return (1 - self.mix) * (scores / total if total else 1 / n) + scores.new_full((n,), self.mix / n)
