"""The mathematics of spectral adapters: updates that are made of a weight's own leading triplets.

With ``W0 = U S Vᵀ`` and its r leading triplets U₁, S₁, V₁:

    additive     ΔW = (U₁ + A_U) S₁ (V₁ + A_V)ᵀ − U₁ S₁ V₁ᵀ,       rank ≤ 2r
    rotational   ΔW = U₁ (R_U S₁ R_Vᵀ − S₁) V₁ᵀ,                   rank ≤ r

A rotational update leaves every singular value of W0 and both leading spaces as they are.

Zhang, Pilanci, Spectral Adapter, arXiv:2405.13952.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bulkedge.triplet import singular_triplet

Variant = Literal["additive", "rotational"]
Rotation = Literal["cayley", "exp"]


@dataclass(frozen=True)
class Basis:
    """Leading triplets of a weight.

    Attributes:
        U: Left vectors, shape ``(m, r)``.
        S: Values, descending, shape ``(r,)``.
        V: Right vectors, shape ``(n, r)``.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @classmethod
    def of(cls, W0: Tensor, r: int) -> Basis:
        """The r leading triplets of a weight, in float32 at least; no full SVD of a large one."""
        with torch.no_grad():
            found = singular_triplet(_wide(W0.detach()), r)
        return cls(found.u, found.sigma, found.v)

    def misfit(self, W0: Tensor) -> float:
        """``max_i ‖W0 v_i − σ_i u_i‖ / σ₁``: rounding for the weight that the basis is of."""
        with torch.no_grad():
            rest = _wide(W0.detach()) @ self.V.to(W0.device) - self.U.to(W0.device) * self.S
            size = torch.linalg.vector_norm(rest, dim=0).max()
            return float(size / self.S[0].clamp_min(torch.finfo(self.S.dtype).tiny))


def additive(basis: Basis, A_U: Tensor, A_V: Tensor) -> tuple[Tensor, Tensor]:
    """The additive update as two thin factors.

    Args:
        basis: The leading triplets.
        A_U: Shape ``(m, r)``.
        A_V: Shape ``(n, r)``.

    Returns:
        X, Y of shapes ``(m, 2r)`` and ``(n, 2r)`` with ``ΔW = X Yᵀ``.
    """
    left = torch.cat([A_U * basis.S, (basis.U + A_U) * basis.S], dim=1)
    return left, torch.cat([basis.V, A_V], dim=1)


def rotational(
    basis: Basis, K_U: Tensor, K_V: Tensor, rotation: Rotation = "cayley"
) -> tuple[Tensor, Tensor]:
    """The rotational update as two thin factors.

    Args:
        basis: The leading triplets.
        K_U: What is below the diagonal of a skew-symmetric matrix, shape ``(r (r − 1)/2,)``.
        K_V: The same for the right side.
        rotation: How a skew-symmetric matrix becomes a rotation; see :func:`rotation_of`.

    Returns:
        X, Y of shapes ``(m, r)`` and ``(n, r)`` with ``ΔW = X Yᵀ``.
    """
    R_U, R_V = (rotation_of(K, len(basis.S), rotation) for K in (K_U, K_V))
    core = R_U * basis.S @ R_V.mT - torch.diag(basis.S)
    return basis.U @ core, basis.V


def rotation_of(below: Tensor, r: int, rotation: Rotation = "cayley") -> Tensor:
    """The orthogonal matrix of a skew-symmetric K, the identity for 0.

    Args:
        below: The entries of K below its diagonal, row by row, shape ``(r (r − 1)/2,)``.
        r: The size.
        rotation: ``"cayley"``: ``(I − K/2)⁻¹ (I + K/2)``; ``"exp"``: ``exp K``.

    Returns:
        Shape ``(r, r)``.
    """
    rows, columns = torch.tril_indices(r, r, -1, device=below.device)
    lower = below.new_zeros(r, r).index_put((rows, columns), below)
    K = lower - lower.mT
    if rotation == "exp":
        return torch.linalg.matrix_exp(K)
    eye = torch.eye(r, dtype=K.dtype, device=K.device)
    return torch.linalg.solve(eye - K / 2, eye + K / 2)


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype is torch.float64 else weight.float()
