"""The Jacobian of the losses: made from one backward pass, asked through products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce, wraps
from typing import Any, Literal, ParamSpec, TypeVar, overload

import torch
from torch import Tensor, nn

from rowgrad.errors import (
    ConsumedJacobianError,
    NonFiniteError,
    StaleJacobianError,
)
from rowgrad.parameters import Parameters
from rowgrad.rows import memory
from rowgrad.rows.block import sum_of
from rowgrad.rows.explain import Explanation
from rowgrad.rows.factors import Dense, in_type, wide_dtype
from rowgrad.rows.index import positions, shown
from rowgrad.rows.loss import weighted_rows
from rowgrad.rows.pack import Blocks, Pack
from rowgrad.rows.pairs import gram, remembering

FEW_PARTS = 8  # up to so many are added up one by one, more at once

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _product(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Products neither record gradients nor follow an ambient autocast."""

    @wraps(method)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = args[0]._losses.device.type  # type: ignore[attr-defined]
        with torch.no_grad():
            if not torch.is_autocast_enabled(device):
                return method(*args, **kwargs)
            with torch.autocast(device, enabled=False):
                return method(*args, **kwargs)

    return wrapped


class Jacobian:
    """The rows of the Jacobian of B losses with respect to P parameters, never stored as such.

    Row j is the gradient of `losses[j]`. Made by `rowgrad.jacobian`. Every product is detached, in at least float32
    while it is summed, and works under `torch.no_grad()`.

    >>> import torch, rowgrad
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> J = rowgrad.jacobian(model(torch.tensor([[3.0, 4.0], [4.0, -3.0]])).squeeze(1), model)
    >>> J
    Jacobian(2 examples x 2 parameters in 1 tensors)
    >>> J.norms()
    tensor([5., 5.])
    >>> J.gram()
    tensor([[25.,  0.],
            [ 0., 25.]])
    >>> J.weighted_sum(0.5)["weight"]
    tensor([[3.5000, 0.5000]])
    """

    def __init__(
        self,
        losses: Tensor,
        parameters: Parameters,
        blocks: Blocks | None,
        explanation: Explanation,
    ) -> None:
        self._losses = losses
        self._parameters = parameters
        self._blocks = blocks
        self._explanation = explanation
        self._watched = [(name, p, p._version) for name, p in parameters.by_name.items()]
        if blocks is not None:
            self._watched += blocks.held()
        self._sq_norms: dict[str, Tensor] = {}
        self._whole: Tensor | None = None
        self._packed: Pack | None = None  # small rows, for norms that are asked when the factors are gone

    @classmethod
    def of_norms(
        cls, losses: Tensor, parameters: Parameters, sq_norms: Mapping[str, Tensor], small: Mapping[str, Dense]
    ) -> Jacobian:
        """From squared norms that were read while the cotangents streamed by, but for those of small rows, which were
        kept. No other product is left."""
        J = cls(losses, parameters, Blocks({}, None), Explanation([]))
        shapes = {name: p.shape for name, p in parameters.by_name.items() if name in small}
        J._packed = Pack.of({name: small[name] for name in shapes}, shapes)  # in order: sums round as in other calls
        absent = torch.zeros(len(J), dtype=J._dtype, device=losses.device)
        packed = () if J._packed is None else J._packed.shapes
        for name, p in parameters.by_name.items():
            if name in packed:
                continue
            found = sq_norms.get(name)
            if found is None:
                found = in_type(small[name].sq_norms(), wide_dtype(p.dtype)) if name in small else absent
            J._sq_norms[name] = found
        return J

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order given."""
        return tuple(self._parameters.by_name)

    @property
    def losses(self) -> Tensor:
        """The losses the rows belong to, shape (B,), detached."""
        return self._losses.clone()

    @property
    def shape(self) -> tuple[int, int]:
        """(B examples, P parameters)."""
        return len(self), sum(p.numel() for p in self._parameters.by_name.values())

    @property
    def couplings(self) -> tuple[str, ...]:
        """Names of the nodes at which examples meet; empty when every loss depends on its own example alone."""
        return self._explanation.couplings

    def __len__(self) -> int:
        return self._losses.shape[0]

    def __repr__(self) -> str:
        b, p = self.shape
        return f"Jacobian({b} examples x {p:,} parameters in {len(self.names)} tensors)"

    def explain(self) -> Explanation:
        """Where each parameter is used, by which rule, how the examples lie there and how that is known."""
        return self._explanation

    # -- norms --------------------------------------------------------------------------------------------------------

    @overload
    def sq_norms(self, by: None = None) -> Tensor: ...
    @overload
    def sq_norms(self, by: str | Mapping[str, Any]) -> dict[str, Tensor]: ...
    @_product
    def sq_norms(self, by: str | Mapping[str, Any] | None = None) -> Tensor | dict[str, Tensor]:
        """Squared L2 norm of each row, shape (B,), or of its parts.

        Squares are taken in the dtype of the rows, float32 at least, as `torch.linalg.vector_norm` takes them: a norm
        below 1e-19 in float32 (1e-154 in float64) comes out as 0 or inexact, one above 1e19 (1e154) as inf.

        Args:
            by: None, "parameter", "module", or {group: names, tensors or modules}.
        """
        if by is None:
            return self._whole_sq_norms().clone()
        groups = self._groups(by)
        per_parameter = self._parameter_sq_norms({n for names in groups.values() for n in names})
        return {group: self._total([per_parameter[n] for n in names]) for group, names in groups.items()}

    def _whole_sq_norms(self) -> Tensor:
        """Of all parameters, (B,); computed once, not to be written to."""
        if self._whole is None:
            if self._packed is None and not self._sq_norms.keys() >= set(self.names):
                self._packed, _ = self._live().packed(self.names)
            pack = self._packed
            rest = [n for n in self.names if pack is None or n not in pack.shapes]
            per_parameter = self._parameter_sq_norms(set(rest))
            parts = [per_parameter[n] for n in rest]
            self._whole = self._total(parts if pack is None else [*parts, pack.rows.sq_norms()])
        return self._whole

    @overload
    def norms(self, by: None = None) -> Tensor: ...
    @overload
    def norms(self, by: str | Mapping[str, Any]) -> dict[str, Tensor]: ...
    @_product
    def norms(self, by: str | Mapping[str, Any] | None = None) -> Tensor | dict[str, Tensor]:
        """L2 norm of each row, shape (B,), or of its parts; see `sq_norms`.

        Source: Goodfellow 2015, "Efficient per-example gradient computations", section 4.
        """
        if by is None:
            return self._whole_sq_norms().clamp(min=0).sqrt_()
        return {group: sq.clamp(min=0).sqrt_() for group, sq in self.sq_norms(by).items()}

    def _groups(self, by: str | Mapping[str, Any]) -> dict[str, list[str]]:
        if by == "parameter":
            return {name: [name] for name in self.names}
        if by == "module":
            groups: dict[str, list[str]] = {}
            for name in self.names:
                groups.setdefault(name.rpartition(".")[0], []).append(name)
            return groups
        if isinstance(by, Mapping):
            return {group: list(dict.fromkeys(self._parameters.resolve(key))) for group, key in by.items()}
        raise ValueError(f'by={by!r}: expected None, "parameter", "module" or a mapping from group to parameters')

    def _parameter_sq_norms(self, names: set[str]) -> dict[str, Tensor]:
        missing = [n for n in self.names if n in names and n not in self._sq_norms]
        if self._packed is not None and any(n in self._packed.shapes for n in missing):
            found = self._packed.sq_norms()
            self._sq_norms |= {n: in_type(s, wide_dtype(self._parameters.by_name[n].dtype)) for n, s in found.items()}
            missing = [n for n in missing if n not in self._sq_norms]
        if missing:
            blocks = self._live()
            for name in missing:
                if name not in blocks.general_names:
                    self._sq_norms[name] = blocks.sq_norms(name)
            streamed = [n for n in missing if n in blocks.general_names]
            if streamed:
                rows = [{n: r[n].square().sum() for n in streamed} for r in self._streamed_rows(streamed)]
                self._sq_norms |= {n: self._stacked([r[n] for r in rows]) for n in streamed}
        return self._sq_norms

    def _total(self, parts: list[Tensor]) -> Tensor:
        """(B,): the sum of parts of any dtype and device."""
        if not parts:
            return self._losses.new_zeros(len(self), dtype=self._dtype)
        widest, device = max((p.dtype for p in parts), key=lambda d: d.itemsize), parts[0].device
        parts = [p if p.dtype == widest and p.device == device else p.to(device, widest) for p in parts]
        return sum_of(parts) if 1 < len(parts) <= FEW_PARTS else torch.stack(parts).sum(0)

    def _stacked(self, parts: list[Tensor], shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) from what each row gave, also where there are no rows."""
        return torch.stack(parts) if parts else self._losses.new_zeros(0, *shape, dtype=self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return wide_dtype(self._losses.dtype)

    # -- linear products ----------------------------------------------------------------------------------------------

    @_product
    def weighted_sum(self, c: Any) -> dict[str, Tensor]:
        """sum_j c_j row_j, by parameter name, in each parameter's shape and dtype.

        Args:
            c: a number, shape (B,), or {parameter or module: (B,)} for weights that differ by layer.
        """
        return self._in_own_dtypes(self._weighted_sum(c, spend=False))

    def _weighted_sum(self, c: Any, *, spend: bool) -> dict[str, Tensor]:
        """In the dtypes of the sums. `spend`: the factors of each parameter are freed once its sum is there."""
        blocks, weights = self._live(), self._weights(c)
        streamed = list(blocks.general_names)
        found = {n: torch.zeros_like(self._parameters.by_name[n], dtype=blocks.by_name[n].dtype) for n in streamed}
        if streamed:
            for j, rows in enumerate(self._streamed_rows(streamed)):
                for n in streamed:
                    found[n] += weights[n][j] * rows[n]
        if len({id(w) for w in weights.values()}) == 1:
            pack, _ = blocks.packed(self.names)
            if pack is not None:
                found |= pack.weighted_sum(weights[self.names[0]])
        if spend:
            self._spend()
        for name in reversed(self.names):  # of the last layers more is freed: the first one's input is not ours
            if name not in found:
                block = blocks.by_name.pop(name) if spend else blocks.by_name[name]
                found[name] = block.weighted_sum(weights[name])
                del block
        return found

    def _in_own_dtypes(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In the order of the parameters."""
        parameters = {n: p for n, p in self._parameters.by_name.items() if n in found}
        return {n: in_type(found[n], p.dtype) for n, p in parameters.items()}

    def _weights(self, c: Any) -> dict[str, Tensor]:
        if isinstance(c, Mapping):
            weights: dict[str, Tensor] = {}
            for key, value in c.items():
                weights |= dict.fromkeys(self._parameters.resolve(key), self._weight(value))
            missing = [n for n in self.names if n not in weights]
            if missing:
                raise ValueError(
                    f"c: no weights for {missing[0]}"
                    + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                    + '; give every parameter one, {"": c} covers all'
                )
            return weights
        shared = self._weight(c)
        return dict.fromkeys(self.names, shared)

    def _weight(self, c: Any) -> Tensor:
        read_as = None if hasattr(c, "dtype") else self._dtype  # numbers would lose digits in the default dtype
        weight = torch.as_tensor(c, dtype=read_as, device=self._losses.device).detach()
        if weight.ndim == 0:
            weight = weight.expand(len(self))
        if weight.shape != (len(self),):
            raise ValueError(f"c has shape {tuple(weight.shape)}, expected a number or ({len(self)},), one per example")
        return weight.to(torch.promote_types(weight.dtype, self._dtype))

    @_product
    def dot(self, direction: Any) -> Tensor:
        """J v: the derivative of each loss along a direction in parameter space, shape (B,); also written `J @ v`.

        For a direction that is known before the forward pass `rowgrad.jvp` needs neither a graph nor a backward pass.

        Args:
            direction: {name: tensor}, where parameters left out count as zero, or a sequence of one tensor for each
                parameter in the order of `names`; each of its parameter's shape.
        Raises:
            KeyError: a name that no parameter has.
            ValueError: a tensor of another shape, another number of tensors, or one parameter given twice.
        """
        blocks = self._live()
        parts = self._parameters.direction(direction)
        pack, rest = blocks.packed(parts)
        dots = [blocks.by_name[n].dot(parts[n].detach()) for n in rest if n not in blocks.general_names]
        if pack is not None:
            dots.append(pack.dot(parts))
        streamed = [n for n in parts if n in blocks.general_names]
        if streamed:
            rows = [sum_of((r[n] * parts[n]).sum() for n in streamed) for r in self._streamed_rows(streamed)]
            dots.append(self._stacked(rows))
        return self._total(dots)

    __matmul__ = dot

    # -- products of examples -----------------------------------------------------------------------------------------

    @_product
    def gram(self, other: Jacobian | None = None) -> Tensor:
        """J J'^T: the dot product of every row with every row of `other` (default: itself), shape (B, B')."""
        other = self if other is None else other
        mine, theirs = self._live(), other._live()
        shared = self._shared_names(other)
        total = torch.zeros(len(self), len(other), dtype=self._dtype, device=self._losses.device)
        streamed = [n for n in shared if n in mine.general_names | theirs.general_names]
        pack, rest = mine.packed(shared) if other is self else (None, shared)
        with remembering():
            for name in rest:
                if name not in streamed:
                    part = mine.gram(name, theirs).to(total.device)
                    total = total.add_(part) if part.dtype == total.dtype else total + part
        if pack is not None:
            total = total + gram(pack.rows, pack.rows).to(total.device)
        if streamed:
            for j, left in enumerate(self._streamed_rows(streamed)):
                for k, right in enumerate(other._streamed_rows(streamed)):
                    total[j, k] += sum_of((left[n] * right[n]).sum() for n in streamed)
        return total

    @_product
    def cosines(self, other: Jacobian | None = None) -> Tensor:
        """Cosine of the angle between every row and every row of `other`, shape (B, B'); nan for a zero row."""
        other_norms = self.norms() if other is None else other.norms()
        norms = self.norms()
        return (self.gram(other) / (norms.unsqueeze(1) * other_norms)).clamp(-1, 1)

    @_product
    def diag_gram(self, other: Jacobian) -> Tensor:
        """<row j, row j of other>, shape (B,): the same examples under two losses, or before and after a step."""
        if len(other) != len(self):
            raise ValueError(f"diag_gram needs equally many examples, found {len(self)} and {len(other)}")
        mine, theirs = self._live(), other._live()
        shared = self._shared_names(other)
        streamed = [n for n in shared if n in mine.general_names | theirs.general_names]
        parts = [mine.inner(n, theirs) for n in shared if n not in streamed]
        if streamed:
            pairs = zip(
                self._streamed_rows(streamed),
                other._streamed_rows(streamed),
                strict=True,
            )
            parts.append(self._stacked([sum_of((a[n] * b[n]).sum() for n in streamed) for a, b in pairs]))
        return self._total(parts)

    def _shared_names(self, other: Jacobian) -> list[str]:
        shapes = {n: p.shape for n, p in other._parameters.by_name.items()}
        mine = {n: p.shape for n, p in self._parameters.by_name.items()}
        if mine != shapes:
            odd = sorted(set(mine.items()) ^ set(shapes.items()), key=str)[0][0]
            raise ValueError(f"the two Jacobians have different parameters: {odd} is not in both with the same shape")
        return list(mine)

    # -- parts --------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Jacobian:
        """A sub-Jacobian: some parameters, or some examples. No row is formed.

        Args:
            key: for parameters a name, a module's name, a tensor, a module or a list of these; for examples a whole
                number, several of them, a slice or a mask of shape (B,).
        Raises:
            KeyError: no such parameter.
            IndexError: no such example, or `key` is none of these.
        """
        several = isinstance(key, (list, tuple))
        named = [self._means_parameters(k) for k in (key if several else [key])]
        if named and all(named):
            return self._with_names(list(dict.fromkeys(self._parameters.resolve(key))))
        if any(named):
            raise IndexError(
                f"J[{', '.join(map(shown, key))}] names parameters and examples at once; choose one kind at a time, "
                "J[...][...]"
            )
        return self._with_examples(key)

    def _means_parameters(self, key: Any) -> bool:
        if isinstance(key, Tensor):
            return isinstance(key, nn.Parameter) or self._parameters.name_of(key) is not None
        return isinstance(key, (str, nn.Module))

    def _with_names(self, names: list[str]) -> Jacobian:
        blocks = self._live()
        kept = {n: p for n, p in self._parameters.by_name.items() if n in names}
        part = Jacobian(
            self._losses,
            Parameters(kept, {a: n for a, n in self._parameters.aliases.items() if n in kept}),
            blocks.part(kept),
            self._explanation,
        )
        part._sq_norms = {n: s for n, s in self._sq_norms.items() if n in kept}
        return part

    def _with_examples(self, key: Any) -> Jacobian:
        index = positions(key, len(self), self._losses.device)
        blocks = self._live()
        general = None if blocks.general is None else blocks.general.select(index.tolist())
        chosen = {n: b.select(index) for n, b in blocks.by_name.items()}
        part = Jacobian(
            self._losses[index],
            self._parameters,
            Blocks(chosen, general, blocks.general_names, blocks.max_bytes),
            self._explanation,
        )
        part._sq_norms = {n: s[index] for n, s in self._sq_norms.items()}
        return part

    def factors(self, name: Any) -> list[tuple[Tensor | None, Tensor, Tensor]]:
        """(H, Zbar, owner) for each use of one parameter.

        For a weight matrix H is (N, d), Zbar (N, p) and owner (N,): row j of the Jacobian is the sum over the positions
        n that example j owns of the outer product of H_n and Zbar_n, in the parameter's orientation. For an embedding H
        holds the looked-up ids, (N,). For biases, scales and the general path H is None and Zbar holds the rows. They
        may be what the Jacobian holds itself: not to be written to.

        Source: Goodfellow 2015, section 4.
        """
        block = self._live().by_name[self._parameters.one_name(name)]
        return [form.factors() for region in block.regions for form in region.forms]

    @overload
    def dense(self, as_dict: Literal[False] = False) -> Tensor: ...
    @overload
    def dense(self, as_dict: Literal[True]) -> dict[str, Tensor]: ...
    @_product
    def dense(self, as_dict: bool = False) -> Tensor | dict[str, Tensor]:
        """All rows written out, shape (B, P) in the order of `names`, or {name: (B, *shape)}."""
        blocks = self._live()
        found = {n: blocks.by_name[n].dense() for n in self.names if n not in blocks.general_names}
        streamed = list(blocks.general_names)
        if streamed:
            rows = list(self._streamed_rows(streamed))
            found |= {n: self._stacked([r[n] for r in rows], self._parameters.by_name[n].shape) for n in streamed}
        ordered = {n: found[n] for n in self.names}
        if as_dict:
            return ordered
        parts = [t.reshape(len(self), p.numel()) for t, p in self._with_parameters(ordered)]
        like = torch.empty(0, dtype=reduce(torch.promote_types, (t.dtype for t in parts)), device=parts[0].device)
        return torch.cat(parts, 1, out=memory.empty((len(self), sum(t.shape[1] for t in parts)), like))

    def _with_parameters(self, by_name: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return ((t, self._parameters.by_name[n]) for n, t in by_name.items())

    def _streamed_rows(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Rows of parameters whose rows are too large to keep, one example at a time."""
        blocks = self._live()
        for j in range(len(self)):
            index = torch.tensor([j], device=self._losses.device)
            found = {n: blocks.by_name[n].select(index).dense()[0] for n in names}
            if blocks.general is not None:
                for name, part in blocks.general.row(j).items():
                    if name in found:
                        found[name] = found[name] + part
            yield found

    # -- back into training -------------------------------------------------------------------------------------------

    def backward(
        self,
        c: Any,
        *,
        nonfinite: str = "raise",
        transform: Any = None,
        retain: bool = False,
    ) -> None:
        """Add sum_j c_j row_j to the parameters' `.grad`, as `losses.backward(c)` would, without the model.

        Hooks that wait for gradients (accumulation hooks, the reducer of DistributedDataParallel) run as usual. The
        factors are freed afterwards.

        Args:
            c: a number, shape (B,), or {parameter or module: (B,)}. Required: a mean over the batch is c = 1 / B.
            nonfinite: what to do with examples whose row holds inf or nan: "raise", "zero" (leave them out) or
                "propagate".
            transform: f(name, Zbar) -> Zbar', applied to the cotangents of each use before the last product
                (Goodfellow 2015, section 6).
            retain: keep the factors for further products.

        Raises:
            NonFiniteError: with nonfinite="raise", naming the examples.
        """
        found = self._in_own_dtypes(self._gradients(c, nonfinite, transform, spend=not retain))

        def handed_over(_: Tensor) -> list[Tensor | None]:
            """None is left here: a gradient that somebody else holds would be copied."""
            return [found.pop(name, None) for name in self.names]

        weighted_rows(handed_over, self._losses.new_zeros(()), list(self._parameters.by_name.values())).backward()

    def loss(self, c: Any, *, nonfinite: str = "propagate", retain: bool = False) -> Tensor:
        """A scalar with value and parameter gradient of `(c.detach() * losses).sum()`.

        `.backward()` on it, or on anything computed from it (a scaler's product, a division by the number of
        accumulated batches), adds to `.grad` what `losses` weighted by `c` would, without the model. With weights by
        layer the value is weighted by their mean over the parameters.

        Args:
            c, nonfinite, retain: as for `backward`. The default lets non-finite gradients through, as a scaler expects.
        """
        weights = self._weights(c)
        shared = len({id(w) for w in weights.values()}) == 1
        average = weights[self.names[0]] if shared else sum_of(weights.values()) / len(weights)
        value = torch.where(average == 0, 0.0, average * self._losses.to(average.dtype)).sum()

        by_layer = average if shared else weights
        # the general path calls nodes, which answer less in the middle of somebody's backward pass
        early = self._gradients(by_layer, nonfinite, None, spend=False) if self._live().general_names else None

        def gradients(upstream: Tensor) -> list[Tensor | None]:
            if early is None:
                scaled = average * upstream if shared else {name: w * upstream for name, w in weights.items()}
                found = self._gradients(scaled, nonfinite, None, spend=not retain)
            else:
                self._live()
                found = {name: g * upstream.to(g.dtype) for name, g in early.items()}
                if not retain:
                    self._spend()
            found = self._in_own_dtypes(found)
            return [found.get(name) for name in self.names]

        return weighted_rows(gradients, value.to(self._dtype), list(self._parameters.by_name.values()))

    def group_names(self, key: Any) -> list[str]:
        """Names of the parameters meant by a name, a module's name, a tensor, a module or a collection of them."""
        return list(dict.fromkeys(self._parameters.resolve(key)))

    @_product
    def _gradients(self, c: Any, nonfinite: str, transform: Any, *, spend: bool) -> dict[str, Tensor]:
        """Weighted sums of the parameters that the graph reaches, in the dtypes of the sums."""
        if nonfinite not in ("raise", "zero", "propagate"):
            raise ValueError(f'nonfinite={nonfinite!r}: expected "raise", "zero" or "propagate"')
        source = self
        if nonfinite != "propagate":
            finite = self._whole_sq_norms().isfinite()
            bad = [] if bool(finite.all()) else (~finite).nonzero().squeeze(1).tolist()
            if bad and nonfinite == "raise":
                raise NonFiniteError(
                    f"the gradient of {len(bad)} of {len(self)} examples is not finite (first: example {bad[0]}, loss "
                    f'{float(self._losses[bad[0]]):g}). nonfinite="zero" leaves them out, "propagate" lets them through'
                )
            if bad:
                good = finite.nonzero().squeeze(1)
                weights = self._weights(c)
                chosen = {id(w): w[good] for w in weights.values()}
                source, c = self[good], {n: chosen[id(w)] for n, w in weights.items()}
        if transform is not None:
            source = source._transformed(transform)
        blocks = source._live()
        reached = {n for n, b in blocks.by_name.items() if not b.is_absent} | blocks.general_names
        if spend and source is not self:
            self._spend()
        return {n: g for n, g in source._weighted_sum(c, spend=spend).items() if n in reached}

    def _transformed(self, transform: Any) -> Jacobian:
        blocks = self._live()
        if blocks.general_names:
            raise ValueError(
                f"transform needs the factors of every use, and {min(blocks.general_names)} goes the general "
                "path without keeping its rows; raise max_bytes"
            )
        changed = {n: b.with_cotangents(lambda z, n=n: transform(n, z)) for n, b in blocks.by_name.items()}
        return Jacobian(self._losses, self._parameters, Blocks(changed, None), self._explanation)

    # -- state --------------------------------------------------------------------------------------------------------

    def _changed(self, name: str, t: Tensor) -> str:
        anew = "Compute the losses and the Jacobian anew, or ask for products before"
        if t is self._parameters.by_name[name]:
            return f"{name} was changed after this Jacobian was made (an optimizer step?). {anew} the step"
        return (
            f"a tensor that the gradient of {name} is made of was written to after this Jacobian was made (a batch "
            f"that is filled again in place?). {anew}"
        )

    def _spend(self) -> None:
        """Hold no factors any longer."""
        self._blocks, self._watched = None, []

    def _live(self) -> Blocks:
        if self._blocks is None:
            raise ConsumedJacobianError(
                "the factors were freed by an earlier backward; pass retain=True to it, or ask for everything before"
            )
        for name, t, version in self._watched:
            if t._version != version:
                raise StaleJacobianError(self._changed(name, t))
        return self._blocks
