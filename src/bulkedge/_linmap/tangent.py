"""The derivative of a map along given tangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .base import LinearMap, made_by_arithmetic


@made_by_arithmetic
class Tangent(LinearMap):
    """``Ẇ``, the derivative of a map W in the direction of tangents, however it is made of tensors.

    ``tr(LᵀẆ R) = Σ⟨g_i, ṫ_i⟩`` for the gradients ``g_i`` of ``tr(LᵀW R)``, which
    :meth:`LinearMap.pullback` gives.  It is linear in L and in R; its gradients are ``Ẇ R`` and
    ``ẆᵀL``.

    Cost: that of two to four products of W for each of its own.

    Args:
        inner: The map W.
        tangents: One for each of its tensors, of the same shapes.

    Example:
        >>> from bulkedge._linmap import LowRank
        >>> W = LowRank(torch.ones(2, 1), torch.ones(1, 3))
        >>> Tangent(W, (torch.ones(2, 1), torch.ones(1, 3))).to_dense().tolist()
        [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """

    def __init__(self, inner: LinearMap, tangents: Sequence[Tensor]) -> None:
        self.inner, self.tangents = inner, tuple(tangents)
        self._needs = tuple(not _constant_zero(tangent) for tangent in tangents)
        self.shape, self.dtype, self.device = inner.shape, inner.dtype, inner.device

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        return self._gradient(lambda L: self._along(L, X), self.shape[0], X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        return self._gradient(lambda R: self._along(Y, R), self.shape[1], Y)

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return self.matmat(torch.eye(self.shape[1], dtype=self.dtype, device=self.device))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :attr:`LinearMap.tensors`."""
        return *self.inner.tensors, *self.tangents

    def with_tensors(self, *tensors: Tensor) -> Tangent:
        """See :meth:`LinearMap.with_tensors`."""
        count = len(self.tangents)
        return Tangent(self.inner.with_tensors(*tensors[:count]), tensors[count:])

    def _along(self, L: Tensor, R: Tensor) -> Tensor:
        """``tr(LᵀẆ R)``."""
        total = (L[:0] * R[:0]).sum()  # zero, also if no tensor moves
        if any(self._needs):
            gradients = self.inner.pullback(L, R, self._needs)
            for gradient, tangent in zip(gradients, self.tangents, strict=True):
                total = total if gradient is None else total + (gradient * tangent).sum()
        return total

    def _gradient(self, function: Callable[[Tensor], Tensor], rows: int, like: Tensor) -> Tensor:
        """The gradient of a function that is linear in a block of so many rows."""
        columns = like.shape[1]
        entries = torch.arange(1, rows * columns + 1, dtype=self.dtype, device=self.device)
        block = entries.sin().reshape(rows, columns)
        return torch.func.grad(function)(block)


def _constant_zero(tangent: Tensor) -> bool:
    """Whether a tangent is zero, and nobody asks how a result changes with it."""
    functorch = cast("Any", torch._C)._functorch
    while functorch.is_functorch_wrapped_tensor(tangent):
        if tangent.requires_grad:
            return False
        tangent = functorch.get_unwrapped(tangent)
    return not tangent.requires_grad and not tangent.is_meta and not bool(tangent.any())
