"""The linear system of the derivative, as every backward solver sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bulkedge._linmap import LinearMap


@dataclass(frozen=True)
class System:
    """``K_i [p_i; q_i] = [φ_i; ψ_i]`` for the columns i of Φ and Ψ.

    Attributes:
        A: The map, m ≥ n, scaled so that σ₁ is of order one.
        sigma: The k leading singular values, shape ``(k,)``.
        U: Left vectors, shape ``(m, k)``.
        V: Right vectors, shape ``(n, k)``.
        Phi: Orthogonal to U, shape ``(m, k)``; None stands for zero.
        Psi: Orthogonal to V, shape ``(n, k)``; None stands for zero.
        near: Approximate singular values beyond the k-th and their right vectors, shapes ``(b,)``
            and ``(n, b)``: something to precondition with.
    """

    A: LinearMap
    sigma: Tensor
    U: Tensor
    V: Tensor
    Phi: Tensor | None
    Psi: Tensor | None
    near: tuple[Tensor, Tensor]

    def outside_u(self, X: Tensor) -> Tensor:
        """The part of X orthogonal to U."""
        return _outside(self.U, X)

    def outside_v(self, X: Tensor) -> Tensor:
        """The part of X orthogonal to V."""
        return _outside(self.V, X)

    @property
    def filled(self) -> tuple[Tensor, Tensor]:
        """Φ and Ψ, zeros written out."""
        Phi = torch.zeros_like(self.U) if self.Phi is None else self.Phi
        Psi = torch.zeros_like(self.V) if self.Psi is None else self.Psi
        return Phi, Psi

    def left_over(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of Φ and Ψ outside the block after K times a solution; two passes."""
        Phi, Psi = self.filled
        r_u = Phi - (self.sigma * p - self.A.matmat(q))
        r_v = Psi - (self.sigma * q - self.A.rmatmat(p))
        return self.outside_u(r_u), self.outside_v(r_v)


def _outside(basis: Tensor, X: Tensor) -> Tensor:
    """The part of X orthogonal to a basis: none, and no rounding error, if it spans everything."""
    if basis.shape[0] == basis.shape[1]:
        return torch.zeros_like(X)
    return X - basis @ (basis.mT @ X)


def tolerance(rtol: float | None, dtype: torch.dtype) -> float:
    """``rtol``, or what serves the derivative: float32 solves are refined, float64 ones are not."""
    if rtol is not None:
        return rtol
    return 3e-4 if dtype is torch.float32 else torch.finfo(dtype).eps ** 0.75


class AdjointSolver(Protocol):
    """What the derivative rule asks of a method."""

    def solve(self, system: System) -> tuple[Tensor, Tensor]:
        """P of shape ``(m, k)`` orthogonal to U, and Q of shape ``(n, k)`` orthogonal to V."""
        ...
