"""The examples of a training that look most suspicious, as a section of its page."""

import torch
from markupsafe import escape

from rowgrad.data.table import Table
from rowgrad.graph.lettering import number
from rowgrad.report.scores import text_of
from rowgrad.report.thumbnails import cut, data_uri
from rowgrad.uses.gallery import readable
from rowgrad.uses.scores import AuditScores

LISTED = 20
MOST_LETTERS = 160  # of a text


def suspects_section(table: Table, rows: torch.Tensor, scores: AuditScores) -> str:
    """HTML: how many examples carry each flag, and the first of the ranking with what speaks against them.

    Args:
        rows: positions in the table of the examples that have scores, in their order.
    """
    counts = ", ".join(f"{int(mask.sum()):,} {name}" for name, mask in scores.flags.items())
    said = f"Of {len(rows):,} training examples: {counts}. scores.parquet has all, with the reason of each flag."
    return f"<h2>Examples, most suspicious first</h2><p>{escape(said)}</p>{_listing(table, rows, scores)}"


def _listing(table: Table, rows: torch.Tensor, scores: AuditScores) -> str:
    shown = scores.order()[:LISTED]
    places = rows[shown]
    columns: dict[str, list[str]] = {
        "rank": [str(rank) for rank in scores.rank[shown].tolist()],
        table.place: [str(number) for number in table.numbers[places.numpy()]],
    }
    if table.images is not None:
        columns[""] = [f'<img src="{data_uri(table.images[place])}" alt="" height="40">' for place in places.tolist()]
    if table.texts and table.frame is not None:
        shown_texts = [table.frame[name].gather(places.tolist()).to_list() for name in table.texts]
        columns["text"] = [_cell(values) for values in zip(*shown_texts, strict=True)]
    if table.target_name:
        columns["given"] = _escaped(text_of(table, table.targets[places]))
    if scores.suggested is not None and scores.suggested_probability is not None:
        likely = zip(text_of(table, scores.suggested[shown]), scores.suggested_probability[shown].tolist(), strict=True)
        columns["suggested"] = _escaped([f"{readable(label)} ({share:.2f})" for label, share in likely])
    columns["mean loss"] = [number(value) for value in scores.mean_loss[shown].tolist()]
    if scores.mean_norm is not None:
        columns["mean norm"] = [number(value) for value in scores.mean_norm[shown].tolist()]
    flags = [[name for name, mask in scores.flags.items() if mask[position]] for position in shown.tolist()]
    columns["flags"] = _escaped([", ".join(names) or "none" for names in flags])
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells in zip(*columns.values(), strict=True)
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(texts: tuple[str | None, ...]) -> str:
    lines = "<br>".join(_escaped([cut(readable(text), MOST_LETTERS) for text in texts]))
    return f'<div style="white-space: normal; width: 18rem">{lines}</div>'


def _escaped(values: list) -> list[str]:
    return [str(escape(readable(value))) for value in values]
