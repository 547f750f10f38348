"""The parts of an audit's page, each as HTML that needs nothing else; `STYLE` says how they look.

The colors are those of the page around them: --ink, --soft, --line, --mark (what is doubted) and --rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor

import torch
from torch import Tensor

from rowgrad.errors import InputError
from rowgrad.graph.lettering import elided, escape, number
from rowgrad.uses.scores import AuditScores

MOST_DOTS = 3000  # examples drawn in a chart; of more, every second, third, ...
MOST_CLASSES = 20  # rows of a matrix; of more classes those with the largest entries
NAME = 18  # characters of a class in a matrix
WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 32, 50  # room for the larger letters of narrow screens

STYLE = """
.audit svg { display: block; width: 100%; max-width: 760px; height: auto; overflow: visible; }
.audit svg text { font-size: 11.5px; fill: var(--soft); } .audit svg .end { text-anchor: end; }
.audit svg .middle { text-anchor: middle; } .audit svg .grid { stroke: var(--line); }
.audit svg .usual { fill: var(--rest); fill-opacity: 0.55; stroke: none; }
.audit svg .doubted { fill: var(--mark); fill-opacity: 0.9; stroke: none; }
.audit svg .changed { fill: none; stroke: var(--ink); stroke-width: 1.2; }
.audit svg .curve { fill: none; stroke: var(--rest); stroke-width: 2; }
@media (max-width: 760px) { .audit svg text { font-size: 18px; } }
.audit .doubt { color: var(--mark); font-weight: 600; }
.audit .found { list-style: none; margin: 12px 0; padding: 0; }
.audit .found li { margin: 0 0 6px; display: grid; grid-template-columns: 3.5em minmax(0, 1fr); gap: 10px; }
.audit .found b { text-align: right; font-variant-numeric: tabular-nums; }
.audit .marks { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 12px 0; padding: 0;
  font-size: 0.9rem; color: var(--soft); }
.audit .marks svg { display: inline-block; width: 12px; height: 12px; margin-right: 7px; vertical-align: -1px; }
.audit .names { list-style: none; margin: 12px 0 0; padding: 0; max-width: 72ch; }
.audit .scroll { overflow-x: auto; }
.audit table.matrix { width: auto; max-width: none; border-collapse: separate; border-spacing: 2px; font-size: 0.85rem;
  overflow-wrap: normal; }
.audit table.matrix th { color: var(--soft); font-weight: 500; border: 0; padding: 2px 8px; white-space: nowrap; }
.audit table.matrix td { border: 0; padding: 3px 6px; min-width: 2.6em; text-align: right; border-radius: 3px;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
""".strip()

MEANING = {
    "likely mislabelled": "the network's probabilities, averaged over training, favor another label",
    "hard": "the label had less than two thirds of the probability, and the loss is far above that of the others",
    "never learned": "the label was predicted at no visit",
    "redundant": "learned early, never forgotten, and with hardly any {pull}",
    "spiking": "the gradient norm shot up once after the start of training",
}
OF_NO_LABELS = {"hard": "the loss is far above that of the others", "redundant": "fitted with hardly any {pull}"}


def summary(scores: AuditScores, doubt: str | None = None) -> str:
    """How many examples carry each flag, what it means, and what the planted flips say.

    Args:
        doubt: why the flags mean little, said first; by default `AuditScores.doubt`.
    """
    doubt = scores.doubt if doubt is None else doubt
    warning = f'<p class="doubt">{escape(doubt)}</p>' if doubt else ""
    meaning = MEANING | (OF_NO_LABELS if scores.given is None else {})
    pull = "loss" if scores.self_influence is None else "pull on the weights"
    found = [(int(mask.sum()), f"{name}: {meaning[name].format(pull=pull)}") for name, mask in scores.flags.items()]
    unseen = int((scores.times_seen == 0).sum())
    if unseen:
        found.append((unseen, "never seen in training; nothing is said of them"))
    lines = [f"<li><b>{n:,}</b><span>{escape(text)}</span></li>" for n, text in found]
    told = "" if scores.calibration is None else f"<p>{escape(str(scores.calibration))}</p>"
    return f'{warning}<ul class="found">{"".join(lines)}</ul>{told}'


def data_map(scores: AuditScores) -> str:
    """Each example at its variability and its confidence, the doubted ones marked; empty without labels.

    Those flipped for calibration have a mark of their own: the label they are shown with is wrong on purpose.

    Source: Swayamdipta et al. 2020, Dataset cartography, figure 1.
    """
    if scores.confidence is None or scores.variability is None or scores.flagged is None:
        return ""
    kinds = _kinds(scores)
    widest = max(0.1, ceil(10 * float(scores.variability.nan_to_num().max())) / 10)
    parts = _axes((0, widest), (0, 1), "variability of the given label's probability", "confidence")
    for style, (_, mask) in kinds.items():
        chosen = _thinned(mask.nonzero()[:, 0])
        places = zip(scores.variability[chosen].tolist(), scores.confidence[chosen].tolist(), strict=True)
        parts += [f'<circle class="{style}" cx="{_x(v / widest):.1f}" cy="{_y(c):.1f}" r="2.6"/>' for v, c in places]
    return _marks(kinds) + _svg(parts, "Confidence by variability of each example")


def ranked_norms(scores: AuditScores, planted: Tensor | None = None) -> str:
    """Mean gradient norms from the largest to the smallest on a logarithmic scale; empty without norms.

    Args:
        planted: mask, (N,), of known errors, marked where no label is doubted, as in a regression.
    """
    if scores.mean_norm is None:
        return ""
    order = scores.mean_norm.nan_to_num(nan=-1).argsort(descending=True, stable=True)
    order = order[scores.mean_norm[order] > 0]
    if len(order) < 2:
        return ""
    values = scores.mean_norm[order].log10()
    low, high = floor(float(values[-1])), max(ceil(float(values[0])), floor(float(values[-1])) + 1)
    places = (values - low) / (high - low)
    parts = _axes((1, len(order)), (low, high), "rank by mean norm", "mean gradient norm", decades=True)
    shown = torch.linspace(0, len(order) - 1, min(len(order), 400)).long()
    points = " ".join(
        f"{_x(k / (len(order) - 1)):.1f},{_y(v):.1f}"
        for k, v in zip(shown.tolist(), places[shown].tolist(), strict=True)
    )
    parts.append(f'<polyline class="curve" points="{points}"/>')
    kinds = _kinds(scores, planted)
    for style, (_, mask) in kinds.items():
        chosen = [] if style == "usual" else _thinned(mask[order].nonzero()[:, 0]).tolist()
        parts += [
            f'<circle class="{style}" cx="{_x(k / (len(order) - 1)):.1f}" cy="{_y(float(places[k])):.1f}" r="2.6"/>'
            for k in chosen
        ]
    return _marks(kinds) + _svg(parts, "Mean gradient norms in order of their size")


def _kinds(scores: AuditScores, planted: Tensor | None = None) -> dict[str, tuple[str, Tensor]]:
    """How the examples are marked in a chart: {style: (what it means, mask)}, the usual ones first."""
    marked = {}
    if scores.flagged is not None:
        marked["doubted"] = ("likely mislabelled", scores.flagged)
    elif planted is not None:
        marked["doubted"] = ("planted error", planted)
    if scores.planted is not None:
        marked["changed"] = ("label flipped to calibrate", scores.planted)
    usual = scores.times_seen > 0
    for _, mask in marked.values():
        usual = usual & ~mask
    return {"usual": ("other examples", usual)} | marked


def _marks(kinds: dict[str, tuple[str, Tensor]]) -> str:
    """The legend; empty where there is one kind."""
    if len(kinds) == 1:
        return ""
    dot = '<svg viewBox="0 0 12 12" aria-hidden="true"><circle class="{}" cx="6" cy="6" r="4.5"/></svg>'
    items = "".join(f"<li>{dot.format(style)}{escape(name)}</li>" for style, (name, _) in kinds.items())
    return f'<ul class="marks">{items}</ul>'


def given_by_suggested(scores: AuditScores, classes: Sequence[str] | None = None) -> str:
    """How many flagged examples of each given label (row) got each suggested one (column); empty if none is flagged."""
    if scores.flagged is None or scores.given is None or scores.suggested is None or not scores.flagged.any():
        return ""
    given, suggested = scores.given[scores.flagged], scores.suggested[scores.flagged]
    n = len(classes) if classes is not None else int(torch.stack([given, suggested]).max()) + 1
    counts = torch.bincount(given * n + suggested, minlength=n * n).view(n, n).double()
    return _matrix(counts, _names(classes, n), lambda value: f"{value:.0f}" if value else "", float(counts.max()))


def class_conflict(cosines: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Mean cosine between the gradients of the examples of two classes, (n_classes, n_classes).

    The pairs of an example with itself are left out; NaN where no pair is left. Negative entries mean that a step that
    helps one class hurts the other.

    Args:
        cosines: of B examples' gradients, (B, B), as `Jacobian.cosines()` gives them; NaN (of a gradient of 0) is left
            out.
        labels: their labels, (B,).
    Raises:
        InputError: the shapes do not fit.
    """
    if cosines.shape != (len(labels), len(labels)):
        raise InputError(
            f"cosines have shape {tuple(cosines.shape)}; expected {len(labels)} by {len(labels)}, as labels"
        )
    member = torch.nn.functional.one_hot(labels.cpu(), n_classes).double()
    known = ~cosines.cpu().isnan() & ~torch.eye(len(labels), dtype=torch.bool)
    values = torch.where(known, cosines.cpu().double(), 0.0)
    return member.T @ values @ member / (member.T @ known.double() @ member)


def conflict_matrix(conflict: Tensor, classes: Sequence[str] | None = None) -> str:
    """`class_conflict` as a table, the negative entries marked; the darkest is the largest between two classes."""
    between = conflict.nan_to_num().abs().fill_diagonal_(0)
    return _matrix(conflict, _names(classes, len(conflict)), _signed, float(between.max()), marks=lambda v: v < 0)


def _signed(value: float) -> str:
    text = f"{value:+.2f}"
    return text[1:] if float(text) == 0 else text


ALWAYS = (
    "The result depends on the model: the examples were judged by what this network learned from this data.",
    "Redundant says that little was learned from an example here, not that it may be deleted.",
)
OF_LABELS = (
    "A flag is a question, not a verdict: rare but right examples are flagged too, most often in small classes.",
    "Errors that repeat a pattern (one class always taken for another) are learned, and the model will confirm them.",
    "A network that trains long enough learns wrong labels by heart; means over training suffer less, but they do.",
)
OF_QUANTITIES = ("A large loss may be a wrong target, a missing input, or an unusual example that is right.",)
OF_FLIPS = ("Flips fall at random. Real errors concentrate on hard examples, so expect to find fewer of them.",)


def caveats(scores: AuditScores, further: Sequence[str] = ()) -> str:
    """What the page does not prove; `further` are caveats of its own, as HTML."""
    found = [*ALWAYS, *(OF_QUANTITIES if scores.flagged is None else OF_LABELS)]
    if scores.calibration is not None:
        found += OF_FLIPS
    return f'<ul class="plain">{"".join(f"<li>{text}</li>" for text in (*found, *further))}</ul>'


def _names(classes: Sequence[str] | None, n: int) -> list[str]:
    return [str(k) for k in range(n)] if classes is None else [str(name) for name in classes]


def _matrix(values: Tensor, names: list[str], text, largest: float, marks=lambda value: True) -> str:
    """A table of shaded cells, of at most `MOST_CLASSES` classes."""
    size = values.nan_to_num().abs()
    busiest = (size.amax(dim=0) + size.amax(dim=1)).argsort(descending=True, stable=True)
    kept = sorted(busiest[:MOST_CLASSES].tolist())
    short = {k: elided(names[k], NAME) for k in kept}
    key = ""
    if len(set(short.values())) < len(kept):  # names that differ in what was left out
        short = {k: elided(f"{k}: {names[k]}", NAME) for k in kept}
        key = f'<ul class="names soft">{"".join(f"<li>{k}: {escape(names[k])}</li>" for k in kept)}</ul>'
    heads = "".join(f'<th scope="col" title="{escape(names[k])}">{escape(short[k])}</th>' for k in kept)
    rows = [
        f'<tr><th scope="row" title="{escape(names[i])}">{escape(short[i])}</th>'
        + "".join(_cell(float(values[i, j]), text, largest, marks) for j in kept)
        + "</tr>"
        for i in kept
    ]
    left = len(names) - len(kept)
    rest = f'<p class="soft">{left} more classes have smaller entries.</p>' if left else ""
    table = f'<table class="matrix"><tr><td></td>{heads}</tr>{"".join(rows)}</table>'
    return f'<div class="scroll">{table}</div>{rest}{key}'


def _cell(value: float, text, largest: float, marks) -> str:
    if value != value:
        return "<td></td>"
    share = 65 * min(1.0, abs(value) / largest) if largest else 0.0
    color = "--mark" if marks(value) else "--rest"
    return f'<td style="background: color-mix(in srgb, var({color}) {share:.0f}%, transparent)">{text(value)}</td>'


def _thinned(positions: Tensor) -> Tensor:
    return positions[:: max(1, -(-len(positions) // MOST_DOTS))]


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _axes(
    across: tuple[float, float], up: tuple[float, float], x_label: str, y_label: str, decades: bool = False
) -> list[str]:
    parts = [f'<text x="0" y="13">{escape(y_label)}{", log scale" if decades else ""}</text>']
    for share in _steps(int(up[1] - up[0])) if decades else (0.0, 0.25, 0.5, 0.75, 1.0):
        value = up[0] + share * (up[1] - up[0])
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{_y(share):.1f}" x2="{WIDTH - RIGHT}" y2="{_y(share):.1f}"/>')
        shown = number(10.0 ** round(value)) if decades else number(value)
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{_y(share) + 4:.1f}">{shown}</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = across[0] + share * (across[1] - across[0])
        shown = number(round(value)) if decades else number(value)
        parts.append(f'<text class="middle" x="{_x(share):.1f}" y="{HEIGHT - BOTTOM + 21}">{shown}</text>')
    parts.append(f'<text class="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}">{escape(x_label)}</text>')
    return parts


def _steps(n: int) -> list[float]:
    """Shares of the axis at whole decades, at most seven."""
    every = -(-n // 6)
    return [k / n for k in range(0, n + 1, every)]


def _svg(parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f"{''.join(parts)}</svg>"
    )
