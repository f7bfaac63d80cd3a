"""All singular values of small matrices of one shape by one eigenproblem each, batched.

The eigenvectors of ``AᵀA`` are the right singular vectors, for a third of the price of an SVD.
Those of a float32 matrix are computed in float32 and made exact by Newton steps with residuals in
float64, in which the whole basis serves as the inverse: with ``u = Av/σ`` and ``r = Aᵀu − σv``::

    v ← v + V_⊥ (σ²I − Λ_⊥)⁻¹ V_⊥ᵀ σr

multiplies the error by some ``eps σ₁²/(σ·gap)``.  The same inverse solves the system of the
derivative, with the same steps.  Where that factor is no small number nothing is returned, and
the caller goes the general way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bulkedge._precision import exact

SMALL_UP_TO = 384
"""Matrices with a shorter side up to this are taken."""
NARROW_FROM = 80
"""From this side on an eigenproblem in float32 and its refinement cost less than one in float64."""
MIN_GAP = 5e-4
"""The gap below σ_k times σ_k has to be this part of σ₁²."""
LEAST_TRACE = 1e-200
LARGEST_TRACE = {torch.float64: 1e200, torch.float32: torch.finfo(torch.float32).max ** 2}
"""Sums of squares between these neither under- nor overflow on the way, nor does σ₁ in the end."""
VECTOR_ERROR = 1e-9
"""Vectors of a float32 matrix are refined until residual over gap is below this."""
ROUNDING = 64.0
"""Residuals of a float64 matrix end below this, in units of eps σ₁."""
MAX_REFINEMENTS = 4
"""After so many steps the general way is gone."""


@dataclass(frozen=True)
class Small:
    """The decomposition of a batch of matrices with m ≥ n, in float64.

    Attributes:
        matrix: A, shape ``(..., m, n)``.
        squares: The squares of the values beyond the k-th, ascending, shape ``(..., n − k)``.
        basis: Their right vectors, shape ``(..., n, n − k)``; to float32 only if it is narrow.
        sigma: The k leading values, descending, shape ``(..., 1, k)``.
        u: Left vectors, shape ``(..., m, k)``.
        v: Right vectors, shape ``(..., n, k)``.
        residuals: ``‖Aᵀu − σv‖``, shape ``(..., k)``.
        gaps: Distance of each value to its nearest neighbour, shape ``(..., k)``.
        following: The value after the k-th, shape ``(..., 1)``; none if k = n.
        refinements: How many steps the solution of a system takes besides the first.
        evaluations: How often the residuals were computed.
    """

    matrix: Tensor
    squares: Tensor
    basis: Tensor
    sigma: Tensor
    u: Tensor
    v: Tensor
    residuals: Tensor
    gaps: Tensor
    following: Tensor
    refinements: int
    evaluations: int

    def outside(self, phi: Tensor | None, psi: Tensor | None) -> tuple[Tensor, Tensor]:
        """P ⊥ U and Q ⊥ V with ``K_i [p_i; q_i] = [φ_i; ψ_i]`` outside the block.

        Args:
            phi: Shape ``(..., m, k)``, float64; None for zero.
            psi: Shape ``(..., n, k)``.

        Returns:
            P and Q.
        """
        A, s, u, v = self.matrix, self.sigma, self.u, self.v
        right = 0.0 if psi is None else s * psi
        if phi is not None:
            phi = phi - u @ (u.mT @ phi)
            right = right + A.mT @ phi
        if not isinstance(right, Tensor):
            return torch.zeros_like(u), torch.zeros_like(v)
        right = right - v @ (v.mT @ right)
        shifted = s * s - self.squares[..., None]
        q = _inverse(self.basis, shifted, right)
        for _ in range(self.refinements):
            left = right - s * s * q + A.mT @ (A @ q)
            q = q + _inverse(self.basis, shifted, left)
        q = q - v @ (v.mT @ q) if self.refinements else q
        p = A @ q if phi is None else A @ q + phi
        p = p / s
        return p - u @ (u.mT @ p), q

    def turned_like(self, u: Tensor) -> Small:
        """The same with the signs of these left vectors."""
        sign = torch.where((self.u * u).sum(dim=-2, keepdim=True) < 0, -1.0, 1.0)
        return replace(self, u=self.u * sign, v=self.v * sign)


def decompose(A: Tensor, k: int) -> Small | None:
    """The decomposition of matrices, those wider than tall transposed.

    Cost: one eigenproblem of the shorter side for each matrix, and some products with k vectors.

    Args:
        A: Shape ``(..., m, n)``, float32 or float64.
        k: How many leading triplets.

    Returns:
        The decomposition; None where one of them is not finite, or has no gap below σ_k.
    """
    W = upright(A)
    gram, n, single = W.mT @ W, W.shape[-1], A.dtype is torch.float32
    trace = gram.trace() if A.ndim == 2 else gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    least, largest = _ends(trace)
    if not (least > LEAST_TRACE and largest < LARGEST_TRACE[A.dtype]):
        return None
    narrow = single and n >= NARROW_FROM
    if narrow:
        squares, V = torch.linalg.eigh((gram / trace[..., None, None]).float())
        squares, V = squares * trace[..., None], exact(V)
    else:
        squares, V = torch.linalg.eigh(gram)
    below, basis, v = squares[..., : n - k], V[..., : n - k], V[..., n - k :].flip(-1)
    following = below[..., -1:].clamp_min(0.0).sqrt() if n > k else squares.new_zeros(1)
    rounding = ROUNDING * torch.finfo(torch.float64).eps
    for evaluations in range(1, MAX_REFINEMENTS + 2):
        s, u, v = _ritz(W, v)
        r = W.mT @ u - v * s
        residuals, values = torch.linalg.vector_norm(r, dim=-2), s[..., 0, :]
        gap = values[..., -1:] - following
        error = residuals / (VECTOR_ERROR * gap if single else rounding * values[..., :1])
        lowest, highest = _ends(error)
        if lowest >= 0 and highest <= 1:
            share = _ends(gap * values[..., -1:] / values[..., :1].square())[0]
            steps = (1 if share > 50 * MIN_GAP else 2) if narrow else 0
            gaps, after = _gaps(values, gap), following[..., : n - k]
            found = Small(W, below, basis, s, u, v, residuals, gaps, after, steps, evaluations)
            return found if share >= MIN_GAP else None
        v = v + _inverse(basis, s * s - below[..., None], s * r)
    return None


def upright(A: Tensor) -> Tensor:
    """The matrices in float64, those wider than tall transposed."""
    W = exact(A.detach())
    return W if W.shape[-2] >= W.shape[-1] else W.mT


def _ends(x: Tensor) -> tuple[float, float]:
    """The least and the largest entry; NaN if there is one."""
    if x.numel() == 1:
        return (only := float(x)), only
    least, largest = x.aminmax()
    return float(least), float(largest)


def _inverse(basis: Tensor, shifted: Tensor, right: Tensor) -> Tensor:
    """``V diag(1/shifted) Vᵀ right``."""
    return basis @ ((basis.mT @ right) / shifted)


def _ritz(W: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values ``(..., 1, k)``, left and right vectors, the best in the span of v."""
    if v.shape[-1] == 1:
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True)
        image = W @ v
        s = torch.linalg.vector_norm(image, dim=-2, keepdim=True)
        return s, image / s, v
    Q = torch.linalg.qr(v).Q
    U, S, Yt = torch.linalg.svd(W @ Q, full_matrices=False)
    return S[..., None, :], U, Q @ Yt.mT


def _gaps(sigma: Tensor, gap: Tensor) -> Tensor:
    """The distance of each value to its nearest neighbour, from those below."""
    if sigma.shape[-1] == 1:
        return gap
    down = torch.cat([sigma[..., :-1] - sigma[..., 1:], gap], dim=-1)
    up = torch.nn.functional.pad(down[..., :-1], (1, 0), value=torch.inf)
    return torch.minimum(down, up)
