"""`rowgrad check`: are the gradients of a model the derivatives of its loss, and its rows the gradients of examples?"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from rowgrad.checking.gradients import check_gradients
from rowgrad.checking.report import Report
from rowgrad.checking.rows import check_rows
from rowgrad.cli.live import SOURCE_HELP, load
from rowgrad.cli.output import kind_of, write_text
from rowgrad.cli.progress import progress_bar
from rowgrad.errors import InputError
from rowgrad.repeat import Repeated
from rowgrad.report.plain import plain_page


class Scheme(StrEnum):
    """Which differences."""

    CENTRAL = "central"
    FORWARD = "forward"


def check(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(help=SOURCE_HELP),
    ],
    n: Annotated[int, typer.Option("--n", help="Entries of the parameters to move, one at a time.")] = 100,
    directions: Annotated[int, typer.Option(help="Random directions in each parameter.")] = 1,
    scheme: Annotated[Scheme, typer.Option(help="Differences to both sides, or to one.")] = Scheme.CENTRAL,
    threshold: Annotated[
        float | None, typer.Option(help="Relative difference allowed; default 1e-6, 1e-3 for forward differences.")
    ] = None,
    hold_detached: Annotated[
        bool, typer.Option("--hold-detached", help="Take what detach() returns for a constant.")
    ] = False,
    rows: Annotated[
        bool, typer.Option(help="Check the gradients of examples too, where the closure returns a vector of losses.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of the entries and directions.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File for the report: .html or .json.")] = None,
) -> None:
    """Compare the gradients of SOURCE's loss with differences of the loss.

    Exits with 1 if they are wrong, and says at which operation.
    """
    kind = None if out is None else kind_of("--out", out, ("html", "json"))
    if n < 1 or directions < 0:
        raise InputError(f"--n {n} --directions {directions}: at least 1 entry, and no negative number")
    if threshold is not None and not 0 < threshold < 1:
        raise InputError(f"--threshold {threshold:g}: a relative difference lies between 0 and 1")
    live = load(source)
    generator = torch.Generator().manual_seed(seed)
    with progress_bar("checking") as progress:
        gradients = check_gradients(
            live.closure,
            live.model,
            n,
            n_directions=directions,
            scheme=scheme,
            threshold=threshold,
            hold_detached=hold_detached,
            generator=generator,
            progress=progress,
        )
    reports: dict[str, Report] = {"gradients": gradients}
    if rows and Repeated(live.closure, live.model)().ndim == 1:
        reports["rows"] = check_rows(live.closure, live.model)
    console = Console()
    for report in reports.values():
        console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        plain = json.dumps({name: report.to_dict() for name, report in reports.items()}, indent=2)
        page = plain_page(
            f"Gradients of {live.name}", [r.to_html() for r in reports.values()], ["rowgrad", *context.obj]
        )
        write_text("--out", out, plain if kind == "json" else page)
        console.print(f"Report: {out.resolve()}", highlight=False, markup=False, soft_wrap=True)
    if not all(report.ok for report in reports.values()):
        raise typer.Exit(1)
