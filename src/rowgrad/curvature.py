"""Second derivatives of a loss: products with its Hessian, its quadratic model, its spectrum, its critical points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, pi, sqrt
from numbers import Real

import torch
from torch import Tensor

from rowgrad.errors import GraphError, InputError, NoGraphError, NonFiniteError, OpaqueGraphError, ParameterError
from rowgrad.parameters import Parameters, Params, named
from rowgrad.tape import engine_errors, is_differentiable

Direction = Mapping[str, Tensor]


@dataclass(frozen=True)
class Quadratic:
    """L(w0) + t slope + t^2/2 curvature: the quadratic approximation along a step d (Aggarwal 2018, eq. 19).

    slope = d^T grad L and curvature = d^T H d at w0; t = 1 is the whole step.
    """

    value: float
    slope: float
    curvature: float

    def __call__(self, t: float) -> float:
        """The model's loss after a part t of the step."""
        return self.value + t * self.slope + t * t / 2 * self.curvature

    @property
    def best(self) -> float:
        """The part of the step at which the model is least; inf where it falls for ever."""
        return -self.slope / self.curvature if self.curvature > 0 else float("inf")


def hvp(
    loss: Tensor | Callable[[], Tensor], params: Params, v: Direction, *, delta: float | None = None
) -> dict[str, Tensor]:
    """Product of the Hessian of a loss with a direction, without forming the Hessian.

    Law: linear in v, and u . hvp(v) = v . hvp(u).

    Args:
        loss: a scalar with its graph, or a function that computes it. The graph is kept.
        params: as for `rowgrad.jacobian`.
        v: {parameter: tensor of its shape}, a shared tensor by any of its names; parameters left out count as 0.
        delta: None for the exact product, by differentiating the gradient again; a number for the difference of two
            gradients, (grad L(w + delta v) - grad L(w)) / delta (eq. 23), which needs a function.
    Returns:
        {parameter: tensor of its shape}, zeros where the gradient does not depend on it.
    Raises:
        GraphError: the loss is no scalar, a direction is no mapping of tensors of the parameters' names and shapes, or
            `delta` came without a function.
        InputError: `delta` is 0 or not finite.
        FreedGraphError: a backward pass freed the graph.
        ParameterError: the loss depends on none of the parameters.
        NoGraphError: the loss has no graph.
        RuntimeError, OpaqueGraphError: an operation has no second derivative (an LSTM on CUDA, a custom function marked
            `once_differentiable`): give `delta`.
    Source: Aggarwal 2018, part "Second-Order Gradient Descent Methods"; Pearlmutter 1994.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hvp((w**3).sum(), {"w": w}, {"w": torch.tensor([1.0, 1.0])})
    {'w': tensor([ 6., 12.])}
    """
    _check_delta(delta)
    found = named(params)
    parameters, direction = found.by_name, _direction(found, v)
    if delta is None:
        return _exact(parameters, _loss_gradient(_scalar(loss), parameters, create_graph=True), direction)
    if not callable(loss):
        raise GraphError(f"delta={delta:g} needs a function that computes the loss anew, found a tensor")
    here = _loss_gradient(_scalar(loss), parameters)
    with moved(parameters, direction, delta):
        there = _loss_gradient(_scalar(loss), parameters)
    return {name: (there[name] - here[name]) / delta for name in parameters}


def quadratic_model(loss: Tensor | Callable[[], Tensor], params: Params, step: Direction) -> Quadratic:
    """The quadratic approximation of a loss along a step from the present weights (eq. 19).

    Args:
        loss, params: as for `hvp`.
        step: {parameter: change}; parameters left out stay where they are.
    Raises:
        GraphError, NoGraphError, RuntimeError: as `hvp`.

    >>> import torch
    >>> w = torch.tensor(1.0, requires_grad=True)
    >>> model = quadratic_model(w**3, {"w": w}, {"w": torch.tensor(0.5)})
    >>> model, model(1)
    (Quadratic(value=1.0, slope=1.5, curvature=1.5), 3.25)
    """
    found = named(params)
    parameters, direction = found.by_name, _direction(found, step)
    value = _scalar(loss)
    gradient = _loss_gradient(value, parameters, create_graph=True)
    product = _exact(parameters, gradient, direction)
    return Quadratic(float(value.detach()), _dot(gradient, direction), _dot(product, direction))


def gradient_of(loss: Tensor, params: Params) -> dict[str, Tensor]:
    """The gradient of a scalar loss by parameter, zeros where it does not depend on it; `.grad` is left alone.

    Raises:
        GraphError, NoGraphError: as `hvp`.
    """
    return _loss_gradient(_scalar(loss), named(params).by_name)


class Hessian:
    """The Hessian of a loss at the present weights, as products with flat vectors of all P parameters.

    The gradient is taken once; each product then costs one more backward pass. It keeps the graph and is good until a
    parameter changes.

    Args:
        loss, params: as for `hvp`.
        delta: None for exact products; a number for those of eq. 23, where it is the length of the move.
    Raises:
        GraphError, InputError, NoGraphError, RuntimeError: as `hvp`.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> H = Hessian((w**3).sum(), {"w": w})
    >>> H.gradient, H @ torch.tensor([1.0, 1.0])
    (tensor([ 3., 12.]), tensor([ 6., 12.]))
    """

    def __init__(self, loss: Tensor | Callable[[], Tensor], params: Params, *, delta: float | None = None) -> None:
        _check_delta(delta)
        self._parameters = named(params).by_name
        self._loss, self._delta = loss, delta
        value = _scalar(loss)
        self._gradient = _loss_gradient(value, self._parameters, create_graph=delta is None)
        self.value = float(value.detach())

    @property
    def gradient(self) -> Tensor:
        """The gradient, (P,), at least float32."""
        return flat(self._gradient)

    def __len__(self) -> int:
        return sum(p.numel() for p in self._parameters.values())

    def __matmul__(self, v: Tensor) -> Tensor:
        """H v, (P,)."""
        if self._delta is None:
            return flat(_exact(self._parameters, self._gradient, split(v, self._parameters)))
        length = float(v.norm())
        if length == 0:
            return torch.zeros_like(v)
        unit = split(v / length, self._parameters)
        return length * flat(hvp(self._loss, self._parameters, unit, delta=self._delta))

    def dense(self) -> Tensor:
        """The whole of it, (P, P), symmetric, by P products."""
        unit = torch.eye(len(self), dtype=self.gradient.dtype, device=self.gradient.device)
        H = torch.stack([self @ e for e in unit])
        return (H + H.T) / 2

    def split(self, v: Tensor) -> dict[str, Tensor]:
        """A flat vector as {parameter: tensor of its shape}."""
        return split(v, self._parameters)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a Hessian as seen by Lanczos from random vectors.

    Attributes:
        smallest, largest: the extreme eigenvalues found; the true smallest is not above, the true largest not below.
        error: how far from `smallest` and from `largest` there is an eigenvalue at most.
        nodes, weights: a quadrature of the density; the weights sum to 1, and sum weights f(nodes) estimates the mean
            of f over all P eigenvalues.
        lowest: unit vector along which the curvature is `smallest`, {parameter: tensor}.
    """

    smallest: float
    largest: float
    error: float
    nodes: Tensor
    weights: Tensor
    lowest: dict[str, Tensor]

    def density(self, at: Tensor, width: float) -> Tensor:
        """Share of the eigenvalues per unit at each place, each smeared to a normal curve of this width."""
        z = (at.unsqueeze(-1) - self.nodes) / width
        return ((-z.square() / 2).exp() * self.weights).sum(-1) / (width * sqrt(2 * pi))


def spectrum(
    loss: Tensor | Callable[[], Tensor],
    params: Params,
    *,
    n: int = 40,
    probes: int = 2,
    delta: float | None = None,
    seed: int = 0,
) -> Spectrum:
    """Extreme eigenvalues and density of the Hessian, from n products for each of some random vectors.

    Args:
        loss, params, delta: as for `Hessian`.
        n: Lanczos steps; the extremes come out first, and all of it is exact from as many steps as there are different
            eigenvalues. Memory is n flat vectors.
        probes: random vectors; more make the density smoother.
        seed: of the random vectors; the global generator is left alone.
    Raises:
        GraphError, NoGraphError, RuntimeError: as `hvp`.
        NonFiniteError: the Hessian holds inf or nan.
    Source: Lanczos 1950; density by stochastic Lanczos quadrature, Ubaru, Chen and Saad 2017.

    >>> import torch
    >>> w = torch.zeros(3, requires_grad=True)
    >>> found = spectrum((torch.tensor([1.0, 2.0, -3.0]) * w.square()).sum(), {"w": w})
    >>> round(found.smallest, 4), round(found.largest, 4)
    (-6.0, 4.0)
    """
    if n < 1 or probes < 1:
        raise InputError(f"spectrum: n={n}, probes={probes}; both must be at least 1")
    H = Hessian(loss, params, delta=delta)
    generator = torch.Generator().manual_seed(seed)
    runs = [lanczos(H, n, generator) for _ in range(probes)]
    low = min(runs, key=lambda run: float(run.values[0]))
    high = max(runs, key=lambda run: float(run.values[-1]))
    return Spectrum(
        smallest=float(low.values[0]),
        largest=float(high.values[-1]),
        error=max(float(low.errors[0]), float(high.errors[-1])),
        nodes=torch.cat([run.values for run in runs]),
        weights=torch.cat([run.vectors[0].square() for run in runs]) / probes,
        lowest=H.split(low.lowest()),
    )


@dataclass(frozen=True)
class Lanczos:
    """Eigenvalues of the tridiagonal matrix, ascending; its eigenvectors as columns; the basis as rows, (n, P)."""

    values: Tensor
    vectors: Tensor
    errors: Tensor
    basis: Tensor

    def lowest(self) -> Tensor:
        """The direction of the smallest eigenvalue, (P,), of length 1."""
        found = self.vectors[:, 0] @ self.basis
        return found / found.norm()


def lanczos(H: Hessian, n: int, generator: torch.Generator) -> Lanczos:
    """Lanczos from one random vector, each new vector made orthogonal to all earlier ones, in at most n products."""
    like = H.gradient
    start = torch.randn(len(H), generator=generator, dtype=like.dtype).to(like.device)
    basis, diagonal, beside = [start / start.norm()], [], []
    tiny = torch.finfo(like.dtype).eps * sqrt(len(H))
    while True:
        u = H @ basis[-1]
        if not bool(u.isfinite().all()):
            raise NonFiniteError("a product with the Hessian holds inf or nan; look for its birthplace with diagnose")
        diagonal.append(u @ basis[-1])
        known = torch.stack(basis)
        for _ in range(2):
            u = u - (known @ u) @ known
        rest = u.norm()
        size = max(float(d.abs()) for d in [*diagonal, *beside])
        is_closed = float(rest) <= tiny * size or len(basis) == len(H)
        if is_closed or len(basis) == n:
            break
        beside.append(rest)
        basis.append(u / rest)
    T = torch.diag(torch.stack(diagonal))
    if beside:
        T = T + torch.diag(torch.stack(beside), 1) + torch.diag(torch.stack(beside), -1)
    values, vectors = torch.linalg.eigh(T)
    errors = (rest * vectors[-1]).abs() if not is_closed else torch.zeros_like(values)
    return Lanczos(values, vectors, errors, known)


@dataclass(frozen=True)
class CriticalPoint:
    """What kind of point the weights are at.

    Attributes:
        kind: "minimum", "maximum" or "saddle"; "degenerate" where an eigenvalue is 0 and none has the other sign, so
            that second derivatives do not decide; "none" where the gradient is not 0.
        grad_norm: L2 norm of the gradient.
        smallest, largest: the extreme eigenvalues of the Hessian.
    """

    kind: str
    grad_norm: float
    smallest: float
    largest: float


DENSE_UP_TO = 200  # parameters; below it the whole Hessian costs about what Lanczos does


def critical_point(
    loss: Tensor | Callable[[], Tensor], params: Params, *, tol: float = 1e-6, n: int = 100
) -> CriticalPoint:
    """Minimum, maximum or saddle, by the signs of the Hessian's extreme eigenvalues.

    All eigenvalues are computed up to 200 parameters; above, the extremes come from Lanczos, which can miss a small
    eigenvalue: a "minimum" of a large model means that none below 0 was seen in `n` products.

    Args:
        loss, params: as for `hvp`.
        tol: eigenvalues below tol times the largest in size count as 0; the gradient counts as 0 up to tol times that
            eigenvalue, that is about tol away from the critical point.
        n: Lanczos steps.
    Raises:
        InputError: n below 1, or tol below 0 or not finite.
        GraphError, NoGraphError, RuntimeError, NonFiniteError: as `spectrum`.
    Source: Aggarwal 2018, "Problems with Second-Order Methods".

    >>> import torch
    >>> x, y = (torch.zeros((), requires_grad=True) for _ in range(2))
    >>> critical_point(x**2 - y**2, {"x": x, "y": y})
    CriticalPoint(kind='saddle', grad_norm=0.0, smallest=-2.0, largest=2.0)
    """
    if n < 1 or not (isfinite(tol) and tol >= 0):
        raise InputError(f"critical_point: n={n}, tol={tol}; expected n of at least 1 and a finite tol of at least 0")
    H = Hessian(loss, params)
    if len(H) <= DENSE_UP_TO:
        dense = H.dense()
        if not bool(dense.isfinite().all()):
            raise NonFiniteError("the Hessian holds inf or nan; look for its birthplace with diagnose")
        values = torch.linalg.eigvalsh(dense)
    else:
        values = lanczos(H, n, torch.Generator().manual_seed(0)).values
    smallest, largest, grad_norm = float(values[0]), float(values[-1]), float(H.gradient.norm())
    return CriticalPoint(_kind(grad_norm, smallest, largest, tol), grad_norm, smallest, largest)


def _kind(grad_norm: float, smallest: float, largest: float, tol: float) -> str:
    size = max(abs(smallest), abs(largest))
    if grad_norm > tol * (size or 1.0):
        return "none"
    if size == 0:
        return "degenerate"
    falls, rises = smallest < -tol * size, largest > tol * size
    if falls and rises:
        return "saddle"
    if falls:
        return "maximum" if largest < -tol * size else "degenerate"
    return "minimum" if smallest > tol * size else "degenerate"


def flat(parts: Mapping[str, Tensor]) -> Tensor:
    """All of it in one detached vector (P,), at least float32."""
    joined = torch.cat([t.detach().flatten() for t in parts.values()])
    return joined.to(torch.promote_types(joined.dtype, torch.float32))


def split(v: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A flat vector (P,) as {parameter: tensor of its shape and dtype}."""
    parts = v.split([p.numel() for p in parameters.values()])
    return {name: part.view(p.shape).to(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}


@contextmanager
def moved(params: Mapping[str, Tensor], direction: Direction, t: float) -> Iterator[None]:
    """The parameters at w + t d while the block runs; then they are the same tensors with the same bits as before.

    Their data is exchanged, not written, so that graphs made before stay valid.
    """
    before = {name: p.data for name, p in params.items()}
    try:
        for name, p in params.items():
            if name in direction:
                p.data = torch.add(before[name], direction[name].to(before[name]), alpha=t)
        yield
    finally:
        for name, p in params.items():
            p.data = before[name]


def _scalar(loss: Tensor | Callable[[], Tensor]) -> Tensor:
    if callable(loss) and not isinstance(loss, Tensor):
        with torch.enable_grad():
            loss = loss()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise GraphError(f"a Hessian belongs to one number, found {found}: pass losses.mean()")
    if not loss.requires_grad:
        raise NoGraphError("loss has no graph: it was detached or made under no_grad()")
    with torch.enable_grad():
        return loss.reshape(())


def _check_delta(delta: float | None) -> None:
    if delta is not None and not (isinstance(delta, Real) and isfinite(delta) and delta != 0):
        raise InputError(f"delta={delta!r}, expected None or a finite number other than 0: a difference needs a length")


def _direction(params: Parameters, v: Direction) -> dict[str, Tensor]:
    """A direction by the first names of the parameters."""
    if not isinstance(v, Mapping):
        raise GraphError(f"direction: a {type(v).__name__}, expected {{name of a parameter: tensor of its shape}}")
    found: dict[str, Tensor] = {}
    for key, t in v.items():
        name = params.name_of(key)
        if name is None:
            first = ", ".join(list(params.by_name)[:5])
            raise GraphError(f"direction: {key!r} is not among the {len(params.by_name)} parameters ({first}, ...)")
        if name in found:
            raise GraphError(f"direction: {key!r} and {name!r} are one tensor; give it one direction, by either name")
        p = params.by_name[name]
        if not isinstance(t, Tensor) or t.shape != p.shape:
            shown = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
            raise GraphError(f"direction at {key}: {shown}, expected the parameter's, {tuple(p.shape)}")
        found[name] = t.detach()
    return found


def _loss_gradient(loss: Tensor, parameters: Mapping[str, Tensor], *, create_graph: bool = False) -> dict[str, Tensor]:
    found = _parts(loss, parameters, create_graph)
    if all(g is None for g in found):
        raise ParameterError(
            f"none of the {len(parameters)} parameters is in the graph of the loss (first: {next(iter(parameters))}). "
            "Is this the model the loss came from, and not a copy of it?"
        )
    if create_graph and not is_differentiable(g for g in found if g is not None):
        raise OpaqueGraphError(
            "a custom function in the graph is marked once_differentiable: it has no second derivative. Give delta "
            "for differences of two gradients"
        )
    return _filled(found, parameters)


def _filled(found: Sequence[Tensor | None], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def _parts(value: Tensor, parameters: Mapping[str, Tensor], create_graph: bool) -> Sequence[Tensor | None]:
    """Derivatives of a number by each parameter, None where it does not depend on it."""
    with torch.enable_grad(), engine_errors():
        return torch.autograd.grad(
            value, list(parameters.values()), retain_graph=True, create_graph=create_graph, allow_unused=True
        )


def _exact(parameters: Mapping[str, Tensor], gradient: Direction, direction: Direction) -> dict[str, Tensor]:
    live = [(g, direction[n]) for n, g in gradient.items() if n in direction and g.requires_grad]
    if not live:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    with torch.enable_grad():
        slope = torch.stack([(g * d).sum() for g, d in live]).sum()
    if not slope.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    return _filled(_parts(slope, parameters, False), parameters)


def _dot(a: Direction, b: Direction) -> float:
    return sum(float((a[n].detach().double() * b[n].double()).sum()) for n in b)
