"""What `graph`, `diagnose` and `check` look at: a model and a closure, from the user's function or a bundled data set.

The function is named as `package.module:function`. It is called without arguments and returns (model, closure), where
`closure()` runs the forward pass and returns the loss: a scalar, or better the vector of the examples' losses. The
current directory is searched for the module first, as `python -m` does.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rowgrad.data.bundled import BUNDLED
from rowgrad.data.readers import read_table
from rowgrad.data.table import standardize
from rowgrad.errors import InputError, UserCodeError
from rowgrad.training.mlp import mlp
from rowgrad.training.settings import Settings
from rowgrad.training.step import Criterion, label_losses, squared_losses

SOURCE_HELP = f"package.module:function, which returns (model, closure); or {', '.join(BUNDLED)}."
N_EXAMPLES = 64  # of a bundled data set
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Live:
    """A model and the forward pass to be looked at; `closure` tells errors of the user's code from ours.

    `is_new` says whether the weights are known to be as they were drawn.
    """

    name: str
    model: nn.Module
    closure: Callable[[], Tensor]
    is_new: bool = False


def load(source: str) -> Live:
    """The model and closure that `source` names.

    Raises:
        InputError: no such data set, module or function, or the function returns something else.
        UserCodeError: the user's own code raised; the message ends in their traceback.
    """
    if source in BUNDLED:
        return _bundled(source)
    module_name, colon, function_name = source.partition(":")
    if not (colon and function_name.isidentifier() and all(map(str.isidentifier, module_name.split(".")))):
        raise InputError(
            f"{source}: name a function as package.module:function, or one of the data sets {', '.join(BUNDLED)}"
        )
    returned = _called(source, _function(module_name, function_name))
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise InputError(f"{source} returned {_kind(returned)}, expected a pair (model, closure)")
    model, closure = cast("tuple[Any, Any]", returned)
    if not isinstance(model, nn.Module):
        raise InputError(f"{source}: the model is {_kind(model)}, expected a torch.nn.Module")
    if not callable(closure):
        raise InputError(f"{source}: the closure is {_kind(closure)}, expected a function that returns the loss")
    return Live(source, model, _guarded(f"the closure of {source}", closure))


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}" + (
        f" and length {len(value)}" if isinstance(value, (tuple, list)) else ""
    )


def _function(module_name: str, function_name: str) -> Callable[[], Any]:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with _user_code(f"importing {module_name}"):
            module = importlib.import_module(module_name)
    except UserCodeError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name in _prefixes(module_name):
            raise InputError(
                f"{module_name}: no module of this name, looked for in {Path.cwd()} and the installed packages"
            ) from cause
        raise
    found = getattr(module, function_name, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(f"{module_name} has no function {function_name!r}; found {', '.join(names[:8]) or 'none'}")
    return found


def _prefixes(module_name: str) -> set[str]:
    parts = module_name.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


def _called(source: str, function: Callable[[], Any]) -> Any:
    with _user_code(f"{source}()"):
        return function()


def _guarded(name: str, closure: Callable[..., Any]) -> Callable[..., Tensor]:
    def guarded(*args: Any) -> Tensor:
        with _user_code(name):
            losses = closure(*args)
        if not isinstance(losses, Tensor):
            raise InputError(f"{name} returned {_kind(losses)}, expected the loss as a tensor")
        return losses

    return guarded


@contextmanager
def _user_code(what: str) -> Iterator[None]:
    """Whatever is raised inside is the user's: one clear line, and their frames of the traceback under it."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_ours(f)]
        shown = ["Traceback (most recent call last):\n", *traceback.format_list(frames)]
        shown += traceback.format_exception_only(error)
        raise UserCodeError(f"{what} raised {type(error).__name__}: {error}", "".join(shown).rstrip()) from error


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return Path(frame.filename).parent == HERE or "importlib" in frame.filename


def _bundled(name: str) -> Live:
    """A perceptron as `rowgrad audit` trains it, at initialization, and the first examples of the data set."""
    settings = Settings()
    generator = torch.Generator().manual_seed(settings.seed)
    table = read_table(name)
    chosen = torch.randperm(len(table), generator=generator)[:N_EXAMPLES]
    inputs, _, _ = standardize(table.features, chosen)
    targets = table.targets[chosen]
    if table.classes is None:
        targets = ((targets - targets.mean()) / targets.std(correction=0)).float()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        model = mlp(inputs.shape[1], settings.hidden, table.n_outputs, dropout=0.0)
    losses: Criterion = squared_losses if table.classes is None else label_losses
    return Live(name, model, lambda: losses(model(inputs[chosen]), targets), is_new=True)
