"""What rounding has done to a Krylov space, measured in float64 after the fact.

A :class:`Bidiagonalization` is grown with products in the dtype of the matrix.  How well its
recurrences hold depends on the matrix, the summation order of the library and the device: entries
of one sign lose ten times what random ones lose.  So nothing is assumed.  With the computed P, Q,
P₊, B and L the defects

    E₁ = Aᵀ P − Q Bᵀ,      E₂ = A Q − P B − P₊ L

are applied to Gaussian vectors ω, in float64.  ``‖E ω‖ ≥ ‖E‖₂ |g|`` with g standard normal, and
``P(|g| < x) ≤ x √(2/π)``, so that with c independent vectors

    ‖E‖₂ ≤ √(2/π) · p^(−1/c) · max ‖E ω_j‖

except with probability p over the vectors, whatever E is (the argument of Halko, Martinsson, Tropp,
SIAM Review 53 (2011), lemma 4.1, doi:10.1137/090771806, with the exact constant).  Rounding in
float64 itself is bounded by the classical ``γ_n = n u / (1 − n u)`` (Higham, Accuracy and Stability
of Numerical Algorithms, 2002, section 3.5), which holds for every order of summation.

For single Ritz vectors ``E x`` is computed as it is: a vector's own defect is far smaller.

Nothing that is derived from the recurrences takes orthonormal bases for granted either.  For a
singular triplet (σ, u, v) of A, with ``a = (P x)ᵀu``, ``b = (Q y)ᵀv`` and ``w = P₊ᵀu``,

    σ a = s b + (E₁ x)ᵀv,      σ b = s a + (L y)ᵀw + (E₂ y)ᵀu

hold whatever the bases are.  With δ, the larger of ``‖[P P₊]ᵀ[P P₊] − I‖₂`` and ``‖QᵀQ − I‖₂``, the
lengths of (a, w) and b are at most √(1 + δ) instead of 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bulkedge._linmap import Dense, LinearMap
from bulkedge._precision import exact

from ._bidiagonal import Bidiagonalization, Ritz
from ._result import SingularTriplets

UNIT = 2.0**-53
"""This is the unit roundoff of float64."""
ROUNDING_PROBES = 12
"""This many Gaussian vectors measure the defect; more make the bound sharper and a pass longer."""


@dataclass(frozen=True)
class Rounding:
    """How far a Krylov space is from one with exact recurrences and orthonormal bases.

    Attributes:
        noise: ‖E₁‖₂ and ‖E₂‖₂ are at most this, in the units of the matrix.
        leading: The same of the leading Ritz vectors, one by one, as far as they were measured,
            shape ``(h,)``.
        defect: δ, how far the bases are from orthonormal.
    """

    noise: float
    leading: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    defect: float = 0.0

    def of_vectors(self, count: int) -> Tensor:
        """Bounds on ``‖E₁ x_j‖`` and ``‖E₂ y_j‖`` for the first Ritz pairs, shape ``(count,)``."""
        rest = self.leading.new_full((max(count - len(self.leading), 0),), self.noise)
        return torch.cat([self.leading[:count], rest])


def measure_rounding(
    process: Bidiagonalization, ritz: Ritz, drawn: Tensor, probability: float, scale: float
) -> Rounding:
    """The defects of a Krylov space, from two passes over the matrix in float64.

    Args:
        process: The space.
        ritz: Its Ritz vectors; as many as the process began with are measured one by one.
        drawn: Independent standard normal entries, float64, drawn after the space was grown, shape
            ``(left + right vectors, checks)``.
        probability: The probability, over ``drawn``, that the result is too small.
        scale: :meth:`LinearMap.rounding_scale` of the matrix.

    Returns:
        The bounds.
    """
    A = process.map.to(torch.float64)
    process.check_passes += 2
    # widened some rows at a time: whole bases in float64 may be larger than the matrix
    P, Q, after = (Dense(x).to(torch.float64) for x in (process.left, process.right, process.after))
    B, L = process.small, process.last
    single = min(process.start_size, len(ritz.residuals))
    first, second = drawn.split([P.shape[1], Q.shape[1]])
    X = torch.cat([ritz.left[:, :single], first], dim=1)
    Y = torch.cat([ritz.right[:, :single], second], dim=1)
    x, y, back, forth, last = (C.to(A.device) for C in (X, Y, B.mT @ X, B @ Y, L @ Y))
    defects = (
        A.rmatmat(P.matmat(x)) - Q.matmat(back),
        A.matmat(Q.matmat(y)) - P.matmat(forth) - after.matmat(last),
    )
    both = torch.cat([process.left, process.after], dim=1)
    defect = max(_not_orthonormal(both), _not_orthonormal(process.right))
    # Rounding of the products with A, and of the small ones before and after.
    small = 4 * math.sqrt(max(B.shape)) * (sum(B.shape) + 4)
    own = float64_rounding(math.ceil(sum(A.shape) + small), (1 + defect) * scale)
    lengths = torch.maximum(*(torch.linalg.vector_norm(C, dim=0) for C in (X, Y)))
    alone = [torch.linalg.vector_norm(E[:, :single], dim=0).cpu() for E in defects]
    together = [
        norm_above(E[:, single:], probability / 2, own * float(lengths[single:].max()))
        for E in defects
    ]
    return Rounding(max(together), torch.maximum(*alone) + own * lengths[:single], defect)


def measure_residuals(A: LinearMap, triplets: SingularTriplets, scale: float) -> Tensor:
    """``‖[A v − σu; Aᵀu − σv]‖₂`` of each triplet, from two passes over the matrix in float64.

    Args:
        A: The matrix, shape ``(m, n)``.
        triplets: Of it, the leading ones.
        scale: :meth:`LinearMap.rounding_scale` of the matrix.

    Returns:
        Bounds for vectors of unit length, float64, shape ``(k,)``.
    """
    sigma, u, v = (exact(x) for x in triplets)
    wide = A.to(torch.float64)
    left, right = wide.matmat(v) - u * sigma, wide.rmatmat(u) - v * sigma
    computed = torch.hypot(*(torch.linalg.vector_norm(x, dim=0) for x in (left, right)))
    own = 2 * float64_rounding(sum(A.shape) + 4, scale)
    return (computed + own) * (1 + max(_not_orthonormal(u), _not_orthonormal(v)))


def norm_above(images: Tensor, probability: float, own: float) -> float:
    """An upper bound on ``‖E‖₂`` of a matrix known by its products with Gaussian vectors.

    Args:
        images: ``E ω_j``, one a column.
        probability: The probability, over the ω, that the result is too small.
        own: Bound on the error of each column.

    Returns:
        ``√(2/π) · p^(−1/c) · max ‖E ω_j‖`` for c columns.
    """
    largest = float(torch.linalg.vector_norm(images, dim=0).max()) if len(images) else 0.0
    return safety_factor(images.shape[1], probability) * (largest + own)


def safety_factor(checks: int, probability: float) -> float:
    """``√(2/π) · p^(−1/c)``: by how much c Gaussian vectors may underrate a norm."""
    return math.sqrt(2 / math.pi) * probability ** (-1 / checks)


def float64_rounding(terms: int, scale: float) -> float:
    """``γ_n · scale``: bound on the rounding error of sums of n float64 products.

    Args:
        terms: n, of any order of summation.
        scale: Bound on the sum of the absolute values.

    Returns:
        In the units of ``scale``.
    """
    return terms * UNIT / (1 - terms * UNIT) * scale


def _not_orthonormal(basis: Tensor) -> float:
    """Bound on ``‖QᵀQ − I‖₂``, in float64."""
    rows, columns = basis.shape
    if columns == 0:
        return 0.0
    defect = Dense(basis).to(torch.float64).gram()
    defect.diagonal().sub_(1.0)
    # the largest sum of a row bounds the spectral norm, and costs no eigenvalues
    largest = float(defect.abs().sum(dim=0).max())
    return largest + float64_rounding(rows + 8 * columns, float(columns))
