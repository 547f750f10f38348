"""Quasi-Newton methods: the inverse Hessian learned from gradients alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rowgrad.curvature import flat, gradient_of
from rowgrad.errors import InputError, ParameterError
from rowgrad.optim.line_search import Place, wolfe
from rowgrad.optim.newton import MOST_PARAMETERS
from rowgrad.optim.second_order import ROUNDING, Closure, SecondOrder, at_least_1, check_finite, checked, loss_at_start
from rowgrad.parameters import named

FAR = 1e6  # times the first loss: how high a place without a finite loss is taken to be


class BFGS(SecondOrder):
    """Quasi-Newton: a matrix that becomes the inverse Hessian, corrected after each step so that it maps the change of
    the gradient to the change of the weights.

    Each step goes along -M grad L to a place that a line search finds. Law: with an exact line search
    (`curvature` near 0) on a quadratic in d parameters, d steps reach the minimum and M is H^-1.

    Args:
        params: one group of P parameters, at most 10,000: M is P x P.
        curvature: the line search ends where the slope is this part of the first; 0.9 costs few evaluations.
    `step(closure)` takes a function that computes the loss and does not call backward; it is called several times and
    must give the same loss for the same weights. Returns the loss before the step.
    Raises:
        InputError, ParameterError, NonFiniteError, GraphError, NoGraphError, TypeError: as `Newton`.
    Source: Aggarwal 2018, "Other Second-Order Methods"; Broyden, Fletcher, Goldfarb, Shanno 1970; Nocedal and Wright
    2006, eqs. 6.17 and 6.20.

    >>> import torch
    >>> from rowgrad.optim import BFGS
    >>> w = torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = BFGS([w], curvature=1e-9)
    >>> for _ in range(2):
    ...     loss = optimizer.step(lambda: w[0] ** 2 + 4 * w[1] ** 2)
    >>> optimizer.inverse_hessian.diag().round(decimals=6)  # of [[2, 0], [0, 8]]
    tensor([0.5000, 0.1250], dtype=torch.float64)
    """

    def __init__(self, params: Iterable[Any], *, curvature: float = 0.9) -> None:
        if not 0 < curvature < 1:
            raise InputError(f"BFGS: curvature={curvature!r}, expected a number between 0 and 1")
        super().__init__(params, {"curvature": curvature})
        size = sum(p.numel() for p in self.parameters.values())
        if size > MOST_PARAMETERS:
            raise ParameterError(
                f"BFGS: {size:,} parameters have a matrix of {size * size * 8 / 2**30:.1f} GiB; use LBFGS"
            )

    @property
    def inverse_hessian(self) -> Tensor | None:
        """M, (P, P), in the order of the parameters; None before the first step."""
        return self.memory.get("inverse_hessian")

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One line search and one correction of the matrix; returns the loss before it."""
        evaluate = checked(self, closure)
        loss = loss_at_start(self, evaluate)
        parts = gradient_of(loss, self.parameters)
        check_finite(self, parts)
        g = flat(parts)
        if not bool(g.any()):
            return loss.detach()
        M = self.memory.get("inverse_hessian")
        if M is not None and len(M) != len(g):  # a parameter was frozen
            M = None
        direction, t = (-g, min(1.0, 1 / float(g.norm()))) if M is None else (-M @ g, 1.0)
        start = Place(0.0, float(loss.detach()), float(direction @ g), g)

        def at(t: float) -> Place:
            with self.moved(t * direction):
                there = evaluate()
                found = flat(gradient_of(there, self.parameters))
            return Place(t, float(there.detach()), float(found @ direction), found)

        rounding = ROUNDING * torch.finfo(g.dtype).eps * abs(start.loss)
        found = wolfe(at, start, t, curvature=self.options["curvature"], rounding=rounding)
        if found is None:
            self.memory.pop("inverse_hessian", None)  # the next step starts along the gradient
            return loss.detach()
        step = found.t * direction
        told = float(step.norm()) > torch.finfo(g.dtype).eps ** 0.5 * float(self.weights().norm())
        self.advance(step)
        if told or M is None:  # the change of the gradient along a shorter step is its rounding
            self.memory["inverse_hessian"] = _corrected(M, step, found.gradient - g)
        return loss.detach()


def _corrected(M: Tensor | None, s: Tensor, y: Tensor) -> Tensor | None:
    """The matrix nearest to M with M y = s; unchanged where the loss is not curved upwards along the step."""
    bent = float(y @ s)
    if bent <= torch.finfo(s.dtype).eps * float(y.norm() * s.norm()):
        return M
    if M is None:
        M = torch.eye(len(s), dtype=s.dtype, device=s.device) * (bent / float(y @ y))
    My = M @ y
    s_share = s / bent
    return (
        M + torch.outer(s_share, s) * (1 + float(y @ My) / bent) - torch.outer(My, s_share) - torch.outer(s_share, My)
    )


class LBFGS(torch.optim.LBFGS):
    """L-BFGS: `torch.optim.LBFGS` with its line search on, given the same closure as the other methods here.

    Beside PyTorch's, a place without a finite loss counts as very high, an error in the closure puts the weights back,
    and corrections that lead nowhere are forgotten.

    Args:
        params: one group of parameters, of more than half precision in range: float16 is refused.
        n: iterations a step.
        history: corrections remembered; memory is twice as many flat vectors.
        options: the others of `torch.optim.LBFGS`. Its tolerances are 0 here, so that a minimum is reached to rounding.
            It leaves out corrections with y^T s below 1e-10: multiply losses that are so small.
    `step(closure)` takes a function that computes the loss and does not call backward (the gradient is taken here; that
    of the last evaluation stays in `.grad`). Returns the loss before the step.
    Raises:
        InputError: a line search that does not exist, or an option given twice, as n and as max_iter.
        ParameterError: no parameter needs a gradient, or one is of float16.
        NonFiniteError, GraphError, NoGraphError, TypeError: as `Newton`.
    Source: Aggarwal 2018, "Other Second-Order Methods"; Liu and Nocedal 1989.

    >>> import torch
    >>> from rowgrad.optim import LBFGS
    >>> w = torch.tensor([3.0, -1.0], requires_grad=True)
    >>> loss = LBFGS([w]).step(lambda: w[0] ** 2 + 4 * w[1] ** 2)
    >>> bool(w.abs().max() < 1e-4)
    True
    """

    def __init__(self, params: Iterable[Any], *, n: int = 20, history: int = 10, **options: Any) -> None:
        at_least_1("LBFGS", n=n, history=history)
        twice = {"max_iter": "n", "history_size": "history"}.keys() & options.keys()
        if twice:
            raise InputError(f"LBFGS: {min(twice)} is called {'n' if 'max_iter' in twice else 'history'} here")
        defaults = {"line_search_fn": "strong_wolfe", "tolerance_grad": 0.0, "tolerance_change": 0.0}
        options = {"max_iter": n, "history_size": history, **defaults, **options}
        if options["line_search_fn"] not in (None, "strong_wolfe"):
            raise InputError(f"LBFGS: line_search_fn={options['line_search_fn']!r}, expected 'strong_wolfe' or None")
        super().__init__(params, **options)
        half = [name for name, p in named(self.param_groups).by_name.items() if p.dtype == torch.float16]
        if half:
            raise ParameterError(
                f"LBFGS: {half[0]} is of float16, whose range its line search leaves; use bfloat16 or float32"
            )

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """`n` iterations at most; returns the loss before them."""
        evaluate = checked(self, closure)
        parameters = named(self.param_groups).by_name
        start = {name: p.detach().clone() for name, p in parameters.items()}
        first: Tensor | None = None
        is_bounded = True

        def with_gradient() -> Tensor:
            nonlocal first, is_bounded
            loss = loss_at_start(self, evaluate) if first is None else evaluate()
            parts = gradient_of(loss, parameters)
            if first is None:
                check_finite(self, parts)
                first = loss.detach()
            found = loss.detach()
            if not bool(found.isfinite()) or not all(bool(part.isfinite().all()) for part in parts.values()):
                is_bounded = False
                found, parts = FAR * (1 + first.abs()), {name: torch.zeros_like(p) for name, p in parts.items()}
            for name, p in parameters.items():
                p.grad = parts[name]
            return found

        def put_back() -> None:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(start[name])

        try:
            loss = super().step(with_gradient)  # type: ignore[arg-type]
            if not is_bounded and not bool(evaluate().detach().isfinite()):
                put_back()
        except BaseException:
            put_back()
            self.state.clear()
            raise
        if all(torch.equal(p, start[name]) for name, p in parameters.items()):
            self.state.clear()  # the next step starts along the gradient
        return loss  # type: ignore[return-value]
