"""The options that `rowgrad train` has for a recipe, for commands that train by one, too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any

from rowgrad.cli.train import train
from rowgrad.training.recipe import Recipe

_FIELDS = {field.name for field in fields(Recipe)}
_PREPARE = ("standardize", "whiten")  # options that together make up `Recipe.prepare`
OPTIONS = [p for name, p in inspect.signature(train).parameters.items() if name in _FIELDS or name in _PREPARE]


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Puts the options of a recipe in the place of the command's last parameter, `recipe`, which is made of them."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]

    @wraps(command)
    def called(**given: Any) -> None:
        options = {p.name: given.pop(p.name) for p in OPTIONS}
        standardize, whiten = (options.pop(name) for name in _PREPARE)
        prepare = "whiten" if whiten else "standardize" if standardize else "none"
        command(**given, recipe=Recipe(**options, prepare=prepare))

    everything = [*own, *OPTIONS]
    called.__signature__ = inspect.Signature(everything)  # pyright: ignore[reportAttributeAccessIssue]  (read by Typer)
    called.__annotations__ = {p.name: p.annotation for p in everything}
    return called
