"""The mathematics of spectral adapters: updates built from the leading triplets of a weight.

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

from bulkedge._precision import exact, full_precision
from bulkedge.triplet import singular_triplet

from ._matrix import product_dtype

Variant = Literal["additive", "rotational"]
Rotation = Literal["cayley", "exp"]
TINY = torch.finfo(torch.float32).tiny
"""The smallest value by which a residual is divided."""


@dataclass(frozen=True)
class Basis:
    """The leading triplets of a weight.

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
        """The r leading triplets of a weight, in float32 or float64, without a full SVD."""
        with torch.no_grad():
            found = singular_triplet(W0.detach().to(product_dtype(W0.dtype)), r)
        return cls(found.u, found.sigma, found.v)

    def relative_residual(self, W0: Tensor) -> float:
        """How far these are from being triplets of a weight; rounding alone if they are its own.

        Cost: two passes over the weight.

        Returns:
            ``max_i max(‖W0 v_i − σ_i u_i‖, ‖W0ᵀ u_i − σ_i v_i‖) / max(σ_i, σ̄)``, where σ̄ is the
            root mean square of all singular values.
        """
        dtype = product_dtype(W0.dtype)
        with torch.no_grad(), full_precision(W0.device):
            W = W0.detach().to(dtype)
            U, S, V = (x.to(W.device, dtype) for x in (self.U, self.S, self.V))
            rests = W @ V - U * S, W.mT @ U - V * S
            sizes = torch.stack([torch.linalg.vector_norm(rest, dim=0) for rest in rests])
            mean = torch.linalg.matrix_norm(W) / min(W.shape) ** 0.5
            return float((sizes / S.clamp_min(float(mean)).clamp_min(TINY)).max())


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
        K_U: The entries of a skew-symmetric matrix below its diagonal, shape ``(r (r − 1)/2,)``.
        K_V: The same for the right side.
        rotation: The map from skew-symmetric matrices to rotations; see :func:`rotation_of`.

    Returns:
        X, Y of shapes ``(m, r)`` and ``(n, r)`` with ``ΔW = X Yᵀ``.
    """
    # the core is a small difference near the identity: float64 avoids its cancellation, and is not
    # subject to TF32 or autocast
    S = exact(basis.S)
    R_U, R_V = (rotation_of(exact(K), len(S), rotation) for K in (K_U, K_V))
    core = R_U * S @ R_V.mT - torch.diag(S)
    return basis.U @ core.to(basis.U), basis.V


def rotation_of(entries: Tensor, r: int, rotation: Rotation = "cayley") -> Tensor:
    """The rotation that belongs to a skew-symmetric K; the identity for K = 0.

    Args:
        entries: The entries of K below its diagonal, row by row, shape ``(r (r − 1)/2,)``.
        r: The size.
        rotation: ``"cayley"``: ``(I − K/2)⁻¹ (I + K/2)``; ``"exp"``: ``exp K``.

    Returns:
        Shape ``(r, r)``.
    """
    rows, columns = torch.tril_indices(r, r, -1, device=entries.device)
    lower = entries.new_zeros(r, r).index_put((rows, columns), entries)
    K = lower - lower.mT
    if rotation == "exp":
        return torch.linalg.matrix_exp(K)
    eye = torch.eye(r, dtype=K.dtype, device=K.device)
    return torch.linalg.solve(eye - K / 2, eye + K / 2)
