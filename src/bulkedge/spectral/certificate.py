"""Upper bounds of ‖A‖₂: a proof by Cholesky factorisation, a bet on a random Lanczos start.

Iterations bound the norm from below; a Lipschitz constant needs the other side.  In both
certificates W is A or Aᵀ, whichever is upright: q×p with q ≥ p, G = WᵀW is p×p, σ₁ = ‖A‖₂.


Rigorous
========

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
p·2⁻⁵¹⁰; all such errors together stay far below 2uF² ≥ 2⁻⁵⁴, which is what the index q + 2 in
place of q adds to (2).

The lower end of the interval is ‖Wx‖/‖x‖ for a computed x, less the rounding γ_{p+2}F of Wx.


Probable
========

Golub-Kahan bidiagonalisation from v₁, uniform on the sphere, makes v₁, u₁, v₂, u₂, … in this
order, each by one product with W or Wᵀ; ρ_i is the norm of the i-th new vector before it is
normalised.  With z the leading right singular vector, W z = σ₁ w, the components h₀ = v₁ᵀz,
h₁ = u₁ᵀw, h₂ = v₂ᵀz, … satisfy

    ρ_i h_i = σ₁ h_{i−1} − ρ_{i−1} h_{i−2},      h_i = γ π_i(σ₁),   γ = v₁ᵀz.                 (3)

*The polynomials that were run* (Hochstenbach, J. Sci. Comput. 57 (2013),
doi:10.1007/s10915-013-9716-x, who uses the last one; here their sum, the Christoffel function).
The v's are orthonormal, so Σ_even h_i² ≤ ‖z‖² = 1, and so for the u's: γ² Σ π_i(σ₁)² ≤ 1.  If
|γ| ≥ δ, then Σ π_i(σ₁)² ≤ 1/δ².  Where π₁ … π_j are positive at t, t is beyond all their zeros,
and they increase from there on: if Σ_{i ≤ j} π_i(t)² > 1/δ² over one side, then σ₁ < t.

*Whatever the spectrum* (Kuczyński, Woźniakowski, SIAM J. Matrix Anal. Appl. 13 (1992),
doi:10.1137/0613066: P[λ₁ − θ > ελ₁] ≤ 1.648 √p exp(−(2k−1)√ε) for λ₁ = σ₁² after k Lanczos steps,
that is 2k − 1 products).  Their argument, without its last two estimates, and after any number N
of products: let σ₁ = 1, θ the largest Ritz value of G, θ < 1 − ε, and g any vector of the Krylov
space, g = f(G)v₁.  gᵀ(G − (1−ε)I)g < 0 reads, in eigencoordinates γ_i of v₁,

    γ² ε f(1)² < Σ_{i≥2} γ_i² f(λ_i)² (1 − ε − λ_i).

Take f(x) = U_{2k−2}(y), x = (1−ε)y², the Chebyshev polynomial of the second kind:  on λ_i ≤ 1 − ε
the right side is (1−ε) Σ γ_i² [√(1−y²) U_{2k−2}(y)]² ≤ (1−ε)(1 − γ²), larger λ_i contribute
nothing positive, and ε f(1)² = (1−ε) sinh²((2k−1)τ) with tanh²τ = ε.  So γ² sinh²(Nτ) < 1 − γ²,
N = 2k − 1, that is |γ| < 1/cosh(Nτ).  N = 2k is the same with vectors f(G)v₁, f(x)√x ∝ U_{2k−1}(y),
and the Rayleigh quotient of WWᵀ.  Hence |γ| ≥ δ implies, for σ̂² = θ after N products,

    σ₁ ≤ σ̂ cosh(arcosh(1/δ)/N).                                                            (4)

(3) and (4) follow from one event, |γ| ≥ δ, and so do all N at once: taking the least of them, and
stopping when one likes it, costs no probability.

*The event.*  γ has density c_p (1 − x²)^{(p−3)/2}, c_p = Γ(p/2)/(√π Γ((p−1)/2)) ≤ √((p−1)/2π)
(Wendel), so P[|γ| < δ] ≤ 2c_p δ ≤ δ√(2(p−1)/π) for p ≥ 3; it is (2/π) arcsin δ for p = 2, and
|γ| = 1 for p = 1.  If the leading value is multiple, γ is the norm of a longer projection, which
only helps.

*Rounding* is modelled here, not proved.  Both ends are widened by 4√max(m, n)·eps, a few times the
error of a product with independent roundings (Higham, Mary, SIAM J. Sci. Comput. 41 (2019),
doi:10.1137/18M1226312).  In a single direction, z, a product errs by far less: 16 eps·σ₁ is allowed
for.  It is taken from δ, because rounding puts a component of that size into every vector, and
added to ρ_i in (3), so that a breakdown, ρ_i ≈ 0, claims what float64 can know and no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import Dense, LinearMap

_BLOCK = 256  # columns a step: large enough for the products, small beside the matrix
_UNIT = Fraction(1, 2**53)  # u of float64
_EPS = 2.0**-52
_GRAIN = 16 * _EPS  # what rounding may put into, or hide from, one component of a unit vector


@dataclass(frozen=True)
class NormBound:
    """An interval that holds ‖A‖₂.

    Attributes:
        lower: At most ‖A‖₂.
        upper: At least ‖A‖₂, but for the ``failure``.
        failure: The probability, over the random start, that ‖A‖₂ exceeds ``upper``; 0 if proved.
        passes: How often A was read: products with A or Aᵀ, of one vector each but for a Gram
            matrix.
    """

    lower: float
    upper: float
    failure: float
    passes: int


class Certificate(Protocol):
    """What bounds ‖A‖₂ from above."""

    def bound(
        self, A: LinearMap, v: Tensor | None = None, generator: torch.Generator | None = None
    ) -> NormBound:
        """The interval; ``v``, shape ``(n,)``, is a guess of the leading right singular vector."""
        ...


@dataclass(frozen=True)
class Rigorous:
    """A proof that ‖A‖₂ ≤ upper: ``b²I − AAᵀ``, on the smaller side, has a Cholesky factor.

    b is a lower bound of ‖A‖₂ times 1 + δ, δ = ``rtol`` first and ten times more after each
    factorisation that breaks down.  The result is proved for every guess; a good one saves
    factorisations.  All errors of rounding are accounted for, see the module; they add about
    ``max(m, n)·2⁻⁵³·(‖A‖_F/‖A‖₂)²`` to the relative width.

    What is proved is proved of the float64 matrix ``A.widened().to_dense()``.  That is A itself for
    :class:`~bulkedge.triplet.Dense` of any dtype and for convolutions on the CPU; where it is
    computed (``LowRank``, ``Sum``, ``Scaled``), its own rounding is not included.

    Cost: with p = min(m, n), m·n·p operations for AAᵀ and, for each δ tried, p³/3 for the factor
    and p³/3 for the check of it; without a guess 50 to 120 passes before.  Memory:
    ``8·(mn + 3p²)`` bytes.

    Attributes:
        rtol: The first δ.

    Example:
        >>> found = Rigorous().bound(Dense(torch.diag(torch.tensor([3.0, 2.0]))))
        >>> found.lower <= 3 <= found.upper, found.upper < 3 * (1 + 2e-9), found.failure
        (True, True, 0.0)
    """

    rtol: float = 1e-9

    def __post_init__(self) -> None:
        if not 0 < self.rtol < 1:
            raise InputError(f"expected 0 < rtol < 1, got {self.rtol}")

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
            _check(A, v)
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
        ends = _unscale(lower, exponent, 0.0), _unscale(upper, exponent, math.inf)
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
                x, spent = _leading_vector(W, self.rtol, generator)
                lower = max(lower, _rayleigh_below(W, x, frobenius))
                passes, searched = passes + spent + 1, True


@dataclass(frozen=True)
class Probable:
    """A bound that a random start violates with probability ``failure`` at most.

    ``σ̂ ≤ ‖A‖₂ ≤ min(σ̂·cosh(arcosh(1/δ)/N), t)`` after N products, where δ is what a component of a
    random unit vector falls below with probability ``failure``, and t is the point beyond which
    the Lanczos polynomials of this very run would need a smaller one; see the module.  The first
    term depends on no spectrum: 200 passes give 1 % for ``failure = 1e-9`` and any matrix with
    min(m, n) up to 10⁵.  The second is usually far smaller.

    Cost: at most ``max_passes`` passes with one vector each, and as many vectors in memory; float64
    products whatever the dtype of A, orthogonalisation O((m + n)·passes²).

    Attributes:
        failure: The probability that ‖A‖₂ exceeds the upper end, over starts; not over matrices.
        rtol: Stop when upper/lower − 1 is below.
        max_passes: Stop then in any case; the interval is valid, if wider.

    Example:
        >>> found = Probable().bound(Dense(torch.diag(torch.tensor([3.0, 2.0]))))
        >>> found.lower <= 3 <= found.upper < 3.01, found.failure
        (True, 1e-09)
    """

    failure: float = 1e-9
    rtol: float = 1e-2
    max_passes: int = 200

    def __post_init__(self) -> None:
        if not 0 < self.failure < 1:
            raise InputError(f"expected 0 < failure < 1, got {self.failure}")
        if self.max_passes < 1:
            raise InputError(f"expected max_passes ≥ 1, got {self.max_passes}")

    def bound(
        self, A: LinearMap, v: Tensor | None = None, generator: torch.Generator | None = None
    ) -> NormBound:
        """The interval.

        Args:
            A: The map, any floating dtype.
            v: Not used: the probability is that of a uniformly random start.
            generator: Source of the start; None takes a fixed seed, and then the same A has always
                the same interval, right or wrong.

        Returns:
            The interval.

        Raises:
            InputError: If A is empty or not finite, or ``failure`` is too small for float64.
        """
        with torch.no_grad():
            _check(A, v)
            noise = 4 * math.sqrt(max(A.shape)) * _EPS
            delta = _component_quantile(min(A.shape), self.failure) - _GRAIN
            if delta < _GRAIN:
                raise InputError(
                    f"failure={self.failure} asks for a component of the start that rounding "
                    f"hides at shape {A.shape}; raise it, or use Rigorous()"
                )
            W = A.widened()
            W = W.T if A.shape[0] < A.shape[1] else W
            start = _gaussian(W.shape[1], generator).to(A.device)
            exponent = _exponent(float(W.matmat(start).abs().max()))
            if exponent is None:
                return NormBound(0.0, 0.0, self.failure, 1)
            chain = _Chain(W, start, exponent)
            lower, upper = self._run(chain, delta, noise)
        return NormBound(
            _unscale(lower * (1 - noise), exponent, 0.0),
            _unscale(upper * (1 + noise), exponent, math.inf),
            self.failure,
            passes=len(chain.norms) + 1,
        )

    def _run(self, chain: _Chain, delta: float, noise: float) -> tuple[float, float]:
        """Both ends: products until the interval is narrow enough or the chain ends."""
        due = 1
        while True:
            chain.advance()
            passes = len(chain.norms)
            last = passes >= self.max_passes or chain.ended(noise)
            if passes < due and not last:
                continue
            lower = chain.ritz()[0]
            upper = lower if chain.complete else _upper_end(chain.norms, lower, delta)
            if last or upper <= lower * (1 + self.rtol):
                return lower, upper
            due = passes + 1 + passes // 10  # to look costs O(passes³), so not every time


class _Chain:
    """Golub-Kahan vectors v₁, u₁, v₂, u₂, … of 2⁻ᵉW, W of shape (q, p), from ``start``, (p, 1)."""

    def __init__(self, W: LinearMap, start: Tensor, exponent: int = 0) -> None:
        self.W = W
        self.norms: list[float] = []  # ρ₁, ρ₂, …, one a product
        self.bases = [start / torch.linalg.vector_norm(start), start.new_empty(W.shape[0], 0)]
        # half of the scaling before a product and half after: none of it under- or overflows
        self.before, self.after = 2.0 ** -(exponent // 2), 2.0 ** (exponent // 2 - exponent)

    def advance(self) -> None:
        """One product, with the newest vector; the result is orthogonalised, twice is enough."""
        side = len(self.norms) % 2
        newest, basis = self.bases[side][:, -1:], self.bases[1 - side]
        product = self.W.rmatmat if side else self.W.matmat
        new = product(newest * self.before) * self.after
        for _ in range(2):
            new = new - basis @ (basis.mT @ new)
        norm = float(torch.linalg.vector_norm(new))
        self.norms.append(norm)
        self.bases[1 - side] = torch.cat([basis, new / max(norm, 1e-300)], dim=1)

    @property
    def complete(self) -> bool:
        """Whether the v's span everything: then the chain holds all of W."""
        return len(self.norms) >= 2 * self.W.shape[1] - 1

    def ended(self, noise: float) -> bool:
        """Whether the next vector would be rounding only."""
        return self.complete or self.norms[-1] <= noise * max(self.norms)

    def ritz(self) -> tuple[float, Tensor]:
        """The largest Ritz value and the coordinates of its vector in v₁, u₁, v₂, and so on."""
        # the chain is the Lanczos process of [[0, Wᵀ], [W, 0]], whose diagonal is 0 in this basis
        off_diagonal = torch.tensor(self.norms, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(torch.diag(off_diagonal, -1))  # reads the lower half
        return float(values[-1]), vectors[:, -1]

    def leading_vector(self) -> Tensor:
        """The Ritz vector on the v side, shape ``(p,)``."""
        coordinates = self.ritz()[1][::2].to(self.bases[0])
        return self.bases[0] @ coordinates


def _upper_end(norms: list[float], lower: float, delta: float) -> float:
    """The least of (4) and the point t of (3), if |γ| ≥ δ."""
    high = lower * math.cosh(math.acosh(1 / delta) / len(norms))
    blurred = [norm + _GRAIN * lower for norm in norms]
    if not _beyond(norms, blurred, high, delta):
        return high
    low = lower
    while high - low > 0.01 * (high - lower) + 1e-15 * lower:
        middle = (low + high) / 2
        if _beyond(norms, blurred, middle, delta):
            high = middle
        else:
            low = middle
    return high


def _beyond(norms: list[float], blurred: list[float], t: float, delta: float) -> bool:
    """Whether the polynomials of (3) show σ₁ < t; ``blurred`` are the ρ_i to divide by."""
    # a larger divisor is safe: while all values are positive it makes every later one smaller,
    # since h_i/h_{i−1} is increasing in the quotient before
    sums = [1.0, 0.0]
    before, value, norm_before = 0.0, 1.0, 0.0
    for i, (norm, divisor) in enumerate(zip(norms, blurred, strict=True), start=1):
        before, value = value, (t * value - norm_before * before) / divisor
        if value <= 0:
            return False
        sums[i % 2] += value * value
        if sums[i % 2] * delta * delta > 1:
            return True
        norm_before = norm
    return False


def _component_quantile(p: int, failure: float) -> float:
    """δ with P[|γ| < δ] ≤ failure, γ a component of a random unit vector in ℝᵖ."""
    if p == 1:
        return 1.0
    if p == 2:
        return math.sin(math.pi * failure / 2)
    return failure * math.sqrt(math.pi / (2 * (p - 1)))


def _leading_vector(
    W: Tensor, rtol: float, generator: torch.Generator | None
) -> tuple[Tensor, int]:
    """A vector x, shape ``(p,)``, with ‖Wx‖ ≳ (1 − rtol)σ₁‖x‖ most likely, and its passes."""
    chain, due = _Chain(Dense(W), _gaussian(W.shape[1], generator).to(W.device)), 1
    while True:
        chain.advance()
        passes = len(chain.norms)
        last = passes >= 200 or chain.ended(_GRAIN)
        if passes < due and not last:
            continue
        # the square of the last coordinate is about the relative error of the Ritz value
        if last or float(chain.ritz()[1][-1]) ** 2 <= rtol / 1000:
            return chain.leading_vector(), passes
        due = passes + 1 + passes // 10


# The proof of the module's first part, piece by piece.


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


# What both need of a map.


def _check(A: LinearMap, v: Tensor | None) -> None:
    """Raise InputError where there is nothing to bound, or a guess that does not fit."""
    if 0 in A.shape:
        raise InputError(f"expected a matrix with entries, got shape {A.shape}")
    if v is not None and (v.numel() != A.shape[1] or not bool(v.isfinite().all())):
        raise InputError(
            f"expected v finite and of shape ({A.shape[1]},), a right vector of a map of shape "
            f"{A.shape}; got shape {tuple(v.shape)}"
        )


def _gaussian(n: int, generator: torch.Generator | None) -> Tensor:
    """A Gaussian column on the CPU, so that every device draws alike."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return torch.randn(n, 1, generator=generator, dtype=torch.float64)


def _exponent(largest: float) -> int | None:
    """The e with 2ᵉ⁻¹ ≤ largest < 2ᵉ; None for 0."""
    if not math.isfinite(largest):
        raise InputError("expected finite entries, got NaN or Inf (or an overflow in the product)")
    return math.frexp(largest)[1] if largest else None


def _dense_near_one(A: LinearMap) -> tuple[Tensor, int | None]:
    """A·2⁻ᵉ in float64 with the largest entry in [½, 1), and e."""
    matrix = A.widened().to_dense()  # float64 holds every narrower dtype exactly
    lowest, highest = (float(end) for end in matrix.aminmax())
    exponent = _exponent(max(-lowest, highest))
    if exponent is None:
        return matrix, None
    half = exponent // 2  # in two steps: 2⁻ᵉ itself may overflow
    return matrix * 2.0**-half * 2.0 ** (half - exponent), exponent


def _unscale(x: float, exponent: int, towards: float) -> float:
    """x·2ᵉ, rounded in the direction of ``towards``."""
    try:
        x = math.ldexp(x, exponent)
    except OverflowError:
        x = math.inf
    return math.nextafter(x, towards)
