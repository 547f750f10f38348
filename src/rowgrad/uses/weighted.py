"""What samplers by norm share: the shuffle while they are off, the switch, the draws under way, their state.

Note [what is not yet done is drawn already]: workers are ahead of the loop, and weights belong to the draw (Note
[weights at the draw]). So a state holds the draws that no `update` has come for. A sampler that goes on from it gives
these first and draws the next ones from the same table as without the stop.

Note [one shuffle for all processes]: the shuffle of an epoch comes from a seed drawn at the start and the number of the
epoch, never from the generator: draws by norms move that on, in each process as often as it was switched on.
"""

import math
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from rowgrad.errors import InputError, RowgradWarning
from rowgrad.uses import expected
from rowgrad.uses.draws import Draw, DrawnIndex
from rowgrad.uses.expected import Expected, described
from rowgrad.uses.gain import Gain, GainMeter
from rowgrad.uses.processes import place

OPTIONS = {
    "n": expected.whole(1, what="the number of examples, len(dataset)"),
    "mix": expected.number(
        "a share in (0, 1]; without uniform draws an example may never return", lambda v: 0 < v <= 1
    ),
    "max_weight": Expected(
        "a positive number, or None for no cap", lambda v: v is None or (expected.is_number(v) and v > 0)
    ),
    "switch": Expected(
        "two numbers (on, off) with on at least off, or None for always on",
        lambda v: (
            v is None
            or (isinstance(v, (tuple, list)) and len(v) == 2 and all(map(expected.is_number, v)) and v[0] >= v[1])
        ),
    ),
    "window": expected.whole(GainMeter.LEAST),
    "num_replicas": expected.whole(1),
    "generator": expected.GENERATOR,
}


class WeightedSampler(Sampler[Any]):
    """Draws of an epoch in blocks: in the order of a shuffle with weights 1, or, when switched on, by norms."""

    def __init__(
        self,
        n: int,
        *,
        mix: float,
        max_weight: float | None,
        switch: tuple[float, float] | None,
        window: int,
        rank: int | None,
        num_replicas: int | None,
        draws: int | None,
        generator: torch.Generator | None,
    ) -> None:
        self._asks_for_place = rank is None and num_replicas is None
        rank, num_replicas = place(rank, num_replicas)
        given = {"n": n, "mix": mix, "max_weight": max_weight, "switch": switch, "window": window}
        self._check(given | {"num_replicas": num_replicas, "generator": generator}, OPTIONS)
        most = -(-n // num_replicas)
        draws = most if draws is None else draws
        limits = {"rank": expected.whole(0, num_replicas - 1), "draws": expected.whole(1, most)}
        self._check({"rank": rank, "draws": draws}, limits)
        self.n, self.window, self.draws, self.mix = int(n), int(window), int(draws), float(mix)
        self.max_weight = None if max_weight is None else float(max_weight)
        self.switch = None if switch is None else (float(switch[0]), float(switch[1]))
        self.rank, self.num_replicas = int(rank), int(num_replicas)
        self._generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self._meter = GainMeter(self.window)
        self._wanted = switch is None
        self._epoch, self._drawn, self._done, self._resumes = 0, 0, 0, False
        # Drawn, from number `_first` on, and no update came yet: positions, weights, whether by norms; (3, block).
        self._waiting: deque[Tensor] = deque()
        self._first = 0
        self._seed = int(torch.randint(2**62, (), generator=self._generator))
        self._shuffle_at = 0
        self._shuffle: Tensor | None = None

    def _check(self, given: Mapping[str, Any], rules: Mapping[str, Expected]) -> None:
        expected.check(type(self).__name__, given, rules)

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
        the first that no update has come for. The epoch is over after the update of the last of its `draws`. The
        options are in it for comparison. With several processes each saves and loads its own.
        """
        waiting = torch.cat([torch.zeros(3, 0, dtype=torch.float64), *self._waiting], 1)
        return self._options() | {
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
        """Go on from a state; the next `iter` continues its epoch, or begins one where that is over.

        Raises:
            InputError: the state is of another kind of sampler or of one with other options, lacks an entry, or holds
                one that it cannot have; nothing was loaded.
        """
        kind = type(self).__name__
        found = expected.checked_state(kind, state, self._expected())
        n_waiting = found["waiting"].shape[1]
        if found["done"] + n_waiting > self.draws:
            raise InputError(
                f"{kind}: the state's waiting holds {n_waiting} draws, with {found['done']} done already; expected no "
                f"more than the {self.draws} of an epoch"
            )
        self._load(found)

    def _options(self) -> dict[str, Any]:
        """What the draws depend on beside what was drawn; a state fits a sampler with the same."""
        return {
            "kind": type(self).__name__,
            "n": self.n,
            "mix": self.mix,
            "max_weight": self.max_weight,
            "switch": self.switch,
            "window": self.window,
            "rank": self.rank,
            "num_replicas": self.num_replicas,
            "draws": self.draws,
        }

    def _expected(self) -> dict[str, Expected]:
        """What a state may hold."""
        return {name: expected.same(value) for name, value in self._options().items()} | {
            "meter": Expected(f"second moments of at most {self.window} batches", self._fits),
            "wanted": expected.FLAG,
            "epoch": expected.whole(0, 2**62),
            "done": expected.whole(0, self.draws),
            "waiting": Expected(
                "a tensor of float64: positions in the data set, weights, and 1 for draws by norms",
                lambda v: (
                    expected.is_tensor(v, torch.float64, 3, -1)
                    and bool(((v[0] >= 0) & (v[0] < self.n) & (v[0] == v[0].floor())).all())
                    and bool(((v[1] > 0) & v[1].isfinite() & ((v[2] == 0) | (v[2] == 1))).all())
                ),
            ),
            "seed": expected.whole(0, 2**62 - 1),
            "shuffle_at": expected.whole(0, self.draws),
            "generator": Expected("the state of a torch.Generator of the CPU", _is_generator_state),
        }

    def _fits(self, meter: Any) -> bool:
        return (
            expected.is_tensor(meter, torch.float64, -1, 4)
            and len(meter) <= self.window
            and bool((meter[:, :2] >= 0).all() and meter[:, :2].isfinite().all())
            and not bool(meter.isinf().any())
        )

    def _load(self, state: dict[str, Any]) -> None:
        """Take over a state that was checked and copied."""
        self._meter.sums = state["meter"]
        self._wanted, self._epoch = state["wanted"], state["epoch"]
        self._done = self._first = state["done"]
        waiting = state["waiting"]
        self._drawn = self._done + waiting.shape[1]
        self._waiting = deque([waiting] if waiting.numel() else [])
        self._seed, self._shuffle_at, self._shuffle = state["seed"], state["shuffle_at"], None
        self._generator.set_state(state["generator"])
        self._resumes = self._epoch > 0 and self._done < self.draws

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
            if number >= self.draws:
                return
            blocks = [self._next_block(min(block, self.draws - number))]

    def _begin(self) -> None:
        if self._asks_for_place and place(None, None) != (self.rank, self.num_replicas):
            warnings.warn(
                f"{type(self).__name__}: made before torch.distributed was initialized, it draws for one process, and "
                "all processes get the same batches; make it afterwards, or give rank= and num_replicas=",
                RowgradWarning,
                stacklevel=2,
            )
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
        """Numbers from [0, 1), of which each process takes its own."""
        together = torch.rand((*shape, self.num_replicas), dtype=torch.float64, generator=self._generator)
        return together[..., self.rank]

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
        self, draw: Draw, would: Tensor, norms: Tensor, grad_norm: float | None, per_pool: float = 0.0
    ) -> None:
        """A batch, weights that norms would give, norms; see `GainMeter.add`. Left out if not finite."""
        if not len(norms) or not bool(norms.isfinite().all()) or not math.isfinite(grad_norm or 0.0):
            return
        weights, by_norms = expected.vector("draw.weight", draw.weight), bool(torch.as_tensor(draw.by_norms).any())
        self._meter.add(weights, would, norms, grad_norm, per_pool=per_pool, out_of_pool=by_norms)
        if self.switch is not None:
            gain, (on, off) = self.gain, self.switch
            self._wanted = gain.ratio >= off if self._wanted else gain.ratio - 2 * gain.error > on

    def _checked(
        self, draw: Any, norms: Any, grad_norm: Any, *, or_positions: bool = False
    ) -> tuple[Tensor, Tensor, float | None]:
        """Positions and norms on the CPU, and the norm of the gradient."""
        index = draw.index if isinstance(draw, Draw) else draw if or_positions else None
        if not isinstance(index, Tensor) or not expected.is_integers(index):
            raise InputError(
                f"{type(self).__name__}.update was given {described(index if isinstance(draw, Draw) else draw)}; "
                "expected the draw that comes with each batch of rg.Weighted, a rowgrad.uses.draws.Draw"
                + (", or a tensor of positions, whole numbers of shape (B,)" if or_positions else "")
            )
        index, norms = index.detach().to("cpu", torch.int64), expected.vector("norms", norms)
        if index.shape != norms.shape:
            raise InputError(
                f"update was given positions of shape {tuple(index.shape)} and norms of shape {tuple(norms.shape)}; "
                "expected one of each for an example, (B,)"
            )
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.n:
            raise InputError(
                f"positions run from {index.min()} to {index.max()}; the sampler has examples 0 to {self.n - 1}"
            )
        return index, norms, None if grad_norm is None else expected.length("grad_norm", grad_norm)


def _is_generator_state(value: Any) -> bool:
    if not expected.is_tensor(value, torch.uint8, -1):
        return False
    try:
        torch.Generator().set_state(value.cpu())
    except RuntimeError:
        return False
    return True
