"""Draw the examples that pull hardest more often, and weigh them so that the mean gradient stays what it was.

Note [weights at the draw]: the weight of a draw belongs to the probability at which it was drawn. Workers fetch batches
ahead, and the table has changed by the time a batch arrives; a weight computed then would be biased. So each position
carries its weight, from the sampler through the data set and the workers into the batch.

Note [what is not yet done is drawn already]: for the same reason a state holds the draws that no `update` has come for.
A sampler that goes on from it gives these first and draws the next ones from the same table as without the stop.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from rowgrad.errors import InputError
from rowgrad.uses.gain import Gain, GainMeter
from rowgrad.uses.sumtree import SumTree

BLOCK = 32  # positions drawn at once
UNSEEN, STALE, FRESH = 0, 1, 2


class DrawnIndex(int):
    """A position in the data set that carries the weight of its draw and the number of it in the epoch."""

    weight: float
    number: int

    def __new__(cls, index: int, weight: float = 1.0, number: int = -1) -> "DrawnIndex":
        drawn = super().__new__(cls, index)
        drawn.weight, drawn.number = weight, number
        return drawn


class Draw(NamedTuple):
    """The draws of a batch: positions in the data set, weights (float32) and numbers in the epoch, each (B,)."""

    index: Any
    weight: Any
    number: Any


class Weighted(Dataset):
    """A data set whose items are pairs (item, draw); batches become (batch, draw), and `draw.weight` has shape (B,).

    Items may be anything, also dicts. A `collate_fn` of yours goes here instead of into the DataLoader:
    `DataLoader(data, sampler=sampler, collate_fn=data.collate)`.

    Args:
        dataset: with positions 0 to N - 1; its `__getitems__` is used where there is one.
        collate_fn: makes a batch of a list of items; PyTorch's default without it.

    >>> import torch, rowgrad
    >>> data = rowgrad.Weighted(torch.utils.data.TensorDataset(torch.arange(6.0)))
    >>> sampler = rowgrad.NormSampler(len(data))
    >>> (x,), draw = next(iter(torch.utils.data.DataLoader(data, batch_size=3, sampler=sampler)))
    >>> bool((x == draw.index).all()), draw.weight
    (True, tensor([1., 1., 1.]))
    """

    def __init__(self, dataset: Any, collate_fn: Any = None) -> None:
        self.dataset, self._collate_fn = dataset, collate_fn

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Draw]:
        return self.dataset[int(index)], _draw(index)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Draw]]:
        plain = [int(index) for index in indices]
        together = getattr(self.dataset, "__getitems__", None)
        items = [self.dataset[index] for index in plain] if together is None else together(plain)
        return list(zip(items, map(_draw, indices), strict=True))

    def collate(self, items: Sequence[tuple[Any, Draw]]) -> tuple[Any, Draw]:
        """A batch (batch, draw) of a list of items, the first part of it by `collate_fn`."""
        collate = self._collate_fn or torch.utils.data.default_collate
        return collate([item for item, _ in items]), torch.utils.data.default_collate([draw for _, draw in items])


def _draw(index: int) -> Draw:
    weight, number = getattr(index, "weight", 1.0), getattr(index, "number", -1)
    return Draw(int(index), torch.tensor(weight, dtype=torch.float32), number)


class NormSampler(Sampler[int]):
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

    With several processes give all the same seed, and each its rank: they share one shuffle, and draw different numbers
    of one stream. Each has a table of its own; gathered positions and norms may be given to `update` as well. Switch
    off what wraps samplers by itself (`use_distributed_sampler=False` in Lightning).

    Args:
        n: how many examples the data set has; may exceed the 2^24 of torch.multinomial. Takes 5 bytes an example.
        mix: share of uniform draws, in (0, 1]; no weight exceeds 1 / mix. The default bounds the harm of stale norms.
        decay: what is left of an example's distance from the mean norm after an epoch in which it was not seen.
        max_weight: cap on the weights. From 1 / mix on it does nothing; below, it *biases* the gradient, towards the
            examples of large norms, and makes `gain` approximate. Not capped by default.
        switch: (on, off): on once the gain less two errors exceeds the first, off once the gain is below the second;
            None for always on, from the first table on.
        window: how many batches the gain is measured over.
        rank, num_replicas: of the process, with several.
        generator: where the draws come from; one of its own with a fixed seed by default. No other is touched.
    Raises:
        InputError: an argument is out of range.
    Source: Goodfellow 2015, section 1; Zhao and Zhang 2014 (arXiv:1401.2753), section 4; Alain et al. 2015
    (arXiv:1511.06481), section 3.

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
        rank: int = 0,
        num_replicas: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        _check(n, mix, decay, max_weight, switch, window, rank, num_replicas)
        self.n, self.mix, self.decay, self.max_weight = n, mix, decay, max_weight
        self.switch, self.rank, self.num_replicas = switch, rank, num_replicas
        self._generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self._table = torch.zeros(n)
        self._seen = torch.zeros(n, dtype=torch.uint8)
        self._n_seen = 0
        self._tree: SumTree | None = None
        self._meter = GainMeter(window)
        self._wanted = switch is None
        self._epoch, self._drawn, self._done, self._resumes = 0, 0, 0, False
        self._waiting: deque[tuple[Tensor, Tensor]] = deque()  # drawn, from number `_first` on; no update came yet
        self._first = 0
        self._shuffle_seed, self._shuffle_at = 0, 0
        self._shuffle: Tensor | None = None

    def __len__(self) -> int:
        """Draws in an epoch of one process."""
        return -(-self.n // self.num_replicas)

    @property
    def active(self) -> bool:
        """Whether examples are drawn by their norms now."""
        return self._wanted and self._tree is not None and self._tree.total > 0

    @property
    def gain(self) -> Gain:
        """What drawing by the table's norms does to the variance of the gradient, measured over the last batches.

        Returns:
            (ratio, error): the variance with uniform draws divided by that with draws by norms, and the standard error
            (jackknife). Without `grad_norm` in the updates it is the ratio of the second moments: nearer to 1 than the
            ratio of variances, which subtract the squared norm of the mean gradient from both.
        """
        return self._meter.estimate()

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
            InputError: the shapes do not agree, or a position is out of range.
        """
        drawn = isinstance(draw, tuple)
        index = (draw[0] if drawn else draw).detach().to("cpu", torch.int64)
        norms = norms.detach().to("cpu", torch.float64)
        self._check_update(index, norms)
        finite = norms.isfinite()
        if drawn and len(index):
            self._finish(int(draw[2].max()) + 1)
            if bool(finite.all()):
                self._measure(index, draw[1].detach().to("cpu", torch.float64), norms, grad_norm)
        self._enter(index[finite], norms[finite])

    def __iter__(self) -> Iterator[int]:
        if self._resumes:
            self._resumes = False
        else:
            self._begin()
        return self._numbers(self._epoch)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next draws depend on: tensors and plain values, which `weights_only=True` loads.

        Taken after the `update` of a batch, in the middle of an epoch, also with workers: draws are given again from
        the first that no update has come for. With `drop_last=True` the rest of an epoch may be less than a batch.
        """
        waiting = [torch.stack([i.double(), w]) for i, w in self._waiting]
        together = torch.cat([torch.zeros(2, 0, dtype=torch.float64), *waiting], 1)[:, self._done - self._first :]
        return {
            "n": self.n,
            "table": (self._table if self._tree is None else self._tree.weights).clone(),
            "built": self._tree is not None,
            "seen": self._seen.clone(),
            "meter": self._meter.sums.clone(),
            "wanted": self._wanted,
            "epoch": self._epoch,
            "done": self._done,
            "waiting": together,
            "shuffle": [self._shuffle_seed, self._shuffle_at],
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the next `iter` continues its epoch.

        Raises:
            InputError: the state is of a data set of another size.
        """
        if state["n"] != self.n:
            raise InputError(f"the state is of a sampler for {state['n']} examples, this one has {self.n}")
        table = state["table"].clone()
        self._table, self._tree = (table[:0], SumTree(table)) if state["built"] else (table, None)
        self._seen = state["seen"].clone()
        self._n_seen = int(self._seen.count_nonzero())
        self._meter.sums = state["meter"].clone()
        self._wanted, self._epoch = state["wanted"], state["epoch"]
        self._done = self._first = state["done"]
        index, weights = state["waiting"]
        self._drawn = self._done + len(index)
        self._waiting = deque([(index.to(torch.int64), weights.clone())] if len(index) else [])
        self._shuffle_seed, self._shuffle_at = state["shuffle"]
        self._shuffle = None
        self._generator.set_state(state["generator"])
        self._resumes = self._epoch > 0 and self._done < len(self)

    # -- drawing ------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """A new epoch: the table ages, the shuffle is another one."""
        if self._n_seen:
            self._age()
        self._epoch += 1
        self._drawn = self._done = self._first = 0
        self._waiting.clear()
        self._shuffle_seed = int(torch.randint(2**62, (), generator=self._generator))
        self._shuffle_at, self._shuffle = 0, None

    def _age(self) -> None:
        """Norms not seen in the last epoch move towards the mean; those never seen are the mean."""
        table = self._table if self._tree is None else self._tree.weights
        mean = table[self._seen > UNSEEN].double().mean().float()
        table[self._seen == STALE] = torch.lerp(mean, table[self._seen == STALE], self.decay)
        table[self._seen == UNSEEN] = mean
        self._seen.clamp_(max=STALE)
        self._tree, self._table = SumTree(table), table[:0]

    def _numbers(self, epoch: int) -> Iterator[int]:
        number = self._done
        blocks = [*self._waiting]
        while True:
            for index, weights in blocks:
                for i, w in zip(index.tolist(), weights.tolist(), strict=True):
                    yield DrawnIndex(i, w, number)
                    number += 1
                    if epoch != self._epoch:
                        raise InputError("the sampler began another epoch; go over it with one loader at a time")
            if number >= len(self):
                return
            blocks = [self._next_block(min(BLOCK, len(self) - number))]

    def _next_block(self, size: int) -> tuple[Tensor, Tensor]:
        block = self._by_norms(size) if self.active else self._shuffled(size)
        self._waiting.append(block)
        self._drawn += size
        return block

    def _by_norms(self, size: int) -> tuple[Tensor, Tensor]:
        assert self._tree is not None
        shares = torch.rand(3, size * self.num_replicas, dtype=torch.float64, generator=self._generator)
        which, anywhere, by_norm = shares[:, self.rank :: self.num_replicas]
        index = torch.where(which < self.mix, (anywhere * self.n).long(), self._tree.find(by_norm))
        return index, self._weights(index)

    def _weights(self, index: Tensor) -> Tensor:
        weights = 1 / (self.n * self.probabilities(index))
        return weights if self.max_weight is None else weights.clamp(max=self.max_weight)

    def _shuffled(self, size: int) -> tuple[Tensor, Tensor]:
        if self._shuffle is None:
            self._shuffle = torch.randperm(self.n, generator=torch.Generator().manual_seed(self._shuffle_seed))
        at = torch.arange(self._shuffle_at, self._shuffle_at + size) * self.num_replicas + self.rank
        self._shuffle_at += size
        return self._shuffle[at % self.n], torch.ones(size, dtype=torch.float64)

    # -- updates ------------------------------------------------------------------------------------------------------

    def _finish(self, done: int) -> None:
        self._done = max(self._done, min(done, self._drawn))
        while self._waiting and self._first + len(self._waiting[0][0]) <= self._done:
            self._first += len(self._waiting.popleft()[0])

    def _measure(self, index: Tensor, weights: Tensor, norms: Tensor, grad_norm: float | Tensor | None) -> None:
        would = 1 / (self.n * self.probabilities(index))
        self._meter.add(weights, would, norms, None if grad_norm is None else float(grad_norm))
        if self.switch is not None:
            gain, (on, off) = self.gain, self.switch
            self._wanted = gain.ratio >= off if self._wanted else gain.ratio - 2 * gain.error > on

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

    def _check_update(self, index: Tensor, norms: Tensor) -> None:
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


def _check(
    n: int,
    mix: float,
    decay: float,
    max_weight: float | None,
    switch: tuple[float, float] | None,
    window: int,
    rank: int,
    num_replicas: int,
) -> None:
    if isinstance(n, Sized) or n < 1:
        raise InputError(f"n={n!r}: expected the number of examples, len(dataset)")
    if not 0 < mix <= 1:
        raise InputError(f"mix={mix}: expected a share in (0, 1]; without uniform draws an example may never return")
    if not 0 <= decay <= 1:
        raise InputError(f"decay={decay}: expected a share in [0, 1]; 1 keeps norms as last seen")
    if max_weight is not None and not max_weight > 0:
        raise InputError(f"max_weight={max_weight}: expected a positive number, or None for no cap")
    if switch is not None and not switch[0] >= switch[1]:
        raise InputError(f"switch={switch}: expected (on, off) with on at least off, or None for always on")
    if window < GainMeter.LEAST:
        raise InputError(f"window={window}: expected at least {GainMeter.LEAST} batches")
    if not 0 <= rank < num_replicas:
        raise InputError(f"rank={rank} of num_replicas={num_replicas}: expected 0 <= rank < num_replicas")
