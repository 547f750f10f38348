"""The derivative of each loss along a direction, from a forward pass alone."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from rowgrad.errors import ForwardModeError, RowgradWarning
from rowgrad.forward.duals import Duals
from rowgrad.forward.numbers import Dual, enter_level, leave_level, split
from rowgrad.parameters import Parameters, Params, named
from rowgrad.repeat import Repeated, check_closure
from rowgrad.rounding import tolerance
from rowgrad.rows.build import check_losses, check_vector, jacobian
from rowgrad.tape import Tape

CHECK_EVERY = 200  # calls; a check costs about two plain steps, so about 1% of the time
MOST_KEPT = 1000  # closures and ways through them that are known

DIFFERENT = (
    "derivatives in forward mode are not those of a backward pass through a second call of the closure (an operation "
    "that loses tangents, a hook that changes gradients, other random numbers or data, values at a kink)"
)

_one_at_a_time = threading.RLock()  # PyTorch has one level of dual numbers, for all threads


def jvp(
    closure: Callable[[], Tensor], params: Params, direction: Any, *, verify: str = "cached"
) -> tuple[Tensor, Tensor]:
    """The losses and the derivative of each along a direction in parameter space, from one forward pass.

    Law: with losses = closure(), the derivatives are those of `jacobian(losses, params).dot(direction)`.

    For a direction that is known before the losses are: tangents go along with the forward pass, so that no graph is
    recorded and no backward pass runs, and the memory is that of inference. Examples may meet in any way; nothing has
    to be proved. Numbers are as precise as the forward pass itself.

    Where the closure takes a way through PyTorch's calls that is new, it is called once more, as it is, and an ordinary
    backward pass checks the derivatives, with random weights for the examples; so it is at every 200th call. Where they
    differ, are not finite, or something has no forward derivative (a custom autograd Function without `jvp`, the CTC
    loss), the rows of that second pass answer instead, and a warning tells so once. A check takes the memory of an
    ordinary step; a way is known whatever the size of the batch, so begin with a small one where memory is short.
    Between two checks, at ties and kinks (an entry exactly at the bound of a `clamp`), PyTorch's forward formulas may
    take the other one-sided derivative; `verify="always"` sees that.

    Args:
        closure: the forward pass; returns one loss per example, shape (B,), not averaged. Called once or, to check,
            twice: then with the same random numbers, and with copies of the buffers if `params` is a module.
        params: as for `rowgrad.jacobian`. The closure uses the same tensors, as it stands.
        direction: {name: tensor}, where parameters left out count as zero, or a sequence of one tensor for each
            parameter in their order; each of its parameter's shape.
        verify: "cached" checks what is new, "always" every call, "never" none: the closure is called once, and what
            has no forward derivative is refused.
    Returns:
        (losses, derivatives), each (B,), detached: the closure's losses within rounding, and J v.
    Raises:
        TypeError: `closure` cannot be called.
        NotAVectorError: it returns no vector of losses.
        KeyError, ValueError: the direction is none of these parameters, or `verify` is not what it may be.
        ForwardModeError: dual numbers are in use already; something has no forward derivative and `verify` is "never".
        RowgradError: as for `rowgrad.jacobian`, where the rows answer.
    Source: Wengert 1964, "A simple automatic derivative evaluation program"; Baydin et al. 2018, section 3.1.

    >>> import torch, rowgrad
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, v = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), {"weight": torch.tensor([[1.0, 10.0]])}
    >>> losses, derivatives = rowgrad.jvp(lambda: model(x).squeeze(1), model, v)
    >>> derivatives
    tensor([43.,  1.])
    """
    check_closure(closure)
    if verify not in ("cached", "always", "never"):
        raise ValueError(f'verify={verify!r}: expected "cached", "always" or "never"')
    parameters = named(params)
    tangents = {n: _as_tangent(v, parameters.by_name[n]) for n, v in parameters.direction(direction).items()}
    if verify == "never":
        found, _, reason = _by_tangents(closure, parameters.by_name, tangents)
        if found is None:
            raise ForwardModeError(f'{reason}. Leave verify="never" out, and the rows answer')
        return found
    known = _known_of(closure, parameters)
    again = None if known.is_settled and verify == "cached" else Repeated(closure, params)
    found, way, reason = (None, None, "") if known.by_rows else _by_tangents(closure, parameters.by_name, tangents)
    if known.trusts(way) and verify == "cached" and found is not None and _is_finite(found[1]):
        return found
    with torch.inference_mode(False):
        losses = (again or Repeated(closure, params))()
    check_losses(losses)
    agrees, tells = _compared(found, losses, parameters.by_name, tangents) if found is not None else (False, False)
    if found is not None and agrees:
        known.trust(way if tells else None)
        return found
    if not known.by_rows and known.distrust(way, forever=again is not None):
        warnings.warn(f"{reason or DIFFERENT}: the rows of a second pass are used", RowgradWarning, stacklevel=2)
    return losses.detach(), jacobian(losses, parameters.by_name).dot(tangents).to(losses.dtype)


def _as_tangent(v: Tensor, p: Tensor) -> Tensor:
    """Calls that change nothing take their time, too."""
    v = v.detach() if v.requires_grad else v
    return v if v.dtype == p.dtype and v.device == p.device else v.to(p)


def _is_finite(derivatives: Tensor) -> bool:
    return isfinite((derivatives if derivatives.itemsize > 2 else derivatives.float()).sum().item())


# What is known of a closure


@dataclass
class _Known:
    """Ways through the calls of one closure on one set of parameters, and how often each was taken since its check."""

    of: weakref.ref[Tensor]  # the first parameter
    by_rows: bool = False  # forward mode does not do here
    ways: dict[Hashable, int] = field(default_factory=dict)
    is_settled: bool = False  # a way that is known is likely

    def trusts(self, way: Hashable) -> bool:
        if way not in self.ways:
            return False
        self.ways[way] += 1
        self.is_settled = self.ways[way] + 1 < CHECK_EVERY
        return self.ways[way] < CHECK_EVERY

    def trust(self, way: Hashable) -> None:
        """None is not known after all."""
        if len(self.ways) >= MOST_KEPT:
            self.ways.clear()
        if way is not None:
            self.ways[way] = 0
        self.is_settled = way is not None

    def distrust(self, way: Hashable, forever: bool) -> bool:
        """Whether rows are to answer from now on: not for a way that was right before, and met a kink, or infinity."""
        self.by_rows = forever and way not in self.ways
        self.is_settled = False
        return self.by_rows


_known: dict[Hashable, _Known] = {}


def _known_of(closure: Callable[[], Tensor], parameters: Parameters) -> _Known:
    first = next(iter(parameters.by_name.values()))
    key = id(first), len(parameters.by_name), getattr(closure, "__code__", type(closure))
    known = _known.get(key)
    if known is None or known.of() is not first:
        if len(_known) >= MOST_KEPT:
            _known.clear()
        known = _known[key] = _Known(weakref.ref(first))
    return known


def _compared(
    forward: tuple[Tensor, Tensor], losses: Tensor, params: Mapping[str, Tensor], tangents: Mapping[str, Tensor]
) -> tuple[bool, bool]:
    """Whether u^T J v comes out alike from both sides, for random u, and whether a part of every parameter that moves
    was seen in it: a direction of zeros confirms nothing."""
    allowed = tolerance(Tape(losses))
    if not torch.allclose(forward[0], losses.detach(), rtol=allowed, atol=allowed, equal_nan=True):
        return False, False
    u = torch.randn(losses.shape, generator=torch.Generator().manual_seed(0)).to(losses)
    gradients = torch.autograd.grad(losses, [*params.values()], u, retain_graph=True, allow_unused=True)
    found = {name: g for name, g in zip(params, gradients, strict=True) if g is not None}
    ours = u.double() * forward[1].double()
    whole, size = torch.zeros_like(ours.sum()), torch.zeros_like(ours.sum())
    tells = found.keys() >= tangents.keys()
    for name in found.keys() & tangents.keys():
        products = found[name].detach().to_dense().double() * tangents[name]
        tells = tells and bool(products.any())
        whole, size = whole + products.sum(), size + products.square().sum()
    return bool(found) and bool((ours.sum() - whole).abs() <= allowed * (size.sqrt() + ours.norm())), tells


# The first call


def _by_tangents(
    closure: Callable[[], Tensor], parameters: Mapping[str, Tensor], tangents: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, Tensor] | None, Hashable, str]:
    """Losses and derivatives with the way that the closure took; or nothing, and why not."""
    with _one_at_a_time:
        level, was_optimizing = enter_level(), torch._C._get_graph_executor_optimize()
        torch._C._set_graph_executor_optimize(False)  # the fused kernels of scripts would drop tangents
        try:
            with _as_in_training():
                return _carried(closure, parameters, tangents)
        finally:
            torch._C._set_graph_executor_optimize(was_optimizing)
            leave_level(level)


def _carried(
    closure: Callable[[], Tensor], parameters: Mapping[str, Tensor], tangents: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, Tensor] | None, Hashable, str]:
    duals = Duals({id(p): Dual(p.detach(), tangents.get(name)) for name, p in parameters.items()})
    try:
        with duals:
            losses = closure()
    except Exception as error:  # noqa: BLE001 (if it is the closure's own, the second call raises it)
        return None, None, f"the forward pass cannot carry tangents along ({_first_line(error)})"
    check_vector(losses)
    values, derivatives = split(losses)
    if derivatives is None:
        derivatives = torch.zeros_like(values)
    return (values.detach(), derivatives.detach()), (duals.way(), *tangents), ""


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {text}"[:200]


def _as_in_training() -> AbstractContextManager[Any]:
    """Gradients enabled, functions of `torch.compile` uncompiled; nothing entered where it would change nothing."""
    stack = ExitStack()
    if torch.is_inference_mode_enabled():
        stack.enter_context(torch.inference_mode(False))
    if not torch.is_grad_enabled():
        stack.enter_context(torch.enable_grad())
    if "torch._dynamo" in sys.modules:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    return stack
