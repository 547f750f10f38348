"""How well an audit finds errors that were planted on purpose."""

from dataclasses import dataclass

import torch

from rowgrad.errors import InputError
from rowgrad.uses.calibration import wilson
from rowgrad.uses.scores import AuditScores


@dataclass(frozen=True)
class PlantedScores:
    """Of n_planted planted errors, how many an audit finds.

    precision, recall: of the flags; None where nothing can be flagged (regression), and precision where nothing was.
    precision_interval, recall_interval, precision_at_k_interval: each one's 95% interval (Wilson 1927), as for other
        errors drawn at random.
    average_precision: of the ranking: the mean, over the planted errors, of the precision down to that error.
    precision_at_k: share of planted errors among the first n_planted examples of the ranking.
    by_column: average precision if the examples were ranked by that score instead.
    """

    n_planted: int
    n_found: int | None
    precision: float | None
    recall: float | None
    average_precision: float
    precision_at_k: float
    by_column: dict[str, float]
    precision_interval: tuple[float, float] | None
    recall_interval: tuple[float, float] | None
    precision_at_k_interval: tuple[float, float]


def score_planted(scores: AuditScores, planted: torch.Tensor) -> PlantedScores:
    """Compare flags and ranking with the mask of planted errors, shape (N,).

    Raises:
        InputError: no error was planted.
    """
    n_planted = int(planted.sum())
    if not n_planted:
        raise InputError("no error was planted; there is nothing to find")
    flagged = scores.flagged
    n_found = None if flagged is None else int((flagged & planted).sum())
    n_flagged = 0 if flagged is None else int(flagged.sum())
    n_first = int(planted[scores.order()[:n_planted]].sum())
    return PlantedScores(
        n_planted=n_planted,
        n_found=n_found,
        precision=n_found / n_flagged if n_found is not None and n_flagged else None,
        recall=None if n_found is None else n_found / n_planted,
        average_precision=average_precision(planted[scores.order()]),
        precision_at_k=n_first / n_planted,
        by_column={name: average_precision(planted[order]) for name, order in _rankings(scores).items()},
        precision_interval=None if n_found is None or not n_flagged else wilson(n_found, n_flagged),
        recall_interval=None if n_found is None else wilson(n_found, n_planted),
        precision_at_k_interval=wilson(n_first, n_planted),
    )


def average_precision(hits: torch.Tensor) -> float:
    """Mean, over the hits of a ranking, of the precision down to that hit; `hits` is a mask in order of rank."""
    found = hits.double()
    precision = found.cumsum(0) / torch.arange(1, len(found) + 1)
    return float((precision * found).sum() / found.sum())


def _rankings(scores: AuditScores) -> dict[str, torch.Tensor]:
    """Orders of the examples, most suspicious first, by single scores."""
    suspicion = {
        "mean loss": scores.mean_loss,
        "final loss": scores.final_loss,
        "mean margin": None if scores.mean_margin is None else -scores.mean_margin,
        "mean gradient norm": scores.mean_norm,
        "final gradient norm": scores.final_norm,
    }
    return {
        name: values.argsort(descending=True, stable=True) for name, values in suspicion.items() if values is not None
    }
