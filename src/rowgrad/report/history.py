"""The page of a training: loss and score by epoch, suspicious examples, and all options."""

from collections.abc import Sequence

import numpy as np
from markupsafe import escape

from rowgrad.data.table import Table
from rowgrad.report.charts import Line, line_chart
from rowgrad.report.plain import plain_page
from rowgrad.report.suspects import suspects_section
from rowgrad.training.fit import Fitted

WIDTH, HEIGHT = 720, 260


def history_page(found: Fitted, table: Table, command: Sequence[str] = ()) -> str:
    """HTML that needs nothing else."""
    losses = [Line(np.array([e.train_loss for e in found.epochs]), "course")]
    key = '<span><i style="border-color: var(--course)"></i>training part</span>'
    best = f"Best epoch {found.best} of {len(found.epochs)}; {found.stopped}."
    sections = [f"<p>{escape(' '.join([*table.notes, best]))}</p>"]
    if found.epochs[0].val_loss is not None:
        losses.append(Line(np.array([e.val_loss for e in found.epochs]), "suspect"))
        key += '<span><i style="border-color: var(--mark)"></i>held out</span>'
    sections.append(_figure("Loss by epoch", key, losses, "loss"))
    if found.epochs[0].val_score is not None:
        score = found.problem.score_name
        values = np.array([max(e.val_score or 0.0, 0.0) for e in found.epochs])
        sections.append(_figure(f"{score} on the part held out", "", [Line(values, "suspect")], score))
    if found.scores is not None:
        sections.append(suspects_section(table, found.problem.train, found.scores))
    if found.monitor is not None:
        sections.append(found.monitor.to_html())
    options = found.recipe.to_dict() | {f"{name}, as used": value for name, value in found.resolved.items()}
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in options.items())
    sections.append(f"<h2>Options</h2><table>{rows}</table>")
    return plain_page(f"Training on {table.name}", sections, command)


def _figure(title: str, key: str, lines: list[Line], unit: str) -> str:
    chart = line_chart(lines, None, width=WIDTH, height=HEIGHT, x_label="epoch", y_label=unit, title=title)
    return f'<h2>{escape(title)}</h2><p class="legend">{key}</p>{chart}'
