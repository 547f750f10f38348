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

from rowgrad.cli.audit import NaN, Task
from rowgrad.cli.output import kind_of, write_text
from rowgrad.cli.progress import progress_bar
from rowgrad.data.readers import read_table
from rowgrad.data.table import Table
from rowgrad.errors import InputError
from rowgrad.files import whole
from rowgrad.optim.factory import OPTIMIZERS
from rowgrad.report.history import history_page
from rowgrad.report.metrics import versions
from rowgrad.report.scores import frame_of
from rowgrad.training.fit import CHECKPOINT, Fitted, fit
from rowgrad.training.recipe import Recipe
from rowgrad.training.saved import Predictor, load_model, save_model

DATA_HELP = "digits, breast_cancer, wine, iris, diabetes, or a CSV, Parquet or NPZ file."
MODEL = "model.safetensors"


def train(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    target: Annotated[str | None, typer.Option(help="Column (or NPZ array) to predict.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the results; default rowgrad-train-NAME.")] = None,
    task: Annotated[Task | None, typer.Option(help="What the target is; default by its values.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Column to leave out; may be repeated.")] = None,
    categorical: Annotated[
        list[str] | None, typer.Option(help="Column of numbers to one-hot encode; may be repeated.")
    ] = None,
    nan: Annotated[NaN, typer.Option(help="NaN in a feature: refuse it, or take it for a missing value.")] = NaN.ERROR,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run in --out was stopped.")] = False,
    model: Annotated[
        str, typer.Option(help="mlp:WIDTHS, cnn:CHANNELS for images, lstm:UNITS for sequences, autoencoder:WIDTHS.")
    ] = Recipe.model,
    act: Annotated[str, typer.Option(help="Activation of hidden layers, or maxout.")] = Recipe.act,
    alpha: Annotated[float | None, typer.Option(help="Slope of leaky_relu below 0.")] = None,
    norm: Annotated[str, typer.Option(help="batch-pre, batch-post, layer or none.")] = Recipe.norm,
    bn_statistics: Annotated[
        str, typer.Option(help="Of batch norms outside training: running, or population (the whole training part).")
    ] = Recipe.bn_statistics,
    dropout: Annotated[float, typer.Option(help="Share of hidden units left out in a step.")] = Recipe.dropout,
    init: Annotated[str | None, typer.Option(help="lecun, he, glorot or pretrain; default PyTorch's.")] = None,
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")] = Recipe.optimizer,
    optimizer_option: Annotated[
        list[str] | None, typer.Option(help="Of the optimizer, as momentum=0.95 or eps_inside=true; may be repeated.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default by the optimizer.")] = None,
    decay: Annotated[str | None, typer.Option(help="Of the rate by the epoch: exponential or inverse.")] = None,
    decay_rate: Annotated[float, typer.Option(help="How fast the rate falls, per epoch.")] = Recipe.decay_rate,
    l2: Annotated[float, typer.Option(help="Penalty on weights; not on biases and norms.")] = Recipe.l2,
    clip_norm: Annotated[float | None, typer.Option(help="Bound on the norm of the gradient.")] = None,
    clip_mode: Annotated[
        str, typer.Option(help="norm: --clip-norm is a cap; normalize: every gradient gets that norm.")
    ] = Recipe.clip_mode,
    clip_value: Annotated[float | None, typer.Option(help="Bound on each entry of the gradient.")] = None,
    standardize: Annotated[bool, typer.Option(help="Features of mean 0 and variance 1.")] = True,
    whiten: Annotated[bool, typer.Option("--whiten", help="Principal directions of variance 1.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples in a step; default 32 to 256 by their number, all for second order.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data, at most.")] = Recipe.epochs,
    val: Annotated[float, typer.Option(help="Share of the examples held out.")] = Recipe.val,
    patience: Annotated[
        int, typer.Option(help="Epochs without improvement before it stops; 0: never.")
    ] = Recipe.patience,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    monitor: Annotated[int, typer.Option(help="Steps between diagnoses of the training; 0 for none.")] = 0,
    check_grad: Annotated[int, typer.Option(help="How often gradients are checked during training.")] = 0,
    audit: Annotated[
        bool, typer.Option("--audit", help="Look for mislabelled examples in this training; writes scores.parquet.")
    ] = False,
) -> None:
    """Train a model on DATA.

    Writes model.safetensors (for `rowgrad predict`), history.parquet, config.json, report.html and with --audit
    scores.parquet, and keeps a checkpoint after each epoch: a run that is stopped goes on with --resume to the same
    bits.
    """
    prepare = "whiten" if whiten else "standardize" if standardize else "none"
    recipe = Recipe(
        model=model,
        act=act,
        alpha=alpha,
        norm=norm,
        dropout=dropout,
        init=init,
        optimizer=optimizer,
        lr=lr,
        decay=decay,
        decay_rate=decay_rate,
        l2=l2,
        clip_norm=clip_norm,
        clip_mode=clip_mode,
        clip_value=clip_value,
        bn_statistics=bn_statistics,
        optimizer_options=dict(map(_option, optimizer_option or ())),
        prepare=prepare,
        batch_size=batch_size,
        epochs=epochs,
        val=val,
        patience=patience,
        seed=seed,
    )
    if monitor < 0 or check_grad < 0:
        raise InputError(f"--monitor {monitor} --check-grad {check_grad}: at least 0")
    directory = out or Path(f"rowgrad-train-{Path(data).stem}")
    table = read_table(
        data,
        target=target,
        drop=drop or (),
        categorical=categorical or (),
        task=task,
        nan=nan,
        needs_target=recipe.kind != "autoencoder",
    )
    for note in table.notes:
        Console().print(note, style="dim", highlight=False, markup=False, soft_wrap=True)
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
    _write(found, table, directory, ["rowgrad", *context.obj])
    _summarize(found, directory)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """What a warning says, without the place in the code that gave it."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"rowgrad: {message}", err=True)
        yield


def _option(text: str) -> tuple[str, Any]:
    """A name and a value: true, false, none, a number, numbers separated by commas, or a word."""
    name, sign, value = text.partition("=")
    if not sign or not name or not value:
        raise InputError(f"--optimizer-option {text}: expected NAME=VALUE, such as momentum=0.95")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    try:
        numbers = [int(part) if part.strip().lstrip("+-").isdigit() else float(part) for part in value.split(",")]
    except ValueError:
        return name, value
    return name, numbers[0] if len(numbers) == 1 else tuple(numbers)


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


def _frame(predictor: Predictor, table: Table) -> pl.DataFrame:
    outputs, classes = predictor.of_table(table), predictor.classes
    columns: dict[str, np.ndarray | list] = {"index": np.arange(len(table))}
    if classes is None:
        name = "reconstruction error" if predictor.reconstructs else "prediction"
        return pl.DataFrame(columns | {name: outputs.numpy()})
    columns |= {"prediction": [classes[k] for k in outputs.argmax(1).tolist()]}
    return pl.DataFrame(columns | {f"probability of {name}": outputs[:, k].numpy() for k, name in enumerate(classes)})
