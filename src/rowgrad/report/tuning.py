"""The page of a search: what was tried, what came of it, what was killed and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape

from rowgrad.graph.lettering import number
from rowgrad.report.charts import Series, plot
from rowgrad.report.plain import plain_page
from rowgrad.training.search import shown
from rowgrad.training.space import Axis, Value
from rowgrad.training.tuning import Compared, Tuned

WIDTH, HEIGHT, SMALL = 720, 320, (400, 240)
LEAST = 1e-9  # loss that a logarithmic scale shows as smallest
LEGEND = (
    '<p class="legend"><span><i style="border-color: var(--mark)"></i>best</span>'
    '<span><i style="border-color: var(--course)"></i>completed</span>'
    '<span><i style="border-color: var(--rest)"></i>killed</span></p>'
)


def tuning_page(found: Tuned, name: str, command: Sequence[str] = ()) -> str:
    """HTML that needs nothing else."""
    sections = [_outcome(found), _winners(found)]
    if any(trial.curve for trial in found.trials):
        sections += [_curves(found), _hyperparameters(found)]
    sections += [_tried(found), _options(found)]
    return plain_page(f"Hyperparameters for {name}", sections, command)


def comparison(found: Tuned) -> list[str]:
    """How the ensemble and the single winner did, one sentence for each set of examples."""
    n_val, n_test = len(found.split["val"]), len(found.split["test"])
    lines = [f"On {n_val:,} examples held out (by which all was chosen): {_compared(found.validation, found)}"]
    if found.test is not None:
        lines.append(f"On {n_test:,} test examples, looked at once: {_compared(found.test, found)}")
    return lines


def _compared(scores: Compared, found: Tuned) -> str:
    name = _score_name(found)
    if len(found.winners) == 1:
        return f"one winner: loss {scores.winner.loss:.4g}, {name} {scores.winner.score:.4g}."
    both = [f"loss {s.loss:.4g}, {name} {s.score:.4g}" for s in (scores.ensemble, scores.winner)]
    verdict = "better" if scores.is_better else "no better"
    return f"ensemble of {len(found.winners)}: {both[0]}; single winner: {both[1]}. By loss the ensemble is {verdict}."


def _score_name(found: Tuned) -> str:
    return "R²" if found.model.classes is None else "accuracy"


def _outcome(found: Tuned) -> str:
    best = found.best
    lines = [f"Best run: {best.number}, validation loss {best.loss:.4g}: {shown(best.point)}.", *comparison(found)]
    body = "".join(f"<p>{escape(line)}</p>" for line in (*lines, *found.notes))
    warned = "".join(f'<p style="color: var(--mark)">Warning: {escape(line)}.</p>' for line in found.warnings)
    return f"<h2>Outcome</h2>{body}{warned}"


def _winners(found: Tuned) -> str:
    head = ("run", "loss", _score_name(found), "best epoch", "epochs", "ended", *found.space.names)
    points = {trial.number: trial.point for trial in found.trials}
    rows = [
        (w.number, *vars(w.validation).values(), w.best_epoch, w.n_epochs, w.stopped, *_values(points[w.number], found))
        for w in found.winners
    ]
    said = "Trained with all epochs; loss and score on the part held out, with the weights of the best epoch."
    return f"<h2>Winners</h2><p>{said}</p>{_table(head, rows)}"


def _curves(found: Tuned) -> str:
    series = []
    for trial in found.trials:
        style = "suspect" if trial == found.best else "faint" if trial.state == "completed" else "ended"
        if trial.curve and trial.state != "abandoned":
            series.append(Series(np.arange(1, len(trial.curve) + 1), _positive(trial.curve), style, True))
    series.sort(key=lambda s: ("ended", "faint", "suspect").index(s.style))
    title = "Validation loss by epoch"
    chart = plot(series, width=WIDTH, height=HEIGHT, x_label="epoch", y_label="loss", title=title)
    return f"<h2>{title}</h2>{LEGEND}{chart}"


def _hyperparameters(found: Tuned) -> str:
    charts = "".join(f"<figure>{_against(axis, found)}</figure>" for axis in found.space.axes)
    said = "The best validation loss of each run; of killed runs, the best before their end."
    return f'<h2>Loss by hyperparameter</h2><p>{said}</p>{LEGEND}<div class="curves">{charts}</div>'


def _against(axis: Axis, found: Tuned) -> Markup:
    order = sorted(axis.values) if axis.is_ordered else list(axis.values)  # pyright: ignore[reportArgumentType]
    series = []
    for style, chosen in (
        ("hollow", [t for t in found.trials if t.state == "killed" and t.curve]),
        ("tried", [t for t in found.trials if t.state == "completed" and t != found.best]),
        ("marked", [found.best]),
    ):
        values = [t.point[axis.name] for t in chosen]
        x = np.array([order.index(v) if axis.values else v for v in values], dtype=float)
        series.append(Series(x, _positive([min(t.curve) for t in chosen]), style))
    return plot(
        series,
        width=SMALL[0],
        height=SMALL[1],
        x_label=axis.name,
        y_label="loss",
        title=f"Loss by {axis.name}",
        x_log=axis.log,
        x_names=[_cell(v) for v in order],
    )


def _positive(losses: Sequence[float]) -> np.ndarray:
    return np.maximum(np.array(losses, dtype=float), LEAST)


def _tried(found: Tuned) -> str:
    order = {"completed": 0, "killed": 1, "abandoned": 2}
    trials = sorted(found.trials, key=lambda t: (order[t.state], min(t.curve, default=float("inf")), t.number))
    head = ("run", "round", "end", "loss", _score_name(found), "epochs", *found.space.names, "why")
    rows = [
        (t.number, t.round, t.state, min(t.curve, default=None), t.score, len(t.curve), *_values(t.point, found), t.why)
        for t in trials
    ]
    n = sum(t.state == "abandoned" for t in trials)
    said = "Completed runs by validation loss, then those that were killed, with the best loss before their end."
    said += f" {n} were abandoned when the search itself was stopped, and made again." if n else ""
    return f"<h2>What was tried</h2><p>{said}</p>{_table(head, rows, [t.state != 'completed' for t in trials])}"


def _values(point: Mapping[str, Value], found: Tuned) -> tuple[Value, ...]:
    """Of an abandoned run not all may have been kept."""
    return tuple(point.get(name) for name in found.space.names)


def _options(found: Tuned) -> str:
    space = "".join(
        f"<tr><td>{escape(k)}</td><td>{escape(_toml(v))}</td></tr>" for k, v in found.space.to_dict().items()
    )
    plan = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in vars(found.plan).items())
    fixed = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in found.recipe.to_dict().items())
    return (
        f"<h2>Space</h2><table>{space}</table><h2>Search</h2><table>{plan}</table>"
        f"<details><summary>Options that are not searched</summary><table>{fixed}</table></details>"
    )


def _toml(entry: dict) -> str:
    return ", ".join(f"{k} {v}" for k, v in entry.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], is_soft: Sequence[bool] = ()) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = ""
    for k, row in enumerate(rows):
        style = ' class="soft"' if is_soft and is_soft[k] else ""
        body += f"<tr{style}>" + "".join(f"<td>{escape(_cell(cell))}</td>" for cell in row) + "</tr>"
    return f"<table><tr>{cells}</tr>{body}</table>"


def _cell(value: object) -> str:
    if value is None:
        return "none"
    return number(value) if isinstance(value, float) else str(value)
