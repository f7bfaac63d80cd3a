"""Proofs about singular values that no number of products can give: by a Cholesky factorisation.

A Krylov space finds one vector of a cluster of nearly equal values at once, the one that its start
block points to, and the others as late as the random vectors of that block have it; and it cannot
tell a vector outside the range of W0 from one on a tiny singular value.  By Sylvester's law of
inertia a factorisation can:

* ``W0ᵀW0 − x²`` is positive definite only if all singular values exceed x;
* ``x² − W0ᵀW0 + V S² Vᵀ``, with V, S the d Ritz vectors and values above x, only if no more than d
  singular values reach x (Courant and Fischer).  That they are no fewer is Cauchy's interlacing.

Either costs the Gram matrix of the shorter side, once, and a third of its cube.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bulkedge._linmap import LinearMap
from bulkedge.triplet import Bidiagonalization, Ritz

GRAM = 4
"""Bound on the rounding error of ``W0ᵀW0`` and its factorisation, in units of eps ‖W0‖_F²."""


class Factorisations:
    """What Cholesky factorisations of Gram matrices prove of singular values.

    Args:
        A: The map.
        frobenius: ``‖A‖_F``, or more.
    """

    def __init__(self, A: LinearMap, frobenius: float) -> None:
        self.map, self.tall = A, A.shape[0] > A.shape[1]
        self.rounding = GRAM * torch.finfo(A.dtype).eps * frobenius**2
        self._gram: Tensor | None = None

    @property
    def gram(self) -> Tensor:
        """That of the shorter side; computed once."""
        if self._gram is None:
            long = self.map.shape[0] >= self.map.shape[1]
            self._gram = (self.map if long else self.map.T).gram()
        return self._gram

    def all_exceed(self, x: float) -> bool:
        """Whether every singular value of a map of at least as many rows as columns exceeds x."""
        shifted = self.gram.clone()
        shifted.diagonal().sub_(x * x + self.rounding)
        return _definite(shifted)

    def at_most(self, count: int, x: float, process: Bidiagonalization, ritz: Ritz) -> bool:
        """Whether no more than ``count`` singular values exceed x: those of leading Ritz vectors.

        Args:
            count: How many Ritz values do.
            x: The cut.
            process: The Krylov space.
            ritz: Its Ritz vectors.

        Returns:
            Whether the factorisation exists.
        """
        long = self.map.shape[0] >= self.map.shape[1]
        basis, inner = (process.right, ritz.right) if long else (process.left, ritz.left)
        found = (basis @ inner[:, :count].to(basis)).to(self.gram)
        scaled = found * ritz.sigma[:count].to(found)
        shifted = torch.addmm(-self.gram, scaled, scaled.mT)
        shifted.diagonal().add_(x * x - 2 * self.rounding)
        return _definite(shifted)


def _definite(matrix: Tensor) -> bool:
    """Whether a symmetric matrix has a Cholesky factor."""
    return int(torch.linalg.cholesky_ex(matrix, check_errors=False).info) == 0
