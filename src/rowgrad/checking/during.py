"""A few gradient checks during training (Aggarwal 2018, section 3.3: at a sample of the weights, a few times)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from rowgrad.checking.gradients import GradientFinding, check_gradients
from rowgrad.checking.report import Report
from rowgrad.errors import RowgradWarning, WrongGradientError
from rowgrad.parameters import Params


class GradientChecks:
    """Checks gradients at some steps of a training loop, each time at other entries and along other directions.

    Args:
        model: as for `check_gradients`.
        at: the steps at which to check.
        n: entries to move in one check.
        on_failure: "raise" `WrongGradientError`, "warn", or "keep" silent and only keep the report.
        options: further arguments of `check_gradients`.
    Attributes:
        reports: {step: report}.
    Raises:
        ValueError: an unknown `on_failure`.

    >>> import torch, rowgrad
    >>> model = torch.nn.Linear(3, 2)
    >>> x = torch.randn(4, 3)
    >>> checks = rowgrad.GradientChecks(model, at=(0, 2), n=4)
    >>> for step in range(3):
    ...     report = checks(step, lambda: model(x).square().sum(1))
    >>> {step: report.ok for step, report in checks.reports.items()}
    {0: True, 2: True}
    """

    def __init__(
        self,
        model: Params,
        at: Collection[int] = (0, 100, 1000),
        *,
        n: int = 20,
        on_failure: str = "raise",
        **options: Any,
    ) -> None:
        if on_failure not in {"raise", "warn", "keep"}:
            raise ValueError(f"on_failure={on_failure!r}: expected 'raise', 'warn' or 'keep'")
        self.model, self.at, self.n, self.on_failure, self.options = model, frozenset(at), n, on_failure, options
        self.reports: dict[int, Report[GradientFinding]] = {}

    def __call__(self, step: int, closure: Callable[[], Tensor]) -> Report[GradientFinding] | None:
        """The report of this step, None where none is due.

        Args:
            step: the number of the step.
            closure: the forward pass on this step's batch; returns the losses.
        Raises:
            WrongGradientError: a fault was found, and `on_failure` is "raise".
            RowgradError: as for `check_gradients`.
        """
        if step not in self.at:
            return None
        options: dict[str, Any] = {"generator": torch.Generator().manual_seed(step)} | self.options
        report = check_gradients(closure, self.model, self.n, **options)
        self.reports[step] = report
        if not report.ok and self.on_failure == "raise":
            raise WrongGradientError(f"step {step}: {report}")
        if not report.ok and self.on_failure == "warn":
            warnings.warn(f"step {step}: {report}", RowgradWarning, stacklevel=2)
        return report
