"""From what a user calls parameters to named leaf tensors, each once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from rowgrad.errors import HookedParameterError, ParameterError

Params = nn.Module | Tensor | Mapping[str, Tensor] | Iterable[Tensor] | Iterable[Mapping]


@dataclass(frozen=True)
class Parameters:
    """Trainable leaves by name, in order; `aliases` maps the other names of a shared tensor to its first."""

    by_name: dict[str, Tensor]
    aliases: dict[str, str]

    def name_of(self, key: object) -> str | None:
        """The first name of a parameter given by any of its names or as the tensor itself."""
        if isinstance(key, str):
            return key if key in self.by_name else self.aliases.get(key)
        return next((name for name, p in self.by_name.items() if p is key), None)

    def matching(self, key: str) -> list[str]:
        """All names equal to `key` or inside the module of that name."""
        exact = self.name_of(key)
        if exact is not None:
            return [exact]
        prefix = f"{key}." if key else ""
        inside = [name for name in self.by_name if name.startswith(prefix)]
        return inside + [
            self.aliases[a] for a in self.aliases if a.startswith(prefix) and self.aliases[a] not in inside
        ]

    def resolve(self, key: object) -> list[str]:
        """Names meant by a name, a module's name, a tensor, a module or a collection of them."""
        if isinstance(key, str):
            found = self.matching(key)
        elif isinstance(key, Tensor):
            found = [name for name in [self.name_of(key)] if name is not None]
        elif isinstance(key, nn.Module):
            found = [n for p in key.parameters() for n in [self.name_of(p)] if n is not None]
        elif isinstance(key, Iterable):
            return [name for item in key for name in self.resolve(item)]
        else:
            found = []
        if not found:
            raise KeyError(f"{shown(key)} is not among the parameters; known names start with: {self._some_names()}")
        return found

    def one_name(self, key: object) -> str:
        """The name meant by something that stands for one parameter.

        Raises:
            KeyError: it stands for none.
            ValueError: it stands for several.
        """
        if isinstance(key, str) and key in self.by_name:
            return key
        names = self.resolve(key)
        if len(names) != 1:
            raise ValueError(f"{key!r} means {len(names)} parameters ({', '.join(names[:4])}), expected one")
        return names[0]

    def direction(self, given: Any) -> dict[str, Tensor]:
        """A direction in the space of the parameters, as tensors of their shapes by name.

        Args:
            given: {name: tensor}, or a sequence of one tensor for each parameter in their order.
        Raises:
            KeyError: a name that no parameter has.
            ValueError: a tensor of another shape, another number of tensors, or one parameter given twice.
        """
        parts: dict[str, Tensor] = {}
        for key, value in self._pairs_of_direction(given):
            name = self.one_name(key)
            if name in parts:
                raise ValueError(f"direction: {name} is given twice, the second time as {shown(key)}")
            expected = self.by_name[name].shape
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"direction: {name} is a {type(value).__name__}, expected a tensor of shape {tuple(expected)}"
                )
            if value.shape != expected:
                raise ValueError(f"direction: {name} has shape {tuple(value.shape)}, expected {tuple(expected)}")
            parts[name] = value
        return parts

    def _pairs_of_direction(self, given: Any) -> Iterable[tuple[Any, Any]]:
        if isinstance(given, Mapping):
            return given.items()
        expected = f"expected {{name: tensor}} or a sequence of tensors for the {len(self.by_name)} parameters"
        if isinstance(given, Tensor):
            raise ValueError(f"direction is one tensor of shape {tuple(given.shape)}, {expected}")
        if not isinstance(given, Iterable):
            raise ValueError(f"direction is a {type(given).__name__}, {expected}")
        values = list(given)
        if len(values) != len(self.by_name):
            raise ValueError(f"direction has {len(values)} tensors, expected {len(self.by_name)}, one per parameter")
        return zip(self.by_name, values, strict=True)

    def _some_names(self) -> str:
        names = list(self.by_name)
        return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")


def shown(key: Any) -> str:
    """A key as an error shows it."""
    return f"tensor of {key.dtype}, shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)[:80]


def named(params: Params, *, complex_too: bool = False) -> Parameters:
    """Name the parameters of a module, of `optimizer.param_groups`, of an iterable or mapping of tensors.

    Frozen tensors are left out. Names are dotted; a module's are without the prefixes of the wrappers around it and in
    it (DistributedDataParallel, DataParallel, torch.compile), those that came with the tensors stay as they are.

    Raises:
        ParameterError: nothing to train, a tensor that is not a leaf, a complex tensor, an object of another kind.
        HookedParameterError: a tensor hook on a parameter may change its gradient.
    """
    by_name: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, p in _pairs(params):
        if not (isinstance(name, str) and isinstance(p, Tensor)):
            raise ParameterError(f"{_label(params, name)} is a {type(p).__name__}, expected a tensor")
        if not p.requires_grad:
            continue
        fault = _fault(p, complex_too)
        if fault is not None:
            kind, text = fault
            raise kind(f"{_label(params, name)} {text}")
        if id(p) in first:
            aliases[name] = first[id(p)]
        elif name in by_name:
            raise ParameterError(f"params: two different tensors are named {name!r}")
        else:
            first[id(p)] = name
            by_name[name] = p
    if not by_name:
        raise ParameterError(
            "params: no tensor that requires grad; pass a module, its parameters, or optimizer.param_groups"
        )
    return Parameters(by_name, aliases)


def _pairs(params: Any) -> Iterable[tuple[str, Any]]:
    return _pairs_of_module(params) if isinstance(params, nn.Module) else _pairs_of_tensors(params)


def _pairs_of_tensors(params: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(params, Tensor):
        yield "0", params
    elif isinstance(params, str) or not isinstance(params, Iterable):
        raise ParameterError(
            f"params is a {type(params).__name__}, expected a module, or an iterable or mapping of tensors"
        )
    elif isinstance(params, Mapping):
        yield from params.items()
    else:
        position = 0
        for group_nr, item in enumerate(params):
            if isinstance(item, Mapping):
                names = item.get("param_names") or [f"group{group_nr}.{i}" for i in range(len(item["params"]))]
                yield from zip(names, item["params"], strict=True)
            elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
                yield item
            else:
                yield str(position), item
                position += 1


def _label(params: Any, name: object) -> str:
    """What an error calls a tensor: its name, or its place where it has none."""
    if not isinstance(name, str):
        raise ParameterError(f"params: {name!r} is a {type(name).__name__}, expected a string as name")
    if isinstance(params, Tensor):
        return "params"
    if not name.isdigit():
        return name
    return f"params[{name!r}]" if isinstance(params, Mapping) else f"params[{name}]"


def _pairs_of_module(module: nn.Module) -> Sequence[tuple[str, Any]]:
    """As `named_parameters`, with every name of a shared one, without the prefixes that wrappers add."""
    pairs: list[tuple[str, Any]] = []
    prefixes: list[tuple[str, str]] = []
    _walk(module, "", pairs, prefixes)
    if type(module).named_parameters is not nn.Module.named_parameters:
        pairs = list(module.named_parameters(remove_duplicate=False))
    prefixes.reverse()  # from the inside out
    return [(_unwrapped(name, prefixes), p) for name, p in pairs] if prefixes else pairs


def _walk(module: nn.Module, path: str, pairs: list[tuple[str, Any]], prefixes: list[tuple[str, str]]) -> None:
    """Add the parameters of a module and those inside it, and the prefixes of wrappers with what to put for them."""
    attribute = _wrapped_attribute(module)
    if attribute is not None:
        prefixes.append((f"{path}{attribute}.", path))
    for name, p in module._parameters.items():
        if p is not None:
            pairs.append((path + name, p))
    for name, inner in module._modules.items():
        if inner is not None:
            _walk(inner, f"{path}{name}.", pairs, prefixes)


def _unwrapped(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for prefix, outside in prefixes:
        if name.startswith(prefix):
            name = outside + name[len(prefix) :]
    return name


def _wrapped_attribute(module: nn.Module) -> str | None:
    """Where a wrapper keeps the model; None for other modules."""
    if isinstance(module, (nn.DataParallel, DistributedDataParallel)):
        return "module"
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" else None


def _fault(p: Tensor, complex_too: bool) -> tuple[type[ParameterError], str] | None:
    """Why a tensor has no rows here, as an error and its text behind the tensor's name."""
    if not p.is_leaf:
        return ParameterError, (
            f"is not a leaf: it was computed by {p.grad_fn.name() if p.grad_fn else '?'}. Pass the trained tensor from "
            "which it was computed"
        )
    if p.is_complex() and not complex_too:
        return ParameterError, f"is complex ({p.dtype}); rows and checks are for real parameters. Use view_as_real"
    if p.is_inference():
        return ParameterError, "was made in inference mode and has no gradient; make it outside"
    hooks: Mapping[int, object] | None = p._backward_hooks
    if hooks:
        return HookedParameterError, (
            f"has {len(hooks)} tensor hook(s), which may change its gradient after the rows are read. Remove them for "
            "this call, or use register_post_accumulate_grad_hook, which sees the gradient without changing it"
        )
    if type(p) is not nn.Parameter and (type(p).__name__ == "DTensor" or isinstance(p, UninitializedParameter)):
        return ParameterError, f"is a {type(p).__name__}: sharded or uninitialized parameters have no rows here"
    return None
