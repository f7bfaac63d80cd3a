"""Thick-restarted block Krylov iteration for the k leading singular triplets.

Golub, Luk, Overton, "A block Lanczos method for computing the singular values and corresponding
singular vectors of a matrix", ACM TOMS 7 (1981), doi:10.1145/355945.355946; thick restart after
Baglama, Reichel, SIAM J. Sci. Comput. 27 (2005), doi:10.1137/04060593X.

The basis V is grown on the shorter side and its image ``W = A V`` is kept beside it.  Rayleigh-Ritz
is the SVD of W: with ``W = P S Yᵀ`` the pairs ``u = P_i``, ``v = V Y_i`` satisfy ``A v = σ u``
exactly, so a triplet is judged by ``r = Aᵀu − σv`` alone.  These residuals span the next block of
the Krylov space, so the same product serves the stopping test and the next step: two passes a
step.  W is factored afresh each step (O(m d²), d the basis width), which costs little beside a pass
and keeps u orthonormal to rounding whatever the rank of A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._fields import TOLERANCE, check_fields, optional, whole
from bulkedge._linmap import LinearMap
from bulkedge.triplet._result import SingularTriplets, Status, neighbour_gaps
from bulkedge.triplet._thin_svd import thin_svd
from bulkedge.triplet._transposed import require_promised

from ._start import Randomness, start_block


@dataclass(frozen=True)
class BlockKrylov:
    """Block Krylov iteration with full reorthogonalisation and thick restart.

    Cost: two passes over A a step (one with A, one with Aᵀ), each with a block of at most
    ``k + oversample`` vectors; memory for ``width`` blocks on either side.

    Attributes:
        rtol: Stop when every residual is below ``rtol · σ₁``; None takes eps^¾ of the dtype
            (1.8e-12 in float64, 6.4e-6 in float32).
        max_steps: Steps before giving up.
        oversample: Vectors carried beyond k; they buy speed where σ_k and σ_{k+1} are close, and
            find up to ``k + oversample`` equal singular values.
        width: Blocks in the basis before it is compressed to half.
    """

    rtol: float | None = None
    max_steps: int = 500
    oversample: int = 4
    width: int = 8

    def __post_init__(self) -> None:
        check_fields(
            self, rtol=optional(TOLERANCE), max_steps=whole(1), oversample=whole(0), width=whole(1)
        )

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The k leading triplets of A, m ≥ n, from ``start`` completed by a Gaussian block."""
        eps = torch.finfo(A.dtype).eps
        rtol = eps**0.75 if self.rtol is None else self.rtol
        n = A.shape[1]
        block = min(k + self.oversample, n)
        limit = min(self.width * block, n)
        V = start_block(A, block, start, generator)  # (n, d)
        W = A.matmat(V)  # (m, d)
        step = 0
        while True:
            step += 1
            P, S, Y = thin_svd(W)
            u, sigma, v = P[:, :block], S[:block], V @ Y[:, :block]
            R = A.rmatmat(u) - v * sigma  # (n, block)
            residuals = torch.linalg.vector_norm(R, dim=0)
            converged = bool((residuals[:k] <= rtol * sigma[0]).all())
            if converged or step == self.max_steps:
                break
            E = _new_directions(R, V, rounding=10 * eps * float(sigma[0]))
            converged = E.shape[1] == 0  # the Krylov space is invariant: exact to rounding
            if converged:
                require_promised(A, residuals[:k], rtol * float(sigma[0]))
                break
            if V.shape[1] + block > limit:
                keep = max(limit // 2, block)
                V, W = V @ Y[:, :keep], P[:, :keep] * S[:keep]
            V = torch.cat([V, E], dim=1)
            W = torch.cat([W, A.matmat(E)], dim=1)
        return SingularTriplets(
            sigma[:k].clone(),
            u[:, :k].clone(),
            v[:, :k].clone(),
            residuals[:k],
            neighbour_gaps(S, k, complete=len(S) == n),
            steps=step,
            passes=2 * step,
            status=Status.CONVERGED if converged else Status.MAX_STEPS,
            near=(S[k:], V @ Y[:, k:]) if len(S) > k else None,
        )


def _new_directions(R: Tensor, V: Tensor, rounding: float) -> Tensor:
    """Orthonormal basis of the part of span(R) outside span(V), shape (n, ≤ b)."""
    # Twice is enough (Kahan-Parlett), but only for directions that exist: what is smaller than
    # ``rounding`` is rounding, and so is what the second projection halves.
    for threshold in (rounding, 0.5):
        R = R - V @ (V.mT @ R)
        X, S, _ = torch.linalg.svd(R, full_matrices=False)
        R = X[:, threshold < S]
    return R
