"""What every test has: fixed seeds, one thread, warnings as errors (pyproject.toml), and the check for leftovers."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager

import hypothesis
import numpy as np
import pytest
import torch

from tests.leftovers import nothing_left_behind

torch.set_num_threads(1)

hypothesis.settings.register_profile("rowgrad", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile("rowgrad")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the global generator, which third-party code draws from)
    torch.manual_seed(0)


@pytest.fixture
def leaves_nothing_behind() -> Callable[..., AbstractContextManager[None]]:
    """`with leaves_nothing_behind(model, losses): ...`, see `nothing_left_behind`."""
    return nothing_left_behind
