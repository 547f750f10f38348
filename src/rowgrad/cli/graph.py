"""`rowgrad graph`: the computational graph of a loss, and the ways by which a gradient comes to a weight."""

import json
import warnings
from collections.abc import Callable, Hashable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import Tensor

from rowgrad.cli.live import SOURCE_HELP, Live, load
from rowgrad.cli.output import kind_of, write_text
from rowgrad.cli.progress import progress_bar
from rowgrad.errors import GraphError, InputError, RowgradWarning
from rowgrad.graph.charts import bars, part_sizes, time_map
from rowgrad.graph.detail import MAX_BOXES
from rowgrad.graph.graph import Graph
from rowgrad.graph.scopes import trace
from rowgrad.graph.shares import Shares


class By(StrEnum):
    """What tells paths apart."""

    LENGTH = "length"
    USE = "use"
    TIME = "time"


TITLES = {
    By.LENGTH: "by the number of operations on a path",
    By.USE: "by the operation that uses it",
    By.TIME: "by the time of its use",
}

Parts = Mapping[Hashable, Tensor]


def graph(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    to: Annotated[
        str | None, typer.Option(help="A weight: its paths to the loss, and how its gradient divides among them.")
    ] = None,
    by: Annotated[
        By | None, typer.Option(help="Divide gradients by length of path, use of the weight, or time of use.")
    ] = None,
    depth: Annotated[
        int | None, typer.Option(help="Parts of a module's name that make a box; default the most that fit.")
    ] = None,
    max_boxes: Annotated[int, typer.Option(help="The most boxes in a drawing.")] = MAX_BOXES,
    out: Annotated[Path | None, typer.Option(help="File for the drawing: .html, .svg, .txt or .json.")] = None,
) -> None:
    """Show the computational graph behind the loss of SOURCE.

    With --to NAME also how many paths lead there, which share of the gradient each edge carries, and with --by how the
    gradient divides among classes of paths. --by time without --to maps all weights that are used more than once.
    """
    kind = None if out is None else kind_of("--out", out, ("html", "svg", "txt", "json"))
    _check(depth, max_boxes, to, by)
    live = load(source)
    found = _graph(live)
    if to is not None:
        _known(found, to)
    parts = {} if by is None else _divided(found, to, by)
    shares = None if to is None else _shares(found, to)
    text = "\n".join([found.to_text(depth, max_boxes=max_boxes, to=to).rstrip(), *_lines(found, to, by, parts)])
    console = Console()
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        made: dict[str | None, Callable[[], str]] = {
            "txt": lambda: text + "\n",
            "svg": lambda: found.to_svg(depth, max_boxes=max_boxes, to=to, shares=shares),
            "json": lambda: json.dumps(_plain(found, to, by, parts, shares), indent=2),
            "html": lambda: found.to_html(
                depth=depth, max_boxes=max_boxes, to=to, shares=shares, flow=found.backward(), below=_charts(by, parts)
            ),
        }
        write_text("--out", out, made[kind]())
        console.print(f"Graph: {out.resolve()}", highlight=False, markup=False, soft_wrap=True)


def _check(depth: int | None, max_boxes: int, to: str | None, by: By | None) -> None:
    if depth is not None and depth < 0:
        raise InputError(f"--depth {depth}: 0 is one box in all, 1 the outermost modules")
    if max_boxes < 1:
        raise InputError(f"--max-boxes {max_boxes}: at least 1")
    if by in {By.LENGTH, By.USE} and to is None:
        raise InputError(f"--by {by} divides the gradient of one weight: add --to NAME")


def _graph(live: Live) -> Graph:
    with trace(live.model) as scopes:
        losses = live.closure()
    return Graph(losses, live.model, trace=scopes)


def _known(found: Graph, to: str) -> None:
    try:
        if found.find(to) is None:
            raise InputError(f"--to {to}: no path leads there from the loss")
    except KeyError as error:
        raise InputError(f"--to {error.args[0]}; weights are {_some(list(found.parameters))}") from error


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _divided(found: Graph, to: str | None, by: By) -> dict[str, Parts]:
    """{weight: {class of paths: part of its gradient}}, of one weight or of all that are used more than once."""
    names = [to] if to is not None else [name for name in found.parameters if _n_uses(found, name) > 1]
    if not names:
        raise InputError(f"--by {by}: no weight is used more than once; add --to NAME to see one")
    divided: dict[str, Parts] = {}
    with progress_bar("dividing gradients") as progress:
        for k, name in enumerate(names):
            progress(k, len(names))
            divided[name] = found.decompose(name, by=by.value)
    return divided


def _n_uses(found: Graph, name: str) -> int:
    return len(found.readers(name))


def _shares(found: Graph, to: str) -> Shares | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RowgradWarning)
            return found.shares(to)
    except GraphError as error:
        typer.echo(f"no shares: {error}", err=True)
        return None


def _lines(found: Graph, to: str | None, by: By | None, parts: Mapping[str, Parts]) -> list[str]:
    lines = []
    if to is not None:
        n = found.count_paths(to)
        many = f"{n:,}" if n < 10**12 else f"{float(n):.3g}"
        lines = ["", f"{many} path{'s' * (n != 1)} from {to} to the loss, the longest of {found.depth(to)} operations"]
    for name, divided in parts.items():
        lines += ["", f"gradient of {name} {TITLES[by] if by else ''}", *_table(divided)]
    return lines


def _table(divided: Parts) -> list[str]:
    rows = [("", "share", "norm")]
    rows += [(label, f"{100 * share:.3g}%", f"{norm:.3g}") for label, (norm, share) in part_sizes(divided).items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]


def _charts(by: By | None, parts: Mapping[str, Parts]) -> list[str]:
    if by is None:
        return []
    if by == By.TIME:
        return [time_map(parts, "norm of the part of each gradient, by the time of its use")]
    return [bars(divided, f"gradient of {name} {TITLES[by]}") for name, divided in parts.items()]


def _plain(
    found: Graph, to: str | None, by: By | None, parts: Mapping[str, Parts], shares: Shares | None
) -> dict[str, Any]:
    """Plain values, for JSON."""
    plain: dict[str, Any] = {
        "variables": [
            {"name": v.name, "op": v.op, "module": v.module, "shapes": [list(s) for s in v.shapes], "inputs": v.inputs}
            for v in found.vertices
        ]
    }
    if to is not None:
        plain["to"] = {"name": to, "paths": found.count_paths(to), "longest": found.depth(to)}
    if shares is not None:
        plain["shares"] = [[edge.vertex.index, edge.slot, share] for edge, share in shares.items()]
    if by is not None:
        plain["by"] = by.value
        plain["parts"] = {
            name: {label: {"norm": norm, "share": share} for label, (norm, share) in part_sizes(divided).items()}
            for name, divided in parts.items()
        }
    return plain
