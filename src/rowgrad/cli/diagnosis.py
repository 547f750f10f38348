"""`rowgrad diagnose`: what is wrong with the gradients of a model, where, and what to do."""

import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from rowgrad.cli.live import SOURCE_HELP, Live, load
from rowgrad.cli.output import kind_of, write_text
from rowgrad.diagnosis.examine import diagnose as examine
from rowgrad.diagnosis.findings import KINDS
from rowgrad.diagnosis.result import Diagnosis
from rowgrad.errors import InputError
from rowgrad.graph.scopes import trace


class Method(StrEnum):
    """An optimizer whose next step is looked at."""

    SGD = "sgd"
    ADAM = "adam"
    ADAMW = "adamw"
    RMSPROP = "rmsprop"
    ADAGRAD = "adagrad"


METHODS = {
    Method.SGD: torch.optim.SGD,
    Method.ADAM: torch.optim.Adam,
    Method.ADAMW: torch.optim.AdamW,
    Method.RMSPROP: torch.optim.RMSprop,
    Method.ADAGRAD: torch.optim.Adagrad,
}


# How what is not looked at can be, in the command's words.
NEEDS = {
    "start": "--initial, if the weights are as they were drawn",
    "update": "--optimizer",
    "cliff": "--optimizer",
    "dead": "losses of more than one batch: rowgrad.diagnose(..., batches=) in Python",
    "drift": "two diagnoses: rowgrad.diagnose(..., earlier=) in Python, or rowgrad.Monitor",
}


def diagnose(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    initial: Annotated[
        bool | None,
        typer.Option(
            "--initial/--trained", help="Whether the weights are as they were drawn; default yes for a data set."
        ),
    ] = None,
    optimizer: Annotated[Method | None, typer.Option(help="Look at the next step of this optimizer, too.")] = None,
    lr: Annotated[float | None, typer.Option(help="Its learning rate; default PyTorch's.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the diagnosis: .html or .json.")] = None,
) -> None:
    """Say what is wrong with the gradients of SOURCE: where, by which evidence, and what to do.

    Looks for vanishing and exploding gradients, saturated, dead, symmetric and unused units, badly scaled inputs and
    weights, steps too large or too small, cliffs, a bad start, and the birthplace of a NaN. Exits with 1 if anything
    is found.
    """
    kind = None if out is None else kind_of("--out", out, ("html", "json"))
    if lr is not None and optimizer is None:
        raise InputError(f"--lr {lr:g} belongs to an optimizer: add --optimizer, one of {', '.join(METHODS)}")
    if lr is not None and not lr > 0:
        raise InputError(f"--lr {lr:g}: a learning rate is positive")
    live = load(source)
    found = _examined(live, live.is_new if initial is None else initial, optimizer, lr)
    console = Console()
    console.print(str(found), highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        _write(found, out, kind)
        console.print(f"Diagnosis: {out.resolve()}", highlight=False, markup=False, soft_wrap=True)
    if not found.ok:
        raise typer.Exit(1)


def _examined(live: Live, initial: bool, method: Method | None, lr: float | None) -> Diagnosis:
    options = {} if lr is None else {"lr": lr}
    optimizer = None if method is None else METHODS[method](live.model.parameters(), **options)
    with trace(live.model) as scopes:
        losses = live.closure()
    closure = None if optimizer is None else live.closure
    found = examine(losses, live.model, trace=scopes, optimizer=optimizer, closure=closure, initial=initial)
    unseen = {k: NEEDS[k] if k in NEEDS and needs == KINDS[k] else needs for k, needs in found.not_looked_at.items()}
    return replace(found, not_looked_at=unseen)


def _write(found: Diagnosis, out: Path, kind: str | None) -> None:
    if kind == "json":
        write_text("--out", out, json.dumps(found.to_dict(), indent=2))
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        found.to_html(out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); name another file") from error
