"""Updates that are not of low rank, held below a limit: DoRA, and weights that are trained in full.

Their leading singular values are found by products, starting from those of the last step.
"""

from __future__ import annotations

from typing import Union

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._precision import exact, full_precision
from bulkedge.triplet import GolubKahan, SingularTriplets, singular_triplet

from ._clip_spikes import FARTHEST, MARGIN_GROWTH, PASSES
from ._dora import DoraMatrix
from ._full import FullMatrix
from ._matrix import like

RTOL = 1e-5
"""The residual of a leading triplet. Clipped values lie close together: there a value may
be too low by that much."""
MARGIN = 1e-5
"""Spikes are lowered to this fraction below their limit: the error of a measured value."""
FIRST = 4
"""How many triplets are computed where the first exceeds its limit; more if all of them do."""

DenseUpdate = Union[DoraMatrix, FullMatrix]  # noqa: UP007 — Python 3.10
"""A matrix whose update is not of low rank."""


class DenseClip:
    """Lowers the updates of such matrices, and remembers the triplets from which it goes on."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[Tensor, Tensor]] = {}

    def clip(self, matrix: DenseUpdate, limit: float) -> tuple[Tensor, bool]:
        """Lower the update of a matrix until its strongest singular value is at the limit.

        The singular values of a weight that is trained in full are lowered one by one; the update
        of a DoRA is moved towards zero as a whole.

        Args:
            matrix: The matrix.
            limit: The strength that its update may not exceed.

        Returns:
            The strongest value before, shape ``(1,)``, and whether anything was changed.

        Raises:
            InputError: If it cannot be lowered: a factor is frozen, or training has diverged.
        """
        matrix.check()
        device = matrix.leaves[0][0].device
        with torch.no_grad(), full_precision(device):
            before = self._leading(matrix, 1)
            strongest = exact(before.sigma).cpu()
            if float(strongest) <= limit:
                return strongest, False
            if not float(strongest) <= FARTHEST * limit:
                problem = _diverged(matrix, float(strongest) / limit)
                raise problem
            if isinstance(matrix, DoraMatrix):
                self._scale(matrix, limit, float(strongest))
            else:
                self._subtract(matrix, limit)
        return strongest, True

    def _scale(self, matrix: DoraMatrix, limit: float, strongest: float) -> None:
        """Move a DoRA towards zero until the update of the stored numbers obeys."""
        factors = matrix.factors
        factors, ratio = (factors[0].clone(), factors[1].clone()), matrix.ratio()
        part, margin = 1.0, MARGIN
        for _ in range(PASSES):
            part *= limit * (1 - margin) / strongest
            matrix.write_scaled(part, factors, ratio)
            strongest = float(self._leading(matrix, 1).sigma)
            if strongest <= limit:
                return
            margin *= MARGIN_GROWTH
        raise _diverged(matrix, strongest / limit)

    def _subtract(self, matrix: FullMatrix, limit: float) -> None:
        """Subtract what exceeds the limit, until the update of the stored numbers obeys."""
        margin = MARGIN
        for _ in range(PASSES):
            found = self._exceeding(matrix, limit)
            if found is None:
                return
            excess = found.sigma - limit * (1 - margin)
            excess = excess.clamp_min(0)
            matrix.subtract(found.u * excess, found.v)
            margin *= MARGIN_GROWTH
        raise _diverged(matrix, float(self._leading(matrix, 1).sigma) / limit)

    def _exceeding(self, matrix: FullMatrix, limit: float) -> SingularTriplets | None:
        """The triplets of an update that contain all beyond a limit; None if there are none."""
        found = self._leading(matrix, 1)
        count, most = FIRST, min(matrix.shape)
        while float(found.sigma[-1]) > limit and len(found.sigma) < most:
            found = self._leading(matrix, min(count, most))
            count *= 4
        return found if float(found.sigma[0]) > limit else None

    def _leading(self, matrix: DenseUpdate, count: int) -> SingularTriplets:
        """The leading triplets of an update; finite, or an error."""
        update, known = matrix.difference_map(), self._last.get(matrix.name)
        solver = GolubKahan(rtol=RTOL)
        try:
            found = singular_triplet(
                update, count, solver=solver, init=like(update, known), strict=False
            )
        except InputError as error:
            raise InputError(f"{matrix.name}: {error}") from error
        if known is None or known[0].shape[1] <= count:
            self._last[matrix.name] = found.u, found.v
        return found


def is_dense(matrix: object) -> bool:
    """Whether the update of a matrix is not of low rank."""
    return isinstance(matrix, (DoraMatrix, FullMatrix))


def _diverged(matrix: DenseUpdate, times: float) -> InputError:
    return InputError(
        f"{matrix.name}: expected an update that can be lowered to its limit, got one {times:.3g} "
        "times as strong; training has diverged: lower the learning rate, or go back to a "
        "checkpoint"
    )
