"""Options that several commands have: how a table is read, and how a model is trained on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from rowgrad.cli.audit import NaN, Task
from rowgrad.errors import InputError
from rowgrad.optim.factory import OPTIMIZERS
from rowgrad.training.recipe import Recipe

DATA_HELP = "digits, breast_cancer, wine, iris, diabetes, or a CSV, Parquet or NPZ file."


def reading(
    target: Annotated[str | None, typer.Option(help="Column (or NPZ array) to predict.")] = None,
    task: Annotated[Task | None, typer.Option(help="What the target is; default by its values.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Column to leave out; may be repeated.")] = None,
    categorical: Annotated[
        list[str] | None, typer.Option(help="Column of numbers to one-hot encode; may be repeated.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Column to count the words of; default: those in sentences; may be repeated."),
    ] = None,
    nan: Annotated[NaN, typer.Option(help="NaN in a feature: refuse it, or take it for a missing value.")] = NaN.ERROR,
) -> dict[str, Any]:
    """Options of `read_table`."""
    columns = {"drop": drop or (), "categorical": categorical or (), "text": text or ()}
    return {"target": target, "task": task, "nan": nan} | columns


def recipe(
    model: Annotated[
        str, typer.Option(help="mlp:WIDTHS, cnn:CHANNELS for images, lstm:UNITS for sequences, autoencoder:WIDTHS.")
    ] = Recipe.model,
    act: Annotated[str, typer.Option(help="Activation of hidden layers, or maxout.")] = Recipe.act,
    alpha: Annotated[float | None, typer.Option(help="Slope of leaky_relu below 0.")] = None,
    norm: Annotated[str, typer.Option(help="batch-pre, batch-post, layer or none.")] = Recipe.norm,
    bn_statistics: Annotated[
        str, typer.Option(help="Of batch norms outside training: running, or population (the whole training part).")
    ] = Recipe.bn_statistics,
    dropout: Annotated[float, typer.Option(help="Share of hidden units left out in a step.")] = Recipe.dropout,
    init: Annotated[str | None, typer.Option(help="lecun, he, glorot or pretrain; default PyTorch's.")] = None,
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")] = Recipe.optimizer,
    optimizer_option: Annotated[
        list[str] | None, typer.Option(help="Of the optimizer, as momentum=0.95 or eps_inside=true; may be repeated.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default by the optimizer.")] = None,
    decay: Annotated[str | None, typer.Option(help="Of the rate by the epoch: exponential or inverse.")] = None,
    decay_rate: Annotated[float, typer.Option(help="How fast the rate falls, per epoch.")] = Recipe.decay_rate,
    l2: Annotated[float, typer.Option(help="Penalty on weights; not on biases and norms.")] = Recipe.l2,
    clip_norm: Annotated[float | None, typer.Option(help="Bound on the norm of the gradient.")] = None,
    clip_mode: Annotated[
        str, typer.Option(help="norm: --clip-norm is a cap; normalize: every gradient gets that norm.")
    ] = Recipe.clip_mode,
    clip_value: Annotated[float | None, typer.Option(help="Bound on each entry of the gradient.")] = None,
    standardize: Annotated[bool, typer.Option(help="Features of mean 0 and variance 1.")] = True,
    whiten: Annotated[bool, typer.Option("--whiten", help="Principal directions of variance 1.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples in a step; default 32 to 256 by their number, all for second order.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data, at most.")] = Recipe.epochs,
    val: Annotated[float, typer.Option(help="Share of the examples held out.")] = Recipe.val,
    patience: Annotated[
        int, typer.Option(help="Epochs without improvement before it stops; 0: never.")
    ] = Recipe.patience,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> Recipe:
    """How to train."""
    prepare = "standardize" if standardize else "none"
    if whiten:
        prepare = "whiten" if standardize else "whiten-raw"
    return Recipe(
        model=model,
        act=act,
        alpha=alpha,
        norm=norm,
        dropout=dropout,
        init=init,
        optimizer=optimizer,
        lr=lr,
        decay=decay,
        decay_rate=decay_rate,
        l2=l2,
        clip_norm=clip_norm,
        clip_mode=clip_mode,
        clip_value=clip_value,
        bn_statistics=bn_statistics,
        optimizer_options=dict(map(_option, optimizer_option or ())),
        prepare=prepare,
        batch_size=batch_size,
        epochs=epochs,
        val=val,
        patience=patience,
        seed=seed,
    )


def _option(text: str) -> tuple[str, Any]:
    """A name and a value: true, false, none, a number, numbers separated by commas, or a word."""
    name, sign, value = text.partition("=")
    if not sign or not name or not value:
        raise InputError(f"--optimizer-option {text}: expected NAME=VALUE, such as momentum=0.95")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    try:
        numbers = [int(part) if part.strip().lstrip("+-").isdigit() else float(part) for part in value.split(",")]
    except ValueError:
        return name, value
    return name, numbers[0] if len(numbers) == 1 else tuple(numbers)


MAKERS: dict[str, Callable[..., Any]] = {"reading": reading, "recipe": recipe}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters `reading` and `recipe` are given as the options that each is made of."""
    own = inspect.signature(command, eval_str=True).parameters
    made = {name: list(inspect.signature(MAKERS[name], eval_str=True).parameters.values()) for name in MAKERS}
    made = {name: options for name, options in made.items() if name in own}

    @wraps(command)
    def called(**given: Any) -> None:
        parts = {name: MAKERS[name](**{o.name: given.pop(o.name) for o in options}) for name, options in made.items()}
        command(**given, **parts)

    everything = [p for p in own.values() if p.name not in MAKERS] + [o for options in made.values() for o in options]
    called.__signature__ = inspect.Signature(everything)  # pyright: ignore[reportAttributeAccessIssue]  (read by Typer)
    called.__annotations__ = {p.name: p.annotation for p in everything}
    return called
