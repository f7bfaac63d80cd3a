"""The strength at which a whole fine-tune has the drift that is asked for.

With ``C_t = L Lᵀ`` and ``L⁻¹ C_b L⁻ᵀ = Q diag(μ) Qᵀ``, the matrix ``R = L Q`` makes both moments
diagonal, ``C_t = R Rᵀ`` and ``C_b = R diag(μ) Rᵀ``, and for every λ at once

    D'(λ) = ΔW R diag(1/(1 + λ μ)) R⁻¹.

So the drift of a layer at all strengths of a grid costs one decomposition, and few numbers keep it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import LowRank
from bulkedge._precision import exact

from .solve import NOT_POSITIVE, Scaled, moved, solver

OCTAVES = 30
"""The strengths of the grid lie between 2⁻³⁰ and 2³⁰, a factor of two apart: between them the
drift is interpolated by cubics in logarithms, to about one part in a thousand."""
GRID = [2.0**i for i in range(-OCTAVES, OCTAVES + 1)]
ROUNDING = 1e-12
"""A drift below this part of that of the fine-tune is zero, but for rounding."""
STEPS = 60
"""Halvings of the interval of log λ."""


@dataclass(frozen=True)
class Basis:
    """The basis in which both moments are diagonal.

    Attributes:
        R: Shape ``(n, n)``, with ``C_t = R Rᵀ``.
        inverse: R⁻¹.
        mu: ``C_b = R diag(μ) Rᵀ``, shape ``(n,)``, not negative.
        ridge: Of ``C_b``.

    Example:
        >>> basis = Basis.of(Scaled.of(torch.eye(2)), Scaled.of(torch.eye(2)))
        >>> basis.mu.tolist()
        [1.0, 1.0]
    """

    R: Tensor
    inverse: Tensor
    mu: Tensor
    ridge: float

    @classmethod
    def of(cls, base: Scaled, task: Scaled) -> Basis:
        """Decompose a pair; about 15 n³ in float64.

        Args:
            base: ``C_b``.
            task: ``C_t``.

        Returns:
            The basis.

        Raises:
            InputError: If a moment is not positive.
        """
        L, failed = torch.linalg.cholesky_ex(task.dense())
        if int(failed):
            raise InputError(NOT_POSITIVE)
        half = torch.linalg.solve_triangular(L, base.dense(), upper=False)
        middle = torch.linalg.solve_triangular(L, half.mT, upper=False)
        mu, Q = torch.linalg.eigh((middle + middle.mT) / 2)
        if not float(mu[0]) > 0:
            raise InputError(NOT_POSITIVE)
        return cls(L @ Q, torch.linalg.solve_triangular(L.mT, Q, upper=True).mT, mu, base.ridge)

    def times(self, A: Tensor, strength: float) -> Tensor:
        """``A T`` at one strength; see :func:`protected`."""
        return (exact(A) @ self.R / (1 + strength * self.mu)) @ self.inverse

    def moved(self, update: Tensor | LowRank, strengths: Sequence[float]) -> Tensor:
        """``tr(D' C D'ᵀ)`` at many strengths, C the moment of the base without its ridge.

        Args:
            update: ΔW.
            strengths: λ's.

        Returns:
            One number for each, float64, in units of the scaled moment.
        """
        if isinstance(update, LowRank):
            X = update.scale * (torch.linalg.qr(update.B, mode="r").R @ (update.A @ self.R))
        else:
            X = exact(update) @ self.R
        # D' = Σ g_i (column i of X) (row i of R⁻¹): a quadratic form in the g's
        H = (X.mT @ X) * (torch.diag(self.mu) - self.ridge * self.inverse @ self.inverse.mT)
        g = 1 / (1 + torch.tensor(strengths, dtype=H.dtype, device=H.device)[:, None] * self.mu)
        return ((g @ H) * g).sum(dim=1)


def response(base: Scaled, task: Scaled) -> Basis | None:
    """What gives drifts at many strengths: a basis; None for sketches, which have none in common.

    Args:
        base: ``C_b``.
        task: ``C_t``.

    Returns:
        The basis.
    """
    return None if base.thin and task.thin else Basis.of(base, task)


def curve(
    update: Tensor | LowRank, base: Scaled, task: Scaled, basis: Basis | None, output: float
) -> Tensor:
    """The drift of a protected layer at the strengths of :data:`GRID`.

    Args:
        update: ΔW.
        base: ``C_b``.
        task: ``C_t``.
        basis: From :func:`response`.
        output: ``tr(W0 C_b W0ᵀ)``.

    Returns:
        Shape ``(61,)``.
    """
    if basis is not None:
        return (basis.moved(update, GRID) * base.mean / output).cpu()
    found = []
    for strength in GRID:
        solve = solver(base, task, strength)
        if isinstance(update, LowRank):
            now = LowRank(update.B, solve(update.A), update.scale)
        else:
            now = solve(exact(update))
        found.append(moved(now, base.moment) / output)
    return torch.tensor(found, dtype=torch.float64)


def strength_for(
    target: float, curves: Sequence[Tensor], before: Sequence[float], factors: Sequence[float]
) -> float:
    """The strength at which layers have a mean drift.

    Args:
        target: The mean.
        curves: Of each layer, from :func:`curve`.
        before: The drift of each layer as it is.
        factors: What the strength is multiplied with in each layer.

    Returns:
        λ.

    Raises:
        InputError: If no strength gives this drift.

    Example:
        >>> falling = torch.tensor([1 / (1 + x) ** 2 for x in GRID], dtype=torch.float64)
        >>> round(strength_for(0.25, [falling], [1.0], [2.0]), 3)
        0.5
    """
    logs = torch.stack(list(curves))
    highest, lowest = sum(before) / len(before), float(logs[:, -1].mean())
    if not lowest < target < highest:
        least = lowest if lowest > ROUNDING * highest else 0.0
        raise InputError(
            f"expected a target drift between {least:.3g} and {highest:.3g}, the mean "
            f"drift of the fine-tune, got {target:g}; choose one between them"
        )
    logs = logs.clamp_min(torch.finfo(logs.dtype).tiny).log()
    more = torch.tensor(factors, dtype=logs.dtype).log2()
    # far enough that every layer, at its multiple of λ, is at the end of the grid
    low, high = -OCTAVES - float(more.max()), OCTAVES - float(more.min())
    for _ in range(STEPS):
        middle = (low + high) / 2
        if float(_between(logs, middle + more).exp().mean()) > target:
            low = middle
        else:
            high = middle
    return 2.0 ** ((low + high) / 2)


def _between(logs: Tensor, octaves: Tensor) -> Tensor:
    """Each row at a strength of ``2^octave``: the cubic through the four nearest points."""
    # Below the grid, where nothing is protected, it is level; above, where every part of the drift
    # falls with the square of λ, it goes on as steep as it ends.
    wanted = octaves + OCTAVES
    place = wanted.clamp(0, len(GRID) - 1)
    beyond = (wanted - place).clamp_min(0) * (logs[:, -1] - logs[:, -2]).clamp_max(0)
    first = (place.floor().long() - 1).clamp(0, len(GRID) - 4)
    x, points = place - first, range(4)
    weights = [math.prod((x - j) / (i - j) for j in points if j != i) for i in points]
    near = [logs.gather(1, (first + i)[:, None])[:, 0] for i in points]
    return sum((w * y for w, y in zip(weights, near, strict=True)), beyond)
