"""Every method, ours first."""

from __future__ import annotations

from benchmarks import ours
from benchmarks.rivals import autograd, backpack, captum, opacus, torch_func, torchjd
from benchmarks.task import Method

METHODS: list[Method] = [
    m for module in (ours, opacus, backpack, torchjd, torch_func, captum, autograd) for m in module.METHODS
]


def methods_for(output: str) -> list[Method]:
    return [m for m in METHODS if output in m.outputs]
