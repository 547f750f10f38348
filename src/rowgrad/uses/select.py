"""Which examples to train on, chosen by what an audit saw."""

import warnings

import torch
from torch import Tensor

from rowgrad.errors import InputError, RowgradWarning
from rowgrad.uses.expected import GENERATOR, Expected, check, is_number, is_whole, number
from rowgrad.uses.scores import AuditScores

PREFERENCES = ("high", "random", "low")
EXPECTED = {
    "keep": number("a share above 0 and at most 1", lambda v: 0 < v <= 1),
    "prefer": Expected(f"one of {', '.join(PREFERENCES)}", lambda v: v in PREFERENCES),
    "generator": GENERATOR,
}
ENOUGH = 0.2  # share to keep below which hard examples alone taught less than random ones
DOUBTED = 0.05  # share of flagged examples among the chosen from which high losses are mostly wrong labels


def select(
    scores: AuditScores,
    keep: float = 0.4,
    drop_top: str | float = "flags",
    prefer: str = "high",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Positions of the examples to train on; see `Audit.select`."""
    check("select", {"keep": keep, "prefer": prefer, "generator": generator}, EXPECTED)
    known = scores.times_seen > 0
    if scores.planted is not None:
        known = known & ~scores.planted
    n_known = int(known.sum())
    left = (known & ~_dropped(scores, drop_top, n_known)).nonzero()[:, 0]
    n = max(1, round(keep * n_known))
    if prefer == "random":
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        order = torch.randperm(len(left), generator=generator)
    else:
        order = scores.mean_loss[left].argsort(descending=prefer == "high", stable=True)
    chosen = left[order[:n]].sort().values
    for message in (
        scores.doubt and f"the audit says little of what to choose: {scores.doubt}",
        len(left) < n
        and keep < 1
        and f"keep={keep:g} asks for {n} examples; without those dropped {len(left)} are left",
        n < len(left) and _why_random_is_better(scores, chosen, keep, prefer),
    ):
        if message:
            warnings.warn(message, RowgradWarning, stacklevel=3)
    return chosen


def _dropped(scores: AuditScores, drop_top: str | float, n_known: int) -> Tensor:
    """A mask of the examples to leave out."""
    if drop_top == "flags":
        if scores.flagged is None:
            raise InputError(
                'select(drop_top="flags"): this audit has no labels and no flags of wrong ones; give drop_top as a '
                "share or number of the ranking"
            )
        return scores.flagged
    is_count = is_whole(drop_top)
    if isinstance(drop_top, str) or not is_number(drop_top) or not 0 <= drop_top < (n_known if is_count else 1):
        raise InputError(
            f'select(drop_top={drop_top!r}): expected "flags", a share of at least 0 and below 1, or a whole number '
            f"below the {n_known} examples seen"
        )
    return scores.rank <= (int(drop_top) if is_count else round(float(drop_top) * n_known))


def _why_random_is_better(scores: AuditScores, chosen: Tensor, keep: float, prefer: str) -> str:
    """In a sentence; empty where it is not known to be."""
    doubted = 0 if scores.flagged is None else int(scores.flagged[chosen].sum())
    if prefer == "low":
        reason = "examples with low losses teach little that the others do not"
    elif prefer == "high" and doubted > DOUBTED * len(chosen):
        reason = f'{doubted} of the {len(chosen)} chosen are flagged as likely mislabelled; use drop_top="flags" too'
    elif prefer == "high" and keep < ENOUGH:
        reason = f"of a share of {keep:g}, the hardest alone do not show what is usual"
    else:
        return ""
    return f'random is likely the better choice here (prefer="random"): {reason}'
