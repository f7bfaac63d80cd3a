"""The spectrum of a base from products alone: its leading values, and a quadrature of the others.

A block Golub–Kahan process from random vectors finds the leading values; the components of its Ritz
vectors on the block that it began with are the weights of a quadrature of the others (stochastic
Lanczos quadrature).  An edge is fitted to the values that follow the outliers, so the process goes
on until these have converged, too.

Golub, Luk, Overton, ACM TOMS 7 (1981), doi:10.1145/355945.355946; Ubaru, Chen, Saad, SIAM J. Matrix
Anal. Appl. 38 (2017), doi:10.1137/16M1104974.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import check_values, optional, whole
from bulkedge._linmap import LinearMap, MatrixLike, as_map
from bulkedge._precision import full_precision
from bulkedge.intruder import Remember, compute_anew
from bulkedge.intruder._spectrum import all_values, guess_spectrum
from bulkedge.rmt import count_outliers
from bulkedge.rmt.empirical_bulk import FITTED_VALUES, MIN_VALUES
from bulkedge.triplet import Bidiagonalization, Ritz

from ._measure import FEW, measure_base
from .predict import BaseSpectrum

SMALL = 1024
"""Shorter side up to which all singular values are computed in float64: a second at most."""
BLOCK = 16
"""Random vectors that the process begins with."""
FIRST, EVERY, LAST = 8, 1, 32
"""After how many steps the values are looked at first, how often then, and when it ends."""
CONVERGED = 3e-2
"""A value counts as converged if its residual is below this part of it; its error is far less."""
DEVIATIONS = 5.0
"""Leading Ritz values stand for more values than they are if their count exceeds them by so many
standard deviations."""
ACCURATE = 5e-5
"""The process goes on until the relative error of the largest value is estimated below this."""
UNKNOWN = (
    "‖W0‖₂ is not known: its leading values are too close to converge; method 'dense' finds it"
)
"""What is said of a base whose largest value has not converged."""
NOISE = 4.0
"""Rounding of a step in units of eps ‖W0‖_F, as assumed by the solvers."""
COPIED = 2**28
"""Up to so many entries a base of another dtype is converted once, not in every product."""


@dataclass(frozen=True)
class Measured:
    """The results for one base.

    Attributes:
        values: Singular values, descending, float64, shape ``(min(m, n),)``.
        exact: How many of them are computed; the others are from a quadrature.
        spectrum: Their bulk; None without one.
        problem: Why there is none; None if there is.
        passes: Products with the base or its transpose; 0 if all values were computed.
        note: Why all values were computed although products were tried first, or that the norm is
            not known; None otherwise.
    """

    values: Tensor
    exact: int
    spectrum: BaseSpectrum | None
    problem: str | None
    passes: int
    note: str | None = None


def measure_further(
    W0: Tensor,
    values: Tensor,
    exact: int,
    *,
    norm_known: bool = True,
    top_k: int = 10,
    seed: int = 0,
    remember: Remember = compute_anew,
) -> Measured:
    """The bulk of a base of which some values are known; where these are too few, of further ones.

    A certificate ends where its verdicts are known, which may be before any value of the base has
    converged.  Fewer than eight make no edge, and do not tell noise from other bulks.

    Cost: nothing where eight values and the norm are known; else that of :func:`by_products`.

    Args:
        W0: Shape ``(m, n)``, any real dtype.
        values: Its singular values, descending.
        exact: How many of them are computed; the others come from a quadrature.
        norm_known: Whether the first is ``‖W0‖₂`` to the digits that are shown.
        top_k: How many leading values should be computed.
        seed: Of the random vectors.
        remember: Where the further values are kept.

    Returns:
        The values, and the bulk if there is one.  Where the norm is still not known, ``note`` says
        so.
    """
    note, passes = None, 0
    if exact < len(values) and not (exact >= FEW and norm_known):
        found: Leading | None = remember("leading", lambda: by_products(W0, top_k, seed))
        if found is not None:
            passes = found.passes
            if found.exact > exact:
                values, exact = found.values, found.exact
            elif not norm_known:
                values = torch.cat([found.values[:1], values[1:]])
            norm_known = norm_known or found.accurate
        note = None if norm_known else UNKNOWN
    spectrum, problem = measure_base(values, (W0.shape[0], W0.shape[1]), exact, W0.dtype)
    return Measured(values, exact, spectrum, problem, passes, note)


def norm_is_known(W0: LinearMap, leading: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether the largest value of a base is known to as many digits as are shown.

    Cost: two passes over W0, each with one vector.

    Args:
        W0: Shape ``(m, n)``.
        leading: Its left vectors, values and right vectors, as far as they have converged.

    Returns:
        Whether the residual of the first allows an error of :data:`ACCURATE` at most; False
        without one.
    """
    left, sigma, right = leading
    if not len(sigma) or not float(sigma[0]) > 0:
        return False
    top = float(sigma[0])
    with torch.no_grad(), full_precision(W0.device):
        u, v = (x[:, :1].to(W0.device, W0.dtype) for x in (left, right))
        ends = W0.matmat(v) - top * u, W0.rmatmat(u) - top * v
        residual = max(float(end.norm()) for end in ends)
    return norm_error(sigma, residual, 1) <= ACCURATE


def measure(W0: Tensor, *, top_k: int = 10, seed: int = 0, small: int | None = None) -> Measured:
    """The singular values of a base and its bulk, without an SVD if the base is large.

    Cost: some 20 to 40 passes over W0, each with a block of 16 vectors, and memory for as many
    blocks on either side.  If the base's shorter side is ``small`` at most, or its leading
    values are too close to converge, all its values in float64.

    Args:
        W0: Shape ``(m, n)``, any real dtype.
        top_k: How many leading values must be computed.
        seed: Of the random vectors.
        small: Shorter side up to which all values are computed; 1024 if None.

    Returns:
        The values, and the bulk if there is one.

    Raises:
        InputError: If W0 is no real finite matrix that has entries, or a setting makes no sense.

    Example:
        >>> W0 = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
        >>> W0[:, 0] += 4.0
        >>> found = measure(W0, small=100)
        >>> exact = torch.linalg.svdvals(W0.double())
        >>> bool(found.values[0] / exact[0] - 1 < 1e-6), found.spectrum.fit.spikes
        (True, 1)
    """
    check_values(
        "measure",
        top_k=(top_k, whole(1)),
        seed=(seed, whole(0)),
        small=(small, optional(whole(0))),
    )
    _require_finite(W0)
    shape = (W0.shape[0], W0.shape[1])
    if min(shape) <= (SMALL if small is None else small):
        return _of_all(W0, shape, 0, None)
    found = by_products(W0, top_k, seed)
    if found is None or not found.settled:
        why = "the leading values are too close to converge: all were computed"
        return _of_all(W0, shape, 0 if found is None else found.passes, why)
    spectrum, problem = measure_base(found.values, shape, found.exact, W0.dtype)
    return Measured(found.values, found.exact, spectrum, problem, found.passes)


def _require_finite(W0: Tensor) -> None:
    if W0.ndim != 2 or not W0.is_floating_point() or W0.numel() == 0:
        raise InputError(
            f"expected a real matrix with entries, got {W0.dtype} of shape {tuple(W0.shape)}"
        )
    if torch.linalg.vector_norm(W0, dtype=torch.promote_types(W0.dtype, torch.float32)).isfinite():
        return  # a sum of squares costs less than a look at each entry, and misses none
    if bad := sum(int((~rows.isfinite()).sum()) for rows in W0.split(1024)):
        raise InputError(f"expected finite entries, got {bad} NaN or Inf; save the model again")


def _of_all(W0: Tensor, shape: tuple[int, int], passes: int, note: str | None) -> Measured:
    """From all singular values."""
    values = all_values(as_map(W0)).cpu()
    spectrum, problem = measure_base(values, shape, len(values), W0.dtype)
    return Measured(values, len(values), spectrum, problem, passes, note)


@dataclass(frozen=True)
class Leading:
    """What a process has found of the values of a base.

    Attributes:
        values: Singular values, descending, float64, shape ``(min(m, n),)``.
        exact: How many of them have converged; the others are from a quadrature.
        settled: Whether these are enough for an edge.
        error: Estimate of the relative error of the largest value.
        passes: Products with the base or its transpose.
    """

    values: Tensor
    exact: int
    settled: bool
    error: float
    passes: int

    @property
    def accurate(self) -> bool:
        """Whether the largest value is known to as many digits as are shown."""
        return self.error <= ACCURATE


def by_products(W0: MatrixLike, top_k: int, seed: int) -> Leading | None:
    """The leading values of a base, by a process that goes on until its edge and norm are known.

    Cost: some 20 to 40 passes over W0, each with a block of 16 vectors; 64 where values are close.

    Args:
        W0: Shape ``(m, n)``.
        top_k: How many leading values must have converged.
        seed: Of the random vectors.

    Returns:
        What was found when that was so, or after the last step; None where its powers are zero or
        infinite, or it has too few values.
    """
    A = as_map(W0)
    dtype = torch.float64 if A.dtype is torch.float64 else torch.float32
    shape = (A.shape[0], A.shape[1])
    if isinstance(W0, Tensor) and W0.numel() <= COPIED:
        A = as_map(W0.to(dtype))
    elif A.dtype is not dtype:
        A = A.to(dtype)
    short = A if shape[0] <= shape[1] else A.T
    size, limits = A.norm_bound(), torch.finfo(dtype)
    if not limits.tiny**0.25 < size < limits.max**0.25:
        return None
    drawn = torch.randn(
        short.shape[0], BLOCK, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    found = None
    with torch.no_grad(), full_precision(A.device):
        start = torch.linalg.qr(drawn.to(A.device, dtype)).Q
        process = Bidiagonalization(short, start, NOISE * limits.eps * size)
        for step in range(1, LAST + 1):
            process.extend()
            if process.closed:  # a rank that small is found at once by an SVD
                break
            if step >= FIRST and (step - FIRST) % EVERY == 0:
                found = _found(process, shape, top_k, size)
                if found.settled and found.accurate:
                    break
    return found


def _found(process: Bidiagonalization, shape: tuple[int, int], top_k: int, size: float) -> Leading:
    """What the process has found so far."""
    ritz, p = process.ritz(), min(shape)
    exact = _converged(ritz, p, process.start_size)
    values = guess_spectrum(ritz, exact, (p, max(shape)), 0, process.start_size, size)
    norm = ritz.sigma[:1]
    # with no value known all are from the quadrature, which the largest Ritz value may exceed
    values = torch.cat([norm, values[1:].clamp_max(float(norm))])
    settled = exact >= top_k and p - exact >= MIN_VALUES and _edge_known(values, exact)
    error = norm_error(ritz.sigma, float(ritz.residuals[0]), process.start_size)
    return Leading(values, exact, settled, error, process.passes)


def _edge_known(values: Tensor, exact: int) -> bool:
    """Whether enough values have converged for an edge below the outliers."""
    try:
        outliers, _ = count_outliers(values, exact=exact)
    except InputError:  # of a quadrature that has so many equal values
        return False
    return exact >= outliers + FITTED_VALUES


def norm_error(sigma: Tensor, residual: float, block: int) -> float:
    """Estimate of the relative error of the largest of some Ritz values.

    A residual ρ leaves an error of ``ρ²σ₁ / 2(σ₁² − σ²)`` if it points to values up to σ; a block
    of b vectors finds b values at once, so that σ is the next one.  It is at most ρ in any case.

    Args:
        sigma: Ritz values, descending.
        residual: ρ of the largest.
        block: b.

    Returns:
        The error over the largest value; 1 where that is zero.
    """
    top = float(sigma[0])
    if not top > 0:
        return 1.0
    below = float(sigma[block]) if len(sigma) > block else 0.0
    share, gap = residual / top, 1 - (below / top) ** 2
    return min(share, share**2 / (2 * gap)) if gap > 0 else share


def _converged(ritz: Ritz, size: int, block: int) -> int:
    """How many leading Ritz values have converged, and stand for one singular value each.

    Of many values that are equal or nearly so a block finds a few.  Their share of the start block
    says how many there are: of one value it is ``χ²_b/b``, whose variance is 2/b.

    Args:
        ritz: The Ritz vectors.
        size: The shorter side of the base.
        block: b, how many random vectors the process began with.

    Returns:
        Their number.
    """
    found = ritz.residuals <= CONVERGED * ritz.sigma[: len(ritz.residuals)]
    number = torch.arange(1, len(found) + 1, dtype=torch.float64)
    shares = ritz.left[:block, : len(found)].square().sum(0).cumsum(0) * (size / block)
    single = shares <= number + DEVIATIONS * (2 * number / block).sqrt()
    return int((found & single).long().cumprod(0).sum())
