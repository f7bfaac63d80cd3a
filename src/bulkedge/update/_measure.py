"""The bulk of a base, from the singular values that are known of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge.rmt.edge import fit_leading_noise
from bulkedge.rmt.empirical_bulk import MIN_VALUES, count_outliers

from .predict import BaseSpectrum

FEW = 8
"""Number of leading values that make an edge, and that tell noise from other bulks."""
PER_SPIKE = 3
"""Values of noise for each spike that does not stand out from a bulk of any shape."""
ROOM = 4
"""A bulk counts as rounding up to this many times what rounding is expected to make."""
EQUAL = (
    "no bulk fitted: the singular values are equal to rounding, as those of an orthogonal matrix; "
    "they have no edge"
)
"""What is said of a base whose bulk is rounding alone."""
TOO_FEW = (
    "no bulk fitted: too few leading singular values of the base converged; method 'dense' finds "
    "them all"
)
"""What is said of a base of which less is known than an edge needs."""
MOMENTS = 0.1
"""Relative error of the fourth moment by six probes: a few standard deviations at 512 values."""
MOMENTS_AT = 512
"""It falls with the square root of the number of values, from that many on."""


def measure_base(
    values: Tensor, shape: tuple[int, int], exact: int, stored: torch.dtype = torch.float32
) -> tuple[BaseSpectrum | None, str | None]:
    """The bulk of a base; or none, and why.

    Args:
        values: Singular values, descending.
        shape: Of the matrix.
        exact: How many of them are computed; the others come from a quadrature.
        stored: The dtype of the matrix, whose rounding is no bulk.

    Returns:
        Its spectrum, or what to say instead.
    """
    if exact < min(FEW, len(values)):
        return None, TOO_FEW
    try:
        noise = _noise(values, shape, exact) if exact < len(values) else None
        found = noise or BaseSpectrum.from_values(values, shape, exact=exact)
    except InputError as error:
        return None, f"no bulk fitted: {error}"
    if 0 < found.fit.threshold <= _of_rounding(values, shape, stored):
        return None, EQUAL
    return found, None


def _of_rounding(values: Tensor, shape: tuple[int, int], stored: torch.dtype) -> float:
    """The largest θ_c that rounding alone makes of equal values.

    Entries that are rounded have errors of ``ε/√12`` of their size, which are noise of their own
    with ``θ_c = (mn)^¼ ε/√12 ‖W0‖_F/√(mn)``; values are computed with errors of some ε σ₁.

    Args:
        values: All singular values.
        shape: Of the matrix.
        stored: Its dtype.

    Returns:
        A strength.
    """
    wide, own = (torch.finfo(x).eps for x in (torch.float32, stored))
    entries = (shape[0] * shape[1]) ** -0.25 * float(values.norm()) / math.sqrt(12)
    return ROOM * max(max(own, wide) * entries, wide * float(values[0]))


def _noise(values: Tensor, shape: tuple[int, int], exact: int) -> BaseSpectrum | None:
    """The bulk of a base whose known values are those of noise; None where they are not.

    A quadrature has the moments of the others, but not their places, so that ``fit_bulk`` cannot
    recognise noise by it.  Three tests can: of the fourth moment; of the places of the known
    values, which in any bulk of another shape are off by more counts than noise allows; and
    whether the largest reaches the edge.  The last two need eight values that are no spikes, and
    more where spikes are next to the bulk: the edge of another bulk looks like many of these.

    Args:
        values: Singular values, descending.
        shape: Of the matrix.
        exact: How many of them are computed.

    Returns:
        Its spectrum, or None.
    """
    if len(values) < MIN_VALUES or not float(values[0]) > 0:
        return None
    fit = fit_leading_noise(values, shape, exact=exact)
    if fit is None:
        return None
    beside = fit.spikes - count_outliers(values, exact=exact)[0]
    if exact - fit.spikes < max(FEW, PER_SPIKE * beside):
        return None
    rest = shape[0] - fit.spikes, shape[1] - fit.spikes
    limit = MOMENTS * min(1.0, math.sqrt(MOMENTS_AT / len(values)))
    if moment_misfit(values[fit.spikes :], rest) > limit:
        return None
    return BaseSpectrum(values, fit)


def moment_misfit(values: Tensor, shape: tuple[int, int]) -> float:
    """How far the fourth moment of singular values is from that of noise, relatively.

    Args:
        values: All of them, computed or from a quadrature, which knows moments well.
        shape: Of the matrix.

    Returns:
        ``|p Σσ⁴ / ((1 + p/max(m, n)) (Σσ²)²) − 1|``, p their number.
    """
    p, squares = len(values), values.square()
    return abs(float(p * squares.square().sum() / squares.sum() ** 2) / (1 + p / max(shape)) - 1)
