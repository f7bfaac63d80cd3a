"""The bulk of a base matrix, and what the spikes of an update were expected to do to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge.records.rows import Bulk, Predicted, Spectrum
from bulkedge.rmt import BulkFit, WhiteBulk, edge_test
from bulkedge.triplet import SingularTriplets
from bulkedge.update import BaseSpectrum, Prediction, UpdateSVD, predict_spikes

# A spike's outlier carries half of it and more, unless it mixes with a base vector; a direction
# that carries less than this of either side is another's.
CARRIED = 0.25
# so many leading values make an edge; the bulk of a matrix with fewer is told by its moments
FEW = 8
# so many leading values are told one by one
LEADING = 32
# relative error of the fourth moment by six probes, a few standard deviations of it at 512 values
MOMENTS = 0.1


def measure_base(
    values: Tensor, shape: tuple[int, int], exact: int
) -> tuple[BaseSpectrum | None, str | None]:
    """The bulk of a base; or none, and why.

    Args:
        values: Singular values, descending.
        shape: Of the matrix.
        exact: How many of them are computed; the others come from a quadrature.

    Returns:
        Its spectrum, or what to say instead.
    """
    try:
        if exact < min(FEW, len(values)):
            return _noise(values, shape), None
        return BaseSpectrum.from_values(values, shape, exact=exact), None
    except InputError as error:
        return None, f"no bulk fitted: {error}"


def _noise(values: Tensor, shape: tuple[int, int]) -> BaseSpectrum:
    """The bulk of a base whose leading values stand too close to converge: noise, or none."""
    # what a quadrature knows well are moments: of noise p Σσ⁴ = (1 + p/max(m, n)) (Σσ²)²
    p = len(values)
    squares = values.square()
    misfit = abs(float(p * squares.square().sum() / squares.sum() ** 2) / (1 + p / max(shape)) - 1)
    if misfit > MOMENTS:
        raise InputError(
            "too few leading singular values of the base converged; method 'dense' finds them all"
        )
    sigma = math.sqrt(float(squares.sum()) / (shape[0] * shape[1]))
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


def spectrum_row(values: Tensor) -> Spectrum:
    """All singular values in outline: the first 32, then a hundred at growing distances."""
    p = len(values)
    spread = torch.linspace(0, 1, 97, dtype=torch.float64)[1:].square()  # few where they are many
    rest = (LEADING + (p - 1 - LEADING) * spread).round().long() if p > LEADING + 1 else []
    ranks = sorted({*range(min(p, LEADING)), *(int(i) for i in rest), p - 1})
    return Spectrum(ranks=ranks, values=[float(f"{float(values[i]):.5g}") for i in ranks])


def bulk_row(base: BaseSpectrum, *, exact: bool) -> Bulk:
    """What the record says of a bulk."""
    fit = base.fit
    return Bulk(
        exact=exact,
        white=fit.white,
        sigma=fit.sigma,
        edge=fit.edge,
        misfit=fit.misfit,
        misfit_limit=fit.misfit_limit,
        spikes=fit.spikes,
        p_value=fit.p_value,
    )


def predicted_rows(
    base: BaseSpectrum, update: UpdateSVD, tuned: SingularTriplets, epsilon: float
) -> list[Predicted]:
    """Prediction beside measurement, for as many of the strongest spikes as directions are judged.

    Args:
        base: The base.
        update: The thin SVD of the update.
        tuned: The leading triplets of the tuned matrix.
        epsilon: The recipe's.

    Returns:
        A row a spike.
    """
    first = slice(len(tuned.sigma))
    found = predict_spikes(base, update.gamma[first].cpu(), epsilon=epsilon)
    left = (update.u[:, first].mT @ tuned.u).square()
    right = (update.v[:, first].mT @ tuned.v).square()
    inside = tuned.sigma <= found.edge  # these are bulk, whatever they carry
    carried = (left * right).sqrt().masked_fill(inside, 0.0)
    return [
        Predicted.model_validate(
            _expected(found, i) | _measured(tuned, left[i], right[i], carried[i])
        )
        for i in range(len(found.theta))
    ]


def _expected(found: Prediction, i: int) -> dict[str, object]:
    """The prediction of one spike; what needs an outlier is null without one."""
    supercritical = bool(found.supercritical[i])
    fields = ("location", "sd", "left_overlap", "right_overlap", "left_score", "right_score")
    return {
        "theta": float(found.theta[i]),
        "supercritical": supercritical,
        "expected": found.expected[i],
        **{f: _finite(float(getattr(found, f)[i])) if supercritical else None for f in fields},
    }


def _finite(value: float) -> float | None:
    """A value that a record may hold; None for what has none."""
    return value if math.isfinite(value) else None


def _measured(
    tuned: SingularTriplets, left: Tensor, right: Tensor, carried: Tensor
) -> dict[str, object]:
    """The judged direction that carries most of a spike; nothing if none carries much."""
    j = int(carried.argmax())
    if carried[j] < CARRIED:
        return {}
    return {
        "measured_index": j,
        "measured_location": float(tuned.sigma[j]),
        "measured_left_overlap": float(left[j]),
        "measured_right_overlap": float(right[j]),
    }
