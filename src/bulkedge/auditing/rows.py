"""What the record says of one matrix, from what was found."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bulkedge.intruder import HALF_THE_ENERGY, Judgement
from bulkedge.records.rows import Angles, Bulk, Direction, Predicted, Spectrum
from bulkedge.triplet import SingularTriplets
from bulkedge.update import BaseSpectrum, Prediction, UpdateSVD, effective_rank, predict_spikes

from .drift import Drift

CARRIED = 0.25
"""Part of a spike's left and right vector that a direction carries at least, to be its outlier.

An outlier carries half of its spike and more, unless it mixes with a base vector.
"""
IN_USE = 0.99
"""This share of the energy of an update is what the rank in use carries."""
LEADING = 32
"""Number of leading singular values that an outline of a spectrum lists one by one."""


def direction_rows(found: Judgement, drift: Drift | None = None) -> list[Direction]:
    """The directions of all sides, with their parts of a drift on the side of the outputs."""
    rows = []
    for direction in found.directions:
        part = None
        if drift is not None and direction.side == drift.side:
            part = drift.along[direction.index]
        rows.append(Direction(**vars(direction), method=found.method, drift_along=part))
    return rows


def angle_rows(found: Judgement) -> list[Angles]:
    """The principal angles of each side, and how many of them are wide."""
    rows = []
    for side, one in found.sides.items():
        lower, upper = one.cosines_lower, one.cosines_upper
        outside = int((upper < HALF_THE_ENERGY).sum())
        inside = int((lower >= HALF_THE_ENERGY).sum())
        row = Angles(
            side=side,
            cosines_lower=lower.tolist(),
            cosines_upper=upper.tolist(),
            similarity=[[round(x, 3) for x in row] for row in one.similarity.tolist()],
            outside=outside,
            undecided=len(lower) - outside - inside,
        )
        rows.append(row)
    return rows


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
        repulsion=None if fit.repulsion is None else fit.repulsion.ratio,
        repulsion_p_value=None if fit.repulsion is None else fit.repulsion.p_value,
        small=None if fit.lower is None else fit.lower.outliers,
        small_p_value=None if fit.lower is None else fit.lower.p_value,
    )


def in_use(gamma: Tensor) -> int:
    """How many of the strongest spikes carry 99 % of the energy ``Σ γ²``."""
    energy = gamma.square().cumsum(0)
    return int((energy < IN_USE * energy[-1]).sum()) + 1 if len(gamma) else 0


def rank_fields(gamma: Tensor) -> dict[str, float | int]:
    """How many of the spikes of an update count, by several measures; none without spikes.

    Args:
        gamma: The spikes, descending, shape ``(r,)``.

    Returns:
        ``spikes``, their number; ``in_use``, how many of the strongest carry 99 % of ``Σ γ²``;
        ``effective_rank``, ``exp(−Σ p log p)`` with ``p = γ/Σγ`` (Roy and Vetterli, EUSIPCO 2007);
        ``stable_rank``, ``Σ γ²/γ₁²``.
    """
    if not len(gamma):
        return {"spikes": 0, "in_use": 0}
    share = gamma / gamma[0]
    return {
        "spikes": len(gamma),
        "in_use": in_use(share),
        "effective_rank": effective_rank(share),
        "stable_rank": float(share.square().sum()),
    }


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
        One row per spike.
    """
    first = slice(len(tuned.sigma))
    found = predict_spikes(base, update.gamma[first].cpu(), epsilon=epsilon, draws=0)
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
