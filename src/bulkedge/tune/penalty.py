"""A loss that rises where a fine-tune writes new leading singular vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import NOT_NEGATIVE, check_values, optional, whole
from bulkedge._linmap import LinearMap
from bulkedge._precision import full_precision
from bulkedge.triplet import GolubKahan, singular_triplet

from ._held import require_form
from ._layers import Adapted, AdaptedMatrix, adapted_matrices
from ._matrix import SEVERAL, like, require_in_memory
from ._saved import entries
from ._thresholds import NoBulkError, base_spectrum, note_without_bulk

Schedule = Union[float, Callable[[int], float]]  # noqa: UP007 — Python 3.10
"""A weight, or a function from the number of calls so far to one."""

BASE_ANGLE = 1e-2
"""The sine of the angle to which the base's leading space is computed; the penalty hardly depends
on it."""
GAP = 0.02
"""The fraction of σ₁ by which a value must exceed those that do not count.  The derivative of its
vectors is that of a vector at a gap of this size, which single precision can compute."""
EQUAL = 1e-3
"""Neighbouring values with a smaller relative difference count as equal."""
COUNT_RTOL = 1e-3
"""The residual, relative to σ₁, of the values that decide how many triplets count."""


@dataclass
class _Layer:
    """A matrix, the edge and the leading space of its base, and the vectors of the last solve."""

    matrix: AdaptedMatrix
    edge: float
    left: Tensor
    right: Tensor
    last: tuple[Tensor, Tensor] | None = None

    def guess(self, W: LinearMap) -> tuple[Tensor, Tensor] | None:
        """The vectors of the last solve, in the present dtype and on the present device."""
        return like(W, self.last)


class Scheduled:
    """A penalty whose weight may follow a schedule; the number of its calls is its state.

    Args:
        weight: A number, or a function from the number of calls so far to one.

    Attributes:
        calls: The number of calls so far.

    Raises:
        InputError: If the weight is negative or not finite.
    """

    def __init__(self, weight: Schedule) -> None:
        if not callable(weight):
            check_values(self, weight=(weight, NOT_NEGATIVE))
        self.weight = weight
        self.calls = 0

    def next_weight(self) -> float:
        """The weight of this call, which is counted."""
        weight = self.weight(self.calls) if callable(self.weight) else self.weight
        self.calls += 1
        return weight

    def state_dict(self) -> dict[str, Any]:
        """The number of calls, which is the place in the schedule and in the round of layers."""
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            InputError: If it is not what :meth:`state_dict` returns.
        """
        self.calls = entries(type(self).__name__, state, calls=whole(0))["calls"]


class IntruderPenalty(Scheduled):
    """The energy of leading tuned vectors outside the pretrained subspace, differentiable.

    For a layer with leading triplets (σ_i, u_i, v_i) of ``W0 + s·B·A``, Z_u and Z_v spanning the
    leading 2k base vectors on either side, and the bulk's edge e:

        P = Σ_{i≤k} (σ_i − c)₊/e · [1 − (‖Z_uᵀu_i‖² + ‖Z_vᵀv_i‖²)/2],   c = max(e, σ_{k+1}) + σ₁/50

    A triplet counts by how far its value exceeds c, and so exceeds the bulk and the values after
    the k-th: the vector of a value that approaches others is not defined at equality, and its
    weight vanishes before.  Values among the first k that agree to a thousandth share their mean
    weight, so that only the space of their vectors matters.  c is held constant; the gradient goes
    through σ, u and v (docs/triplets.md).

    Each call computes the penalty of the next ``per_call`` layers, in turn, and scales the sum up
    to the number of all layers, so that its mean over a round is the sum over all layers.

    Cost of a call: some ten thin passes over each of its layers, and as many backward.

    Args:
        model: A model wrapped by PEFT, on the device where it trains; or adapted matrices.
        weight: The factor of the sum over all layers: a number, or a function of the number of
            calls so far (a schedule).
        k: How many leading triplets.
        per_call: The number of layers a call; None for all.
        adapter: Which adapter; the active one if None.
        include: Patterns of module names.
        exclude: Patterns of the names of those that are left out.

    Attributes:
        calls: The number of calls so far.

    Raises:
        InputError: If k or ``per_call`` is not positive, or no base has a bulk (one layer without
            is left alone with a note).  At a call, if a layer is gone or replaced, both its factors
            are frozen, or its values are not finite.

    Example:
        >>> from bulkedge.tune import AdaptedMatrix
        >>> generator = torch.Generator().manual_seed(0)
        >>> W0, B, A = (torch.randn(*s, generator=generator) for s in [(50, 40), (50, 1), (1, 40)])
        >>> B.requires_grad_()
        tensor(...
        >>> penalty = IntruderPenalty([AdaptedMatrix("layer", W0, A, B)], k=3)
        >>> value = penalty()
        >>> value.backward()
        >>> bool(value > 0), B.grad.shape
        (True, torch.Size([50, 1]))
    """

    takes = (SEVERAL,)

    def __init__(
        self,
        model: Adapted,
        *,
        weight: Schedule = 1.0,
        k: int = 8,
        per_call: int | None = 4,
        adapter: str | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
    ) -> None:
        check_values(self, k=(k, whole(1)), per_call=(per_call, optional(whole(1))))
        super().__init__(weight)
        self.k = k
        matrices = adapted_matrices(model, adapter=adapter, include=include, exclude=exclude)
        require_form(self, matrices)
        self.layers = [found for x in matrices if (found := _prepare(x, k)) is not None]
        note_without_bulk(matrices, self.matrices)
        self.per_call = min(per_call or len(self.layers), len(self.layers))

    def __call__(self) -> Tensor:
        """The present penalty times its weight: a scalar to be added to the loss."""
        first = self.calls * self.per_call
        now = [self.layers[(first + i) % len(self.layers)] for i in range(self.per_call)]
        weight = self.next_weight()
        terms = [self._penalty_of(layer) for layer in now]
        total = torch.stack([term.to(terms[0].device) for term in terms]).sum()
        return weight * len(self.layers) / self.per_call * total

    @property
    def matrices(self) -> list[AdaptedMatrix]:
        """The matrices that are penalised."""
        return [layer.matrix for layer in self.layers]

    def values(self) -> dict[str, float]:
        """The penalty of every layer by name, without the weight and without a gradient."""
        with torch.no_grad():
            return {layer.matrix.name: float(self._penalty_of(layer)) for layer in self.layers}

    def _penalty_of(self, layer: _Layer) -> Tensor:
        """The penalty of one layer, in full precision even under autocast."""
        matrix = layer.matrix
        matrix.check()
        if torch.is_grad_enabled() and not any(matrix.trained):
            raise InputError(
                f"{matrix.name}: expected a factor that is trained, got two that are frozen, on "
                "which a penalty has no effect; leave it out with exclude="
            )
        device = require_in_memory(matrix.name, matrix.parameters[0]).device
        with full_precision(device):
            try:
                return self._compute(layer)
            except InputError as error:
                name = f"{matrix.name}: "
                raise InputError(f"{name}{str(error).removeprefix(name)}") from error

    def _compute(self, layer: _Layer) -> Tensor:
        """The penalty by two solves: the first decides which triplets count."""
        W = layer.matrix.tuned_map()
        k = min(self.k, *W.shape)
        with torch.no_grad():
            size, solver = min(k + 1, *W.shape), GolubKahan(rtol=COUNT_RTOL)
            rough = singular_triplet(W, size, solver=solver, init=layer.guess(W), strict=False)
            layer.last = rough.u, rough.v
            after_k = float(rough.sigma[k]) if size > k else 0.0
            c = max(layer.edge, after_k) + GAP * float(rough.sigma[0])
            count = int((rough.sigma[:k] > c).sum())
        if count == 0:
            return 0.0 * (layer.matrix.A.sum() + layer.matrix.B.sum())
        found = singular_triplet(W, count, solver=GolubKahan(), init=layer.last, strict=False)
        weight = (found.sigma - c).clamp_min(0) / layer.edge
        inside = (layer.left.to(found.u).mT @ found.u).square().sum(dim=0)
        inside = inside + (layer.right.to(found.v).mT @ found.v).square().sum(dim=0)
        return ((_averaging(found.sigma.detach()) @ weight) * (1 - inside / 2)).sum()


def _averaging(sigma: Tensor) -> Tensor:
    """The matrix that replaces each entry by the mean over its group of near-equal values."""
    apart = sigma[:-1] - sigma[1:] > EQUAL * sigma[:-1]
    group = torch.cat([apart.new_zeros(1).long(), apart.long()]).cumsum(0)
    same = (group == group[:, None]).to(sigma)
    return same / same.sum(dim=1, keepdim=True)


def _prepare(matrix: AdaptedMatrix, k: int) -> _Layer | None:
    """A layer with edge and leading space of its base on both sides; None without a bulk."""
    base = matrix.base_map()
    try:
        edge = base_spectrum(matrix.name, base).fit.edge
    except NoBulkError:
        return None
    size = min(2 * k, *base.shape)
    with torch.no_grad():
        space = singular_triplet(base, size, solver=GolubKahan(vector_tol=BASE_ANGLE), strict=False)
    return _Layer(matrix, edge, space.u, space.v)
