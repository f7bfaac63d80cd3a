"""A map that counts its products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Gradients, LinearMap


class Counted(LinearMap):
    """A map that counts its products, those of its relatives included.

    Args:
        inner: The map.
        passes: A list of one number, shared between relatives.
    """

    def __init__(self, inner: LinearMap, passes: list[int] | None = None) -> None:
        self.inner, self.passes = inner, [0] if passes is None else passes
        self.shape, self.dtype, self.device = inner.shape, inner.dtype, inner.device

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        self.passes[0] += 1
        return self.inner.matmat(X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        self.passes[0] += 1
        return self.inner.rmatmat(Y)

    def norm_bound(self) -> float:
        """See :meth:`LinearMap.norm_bound`."""
        return self.inner.norm_bound()

    def rounding_scale(self) -> float:
        """See :meth:`LinearMap.rounding_scale`."""
        return self.inner.rounding_scale()

    def agreed(self, digest: bytes) -> bytes:
        """See :meth:`LinearMap.agreed`."""
        return self.inner.agreed(digest)

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        return self.inner.to_dense()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :attr:`LinearMap.tensors`."""
        return self.inner.tensors

    def with_tensors(self, *tensors: Tensor) -> Counted:
        """See :meth:`LinearMap.with_tensors`."""
        return Counted(self.inner.with_tensors(*tensors), self.passes)

    def pullback(self, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Gradients:
        """See :meth:`LinearMap.pullback`."""
        return self.inner.pullback(L, R, needs)

    def pushforward(self, *tangents: Tensor) -> Counted:
        """See :meth:`LinearMap.pushforward`."""
        return Counted(self.inner.pushforward(*tangents), self.passes)

    def to(self, dtype: torch.dtype) -> Counted:
        """See :meth:`LinearMap.to`."""
        return Counted(self.inner.to(dtype), self.passes)
