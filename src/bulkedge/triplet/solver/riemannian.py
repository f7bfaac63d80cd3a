"""Riemannian trust-region Newton: maximise ``uᵀAv`` over the product of the unit spheres.

In the tangent space, ``p ⊥ u`` and ``q ⊥ v``, uᵀAv has the gradient ``g = (Av − σu, Aᵀu − σv)``,
σ = uᵀAv, and the negative Hessian

    H (p, q) = (σp − P_u A q, σq − P_v Aᵀ p),        P_u = I − uuᵀ, P_v = I − vvᵀ.

At the triplet k its eigenvalues are ``σ_k ± σ_i``, i ≠ k, and σ_k: positive at the top triplet,
of smallest eigenvalue ``σ₁ − σ₂``, and a saddle at every other.  The quadratic model
``⟨g, η⟩ − ½⟨η, Hη⟩`` is maximised in a ball by conjugate gradients, truncated where they leave the
ball or meet a direction of negative curvature (Steihaug).  The step is taken on the spheres, and
the ball grows and shrinks with the agreement of model and function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bulkedge._fields import TOLERANCE, check_fields, optional, whole
from bulkedge._linmap import LinearMap
from bulkedge.triplet._result import SingularTriplets

from ._deflation import (
    Found,
    Goal,
    Starts,
    VectorPair,
    by_deflation,
    normalised_pair,
    pair_of_right,
    relative_tolerance,
)
from ._start import Randomness, start_block


@dataclass(frozen=True)
class Riemannian:
    """Riemannian trust-region Newton method with truncated conjugate gradients; matrix-free.

    It finds the top triplet from anywhere: every other is a saddle, which it leaves along a
    direction of negative curvature.  At a saddle itself there is no direction to begin with.  So a
    start that is given is tilted at random, by rtol^¼, a part of 1/√n of it towards the top.  That
    costs a good guess a Newton step or two.  It shows every saddle, except those less than about
    ``√n rtol^¾ σ₁`` from σ₁.  The value below the k-th is not seen, so the last of ``gaps`` is 0.

    Cost: two passes over A for each product with the Hessian, of which a triplet takes about
    ``√(2σ₁ / (σ₁ − σ₂))`` for each digit; two for each step, two for each triplet, and two.

    Source: Absil, Baker, Gallivan, Found. Comput. Math. 7 (2007), doi:10.1007/s10208-005-0179-9;
    truncation, Steihaug, SIAM J. Numer. Anal. 20 (1983), doi:10.1137/0720042.

    Attributes:
        rtol: Stop when every residual is below ``rtol · σ₁``; None takes eps^¾ of the dtype
            (1.8e-12 in float64, 6.4e-6 in float32).
        max_steps: Newton steps for each triplet before giving up.

    Example:
        >>> from bulkedge.triplet import singular_triplet
        >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        >>> round(singular_triplet(A, solver=Riemannian()).sigma.item(), 12)
        3.0
    """

    rtol: float | None = None
    max_steps: int = 200

    def __post_init__(self) -> None:
        check_fields(self, rtol=optional(TOLERANCE), max_steps=whole(1))

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The k leading triplets of A, m ≥ n, from ``start``, tilted, or a Gaussian block."""
        rtol = relative_tolerance(self.rtol, A.dtype)
        v = start_block(A, k, start, generator)
        if start is not None:
            v = v + rtol**0.25 * start_block(A, k, None, generator)
        return by_deflation(A, Starts(v), self._search, rtol)

    def _search(self, A: LinearMap, v: Tensor, goal: Goal) -> Found:
        current, radius = pair_of_right(A, v), 1.0
        steps, passes = 0, 2
        while not goal.reached(current) and steps < self.max_steps:
            move = _steihaug(
                partial(_hessian, A, current), current, radius, 0.1 * goal.tolerance(current)
            )
            m = A.shape[0]
            trial = normalised_pair(A, current.u + move.eta[:m], current.v + move.eta[m:])
            steps, passes = steps + 1, passes + 2 * move.products + 2
            agreement = _agreement(trial.sigma - current.sigma, move.gain, current.sigma)
            if agreement < 0.25:
                radius = 0.25 * float(torch.linalg.vector_norm(move.eta))
            elif agreement > 0.75 and move.cut:
                radius = min(2 * radius, 4.0)
            current = trial if agreement > 0.1 else current
        return Found(current, steps, passes)


class _Move(NamedTuple):
    """A tangent vector ``(p; q)`` and how it was found.

    Attributes:
        eta: The vector.
        gain: What the quadratic model gains by it.
        products: Products with the Hessian that it took.
        cut: Whether the trust region ended it.
    """

    eta: Tensor
    gain: Tensor
    products: int
    cut: bool


def _hessian(A: LinearMap, at: VectorPair, eta: Tensor) -> Tensor:
    """H times a tangent vector; two passes."""
    p, q = eta[: len(at.u)], eta[len(at.u) :]
    Aq, Atp = A.matmat(q), A.rmatmat(p)
    return at.sigma * eta - torch.cat([Aq - at.u * (at.u.mT @ Aq), Atp - at.v * (at.v.mT @ Atp)])


def _steihaug(
    hessian: Callable[[Tensor], Tensor], at: VectorPair, radius: float, target: Tensor
) -> _Move:
    """Maximise ``⟨g, η⟩ − ½⟨η, Hη⟩`` over ``‖η‖ ≤ radius``, as exactly as is of use."""
    g = torch.cat([at.Av - at.sigma * at.u, at.Atu - at.sigma * at.v])
    # The residual of the linear system has to shrink as Newton's error does, quadratically.
    norm = torch.linalg.vector_norm(g)
    target = torch.maximum(norm * (norm / at.sigma).clamp_max(0.1), target)
    eta, r, d = torch.zeros_like(g), g, g
    products = 0
    while True:
        Hd = hessian(d)
        products += 1
        curvature = (d * Hd).sum()
        squares = r.square().sum()
        ahead = eta + squares / curvature * d
        cut = bool((curvature <= 0) | (torch.linalg.vector_norm(ahead) >= radius))
        length = _to_boundary(eta, d, radius) if cut else squares / curvature
        eta, r = eta + length * d, r - length * Hd
        if cut or products == len(g) or bool(torch.linalg.vector_norm(r) <= target):
            gain = 0.5 * (eta * (g + r)).sum()  # r = g − Hη
            return _Move(eta, gain, products, cut)
        d = r + r.square().sum() / squares * d


def _to_boundary(eta: Tensor, d: Tensor, radius: float) -> Tensor:
    """The τ > 0 with ``‖η + τd‖ = radius``."""
    a, b, c = d.square().sum(), (eta * d).sum(), eta.square().sum() - radius**2
    return (-b + (b * b - a * c).sqrt()) / a


def _agreement(actual: Tensor, promised: Tensor, sigma: Tensor) -> float:
    """Actual over promised gain; 1 where both are below the rounding error of σ."""
    noise = 1e3 * torch.finfo(sigma.dtype).eps * sigma
    return float((actual + noise) / (promised + noise))
