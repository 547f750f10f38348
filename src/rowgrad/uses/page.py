"""The page of an audit in a loop of the user's own: one HTML file that needs nothing else, without script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rowgrad.errors import InputError
from rowgrad.graph.lettering import escape
from rowgrad.uses import sections
from rowgrad.uses.gallery import cards
from rowgrad.uses.scores import AuditScores

N_CARDS = 24

STYLE = (
    """
:root { color-scheme: light dark; --page: #f7f6f3; --card: #fff; --ink: #1d1c1a; --soft: #5c5955; --line: #e2dfd9;
  --mark: #b8400e; --mark-soft: #fbe9df; --rest: #8d97a1; }
@media (prefers-color-scheme: dark) { :root { --page: #151618; --card: #1e2023; --ink: #eceae6; --soft: #a9a6a0;
  --line: #34373b; --mark: #ff9a62; --mark-soft: #43281a; --rest: #7a838c; } }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif; }
main { max-width: 1152px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 8px; } h2 { font-size: 1.3rem; margin: 48px 0 8px; }
p { margin: 0 0 12px; max-width: 72ch; } .soft, .numbers { color: var(--soft); font-size: 0.85rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin: 12px 0 0; }
.suspects { list-style: none; margin: 0; padding: 0; display: grid; gap: 0 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); }
.suspects img { image-rendering: pixelated; border-radius: 6px; display: block; margin: 6px 0; }
.who { color: var(--soft); font-size: 0.9rem; } .who b { color: var(--ink); } .labels { margin: 4px 0; }
.labels .new { color: var(--mark); font-weight: 650; }
.badge { font-size: 0.75rem; padding: 0 7px; border-radius: 10px; background: var(--mark-soft); color: var(--mark); }
dl { display: grid; grid-template-columns: 1fr 1fr; gap: 2px 12px; font-size: 0.9rem; margin: 6px 0; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; } ul.plain { padding-left: 20px; max-width: 72ch; }
"""
    + sections.STYLE
)


def audit_page(
    scores: AuditScores,
    n_classes: int | None,
    *,
    title: str = "Audit",
    classes: Sequence[str] | None = None,
    examples: Any = None,
    conflict: Any = None,
    further: Mapping[str, str] | None = None,
) -> str:
    """The page as HTML; see `Audit.report`."""
    if classes is not None and len(classes) != (n_classes or 0):
        raise InputError(
            f"classes names {len(classes)} labels, the audit has {n_classes or 'none'}; name each, in the order of "
            "their numbers"
        )
    n_seen = int((scores.times_seen > 0).sum())
    shown = [k for k in scores.order()[:N_CARDS].tolist() if scores.times_seen[k] > 0]
    parts = {
        "In short": sections.summary(scores),
        "Suspects": "<p>The first of the ranking by mean loss.</p>" + cards(scores, shown, examples, classes),
        "Data map": sections.data_map(scores),
        "Ranked gradient norms": sections.ranked_norms(scores),
        "Flagged: given label by suggested label": sections.given_by_suggested(scores, classes),
        "Classes that pull against each other": _conflict(conflict, n_classes, classes),
        **(further or {}),
        "How far to trust this": sections.caveats(scores),
    }
    body = "".join(f"<section><h2>{escape(name)}</h2>{html}</section>" for name, html in parts.items() if html)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f'<body><main class="audit"><h1>{escape(title)}</h1>'
        f"<p>{n_seen:,} of {len(scores.rank):,} examples were seen in training.</p>{body}</main></body></html>\n"
    )


def _conflict(conflict: Any, n_classes: int | None, classes: Sequence[str] | None) -> str:
    if conflict is None:
        return ""
    found = torch.as_tensor(conflict)
    if found.shape != (n_classes, n_classes):
        raise InputError(
            f"conflict has shape {tuple(found.shape)}; expected ({n_classes}, {n_classes}), a cosine for each pair of "
            "the audit's classes, as `rowgrad.uses.sections.class_conflict` gives them"
        )
    return "<p>Mean cosine between the gradients of two classes.</p>" + sections.conflict_matrix(found, classes)
