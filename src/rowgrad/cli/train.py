"""`rowgrad train` and `rowgrad predict`: a model of the seeds' making on a table, and what it says of another."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer
from rich.console import Console

from rowgrad.cli.audit import NaN
from rowgrad.cli.options import DATA_HELP, with_options
from rowgrad.cli.output import kind_of, write_text
from rowgrad.cli.progress import progress_bar
from rowgrad.data.readers import read_table
from rowgrad.data.table import Table
from rowgrad.errors import DivergedError, InputError
from rowgrad.files import whole
from rowgrad.report.history import history_page
from rowgrad.report.metrics import versions
from rowgrad.report.scores import frame_of
from rowgrad.training.fit import CHECKPOINT, Fitted, fit
from rowgrad.training.problem import constant_loss
from rowgrad.training.recipe import Recipe
from rowgrad.training.saved import Ensemble, Predictor, load_model, save_model

MODEL = "model.safetensors"


@with_options
def train(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    out: Annotated[Path | None, typer.Option(help="Directory of the results; default rowgrad-train-NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run in --out was stopped.")] = False,
    monitor: Annotated[int, typer.Option(help="Steps between diagnoses of the training; 0 for none.")] = 0,
    check_grad: Annotated[int, typer.Option(help="How often gradients are checked during training.")] = 0,
    audit: Annotated[
        bool, typer.Option("--audit", help="Look for mislabelled examples in this training; writes scores.parquet.")
    ] = False,
    *,
    reading: dict[str, Any],
    recipe: Recipe,
) -> None:
    """Train a model on DATA.

    Writes model.safetensors (for `rowgrad predict`), history.parquet, config.json, report.html and with --audit
    scores.parquet, and keeps a checkpoint after each epoch: a run that is stopped goes on with --resume to the same
    bits.
    """
    for name, value in (("--monitor", monitor), ("--check-grad", check_grad)):
        if value < 0:
            raise InputError(f"{name} {value}: at least 0")
    directory = out or Path(f"rowgrad-train-{Path(data).stem}")
    table = read_table(data, needs_target=recipe.kind != "autoencoder", **reading)
    for note in table.notes:
        Console().print(note, style="dim", highlight=False, markup=False, soft_wrap=True)
    command = ["rowgrad", *context.obj]
    try:
        with _begun(directory, resume), _warnings_as_lines(), progress_bar("training") as progress:
            found = fit(
                table,
                recipe,
                directory=directory,
                resume=resume,
                monitor=monitor,
                check_grad=check_grad,
                audit=audit,
                progress=progress,
            )
    except DivergedError as error:
        if error.fitted is not None:  # what came of the epochs before
            _write(error.fitted, table, directory, command)
            _summarize(error.fitted, directory)
        raise
    _write(found, table, directory, command)
    _summarize(found, directory)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """What a warning says, without the place in the code that gave it."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"rowgrad: {message}", err=True)
        yield


@contextmanager
def _begun(directory: Path, resume: bool) -> Iterator[None]:
    """A directory to train in; one that a failed run leaves empty goes, and what one leaves to go on with is told."""
    _begin(directory, resume)
    try:
        yield
    except BaseException as error:
        if (directory / CHECKPOINT).exists() and not isinstance(error, Exception):
            typer.echo(f"rowgrad: the last whole epoch is kept in {directory}; go on with --resume", err=True)
        if not any(directory.iterdir()):
            directory.rmdir()
        raise


def _begin(directory: Path, resume: bool) -> None:
    if (directory / CHECKPOINT).exists() and not resume:
        raise InputError(f"--out {directory}: holds a run; go on with --resume, or name another directory")
    if resume and not (directory / CHECKPOINT).exists():
        raise InputError(f"--resume: there is no {CHECKPOINT} in {directory}; start without it, or name its --out")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {directory}: cannot be written ({error.strerror}); name another directory") from error


def _write(found: Fitted, table: Table, directory: Path, command: list[str]) -> None:
    save_model(found, table, directory / MODEL)
    with whole(directory / "history.parquet") as stage:
        pl.DataFrame([asdict(epoch) for epoch in found.epochs]).write_parquet(stage)
    problem = found.problem
    if found.scores is not None:
        with whole(directory / "scores.parquet") as stage:
            frame_of(table, problem.train, table.targets[problem.train], found.scores).write_parquet(stage)
    config = {
        "data": table.name,
        "recipe": found.recipe.to_dict(),
        "notes": table.notes,
        "resolved": found.resolved | {"best_epoch": found.best, "stopped": found.stopped},
        "split": {"train": problem.train.tolist(), "val": problem.val.tolist()},
        "versions": versions(),
    }
    write_text("--out", directory / "config.json", json.dumps(config, indent=2))
    write_text("--out", directory / "report.html", history_page(found, table, command))


def _summarize(found: Fitted, directory: Path) -> None:
    best = found.epochs[found.best - 1]
    console = Console()
    lines = [f"Stopped after {len(found.epochs)} epochs: {found.stopped}."]
    if best.val_loss is not None and best.val_score is not None:
        name = found.problem.score_name
        lines.append(
            f"Best epoch {found.best}: loss {best.val_loss:.4g}, {name} {best.val_score:.4g} on "
            f"{len(found.problem.val):,} examples held out."
        )
    n_features, n_kept = found.problem.prepared.axes.shape[0], found.problem.prepared.n_outputs
    if n_kept < n_features:
        lines.append(f"Whitening kept {n_kept} of {n_features} directions; the others hardly vary.")
    if found.problem.val.numel() and best.val_loss is not None and best.val_loss > constant_loss(found.problem):
        lines.append("This is worse than one answer for all examples; lower --lr.")
    lines += [f"Gradients {check}." for check in found.checks]
    if found.scores is not None:
        counts = ", ".join(f"{int(mask.sum()):,} {name}" for name, mask in found.scores.flags.items())
        lines.append(f"Of {len(found.problem.train):,} training examples: {counts}; see scores.parquet.")
    if found.monitor is not None:
        lines.append(str(found.monitor))
    lines.append(f"Report: {(directory / 'report.html').resolve()}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def predict(
    model: Annotated[Path, typer.Argument(help="model.safetensors of a training, or its directory.")],
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    target: Annotated[str | None, typer.Option(help="The column that was predicted in training.")] = None,
    out: Annotated[Path, typer.Option(help="File for the predictions: .csv or .parquet.")] = Path("predictions.csv"),
    nan: Annotated[NaN, typer.Option(help="NaN in a feature: refuse it, or take it for a missing value.")] = NaN.ERROR,
    codes: Annotated[bool, typer.Option("--codes", help="Of an autoencoder, write the hidden code too.")] = False,
) -> None:
    """Predict the target of each example of DATA with a trained model; the preparation of features comes with it.

    DATA needs no target. An autoencoder gives the reconstruction error of each example: half the mean squared error
    over the features as they are prepared.
    """
    kind = kind_of("--out", out, ("csv", "parquet"))
    predictor = load_model(model / MODEL if model.is_dir() else model)
    table = read_table(data, target=target, nan=nan, needs_target=False, like=predictor.columns)
    frame = _frame(predictor, table)
    if codes:
        found = predictor.codes(table.features).numpy()
        frame = frame.with_columns([pl.Series(f"code {k}", values) for k, values in enumerate(found.T)])
    try:
        with whole(out) as stage:
            frame.write_csv(stage) if kind == "csv" else frame.write_parquet(stage)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error}); name another file") from error
    Console().print(f"{len(frame):,} predictions: {out.resolve()}", highlight=False, markup=False, soft_wrap=True)


def _frame(predictor: Predictor | Ensemble, table: Table) -> pl.DataFrame:
    outputs, classes = predictor.of_table(table), predictor.classes
    columns: dict[str, np.ndarray | list] = {"index": np.arange(len(table))}
    if classes is None:
        name = "reconstruction error" if predictor.reconstructs else "prediction"
        return pl.DataFrame(columns | {name: outputs.numpy()})
    columns |= {"prediction": [classes[k] for k in outputs.argmax(1).tolist()]}
    return pl.DataFrame(columns | {f"probability of {name}": outputs[:, k].numpy() for k, name in enumerate(classes)})
