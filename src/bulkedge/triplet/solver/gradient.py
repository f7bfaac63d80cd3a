"""Gradient ascent on the spheres: the iteration ``x ← x − η f(x)``, made to stay where f is right.

``f(σ, u, v) = (σ − uᵀAv; σ²u − σAv; σ²v − σAᵀu)`` vanishes at the singular triplets.  Its first
equation is solved by ``σ = uᵀAv``, in every step.  On the spheres the other two are then −σ times
the gradient of uᵀAv, so that ``η = step/σ²`` gives, before u and v are brought back to unit length,

    u ← (1 − step) u + (step/σ) Av,        v ← (1 − step) v + (step/σ) Aᵀu.

Near a triplet this is the power iteration on ``(1 − step) I + (step/σ) [[0, A], [Aᵀ, 0]]``, with
the eigenvalues ``1 − step ± step σ_i/σ``.  The largest belongs to σ₁: no other triplet is stable,
and the error shrinks by ``1 − step (1 − σ₂/σ₁)``.  For ``step < ½`` all of them are positive at the
top, so that uᵀAv is maximised as a convex function is, without oscillation; and with σ left free f
has the Jacobian eigenvalues ``(1 ± √(1 − 8σ²))/2``, which are stable below ``η = 1/(2σ²)`` only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bulkedge._fields import TOLERANCE, check_fields, number, optional, whole
from bulkedge._linmap import LinearMap
from bulkedge.triplet._result import SingularTriplets

from ._deflation import (
    Found,
    Goal,
    Starts,
    VectorPair,
    by_deflation,
    iterate,
    normalised_pair,
    relative_tolerance,
)
from ._start import Randomness, start_block


@dataclass(frozen=True)
class GradientAscent:
    """Gradient ascent of ``uᵀAv`` on the two unit spheres, with a fixed step; deflation for k > 1.

    It takes about ``28 / (step (1 − σ₂/σ₁))`` steps to 1e-12 for each triplet, four times as many
    as the power iteration on one vector: a reference, not a tool.  A start that is a singular
    vector stays there, be it the top one or not.  The value below the k-th is not seen, so the last
    of ``gaps`` is 0.

    Cost: two passes over A a step, each with one vector; two more for each triplet, and two.

    Source: the gradient method for a convex function on a sphere, Journée, Nesterov, Richtárik,
    Sepulchre, JMLR 11 (2010), arXiv:0811.4724.

    Attributes:
        rtol: Stop when every residual is below ``rtol · σ₁``; None takes eps^¾ of the dtype
            (1.8e-12 in float64, 6.4e-6 in float32).
        max_steps: Steps for each triplet before giving up.
        step: The step in units of 1/σ², between 0 and ½.

    Raises:
        InputError: If ``step`` is not between 0 and ½.

    Example:
        >>> import torch
        >>> from bulkedge.triplet import singular_triplet
        >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        >>> round(singular_triplet(A, solver=GradientAscent()).sigma.item(), 12)
        3.0
    """

    rtol: float | None = None
    max_steps: int = 10_000
    step: float = 0.45

    def __post_init__(self) -> None:
        step = number("between 0 and 0.5 (times 1/σ²), the ends excluded", lambda x: 0 < x < 0.5)
        check_fields(self, rtol=optional(TOLERANCE), max_steps=whole(1), step=step)

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The k leading triplets of A, m ≥ n, from ``start`` completed by a Gaussian block."""
        starts = Starts(start_block(A, k, start, generator))
        return by_deflation(A, starts, self._search, relative_tolerance(self.rtol, A.dtype))

    def _search(self, A: LinearMap, v: Tensor, goal: Goal) -> Found:
        return iterate(A, v, self._ascend, goal, self.max_steps)

    def _ascend(self, A: LinearMap, at: VectorPair) -> VectorPair:
        # σ > 0 throughout: u begins as Av, so the coordinates of u and v in the singular vectors
        # have equal signs, each pair of them; a step adds to either a positive multiple of the
        # other, so they keep it; and σ = Σ σ_i u_i v_i
        keep, gain = 1 - self.step, self.step / at.sigma
        return normalised_pair(A, keep * at.u + gain * at.Av, keep * at.v + gain * at.Atu)
