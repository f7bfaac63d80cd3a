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
from bulkedge.triplet._bidiagonal import Bidiagonalization, Ritz
from bulkedge.triplet._result import SingularTriplets, Status, neighbour_gaps
from bulkedge.triplet._rounding import (
    CHECKS,
    Rounding,
    measure_residuals,
    measure_rounding,
)
from bulkedge.triplet._unseen import Unseen

from ._start import Randomness, gaussian, start_parts
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
            probability over the random vectors; ``Status.UNPROVED`` where ``max_steps`` do not
            prove it.  The last gap then ends at a proved cut, and residuals and rounding are
            measured in float64, by two passes each.  Few vectors beyond k prove little: give it an
            ``oversample`` of 8.  None takes the residuals' word, as every other iterative solver
            does.
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
        found = self._search(A, k, start, generator)
        if self.missed is None:
            return found
        residuals = measure_residuals(A, found).to(found.residuals)
        return replace(found, residuals=residuals, passes=found.passes + 2)

    def _search(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The same with the residuals of the recurrences."""
        n = A.shape[1]
        guess, drawn = start_parts(A, min(k + self.oversample, n), start, generator)
        V = torch.linalg.qr(torch.cat([guess, drawn], dim=1)).Q
        size = A.rounding_scale()
        eps = torch.finfo(A.dtype).eps
        rtol = eps**0.75 if self.rtol is None else self.rtol
        noise = NOISE * eps * size
        process = Bidiagonalization(A.T, V, noise)
        witness = _Witness(process, drawn.double().cpu(), size, self.missed, generator)
        while True:
            process.extend()
            ritz = process.ritz()
            sigma, pairs = ritz.sigma[: len(ritz.residuals)], len(ritz.residuals)
            last = process.closed or process.passes == 2 * self.max_steps
            residuals = ritz.residuals[:k] + noise / NOISE
            gaps = _gaps(sigma, ritz.residuals, k, complete=pairs == n)
            converged = process.closed or self._converged(sigma, residuals, gaps, noise, rtol)
            proved = self.missed is None or pairs == n
            if converged and not proved:
                cut = witness.lowest_cut(ritz, k)
                proved = cut is not None
                if cut is not None and pairs >= k:  # what lies below the cut is not known
                    gaps[-1] = min(float(gaps[-1]), max(float(sigma[k - 1]) - cut, 0.0))
                    converged = process.closed or self._converged(
                        sigma, residuals, gaps, noise, rtol
                    )
            if (converged and proved) or last:
                break
        to = {"device": V.device, "dtype": V.dtype}
        v = process.left @ ritz.left[:, :pairs].to(**to)
        if not converged or pairs < k:  # a rank below k leaves vectors to be made up
            rest = BlockKrylov(rtol=self.rtol).compute(A, k, v[:, : V.shape[1]], generator)
            steps, spent = process.passes // 2, process.passes + process.checks
            rest = replace(rest, steps=rest.steps + steps, passes=rest.passes + spent)
            unproved = rest.status is Status.CONVERGED and not proved
            return replace(rest, status=Status.UNPROVED) if unproved else rest
        return SingularTriplets(
            sigma[:k].to(**to),
            process.right @ ritz.right[:, :k].to(**to),
            v[:, :k].clone(),
            residuals.to(**to),
            gaps.to(**to),
            steps=process.passes // 2,
            passes=process.passes + process.checks,
            status=Status.CONVERGED if proved else Status.UNPROVED,
            near=(sigma[k:].to(**to), v[:, k:]) if pairs > k else None,
        )

    def _converged(
        self, sigma: Tensor, residuals: Tensor, gaps: Tensor, noise: float, rtol: float
    ) -> bool:
        """Whether each residual is below its tolerance."""
        enough = torch.maximum(rtol * sigma[:1], self.angle * gaps - noise)
        return bool((residuals <= enough).all())


@dataclass(frozen=True)
class _Witness:
    """What the random vectors of a start block say of triplets that were not found."""

    process: Bidiagonalization
    probes: Tensor
    size: float
    missed: float | None
    generator: Randomness

    def lowest_cut(self, ritz: Ritz, k: int) -> float | None:
        """See :meth:`Unseen.lowest_cut`, with the rounding of the process measured."""
        if self.missed is None:
            return None
        exact = Rounding(self.process.noise, torch.zeros(len(ritz.left), dtype=torch.float64))
        if self._unseen(ritz, exact).lowest_cut(k) is None:
            return None  # not even with vectors that rounding has left alone
        count = len(ritz.left) + len(ritz.right)
        drawn = gaussian(count, CHECKS, self.generator)
        measured = measure_rounding(self.process, ritz, drawn, self.missed, self.size)
        return self._unseen(ritz, measured).lowest_cut(k)

    def _unseen(self, ritz: Ritz, rounding: Rounding) -> Unseen:
        missed = self.missed or 0.0
        return Unseen.of(self.process, ritz, self.probes, self.size, missed, rounding)


def _gaps(sigma: Tensor, residuals: Tensor, k: int, *, complete: bool) -> Tensor:
    """Distances to the nearest neighbour, whatever Ritz values beyond the k-th may yet become."""
    # one that has not converged may belong to any value within its residual above it
    most = (sigma + residuals)[k:].clamp_max(min(sigma[:k].tolist(), default=0.0))
    below = most.sort(descending=True).values
    return neighbour_gaps(torch.cat([sigma[:k], below]), k, complete=complete)
