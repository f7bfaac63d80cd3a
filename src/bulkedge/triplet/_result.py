"""What a solver returns: the triplets, and the evidence for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._guard import finite

MAX_SHOWN = 8
"""A result prints no more singular values than this."""


class Status(Enum):
    """How a solve ended; the value is the advice."""

    CONVERGED = "every residual is below the tolerance"
    UNPROVED = (
        "every residual is below the tolerance, but a leading triplet may have been missed: raise "
        "oversample or max_steps, or use DenseSVD()"
    )
    MAX_STEPS = (
        "the step limit was reached before the tolerance: raise max_steps, loosen rtol, or use "
        "DenseSVD()"
    )
    DEFERRED = (
        "not known while the code is being compiled or vmapped; strict=True raises when it runs"
    )


@dataclass(frozen=True)
class SingularTriplets:
    """The k leading singular triplets ``A v_i = σ_i u_i``, ``Aᵀ u_i = σ_i v_i``.

    For a batch every tensor has the batch in front, ``steps`` is the largest, ``passes`` the sum
    and ``status`` the worst.

    Attributes:
        sigma: Shape ``(k,)``, descending.
        u: Left vectors, shape ``(m, k)``.
        v: Right vectors, shape ``(n, k)``.
        residuals: ``‖[A v − σu; Aᵀu − σv]‖₂`` of each triplet, shape ``(k,)``: absolute, in the
            units of A.  Where vectors were found in a wider dtype than they are returned in, it is
            of the vectors as found; rounding them adds about ``eps·σ``.
        gaps: Distance of each σ_i to the nearest other singular value, shape ``(k,)``; the
            neighbour below the last is an estimate from the same solve.
        steps: Iterations of the solver.
        passes: Products with A or Aᵀ, each with a block of vectors: how often A was read.
        status: How the solve ended.
        near: Approximate singular values beyond the k-th, shape ``(b,)``, and their vectors on the
            shorter side of A, shape ``(min(m, n), b)``, if the solver returns any.  They
            precondition the derivative, nothing else.
    """

    sigma: Tensor
    u: Tensor
    v: Tensor
    residuals: Tensor
    gaps: Tensor
    steps: int
    passes: int
    status: Status
    near: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """``sigma, u, v = result``."""
        return iter((self.sigma, self.u, self.v))

    def __repr__(self) -> str:
        """Shapes, σ, the largest residual and the status, without the vectors."""
        shapes = f"u={tuple(self.u.shape)}, v={tuple(self.v.shape)}"
        counts = f"steps={self.steps}, passes={self.passes}, status={self.status.name}"
        try:
            shown = [f"{x:.6g}" for x in self.sigma.detach().flatten()[:MAX_SHOWN].tolist()]
            residual = f"{float(self.residuals.detach().max()):.1e}"
        except RuntimeError:  # under vmap or a compiler there are no numbers to show
            return f"SingularTriplets(sigma={tuple(self.sigma.shape)}, {shapes}, {counts})"
        more = ", …" if self.sigma.numel() > MAX_SHOWN else ""
        values = f"sigma=[{', '.join(shown)}{more}]"
        return f"SingularTriplets({values}, {shapes}, residuals≤{residual}, {counts})"

    @property
    def rank(self) -> int:
        """How many triplets exist, their σ above rounding; of a batch the least."""
        shape = (self.u.shape[-2], self.v.shape[-2])
        return int((self.sigma > resolution(self.sigma, shape)).sum(dim=-1).min())

    @property
    def vector_errors(self) -> Tensor:
        """Bound on the sine of the angle between each computed and true vector, shape ``(k,)``.

        ``sin ∠(û, u) ≤ (‖residual‖ + max(m, n)·eps·σ₁) / gap``, at most 1 (Wedin 1972,
        doi:10.1007/BF01932678).  The second term allows for rounding in the dtype of ``sigma``, and
        the gap to computed values stands in for the gap to the true ones.  In float32 the rounding
        term is often far larger than the true error.  Where two singular values coincide no single
        vector is defined, and the bound is 1.

        For k = 1 a large matrix is solved with single vectors (:class:`Lanczos`), which see one of
        several nearly equal values: the vector lies in their common space, and the bound does not
        say where.  k = 2 shows both.
        """
        shape = (self.u.shape[-2], self.v.shape[-2])
        finite("the singular values", self.sigma)
        # over the gap first: the rounding error of a tiny σ₁ is below all numbers
        rounding = resolution(torch.ones_like(self.sigma), shape) * (
            self.sigma[..., :1] / self.gaps
        )
        errors = self.residuals / self.gaps + rounding
        return torch.where(errors < 1, errors, 1.0)  # also in a tie, though no residual is left


def neighbour_gaps(sigma: Tensor, k: int, *, complete: bool) -> Tensor:
    """Distance of each of the first ``k`` of the descending ``sigma`` to its nearest neighbour.

    Args:
        sigma: Descending, shape ``(≥ k,)``.
        k: How many are wanted.
        complete: Whether ``sigma`` is the whole spectrum: then the null space follows it, at 0.
            Otherwise the value after the last is not known, and the last gap is 0.

    Returns:
        Shape ``(k,)``.
    """
    below = torch.cat([sigma, sigma.new_zeros(1) if complete else sigma[-1:]])
    down = (below[:-1] - below[1:])[:k]
    up = torch.cat([sigma.new_full((1,), torch.inf), down[:-1]])
    return torch.minimum(up, down)


def stated(residuals: Tensor, sigma: Tensor) -> Tensor:
    """Residuals that are not smaller than they are, where numbers of the dtype are too coarse.

    Below its normal numbers, σ and the residual itself lose up to half of the smallest one each.

    Args:
        residuals: As rounded to the dtype, shape ``(..., k)``.
        sigma: Shape ``(..., k)``.

    Returns:
        Shape ``(..., k)``.
    """
    limits = torch.finfo(sigma.dtype)
    coarse = (residuals < limits.tiny) & (sigma > 0) & (sigma < limits.tiny / limits.eps**2)
    return torch.where(coarse, residuals + 2 * limits.tiny * limits.eps, residuals)


def resolution(sigma: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The rounding error of the singular values of a matrix, ``max(m, n) · eps · σ₁``.

    Args:
        sigma: Its singular values, descending; at least the first.
        shape: ``(m, n)``.

    Returns:
        Shape ``(..., 1)``, 0 for no values at all.

    Raises:
        InputError: If they are no real floating-point numbers, or not finite.
    """
    if not sigma.is_floating_point():
        raise InputError(f"expected real floating-point values, got {sigma.dtype}; convert them")
    finite("the singular values", sigma)
    return max(shape) * torch.finfo(sigma.dtype).eps * sigma[..., :1].sum(dim=-1, keepdim=True)
