"""`rowgrad audit`: find mislabelled examples in a training run."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as TextTable

from rowgrad.cli.output import staged
from rowgrad.cli.progress import progress_bar
from rowgrad.data.readers import read_table
from rowgrad.errors import InputError
from rowgrad.graph.lettering import number
from rowgrad.report.metrics import write_metrics
from rowgrad.report.page import write_page
from rowgrad.report.scores import targets_text, write_scores
from rowgrad.training.audited import AuditRun, audit_table
from rowgrad.training.settings import Settings
from rowgrad.uses.gallery import readable
from rowgrad.uses.planted import score_planted

N_SHOWN = 10  # suspects in the terminal


class Task(StrEnum):
    """What the target is taken for."""

    CLASSIFICATION = "classification"
    REGRESSION = "regression"


class NaN(StrEnum):
    """What NaN in a feature means."""

    ERROR = "error"
    MISSING = "missing"


def audit(
    context: typer.Context,
    data: Annotated[
        str, typer.Argument(help="digits, breast_cancer, wine, iris, diabetes, or a CSV, Parquet or NPZ file.")
    ],
    target: Annotated[str | None, typer.Option(help="Column (or NPZ array) to predict.")] = None,
    flip: Annotated[float, typer.Option(help="Share of targets to corrupt first, to measure what is found.")] = 0.0,
    calibrate: Annotated[
        float, typer.Option(help="Share of labels to flip, to estimate how many wrong ones are found; 0.03 is usual.")
    ] = 0.0,
    norms: Annotated[
        bool, typer.Option(help="Take gradient norms too, which may double the time; wrong labels are found without.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Directory of the results; default rowgrad-audit-NAME.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; default 40, fewer for large data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step; default by the size of the data.")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = Settings.lr,
    hidden: Annotated[str, typer.Option(help="Widths of the hidden layers.")] = ",".join(map(str, Settings.hidden)),
    dropout: Annotated[float, typer.Option(help="Share of hidden units left out in a step.")] = Settings.dropout,
    seed: Annotated[int, typer.Option(help="Seed of everything random; the same seed gives the same scores.")] = 0,
    rows: Annotated[float, typer.Option(help="Share of the rows to audit; the others are held out.")] = 1.0,
    task: Annotated[Task | None, typer.Option(help="What the target is; default by its values.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Column to leave out; may be repeated.")] = None,
    categorical: Annotated[
        list[str] | None, typer.Option(help="Column of numbers to one-hot encode; may be repeated.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Column to count the words of; default: those in sentences; may be repeated."),
    ] = None,
    nan: Annotated[NaN, typer.Option(help="NaN in a feature: refuse it, or take it for a missing value.")] = NaN.ERROR,
) -> None:
    """Train a small network on DATA and flag the examples whose labels look wrong.

    Writes report.html, scores.parquet and metrics.jsonl.
    """
    settings = Settings(epochs, batch_size, lr, _widths(hidden), dropout, seed)
    if not 0 <= flip <= 0.5:
        raise InputError(f"--flip {flip:g}: the share of corrupted targets must be at least 0 and at most 0.5")
    if not 0 <= calibrate <= 0.5:
        raise InputError(f"--calibrate {calibrate:g}: the share of labels to flip must be at least 0 and at most 0.5")
    if flip and calibrate:
        raise InputError("--flip and --calibrate both change labels, for one purpose each; give one of them")
    if not 0 < rows <= 1:
        raise InputError(f"--rows {rows:g}: the share of rows to audit must be above 0 and at most 1")
    console = Console()
    directory = out or Path(f"rowgrad-audit-{Path(data).stem}")
    with staged(directory) as stage:
        table = read_table(
            data,
            target=target,
            drop=drop or (),
            categorical=categorical or (),
            task=task,
            nan=nan,
            text=text or (),
        )
        for note in table.notes:
            console.print(note, style="dim", highlight=False, markup=False, soft_wrap=True)
        with progress_bar("training") as progress:
            run = audit_table(
                table, settings, flip=flip, calibrate=calibrate, rows=rows, norms=norms, progress=progress
            )
        write_scores(run, stage / "scores.parquet")
        write_metrics(run, stage / "metrics.jsonl")
        write_page(run, stage / "report.html", ["rowgrad", *context.obj])
    _summarize(console, run, directory)


def _widths(hidden: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in hidden.split(",") if width.strip())
    except ValueError as error:
        raise InputError(f"--hidden {hidden}: expected widths separated by commas, such as 128,128") from error


def _summarize(console: Console, run: AuditRun, directory: Path) -> None:
    console.print(_suspects(run))
    scores, cost = run.scores, run.cost
    lines = []
    if scores.flagged is not None:
        n_flagged = int(scores.flagged.sum())
        lines.append(f"Flagged {n_flagged:,} of {len(run.rows):,} examples as likely mislabelled.")
    if run.planted is not None:
        lines.append(_found(run))
    if scores.calibration is not None:
        lines.append(str(scores.calibration))
    if run.held_out is not None:
        lines.append(f"{'Accuracy' if run.table.classes else 'R²'} on the rows held out: {run.held_out:.3f}.")
    kind = "without" if cost.rows_ratio is None else "with"
    lines.append(
        f"An audited step, {kind} gradient norms, took {cost.audit_ratio:.2f} times a plain step (measured here)."
    )
    lines.append(f"Report: {(directory / 'report.html').resolve()}")
    if run.doubt:
        console.print(run.doubt, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _suspects(run: AuditRun) -> TextTable:
    table, scores = run.table, run.scores
    shown = scores.order()[:N_SHOWN]
    text = TextTable(title=f"Most suspicious examples of {table.name}", title_justify="left", box=None, pad_edge=False)
    text.add_column("rank", justify="right")
    text.add_column(table.place, justify="right")
    text.add_column("given")
    columns = [
        [str(rank) for rank in scores.rank[shown].tolist()],
        [str(place) for place in table.numbers[run.rows[shown].numpy()]],
        [readable(given) for given in targets_text(run, run.given[shown])],
    ]
    if scores.suggested is not None and scores.suggested_probability is not None:
        text.add_column("suggested", style="bold")
        text.add_column("probability", justify="right")
        assert scores.flagged is not None
        flagged = scores.flagged[shown].tolist()
        labels, shares = targets_text(run, scores.suggested[shown]), scores.suggested_probability[shown].tolist()
        columns.append([readable(label) if flag else "" for label, flag in zip(labels, flagged, strict=True)])
        columns.append([f"{share:.2f}" if flag else "" for share, flag in zip(shares, flagged, strict=True)])
    text.add_column("mean loss", justify="right")
    columns.append([number(value) for value in scores.mean_loss[shown].tolist()])
    if scores.mean_norm is not None:
        text.add_column("mean norm", justify="right")
        columns.append([number(value) for value in scores.mean_norm[shown].tolist()])
    if run.planted is not None:
        text.add_column("planted")
        columns.append(["yes" if planted else "" for planted in run.planted[shown].tolist()])
    for row in zip(*columns, strict=True):
        text.add_row(*row)
    return text


def _found(run: AuditRun) -> str:
    assert run.planted is not None
    planted = score_planted(run.scores, run.planted)
    ranking = f"average precision of the ranking {planted.average_precision:.3f}"
    if planted.recall is None or planted.recall_interval is None:
        return (
            f"Of {planted.n_planted:,} planted errors, {planted.precision_at_k:.0%} "
            f"{_interval(planted.precision_at_k_interval)} are among the first {planted.n_planted:,} of the ranking; "
            f"{ranking}."
        )
    precision = "undefined (no flags)"
    if planted.precision is not None and planted.precision_interval is not None:
        precision = f"{planted.precision:.3f} {_interval(planted.precision_interval)}"
    return (
        f"Found {planted.n_found:,} of {planted.n_planted:,} planted errors: precision of the flags {precision}, "
        f"recall {planted.recall:.3f} {_interval(planted.recall_interval)}, {ranking}."
    )


def _interval(ends: tuple[float, float]) -> str:
    return f"(95%: {ends[0]:.2f} to {ends[1]:.2f})"
