"""Sums and transposes of maps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from bulkedge._errors import InputError

from .base import Gradients, LinearMap, as_map, made_by_arithmetic


@made_by_arithmetic
class Sum(LinearMap):
    """The sum of maps of one shape, dtype and device.

    Args:
        terms: At least one map.

    Raises:
        InputError: If the maps differ in shape, dtype or device.

    Example:
        >>> import torch
        >>> from bulkedge._linmap import Dense, LowRank
        >>> W0 = Dense(torch.eye(3))
        >>> (W0 + LowRank(torch.ones(3, 1), torch.ones(1, 3))).to_dense()[0].tolist()
        [2.0, 1.0, 1.0]
    """

    def __init__(self, terms: Sequence[LinearMap]) -> None:
        self.terms = tuple(as_map(term) for term in terms)
        kinds = {(term.shape, term.dtype, term.device) for term in self.terms}
        if len(kinds) != 1:
            raise InputError(f"expected maps of one shape, dtype and device, got {kinds}")
        ((self.shape, self.dtype, self.device),) = kinds

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        first, *rest = self.terms
        return sum((term.matmat(X) for term in rest), start=first.matmat(X))

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        first, *rest = self.terms
        return sum((term.rmatmat(Y) for term in rest), start=first.rmatmat(Y))

    def norm_bound(self) -> float:
        """See :meth:`LinearMap.norm_bound`."""
        return sum(term.norm_bound() for term in self.terms)

    def rounding_scale(self) -> float:
        """See :meth:`LinearMap.rounding_scale`."""
        return sum(term.rounding_scale() for term in self.terms)

    def agreed(self, digest: bytes) -> bytes:
        """See :meth:`LinearMap.agreed`."""
        for term in self.terms:
            digest = term.agreed(digest)
        return digest

    def to_dense(self) -> Tensor:
        """See :meth:`LinearMap.to_dense`."""
        first, *rest = self.terms
        return sum((term.to_dense() for term in rest), start=first.to_dense())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :attr:`LinearMap.tensors`."""
        return tuple(tensor for term in self.terms for tensor in term.tensors)

    def with_tensors(self, *tensors: Tensor) -> Sum:
        """See :meth:`LinearMap.with_tensors`."""
        left = iter(tensors)
        return Sum([term.with_tensors(*islice(left, len(term.tensors))) for term in self.terms])

    def pullback(self, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Gradients:
        """See :meth:`LinearMap.pullback`."""
        left, gradients = iter(needs), []
        for term in self.terms:
            wanted = tuple(islice(left, len(term.tensors)))
            skipped = bool(wanted) and not any(wanted)
            gradients += [None] * len(wanted) if skipped else term.pullback(L, R, wanted)
        return tuple(gradients)

    def pushforward(self, *tangents: Tensor) -> Sum:
        """See :meth:`LinearMap.pushforward`."""
        left = iter(tangents)
        return Sum([term.pushforward(*islice(left, len(term.tensors))) for term in self.terms])

    def to(self, dtype: torch.dtype) -> Sum:
        """See :meth:`LinearMap.to`."""
        terms = [term.to(dtype) for term in self.terms]
        # float64 terms of a device without float64 are on the CPU: narrowed, they follow the first
        return Sum([term.on(terms[0].device) for term in terms])


@made_by_arithmetic
class Adjoint(LinearMap):
    """The transpose of a map.

    Args:
        inner: The map, shape ``(m, n)``; this one has shape ``(n, m)``.
    """

    def __init__(self, inner: LinearMap) -> None:
        self.inner = inner = as_map(inner)
        self.shape = (inner.shape[1], inner.shape[0])
        self.dtype = inner.dtype
        self.device = inner.device

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        return self.inner.rmatmat(X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        return self.inner.matmat(Y)

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
        return self.inner.to_dense().mT

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :attr:`LinearMap.tensors`."""
        return self.inner.tensors

    def with_tensors(self, *tensors: Tensor) -> Adjoint:
        """See :meth:`LinearMap.with_tensors`."""
        return Adjoint(self.inner.with_tensors(*tensors))

    def pushforward(self, *tangents: Tensor) -> Adjoint:
        """See :meth:`LinearMap.pushforward`."""
        return Adjoint(self.inner.pushforward(*tangents))

    def to(self, dtype: torch.dtype) -> Adjoint:
        """See :meth:`LinearMap.to`."""
        return Adjoint(self.inner.to(dtype))

    def pullback(self, L: Tensor, R: Tensor, needs: Sequence[bool] = ()) -> Gradients:
        """See :meth:`LinearMap.pullback`."""
        return self.inner.pullback(R, L, needs)

    @property
    def T(self) -> LinearMap:
        """The map that was transposed."""
        return self.inner

    def __repr__(self) -> str:
        return f"({self.inner!r}).T"
