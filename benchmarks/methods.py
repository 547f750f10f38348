"""Every method, ours first."""

from __future__ import annotations

from benchmarks import ours
from benchmarks.rivals import (
    backpack_extensions,
    captum_tracin,
    opacus_hooks,
    torch_autograd,
    torch_func,
    torchjd_engine,
)
from benchmarks.task import Method

MODULES = (ours, opacus_hooks, backpack_extensions, torchjd_engine, torch_func, captum_tracin, torch_autograd)
METHODS: list[Method] = [method for module in MODULES for method in module.METHODS]


def methods_for(output: str) -> list[Method]:
    return [m for m in METHODS if output in m.outputs]
