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
from bulkedge._linmap import as_map
from bulkedge._precision import full_precision
from bulkedge.intruder._spectrum import all_values, guess_spectrum
from bulkedge.rmt import count_outliers
from bulkedge.rmt.empirical_bulk import FITTED_VALUES, MIN_VALUES
from bulkedge.triplet import Bidiagonalization, Ritz

from ._measure import measure_base
from .predict import BaseSpectrum

SMALL = 1024
"""Shorter side up to which all singular values are computed in float64: a second at most."""
BLOCK = 16
"""Random vectors that the process begins with."""
FIRST, EVERY, LAST = 8, 1, 32
"""After how many steps the values are looked at first, how often then, and when it ends."""
CONVERGED = 3e-2
"""A value counts as converged if its residual is below this part of it; its error is far less."""
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
        note: Why all values were computed although products were tried first; None otherwise.
    """

    values: Tensor
    exact: int
    spectrum: BaseSpectrum | None
    problem: str | None
    passes: int
    note: str | None = None


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
    found, passes = _by_products(W0, top_k, seed)
    if found is None:
        why = "the leading values are too close to converge: all were computed"
        return _of_all(W0, shape, passes, why)
    return found


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


def _by_products(W0: Tensor, top_k: int, seed: int) -> tuple[Measured | None, int]:
    """From a process that goes on until the edge is known, None if it never is; and its passes."""
    shape = (W0.shape[0], W0.shape[1])
    dtype = torch.float64 if W0.dtype is torch.float64 else torch.float32
    A = as_map(W0.to(dtype)) if W0.numel() <= COPIED else as_map(W0).to(dtype)
    short = A if shape[0] <= shape[1] else A.T
    size, limits = A.norm_bound(), torch.finfo(dtype)
    if not limits.tiny**0.25 < size < limits.max**0.25:  # its powers are zero or infinite
        return None, 0
    drawn = torch.randn(
        short.shape[0], BLOCK, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    with torch.no_grad(), full_precision(A.device):
        start = torch.linalg.qr(drawn.to(A.device, dtype)).Q
        process = Bidiagonalization(short, start, NOISE * limits.eps * size)
        for step in range(1, LAST + 1):
            process.extend()
            if process.closed:  # a rank that small is found at once by an SVD
                break
            if step >= FIRST and (step - FIRST) % EVERY == 0:
                found = _settled(process, W0, top_k, size)
                if found is not None:
                    return found, process.passes
    return None, process.passes


def _settled(process: Bidiagonalization, W0: Tensor, top_k: int, size: float) -> Measured | None:
    """What the process has found, once the values that count have converged."""
    shape = (W0.shape[0], W0.shape[1])
    ritz, p = process.ritz(), min(shape)
    exact = _converged(ritz)
    values = guess_spectrum(ritz, exact, (p, max(shape)), 0, process.start_size, size)
    if p - exact < MIN_VALUES or exact < top_k:
        return None
    # the edge of an empirical bulk is fitted to the values that follow the outliers
    outliers, _ = count_outliers(values, exact=exact)
    if exact < outliers + FITTED_VALUES:
        return None
    spectrum, problem = measure_base(values, shape, exact, W0.dtype)
    return Measured(values, exact, spectrum, problem, process.passes)


def _converged(ritz: Ritz) -> int:
    """How many leading Ritz values have converged."""
    found = ritz.residuals <= CONVERGED * ritz.sigma[: len(ritz.residuals)]
    return int(found.long().cumprod(0).sum())
