"""Which module an operation ran in: the one thing about a graph that has to be watched while it is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rowgrad.errors import ParameterError
from rowgrad.tape import clock


@dataclass
class Scopes:
    """What `trace` saw: for each run of a module when it began and ended, in counts of recorded operations."""

    spans: list[tuple[int, int, str]] = field(default_factory=list)  # begin, end, dotted name; inner before outer

    def of(self, time: int) -> str | None:
        """The innermost module that ran at this time: "" for the model itself, None where none ran."""
        return next((name for begin, end, name in self.spans if begin <= time < end), None)

    def runs(self, name: str) -> int:
        """How often the module of this name ran."""
        return sum(span[2] == name for span in self.spans)


@contextmanager
def trace(model: nn.Module) -> Iterator[Scopes]:
    """Watch a forward pass, so that `Graph(loss, model, trace=scopes)` knows the module of each operation.

    Hooks stand on the modules while the block runs and are removed at its end, also after an error. Only what runs in
    the thread of the block is seen.

    Args:
        model: the module whose sub-modules give the names.
    Yields:
        `Scopes`, to be handed to `Graph`.
    Raises:
        ParameterError: `model` is not a module.

    >>> import torch, rowgrad
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    >>> with rowgrad.trace(model) as scopes:
    ...     loss = model(torch.ones(2, 3)).sum()
    >>> [v.name for v in rowgrad.Graph(loss, model, trace=scopes).vertices if v.op == "relu"]
    ['1: relu']
    """
    if not isinstance(model, nn.Module):
        raise ParameterError(f"trace watches a torch.nn.Module, found a {type(model).__name__}")
    scopes, begun = Scopes(), dict[str, list[int]]()

    def enter(name: str) -> None:
        begun.setdefault(name, []).append(clock())

    def leave(name: str) -> None:
        if begun.get(name):
            scopes.spans.append((begun[name].pop(), clock(), name))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(_calls(enter, name)).remove)
            stack.callback(module.register_forward_hook(_calls(leave, name), always_call=True).remove)
        yield scopes


def _calls(function: Any, name: str) -> Any:
    def hook(*_: object) -> None:
        function(name)

    return hook
