"""Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation and thick restart.

Golub, Kahan, SIAM J. Numer. Anal. 2 (1965), doi:10.1137/0702016; restart after Baglama, Reichel,
SIAM J. Sci. Comput. 27 (2005), doi:10.1137/04060593X.

From a unit vector v₁ two orthonormal bases grow such that ``A V_j = U_j B_j`` and
``Aᵀ U_j = V_j B_jᵀ + β v_{j+1} e_jᵀ``, with B_j upper bidiagonal, and after a restart an arrow in
front.  With ``B = P S Qᵀ`` the pairs ``u = U P_i``, ``v = V Q_i`` satisfy ``A v = σu`` exactly and
``‖Aᵀu − σv‖ = β |P_{ji}|``: the stopping test costs no product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._fields import TOLERANCE, check_fields, optional, whole
from bulkedge._linmap import LinearMap
from bulkedge.triplet._result import SingularTriplets, Status, neighbour_gaps
from bulkedge.triplet._transposed import require_promised

from ._start import Randomness, gaussian, start_block

FRESH_STEPS = 12
"""After this many steps from a fresh vector it is concluded that it finds nothing new."""


@dataclass(frozen=True)
class Lanczos:
    """Lanczos on single vectors: the fewest passes for one triplet of a large matrix.

    Cost: two passes a step (one with A, one with Aᵀ), each with one vector, and one at the end for
    the residuals; memory for ``width`` vectors on either side.

    A Krylov space of one vector holds one vector of every eigenspace, so of a singular value that
    occurs several times it sees one copy.  For one triplet that is enough.  For several, whenever
    the k leading ones have converged, a fresh random vector orthogonal to them looks for what is
    missing, until it finds nothing new: twice the passes at least.  :class:`BlockKrylov` is better
    at that.

    Attributes:
        rtol: Stop when every residual is below ``rtol · σ₁``; None takes eps^¾ of the dtype.
        max_steps: Steps before giving up.
        width: Vectors in the basis before it is compressed to half; at least 2k + 2 are used.
    """

    rtol: float | None = None
    max_steps: int = 2000
    width: int = 60

    def __post_init__(self) -> None:
        check_fields(self, rtol=optional(TOLERANCE), max_steps=whole(1), width=whole(1))

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The k leading triplets of A, m ≥ n, from the sum of the start's columns."""
        n = A.shape[1]
        eps = torch.finfo(A.dtype).eps
        rtol = eps**0.75 if self.rtol is None else self.rtol
        exact = max(10 * eps, rtol / 10)  # a coupling below it ends the Krylov space
        width = min(max(self.width, 2 * k + 2), n)
        U, V, B = (
            torch.zeros(*shape, dtype=A.dtype, device=A.device).mT  # columns lie contiguous
            for shape in ((width, A.shape[0]), (width + 1, n), (width, width))
        )
        guess = None if start is None else start[:, :k].sum(dim=1, keepdim=True)
        V[:, :1] = start_block(A, 1, guess, generator)
        j = step = next_test = since = 0
        known: Tensor | None = None  # the k leading values when the last fresh vector came in
        norm = 0.0
        while True:
            step, since = step + 1, since + 1
            u, B[:j, j : j + 1], alpha = _orthonormal(A.matmat(V[:, j : j + 1]), U[:, :j])
            norm = max(norm, alpha)
            alpha = alpha if alpha > 10 * eps * norm else 0.0  # below: rounding of the products
            U[:, j : j + 1] = u if alpha else _fresh(U[:, :j], generator)
            B[j, j] = alpha
            j += 1
            v, _, beta = _orthonormal(A.rmatmat(U[:, j - 1 : j]), V[:, :j])
            norm = max(norm, beta)
            beta = beta if beta > exact * norm and j < n else 0.0
            if j < n:
                V[:, j : j + 1] = v if beta else _fresh(V[:, :j], generator)
            if step < min(next_test, self.max_steps) and beta and j < width:
                continue
            next_test = step + max(step // 8, 1)  # a test costs a small SVD
            P, S, Qt = torch.linalg.svd(B[:j, :j])
            accurate = j >= k and bool((beta * P[-1, :k].abs() <= rtol * S[0]).all())
            # A space of one vector holds one vector of each eigenspace; others need fresh vectors.
            nothing_new = (
                known is not None
                and _same(S[:k], known, exact)
                and (since >= FRESH_STEPS or not beta)
            )
            converged = j == n or (accurate and (k == 1 or nothing_new))
            if converged or step >= self.max_steps:
                break
            if accurate and since >= FRESH_STEPS and beta:
                U[:, :k], V[:, :k] = U[:, :j] @ P[:, :k], V[:, :j] @ Qt[:k].mT
                V[:, k : k + 1] = _fresh(V[:, :k], generator)
                B.zero_().diagonal()[:k] = S[:k]
                j, beta = k, 0.0
            elif j == width:
                j = max(width // 2, k + 1)
                U[:, :j], V[:, :j] = U @ P[:, :j], V[:, :width] @ Qt[:j].mT
                V[:, j] = V[:, width]
                B.zero_().diagonal()[:j] = S[:j]
            if not beta:
                known, since = (S[:k].clone() if len(S) >= k else None), 0
        u, sigma, v = U[:, :j] @ P[:, :k], S[:k].clone(), V[:, :j] @ Qt[:k].mT
        # Both halves: the first is zero by the recurrence, but for the rounding of restarts.
        residuals = torch.hypot(
            torch.linalg.vector_norm(A.matmat(v) - u * sigma, dim=0),
            torch.linalg.vector_norm(A.rmatmat(u) - v * sigma, dim=0),
        )
        if converged:
            require_promised(A, residuals, rtol * float(sigma[0]))
        return SingularTriplets(
            sigma,
            u,
            v,
            residuals,
            neighbour_gaps(S, k, complete=j == n),
            steps=step,
            passes=2 * step + 2,
            status=Status.CONVERGED if converged else Status.MAX_STEPS,
            near=(S[k:], V[:, :j] @ Qt[k:].mT) if j > k else None,
        )


def _orthonormal(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, float]:
    """``x = basis · h + alpha · q`` with unit q orthogonal to the basis: q, h, alpha."""
    h = basis.mT @ x
    x = x - basis @ h
    again = basis.mT @ x  # twice is enough (Kahan-Parlett)
    x = x - basis @ again
    alpha = float(torch.linalg.vector_norm(x))
    return x / (alpha or 1.0), h + again, alpha


def _fresh(basis: Tensor, generator: Randomness) -> Tensor:
    """A random unit vector orthogonal to the basis."""
    return _orthonormal(gaussian(len(basis), 1, generator).to(basis), basis)[0]


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two lists of descending values agree relative to the first."""
    return bool(((a - b).abs() <= tolerance * a[0]).all())
