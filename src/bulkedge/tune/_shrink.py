"""An update brought back to a limit of drift by the smallest change of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bulkedge._errors import InputError

from ._clip_spikes import FARTHEST, MARGIN_GROWTH, PASSES, Changeable
from ._core_svd import RANK_TOLERANCE
from ._drift import LayerDrift, measure

MARGIN = 1e-6
"""Drift is lowered to this fraction below its limit: the rounding of products in float32."""
NEWTON_STEPS = 60
"""How many steps find λ at most; about six do."""


def lower(layer: LayerDrift, limit: float, changeable: Changeable, *, scale: bool) -> None:
    """Write the nearest factors whose drift is at the limit, measured after they are rounded.

    Args:
        layer: A layer whose drift exceeds the limit.
        limit: The limit.
        changeable: Whether B and A may be changed.
        scale: Whether the update is scaled as a whole: its factors are those of other layers, too,
            and a change of shape for one might raise the drift of another.

    Raises:
        InputError: If neither factor may be changed, or the drift cannot be lowered.
    """
    matrix: Any = layer.matrix  # adapted: a holder has no others
    (before,) = measure([layer])
    if before <= limit:  # lowered already, with a layer of the same factors
        return
    if not any(changeable):
        raise InputError(
            f"{matrix.name}: expected a factor that is trained and its own, got two that are "
            f"frozen or shared with other layers, and a drift {before / limit:.3g} times its "
            "limit; train one of them, or leave the layer out with exclude="
        )
    B, A = (x.double().clone() for x in matrix.factors)
    directions = _Directions(B, A, layer, before)
    margin, excess = MARGIN, before / limit - 1
    for _ in range(PASSES if before <= FARTHEST * limit else 0):
        part = max(0.0, limit * (1 - margin)) / before
        matrix.write(*directions.lowered(part, changeable, scale=scale))
        (now,) = measure([layer])
        if now <= limit:
            return
        excess = now / limit - 1
        margin = MARGIN_GROWTH * (margin + excess)
    raise InputError(
        f"{matrix.name}: expected a drift that can be lowered to its limit, got one "
        f"{before / limit:.3g} times as large; training has diverged: lower the learning rate, or "
        "go back to a checkpoint"
    )


class _Directions:
    """The directions in which ``S = A Aᵀ`` and ``G = A C Aᵀ`` are both diagonal.

    ``S = T Tᵀ`` and ``G = T diag(g) Tᵀ``, so that ``S (S + λG)⁻¹ = T diag(1/(1 + λg)) T⁺``.

    Args:
        B: The left factor, shape ``(m, r)``, float64.
        A: The right factor, shape ``(r, n)``, float64.
        layer: The layer, for the product with C.
        drift: Its present drift.
    """

    def __init__(self, B: Tensor, A: Tensor, layer: LayerDrift, drift: float) -> None:
        self.B, self.A = B, A
        matrix: Any = layer.matrix
        AC = layer.moment.times(A.to(matrix.dtype)).double()
        values, vectors = torch.linalg.eigh(A @ A.mT)
        counted = values > RANK_TOLERANCE * values[-1]
        root = vectors[:, counted] * values[counted].sqrt()
        inverse = vectors[:, counted] / values[counted].sqrt()
        small = inverse.mT @ (AC @ A.mT) @ inverse
        g, Q = torch.linalg.eigh((small + small.mT) / 2)
        self.T, self.T_inverse = root @ Q, (inverse @ Q).mT
        self.g = g.clamp_min(0)
        # the drift of each direction, as shares of the whole
        self.shares = (B @ self.T).square().sum(dim=0) * self.g
        self.shares = self.shares / self.shares.sum()
        self.drift = drift

    def lowered(self, part: float, changeable: Changeable, *, scale: bool) -> tuple[Tensor, Tensor]:
        """The factors with a part of the drift; each takes half of the change if both may.

        Args:
            part: The drift that is to be left, over the present one.
            changeable: Whether B and A may be changed.
            scale: Whether all directions shrink alike.

        Returns:
            B and A.
        """
        if scale or part == 0:
            weight = torch.full_like(self.g, part**0.5)
        else:
            weight = 1 / (1 + _multiplier(self.g, self.shares, part) * self.g)
        power = 0.5 if all(changeable) else 1.0
        small = self.T * (weight**power - 1) @ self.T_inverse
        B = self.B + self.B @ small if changeable[0] else self.B
        A = self.A + small @ self.A if changeable[1] else self.A
        return B, A


def _multiplier(g: Tensor, shares: Tensor, part: float) -> Tensor:
    """λ with ``Σ sharesᵢ/(1 + λ gᵢ)² = part``.

    Newton's method on the inverse root of the sum, which is increasing and concave in λ: from 0
    it rises to the solution and never passes it.

    Args:
        g: The drift of each direction for its size, shape ``(r,)``.
        shares: The drift of each as a share of the whole.
        part: The drift that is to be left, as a share.

    Returns:
        λ.
    """
    scaled = g / g.max()
    found = torch.zeros((), dtype=g.dtype, device=g.device)
    for _ in range(NEWTON_STEPS):
        left = 1 / (1 + found * scaled)
        total = (shares * left**2).sum()
        slope = (shares * left**3 * scaled).sum() * total**-1.5
        step = (part**-0.5 - total**-0.5) / slope
        found = found + step
        if float(step) <= 1e-15 * float(found):
            break
    return found / g.max()
