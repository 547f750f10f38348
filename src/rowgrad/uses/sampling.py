"""Draw the examples that pull hardest more often, and weigh them so that the mean gradient stays what it was."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rowgrad.uses import expected
from rowgrad.uses.draws import Draw, DrawnIndex
from rowgrad.uses.expected import Expected
from rowgrad.uses.sumtree import SumTree
from rowgrad.uses.weighted import WeightedSampler

BLOCK = 32  # positions drawn at once
UNSEEN, STALE, FRESH = 0, 1, 2
DECAY = expected.number("a share in [0, 1]; 1 keeps norms as last seen", lambda v: 0 <= v <= 1)


class NormSampler(WeightedSampler):
    """Draws examples in proportion to the norms of their gradients, as last seen; a sampler for DataLoader.

    Law: example i is drawn, with replacement, with p_i = (1 - mix) s_i / sum(s) + mix / N and has weight
    w_i = 1 / (N p_i), so that the mean of w_i g_i over a batch is an unbiased estimate of the mean gradient. With
    s_i = ||g_i|| and mix = 0 the second moment of one draw is (sum_i ||g_i|| / N)^2, the least there is, against
    sum_i ||g_i||^2 / N of uniform draws.

    It begins switched off, as an ordinary shuffle with weights 1, and switches itself on once the batches show that
    norms as the table has them are worth it (`gain`), and off again when they are not.

    In the loop (five lines of yours change):

        sampler = rg.NormSampler(len(dataset))
        loader = DataLoader(rg.Weighted(dataset), batch_size=32, sampler=sampler)
        for (x, y), draw in loader:
            losses = F.cross_entropy(model(x), y, reduction="none")
            J = rg.jacobian(losses, model)
            sampler.update(draw, J.norms())
            J.loss(draw.weight / len(losses)).backward()

    Edge cases: an example never seen counts as the mean of the others, one with norm 0 has p_i = mix / N; while all
    norms are 0 draws are uniform. Inf and NaN, as with a scaler that is too high, leave the table as it is.

    With several processes make it after `torch.distributed.init_process_group`, with a generator of the same seed in
    each: they share one shuffle, and draw different numbers of one stream. Each has a table and a gain of its own;
    gathered positions and norms may be given to `update` as well. Switch off what wraps samplers by itself
    (`use_distributed_sampler=False` in Lightning).

    Args:
        n: how many examples the data set has; may exceed the 2^24 of torch.multinomial. Takes 5 bytes an example.
        mix: share of uniform draws, in (0, 1]; no weight exceeds 1 / mix. The default bounds the harm of stale norms.
        decay: what is left of an example's distance from the mean norm after an epoch in which it was not seen.
        max_weight: cap on the weights. From 1 / mix on it does nothing; below, it *biases* the gradient, towards the
            examples of large norms, and makes `gain` approximate. Not capped by default.
        switch: (on, off): on once the gain less two errors exceeds the first, off once the gain is below the second;
            None for always on, from the first table on.
        window: how many batches the gain is measured over.
        rank, num_replicas: of the process, with several; by default as `torch.distributed` has them, if initialized.
        draws: how many make an epoch of one process, at most and by default n / num_replicas, rounded up. A loop that
            leaves out the last, smaller batch (`drop_last=True`) or breaks off after k batches sets it to what it
            uses, so that a state taken there is one of an epoch that is over.
        generator: where the draws come from; one of its own with a fixed seed by default. No other is touched.
    Raises:
        InputError: an argument is out of range, or no number.
    Warns:
        RowgradWarning: at the first draw, if it was made before `torch.distributed` was initialized.
    Source: Goodfellow 2015, section 1; Zhao and Zhang 2014 (arXiv:1401.2753); Alain et al. 2015
    (arXiv:1511.06481).

    >>> import torch, rowgrad
    >>> sampler = rowgrad.NormSampler(4, switch=None)
    >>> sampler.update(torch.arange(4), torch.tensor([0.0, 0.0, 0.0, 9.0]))  # norms from a pass over all examples
    >>> sampler.probabilities()
    tensor([0.0250, 0.0250, 0.0250, 0.9250], dtype=torch.float64)
    """

    def __init__(
        self,
        n: int,
        *,
        mix: float = 0.1,
        decay: float = 0.9,
        max_weight: float | None = None,
        switch: tuple[float, float] | None = (1.2, 1.0),
        window: int = 64,
        rank: int | None = None,
        num_replicas: int | None = None,
        draws: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
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
        self._check({"decay": decay}, {"decay": DECAY})
        self.decay = float(decay)
        self._table = torch.zeros(self.n)
        self._seen = torch.zeros(self.n, dtype=torch.uint8)
        self._n_seen = 0
        self._tree: SumTree | None = None

    def __len__(self) -> int:
        """Draws in an epoch of one process."""
        return self.draws

    def __iter__(self) -> Iterator[DrawnIndex]:
        return self._draws(BLOCK)

    @property
    def active(self) -> bool:
        """Whether examples are drawn by their norms now; never before there is a table."""
        return self._wanted and self._tree is not None and self._tree.total > 0

    def probabilities(self, index: Tensor | None = None) -> Tensor:
        """With what probability the next draw is each example of `index`, or of all N; float64.

        While the sampler is switched off, what it would be when switched on.
        """
        if self._tree is None or (total := self._tree.total) == 0:
            return torch.full((self.n if index is None else len(index),), 1 / self.n, dtype=torch.float64)
        norms = self._tree.weights if index is None else self._tree.weights[index]
        return norms.double() * ((1 - self.mix) / total) + self.mix / self.n

    def update(self, draw: Draw | Tensor, norms: Tensor, *, grad_norm: float | Tensor | None = None) -> None:
        """Take in the norms of the examples of a batch.

        Args:
            draw: what came with the batch; measures the gain, too. A tensor of positions, (B,), enters norms into the
                table alone: those of a pass over the data set, or of other processes.
            norms: of their gradients (B,), not weighted; any dtype and device.
            grad_norm: norm of the batch's weighted mean gradient, for the exact ratio of variances.
        Raises:
            InputError: the shapes do not agree, a position is out of range or no whole number, or a norm is negative.
        """
        index, norms, mean_norm = self._checked(draw, norms, grad_norm, or_positions=True)
        if isinstance(draw, Draw):
            self._finish(draw)
            self._measure(draw, 1 / (self.n * self.probabilities(index)), norms, mean_norm)
        finite = norms.float().isfinite()  # the table is of float32
        self._enter(index[finite], norms[finite])

    def state_dict(self) -> dict[str, Any]:
        table = self._table if self._tree is None else self._tree.weights
        own = {"table": table.clone(), "built": self._tree is not None, "seen": self._seen.clone()}
        return super().state_dict() | own

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"decay": self.decay}

    def _expected(self) -> dict[str, Expected]:
        return super()._expected() | {
            "table": expected.tensor(torch.float32, self.n, least=0),
            "built": expected.FLAG,
            "seen": expected.tensor(torch.uint8, self.n, least=UNSEEN, most=FRESH),
        }

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        table = state["table"]
        self._table, self._tree = (table[:0], SumTree(table)) if state["built"] else (table, None)
        self._seen = state["seen"]
        self._n_seen = int(self._seen.count_nonzero())

    def _begin(self) -> None:
        if self._n_seen:
            self._age()
        super()._begin()

    def _age(self) -> None:
        """Norms not seen in the last epoch move towards the mean; those never seen are the mean."""
        table = self._table if self._tree is None else self._tree.weights
        mean = table[self._seen > UNSEEN].double().mean().float()
        table[self._seen == STALE] = torch.lerp(mean, table[self._seen == STALE], self.decay)
        table[self._seen == UNSEEN] = mean
        self._seen.clamp_(max=STALE)
        self._tree, self._table = SumTree(table), table[:0]

    def _by_norms(self, size: int) -> tuple[Tensor, Tensor]:
        assert self._tree is not None
        which, anywhere, by_norm = self._uniform(3, size)
        index = torch.where(which < self.mix, (anywhere * self.n).long(), self._tree.find(by_norm))
        return index, self._capped(1 / (self.n * self.probabilities(index)))

    def _enter(self, index: Tensor, norms: Tensor) -> None:
        if bool((index[1:] <= index[:-1]).any()):
            index, order = index.sort(stable=True)
            last = torch.cat([index[1:] != index[:-1], torch.ones(1, dtype=torch.bool)])
            index, norms = index[last], norms[order[last]]  # an example drawn twice keeps its later norm
        self._n_seen += int((self._seen[index] == UNSEEN).sum())
        self._seen[index] = FRESH
        if self._tree is not None:
            self._tree.write(index, norms)
            return
        self._table[index] = norms.float()
        if self._n_seen == self.n:
            self._tree, self._table = SumTree(self._table), self._table[:0]
