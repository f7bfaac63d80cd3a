"""Working precision first, then Newton steps with residuals in float64.

With v from a solve in float32, ``u = Av/σ`` and ``r = Aᵀu − σv`` in float64, the Newton correction
(p, q) solves ``K [p; q] = [0; r]`` on the complement of the block: the system of the derivative,
solved by the same conjugate gradients in float32.  Rayleigh-Ritz on the span of v and q, in
float64, takes the best of both: the error is squared, or multiplied by the tolerance of the solve
if that is larger.  Where a second value lies so close that float32 saw one mixed vector, q is the
other direction, and Rayleigh-Ritz separates the two and puts them in order.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bulkedge._fields import POSITIVE, check_fields, method, whole
from bulkedge._linmap import Counted, LinearMap
from bulkedge._precision import exact
from bulkedge.triplet._result import SingularTriplets, neighbour_gaps
from bulkedge.triplet._thin_svd import thin_svd
from bulkedge.triplet.adjoint import DeflatedCG, System

from ._solver import Solver
from ._start import Randomness
from .block_krylov import BlockKrylov


@dataclass(frozen=True)
class Refined:
    """``inner`` in the dtype of A, its vectors then made exact to that dtype.

    A float32 solve leaves an error of about eps·σ/gap in the vectors, for close singular values far
    more than the rounding of the result.  Where values are well separated, or A is float64, nothing
    is done.

    Cost: that of ``inner``, and a step or two: two passes in float64, a tile of A at a time, and a
    short solve by conjugate gradients in the dtype of A.

    Attributes:
        inner: The solver in the dtype of A.
        error: Wanted bound on the sine of the angle to the true vectors, judged by residual/gap.
        max_steps: Newton steps before giving up: then the result of ``inner`` stands.  A step that
            does not halve the residuals is the last: the gap is lost in rounding.
    """

    inner: Solver = field(default_factory=BlockKrylov)
    error: float = 3e-6
    max_steps: int = 4

    def __post_init__(self) -> None:
        check_fields(
            self, inner=method("compute", "BlockKrylov()"), error=POSITIVE, max_steps=whole(1)
        )

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The k leading triplets of A, m ≥ n."""
        coarse = self.inner.compute(A, k, start, generator)
        rounding = 4 * torch.finfo(A.dtype).eps * coarse.sigma[0]
        gap = _outer_gap(coarse)
        if (
            A.dtype is torch.float64
            or coarse.near is None
            or gap <= 0
            or coarse.rank < k
            or bool((coarse.residuals + rounding <= self.error * coarse.gaps).all())
        ):
            return coarse
        counted = Counted(A)
        refined = self._refine(counted, coarse, coarse.near, gap) or coarse
        return dataclasses.replace(refined, passes=coarse.passes + counted.passes[0])

    def _refine(
        self, A: LinearMap, coarse: SingularTriplets, near: tuple[Tensor, Tensor], gap: float
    ) -> SingularTriplets | None:
        k, largest = len(coarse.sigma), math.inf
        wide, correction = A.to(torch.float64), DeflatedCG(rtol=1e-3, max_steps=200)
        basis = exact(coarse.v)
        for step in range(1, self.max_steps + 1):
            basis = torch.linalg.qr(basis).Q
            U, S, Y = thin_svd(wide.matmat(basis))
            u, sigma, v = U[:, :k], S[:k], basis @ Y[:, :k]
            r = wide.rmatmat(u) - v * sigma
            residuals = torch.linalg.vector_norm(r, dim=0)
            gap = min(gap, float(sigma[-1] - S[k])) if len(S) > k else gap
            if bool((residuals <= self.error * gap).all()):
                gaps = neighbour_gaps(S, k, complete=False) if len(S) > k else exact(coarse.gaps)
                gaps = torch.minimum(exact(coarse.gaps), gaps)
                figures = (x.to(coarse.v) for x in (sigma, u, v, residuals, gaps))
                return SingularTriplets(
                    *figures,
                    steps=coarse.steps + step,
                    passes=coarse.passes,
                    status=coarse.status,
                    near=near,
                )
            if float(residuals.max()) > largest / 2:
                return None
            largest = float(residuals.max())
            right = (r - v @ (v.mT @ r)).to(coarse.v)
            sigma, u, v32 = (x.to(coarse.v) for x in (sigma, u, v))
            system = System(A, sigma, u, v32, None, right, near)
            _, q = correction.solve(system)
            basis = torch.cat([v, exact(q)], dim=1)
        return None


def _outer_gap(result: SingularTriplets) -> float:
    """Distance of σ_k to what the solver saw below it."""
    below = 0.0 if result.near is None else float(result.near[0][:1].sum())
    return float(result.sigma[-1]) - below
