"""The derivative of each loss along a direction, from a forward pass alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rowgrad.errors import ForwardModeError, NotAVectorError, OpaqueGraphError, ParameterError
from rowgrad.forward.duals import Duals
from rowgrad.forward.numbers import Dual, enter_level, leave_level, split
from rowgrad.parameters import Parameters, Params, named
from rowgrad.tape import Tape

_one_at_a_time = threading.RLock()  # PyTorch has one level of dual numbers, for all threads

INSTEAD = "Use rowgrad.jacobian(losses, params).dot(direction), which goes by the backward pass"


def jvp(closure: Callable[[], Tensor], params: Params, direction: Any) -> tuple[Tensor, Tensor]:
    """The losses and the derivative of each along a direction in parameter space, from one forward pass.

    Law: with losses = closure(), the derivatives are those of `jacobian(losses, params).dot(direction)`.

    For a direction that is known before the losses are: tangents go along with the forward pass, so that no graph is
    recorded and no backward pass runs, and the memory is that of inference. Examples may meet in any way; nothing has
    to be proved. Numbers are as precise as the forward pass itself.

    Args:
        closure: the forward pass; returns one loss per example, shape (B,), not averaged. Called once.
        params: as for `rowgrad.jacobian`. The closure uses the same tensors, as it stands.
        direction: {name: tensor}, where parameters left out count as zero, or a sequence of one tensor for each
            parameter in their order; each of its parameter's shape.
    Returns:
        (losses, derivatives), each (B,), detached. The derivatives are J v, as `torch.func.jvp` names them.
    Raises:
        TypeError: `closure` cannot be called.
        NotAVectorError: it returns no vector of losses.
        ParameterError: a parameter is not a real leaf tensor, or the losses depend on none of them.
        KeyError, ValueError: the direction is none of these parameters.
        ForwardModeError: an operation has no forward derivative (a custom autograd Function without `jvp`, the CTC
            loss), or dual numbers are in use already.
        OpaqueGraphError: a parameter is used where no dual number can be put in its place: in a script, in a custom
            autograd Function, in reentrant checkpoints, or outside of the closure.
    Source: Wengert 1964, "A simple automatic derivative evaluation program"; Baydin et al. 2018, section 3.1.

    >>> import torch, rowgrad
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, v = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), {"weight": torch.tensor([[1.0, 10.0]])}
    >>> losses, derivatives = rowgrad.jvp(lambda: model(x).squeeze(1), model, v)
    >>> derivatives
    tensor([43.,  1.])
    """
    if not callable(closure):
        raise TypeError(
            f"closure is a {type(closure).__name__}, expected a function that runs the forward pass and returns the "
            "losses, shape (B,), for instance `lambda: losses_of(batch)`"
        )
    parameters = named(params)
    tangents = parameters.direction(direction)
    with _level():
        losses = _run(closure, _duals(parameters, tangents))
        _check_shape(losses)
        _check_seen(losses, parameters)
        values, derivatives = split(losses)
        if derivatives is None:
            if len(tangents) == len(parameters.by_name):
                raise ParameterError(
                    f"the losses depend on none of the {len(tangents)} parameters (first: {next(iter(tangents))}). Is "
                    "this the model that the closure uses, and does it neither detach nor run under torch.no_grad()?"
                )
            derivatives = torch.zeros_like(values)
        return values.detach(), derivatives.detach()


@contextmanager
def _level() -> Iterator[None]:
    """Where dual numbers live: gradients enabled, as in training, and compiled functions run as they were written."""
    with _one_at_a_time:
        try:
            level = enter_level()
        except RuntimeError as error:
            raise ForwardModeError(
                f"dual numbers are in use already ({error}): a jvp inside another, or code between "
                f"torch.autograd.forward_ad.dual_level() and its end. {INSTEAD}"
            ) from error
        try:
            with _unfused_scripts():
                if _is_plain_training():
                    yield
                else:
                    with torch.inference_mode(False), torch.enable_grad(), _as_written():
                        yield
        finally:
            leave_level(level)


def _unfused_scripts() -> AbstractContextManager[Any]:
    """The fused kernels of scripts would drop tangents."""
    return torch.jit.optimized_execution(False)  # pyright: ignore[reportPrivateImportUsage]


def _is_plain_training() -> bool:
    """Entering the contexts, which would change nothing, takes as long as a few small products."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and "torch._dynamo" not in sys.modules


def _as_written() -> AbstractContextManager[Any]:
    """Functions of `torch.compile` run uncompiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _duals(parameters: Parameters, tangents: Mapping[str, Tensor]) -> dict[int, Dual]:
    """What stands for each parameter, by its id: nothing of it requires grad, so that no graph is recorded."""
    found: dict[int, Dual] = {}
    for name, p in parameters.by_name.items():
        tangent = tangents.get(name)
        found[id(p)] = Dual(p.detach(), None if tangent is None else tangent.detach().to(p.device, p.dtype))
    return found


def _run(closure: Callable[[], Tensor], duals: Mapping[int, Dual]) -> Tensor:
    try:
        with Duals(duals):
            return closure()
    except NotImplementedError as error:
        text = str(error).partition(". ")[0]
        if "forward" not in text:
            raise
        raise ForwardModeError(f"{text}. {INSTEAD}") from error
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise ForwardModeError(f"the closure takes gradients with respect to parameters itself. {INSTEAD}") from error


def _check_shape(losses: Any) -> None:
    if not isinstance(losses, Tensor):
        raise NotAVectorError(
            f"closure returned a {type(losses).__name__}, expected the losses, a tensor of shape (B,)"
        )
    if losses.ndim != 1:
        raise NotAVectorError(
            f"closure returned losses of shape {tuple(losses.shape)}, expected (B,), one for each example: not "
            'averaged (reduction="none"), tokens put together (rowgrad.per_example)'
        )
    if not losses.dtype.is_floating_point:
        raise NotAVectorError(f"losses are {losses.dtype}, expected real floating point numbers")


def _check_seen(losses: Tensor, parameters: Parameters) -> None:
    """Refuse losses that depend on a parameter itself: its stand-ins require no grad, so that the graph shows it."""
    if losses.grad_fn is None:
        return
    tape = Tape(losses)
    tape.refuse_hidden()
    for name, p in parameters.by_name.items():
        if id(p) in tape.leaves:
            raise OpaqueGraphError(
                f"{name} is used where no dual number can be put in its place: in a script, in a custom autograd "
                f"Function, in reentrant checkpoints, or outside of the closure. {INSTEAD}"
            )
