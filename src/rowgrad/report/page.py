"""The page of an audit: one HTML file that needs nothing else."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rowgrad.data.table import Table
from rowgrad.graph.lettering import number, percent
from rowgrad.report.charts import Line, Series, line_chart, plot
from rowgrad.report.metrics import versions
from rowgrad.report.scores import targets_text
from rowgrad.report.thumbnails import cut, data_uri
from rowgrad.training.audited import N_COMPARED, AuditRun
from rowgrad.uses import sections
from rowgrad.uses.gallery import readable
from rowgrad.uses.planted import PlantedScores, score_planted

N_LISTED = (12, 60)  # suspects on the page: at least, at most
N_OPEN = 24  # of them shown without unfolding
N_CURVES = 6
N_VALUES = 60  # columns of an example that are written out
MOST_LETTERS = (400, 5000)  # of a text: on a card, and unfolded
N_UNUSUAL = 3
WIDE, NARROW = 1072, 324  # widths of a chart in pixels, on a desk and on a telephone


@dataclass(frozen=True)
class Value:
    """One value of an example beside the median of its class."""

    name: str
    text: str
    usual: str


@dataclass(frozen=True)
class Text:
    """What an example says in a column; `whole` is None where all is shown."""

    name: str
    shown: str
    whole: str | None


@dataclass(frozen=True)
class Suspect:
    """What the page says of one example."""

    rank: int
    place: str
    given: str
    suggested: str | None
    probability: float | None
    flags: list[str]
    reason: str
    flagged: bool
    planted: bool
    before: str | None
    mean_loss: float
    mean_norm: float | None
    thumbnail: str | None
    texts: list[Text]
    unusual: list[Value]
    values: list[tuple[str, str]]
    n_more_values: int


@dataclass(frozen=True)
class Curves:
    """A suspect's loss and, where there is one, gradient norm over training."""

    suspect: Suspect
    charts: list[Markup]


def render(run: AuditRun, command: Sequence[str] = ()) -> str:
    """The page as HTML; `command` is the command line that made the run, for a reader who wants to repeat it."""
    environment = Environment(
        loader=PackageLoader("rowgrad.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["percent"] = percent
    suspects = _suspects(run)
    return environment.get_template("audit.html.j2").render(
        run=run,
        table=run.table,
        is_labels=run.table.classes is not None,
        planted=_planted(run),
        n_flagged=0 if run.scores.flagged is None else int(run.scores.flagged.sum()),
        suspects=suspects,
        n_open=N_OPEN,
        curves=[
            _curves(run, suspect, position)
            for suspect, position in zip(suspects, _listed(run)[:N_CURVES], strict=False)
        ],
        sections=_sections(run),
        style=Markup(sections.STYLE),
        n_compared=min(N_COMPARED, len(run.rows)),
        noise={"wide": _noise(run, WIDE), "narrow": _noise(run, NARROW)},
        training={"wide": _training(run, WIDE // 2 - 40), "narrow": _training(run, NARROW)},
        loss_unit=loss_unit(run),
        norm_unit=norm_unit(run),
        versions=versions(),
        command=shlex.join(command),
    )


def write_page(run: AuditRun, path: Path, command: Sequence[str] = ()) -> None:
    """Write the page."""
    path.write_text(render(run, command), encoding="utf-8")


def loss_unit(run: AuditRun) -> str:
    """The unit of the loss; `sd` is the standard deviation of the target."""
    return "nats" if run.table.classes is not None else "sd²"


def norm_unit(run: AuditRun) -> str:
    """The unit of the gradient norm: the loss's, per unit of weight."""
    return f"{loss_unit(run)} per unit of weight"


def _planted(run: AuditRun) -> PlantedScores | None:
    return None if run.planted is None else score_planted(run.scores, run.planted)


def _listed(run: AuditRun) -> list[int]:
    """Positions of the listed examples among the audited, most suspicious first."""
    low, high = N_LISTED
    n_flagged = 0 if run.scores.flagged is None else int(run.scores.flagged.sum())
    return run.scores.order()[: max(low, min(high, n_flagged))].tolist()


def _suspects(run: AuditRun) -> list[Suspect]:
    usual = _Usual(run)
    return [_suspect(run, usual, position) for position in _listed(run)]


def _suspect(run: AuditRun, usual: "_Usual", position: int) -> Suspect:
    table, scores, row = run.table, run.scores, int(run.rows[position])
    here = slice(position, position + 1)
    values = (
        []
        if table.frame is None
        else [
            (name, readable(value))
            for name, value in table.frame.row(row, named=True).items()
            if name not in table.texts
        ]
    )
    is_planted = run.planted is not None and bool(run.planted[position])
    return Suspect(
        rank=int(scores.rank[position]),
        place=f"{table.place} {table.numbers[row]}",
        given=readable(targets_text(run, run.given[here])[0]),
        suggested=None if scores.suggested is None else readable(targets_text(run, scores.suggested[here])[0]),
        probability=None if scores.suggested_probability is None else float(scores.suggested_probability[position]),
        flags=[name for name, mask in scores.flags.items() if mask[position]],
        reason=scores.reason(position, table.classes),
        flagged=scores.flagged is not None and bool(scores.flagged[position]),
        planted=is_planted,
        before=readable(targets_text(run, table.targets[row : row + 1])[0]) if is_planted else None,
        mean_loss=float(scores.mean_loss[position]),
        mean_norm=None if scores.mean_norm is None else float(scores.mean_norm[position]),
        thumbnail=None if table.images is None else data_uri(table.images[row]),
        texts=_texts(table, row),
        unusual=usual.values(position),
        values=values[:N_VALUES],
        n_more_values=max(0, len(values) - N_VALUES),
    )


def _texts(table: Table, row: int) -> list[Text]:
    """Of the columns that became bags of words."""
    if table.frame is None:
        return []
    found = [(name, readable(table.frame[name][row])) for name in table.texts]
    few, many = MOST_LETTERS
    return [Text(name, cut(text, few), cut(text, many) if len(text) > few else None) for name, text in found]


class _Usual:
    """Medians and spreads of the numeric features, to tell what is unusual about an example of its class."""

    def __init__(self, run: AuditRun) -> None:
        self._run = run
        frame = run.table.frame
        names = run.table.feature_names
        self._columns = [] if frame is None else [k for k, name in enumerate(names) if name in frame.columns]
        self._features = run.table.features[run.rows][:, self._columns].double().numpy() if self._columns else None
        self._spread = None if self._features is None else self._features.std(axis=0)
        self._medians: dict[int, np.ndarray] = {}

    def values(self, position: int) -> list[Value]:
        """The values farthest from the median of the examples with the same given label, measured in deviations."""
        if self._features is None or self._spread is None:
            return []
        median = self._median(position)
        spread = np.where(self._spread > 0, self._spread, np.inf)
        distance = np.abs(self._features[position] - median) / spread
        names = self._run.table.feature_names
        return [
            Value(names[self._columns[k]], number(float(self._features[position, k])), number(float(median[k])))
            for k in np.argsort(-distance, kind="stable")[:N_UNUSUAL]
            if distance[k] > 0
        ]

    def _median(self, position: int) -> np.ndarray:
        assert self._features is not None
        label = -1 if self._run.table.classes is None else int(self._run.given[position])
        if label not in self._medians:
            members = np.ones(len(self._features), dtype=bool) if label < 0 else self._run.given.numpy() == label
            self._medians[label] = np.median(self._features[members], axis=0)
        return self._medians[label]


def _curves(run: AuditRun, suspect: Suspect, position: int) -> Curves:
    members = slice(None) if run.table.classes is None else (run.given == run.given[position]).numpy()
    charts = []
    for values, label, unit in ((run.losses, "loss", loss_unit(run)), (run.norms, "gradient norm", norm_unit(run))):
        if values is None:
            continue
        class_values = values.numpy()[:, members]
        low, median, high = np.quantile(class_values, (0.25, 0.5, 0.75), axis=1)
        lines = [Line(median, "median"), Line(values[:, position].numpy(), "suspect")]
        charts.append(
            line_chart(
                lines,
                (low, high),
                width=NARROW,
                height=170,
                x_label="epoch",
                y_label=f"{label} ({unit})",
                title=f"{label} of {suspect.place} over training, and its class median",
            )
        )
    return Curves(suspect, charts)


def _training(run: AuditRun, width: int) -> list[Markup]:
    """The course of the run itself: mean loss and, with norms, their median by epoch."""
    mean_loss = np.array([epoch.mean_loss for epoch in run.epochs])
    charts = [(mean_loss, f"mean loss ({loss_unit(run)})", "mean loss over training")]
    if run.norms is not None:
        median_norm = np.array([epoch.median_norm for epoch in run.epochs])
        charts.append((median_norm, f"median gradient norm ({norm_unit(run)})", "median gradient norm over training"))
    return [
        line_chart([Line(values, "course")], None, width=width, height=180, x_label="epoch", y_label=label, title=title)
        for values, label, title in charts
    ]


def _noise(run: AuditRun, width: int) -> Markup | None:
    """The noise scale by epoch, where it has a finite error; None where it is nowhere."""
    found = [(epoch.number, epoch.noise_scale) for epoch in run.epochs if epoch.noise_scale and epoch.noise_scale_error]
    if not found:
        return None
    x, y = np.array(found).T
    return plot(
        [Series(x, y, "tried")],
        width=width,
        height=220,
        x_label="epoch",
        y_label="noise scale (examples), log scale",
        title="gradient noise scale over training",
    )


def _sections(run: AuditRun) -> dict[str, Markup]:
    """What the page of any audit shows, by name; empty where there is nothing to show."""
    scores, classes = run.scores, run.table.classes
    found = {
        "summary": sections.summary(scores, run.doubt),
        "data_map": sections.data_map(scores),
        "ranked_norms": sections.ranked_norms(scores, run.planted),
        "given_by_suggested": sections.given_by_suggested(scores, classes),
        "conflict": "" if run.conflict is None else sections.conflict_matrix(run.conflict, classes),
        "caveats": sections.caveats(scores, _caveats(run)),
    }
    return {name: Markup(html) for name, html in found.items()}


def _caveats(run: AuditRun) -> list[str]:
    """What holds of this way to audit, and of this run."""
    if run.table.classes is None:
        found = ["Errors smaller than the scatter of the target cannot be told from it."]
    else:
        found = [
            "A network that predicts more of the given labels than can be right needs fewer <code>--epochs</code>.",
            "The suggestion can only be one of the labels that occur in the data.",
        ]
    if run.scores.calibration is not None:
        return found  # what flips do not tell stands with the caveats of any audit
    if run.planted is None:
        told = "How many errors this run finds is not known: <code>--flip 0.1</code> measures it with a known share."
        if run.table.classes is not None:
            told += " <code>--calibrate 0.03</code> estimates it while your own labels are audited."
    elif run.table.classes is None:
        told = (
            "Planted errors are drawn at random and some hardly change the target; real ones may be easier or harder."
        )
    else:
        told = "Planted errors are drawn at random. Real ones concentrate on hard examples: expect to find fewer."
    return [*found, told]
