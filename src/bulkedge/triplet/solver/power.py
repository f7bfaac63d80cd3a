"""Power iteration, on one vector or a block: the slowest method, and the plainest.

Newton's iteration on ``f(σ, u, v) = (σ − uᵀAv; σ²u − σAv; σ²v − σAᵀu)`` with its Jacobian cut to
the diagonal reads ``σ ← uᵀAv``, ``u ← Av/σ``, ``v ← Aᵀu/σ``.  Done at once this is unstable: the
linearised map has eigenvalues of modulus √2, and normalised it is two independent iterations that
may converge to (u, −v).  Done in turn (Gauss-Seidel) and normalised,
``u = Av/‖Av‖``, ``v = Aᵀu/‖Aᵀu‖``, it is the power iteration on AᵀA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._fields import TOLERANCE, check_fields, optional, whole
from bulkedge._linmap import LinearMap
from bulkedge.triplet._result import SingularTriplets, Status, neighbour_gaps
from bulkedge.triplet._thin_svd import thin_svd

from ._deflation import relative_tolerance
from ._start import Randomness, start_block


@dataclass(frozen=True)
class Power:
    """Block power iteration (orthogonal iteration) with Rayleigh-Ritz.

    For a block of one vector a step is ``u = Av/‖Av‖, v = Aᵀu/‖Aᵀu‖``; for b vectors the division
    becomes an SVD of AV and a QR factorisation of AᵀU.  The error of the i-th vector shrinks by
    ``(σ_{b+1}/σ_i)²`` a step, b = k + oversample: where the two are close it takes for ever, and
    ``BlockKrylov`` takes the square root of that.

    Cost: two passes over A a step, each with a block of ``k + oversample`` vectors.

    Source: Bauer, ZAMP 8 (1957), doi:10.1007/BF01600502; with oversampling, Halko, Martinsson,
    Tropp, SIAM Review 53 (2011), arXiv:0909.4061.

    Attributes:
        rtol: Stop when every residual is below ``rtol · σ₁``; None takes eps^¾ of the dtype
            (1.8e-12 in float64, 6.4e-6 in float32).
        max_steps: Steps before giving up.
        oversample: Vectors carried beyond k; 0 is the classical iteration.

    Example:
        >>> from bulkedge.triplet import singular_triplet
        >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        >>> round(singular_triplet(A, solver=Power(oversample=0)).sigma.item(), 12)
        3.0
    """

    rtol: float | None = None
    max_steps: int = 2000
    oversample: int = 4

    def __post_init__(self) -> None:
        check_fields(self, rtol=optional(TOLERANCE), max_steps=whole(1), oversample=whole(0))

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The k leading triplets of A, m ≥ n, from ``start`` completed by a Gaussian block."""
        rtol = relative_tolerance(self.rtol, A.dtype)
        n = A.shape[1]
        V = start_block(A, min(k + self.oversample, n), start, generator)
        step = 0
        while True:
            step += 1
            # Rayleigh-Ritz: with AV = U S Yᵀ the pairs (U_i, V Y_i) satisfy Av = σu exactly, so
            # Aᵀu judges them, and is the next block
            U, S, Y = thin_svd(A.matmat(V))
            V, image = V @ Y, A.rmatmat(U)  # (n, b)
            residuals = torch.linalg.vector_norm(image - V * S, dim=0)[:k]
            converged = bool((residuals <= rtol * S[0]).all())
            if converged or step >= self.max_steps:
                break
            V = torch.linalg.qr(image).Q
        return SingularTriplets(
            S[:k].clone(),
            U[:, :k].clone(),
            V[:, :k].clone(),
            residuals,
            neighbour_gaps(S, k, complete=len(S) == n),
            steps=step,
            passes=2 * step,
            status=Status.CONVERGED if converged else Status.MAX_STEPS,
            near=(S[k:], V[:, k:]) if len(S) > k else None,
        )
