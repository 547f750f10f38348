"""`rowgrad tune`: hyperparameters by search, and an ensemble of the best."""

from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer
from rich.console import Console

from rowgrad.cli.options import DATA_HELP, with_options
from rowgrad.cli.output import write_text
from rowgrad.cli.progress import progress_bar
from rowgrad.data.readers import read_table
from rowgrad.files import whole
from rowgrad.report.tuning import comparison, tuning_page
from rowgrad.training.recipe import Recipe
from rowgrad.training.search import Plan, shown
from rowgrad.training.space import Axis, default_space, read_space
from rowgrad.training.tuning import Tuned
from rowgrad.training.tuning import tune as search_for

SPACE_HELP = (
    "TOML file: for each hyperparameter {values = [...]}, {low = 0, high = 0.5, points = 3} or, for 10^-3 to 10^-1, "
    "{exponent = [-3, -1], points = 5}. Default: layers, units, lr and l2."
)


@with_options
def tune(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    space: Annotated[Path | None, typer.Option(help=SPACE_HELP)] = None,
    search: Annotated[
        str, typer.Option(help="random between the ends, sample from the grid, or all of the grid.")
    ] = Plan.search,
    trials: Annotated[
        int | None,
        typer.Option(help="Runs to complete in a round, default 30; killed ones are replaced, to 3 times it."),
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Coarse to fine: each round after the first searches half as wide around the best.")
    ] = Plan.rounds,
    trial_epochs: Annotated[int, typer.Option(help="Passes over the data in a run.")] = Plan.trial_epochs,
    winners: Annotated[
        int, typer.Option(help="How many of the best get all --epochs and are averaged.")
    ] = Plan.winners,
    test: Annotated[float, typer.Option(help="Share of the examples looked at once, at the end.")] = Plan.test,
    keep: Annotated[
        float,
        typer.Option(help="Share of the runs that go on after a third of their epochs; 1: all do."),
    ] = Plan.keep,
    diagnose: Annotated[bool, typer.Option(help="Kill runs whose gradients vanish or explode.")] = Plan.diagnose,
    out: Annotated[Path | None, typer.Option(help="Directory of the results; default rowgrad-tune-NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a search in --out was stopped.")] = False,
    *,
    reading: dict[str, Any],
    recipe: Recipe,
) -> None:
    """Search hyperparameters on DATA, train the best to completion, and average them.

    Writes model.safetensors (the ensemble, for `rowgrad predict`), winner.safetensors (the best of its members),
    trials.parquet, config.json, result.json, report.html, and keeps its runs in study.db: a search that is stopped goes
    on with --resume. Options of `rowgrad train` fix what is not searched.
    """
    plan = Plan(search, trials, rounds, trial_epochs, winners, test, keep, diagnose)
    found_space = default_space(recipe) if space is None else read_space(space)
    table = read_table(data, **reading)
    directory = out or Path(f"rowgrad-tune-{Path(data).stem}")
    if plan.search != "random":
        _say(f"The grid has {found_space.size:,} points: " + " x ".join(_sizes(found_space.axes)) + ".")
    with progress_bar("searching") as progress:
        found = search_for(table, found_space, recipe, plan, directory=directory, resume=resume, progress=progress)
    with whole(directory / "trials.parquet") as stage:
        trials_frame(found).write_parquet(stage)
    write_text("--out", directory / "report.html", tuning_page(found, table.name, ["rowgrad", *context.obj]))
    _summarize(found, directory)


def _sizes(axes: tuple[Axis, ...]) -> list[str]:
    return [f"{len(axis.grid())} of {axis.name}" for axis in axes]


def trials_frame(found: Tuned) -> pl.DataFrame:
    """One row for each run, in order: its number, round, end, hyperparameters, validation loss and score."""
    rows = [
        {"number": t.number, "round": t.round, "state": t.state, "loss": t.loss, "score": t.score, "why": t.why}
        | {"epochs": len(t.curve), "seed": t.seed}
        | {name: t.point.get(name) for name in found.space.names}
        for t in found.trials
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _summarize(found: Tuned, directory: Path) -> None:
    if found.was_finished:
        _say("This search was finished before; its result is shown, and nothing was computed anew.")
    for note in found.notes:
        _say(note)
    best = found.best
    _say(f"Best run: {best.number}, validation loss {best.loss:.4g}: {shown(best.point)}.")
    for warning in found.warnings:
        _say(f"Warning: {warning}.")
    for line in comparison(found):
        _say(line)
    _say(f"Report: {(directory / 'report.html').resolve()}")


def _say(line: str) -> None:
    Console().print(line, highlight=False, markup=False, soft_wrap=True)
