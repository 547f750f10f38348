"""What the tests of the seeds share: float64 leaves, and comparison with numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


def leaf(*shape: int) -> Tensor:
    """Normal numbers; for no shape one number."""
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def given(values: Any) -> Tensor:
    """These numbers."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def plain(t: Tensor) -> Array:
    return t.detach().numpy()


def assert_same(found: Any, by_hand: Any) -> None:
    """Equal to rounding, in the same shape: 1e-10 of the largest entry."""
    found, by_hand = (np.asarray(plain(t) if isinstance(t, Tensor) else t) for t in (found, by_hand))
    assert found.shape == by_hand.shape, f"shape {found.shape}, by hand {by_hand.shape}"
    np.testing.assert_allclose(found, by_hand, rtol=1e-10, atol=1e-10 * float(np.abs(by_hand).max(initial=0)))


def sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))
