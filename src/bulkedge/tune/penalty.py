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

from ._edge import measure
from ._layers import Adapted, AdaptedMatrix, adapted_matrices
from ._matrix import like, require_in_memory

Schedule = Union[float, Callable[[int], float]]  # noqa: UP007 — Python 3.10

BASE_ANGLE = 1e-2
"""To what sine the pretrained space is sought: any space nearby will do."""
CLEAR = 0.02
"""Part of σ₁ by which a value stands clear of those that do not count: what its vectors' derivative
needs, in single precision."""
EQUAL = 1e-3
"""Neighbours that differ by no more, relatively, are one space."""
LOOK = 1e-3
"""Residual, relative to σ₁, of the values that tell which of them count."""


@dataclass
class _Layer:
    """A matrix, what its base is like, and where its last solve ended."""

    matrix: AdaptedMatrix
    edge: float
    left: Tensor
    right: Tensor
    last: tuple[Tensor, Tensor] | None = None

    def begin(self, W: LinearMap) -> tuple[Tensor, Tensor] | None:
        """Where the last solve ended, in the dtype and on the device that the layer has now."""
        return like(W, self.last)


class IntruderPenalty:
    """The energy of leading tuned vectors outside the pretrained subspace, differentiable.

    For a layer with leading triplets (σ_i, u_i, v_i) of ``W0 + s·B·A``, Z_u and Z_v spanning the
    leading 2k base vectors on either side, and the bulk's edge e:

        P = Σ_{i≤k} (σ_i − c)₊/e · [1 − (‖Z_uᵀu_i‖² + ‖Z_vᵀv_i‖²)/2],   c = max(e, σ_{k+1}) + σ₁/50

    Only what stands clear of the bulk and of the values after the k-th counts, in proportion: a
    vector among many equals has no direction of its own, and its weight goes to zero before that.
    Among the first k, values that agree to a thousandth count with their mean weight, so that only
    the space that their vectors span matters.  c is taken for a constant; the gradient goes through
    σ, u and v (docs/triplets.md).

    Each call looks at ``per_call`` layers, one after the other in turn, and scales their mean up to
    all: the expectation is that of looking at all of them.

    Cost of a call: some ten thin passes over each of its layers, and as many backward.

    Args:
        model: A model wrapped by PEFT, on the device where it trains; or adapted matrices.
        weight: What the sum over all layers is multiplied by; a number, or a function of the count
            of calls so far: a schedule.
        k: How many leading triplets.
        per_call: How many layers a call looks at; None for all.
        adapter: Which adapter; the active one if None.
        modules: Patterns of module names.

    Attributes:
        calls: How many there were.

    Raises:
        InputError: If k or ``per_call`` is not positive, or a base has no bulk; later, if a layer
            is gone or another one, both its factors are frozen, or its numbers are not finite.

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

    def __init__(
        self,
        model: Adapted,
        *,
        weight: Schedule = 1.0,
        k: int = 8,
        per_call: int | None = 4,
        adapter: str | None = None,
        modules: str | Sequence[str] = "*",
    ) -> None:
        check_values(self, k=(k, whole(1)), per_call=(per_call, optional(whole(1))))
        if not callable(weight):
            check_values(self, weight=(weight, NOT_NEGATIVE))
        self.weight, self.k = weight, k
        matrices = adapted_matrices(model, adapter=adapter, modules=modules)
        self.layers = [_look_at(matrix, k) for matrix in matrices]
        self.per_call = min(per_call or len(self.layers), len(self.layers))
        self.calls = 0

    def __call__(self) -> Tensor:
        """The penalty now, times its weight; a scalar to be added to the loss."""
        first = self.calls * self.per_call
        chosen = [self.layers[(first + i) % len(self.layers)] for i in range(self.per_call)]
        weight = self.weight(self.calls) if callable(self.weight) else self.weight
        self.calls += 1
        terms = [self._of(layer) for layer in chosen]
        total = torch.stack([term.to(terms[0].device) for term in terms]).sum()
        return weight * len(self.layers) / self.per_call * total

    @property
    def matrices(self) -> list[AdaptedMatrix]:
        """What is penalised."""
        return [layer.matrix for layer in self.layers]

    def values(self) -> dict[str, float]:
        """The penalty of every layer by name, without weight and gradient."""
        with torch.no_grad():
            return {layer.matrix.name: float(self._of(layer)) for layer in self.layers}

    def state_dict(self) -> dict[str, Any]:
        """The place in the round and the schedule."""
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.calls = int(state["calls"])

    def _of(self, layer: _Layer) -> Tensor:
        """The penalty of one layer, in full precision wherever the loss is taken."""
        matrix = layer.matrix
        matrix.check()
        if torch.is_grad_enabled() and not any(matrix.trained):
            raise InputError(
                f"{matrix.name}: expected a factor that is trained, got two that are frozen, on "
                "which a penalty has no effect; leave it out with modules="
            )
        device = require_in_memory(matrix.name, matrix.parameters[0]).device
        with full_precision(device):
            try:
                return self._in_full(layer)
            except InputError as error:
                name = f"{matrix.name}: "
                raise InputError(f"{name}{str(error).removeprefix(name)}") from error

    def _in_full(self, layer: _Layer) -> Tensor:
        W = layer.matrix.tuned_map()
        k = min(self.k, *W.shape)
        with torch.no_grad():
            more, solver = min(k + 1, *W.shape), GolubKahan(rtol=LOOK)
            seen = singular_triplet(W, more, solver=solver, init=layer.begin(W), strict=False)
            layer.last = seen.u, seen.v
            beyond = float(seen.sigma[k]) if more > k else 0.0
            floor = max(layer.edge, beyond) + CLEAR * float(seen.sigma[0])
            count = int((seen.sigma[:k] > floor).sum())
        if count == 0:
            return 0.0 * (layer.matrix.A.sum() + layer.matrix.B.sum())
        found = singular_triplet(W, count, solver=GolubKahan(), init=layer.last, strict=False)
        weight = (found.sigma - floor).clamp_min(0) / layer.edge
        inside = (layer.left.to(found.u).mT @ found.u).square().sum(dim=0)
        inside = inside + (layer.right.to(found.v).mT @ found.v).square().sum(dim=0)
        return ((_averaging(found.sigma.detach()) @ weight) * (1 - inside / 2)).sum()


def _averaging(sigma: Tensor) -> Tensor:
    """The matrix that puts the mean in the place of each member of a group of near-equal values."""
    apart = sigma[:-1] - sigma[1:] > EQUAL * sigma[:-1]
    group = torch.cat([apart.new_zeros(1).long(), apart.long()]).cumsum(0)
    same = (group == group[:, None]).to(sigma)
    return same / same.sum(dim=1, keepdim=True)


def _look_at(matrix: AdaptedMatrix, k: int) -> _Layer:
    """What the base is like: its edge, and its leading space on both sides."""
    base = matrix.base_map()
    size = min(2 * k, *base.shape)
    with torch.no_grad():
        space = singular_triplet(base, size, solver=GolubKahan(vector_tol=BASE_ANGLE), strict=False)
    edge = measure(matrix.name, base).fit.edge
    return _Layer(matrix, edge, space.u, space.v)
