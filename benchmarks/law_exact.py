"""The exact scores of ``W0 + s ΔW`` for many s, and the first s at which one is below ε.

An oracle of its own: LAPACK's eigenproblem of ``WWᵀ``, or of ``WᵀW`` where that is smaller, in the
basis of a float64 SVD of W0, for the leading vectors alone.  Nothing of the library is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
from scipy.linalg import eigh
from torch import Tensor

STEP = 1.05
"""Neighbouring scales of the grid."""
LOWEST, HIGHEST = 0.25, 8.0
"""Its ends, in units of ``σ_k(W0)/‖ΔW‖₂``."""


def lowest_score(
    base: tuple[Tensor, Tensor, Tensor], P: Tensor, Q: Tensor, k: int
) -> Callable[[float], float]:
    """The function of s: the lowest score of the k leading left vectors of ``W0 + s P Qᵀ``.

    Args:
        base: U, σ, V of a thin SVD of W0.
        P: Shape ``(m, r)``.
        Q: Shape ``(n, r)``.
        k: How many.
    """
    U, S, V = base
    u, v = U.mT @ P, V.mT @ Q
    tall = len(U) > len(S)
    own, other, gram = (v, u, P.mT @ P) if tall else (u, v, Q.mT @ Q)
    cross = (S[:, None] * other) @ own.mT
    terms = [x.numpy() for x in (S.square().diag(), cross + cross.mT, own @ gram @ own.mT)]
    sigma, u_, v_ = S.numpy()[:, None], u.numpy(), v.numpy()
    wanted = [len(S) - k, len(S) - 1]

    def score(s: float) -> float:
        matrix = terms[0] + s * terms[1] + s * s * terms[2]
        squares, X = eigh(matrix, subset_by_index=wanted, driver="evr", overwrite_a=True)
        if tall:  # from right vectors to left ones
            X = (sigma * X + s * u_ @ (v_.T @ X)) / numpy.sqrt(squares)
        return float(numpy.abs(X).max(axis=0).min())

    return score


def first_new(score: Callable[[float], float], unit: float, epsilon: float) -> float | None:
    """The first scale of the grid with a score below ε, less half a step; None without one.

    Args:
        score: As a function of the scale.
        unit: ``σ_k(W0)/‖ΔW‖₂``.
        epsilon: ε.
    """
    for number in range(int(math.log(HIGHEST / LOWEST) / math.log(STEP)) + 1):
        scale = unit * LOWEST * STEP**number
        if score(scale) < epsilon:
            return scale / math.sqrt(STEP)
    return None
