"""The bulk of a base matrix, and what the spikes of an update were expected to do to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import LowRank
from bulkedge.triplet import SingularTriplets
from bulkedge.update import BaseSpectrum, Prediction, predict_spikes

from .record import Bulk, Predicted

# A spike's outlier carries half of it and more, unless it mixes with a base vector; a direction
# that carries less than this of either side is another's.
CARRIED = 0.25


@dataclass(frozen=True)
class UpdateSpikes:
    """The singular triplets of a low-rank update.

    Attributes:
        theta: Singular values above rounding, descending, shape ``(r,)``.
        u: Left vectors, shape ``(m, r)``.
        v: Right vectors, shape ``(n, r)``.
    """

    theta: Tensor
    u: Tensor
    v: Tensor

    @classmethod
    def of(cls, update: LowRank) -> UpdateSpikes:
        """From two thin QR and one small SVD, in O((m + n) r²)."""
        Q_B, R_B = torch.linalg.qr(update.B)
        Q_A, R_A = torch.linalg.qr(update.A.mT)
        U, theta, Vh = torch.linalg.svd(update.scale * (R_B @ R_A.mT))
        rank = int((theta > theta[0] * max(update.shape) * torch.finfo(theta.dtype).eps).sum())
        return cls(theta[:rank], Q_B @ U[:, :rank], Q_A @ Vh.mT[:, :rank])


def measure_base(values: Tensor, shape: tuple[int, int]) -> tuple[BaseSpectrum | None, str | None]:
    """The bulk of a base; or none, and why."""
    try:
        return BaseSpectrum.from_values(values, shape), None
    except InputError as error:
        return None, f"no bulk fitted: {error}"


def bulk_row(base: BaseSpectrum) -> Bulk:
    """What the record says of a bulk."""
    fit = base.fit
    return Bulk(
        white=fit.white,
        sigma=fit.sigma,
        edge=fit.edge,
        misfit=fit.misfit,
        misfit_limit=fit.misfit_limit,
        spikes=fit.spikes,
        p_value=fit.p_value,
    )


def predicted_rows(
    base: BaseSpectrum, spikes: UpdateSpikes, tuned: SingularTriplets, epsilon: float
) -> list[Predicted]:
    """Prediction beside measurement, for as many of the strongest spikes as directions are judged.

    Args:
        base: The base.
        spikes: Those of the update.
        tuned: The leading triplets of the tuned matrix.
        epsilon: The recipe's.

    Returns:
        A row a spike.
    """
    first = slice(len(tuned.sigma))
    found = predict_spikes(base, spikes.theta[first].cpu(), epsilon=epsilon)
    left = (spikes.u[:, first].mT @ tuned.u).square()
    right = (spikes.v[:, first].mT @ tuned.v).square()
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
    separated = bool(found.separated[i])
    fields = ("location", "sd", "left_overlap", "right_overlap", "left_score", "right_score")
    return {
        "theta": float(found.theta[i]),
        "separated": separated,
        "expected": found.expected[i],
        **{field: float(getattr(found, field)[i]) if separated else None for field in fields},
    }


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
