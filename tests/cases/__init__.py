"""Small models on which the laws of the rows are tested, one file a family."""

from tests.cases import (  # noqa: F401  (each enters its cases into the table)
    attacks,
    attention,
    convolution,
    coupled,
    embedding,
    layouts,
    linear,
    losses,
    networks,
    normalization,
    operations,
    recurrent,
    sharing,
    weights,
)
from tests.cases.table import CASES, Case, Setup

__all__ = ["CASES", "Case", "Setup"]
