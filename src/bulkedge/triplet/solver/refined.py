"""Working precision first, then Newton steps with residuals in float64.

With u, v from a solve in float32, ``r_u = Av − σu`` and ``r_v = Aᵀu − σv`` in float64, the Newton
correction (p, q) solves ``K [p; q] = [r_u; r_v]`` on the complement of the block: the system of the
derivative, solved by the same conjugate gradients in float32.  Each step squares the error, or
multiplies it by the tolerance of the solve if that is larger: iterative refinement.  Inside the
block a Rayleigh-Ritz step, a k×k SVD in float64, does the same for close values.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bulkedge._linmap import Counted, LinearMap
from bulkedge.triplet._result import SingularTriplets

from ._start import Randomness
from .lanczos import Lanczos

if TYPE_CHECKING:
    from . import Solver


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
        max_steps: Newton steps before giving up: then the result of ``inner`` stands.
    """

    inner: Solver = field(default_factory=Lanczos)
    error: float = 3e-6
    max_steps: int = 4

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
            or bool((coarse.residuals + rounding <= self.error * coarse.gaps).all())
        ):
            return coarse
        return self._refine(A, coarse, coarse.near, gap) or coarse

    def _refine(
        self, A: LinearMap, coarse: SingularTriplets, near: tuple[Tensor, Tensor], gap: float
    ) -> SingularTriplets | None:
        from bulkedge.triplet.adjoint import DeflatedCG, System

        A, dtype = Counted(A), A.dtype
        wide, correction = A.widened(), DeflatedCG(rtol=1e-3, max_steps=200)
        u, v = coarse.u.double(), coarse.v.double()
        for step in range(1, self.max_steps + 1):
            u, v, sigma, r_u, r_v = _rayleigh_ritz(wide, u, v)
            residuals = torch.linalg.vector_norm(torch.cat([r_u, r_v]), dim=0)
            if bool((residuals <= self.error * gap).all()):
                return dataclasses.replace(
                    coarse,
                    sigma=sigma.to(dtype),
                    u=u.to(dtype),
                    v=v.to(dtype),
                    residuals=residuals.to(dtype),
                    steps=coarse.steps + step,
                    passes=coarse.passes + A.passes[0],
                )
            numbers = (x.to(dtype) for x in (sigma, u, v, r_u, r_v))
            p, q = correction.solve(System(A, *numbers, near=near))
            u, v = u + p, v + q
        return None


def _rayleigh_ritz(A: LinearMap, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The best triplets in the spans of u and v: u, v, σ and the residuals outside the spans."""
    u, v = torch.linalg.qr(u).Q, torch.linalg.qr(v).Q
    right, left = A.matmat(v), A.rmatmat(u)
    P, sigma, Qt = torch.linalg.svd(u.mT @ right)
    r_u, r_v = right - u @ (u.mT @ right), left - v @ (v.mT @ left)
    return u @ P, v @ Qt.mT, sigma, r_u @ Qt.mT, r_v @ P


def _outer_gap(result: SingularTriplets) -> float:
    """Distance of σ_k to what the solver saw below it."""
    below = 0.0 if result.near is None else float(result.near[0][:1].sum())
    return float(result.sigma[-1]) - below
