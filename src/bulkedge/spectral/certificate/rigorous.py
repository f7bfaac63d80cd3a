"""A proof that ‖A‖₂ ≤ b, by a Cholesky factorisation that is checked.

W is A or Aᵀ, whichever is upright: q×p with q ≥ p, G = WᵀW is p×p, σ₁ = ‖A‖₂.

For any real matrix R and any number s, put ``E = sI − G − RRᵀ``.  Then ``sI − G + ‖E‖I ≥ RRᵀ ≥ 0``
in the semidefinite order, so

    σ₁² ≤ s + ‖E‖₂.                                                                       (1)

R is the computed Cholesky factor of sI − G, but (1) holds whatever R is: nothing is assumed of the
factorisation, which in an optimised library is blocked, inverts diagonal blocks, and is in no
textbook's order.  (Rump's criterion, BIT 46 (2006), doi:10.1007/s10543-006-0056-1, bounds E from
the analysis of the textbook algorithm; measuring E costs p³/3 more operations and assumes less.)
A factorisation that breaks down proves nothing, and a larger s is tried.

What is left is to bound ‖E‖₂ from computed numbers.  Write u = 2⁻⁵³, γ_k = ku/(1 − ku), hats for
what was computed, F = ‖W‖_F.  Assumed: IEEE float64, rounding to nearest, and matrix products and
sums of squares evaluated as sums of products, in any order, with fused multiply-add or without
(no Strassen-like product).  A sum of k products then errs by γ_k·Σ|products| at most (Higham,
"Accuracy and Stability of Numerical Algorithms", 2nd ed., §3.1).  Therefore

    G:    |Ĝ − WᵀW| ≤ γ_q |Wᵀ||W|,  in norm ≤ γ_q F², because ‖ |Wᵀ||W| ‖₂ ≤ ‖W‖_F²
    M:    M̂ = fl(sI − Ĝ): only the diagonal is rounded, each entry once; s ≥ 0 and
          0 ≤ ĝ_ii ≤ 2F², so the error is diagonal and ≤ u(s + 2F²)
    H:    Ĥ = fl(RRᵀ): in norm ≤ γ_p ‖R‖_F², as for G
    D:    D̂ = fl(M̂ − Ĥ): |D − D̂| ≤ u|D̂| in each entry, hence ‖D‖₂ ≤ (1 + u)‖D̂‖_F

    ‖E‖₂ ≤ (1 + u)‖D̂‖_F + γ_{p+2} ‖R‖_F² + γ_{q+2} F² + u(s + 2F²).                        (2)

G and D are symmetric: their lower halves are computed, and stand for the upper ones.

*Frobenius norms* are computed too, from N squares by one sum and one root:  the true norm is at
most (computed)/(1 − γ_{N+2}).

*Scalars* in (1) and (2) are exact rational numbers, rounded once, upwards; so are square roots.

*Underflow.*  W is first scaled by a power of two so that its largest entry is in [½, 1): no
overflow anywhere, and F² ≥ ¼.  An operation that underflows (gradually or to zero), or a tiny
entry lost in the scaling, errs by 2⁻¹⁰²¹ at most, ‖·‖_F of a matrix whose squares underflow by
p·2⁻⁵¹⁰.  All such errors together stay far below 2uF² ≥ 2⁻⁵⁴, which is what the index q + 2 in
place of q adds to (2).

The lower end of the interval is ‖Wx‖/‖x‖ for a computed x, less the rounding γ_{p+2}F of Wx.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from bulkedge._fields import TOLERANCE, check_fields
from bulkedge._guard import finite
from bulkedge._linmap import LinearMap

from ._bound import NormBound, check, unscale
from ._chain import leading_vector

_BLOCK = 256
"""Columns a step: enough for fast products, few compared with a large matrix."""
_UNIT = Fraction(1, 2**53)
"""The unit roundoff u of float64."""


@dataclass(frozen=True)
class Rigorous:
    """A proof that ‖A‖₂ ≤ upper: ``b²I − AAᵀ``, on the smaller side, has a Cholesky factor.

    b is a lower bound of ‖A‖₂ times 1 + δ, δ = ``rtol`` first and ten times more after each
    factorisation that breaks down.  The result is proved for every guess; a good one saves
    factorisations.  All errors of rounding are accounted for, see the module; they add about
    ``max(m, n)·2⁻⁵³·(‖A‖_F/‖A‖₂)²`` to the relative width.

    What is proved is proved of the float64 matrix ``A.to(torch.float64).to_dense()``.  That is A
    itself for :class:`~bulkedge.triplet.Dense` of any dtype and for convolutions on the CPU; where
    it is computed (``LowRank``, ``Sum``, ``Scaled``), its own rounding is not included.

    Cost: with p = min(m, n), m·n·p operations for AAᵀ and, for each δ tried, p³/3 for the factor
    and p³/3 for the check of it; without a guess 50 to 120 passes before.  Memory:
    ``8·(mn + 3p²)`` bytes.

    Attributes:
        rtol: The first δ.

    Example:
        >>> from bulkedge.triplet import Dense
        >>> found = Rigorous().bound(Dense(torch.diag(torch.tensor([3.0, 2.0]))))
        >>> found.lower <= 3 <= found.upper, found.upper < 3 * (1 + 2e-9), found.failure
        (True, True, 0.0)
    """

    rtol: float = 1e-9

    def __post_init__(self) -> None:
        check_fields(self, rtol=TOLERANCE)

    def bound(
        self, A: LinearMap, v: Tensor | None = None, generator: torch.Generator | None = None
    ) -> NormBound:
        """The interval.

        Args:
            A: The map, any floating dtype.
            v: A guess of the leading right singular vector, shape ``(n,)``; None makes one.
            generator: Source of the start of the search for a guess; None takes a fixed seed.

        Returns:
            The interval, with ``failure`` 0.

        Raises:
            InputError: If A is empty or not finite.
        """
        with torch.no_grad():
            check(A, v)
            matrix, exponent = _dense_near_one(A)
            if exponent is None:
                return NormBound(0.0, 0.0, 0.0, 1)
            wide = A.shape[0] < A.shape[1]
            W = matrix.mT if wide else matrix  # q×p, q ≥ p
            x = None
            if v is not None:
                x = v.to(W).reshape(-1)
                x = x / x.abs().max().clamp_min(1e-300)  # lest the product overflow
                x = matrix @ x if wide else x
            lower, upper, passes = self._search(W, x, generator)
            passes += 0 if x is None else 1 + wide
        ends = unscale(lower, exponent, 0.0), unscale(upper, exponent, math.inf)
        return NormBound(*ends, failure=0.0, passes=passes)

    def _search(
        self, W: Tensor, x: Tensor | None, generator: torch.Generator | None
    ) -> tuple[float, float, int]:
        """Both ends and the passes, for W of shape (q, p), from a guess of shape (p,)."""
        frobenius = _norm_above(W)
        lower = 0.0 if x is None else _rayleigh_below(W, x, frobenius)
        G = _lower_gram(W)
        passes, delta, searched = 1, self.rtol, False
        while True:
            b = lower * (1 + delta)
            if b >= frobenius or (searched and lower == 0):
                return lower, frobenius, passes
            square = _proven_square(G, b * b, frobenius, terms=W.shape[0]) if lower > 0 else None
            if square is not None:
                return lower, min(_root_above(square), frobenius), passes
            if searched:
                delta *= 10
            else:  # the guess was none or a poor one
                x, spent = leading_vector(W, self.rtol, generator)
                lower = max(lower, _rayleigh_below(W, x, frobenius))
                passes, searched = passes + spent + 1, True


def _dense_near_one(A: LinearMap) -> tuple[Tensor, int | None]:
    """A·2⁻ᵉ in float64 with the largest entry in [½, 1), and e."""
    wide = A.to(torch.float64)  # float64 holds every narrower dtype exactly
    matrix = finite(repr(A), wide.to_dense())
    lowest, highest = (float(end) for end in matrix.aminmax())
    largest = max(-lowest, highest)
    exponent = math.frexp(largest)[1]
    if not largest:
        return matrix, None
    half = exponent // 2  # in two steps: 2⁻ᵉ itself may overflow
    return matrix * 2.0**-half * 2.0 ** (half - exponent), exponent


def _gamma(k: int) -> Fraction:
    """γ_k = ku/(1 − ku)."""
    return k * _UNIT / (1 - k * _UNIT)


def _above(x: Fraction) -> float:
    """A float that is at least x."""
    return math.nextafter(float(x), math.inf)


def _below(x: Fraction) -> float:
    """A float that is at most x."""
    return math.nextafter(float(x), -math.inf)


def _root_above(x: Fraction) -> float:
    """A float whose square is at least x."""
    root = math.sqrt(x)
    while Fraction(root) ** 2 < x:
        root = math.nextafter(root, math.inf)
    return root


def _norm_above(X: Tensor) -> float:
    """At least ‖X‖_F."""
    computed = Fraction(float(torch.linalg.vector_norm(X)))
    return _above(computed / (1 - _gamma(X.numel() + 2)))


def _norm_below(X: Tensor) -> float:
    """At most ‖X‖_F."""
    computed = Fraction(float(torch.linalg.vector_norm(X)))
    return _below(computed / (1 + _gamma(X.numel() + 2)))


def _rayleigh_below(W: Tensor, x: Tensor, frobenius: float) -> float:
    """At most ‖Wx‖/‖x‖, and at least 0."""
    largest = x.abs().max()
    if largest == 0:
        return 0.0
    x = x / largest  # no under- or overflow in the norms; x is whatever comes out of this
    quotient = Fraction(_norm_below(W @ x)) / Fraction(_norm_above(x))
    return max(_below(quotient - _gamma(W.shape[1] + 2) * Fraction(frobenius)), 0.0)


def _lower_gram(W: Tensor) -> Tensor:
    """Blocks on and below the diagonal of WᵀW, shape ``(p, p)``; the rest is 0."""
    p = W.shape[1]
    G = W.new_zeros(p, p)
    for j in range(0, p, _BLOCK):
        G[j:, j : j + _BLOCK] = W[:, j:].mT @ W[:, j : j + _BLOCK]
    return G


def _proven_square(G: Tensor, s: float, frobenius: float, terms: int) -> Fraction | None:
    """A number that is proved to be at least ‖W‖₂², by (1) and (2); None if the factor fails.

    Args:
        G: :func:`_lower_gram` of W, shape ``(p, p)``.
        s: The shift.
        frobenius: At least ‖W‖_F.
        terms: q, the length of the sums in G.

    Returns:
        s plus the bound of ‖E‖₂.
    """
    p = len(G)
    M = -G
    M.diagonal().add_(s)
    R, info = torch.linalg.cholesky_ex(M)  # reads the lower half
    if int(info) or not bool(R.isfinite().all()):
        return None
    F2, R2 = Fraction(frobenius) ** 2, Fraction(_norm_above(R)) ** 2
    return (
        Fraction(s)
        + (1 + _UNIT) * Fraction(_defect_above(M, R))
        + _gamma(p + 2) * R2
        + _gamma(terms + 2) * F2
        + _UNIT * (Fraction(s) + 2 * F2)
    )


def _defect_above(M: Tensor, R: Tensor) -> float:
    """At least ‖D̂‖_F, D̂ = M − RRᵀ as computed from the lower halves of M and R."""
    square = Fraction(0)
    for j in range(0, len(M), _BLOCK):
        k = min(j + _BLOCK, len(M))
        D = M[j:, j:k] - R[j:, :k] @ R[j:k, :k].mT  # R is 0 to the right of its diagonal blocks
        square += Fraction(_norm_above(D[: k - j])) ** 2
        square += 2 * Fraction(_norm_above(D[k - j :])) ** 2
    return _root_above(square)
