"""Spaces of hyperparameters: what is tried, on a grid or between its ends, and how a space is narrowed (Aggarwal 2018,
section 3.3.1)."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from math import ceil, floor, isfinite, log10, prod
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from rowgrad.errors import InputError
from rowgrad.training.recipe import Recipe

Value = float | int | str | None
NOT_SEARCHED = {
    "val": "every run is judged on the same examples",
    "seed": "every run has its own",
    "epochs": "every run gets the same number of them",
    "optimizer_options": "they belong to one optimizer",
}
COMPANIONS = {
    "decay_rate": {"decay": "inverse"},
    "clip_mode": {"clip_norm": 1.0},
    "alpha": {"act": "leaky_relu"},
    "bn_statistics": {"norm": "batch-pre"},
}
SHAPES = ("layers", "units")  # together they make up a model: mlp:units,units,...
LEAST = {"layers": 1, "units": 1, "batch_size": 1, "dropout": 0, "l2": 0, "decay_rate": 0, "patience": 0}
MAX_POINTS = 1000
POINTS = 3  # on the grid, of an axis that does not say
EDGE = 0.05  # share of an axis, at each of its ends, that counts as its border
FORMS = "{values = [...]}, {low = ..., high = ..., points = ...} or {exponent = [..., ...], points = ...}"


@dataclass(frozen=True)
class Axis:
    """The values that one hyperparameter may take.

    Attributes:
        name: a field of `Recipe`, "layers" or "units".
        values: these alone; empty for a range.
        low, high: ends of a range, or of the exponent of ten if `log`.
        points: of a range on a grid, evenly spaced in what `low` and `high` are ends of.
        log: whether the exponent is uniform, not the value.
        whole: whether values are rounded to whole numbers.
    """

    name: str
    values: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    points: int = POINTS
    log: bool = False
    whole: bool = False

    @property
    def is_ordered(self) -> bool:
        """Whether its values are numbers, so that they have neighbours."""
        return all(isinstance(v, (int, float)) for v in self.values)

    def grid(self) -> tuple[Value, ...]:
        """The values on a grid, each once.

        >>> Axis("lr", low=-3, high=-1, points=3, log=True).grid()
        (0.001, 0.01, 0.1)
        """
        if self.values:
            return self.values
        last = max(self.points - 1, 1)
        marks = [self.low + (self.high - self.low) * k / last for k in range(self.points)]
        return tuple(dict.fromkeys(map(self._value, marks)))

    def at(self, uniform: float) -> Value:
        """The value at a number drawn from [0, 1): evenly spread over the values, the range, or the exponent."""
        if self.values:
            return self.values[int(uniform * len(self.values))]
        if self.whole and not self.log:
            return int(self.low) + int(uniform * (int(self.high) - int(self.low) + 1))
        return self._value(self.low + uniform * (self.high - self.low))

    def narrowed(self, value: Value, whole: Axis) -> Axis:
        """Half as wide, around `value`, inside the ends of `whole`, the axis as it was at first.

        Of listed numbers the value and its neighbours are left, of names the value alone.
        """
        if self.values:
            near = [value]
            if self.is_ordered:
                order = sorted(whole.values, key=_number)
                k = order.index(value)
                near = order[max(k - 1, 0) : k + 2]
            return replace(self, values=tuple(v for v in self.values if v in near))
        center, reach = self._mark(value), (self.high - self.low) / 4
        low, high = max(whole.low, center - reach), min(whole.high, center + reach)
        if self.whole and not self.log:
            low, high = max(whole.low, min(floor(center - reach), center - 1)), min(whole.high, ceil(center + reach))
        return replace(self, low=low, high=high)

    def border(self, value: Value) -> int:
        """-1 where `value` lies on the lower border and could be lower, 1 on the upper one, 0 elsewhere."""
        if not self.is_ordered or (self.values and len(self.values) == 1):
            return 0
        ends = (
            (min(map(_number, self.values)), max(map(_number, self.values))) if self.values else (self.low, self.high)
        )
        mark = _number(value) if self.values else self._mark(value)
        margin = 0 if self.values or self.whole else EDGE * (ends[1] - ends[0])
        if mark <= ends[0] + margin and _number(value) > LEAST.get(self.name, float("-inf")):
            return -1
        return 1 if mark >= ends[1] - margin else 0

    def to_dict(self) -> dict[str, Any]:
        """As it is written in a file."""
        if self.values:
            return {"values": ["none" if v is None else v for v in self.values]}
        if self.log:
            return {"exponent": [self.low, self.high], "points": self.points}
        return {"low": self.low, "high": self.high, "points": self.points}

    def _value(self, mark: float) -> Value:
        found = 10.0**mark if self.log else mark
        return round(found) if self.whole else float(found)

    def _mark(self, value: Value) -> float:
        return log10(_number(value)) if self.log else _number(value)


@dataclass(frozen=True)
class Space:
    """Hyperparameters with the values each may take; a point has one of each.

    >>> space = Space.of({"lr": {"exponent": [-3, -1], "points": 3}, "units": {"values": [16, 64]}})
    >>> space.size, space.point(0), space.point(5)
    (6, {'lr': 0.001, 'units': 16}, {'lr': 0.1, 'units': 64})
    """

    axes: tuple[Axis, ...]

    @staticmethod
    def of(given: Mapping[str, Any], source: str = "space") -> Space:
        """A space from what a TOML file holds.

        Args:
            given: for each hyperparameter, a field of `Recipe`, "layers" or "units", one of {"values": [...]},
                {"low": ..., "high": ..., "points": ...} and {"exponent": [low, high], "points": ...}, whose values are
                ten to the power of an exponent that is uniform between its ends. "none" stands for None.
            source: where it comes from, for errors.
        Raises:
            InputError: an unknown hyperparameter, values of another type or that a `Recipe` refuses, an empty list, or
                ends in the wrong order; names the file and the key.
        """
        if not given:
            raise InputError(f"{source}: the space is empty; it may have {', '.join(searchable())}")
        if "model" in given and any(name in given for name in SHAPES):
            raise InputError(f"{source}: layers and units make up the model; leave them out, or model")
        return Space(tuple(_axis(name, entry, source) for name, entry in given.items()))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the hyperparameters."""
        return tuple(axis.name for axis in self.axes)

    @property
    def size(self) -> int:
        """Points on the grid."""
        return prod(len(axis.grid()) for axis in self.axes)

    def point(self, number: int) -> dict[str, Value]:
        """A point of the grid, numbered from 0; the last hyperparameter changes fastest."""
        found: dict[str, Value] = {}
        for axis in reversed(self.axes):
            number, k = divmod(number, len(axis.grid()))
            found[axis.name] = axis.grid()[k]
        return {name: found[name] for name in self.names}

    def at(self, uniform: Iterator[float]) -> dict[str, Value]:
        """A point between the ends, by one number in [0, 1) for each hyperparameter."""
        return {axis.name: axis.at(next(uniform)) for axis in self.axes}

    def narrowed(self, point: Mapping[str, Value], whole: Space) -> Space:
        """A space half as wide around a point, inside the ends of `whole`, the space as it was at first."""
        return Space(tuple(a.narrowed(point[a.name], w) for a, w in zip(self.axes, whole.axes, strict=True)))

    def borders(self, point: Mapping[str, Value]) -> list[str]:
        """A sentence for each hyperparameter whose value lies on the border of the space: which way to widen it."""
        return [_widen(axis, point[axis.name], axis.border(point[axis.name])) for axis in self.axes
                if axis.border(point[axis.name])]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `of` reads them."""
        return {axis.name: axis.to_dict() for axis in self.axes}


DEFAULT = {
    "layers": {"values": [1, 2, 3]},
    "units": {"values": [16, 32, 64, 128]},
    "lr": {"exponent": [-3, -1], "points": 5},
    "l2": {"exponent": [-6, -2], "points": 3},
}


def read_space(path: Path) -> Space:
    """Read a space from a TOML file, see `Space.of`.

    Raises:
        InputError: no such file, not TOML, or not a space.
    """
    try:
        return Space.of(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise InputError(f"--space {path}: cannot be read ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--space {path}: not TOML ({error})") from error


def default_space(recipe: Recipe) -> Space:
    """Layers, units, rate and L2, without what the recipe fixes by differing from `Recipe()`."""
    fixed = fixed_by(recipe)
    left = {k: v for k, v in DEFAULT.items() if k not in fixed and not ("model" in fixed and k in SHAPES)}
    if not left:
        raise InputError(
            "every hyperparameter of the default space is fixed by an option; say what to try with --space"
        )
    return Space.of(left)


def fixed_by(recipe: Recipe) -> list[str]:
    """The options of a recipe that are not as they are by default."""
    standard = Recipe().to_dict()
    return [name for name, value in recipe.to_dict().items() if value != standard[name]]


def recipe_at(recipe: Recipe, point: Mapping[str, Value]) -> Recipe:
    """The recipe with the options of a point; layers or units that are missing are as in its model.

    >>> recipe_at(Recipe(), {"layers": 3, "units": 16, "lr": 0.1}).model
    'mlp:16,16,16'
    """
    options: dict[str, Any] = {name: value for name, value in point.items() if name not in SHAPES}
    if any(name in point for name in SHAPES):
        kind, _, text = recipe.model.partition(":")
        if kind != "mlp":
            raise InputError(f"layers and units make up mlp, not --model {recipe.model}; search model instead of them")
        widths = [part for part in text.split(",") if part.strip()]
        n, units = point.get("layers", len(widths)), point.get("units", widths[0] if widths else 64)
        options["model"] = "mlp:" + ",".join([str(units)] * int(_number(n)))
    return replace(recipe, **options)


def searchable() -> list[str]:
    """Hyperparameters that a space may have."""
    return [*SHAPES, *(f.name for f in fields(Recipe) if f.name not in NOT_SEARCHED)]


# Reading an axis


@cache
def _types() -> dict[str, tuple[type, ...]]:
    """Types of each hyperparameter's values."""
    hints = get_type_hints(Recipe)
    return {"layers": (int,), "units": (int,)} | {k: get_args(hint) or (hint,) for k, hint in hints.items()}


def _axis(name: str, entry: Any, source: str) -> Axis:
    if name in NOT_SEARCHED:
        raise InputError(f"{source}: {name} is not searched: {NOT_SEARCHED[name]}; it is an option")
    if name not in searchable():
        raise InputError(f"{source}: {name} is no hyperparameter; there are {', '.join(searchable())}")
    keys = set(entry) if isinstance(entry, Mapping) else set()
    if keys == {"values"}:
        axis = Axis(name, values=_values(name, entry["values"], source))
    elif {"low", "high"} <= keys <= {"low", "high", "points"}:
        axis = _range(name, [entry["low"], entry["high"]], entry.get("points", POINTS), False, source)
    elif "exponent" in keys and keys <= {"exponent", "points"}:
        axis = _range(name, entry["exponent"], entry.get("points", POINTS), True, source)
    else:
        raise InputError(f"{source}: {name} = {entry!r}: expected {FORMS}")
    for value in axis.grid():
        _check(name, value, source)
    return axis


def _values(name: str, given: Any, source: str) -> tuple[Value, ...]:
    if not isinstance(given, (list, tuple)) or not given:
        raise InputError(f"{source}: {name}: values = {given!r}: expected a list with at least one value")
    types = _types()[name]
    values: list[Value] = []
    for value in given:
        found = None if value == "none" and NoneType in types else value
        if not _is_of(found, types):
            raise InputError(f"{source}: {name}: {value!r} is of type {type(value).__name__}, expected {_said(types)}")
        values.append(float(found) if isinstance(found, int) and float in types else found)
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise InputError(f"{source}: {name}: {twice[0]!r} stands there twice; say each value once")
    return tuple(values)


def _is_of(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, types) or (float in types and isinstance(value, int))


def _said(types: tuple[type, ...]) -> str:
    words = {int: "a whole number", float: "a number", str: "text", NoneType: '"none"'}
    return " or ".join(words[t] for t in types)


def _range(name: str, ends: Any, points: Any, log: bool, source: str) -> Axis:
    types, form = _types()[name], "exponent" if log else "low and high"
    if not {int, float} & set(types):
        raise InputError(f"{source}: {name}: {form} are for numbers; {name} is {_said(types)}: give it values = [...]")
    whole = float not in types
    if not isinstance(ends, (list, tuple)) or len(ends) != 2 or not all(_is_of(e, (int, float)) for e in ends):
        raise InputError(f"{source}: {name}: {form} = {ends!r}: expected two numbers")
    low, high = map(float, ends)
    if not (isfinite(low) and isfinite(high)) or low > high:
        raise InputError(
            f"{source}: {name}: from {low:g} to {high:g}: the first has to be the smaller, and both finite"
        )
    if log and not -300 <= low <= high <= 300:
        raise InputError(f"{source}: {name}: exponents from {low:g} to {high:g}: expected -300 to 300")
    if whole and not log and (low != int(low) or high != int(high)):
        raise InputError(f"{source}: {name}: from {low:g} to {high:g}: {name} is a whole number, and so are its ends")
    if not isinstance(points, int) or isinstance(points, bool) or not 1 + (high > low) <= points <= MAX_POINTS:
        raise InputError(f"{source}: {name}: points = {points!r}: expected a whole number from 2 to {MAX_POINTS}")
    return Axis(name, (), low, high, points, log, whole)


def _check(name: str, value: Value, source: str) -> None:
    """A value that a recipe refuses is refused here, with its place."""
    if name in SHAPES:
        if _number(value) < 1:
            raise InputError(f"{source}: {name}: {value}: at least 1")
        return
    try:
        replace(Recipe(), **COMPANIONS.get(name, {}) | {name: value})  # pyright: ignore[reportArgumentType]
    except InputError as error:
        raise InputError(f"{source}: {name}: {error}") from error


def _number(value: Value) -> float:
    """A value that is known to be a number."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number: bug in rowgrad, please report")
    return value


def _widen(axis: Axis, value: Value, side: int) -> str:
    way = "lower" if side < 0 else "upper"
    said = f"{_number(value):.3g}"
    if axis.values:
        how = f"add {'smaller' if side < 0 else 'larger'} values than {said}"
    else:
        end, name = (axis.low, "low") if side < 0 else (axis.high, "high")
        step = 1 if axis.log else (axis.high - axis.low) / 2
        name = ("first" if side < 0 else "second") + " exponent" if axis.log else name
        how = f"{'lower' if side < 0 else 'raise'} its {name} from {end:g}, to {end + side * step:g} for instance"
    return f"{axis.name}: the winner's {said} lies on the {way} border of the space; {how}"
