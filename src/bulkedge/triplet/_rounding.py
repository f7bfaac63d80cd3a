"""What rounding has done to a Krylov space, measured in float64 after the fact.

A :class:`Bidiagonalization` is grown with products in the dtype of the matrix.  How well its
recurrences hold depends on the matrix, the summation order of the library and the device: entries
of one sign lose ten times what random ones lose.  So nothing is assumed.  With the computed P, Q,
P₊, B and L the defects

    E₁ = Aᵀ P − Q Bᵀ,      E₂ = A Q − P B − P₊ L

are applied to Gaussian vectors ω, in float64.  ``‖E ω‖ ≥ ‖E‖₂ |g|`` with g standard normal, and
``P(|g| < x) ≤ x √(2/π)``, so that with c independent vectors

    ‖E‖₂ ≤ √(2/π) · p^(−1/c) · max ‖E ω_j‖

but for a probability p over the vectors, whatever E is (the argument of Halko, Martinsson, Tropp,
SIAM Review 53 (2011), lemma 4.1, doi:10.1137/090771806, with the exact constant).  Rounding in
float64 itself is bounded by the classical ``γ_n = n u / (1 − n u)`` (Higham, Accuracy and Stability
of Numerical Algorithms, 2002, section 3.5), which holds for every order of summation.

The bases are not quite orthonormal either.  Let δ_P and δ_Q be ``‖[P P₊]ᵀ[P P₊] − I‖₂`` and
``‖QᵀQ − I‖₂``, at most 0.1.  The orthonormal bases P̂ = P (PᵀP)^−½ and Q̂ alike, and P̂₊ from P₊ made
orthogonal to P̂, differ from the computed ones by at most 0.6 δ, 0.6 δ and 1.8 δ_P in norm.  They
satisfy the recurrences with the *same* B and L to

    ‖E₁‖ · 1.06 + 0.6 (δ_P + δ_Q) ‖B‖    and    ‖E₂‖ · 1.06 + (2.4 δ_P + 0.6 δ_Q) ‖[B; L]‖.

So everything that is derived for orthonormal bases and exact recurrences holds of P̂, Q̂, P̂₊ with this
one number added, and a statement about P holds to the distance between P and P̂.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._linmap import LinearMap

from ._bidiagonal import Bidiagonalization
from ._result import SingularTriplets

UNIT = 2.0**-53
"""Unit roundoff of float64."""
CHECKS = 12
"""How many Gaussian vectors measure the defect: with more of them the bound is sharper, and a pass
takes longer."""
TOO_FAR = 0.1
"""Largest ``‖QᵀQ − I‖₂`` for which the derivation holds."""


@dataclass(frozen=True)
class Rounding:
    """How far a Krylov space is from one with orthonormal bases and exact recurrences.

    Attributes:
        noise: Each recurrence holds to this in the spectral norm, in the units of the matrix.
        defect: The computed left basis, P₊ included, is this near to an orthonormal one, in the
            spectral norm.
    """

    noise: float
    defect: float = 0.0


def measure_rounding(
    process: Bidiagonalization, drawn: Tensor, probability: float, scale: float
) -> Rounding:
    """The defects of a Krylov space, from two passes over the matrix in float64.

    Args:
        process: The space.
        drawn: Independent standard normal entries, float64, drawn after the space was grown, shape
            ``(process.size + right vectors, checks)``.
        probability: Of the result being too small, over ``drawn``.
        scale: :meth:`LinearMap.rounding_scale` of the matrix.

    Returns:
        The bounds; infinite where the bases are too far from orthonormal to say anything.
    """
    A = process.map.widened()
    process.checks += 2
    P, Q, after = (x.double() for x in (process.left, process.right, process.after))
    B, L = process.small.to(P.device), process.last.to(P.device)
    first, second = drawn.to(P.device).split([P.shape[1], Q.shape[1]])
    defects = (
        A.rmatmat(P @ first) - Q @ (B.mT @ first),
        A.matmat(Q @ second) - P @ (B @ second) - after @ (L @ second),
    )
    # of the products with A, whose vectors are as long as ω, and of the small ones before and after
    small = 4 * math.sqrt(max(B.shape)) * (sum(B.shape) + 4)
    own = float64_rounding(math.ceil(sum(A.shape) + small), 1.2 * scale)
    own *= float(torch.linalg.vector_norm(drawn, dim=0).max())
    left, right = _not_orthonormal(torch.cat([P, after], dim=1)), _not_orthonormal(Q)
    if not max(left, right) < TOO_FAR:
        return Rounding(math.inf, math.inf)
    sizes = [norm_above(E, probability / 2, own) for E in defects]
    norm = float(torch.linalg.matrix_norm(torch.cat([B, L]), 2)) if B.numel() else 0.0
    moved = norm * (2.4 * left + 0.6 * right)
    return Rounding(1.06 * max(sizes) + 1.001 * moved, 1.8 * left)


def measure_residuals(A: LinearMap, triplets: SingularTriplets) -> Tensor:
    """``‖[A v − σu; Aᵀu − σv]‖₂`` of each triplet, from two passes over the matrix in float64.

    Args:
        A: The matrix, shape ``(m, n)``.
        triplets: Of it, the leading ones.

    Returns:
        Bounds for the nearest orthonormal vectors, float64, shape ``(k,)``.
    """
    sigma, u, v = (x.double() for x in triplets)
    wide = A.widened()
    left, right = wide.matmat(v) - u * sigma, wide.rmatmat(u) - v * sigma
    computed = torch.hypot(*(torch.linalg.vector_norm(x, dim=0) for x in (left, right)))
    own = 2 * float64_rounding(sum(A.shape) + 4, wide.rounding_scale())
    return computed + own + 2 * sigma[:1] * (_not_orthonormal(u) + _not_orthonormal(v))


def norm_above(images: Tensor, probability: float, own: float) -> float:
    """At least ``‖E‖₂`` of a matrix that is known by its products with Gaussian vectors.

    Args:
        images: ``E ω_j``, one a column.
        probability: Of the result being too small, over the ω.
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
    """Bound on ``‖QᵀQ − I‖₂`` of a float64 matrix."""
    rows, columns = basis.shape
    if columns == 0:
        return 0.0
    defect = basis.mT @ basis
    defect.diagonal().sub_(1.0)
    largest = float(torch.linalg.eigvalsh(defect).abs().max())
    return largest + float64_rounding(rows + 8 * columns, float(columns))
