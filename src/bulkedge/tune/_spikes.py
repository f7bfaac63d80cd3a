"""The spikes of many updates at once, from their factors' Gram matrices.

With ``BᵀB = R_Bᵀ R_B`` and ``A Aᵀ = R_Aᵀ R_A`` the singular values of ``s·B·A`` are those of the
small matrix ``s R_B R_Aᵀ = X Γ Yᵀ``.  Small matrices of one size go through one batched
decomposition: a model's hundred layers cost hardly more than one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._layers import AdaptedMatrix

RANK = 1e-14
"""Eigenvalues of a Gram matrix below this part of the largest are taken for zero."""


@dataclass(frozen=True)
class Spikes:
    """The spikes of one update.

    Attributes:
        gamma: Singular values of ``s·B·A``, descending, shape ``(r,)``, float64.
        left: X, shape ``(r, r)``.
        right: Y, shape ``(r, r)``.
        root_B: R_B.
        root_A: R_A.
    """

    gamma: Tensor
    left: Tensor
    right: Tensor
    root_B: Tensor
    root_A: Tensor

    def rescaled(self, matrix: AdaptedMatrix, gamma: Tensor) -> None:
        """Write other strengths into the factors: ``γ_j → gamma_j``, the vectors stay.

        Half of the change goes to either factor, by an r×r matrix close to the identity, so that
        what an optimiser knows of the factors stays nearly true.

        Args:
            matrix: Whose spikes these are.
            gamma: New strengths, at most the old ones, shape ``(r,)``.
        """
        less = gamma < self.gamma
        if not bool(less.any()):
            return
        weight = (gamma[less] / self.gamma[less]).sqrt() - 1
        X, Y = self.left[:, less], self.right[:, less]
        M_B = _inverse(self.root_B) @ (X * weight) @ (X.mT @ self.root_B)
        M_A = _inverse(self.root_A) @ (Y * weight) @ (Y.mT @ self.root_A)
        B, A = matrix.factors
        matrix.write(B + (B.double() @ M_B).to(B.dtype), A + (M_A.mT @ A.double()).to(A.dtype))


def spikes_of(matrices: Sequence[AdaptedMatrix]) -> list[Spikes]:
    """The spikes of all updates.

    Cost: O((m + n) r²) each for the Gram matrices, one batched decomposition for all of one rank.

    Args:
        matrices: The matrices.

    Returns:
        In the same order.
    """
    found: dict[int, Spikes] = {}
    groups = defaultdict(list)
    for i, matrix in enumerate(matrices):
        groups[matrix.rank, matrix.A.device].append(i)
    with torch.no_grad():
        for members in groups.values():
            factors = [matrices[i].factors for i in members]
            root_B = _roots(torch.stack([B.double().mT @ B.double() for B, _ in factors]))
            root_A = _roots(torch.stack([A.double() @ A.double().mT for _, A in factors]))
            scales = root_B.new_tensor([matrices[i].scale for i in members])
            X, gamma, Yt = torch.linalg.svd(scales[:, None, None] * (root_B @ root_A.mT))
            parts = zip(members, gamma, X, Yt.mT, root_B, root_A, strict=True)
            found |= {i: Spikes(*rest) for i, *rest in parts}
    return [found[i] for i in range(len(matrices))]


def effective_rank(gamma: Tensor) -> float:
    """``exp(−Σ p_j log p_j)`` with ``p = γ / Σγ``: how many spikes share the update; 0 for none.

    Args:
        gamma: Singular values, shape ``(r,)``.

    Returns:
        Between 1 and r.

    References:
        Roy and Vetterli, EUSIPCO 2007: The effective rank.

    Example:
        >>> effective_rank(torch.tensor([1.0, 1.0, 0.0]))
        2.0
    """
    total = float(gamma.sum())
    if total <= 0:
        return 0.0
    p = gamma.double() / total
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def _roots(grams: Tensor) -> Tensor:
    """R with ``RᵀR`` the Gram matrix: ``Λ^½ Eᵀ``, zero rows for directions that are not there."""
    values, vectors = torch.linalg.eigh(grams)
    values = values.where(values > RANK * values[..., -1:], torch.zeros_like(values))
    return values.sqrt()[..., None] * vectors.mT


def _inverse(root: Tensor) -> Tensor:
    """The pseudo-inverse of a root: its rows are orthogonal."""
    squares = root.square().sum(dim=1)
    return root.mT * torch.where(squares > 0, 1 / squares, 0.0)
