"""The hard edge of real noise: ``det(I − T)``, T of kernel ``(√s/2) J_a(√(s x y))`` on (0, 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._arc import gauss_legendre


def hard_edge_survival(gap: int, s: Tensor) -> Tensor:
    """Chance that the smallest eigenvalue of real noise, in hard-edge units, exceeds s.

    With ``a = |m − n|``, for eigenvalues λ of WWᵀ and ``s = 2(m + n)λ/τ²``.  For a = 0 it is
    ``exp(−s/8 − √s/2)``.  Cost: a determinant of some 40 rows for each.

    Args:
        gap: a.
        s: Positive numbers, shape ``(q,)``.

    Returns:
        Shape ``(q,)``; of absolute accuracy.

    References:
        Edelman, SIAM J. Matrix Anal. Appl. 9 (1988), for a = 0; Forrester, Nonlinearity 19 (2006),
        arXiv:math-ph/0605022, for the determinant; Bornemann, arXiv:0904.1581, for its quadrature.
    """
    return torch.stack([_determinant(gap, float(x)) for x in s]) if len(s) else s


def _determinant(gap: int, s: float) -> Tensor:
    if s <= 0:
        return torch.ones((), dtype=torch.float64)
    root = math.sqrt(s)
    if root > 3 * gap + 80:  # e^−(√s − a)²/8 and less
        return torch.zeros((), dtype=torch.float64)
    # x = ξ² makes the kernel smooth at 0
    nodes, weights = (torch.from_numpy(array) for array in gauss_legendre(24 + int(root / 2)))
    half = (weights * 2 * nodes).sqrt()
    kernel = root / 2 * bessel(gap, root * nodes[:, None] * nodes)
    return torch.linalg.det(
        torch.eye(len(nodes), dtype=torch.float64) - half[:, None] * kernel * half
    )


def bessel(order: int, x: Tensor) -> Tensor:
    """``J_a(x)`` for whole a ≥ 0, by the trapezoidal rule on ``cos(aθ − x sin θ)``.

    Args:
        order: a.
        x: Any shape.

    Returns:
        The shape of x, to rounding.
    """
    count = int(float(x.abs().max())) + order + 40  # what is aliased is J of this order
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    return torch.cos(order * angle - x[..., None] * angle.sin()).mean(-1)
