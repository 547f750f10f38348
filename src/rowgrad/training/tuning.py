"""Hyperparameters by search: short runs, the best of them trained to completion and averaged, one look at the test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowgrad.data.table import Table
from rowgrad.errors import DivergedError, InputError
from rowgrad.files import whole
from rowgrad.training.fit import Fitted, fit
from rowgrad.training.loop import seed_of
from rowgrad.training.problem import score, split
from rowgrad.training.recipe import Recipe
from rowgrad.training.saved import Ensemble, Predictor, load_model, predictor_of, save_ensemble, save_model
from rowgrad.training.search import Data, Plan, Search, Trial, opened, ranked, shown
from rowgrad.training.space import Space, default_space, fixed_by, recipe_at

CONFIG, STUDY, RESULT, MODEL, WINNER = (
    "config.json",
    "study.db",
    "result.json",
    "model.safetensors",
    "winner.safetensors",
)
TEST = 6  # use of the seed, beside those of `Loop`, `fit` and `Search`
LEAST_PROBABILITY = 1e-38  # so that one certain mistake does not make a mean infinite
CHECKED = 5_000  # points of a grid whose options are tried together before the first run


@dataclass(frozen=True)
class Scores:
    """Mean loss (nats, or half the squared error in the training targets' deviations), and accuracy or R^2."""

    loss: float
    score: float


@dataclass(frozen=True)
class Compared:
    """The ensemble and the single winner on the same examples."""

    ensemble: Scores
    winner: Scores

    @property
    def is_better(self) -> bool:
        """Whether the ensemble's loss is lower."""
        return self.ensemble.loss < self.winner.loss


@dataclass(frozen=True)
class Winner:
    """One of the best runs, trained to completion.

    Attributes:
        number: of the run in the search.
        recipe: with its hyperparameters and its seed.
        validation: on the part held out, with the weights of its best epoch.
        best_epoch, n_epochs, stopped: the course of its training.
    """

    number: int
    recipe: Recipe
    validation: Scores
    best_epoch: int
    n_epochs: int
    stopped: str


@dataclass(frozen=True)
class Tuned:
    """What a search came to.

    Attributes:
        space, plan, recipe: as searched.
        trials: all short runs, in order.
        winners: those trained to completion, the lowest validation loss first; the first is the single winner.
        warnings: hyperparameters of the best run that lie on the border of the space, and which way to widen it.
        notes: how many runs each round had, and winners that were dropped.
        validation: on the part held out, by which runs, epochs and winners were chosen.
        test: on examples that nothing was chosen by; None without any.
        model: the winners' mean.
        split: positions in the data of "train", "val" and "test".
        was_finished: whether all this was read from the files of a finished search.
    """

    space: Space
    plan: Plan
    recipe: Recipe
    trials: tuple[Trial, ...]
    winners: tuple[Winner, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    validation: Compared
    test: Compared | None
    model: Ensemble
    split: Mapping[str, Sequence[int]]
    was_finished: bool = False

    @property
    def best(self) -> Trial:
        """The completed short run with the lowest validation loss."""
        return ranked(self.trials)[0]


def tune(
    table: Table,
    space: Space | Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    plan: Plan | None = None,
    *,
    directory: Path | None = None,
    resume: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tuned:
    """Search hyperparameters, train the best to completion, and average them.

    The examples are split in three by the seed: runs are trained on one part and compared on a second; the third, the
    test, is split off first and looked at once, at the end. The same table and options give the same result, also if
    the search is killed anywhere and resumed.

    Args:
        table: what to learn.
        space: what to try, see `Space.of`; None takes layers, units, rate and L2.
        recipe: all that is not searched; its epochs are those of the winners, its val the share of the examples left
            after the test.
        plan: how to search.
        directory: where the study, the winners' checkpoints and the result are kept; None keeps nothing.
        resume: go on with what `directory` holds; a finished search is read, not done again.
        progress: called with the work done and all there is, in epochs.
    Returns:
        What was tried, what won, and the ensemble.
    Raises:
        InputError: options that do not fit each other or the data, a directory with a search of others, or a search in
            which no run was completed.
    Source: Aggarwal 2018, section 3.3.1.

    >>> from rowgrad.data.readers import read_table
    >>> found = tune(
    ...     read_table("iris"),
    ...     {"lr": {"exponent": [-3, -1]}, "units": {"values": [8, 16]}},
    ...     Recipe(model="mlp:8", epochs=5),
    ...     Plan(trials=2, trial_epochs=2, winners=1, keep=1),
    ... )
    >>> len(found.trials), sorted(found.best.point), len(found.split["test"])
    (2, ['lr', 'units'], 30)
    """
    recipe, plan = recipe or Recipe(), plan or Plan()
    space = _space(space, recipe)
    parts = _split(table, recipe, plan)
    table = table.with_medians_of(parts["train"])
    config = _config(table, space, recipe, plan, parts)
    if directory is not None:
        _begin(directory, config, resume)
    rest = torch.cat([parts["train"], parts["val"]]).sort().values
    within = {int(k): place for place, k in enumerate(rest)}
    train, val = (torch.tensor([within[int(k)] for k in parts[name]]) for name in ("train", "val"))
    work = _Work(table, Data(table.take(rest), train, val), parts, space, recipe, plan, directory, progress)
    with _emptied(directory, resume), opened(None if directory is None else directory / STUDY, plan) as study:
        search = Search(space, plan, recipe, work.data, study, work.searched)
        if directory is not None and (directory / RESULT).exists():
            if not ranked(search.trials()):
                raise InputError(f"{directory / STUDY}: no run is in it, yet there is a {RESULT}; name another --out")
            return work.recorded(search.trials(), directory)
        search.run()
        return work.finish(search)


def _space(space: Space | Mapping[str, Any] | None, recipe: Recipe) -> Space:
    if recipe.kind == "autoencoder":
        raise InputError(f"--model {recipe.model} learns its inputs, not a target to be tested on; use rowgrad train")
    if space is None:
        return default_space(recipe)
    found = space if isinstance(space, Space) else Space.of(space)
    fixed = fixed_by(recipe)
    both = [name for name in found.names if name in fixed]
    if both:
        option = both[0].replace("_", "-")
        raise InputError(f"--{option} {getattr(recipe, both[0])} fixes what the space tries; take {both[0]} from one")
    for number in range(min(found.size, CHECKED)):
        point = found.point(number)
        try:
            at = recipe_at(recipe, point)
        except InputError as error:
            raise InputError(f"the space has the point {shown(point)}, which does not fit together: {error}") from error
        if at.kind == "autoencoder":
            raise InputError(f"--model {at.model} learns its inputs, not a target to be tested on; use rowgrad train")
    return found


def _split(table: Table, recipe: Recipe, plan: Plan) -> dict[str, Tensor]:
    """Positions of the three parts in the data, each ascending."""
    generator = torch.Generator().manual_seed(seed_of(recipe.seed, TEST))
    order = torch.randperm(len(table), generator=generator)
    n_test = round(plan.test * len(table))
    test, rest = order[:n_test].sort().values, order[n_test:].sort().values
    if plan.test and not n_test:
        raise InputError(f"{table.name}: --test {plan.test:g} of {len(table)} examples is none; give a larger share")
    if len(rest) < 2:
        raise InputError(f"{table.name}: {len(rest)} of {len(table)} examples are left after the test; lower --test")
    train, val = split(table.take(rest), recipe)
    if not len(val):
        raise InputError(
            f"--val {recipe.val:g}: a search compares runs on examples held out, and {table.name} has none; raise --val"
        )
    return {"train": rest[train], "val": rest[val], "test": test}


# What a directory holds


def _config(table: Table, space: Space, recipe: Recipe, plan: Plan, parts: Mapping[str, Tensor]) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=8)
    for values in (table.features, table.targets):
        digest.update(values.contiguous().numpy().tobytes())
    return {
        "data": {"name": table.name, "target": table.target_name, "examples": len(table), "digest": digest.hexdigest()},
        "space": space.to_dict(),
        "recipe": recipe.to_dict(),
        "plan": asdict(plan),
        "split": {name: part.tolist() for name, part in parts.items()},
    }


def _begin(directory: Path, config: dict[str, Any], resume: bool) -> None:
    path = directory / CONFIG
    if not resume:
        if path.exists():
            raise InputError(f"--out {directory}: holds a search; go on with --resume, or name another directory")
        _make(directory)
        _write_json(path, config)
        return
    if not path.exists():
        raise InputError(f"--resume: there is no {CONFIG} of a search in {directory}; start without it")
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not the configuration of a search ({error}); name another --out") from error
    if not isinstance(before, dict):
        raise InputError(f"{path}: not the configuration of a search; name another --out")
    changed = list(_changes(before, config))
    if changed:
        raise InputError(
            f"{path} is of another search: {', '.join(changed)}. Resume with the data and the options of the first "
            "run, or choose another --out"
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, as `--lr 0.1 instead of 0.01`."""
    found = []
    for part in ("data", "space", "recipe", "plan"):
        old, new = before.get(part, {}), json.loads(json.dumps(now[part]))
        head = "--" if part in ("recipe", "plan") else f"{part}: "
        for name in dict.fromkeys([*old, *new]):
            if old.get(name) != new.get(name):
                said = name.replace("_", "-") if head == "--" else name
                found.append(f"{head}{said} {new.get(name)} instead of {old.get(name)}")
    return found


@contextmanager
def _emptied(directory: Path | None, resume: bool) -> Iterator[None]:
    """A new search that comes to nothing, as its options fit no run, leaves nothing."""
    try:
        yield
    except InputError:
        if directory is not None and not resume:
            for name in (CONFIG, STUDY):
                (directory / name).unlink(missing_ok=True)
            if not any(directory.iterdir()):
                directory.rmdir()
        raise


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {directory}: cannot be written ({error.strerror}); name another directory") from error


def _write_json(path: Path, value: Any) -> None:
    with whole(path) as stage:
        stage.write_text(json.dumps(value, indent=2), encoding="utf-8")


# Winners


@dataclass
class _Work:
    """A search's data and options, and what comes after the short runs."""

    table: Table
    data: Data
    parts: Mapping[str, Tensor]
    space: Space
    recipe: Recipe
    plan: Plan
    directory: Path | None
    progress: Callable[[int, int], None]
    done: int = 0
    total: int = 0

    def searched(self, done: int, total: int) -> None:
        """Progress of the short runs; a killed one takes nothing back."""
        self.done, self.total = max(self.done, done), total
        self.progress(self.done, self.total + self.plan.winners * self.recipe.epochs)

    def finish(self, search: Search) -> Tuned:
        """Train the winners, compare, test, and keep it all."""
        trials, best = search.trials(), ranked(search.trials())
        fitted, notes = self._complete(best)
        found = [(trial, one, predictor_of(one, self.data.table)) for trial, one in fitted]
        held_out, tested = (self.table.take(self.parts[name]) for name in ("val", "test"))
        winners = sorted(
            ((_winner(trial, one, judged(by, held_out)), one, by) for trial, one, by in found),
            key=lambda w: (w[0].validation.loss, w[0].number),
        )
        model, single = Ensemble(tuple(by for _, _, by in winners)), winners[0]
        validation = Compared(judged(model, held_out), single[0].validation)
        test = Compared(judged(model, tested), judged(single[2], tested)) if len(tested) else None
        tuned = self._tuned(
            trials,
            tuple(w for w, _, _ in winners),
            (*search.notes, *notes),
            validation,
            test,
            model,
        )
        if self.directory is not None:
            save_ensemble([one for _, one, _ in winners], self.data.table, self.directory / MODEL)
            save_model(single[1], self.data.table, self.directory / WINNER)
            _write_json(self.directory / RESULT, _record(tuned))
        return tuned

    def _complete(self, best: Sequence[Trial]) -> tuple[list[tuple[Trial, Fitted]], list[str]]:
        """The best, trained with all epochs; one that diverges is replaced by the next."""
        found, notes = [], []
        for trial in best:
            if len(found) == self.plan.winners:
                break
            folder = None if self.directory is None else self.directory / "winners" / f"trial-{trial.number:03d}"
            if folder is not None:
                _make(folder)
            recipe = self._recipe(trial)
            try:
                one = fit(
                    self.data.table,
                    recipe,
                    directory=folder,
                    resume=True,
                    progress=self._completing(len(found)),
                    parts=(self.data.train, self.data.val),
                )
            except DivergedError as error:
                notes.append(f"Run {trial.number} was among the best, but: {error}")
                continue
            found.append((trial, one))
        if not found:
            raise InputError(f"none of the {len(best)} completed runs could be trained further: {notes[0]}")
        if len(found) < self.plan.winners:
            notes.append(f"{len(found)} winners instead of {self.plan.winners}: no more runs were completed.")
        return found, notes

    def _completing(self, n: int) -> Callable[[int, int], None]:
        epochs = self.recipe.epochs
        total = self.total + self.plan.winners * epochs
        return lambda done, most: self.progress(self.total + n * epochs + done * epochs // most, total)

    def _recipe(self, trial: Trial) -> Recipe:
        return replace(recipe_at(self.recipe, trial.point), seed=trial.seed)

    def _tuned(
        self,
        trials: Sequence[Trial],
        winners: tuple[Winner, ...],
        notes: tuple[str, ...],
        validation: Compared,
        test: Compared | None,
        model: Ensemble,
        was_finished: bool = False,
    ) -> Tuned:
        return Tuned(
            self.space,
            self.plan,
            self.recipe,
            tuple(trials),
            winners,
            tuple(self.space.borders(ranked(trials)[0].point)),
            notes,
            validation,
            test,
            model,
            {name: part.tolist() for name, part in self.parts.items()},
            was_finished,
        )

    def recorded(self, trials: Sequence[Trial], directory: Path) -> Tuned:
        """A finished search, from its files."""
        record = json.loads((directory / RESULT).read_text(encoding="utf-8"))
        winners = tuple(
            Winner(**(w | {"recipe": Recipe(**w["recipe"]), "validation": Scores(**w["validation"])}))
            for w in record["winners"]
        )
        model = load_model(directory / MODEL)
        if not isinstance(model, Ensemble):
            raise InputError(f"{directory / MODEL}: not the ensemble of a search; name another --out and search anew")
        validation, test = (_compared(record[name]) for name in ("validation", "test"))
        assert validation is not None  # it is always written
        return self._tuned(trials, winners, tuple(record["notes"]), validation, test, model, True)


def _winner(trial: Trial, one: Fitted, validation: Scores) -> Winner:
    return Winner(trial.number, one.recipe, validation, one.best, len(one.epochs), one.stopped)


def judged(by: Predictor | Ensemble, table: Table) -> Scores:
    """Loss and score of predictions for a table with known targets."""
    outputs = by.of_table(table)
    if by.classes is not None:
        given = outputs.gather(1, table.targets[:, None]).double().clamp_min(LEAST_PROBABILITY)
        return Scores(float(-given.log().mean()), score(outputs, table.targets, True))
    member = by if isinstance(by, Predictor) else by.members[0]
    errors = (outputs - table.targets) / member.scale
    return Scores(float(0.5 * errors.square().mean()), score(outputs, table.targets, False))


def _record(tuned: Tuned) -> dict[str, Any]:
    return {
        "best": {"number": tuned.best.number, "point": dict(tuned.best.point), "loss": tuned.best.loss},
        "winners": [asdict(w) for w in tuned.winners],
        "validation": asdict(tuned.validation),
        "test": None if tuned.test is None else asdict(tuned.test),
        "warnings": tuned.warnings,
        "notes": tuned.notes,
    }


def _compared(record: Mapping[str, Any] | None) -> Compared | None:
    return None if record is None else Compared(Scores(**record["ensemble"]), Scores(**record["winner"]))
