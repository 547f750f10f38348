"""Searching a space: short runs of its points, of which the bad are ended early and replaced (Aggarwal 2018, section
3.3.1).

Note [a search that can be killed]
    Every run's point, seed and end stand in an Optuna study, and everything that is drawn is a function of the seed,
    the round and the number of the draw. So a search goes on from its study alone: runs that were not told to have
    ended are marked as failed and drawn again, with the same point and seed, and come to the same numbers.
"""

from __future__ import annotations

import logging
import random
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from math import ceil, inf, isclose, isfinite
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.exc
import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from rowgrad.data.table import Table
from rowgrad.diagnosis.history import Seen
from rowgrad.errors import DivergedError, InputError
from rowgrad.files import whole
from rowgrad.training.fit import Epoch, fit
from rowgrad.training.loop import seed_of
from rowgrad.training.problem import constant_loss, pose
from rowgrad.training.recipe import Recipe
from rowgrad.training.space import Axis, Space, Value, recipe_at

SEARCHES = ("random", "sample", "grid")
DRAWS, RUNS = 4, 5  # uses of the seed, beside those of `Loop` and `fit`
N_TRIALS = 30
PER_TRIAL = 3  # runs that are started at most, for each that is to be completed
LEARNING = 0.9  # of the loss of a constant; a run below it learns, whatever is found in it
COMPARED = 4  # earlier runs before any is ended for its loss
FATAL = ("not finite", "exploding", "vanishing", "dead")  # findings that end a run
STUDY = "rowgrad"


@dataclass(frozen=True)
class Plan:
    """How a space is searched.

    Attributes:
        search: "random" draws between the ends of the space, "sample" from its grid without replacement, "grid" tries
            all of the grid.
        trials: runs to complete in each round; those that are ended early are replaced by new ones, as long as no more
            than three times as many were started. None takes 30, and all of a grid.
        rounds: from coarse to fine; each round after the first searches a space half as wide around the best point.
        trial_epochs: passes over the data in a run.
        winners: how many of the best are trained to completion and make up the ensemble.
        test: share of the examples that are looked at once, at the end.
        keep: share of the runs that go on after the first epochs (see `milestone`): a run is ended there when its best
            validation loss is behind that share of the earlier runs', the ended ones among them. 1 ends none.
        diagnose: whether runs that have not begun to learn are ended in their first half for what `rowgrad.Monitor`
            finds in them: gradients that vanish or explode, dead units.
    """

    search: str = "random"
    trials: int | None = None
    rounds: int = 1
    trial_epochs: int = 10
    winners: int = 3
    test: float = 0.2
    keep: float = 0.5
    diagnose: bool = True

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise InputError(f"--search {self.search}: there are {', '.join(SEARCHES)}")
        if self.search == "grid" and self.trials is not None:
            raise InputError(
                f"--trials {self.trials}: --search grid tries every point of its grid; for some of them, "
                f"--search sample --trials {self.trials}"
            )
        for name in ("trials", "rounds", "trial_epochs", "winners"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: at least 1")
        if not 0 <= self.test < 1:
            raise InputError(f"--test {self.test:g}: a share of at least 0 and below 1")
        if not 0 < self.keep <= 1:
            raise InputError(f"--keep {self.keep:g}: a share above 0 and at most 1")

    @property
    def wanted(self) -> int | None:
        """Runs to complete in a round; None for all there are."""
        return None if self.search == "grid" else self.trials or N_TRIALS

    @property
    def most(self) -> int | None:
        """Runs that are started in a round, at most."""
        return None if self.wanted is None else PER_TRIAL * self.wanted

    @property
    def milestone(self) -> int:
        """Epoch after which runs are compared by their loss, once: at every epoch, few would ever come to the end."""
        return -(-self.trial_epochs // 3)


@dataclass(frozen=True)
class Trial:
    """One short run.

    Attributes:
        number: from 0, in the order in which runs were started.
        state: "completed", "killed" or "abandoned" (when the whole search was killed; then it was drawn again).
        round: from 1.
        point: its hyperparameters.
        seed: of its weights and of the order of its examples.
        curve: validation loss after each epoch.
        loss, score: the best validation loss, and the accuracy or R^2 then; None if not completed.
        why: what it was killed for.
    """

    number: int
    state: str
    round: int
    point: Mapping[str, Value]
    seed: int
    curve: tuple[float, ...]
    loss: float | None
    score: float | None
    why: str


@dataclass(frozen=True)
class Data:
    """What runs are given: examples, and which of them are trained on and which are held out."""

    table: Table
    train: torch.Tensor
    val: torch.Tensor


@dataclass
class Search:
    """A study of a space, and what is needed to go on with it.

    Attributes:
        data: without the test examples.
        recipe: all options that are not searched.
        study: see `new_study`.
        progress: called after each epoch with (epochs that count, epochs of all runs to complete).
    """

    space: Space
    plan: Plan
    recipe: Recipe
    data: Data
    study: optuna.Study
    progress: Callable[[int, int], None] = lambda done, total: None
    notes: list[str] = field(default_factory=list)

    def run(self) -> None:
        """All rounds, from where the study stands.

        Raises:
            InputError: every run of the first round was killed, or a point does not fit the data.
        """
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)
        space = self.space
        for number in range(1, self.plan.rounds + 1):
            if number > 1:
                space = space.narrowed(ranked(t for t in self.trials() if t.round < number)[0].point, self.space)
            self._round(number, space)

    @cached_property
    def constant(self) -> float:
        """What a run that has learned nothing comes to, see `constant_loss`."""
        return constant_loss(pose(self.data.table, self.recipe, (self.data.train, self.data.val)))

    def trials(self) -> list[Trial]:
        """All runs so far, in order."""
        return [_trial(frozen) for frozen in self.study.get_trials(deepcopy=False)]

    def _round(self, number: int, space: Space) -> None:
        tried = [t.point for t in self.trials() if t.round < number and t.state != "abandoned"]
        wanted, most = self.plan.wanted, self.plan.most
        points = points_of(space, self.plan, self.recipe.seed, number, tried)
        for draw, point in enumerate(islice(points, most)):
            ended = self._ended(number)
            if wanted is not None and sum(t.loss is not None for t in ended) >= wanted:
                break
            if draw >= len(ended):
                self._try(number, draw, point, space)
        self._sum_up(number, space)

    def _ended(self, number: int) -> list[Trial]:
        return [t for t in self.trials() if t.round == number and t.state != "abandoned"]

    def _sum_up(self, number: int, space: Space) -> None:
        ended, wanted = self._ended(number), self.plan.wanted
        n = sum(t.loss is not None for t in ended)
        said = f"Round {number}: {len(ended)} runs, {n} completed and {len(ended) - n} killed."
        if wanted is not None and n < wanted:
            limit = f"no more than {self.plan.most} are started" if len(ended) == self.plan.most else (
                f"the grid has {space.size} points")  # fmt: skip
            said += f" {wanted} were to be completed; {limit}."
        self.notes.append(said)
        if not ranked(self.trials()):
            reasons = "; ".join(dict.fromkeys(t.why for t in ended[:3]))
            raise InputError(f"none of {len(ended)} runs was completed. The first were killed for: {reasons}")

    def _try(self, number: int, draw: int, point: Mapping[str, Value], space: Space) -> None:
        """One run, from its draw to its end."""
        self.study.sampler = _Given(point)
        trial = self.study.ask({axis.name: _distribution(axis) for axis in self.space.axes})
        seed = seed_of(self.recipe.seed, RUNS, number, draw)
        for name, value in (("round", number), ("seed", seed)):
            trial.set_user_attr(name, value)
        try:
            recipe = replace(recipe_at(self.recipe, point), epochs=self.plan.trial_epochs, seed=seed)
            watch = _Watch(trial, self.plan, self._progress(), self.constant)
            n = len(self.data.train)
            every = -(-n // recipe.batch_size_for(n)) if self.plan.diagnose else 0
            parts = self.data.train, self.data.val
            fitted = fit(self.data.table, recipe, parts=parts, monitor=every, judge=watch)
        except DivergedError as error:
            return self._kill(trial, str(error))
        except InputError as error:
            return self._kill(trial, f"cannot be made: {error}")
        if watch.why:
            return self._kill(trial, watch.why)
        best = fitted.epochs[fitted.best - 1]
        trial.set_user_attr("score", best.val_score)
        self.study.tell(trial, best.val_loss)
        return None

    def _kill(self, trial: optuna.Trial, why: str) -> None:
        trial.set_user_attr("why", why)
        self.study.tell(trial, state=TrialState.PRUNED)

    def _progress(self) -> Callable[[int], None]:
        """What is told the epochs of the run that goes on."""
        epochs, n = self.plan.trial_epochs, len(ranked(self.trials()))
        per_round = self.plan.wanted or self.space.size
        return lambda epoch: self.progress(n * epochs + epoch, self.plan.rounds * per_round * epochs)


class _Given(BaseSampler):
    """Gives Optuna the point that was drawn."""

    def __init__(self, point: Mapping[str, Value]) -> None:
        self.point = point

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.point[param_name]


@dataclass
class _Watch:
    """Judges a run after every epoch; `why` is what it was ended for."""

    trial: optuna.Trial
    plan: Plan
    progress: Callable[[int], None]
    constant: float
    why: str = ""
    best: float = inf

    def __call__(self, epoch: Epoch, findings: tuple[Seen, ...]) -> str | None:
        assert epoch.val_loss is not None  # a search has examples held out
        self.progress(epoch.number)
        if not isfinite(epoch.val_loss):
            self.why = f"epoch {epoch.number}: the validation loss is {epoch.val_loss:g}"
            return self.why
        self.trial.report(epoch.val_loss, epoch.number)
        self.best = min(self.best, epoch.val_loss)
        if epoch.number == self.plan.trial_epochs:
            return None
        self.why = self._diagnosed(epoch, findings) or self._left_behind(epoch)
        return self.why or None

    def _diagnosed(self, epoch: Epoch, findings: tuple[Seen, ...]) -> str:
        late, loss = epoch.number > max(2, self.plan.trial_epochs // 2), epoch.val_loss
        if late or loss is None or loss < LEARNING * self.constant:
            return ""
        seen = next((s for s in findings if is_fatal(s)), None)
        return "" if seen is None else f"{seen.finding.kind}, {seen.finding.where}: {seen.finding.evidence}"

    def _left_behind(self, epoch: Epoch) -> str:
        if not self.trial.should_prune():
            return ""
        share = f"{self.plan.keep:.0%}"
        return f"epoch {epoch.number}: loss down to {self.best:.4g}, behind the better {share} of earlier runs"


class _Behind(BasePruner):
    """Ends a run whose loss at the milestone is behind a share of all earlier runs there.

    Optuna's own percentiles are those of the completed runs. As only the better ones are completed, the bar would rise
    from run to run until none passes.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        at = self.plan.milestone
        if self.plan.keep == 1 or trial.last_step != at:
            return False
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        earlier = sorted(_best_until(t, at) for t in ended if at in t.intermediate_values)
        if len(earlier) < COMPARED:
            return False
        return _best_until(trial, at) > earlier[max(0, ceil(self.plan.keep * len(earlier)) - 1)]


def _best_until(trial: FrozenTrial, epoch: int) -> float:
    return min(loss for at, loss in trial.intermediate_values.items() if at <= epoch)


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The completed runs, the lowest validation loss first."""
    return sorted((t for t in trials if t.loss is not None), key=lambda t: (t.loss, t.number))


def is_fatal(seen: Seen) -> bool:
    """Whether a finding says that a run will not learn: once if nothing passes, twice if it may mend itself."""
    finding = seen.finding
    if finding.kind not in FATAL or finding.severity == "note":
        return False
    return finding.severity == "error" or seen.times > 1


def points_of(
    space: Space, plan: Plan, seed: int, number: int, tried: Sequence[Mapping[str, Value]] = ()
) -> Iterator[dict[str, Value]]:
    """The points of a round in the order in which they are tried, without those of a grid that were tried before.

    Raises:
        InputError: a grid that cannot be numbered.
    """
    if plan.search == "random":
        draw = 0
        while True:
            yield space.at(iter(random.Random(seed_of(seed, DRAWS, number, draw)).random, None))
            draw += 1
    size = space.size
    if size > 2**62:
        raise InputError(f"a grid of {size:.3g} points: take fewer points of each hyperparameter, or --search random")
    order: Sequence[int] = range(size)
    if plan.most is not None:
        order = random.Random(seed_of(seed, DRAWS, number)).sample(order, min(size, plan.most + len(tried)))
    yield from (point for point in map(space.point, order) if not any(_same(point, t) for t in tried))


def _same(a: Mapping[str, Value], b: Mapping[str, Value]) -> bool:
    """Whether two points are one; a finer grid comes back to the winner by other roundings."""
    return all(
        isclose(a[k], b[k], rel_tol=1e-9)  # pyright: ignore[reportArgumentType]
        if isinstance(a[k], float) and isinstance(b[k], float)
        else a[k] == b[k]
        for k in a
    )


def shown(point: Mapping[str, Value]) -> str:
    """A point in words."""
    return ", ".join(f"{k} {f'{v:.3g}' if isinstance(v, float) else v}" for k, v in point.items())


def _distribution(axis: Axis) -> BaseDistribution:
    """The axis as Optuna and its tools know it."""
    if axis.values:
        return CategoricalDistribution(axis.values)
    low, high = (10.0**axis.low, 10.0**axis.high) if axis.log else (axis.low, axis.high)
    if axis.whole:
        return IntDistribution(round(low), round(high), log=axis.log and low >= 1)
    return FloatDistribution(low, high, log=axis.log)


def _trial(frozen: FrozenTrial) -> Trial:
    states = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "killed"}
    attrs = frozen.user_attrs
    is_done = frozen.state == TrialState.COMPLETE
    return Trial(
        frozen.number,
        states.get(frozen.state, "abandoned"),
        attrs.get("round", 0),
        dict(frozen.params),
        attrs.get("seed", 0),
        tuple(frozen.intermediate_values[k] for k in sorted(frozen.intermediate_values)),
        frozen.value if is_done else None,
        attrs.get("score") if is_done else None,
        attrs.get("why", ""),
    )


# The study


@contextmanager
def opened(path: Path | None, plan: Plan) -> Iterator[optuna.Study]:
    """The study in a file, made first if it is not there; in memory without a path. Optuna's words stay unsaid."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        if path is None:
            yield _study(optuna.storages.InMemoryStorage(), plan)
            return
        if not path.exists():
            with whole(path) as stage, _storage(stage) as storage:
                _study(storage, plan)
        try:
            with _storage(path) as storage:
                yield _study(storage, plan)
        except sqlalchemy.exc.DatabaseError as error:
            raise InputError(f"{path}: not a study, or a damaged one ({error.orig}); name another --out") from error
    finally:
        logger.setLevel(level)


@contextmanager
def _storage(path: Path) -> Iterator[optuna.storages.RDBStorage]:
    """A file of SQLite, closed at the end."""
    kwargs = {"creator": lambda: sqlite3.connect(path, timeout=60)}  # not by its URL: a path may hold a question mark
    storage = optuna.storages.RDBStorage("sqlite:///study.db", engine_kwargs=kwargs)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _study(storage: optuna.storages.BaseStorage, plan: Plan) -> optuna.Study:
    return optuna.create_study(storage=storage, pruner=_Behind(plan), study_name=STUDY, load_if_exists=True)
