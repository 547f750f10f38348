"""Which examples to train on, chosen by what an audit saw."""

import warnings

import torch
from torch import Tensor

from rowgrad.errors import InputError, RowgradWarning
from rowgrad.uses.scores import AuditScores

PREFERENCES = ("high", "random", "low")
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
    if not 0 < keep <= 1:
        raise InputError(f"select(keep={keep}): the share to keep must be above 0 and at most 1")
    if prefer not in PREFERENCES:
        raise InputError(f"select(prefer={prefer!r}): expected one of {', '.join(PREFERENCES)}")
    known = scores.times_seen > 0
    if scores.planted is not None:
        known = known & ~scores.planted
    n_known = int(known.sum())
    left = (known & ~_dropped(scores, drop_top, n_known)).nonzero()[:, 0]
    n = max(1, round(keep * n_known))
    if prefer == "random":
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        order = torch.randperm(len(left), generator=generator, device=generator.device).cpu()
    else:
        order = scores.mean_loss[left].argsort(descending=prefer == "high", stable=True)
    chosen = left[order[:n]].sort().values
    if n < len(left):
        _say_if_random_is_better(scores, chosen, keep, prefer)
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
    is_count = isinstance(drop_top, int)
    if isinstance(drop_top, (str, bool)) or not 0 <= drop_top < (n_known if is_count else 1):
        raise InputError(
            f'select(drop_top={drop_top!r}): expected "flags", a share of at least 0 and below 1, or a whole number '
            f"below the {n_known} examples seen"
        )
    return scores.rank <= (drop_top if is_count else round(drop_top * n_known))


def _say_if_random_is_better(scores: AuditScores, chosen: Tensor, keep: float, prefer: str) -> None:
    doubted = 0 if scores.flagged is None else int(scores.flagged[chosen].sum())
    if prefer == "low":
        reason = "examples with low losses teach little that the others do not"
    elif prefer == "high" and doubted > DOUBTED * len(chosen):
        reason = f'{doubted} of the {len(chosen)} chosen are flagged as likely mislabelled; use drop_top="flags" too'
    elif prefer == "high" and keep < ENOUGH:
        reason = f"of a share of {keep:g}, the hardest alone do not show what is usual"
    else:
        return
    warnings.warn(f'random is likely the better choice here (prefer="random"): {reason}', RowgradWarning, stacklevel=4)
