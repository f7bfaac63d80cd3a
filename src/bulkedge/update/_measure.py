"""The bulk of a base, from the singular values that are known of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge.rmt import BulkFit, WhiteBulk, edge_test

from .predict import BaseSpectrum

FEW = 8
"""Number of leading values that make an edge; a matrix with fewer is measured by its moments."""
ROOM = 4
"""A bulk counts as rounding up to this many times what rounding is expected to make."""
EQUAL = (
    "no bulk fitted: the singular values are equal to rounding, as those of an orthogonal matrix; "
    "they have no edge"
)
"""What is said of a base whose bulk is rounding alone."""
MOMENTS = 0.1
"""Relative error of the fourth moment by six probes: a few standard deviations at 512 values."""


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
    try:
        if exact < min(FEW, len(values)):
            return _noise(values, shape), None
        found = BaseSpectrum.from_values(values, shape, exact=exact)
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


def _noise(values: Tensor, shape: tuple[int, int]) -> BaseSpectrum:
    """The bulk of a base whose leading values stand too close to converge: noise, or none."""
    misfit = moment_misfit(values, shape)
    if misfit > MOMENTS:
        raise InputError(
            "too few leading singular values of the base converged; method 'dense' finds them all"
        )
    sigma = float(values.norm()) / math.sqrt(shape[0] * shape[1])
    bulk = WhiteBulk(shape, sigma)
    fit = BulkFit(
        shape=shape,
        sigma=sigma,
        sigma_error=sigma / math.sqrt(2 * shape[0] * shape[1]),
        misfit=misfit,
        misfit_limit=MOMENTS,
        edge=bulk.edge,
        spikes=0,
        p_value=edge_test(float(values[0]), shape, sigma=sigma),
        bulk=bulk,
    )
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
