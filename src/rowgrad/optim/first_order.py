"""Momentum, AdaGrad and RMSProp as Aggarwal 2018 prints them, where PyTorch's differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rowgrad.errors import GraphError, InputError
from rowgrad.optim.second_order import is_number, non_negative


class Marble(torch.optim.Optimizer):
    """V <- beta V - alpha u, W <- W + V, where u is the gradient or a scaled one.

    With Nesterov's momentum the gradient is wanted at W + beta V. So that is where the parameters stand between steps,
    and any training loop works as it is; `at_weights()` puts them to W for a while.
    """

    _is_at_weights = False

    def __init__(self, params: Iterable[Any], options: dict[str, Any]) -> None:
        _check(type(self).__name__, options)
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group of parameters with options of its own.

        Raises:
            InputError: an option out of range.
        """
        _check(type(self).__name__, param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update from `.grad`; with a closure, which computes the loss and calls backward, its loss.

        Raises:
            InputError: inside `at_weights()`, whose end would undo it. GraphError: a sparse gradient.
        """
        if self._is_at_weights:
            raise InputError(
                f"{type(self).__name__}.step inside at_weights(), whose end puts the parameters back and would undo "
                "it; take steps outside the block"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, self.state[p])
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        assert p.grad is not None
        if p.grad.is_sparse:
            raise GraphError(
                f"{type(self).__name__}: a sparse gradient of shape {tuple(p.shape)}; use torch.optim.SGD or SparseAdam"
            )
        g = p.grad + group["weight_decay"] * p if group["weight_decay"] else p.grad
        change = -group["lr"] * self._scaled(g, group, state)
        beta = group["beta"]
        if beta == 0 and "velocity" not in state:
            p.add_(change)
            return
        velocity = state.setdefault("velocity", torch.zeros_like(p))
        self._unshift(p)
        velocity.mul_(beta).add_(change)
        p.add_(velocity)
        if group["nesterov"]:
            p.add_(velocity, alpha=beta)
            state["shift"] = beta

    def _scaled(self, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        """What takes the gradient's place in the update."""
        return g

    def _unshift(self, p: Tensor) -> None:
        state = self.state[p]
        if state.get("shift"):
            p.sub_(state["velocity"], alpha=state["shift"])
            state["shift"] = 0.0

    @contextmanager
    def at_weights(self) -> Iterator[None]:
        """The parameters at W while the block runs, for validation; then at W + beta V again, bit for bit.

        A finished model is saved inside the block. A checkpoint to go on from, of the model and of this optimizer, is
        saved outside: training goes on from W + beta V.
        """
        was_at_weights, self._is_at_weights = self._is_at_weights, True
        kept = [(p, p.detach().clone(), self.state[p]["shift"]) for p in self.state if self.state[p].get("shift")]
        try:
            with torch.no_grad():
                for p, _, _ in kept:
                    self._unshift(p)
            yield
        finally:
            self._is_at_weights = was_at_weights
            with torch.no_grad():
                for p, shifted, shift in kept:
                    p.copy_(shifted)
                    self.state[p]["shift"] = shift


class Momentum(Marble):
    """Gradient descent with friction beta: V <- beta V - alpha grad L, W <- W + V.

    `torch.optim.SGD(momentum=beta)` multiplies the sum of gradients by the present rate instead of each gradient by the
    rate of its time: the same at a constant rate, different when the rate decays.

    Args:
        params: tensors, named tensors or groups, as for any torch optimizer.
        lr: alpha.
        beta: friction, from 0 to below 1; 0 is plain gradient descent.
        nesterov: the gradient is taken at W + beta V, where the parameters then stand between steps; see `at_weights`.
        weight_decay: lambda of a penalty lambda/2 |W|^2, added to the gradient as lambda W.
    Raises:
        InputError: an option out of range. GraphError: a sparse gradient.
    Source: Aggarwal 2018, "Momentum Methods" and "Nesterov Momentum".

    >>> import torch
    >>> from rowgrad.optim import Momentum
    >>> w = torch.tensor([1.0], requires_grad=True)
    >>> optimizer = Momentum([w], lr=0.1, beta=0.5)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     w.square().sum().backward()
    ...     optimizer.step()
    >>> round(w.item(), 4)  # V: -0.2, then 0.5 (-0.2) - 0.1 (1.6)
    0.54
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        beta: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "nesterov": nesterov, "weight_decay": weight_decay})


class AdaGrad(Marble):
    """Each derivative over the root of the sum of its squares: A_i <- A_i + g_i^2, w_i <- w_i - alpha g_i / sqrt(A_i).

    Args:
        params, lr, weight_decay: as for `Momentum`.
        eps: against division by 0; where it is 0, or too small for float16, and so is A_i, w_i stays.
        eps_inside: sqrt(A_i + eps), as the source has it; False for sqrt(A_i) + eps, as `torch.optim.Adagrad` has it.
    Raises:
        InputError: an option out of range. GraphError: a sparse gradient.
    Source: Aggarwal 2018, eqs. 15 and 16.

    >>> import torch
    >>> from rowgrad.optim import AdaGrad
    >>> w = torch.tensor([1.0, -100.0], requires_grad=True)
    >>> optimizer = AdaGrad([w], lr=0.1)
    >>> w.square().sum().backward()
    >>> optimizer.step()
    >>> w  # the first step has the length alpha everywhere
    tensor([  0.9000, -99.9000], requires_grad=True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        eps: float = 1e-10,
        eps_inside: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        options = {"lr": lr, "beta": 0.0, "nesterov": False, "weight_decay": weight_decay}
        super().__init__(params, {**options, "eps": eps, "eps_inside": eps_inside})

    def _scaled(self, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        A = state.setdefault("A", torch.zeros_like(g))  # (15)
        A.addcmul_(g, g)
        return _over_root(g, A, group)


class RMSProp(Marble):
    """Each derivative over the root of the running mean of its squares, with Nesterov's momentum if beta is above 0.

    A_i <- rho A_i + (1 - rho) g_i^2, v_i <- beta v_i - alpha g_i / sqrt(A_i), w_i <- w_i + v_i, where g is the gradient
    at W + beta V in both places; the parameters stand there between steps, see `at_weights`. A starts from 0 and takes
    in a gradient before that is divided by it. `torch.optim.RMSprop` has a momentum, but not Nesterov's.

    Args:
        params, lr, weight_decay: as for `Momentum`.
        rho: share of A that is kept at each step, from 0 to below 1.
        beta: friction, from 0 to below 1.
        eps: against division by 0; where it is 0, or too small for float16, and so is A_i, w_i stays.
        eps_inside: sqrt(A_i + eps), as the source has it; False for sqrt(A_i) + eps, as `torch.optim.RMSprop` has it.
    Raises:
        InputError: an option out of range. GraphError: a sparse gradient.
    Source: Aggarwal 2018, eq. 17; with Nesterov's momentum eq. 18.

    >>> import torch
    >>> from rowgrad.optim import RMSProp
    >>> w = torch.tensor([1.0, -100.0], requires_grad=True)
    >>> optimizer = RMSProp([w], lr=0.1, rho=0.75, beta=0.5)
    >>> w.square().sum().backward()
    >>> optimizer.step()
    >>> w  # W + V + beta V, with V = -0.1 / sqrt(0.25)
    tensor([  0.7000, -99.7000], requires_grad=True)
    >>> with optimizer.at_weights():
    ...     w.tolist()
    [0.800000011920929, -99.80000305175781]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        rho: float = 0.99,
        beta: float = 0.0,
        eps: float = 1e-8,
        eps_inside: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        options = {"lr": lr, "beta": beta, "nesterov": True, "weight_decay": weight_decay}
        super().__init__(params, {**options, "rho": rho, "eps": eps, "eps_inside": eps_inside})

    def _scaled(self, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        A = state.setdefault("A", torch.zeros_like(g))  # (17), (18)
        A.mul_(group["rho"]).addcmul_(g, g, value=1 - group["rho"])
        return _over_root(g, A, group)


def _over_root(g: Tensor, A: Tensor, group: dict[str, Any]) -> Tensor:
    """g over the root of A; 0 where that root is 0, as without eps where every g was 0."""
    root = (A + group["eps"]).sqrt() if group["eps_inside"] else A.sqrt() + group["eps"]
    return (g / root).masked_fill_(root == 0, 0)


def _check(name: str, options: dict[str, Any]) -> None:
    """Raise InputError for an option out of range, whichever of them are there."""
    non_negative(name, **{option: options[option] for option in ("lr", "weight_decay", "eps") if option in options})
    for option in ("beta", "rho"):
        value = options.get(option, 0)
        if not (is_number(value) and 0 <= value < 1):
            raise InputError(f"{name}: {option}={value!r}, expected a number from 0 to below 1")
