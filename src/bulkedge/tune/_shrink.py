"""An update brought back to a limit of drift by the smallest change of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._precision import exact

from ._clip_spikes import FARTHEST, MARGIN_GROWTH, PASSES, Changeable
from ._core_svd import RANK_TOLERANCE
from ._drift import LayerDrift, measure, precise

MARGIN = 1e-6
"""Drift is lowered to this fraction below its limit: the rounding of products in float32."""
NEWTON_STEPS = 60
"""How many steps find λ at most; about six do."""


@dataclass(frozen=True)
class Target:
    """A layer whose drift exceeds the limit.

    Attributes:
        layer: The layer.
        drift: Its drift.
        changeable: Whether B and A may be changed.
        scale: Whether the update is scaled as a whole: its factors are those of other layers, too,
            and a change of shape for one might raise the drift of another.
    """

    layer: LayerDrift
    drift: float
    changeable: Changeable
    scale: bool


def lower(targets: Sequence[Target], limit: float) -> None:
    """Write the nearest factors whose drift is at the limit, measured after they are rounded.

    Args:
        targets: Layers of which no two share both factors.
        limit: The limit.

    Raises:
        InputError: If neither factor of one may be changed, or its drift cannot be lowered.
    """
    for target in targets:
        _require_possible(target, limit)
    with precise([target.layer for target in targets]):
        directions = [_Directions(target) for target in targets]
    margins, left = [MARGIN] * len(targets), list(range(len(targets)))
    for _ in range(PASSES):
        for i in left:
            aim = max(0.0, limit * (1 - margins[i]))
            matrix: Any = targets[i].layer.matrix  # adapted: a holder has no others
            matrix.write(*directions[i].lowered(aim))
        now = dict(zip(left, measure([targets[i].layer for i in left]), strict=True))
        left = [i for i in left if now[i] > limit]
        if not left:
            return
        for i in left:
            margins[i] = MARGIN_GROWTH * (margins[i] + now[i] / limit - 1)
    problem = _diverged(targets[left[0]], limit)
    raise problem


def _require_possible(target: Target, limit: float) -> None:
    """InputError unless a factor may be changed, and is still a number after it was."""
    if not any(target.changeable):
        raise InputError(
            f"{target.layer.matrix.name}: expected a factor that is trained and its own, got two "
            f"that are frozen or shared with other layers, and a drift {target.drift / limit:.3g} "
            "times its limit; train one of them, or leave the layer out with exclude="
        )
    if not target.drift <= FARTHEST * limit:
        raise _diverged(target, limit)


def _diverged(target: Target, limit: float) -> InputError:
    """The error for factors that cannot be brought back to the limit."""
    return InputError(
        f"{target.layer.matrix.name}: expected a drift that can be lowered to its limit, got one "
        f"{target.drift / limit:.3g} times as large; training has diverged: lower the learning "
        "rate, or go back to a checkpoint"
    )


class _Directions:
    """The directions in which ``S = A Aᵀ`` and ``G = A C Aᵀ`` are both diagonal.

    ``S = T Tᵀ`` and ``G = T diag(g) Tᵀ``, so that ``S (S + λG)⁻¹ = T diag(1/(1 + λg)) T⁺``.

    Args:
        target: The layer, with its present factors.
    """

    def __init__(self, target: Target) -> None:
        matrix: Any = target.layer.matrix
        stored = matrix.factors
        B, A = (exact(x).clone() for x in stored)
        self.B, self.A, self.target = B, A, target
        AC = exact(target.layer.moment.times(stored[1].to(matrix.dtype)))
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

    def lowered(self, aim: float) -> tuple[Tensor, Tensor]:
        """The factors with a lower drift; each takes half of the change if both may be changed.

        Args:
            aim: The drift.

        Returns:
            B and A.
        """
        part, changeable = aim / self.target.drift, self.target.changeable
        if self.target.scale or part == 0:
            weight = torch.full_like(self.g, part**0.5)
        else:
            weight = 1 / (1 + _multiplier(self.g, self.shares, part) * self.g)
        power = 0.5 if all(changeable) else 1.0
        small = self.T * (weight**power - 1) @ self.T_inverse
        B = self.B + self.B @ small if changeable[0] else self.B
        A = self.A + small @ self.A if changeable[1] else self.A
        return B, A


def _multiplier(g: Tensor, shares: Tensor, part: float) -> float:
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
    largest = float(g.max())
    pairs = list(zip((g / largest).tolist(), shares.tolist(), strict=True))  # a few plain numbers
    found = 0.0
    for _ in range(NEWTON_STEPS):
        total = sum(share / (1 + found * x) ** 2 for x, share in pairs)
        slope = sum(share * x / (1 + found * x) ** 3 for x, share in pairs) * total**-1.5
        step = (part**-0.5 - total**-0.5) / slope
        found += step
        if step <= 1e-15 * found:
            break
    return found / largest
