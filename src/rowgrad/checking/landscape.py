"""The loss in float64 as a function of the parameters: values at moved points, gradient, and how far values can be
trusted.

Note [noise of a loss]
    Rounding makes a loss rough on small scales, and a difference over 2h amplifies that by 1/(2h). How rough is
    measured, after Moré and Wild (2011), "Estimating computational noise", algorithm 1: values at equal, tiny steps
    along a line; their k-th differences shrink with the step as far as the loss is smooth, so what is left for k >= 3
    is noise, and k-th differences of noise of variance s^2 have variance s^2 (2k)! / k!^2. Losses are subtracted one
    by one before they are added up, which keeps the rounding of a large sum out of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from math import comb, sqrt

import torch
from torch import Tensor

from rowgrad.checking.kinks import Piece, recorded_pieces
from rowgrad.checking.precision import Widening
from rowgrad.errors import GraphError, NoGraphError, NonFiniteError
from rowgrad.repeat import Repeated
from rowgrad.tape import gradients

Step = Mapping[str, Tensor]

NOISE_POINTS, NOISE_STEP = 8, 1e-9
ROUNDING = 2.0**-53


class Landscape:
    """The sum of a closure's losses over named parameters; to be used inside `precision.in_float64`.

    Args:
        run: the forward pass.
        parameters: by name; they hold float64 values.
        hold_detached: whether what `detach()` returns is a constant, as backpropagation has it.
    Raises:
        NonFiniteError: a loss is not finite.
        GraphError: two runs of the closure give different losses.
    """

    def __init__(self, run: Repeated, parameters: Mapping[str, Tensor], hold_detached: bool = False) -> None:
        self.run, self.parameters = run, parameters
        self.held: list[Tensor] | None = [] if hold_detached else None
        self.origin = self.values()
        if not self.origin.isfinite().all():
            raise NonFiniteError(
                f"{int((~self.origin.isfinite()).sum())} of {self.origin.numel()} losses are not finite, so no "
                "difference of losses tells anything; check on other data or other weights"
            )
        again = self.values()
        if not torch.equal(self.origin, again):
            raise GraphError(
                "the closure gives other losses when it is run again, by up to "
                f"{float((again - self.origin).abs().max()):.1e}, though random numbers and buffers are repeated. "
                "Something else changes from run to run: take the same batch each time, and no generator of its own"
            )

    def losses(self) -> Tensor:
        """With their graph."""
        try:
            with Widening(self.held):
                losses = self.run()
        except Exception as error:
            raise GraphError(
                f"the forward pass does not run in float64 ({type(error).__name__}: {error}). What no Python function "
                "of PyTorch sees cannot be converted (scripted modules, other libraries' kernels); convert the model "
                "and its data with .double() where this check is called"
            ) from error
        if losses.is_complex():
            raise GraphError("the losses are complex; gradients are checked of real losses")
        return losses

    def values(self) -> Tensor:
        return self.losses().detach().double()

    def rise(self, step: Step, t: float) -> float:
        """By how much the summed losses rise from the origin to `t` times a step."""
        with self.moved(step, t):
            return float((self.values() - self.origin).sum())

    def rise_between(self, step: Step, low: float, high: float) -> float:
        """By how much they rise from one point on a line to another."""
        with self.moved(step, low):
            below = self.values()
        with self.moved(step, high):
            return float((self.values() - below).sum())

    def pieces(self, step: Step, t: float) -> list[Piece]:
        """See `kinks`."""
        with self.moved(step, t), recorded_pieces() as found:
            self.losses()
        return found

    @contextmanager
    def moved(self, step: Step, t: float) -> Iterator[None]:
        """Parameters at their values plus t times a step; exactly their values afterwards."""
        before = {name: self.parameters[name].data for name in step}
        try:
            for name, direction in step.items():
                self.parameters[name].data = before[name] + t * direction
            yield
        finally:
            for name, data in before.items():
                self.parameters[name].data = data

    def gradient(self) -> dict[str, Tensor]:
        """By backpropagation; zeros where nothing arrives.

        Raises:
            NoGraphError: the losses have no graph.
            GraphError: the backward pass does not run in float64.
        """
        losses = self.losses()
        if losses.grad_fn is None:
            raise NoGraphError(
                f"losses of shape {tuple(losses.shape)} have no graph: they were detached, or made under no_grad() or "
                "inference_mode(). Return them as the forward pass made them"
            )
        with Widening():
            return gradient_of(losses, self.parameters)

    def noise(self, step: Step) -> float:
        """Standard deviation of the noise of one value; see Note [noise of a loss]."""
        values = [self.rise(step, k * NOISE_STEP) for k in range(NOISE_POINTS)]
        found = []
        for k in range(1, NOISE_POINTS - 2):
            values = [b - a for a, b in pairwise(values)]
            if k >= 3:
                found.append(sqrt(sum(v * v for v in values) / len(values) / comb(2 * k, k)))
        return max(sorted(found)[len(found) // 2], ROUNDING * float(self.origin.norm()))


def gradient_of(losses: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the summed losses, in float64; zeros where nothing arrives."""
    try:
        found = gradients(losses, list(parameters.values()))
    except RuntimeError as error:
        raise GraphError(
            f"the backward pass raised {type(error).__name__}: {error}. If the model trains in its own dtype, a "
            "torch.autograd.Function keeps tensors of fewer digits than float64: hand it float64 data in this check"
        ) from error
    dense = [None if g is None else (g.to_dense() if g.is_sparse else g).double() for g in found]
    return {
        name: torch.zeros_like(p, dtype=torch.float64) if g is None else g
        for (name, p), g in zip(parameters.items(), dense, strict=True)
    }


def random_unit(n: int, generator: torch.Generator) -> Tensor:
    """A random direction of length 1 in n dimensions."""
    v = torch.randn(n, generator=generator, dtype=torch.float64)
    return v / v.norm().clamp_min(torch.finfo(torch.float64).tiny)
