"""Penalties on hidden units, added to the losses of a model that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import isfinite
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rowgrad.errors import InputError
from rowgrad.graph.variables import Variables

Penalty = float | Callable[[Tensor], Tensor]


class HiddenPenalties:
    """What `hidden_penalties` yields: call it with the losses of the forward pass it saw, see there."""

    def __init__(self, model: nn.Module, penalties: Mapping[str, Penalty]) -> None:
        self._model, self._penalties = model, dict(penalties)
        self._outputs: dict[str, list[tuple[object, int]]] = {}  # of each module asked for, with its version
        self._computed: list[Tensor] = []  # by operations, where a name is no module's

    def __call__(self, losses: Tensor) -> Tensor:
        """The losses, each with the penalties of its example added; both of shape (B,).

        Raises:
            InputError: losses that are no vector; a name that is neither a module's that ran nor an operation's of
                this graph; hidden units that are no tensor, were changed in place since, or whose penalties have not
                the shape of the losses.
        """
        if losses.dim() != 1:
            raise InputError(
                f"penalties are added to one loss for each example, found shape {tuple(losses.shape)}; "
                'use reduction="none"'
            )
        total = losses
        for name, penalty in self._penalties.items():
            for hidden in self._of_module(name) if name in self._outputs else [self._of_node(name, losses)]:
                total = total + _penalty(name, penalty, hidden, losses)
        return total

    def _of_module(self, name: str) -> list[Tensor]:
        found = []
        for output, version in self._outputs[name]:
            if not isinstance(output, Tensor):
                raise InputError(
                    f"penalty at {name}: the module returned a {type(output).__name__}, no tensor; name an operation "
                    "of rowgrad.Graph(losses, model) in its place"
                )
            if output._version != version:
                raise InputError(
                    f"penalty at {name}: its output was changed in place afterwards, as by ReLU(inplace=True); name "
                    "the module that did so, or use inplace=False"
                )
            found.append(output)
        if not found:
            raise InputError(f"penalty at {name}: this module did not run inside the block")
        return found

    def _of_node(self, name: str, losses: Tensor) -> Tensor:
        graph = Variables(losses, self._model)
        try:
            edge = graph.edge(name)
        except KeyError as error:
            raise InputError(f"penalty at {name!r}: no module of the model, and {error.args[0]}") from None
        for tensor in self._computed:
            if graph.tape.edge_of(tensor) == edge:
                return tensor
        raise InputError(
            f"penalty at {name}: its value was not seen inside the block, because it is a parameter, was changed in "
            "place, or is computed within a larger operation; name the operation behind it"
        )


@contextmanager
def hidden_penalties(model: nn.Module, penalties: Mapping[str, Penalty]) -> Iterator[HiddenPenalties]:
    """Watch one forward pass, so that penalties on its hidden units can be added to its losses.

    The loss of example j becomes losses[j] plus the penalties of its hidden values, and derivatives follow: what
    arrives at a hidden unit i in the backward pass, S(i, o), is increased by the derivative of its penalty. Rows,
    graphs and checks see the sum like any other losses. Hooks stand on the modules named while the block runs, no
    longer.

    Args:
        model: runs once inside the block. A module that runs several times in it is penalized each time.
        penalties: {name: penalty}. The name of a module means its output; any other is an operation as
            `Graph(losses, model)` names it, such as "after fc1: relu". A number s is s times the sum of |h| of each
            example, whose entries lie along the first dimension of h; for all else give a function of h that returns
            one number for each example, shape (B,).
    Yields:
        A function from losses to penalized losses, both of shape (B,), to be called after the forward pass.
    Raises:
        InputError: no penalties, or one that is neither a finite number nor a function. The function raises others,
            see `HiddenPenalties`.

    Source: Aggarwal 2018, section 3.2, "Losses at Arbitrary Nodes".

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> x = torch.randn(5, 3)
    >>> with hidden_penalties(model, {"1": 0.1}) as penalized:
    ...     losses = model(x).square().sum(1)
    >>> torch.allclose(penalized(losses), losses + 0.1 * model[:2](x).abs().sum(1))
    True
    """
    if not penalties:
        raise InputError("hidden_penalties: no penalties; give {name of a module or an operation: penalty}")
    for name, penalty in penalties.items():
        if not (callable(penalty) or _is_strength(penalty)):
            raise InputError(f"penalty at {name}: {penalty!r}, expected a finite number, or a function of hidden units")
    seen = HiddenPenalties(model, penalties)
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name in penalties}
    with ExitStack() as stack:
        for name, module in modules.items():
            outputs = seen._outputs.setdefault(name, [])
            stack.callback(module.register_forward_hook(_keep(outputs)).remove)
        if len(modules) < len(penalties):
            stack.enter_context(_Watch(seen._computed))
        yield seen


def _is_strength(penalty: object) -> bool:
    if isinstance(penalty, Tensor):
        return penalty.numel() == 1 and bool(penalty.isfinite().all())
    return isinstance(penalty, Real) and isfinite(penalty)


def _keep(outputs: list[tuple[object, int]]) -> Callable[..., None]:
    def hook(_: nn.Module, __: object, output: object) -> None:
        outputs.append((output, output._version if isinstance(output, Tensor) else 0))

    return hook


class _Watch(TorchFunctionMode):
    """Keeps every tensor with a graph that a function of PyTorch returns."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, list | tuple) else (found,):
            if isinstance(t, Tensor) and t.grad_fn is not None:
                self.kept.append(t)
        return found


def _penalty(name: str, penalty: Penalty, hidden: Tensor, losses: Tensor) -> Tensor:
    if callable(penalty):
        found = penalty(hidden)
        if not isinstance(found, Tensor) or found.shape != losses.shape:
            shown = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise InputError(
                f"penalty at {name}: the function returned {shown}, expected one number for each of the "
                f"{len(losses)} examples; sum over all other dimensions"
            )
        return found
    if hidden.dim() == 0 or len(hidden) != len(losses):
        raise InputError(
            f"penalty at {name}: hidden units of shape {tuple(hidden.shape)} for {len(losses)} examples, which are "
            "looked for along the first dimension; give a function that returns one number for each example"
        )
    return penalty * hidden.flatten(1).abs().sum(1) if hidden.dim() > 1 else penalty * hidden.abs()
