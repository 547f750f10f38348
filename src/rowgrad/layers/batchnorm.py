"""Batch normalization as a node of the network, its gradients, and its statistics for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowgrad.errors import InputError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class BatchNorm(nn.BatchNorm1d):
    """Batch normalization whose averages for inference are those of the batches it saw.

    For the m values v of unit i in a batch: mu = sum v / m, sigma^2 = sum (v - mu)^2 / m + epsilon (biased, epsilon
    inside), v-hat = (v - mu) / sigma, a = gamma v-hat + beta. In training that is also what `nn.BatchNorm1d` computes,
    but it puts the *unbiased* variance, m / (m - 1) times this one, into its running average; here the average is of
    the variance that was divided by. `population_statistics` puts the statistics of all training data in its place.

    Args:
        num_features, eps, momentum, affine: as in `nn.BatchNorm1d`. momentum is the weight of the newest batch in the
            exponential averages, default 0.1; None gives all batches the same weight.
    Attributes:
        weight, bias: gamma and beta, shape (num_features,), 1 and 0 at first.
        running_mean, running_var: averages of mu and of sigma^2 - epsilon.
    Shapes: input and output (m, num_features) or (examples, num_features, ...): positions count like examples.
    Raises:
        InputError: an input of another shape.
        ValueError: one value per unit in training (PyTorch's): it has no variance. An empty batch counts for nothing.

    Source: Aggarwal 2018, section 3.6, "Batch Normalization Node" and "Issues in Inference".

    >>> norm = BatchNorm(1, momentum=None)
    >>> _ = norm(torch.tensor([[1.0], [3.0]]))
    >>> norm.running_mean, norm.running_var
    (tensor([2.]), tensor([1.]))
    """

    def __init__(
        self, num_features: int, *, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise InputError(
                f"BatchNorm({self.num_features}): input of shape {tuple(input.shape)}, expected "
                f"(examples, {self.num_features}, ...)"
            )
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        if not self.training:
            return F.batch_norm(input, mean, variance, self.weight, self.bias, eps=self.eps)
        mean, variance = torch.zeros_like(mean), torch.zeros_like(variance)  # receive the batch's own, at momentum 1
        output = F.batch_norm(input, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        m = input.numel() // self.num_features
        if m > 0:
            self._average(mean, variance * ((m - 1) / m))
        return output

    @torch.no_grad()
    def _average(self, mean: Tensor, variance: Tensor) -> None:
        n_batches = self.get_buffer("num_batches_tracked").add_(1)
        newest = 1 / float(n_batches) if self.momentum is None else self.momentum
        self.get_buffer("running_mean").lerp_(mean, newest)
        self.get_buffer("running_var").lerp_(variance, newest)


def batch_norm_gradients(g: Tensor, v: Tensor, gamma: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of a loss in v, gamma and beta of a batch normalization node, in closed form.

    Law: equal to autograd's. With g = dL/da and sums over the batch,
    dL/dbeta = sum g, dL/dgamma = sum g v-hat, and
    dL/dv = gamma / sigma (g - mean(g) - v-hat mean(g v-hat)): what would shift or scale the whole batch is taken out.

    Args:
        g, v: cotangent of the node's output and its input, shape (m, units) or (examples, units, ...).
        gamma: shape (units,).
        eps: epsilon inside the variance.
    Returns:
        dL/dv, of v's shape, dL/dgamma and dL/dbeta, of shape (units,).
    Raises:
        InputError: g is not of v's shape, or gamma not of one number for each unit.

    Source: the derivatives of the equations of Aggarwal 2018, section 3.6, which leaves them to its book.

    >>> v = torch.tensor([[1.0], [3.0]])
    >>> batch_norm_gradients(torch.tensor([[1.0], [0.0]]), v, torch.ones(1), eps=0.0)
    (tensor([[0.],
            [0.]]), tensor([-1.]), tensor([1.]))
    """
    if g.shape != v.shape:
        raise InputError(f"batch_norm_gradients: g of shape {tuple(g.shape)}, expected that of v, {tuple(v.shape)}")
    if gamma.shape != v.shape[1:2]:
        raise InputError(
            f"batch_norm_gradients: gamma of shape {tuple(gamma.shape)}, expected one for each unit, "
            f"{tuple(v.shape[1:2])}"
        )
    over = [d for d in range(v.dim()) if d != 1]
    by_unit = [-1 if d == 1 else 1 for d in range(v.dim())]
    variance, mu = torch.var_mean(v, over, correction=0, keepdim=True)
    sigma = (variance + eps).sqrt()
    v_hat = (v - mu) / sigma
    g_gamma, g_beta = (g * v_hat).sum(over), g.sum(over)
    centered = g - g.mean(over, keepdim=True) - v_hat * (g * v_hat).mean(over, keepdim=True)
    return gamma.view(by_unit) / sigma * centered, g_gamma, g_beta


@torch.no_grad()
def population_statistics(
    model: nn.Module, batches: Iterable[Any], *, forward: Callable[[Any], Any] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Give every batch normalization of a model the mean and the biased variance of its input over all training data.

    Law: the statistics that one batch of all the data would have; how it is cut into batches changes nothing. A
    layer's input depends on the statistics of those before it, so the layers are done one after the other in the order
    they run, one pass over the data each, with the layers before fixed and dropout off. Afterwards every module is in
    training or evaluation mode as before. Sums are in float64.

    Args:
        model: with PyTorch's or rowgrad's batch normalization anywhere in it; their `running_mean` and `running_var`
            are overwritten.
        batches: of the training data, read once for each layer: a list, a DataLoader, no generator.
        forward: runs the model on one batch; default `model(batch)`, or of a list or tuple `model(batch[0])`.
    Returns:
        {name of the layer: (mean, variance)} in the order the layers run.
    Raises:
        InputError: no batch normalization, none that runs or that keeps statistics, no batches, batches that can be
            read only once, or a layer that runs several times in a forward pass: its statistics would depend on
            themselves.

    Source: Aggarwal 2018, section 3.6, "Issues in Inference".

    >>> model = nn.Sequential(nn.Linear(3, 2), BatchNorm(2))
    >>> x = torch.randn(10, 3)
    >>> mean, variance = population_statistics(model, [x[:4], x[4:]])["1"]
    >>> torch.allclose(mean, model[0](x).mean(0)), torch.allclose(variance, model[0](x).var(0, correction=0))
    (True, True)
    """
    if isinstance(batches, Iterator):
        raise InputError("population_statistics reads the batches once for each layer: pass a list or a DataLoader")
    norms = {module: name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)}
    if not norms:
        raise InputError(f"population_statistics: no batch normalization in the {type(model).__name__}")
    without = [name for module, name in norms.items() if module.running_mean is None]
    if without:
        raise InputError(f"{without[0]} keeps no statistics; make it with track_running_stats=True")
    run = forward or (lambda batch: model(batch[0] if isinstance(batch, list | tuple) else batch))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with _evaluating(model):
        order = _order(norms, batches, run)
        for module in order:
            mean, variance = _pooled(module, batches, run)
            module.running_mean.copy_(mean)
            module.running_var.copy_(variance)
            found[norms[module]] = (module.running_mean.clone(), module.running_var.clone())
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _order(norms: Mapping[Any, str], batches: Iterable[Any], run: Callable[[Any], Any]) -> list[Any]:
    """The layers in the order in which they run on the first batch."""
    order: list[Any] = []

    def seen(module: nn.Module, _: object) -> None:
        if module in order:
            raise InputError(
                f"{norms[module]} runs several times in a forward pass, so that its statistics would depend on "
                "themselves; give each place a batch normalization of its own"
            )
        order.append(module)

    with _watched(norms, seen):
        for batch in batches:
            run(batch)
            break
        else:
            raise InputError("population_statistics: no batches")
    if not order:
        raise InputError("population_statistics: no batch normalization ran in the forward pass")
    return order


def _pooled(norm: nn.Module, batches: Iterable[Any], run: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all a layer is given; variances of batches are joined by their means."""
    n, mean, squares = 0, torch.zeros(()), torch.zeros(())

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal n, mean, squares
        v = args[0].double().transpose(0, 1).flatten(1)
        if v.shape[1] == 0:
            return
        own_variance, own_mean = torch.var_mean(v, 1, correction=0)
        m, apart = v.shape[1], own_mean - mean.to(own_mean)
        total = n + m
        mean = mean.to(own_mean) + apart * (m / total)
        squares = squares.to(own_mean) + own_variance * m + apart.square() * (n * m / total)
        n = total

    with _watched([norm], add):
        for batch in batches:
            run(batch)
    if n == 0:
        raise InputError("population_statistics: no examples in the batches")
    return mean, squares / n


@contextmanager
def _watched(modules: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
