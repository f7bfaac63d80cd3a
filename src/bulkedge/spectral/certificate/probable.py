"""An upper bound of ‖A‖₂ that a random start violates with a probability one may choose.

W is A or Aᵀ, whichever is upright: q×p with q ≥ p, G = WᵀW is p×p, σ₁ = ‖A‖₂.

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

Take f(x) = U_{2k−2}(y), x = (1−ε)y², the Chebyshev polynomial of the second kind.  On λ_i ≤ 1 − ε
the right side is (1−ε) Σ γ_i² [√(1−y²) U_{2k−2}(y)]² ≤ (1−ε)(1 − γ²), larger λ_i contribute
nothing positive, and ε f(1)² = (1−ε) sinh²((2k−1)τ) with tanh²τ = ε.  So γ² sinh²(Nτ) < 1 − γ²,
N = 2k − 1, that is |γ| < 1/cosh(Nτ).  N = 2k is the same with vectors f(G)v₁, f(x)√x ∝ U_{2k−1}(y),
and the Rayleigh quotient of WWᵀ.  Hence |γ| ≥ δ implies, for σ̂² = θ after N products,

    σ₁ ≤ σ̂ cosh(arcosh(1/δ)/N).                                                            (4)

(3) and (4) follow from one event, |γ| ≥ δ, and so do all N at once: taking the least of them, and
stopping at any N, does not raise the probability of failure.

*The event.*  γ has density c_p (1 − x²)^{(p−3)/2}, c_p = Γ(p/2)/(√π Γ((p−1)/2)) ≤ √((p−1)/2π)
(Wendel), so P[|γ| < δ] ≤ 2c_p δ ≤ δ√(2(p−1)/π) for p ≥ 3; it is (2/π) arcsin δ for p = 2, and
|γ| = 1 for p = 1.  If the leading value is multiple, γ is the norm of a longer projection, which
only helps.

*Rounding* is in part modelled here, not proved.  Both ends are widened by what it may do to a
product in any order of summation, γ_{m+n} times :meth:`LinearMap.rounding_scale`.  That scale is
far more than the norm of a map that cancels.  For the rest they are widened by 4√max(m, n)·eps.  In
a single direction, z, a product errs by far less: 16 eps·σ₁ is allowed
for.  It is taken from δ, because rounding puts a component of that size into every vector, and
added to ρ_i in (3), so that a breakdown, ρ_i ≈ 0, claims what float64 can know and no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import TOLERANCE, check_fields, whole
from bulkedge._linmap import LinearMap, image_exponent, times_power
from bulkedge.triplet._rounding import float64_rounding
from bulkedge.triplet.solver._start import gaussian, seeded_by

from ._bound import NormBound, check, unscale
from ._chain import EPS, GRAIN, Chain


@dataclass(frozen=True)
class Probable:
    """A bound that a random start violates with probability ``failure`` at most.

    ``σ̂ ≤ ‖A‖₂ ≤ min(σ̂·cosh(arcosh(1/δ)/N), t)`` after N products.  A component of a random unit
    vector falls below δ with probability ``failure``.  Beyond t the Lanczos polynomials of this
    run would need a smaller component; see the module.  The first
    term depends on no spectrum: 200 passes give 1 % for ``failure = 1e-9`` and any matrix with
    min(m, n) up to 10⁵.  The second is usually far smaller.

    Cost: at most ``max_passes`` passes with one vector each, and as many vectors in memory; float64
    products whatever the dtype of A, orthogonalisation O((m + n)·passes²).

    Attributes:
        failure: The probability that ‖A‖₂ exceeds the upper end, for one call, over starts; not
            over matrices.  N calls, on N matrices or on one with N starts, are all right but for
            N times this.  To keep the least upper end of several is as many calls.
        rtol: Stop when upper/lower − 1 is below.
        max_passes: Stop then in any case; the interval is valid, if wider.

    Example:
        >>> from bulkedge.triplet import Dense
        >>> found = Probable().bound(Dense(torch.diag(torch.tensor([3.0, 2.0]))))
        >>> found.lower <= 3 <= found.upper < 3.01, found.failure
        (True, 1e-09)
    """

    failure: float = 1e-9
    rtol: float = 1e-2
    max_passes: int = 200

    def __post_init__(self) -> None:
        check_fields(self, failure=TOLERANCE, rtol=TOLERANCE, max_passes=whole(1))

    def bound(
        self, A: LinearMap, v: Tensor | None = None, generator: torch.Generator | None = None
    ) -> NormBound:
        """The interval.

        Args:
            A: The map, any floating dtype.
            v: Not used: the probability is that of a uniformly random start.
            generator: Source of the start.  None takes a seed that is a digest of A, so the same
                A has always the same interval, right or wrong, and no A can be made for a start
                but by trying many.

        Returns:
            The interval.

        Raises:
            InputError: If A is empty or not finite, or ``failure`` is too small for float64.
        """
        with torch.no_grad():
            check(A, v)
            noise = 4 * math.sqrt(max(A.shape)) * EPS
            delta = _component_quantile(min(A.shape), self.failure) - GRAIN
            if delta < GRAIN:
                raise InputError(
                    f"failure={self.failure} asks for a component of the start that rounding "
                    f"hides at shape {A.shape}; raise it, or use Rigorous()"
                )
            W = A.to(torch.float64)
            W = W.T if A.shape[0] < A.shape[1] else W
            start = gaussian(W.shape[1], 1, generator or seeded_by(A)).to(W.device)
            exponent = image_exponent(W, start)
            if exponent is None:
                return NormBound(0.0, 0.0, self.failure, 1)
            chain = Chain(W, start, exponent)
            lower, upper = self._run(chain, delta, noise)
            scale = times_power(W.rounding_scale(), -exponent)
            if not math.isfinite(scale):  # beyond float64, where nothing cancels
                scale = math.sqrt(min(A.shape)) * upper
            own = 2 * float64_rounding(sum(A.shape) + 4, scale)
        return NormBound(
            unscale(max(lower * (1 - noise) - own, 0.0), exponent, 0.0),
            unscale(upper * (1 + noise) + own, exponent, math.inf),
            self.failure,
            passes=len(chain.norms) + 1,
        )

    def _run(self, chain: Chain, delta: float, noise: float) -> tuple[float, float]:
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
            due = passes + 1 + passes // 10  # a test costs O(passes³), so not at every pass


def _upper_end(norms: list[float], lower: float, delta: float) -> float:
    """The least of (4) and the point t of (3), if |γ| ≥ δ."""
    high = lower * math.cosh(math.acosh(1 / delta) / len(norms))
    blurred = [norm + GRAIN * lower for norm in norms]
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
