"""Repair methods: each removes intruder dimensions by a low-rank correction of the tuned matrix.

Let ``W = W0 + ΔW`` be tuned, with singular triplets (σ_i, u_i, v_i), and let I be the set of those
to be treated.  Let ``ΔW = Σ γ_j p_j q_jᵀ``, where the γ_j are the spikes of the update, and let θ_c
be the threshold, the strength beyond which a generic spike makes an outlier of W0.

=================  ===================================================================
:class:`Scale`     ``W − (1 − λ) Σ_{i∈I} σ_i u_i v_iᵀ``
:class:`Clip`    ``W0 + Σ_j min(γ_j, c θ_c) p_j q_jᵀ``
:class:`Shrink`    ``W0 + Σ_j η(γ_j) p_j q_jᵀ``, η optimal against noise
:class:`Project`   ``W0 + (I − Z Zᵀ) ΔW``, Z spans the parts of the u_i, i ∈ I, outside of the
                   base's leading space
=================  ===================================================================

All but the first change the update ΔW alone.  A method of your own is a class with ``rounds`` and
``correct``, as in :class:`Method`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import SHARE, check_fields, whole
from bulkedge._linmap import LinearMap
from bulkedge._precision import exact
from bulkedge.rmt import BulkFit, fit_bulk
from bulkedge.triplet import GolubKahan, singular_triplet
from bulkedge.update import UpdateSVD

LOWER = 0.9
"""The factor by which :class:`Clip` lowers its limit in the next round if an intruder remains."""
NEW = 1e-6
"""The norm below which the part of a direction outside the base's leading space is rounding."""
SPACE_ANGLE = 1e-2
"""The sine of the angle to which the base's leading space is computed; corrections barely depend
on it."""
FIRST_SPIKES = 16
"""The number of singular values of a dense update that are computed at first."""


@dataclass(frozen=True)
class Correction:
    """A low-rank correction ``W' = W + X Yᵀ``, or ``W' = W0 + X Yᵀ`` if it is made ``anew``.

    Attributes:
        X: Shape ``(m, c)``, float64.
        Y: Shape ``(n, c)``, float64.
        anew: Whether X Yᵀ replaces the update, instead of being added to it.

    Example:
        >>> correction = Correction(torch.ones(3, 1).double(), torch.ones(2, 1).double())
        >>> correction.changes, correction.then(correction).X.shape
        (True, torch.Size([3, 2]))
    """

    X: Tensor
    Y: Tensor
    anew: bool = False

    @property
    def changes(self) -> bool:
        """Whether the correction changes the matrix."""
        return self.anew or self.X.shape[1] > 0

    def then(self, other: Correction) -> Correction:
        """Both corrections, one after the other, without columns of zeros in the second."""
        if other.anew:
            return other
        keep = other.X.any(dim=0) & other.Y.any(dim=0)
        return Correction(
            torch.cat([self.X, other.X[:, keep]], dim=1),
            torch.cat([self.Y, other.Y[:, keep]], dim=1),
            self.anew,
        )

    def cpu(self) -> Correction:
        """The same correction in main memory."""
        return Correction(self.X.cpu(), self.Y.cpu(), self.anew)

    @classmethod
    def none(cls, shape: tuple[int, int], device: torch.device) -> Correction:
        """The correction that changes nothing."""
        X, Y = (exact(torch.zeros(size, 0, device=device)) for size in shape)
        return cls(X, Y)


@dataclass(frozen=True)
class Case:
    """The input of a method: a tuned matrix and those of its directions that are to be treated.

    Attributes:
        base: W0 as a map, with products in float64.
        tuned: W, likewise.
        update: ``W − W0``, likewise.
        sigma: Singular values of the triplets to be treated, shape ``(c,)``.
        u: Their left vectors, shape ``(m, c)``.
        v: Their right vectors, shape ``(n, c)``.
        left: Which of them are intruders by their left vectors, shape ``(c,)``.
        right: Which of them are intruders by their right vectors, shape ``(c,)``.
        spikes: The singular triplets of the update if it is a product of two factors; else None.
        fit: The fitted bulk of the base; None if it has none.
        subspace: How many leading base vectors span the base's leading space.
        round: How often the matrix was treated before.
    """

    base: LinearMap
    tuned: LinearMap
    update: LinearMap
    sigma: Tensor
    u: Tensor
    v: Tensor
    left: Tensor
    right: Tensor
    spikes: UpdateSVD | None
    fit: BulkFit | None
    subspace: int
    round: int = 0

    def bulk(self) -> BulkFit:
        """The fitted bulk of the base.

        Returns:
            The fit.

        Raises:
            InputError: If the base has no bulk.
        """
        if self.fit is None:
            raise InputError("expected a base with a bulk and so a threshold; scale or project")
        return self.fit

    def spikes_above(self, least: float) -> tuple[Tensor, Tensor, Tensor]:
        """Strengths, left and right vectors of the update's spikes above ``least``."""
        if self.spikes is not None:
            keep = self.spikes.gamma > least
            return self.spikes.gamma[keep], self.spikes.u[:, keep], self.spikes.v[:, keep]
        limit, count = min(self.update.shape), FIRST_SPIKES
        while True:
            found = singular_triplet(self.update, min(count, limit), strict=False)
            keep = found.sigma > least
            if not bool(keep.all()) or count >= limit:
                return found.sigma[keep], found.u[:, keep], found.v[:, keep]
            count *= 2


@runtime_checkable
class Method(Protocol):
    """How a matrix is repaired: the members that your own method must have.

    ``bulkedge.repair`` takes any object of this form.  A frozen dataclass is best: its fields are
    stored in the record.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Halve:
        ...     rounds: int = 1
        ...
        ...     def correct(self, case: Case) -> Correction:
        ...         gamma, u, v = case.spikes_above(0.0)
        ...         return Correction(-0.5 * u * gamma, v)
        >>> isinstance(Halve(), Method)
        True
    """

    @property
    def rounds(self) -> int:
        """How often a matrix is treated at most, while an intruder remains in it."""
        ...

    def correct(self, case: Case) -> Correction:
        """The correction of one matrix; InputError if the method does not apply to it."""
        ...


@dataclass(frozen=True)
class Scale:
    """Scale the intruding triplets of the tuned matrix: ``W − (1 − keep) Σ_I σ_i u_i v_iᵀ``.

    The intervention of the paper, whose λ is ``keep``.  It acts on triplets of W, so it also
    removes the base's part of them (``base_share`` in the record).  Scaling does not change the
    vector, which stays an intruder until its value is no longer among the leading ones.

    Attributes:
        keep: The fraction of each triplet that is kept: 1 keeps all of it, 0 removes it.
        rounds: See :class:`Method`; the paper uses one round.

    Raises:
        InputError: If ``keep`` is not in [0, 1] or ``rounds`` is not positive.

    References:
        Shuttleworth et al., arXiv:2410.21228; PEFT's ``reduce_intruder_dimension``.

    Example:
        >>> Scale(keep=0.25).keep
        0.25
    """

    keep: float = 0.0
    rounds: int = 1

    def __post_init__(self) -> None:
        check_fields(self, keep=SHARE, rounds=whole(1))

    def correct(self, case: Case) -> Correction:
        """See :class:`Method`."""
        return Correction((self.keep - 1) * case.u * case.sigma, case.v)


@dataclass(frozen=True)
class Clip:
    """Clip the spikes of the update at the threshold: ``γ_j → min(γ_j, level · θ_c)``.

    Below θ_c a generic spike makes no outlier.  A trained update is not generic: if an intruder
    remains, the next round clips the spikes at a limit that is a tenth lower.

    :class:`bulkedge.tune.SpikeClip` does the same while a model trains.

    Attributes:
        level: Where to clip the spikes, in units of θ_c.
        rounds: See :class:`Method`.

    Raises:
        InputError: If ``level`` is not in [0, 1] or ``rounds`` is not positive.

    References:
        Baik, Ben Arous, Péché, arXiv:math/0403022; Benaych-Georges and Nadakuditi,
        arXiv:1103.2221, for rectangular matrices.

    Example:
        >>> Clip().level
        1.0
    """

    level: float = 1.0
    rounds: int = 10

    def __post_init__(self) -> None:
        check_fields(self, level=SHARE, rounds=whole(1))

    def correct(self, case: Case) -> Correction:
        """See :class:`Method`."""
        threshold = case.bulk().threshold
        if not threshold > 0:
            raise InputError(
                "expected a base with a threshold, got one whose bulk ends in a step: any spike "
                "makes an outlier of it; scale or project"
            )
        limit = self.level * threshold * LOWER**case.round
        gamma, u, v = case.spikes_above(limit)
        return Correction(u * (limit - gamma), v)


@dataclass(frozen=True)
class Shrink:
    """Shrink the spikes of the update by the optimal weights against noise: ``γ → γ√(β_u β_v)``.

    β_u, β_v are the overlaps of a spike's vectors with those of the outlier that it makes, 0 below
    the threshold; the weight is optimal in the Frobenius norm.  For a product of two factors, which
    has no bulk of its own, the noise is the bulk of the base.  For a dense update the noise is the
    update's own bulk, which is removed.

    This denoises an update and does not remove intruders: it changes the strongest spikes least.

    Attributes:
        rounds: See :class:`Method`.

    Raises:
        InputError: If ``rounds`` is not positive.

    References:
        Gavish and Donoho, arXiv:1405.7511; Nadakuditi, arXiv:1306.6042.

    Example:
        >>> Shrink().rounds
        1
    """

    rounds: int = 1

    def __post_init__(self) -> None:
        check_fields(self, rounds=whole(1))

    def correct(self, case: Case) -> Correction:
        """See :class:`Method`."""
        if case.spikes is not None:
            spikes = case.spikes
            return Correction(
                spikes.u * (_optimal(spikes.gamma, case.bulk()) - spikes.gamma), spikes.v
            )
        values = torch.linalg.svdvals(case.update.to_dense())
        fit = fit_bulk(values, case.update.shape)
        beyond, u, v = case.spikes_above(float(values[fit.spikes]))
        beyond = beyond.clamp_min(fit.edge)  # the bulk has no outlier below its edge
        return Correction(u * _optimal(fit.bulk.strength(beyond), fit), v, anew=True)


@dataclass(frozen=True)
class Project:
    """Remove the update along the new part of the intruding vectors: ``(I − Z Zᵀ) ΔW``.

    Z spans the parts of the intruding left vectors outside the space of the 2k leading base
    vectors.  Along Z the repaired matrix equals the base, so nothing pretrained is lost, and the
    rank does not grow.  For intruding right vectors it is ``ΔW (I − Z Zᵀ)``.

    Attributes:
        rounds: See :class:`Method`.

    Raises:
        InputError: If ``rounds`` is not positive.

    Example:
        >>> Project().rounds
        5
    """

    rounds: int = 5

    def __post_init__(self) -> None:
        check_fields(self, rounds=whole(1))

    def correct(self, case: Case) -> Correction:
        """See :class:`Method`."""
        size = min(case.subspace, *case.base.shape)
        base = singular_triplet(
            case.base, size, solver=GolubKahan(vector_tol=SPACE_ANGLE), strict=False
        )
        Z = _outside(case.u[:, case.left], base.u)
        V = _outside(case.v[:, case.right], base.v)
        rows = case.update.rmatmat(Z)  # ΔWᵀ Z
        columns = case.update.matmat(V)
        columns = columns - Z @ (Z.mT @ columns)  # without what the left side has removed
        return Correction(torch.cat([-Z, -columns], dim=1), torch.cat([rows, V], dim=1))


METHODS = {"clip": Clip, "project": Project, "scale": Scale, "shrink": Shrink}
"""The methods by the names of the command line."""


def _optimal(gamma: Tensor, fit: BulkFit) -> Tensor:
    """The spikes times their optimal weights, ``γ√(β_u β_v)``."""
    found = fit.bulk.spike(gamma)
    return gamma * (found.left_overlap * found.right_overlap).sqrt()


def _outside(vectors: Tensor, space: Tensor) -> Tensor:
    """An orthonormal basis of the vectors' parts outside the span of ``space``."""
    rest = vectors
    for _ in range(2):  # twice: after the first pass the rest may be small, and mostly rounding
        rest = rest - space @ (space.mT @ rest)
    U, S, _ = torch.linalg.svd(rest, full_matrices=False)
    return U[:, S > NEW]
