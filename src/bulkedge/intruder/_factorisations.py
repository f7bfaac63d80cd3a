"""Cholesky factorisations prove about singular values what no number of products can.

Of a cluster of nearly equal values a Krylov space finds one vector at once, the one that its start
block points to.  It finds the others only as far as the random vectors of that block have a part in
them.
And it cannot distinguish a vector outside the range of W0 from one with a tiny singular value.  By
Sylvester's law of inertia a factorisation can:

* ``W0ᵀW0 − x²`` is positive definite only if all singular values exceed x;
* ``x² − W0ᵀW0 + V S² Vᵀ``, with any d columns in V, only if at most d singular values reach x
  (Courant and Fischer).  V and S are the d Ritz vectors and values above x.  That the values are no
  fewer is Cauchy's interlacing.

Either costs the Gram matrix of the shorter side, once, and a third of its cube: in float64, but
for the first where x² is far above what float32 loses, which is then measured.

*Rounding.*  A product of two float32 numbers is exact in float64, and a sum of m of them errs by
at most ``γ_m Σ|·|``, in any order, so that the computed Gram matrix is wrong by at most
``γ_m ‖W0‖_F²`` whatever the entries.  The factor R of a matrix M is not trusted: ``M = RRᵀ + E``
holds of any R, hence ``M ≥ −‖E‖``, and ‖E‖ is measured with Gaussian vectors
(:func:`bulkedge.triplet._rounding.norm_above`).  M is formed with a margin that has to cover both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bulkedge._linmap import LinearMap
from bulkedge._precision import exact
from bulkedge.triplet import Bidiagonalization, Ritz
from bulkedge.triplet._rounding import ROUNDING_PROBES, float64_rounding, norm_above, safety_factor
from bulkedge.triplet.solver._start import Randomness, gaussian

PROVED_SHARE = 0.4
"""In float32 it is proved that no σ² is below x² by showing that none is below x² and this much
more of it, but for the error, which has to be less."""


class Factorisations:
    """What Cholesky factorisations of Gram matrices prove of singular values.

    Args:
        A: The map.
        scale: Its rounding scale, ‖A‖_F of a matrix.
        generator: Source of the vectors that measure the error of a factor.
        probability: The probability, over those vectors, that a statement is wrong.

    Attributes:
        map: The map.
        tall: Whether it has more rows than columns.
        rounding: Bound on the error of the Gram matrix in the spectral norm; about that of a
            factorisation, too.
    """

    def __init__(
        self, A: LinearMap, scale: float, generator: Randomness, probability: float
    ) -> None:
        self.map, self.tall = A, A.shape[0] > A.shape[1]
        self.generator, self.probability = generator, probability
        self.scale = scale
        self.rounding = 2 * float64_rounding(max(A.shape) + 4, self.scale**2)
        self._gram: Tensor | None = None
        self._gram32: Tensor | None = None

    @property
    def gram(self) -> Tensor:
        """The Gram matrix of the shorter side, in float64; computed once."""
        if self._gram is None:
            long = self.map.shape[0] >= self.map.shape[1]
            self._gram = (self.map if long else self.map.T).to(torch.float64).gram()
        return self._gram

    def all_exceed(self, x: float, *, float64: bool = False) -> bool:
        """Whether every singular value of a map of at least as many rows as columns exceeds x.

        Args:
            x: The number.
            float64: Whether float64 is tried where float32 might do and does not.

        Returns:
            Whether it is proved.
        """
        narrow = self.map.dtype is torch.float32 and self._within_reach(x)
        if narrow and ((holds := self._all_exceed_by_measuring(x)) or not float64):
            return holds
        shifted = self.gram.clone()
        shifted.diagonal().sub_(x * x)
        return self._definite(shifted)

    def _within_reach(self, x: float) -> bool:
        """Whether what float32 loses of a Gram matrix is well below x²."""
        unit = torch.finfo(torch.float32).eps
        lost = unit * self.scale**2  # a few times the Frobenius norm of what is usually lost
        return safety_factor(ROUNDING_PROBES, self.probability) * lost < PROVED_SHARE * x * x

    def _all_exceed_by_measuring(self, x: float) -> bool:
        """The same by a Gram matrix and a factor in float32, whose errors are measured."""
        # With any real R, WᵀW − s² = RRᵀ + E, so that all σ² ≥ s² − ‖E‖.  E holds whatever the
        # products and the factorisation have lost, and is applied to Gaussian vectors in float64.
        if self._gram32 is None:
            self._gram32 = self.map.gram()
        squared = (1 + PROVED_SHARE) * x * x
        shifted = self._gram32.clone()
        shifted.diagonal().sub_(squared)
        R, info = torch.linalg.cholesky_ex(shifted, check_errors=False)
        if int(info) != 0:
            return False
        del shifted
        wide, R = self.map.to(torch.float64), exact(R)
        drawn = gaussian(len(R), ROUNDING_PROBES, self.generator).to(R)
        image = wide.rmatmat(wide.matmat(drawn))
        defect = image - squared * drawn - R @ (R.mT @ drawn)
        length = float(torch.linalg.vector_norm(drawn, dim=0).max())
        terms = sum(self.map.shape) + 2 * len(R) + 8
        sizes = self.scale**2 + squared + float(R.square().sum())
        own = length * float64_rounding(2 * terms, sizes)
        return norm_above(defect, self.probability, own) < PROVED_SHARE * x * x

    def at_most(self, count: int, x: float, process: Bidiagonalization, ritz: Ritz) -> bool:
        """Whether no more than ``count`` singular values exceed x: those that were found.

        Args:
            count: How many Ritz values exceed x.
            x: The cut.
            process: The Krylov space.
            ritz: Its Ritz vectors.

        Returns:
            Whether the factorisation exists, and its error is below the margin.
        """
        long = self.map.shape[0] >= self.map.shape[1]
        basis, inner = (process.right, ritz.right) if long else (process.left, ritz.left)
        found = basis.to(self.gram) @ inner[:, :count].to(self.gram)
        scaled = found * ritz.sigma[:count].to(found)
        shifted = torch.addmm(-self.gram, scaled, scaled.mT)
        shifted.diagonal().add_(x * x)
        # V S² Vᵀ is a sum of ``count`` products for each entry.
        own = float64_rounding(count + 4, float(scaled.square().sum()))
        return self._definite(shifted, own)

    def _definite(self, matrix: Tensor, error: float = 0.0) -> bool:
        """Whether the matrix that this one stands for is positive definite, for certain."""
        n = len(matrix)
        drawn = gaussian(n, ROUNDING_PROBES, self.generator).to(matrix)
        # Rounding of the products with M and with R: ‖M‖_F ≤ tr M, and ‖R‖_F² is tr M to rounding.
        length = float(torch.linalg.vector_norm(drawn, dim=0).max())
        trace = float(matrix.diagonal().clamp_min(0.0).sum())
        own = length * 4 * float64_rounding(2 * n + 4, trace)
        factor = safety_factor(ROUNDING_PROBES, self.probability)
        margin = self.rounding + error + 2 * factor * own
        matrix.diagonal().sub_(margin)
        R, info = torch.linalg.cholesky_ex(matrix, check_errors=False)
        if int(info) != 0:
            return False
        defect = matrix @ drawn - R @ (R.mT @ drawn)
        return self.rounding + error + norm_above(defect, self.probability, own) < margin
