"""The update that keeps the task's loss and the base's: inputs and outputs of a layer both count.

Let C be the second moment of a layer's inputs, and ``G = E[g gᵀ]`` that of the gradients g of a
loss by its outputs.  To second order, and as far as inputs and gradients are independent, an update
D changes that loss by ``tr(G D C Dᵀ)``.  The minimum over D' of

    tr(G_t (D' − ΔW) C_t (D' − ΔW)ᵀ) + λ tr(G_b D' C_b D'ᵀ)

solves ``G_t D' C_t + λ G_b D' C_b = G_t ΔW C_t``, a generalised Sylvester equation.  In the bases
in which each pair is diagonal, ``C_t = R Rᵀ, C_b = R diag(μ) Rᵀ`` and ``G_t = S Sᵀ, G_b = S diag(ν)
Sᵀ``, with ``Y = Sᵀ D' R`` and ``Y0 = Sᵀ ΔW R``, it is solved entry by entry,
``Y = Y0 / (1 + λ ν μᵀ)``.

That has full rank.  At the rank of factors the objective is ``Σ (Y − Y0)² + λ ν μᵀ Y²`` over
``Y = P Q``.  The best Q for a P is one r × r system for each column, and the best P for a Q one for
each row.  They alternate, and each lowers the objective.  Without curvatures, ``ν = 1``, this is
:func:`bulkedge.repairing.solve.protected`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from bulkedge._fields import NOT_NEGATIVE, check_values, whole
from bulkedge._linmap import LowRank
from bulkedge._precision import exact
from bulkedge.moments import Moment

from .curve import Basis
from .solve import RIDGE, Scaled

NEARLY = 1e-13
"""Part of the mean diagonal that is added to the small systems, which may be singular."""
SWEEPS = 8
"""How often both factors are solved for: from the factors as trained few sweeps are enough."""


@dataclass(frozen=True)
class Sides:
    """A layer in the bases in which all four matrices are diagonal.

    Attributes:
        inputs: Of ``C_b`` and ``C_t``, both scaled to mean diagonal 1.
        outputs: Of ``G_b`` and ``G_t``, likewise.
        unit: What λ is multiplied with for these scales.

    References:
        Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate
        curvature", arXiv:1503.05671: the same two moments of a layer.

    Example:
        >>> one, two = torch.eye(2), torch.diag(torch.tensor([1.0, 3.0]))
        >>> layer = Sides.of((one, one), (two, one))
        >>> layer.solved(torch.eye(2), 1.0).diagonal().round(decimals=2).tolist()
        [0.49, 0.25]
    """

    inputs: Basis
    outputs: Basis
    unit: float

    @classmethod
    def of(
        cls,
        inputs: tuple[Moment, Moment],
        outputs: tuple[Moment, Moment],
        ridge: float = RIDGE,
    ) -> Sides:
        """Decompose both pairs; about ``15 (m³ + n³)`` in float64.

        Args:
            inputs: ``C_b`` and ``C_t``, as they were measured, shape ``(n, n)``.
            outputs: ``G_b`` and ``G_t``, likewise, shape ``(m, m)``.
            ridge: Of all four, in parts of their mean diagonals.

        Returns:
            The layer.

        Raises:
            InputError: If one of them is zero or not positive.
        """
        (C_b, C_t), (G_b, G_t) = ([Scaled.of(x, ridge) for x in pair] for pair in (inputs, outputs))
        unit = C_b.mean * G_b.mean / (C_t.mean * G_t.mean)
        return cls(Basis.of(C_b, C_t), Basis.of(G_b, G_t), unit)

    @overload
    def solved(self, update: Tensor, strength: float, sweeps: int = ...) -> Tensor: ...
    @overload
    def solved(self, update: LowRank, strength: float, sweeps: int = ...) -> LowRank: ...
    @overload
    def solved(
        self, update: Tensor | LowRank, strength: float, sweeps: int = ...
    ) -> Tensor | LowRank: ...
    def solved(
        self, update: Tensor | LowRank, strength: float, sweeps: int = SWEEPS
    ) -> Tensor | LowRank:
        """The update of a layer at a strength, in the form in which it was given.

        Cost: a matrix ``2 m n (m + n)``; factors ``2 (m² + n²) r``, and a sweep ``(m + n) r³``.

        Args:
            update: ΔW, shape ``(m, n)``, or ``s·B·A``.
            strength: λ.
            sweeps: Of factors: how often B and A are solved for; with 0 A alone, once.

        Returns:
            D' in float64: the minimum; of factors a point at which neither of the two can lower
            the objective any more, if the sweeps are enough.

        Raises:
            InputError: If the strength is negative, or the sweeps are.
        """
        check_values("Sides", strength=(strength, NOT_NEGATIVE), sweeps=(sweeps, whole(0)))
        S, R, weight = self.outputs, self.inputs, strength * self.unit
        if isinstance(update, Tensor):
            Y = (S.R.mT @ exact(update) @ R.R) / (1 + weight * torch.outer(S.mu, R.mu))
            return S.inverse.mT @ Y @ R.inverse
        P0, Q0 = S.R.mT @ exact(update.B), exact(update.A) @ R.R
        P, Q = P0, _right(P0, P0, Q0, weight * S.mu, R.mu)
        for _ in range(sweeps):
            P = _right(Q.mT, Q0.mT, P0.mT, weight * R.mu, S.mu).mT
            Q = _right(P, P0, Q0, weight * S.mu, R.mu)
        return LowRank(S.inverse.mT @ P, Q @ R.inverse, update.scale)


def _right(P: Tensor, P0: Tensor, Q0: Tensor, nu: Tensor, mu: Tensor) -> Tensor:
    """The Q that minimises ``Σ (P Q − P0 Q0)² + ν μᵀ (P Q)²``."""
    systems = P.mT @ P + mu[:, None, None] * ((P.mT * nu) @ P)
    # factors of a lower rank than they have columns leave some of Q open: it is nearly zero there
    diagonals = systems.diagonal(dim1=1, dim2=2)
    diagonals += NEARLY * diagonals.mean(dim=1, keepdim=True)
    return torch.linalg.solve(systems, (P.mT @ P0 @ Q0).mT[..., None])[..., 0].mT
