"""Block Golub–Kahan bidiagonalisation for the k leading singular triplets, without restarts.

Golub, Luk, Overton, ACM TOMS 7 (1981), doi:10.1145/355945.355946.  The cheapest method where a few
correct digits of well-separated triplets are asked for: a step costs two passes and one small SVD,
nothing of the size of the matrix but the block itself is factored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bulkedge._fields import NOT_NEGATIVE, TOLERANCE, check_fields, optional, whole
from bulkedge._linmap import LinearMap
from bulkedge.triplet._bidiagonal import Bidiagonalization
from bulkedge.triplet._result import SingularTriplets, Status, neighbour_gaps
from bulkedge.triplet._unseen import Unseen

from ._start import Randomness, start_parts
from .block_krylov import BlockKrylov

NOISE = 4.0  # to what the recurrences hold, in units of eps ‖A‖_F


@dataclass(frozen=True)
class GolubKahan:
    """Block Golub–Kahan bidiagonalisation with full reorthogonalisation.

    Cost: two passes over A a step, each with a block of at most ``k + oversample`` vectors; memory
    for ``max_steps`` blocks on either side.  Where ``max_steps`` are not enough, thick-restarted
    :class:`BlockKrylov` goes on from there.

    Attributes:
        rtol: Stop when every residual is below ``rtol · σ₁``; None takes eps^¾ of the dtype.
        angle: Stop for a triplet, too, when its residual is below ``angle`` times its gap: its
            vectors are then known to that sine.
        max_steps: Steps before the basis is given up.
        oversample: Vectors carried beyond k.
        missed: Go on until it is proved that no other triplet lies above the k-th, but for this
            probability over the random start; ``Status.UNPROVED`` where ``max_steps`` do not prove
            it.  Few vectors beyond k prove little: give it an ``oversample`` of 8.  None takes the
            residuals' word, as every other iterative solver does.
    """

    rtol: float | None = None
    angle: float = 0.0
    max_steps: int = 24
    oversample: int = 6
    missed: float | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            rtol=optional(TOLERANCE),
            angle=NOT_NEGATIVE,
            max_steps=whole(1),
            oversample=whole(0),
            missed=optional(TOLERANCE),
        )

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The k leading triplets of A, m ≥ n, from ``start`` completed by a Gaussian block."""
        eps = torch.finfo(A.dtype).eps
        rtol = eps**0.75 if self.rtol is None else self.rtol
        n = A.shape[1]
        guess, drawn = start_parts(A, min(k + self.oversample, n), start, generator)
        V = torch.linalg.qr(torch.cat([guess, drawn], dim=1)).Q
        size = A.norm_bound()
        noise = NOISE * eps * size
        process = Bidiagonalization(A.T, V, noise)
        while True:
            process.extend()
            ritz = process.ritz()
            sigma, pairs = ritz.sigma[: len(ritz.residuals)], len(ritz.residuals)
            residuals = ritz.residuals[:k] + noise / NOISE
            gaps = _gaps(sigma, ritz.residuals, k, complete=pairs == n)
            enough = torch.maximum(rtol * sigma[:1], self.angle * gaps - noise)
            converged = process.closed or bool((residuals <= enough).all())
            proved = self.missed is None or pairs == n
            if converged and self.missed is not None and not proved:
                unseen = Unseen.by(process, ritz, drawn.double().cpu(), size, self.missed)
                proved = unseen.none_above(k)
            if (converged and proved) or process.closed or process.passes == 2 * self.max_steps:
                break
        to = {"device": V.device, "dtype": V.dtype}
        v = process.left @ ritz.left[:, :pairs].to(**to)
        if not converged or pairs < k:  # a rank below k leaves vectors to be made up
            rest = BlockKrylov(rtol=self.rtol).compute(A, k, v[:, : V.shape[1]], generator)
            spent = process.passes
            rest = replace(rest, steps=rest.steps + spent // 2, passes=rest.passes + spent)
            unproved = rest.status is Status.CONVERGED and not proved
            return replace(rest, status=Status.UNPROVED) if unproved else rest
        return SingularTriplets(
            sigma[:k].to(**to),
            process.right @ ritz.right[:, :k].to(**to),
            v[:, :k].clone(),
            residuals.to(**to),
            gaps.to(**to),
            steps=process.passes // 2,
            passes=process.passes,
            status=Status.CONVERGED if proved else Status.UNPROVED,
            near=(sigma[k:].to(**to), v[:, k:]) if pairs > k else None,
        )


def _gaps(sigma: Tensor, residuals: Tensor, k: int, *, complete: bool) -> Tensor:
    """Distances to the nearest neighbour, whatever Ritz values beyond the k-th may yet become."""
    # one that has not converged may belong to any value within its residual above it
    most = (sigma + residuals)[k:].clamp_max(min(sigma[:k].tolist(), default=0.0))
    below = most.sort(descending=True).values
    return neighbour_gaps(torch.cat([sigma[:k], below]), k, complete=complete)
