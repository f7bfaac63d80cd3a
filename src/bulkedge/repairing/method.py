"""What may be done about intruder dimensions, each a low-rank correction of the tuned matrix.

Let ``W = W0 + ΔW`` be tuned, with singular triplets (σ_i, u_i, v_i), and I those to be treated; let
``ΔW = Σ γ_j p_j q_jᵀ``, whose γ_j are the spikes of the update, and θ_c the strength beyond which a
generic spike makes an outlier of W0.

=================  ===================================================================
:class:`Scale`     ``W − (1 − λ) Σ_{i∈I} σ_i u_i v_iᵀ``
:class:`ToEdge`    ``W0 + Σ_j min(γ_j, c θ_c) p_j q_jᵀ``
:class:`Shrink`    ``W0 + Σ_j η(γ_j) p_j q_jᵀ``, η optimal against noise
:class:`Project`   ``W0 + (I − Z Zᵀ) ΔW``, Z spans what is new in the u_i, i ∈ I
=================  ===================================================================

All but the first leave W0 as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import SHARE, check_fields, whole
from bulkedge._linmap import LinearMap
from bulkedge.rmt import BulkFit, fit_bulk
from bulkedge.triplet import GolubKahan, singular_triplet
from bulkedge.update import UpdateSVD

LOWER = 0.9
"""Where an intruder remains, the next round of :class:`ToEdge` holds spikes so much lower."""
NEW = 1e-6
"""Below this norm, what a direction has outside the base's leading space is rounding."""
SPACE_ANGLE = 1e-2
"""To what sine the base's leading space is sought: any space nearby will do."""
FIRST_SPIKES = 16
"""How many values of a dense update are looked at first for those above the threshold."""


@dataclass(frozen=True)
class Correction:
    """``W' = W + X Yᵀ``; where it is made ``anew``, ``W' = W0 + X Yᵀ``.

    Attributes:
        X: Shape ``(m, c)``, float64.
        Y: Shape ``(n, c)``, float64.
        anew: Whether the update that there was is dropped.
    """

    X: Tensor
    Y: Tensor
    anew: bool = False

    @property
    def changes(self) -> bool:
        """Whether it does anything."""
        return self.anew or self.X.shape[1] > 0

    def then(self, other: Correction) -> Correction:
        """Both, one after the other, without columns that do nothing."""
        if other.anew:
            return other
        keep = other.X.any(dim=0) & other.Y.any(dim=0)
        return Correction(
            torch.cat([self.X, other.X[:, keep]], dim=1),
            torch.cat([self.Y, other.Y[:, keep]], dim=1),
            self.anew,
        )

    def cpu(self) -> Correction:
        """The same in main memory."""
        return Correction(self.X.cpu(), self.Y.cpu(), self.anew)

    @classmethod
    def none(cls, shape: tuple[int, int], device: torch.device) -> Correction:
        """No change."""
        X, Y = (torch.zeros(size, 0, dtype=torch.float64, device=device) for size in shape)
        return cls(X, Y)


@dataclass(frozen=True)
class Case:
    """A tuned matrix, and the directions of it that are to be treated.

    Attributes:
        base: W0, products in float64.
        tuned: W, likewise.
        update: ``W − W0``, likewise.
        sigma: Singular values of the triplets to be treated, shape ``(c,)``.
        u: Their left vectors, shape ``(m, c)``.
        v: Their right vectors, shape ``(n, c)``.
        left: Which of them were found on the left side, shape ``(c,)``.
        right: Which on the right.
        spikes: The spikes of an update that is a product of two factors; None of another.
        fit: The bulk of the base; None where it has none.
        subspace: How many leading base vectors span what counts as the base's.
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
        """The bulk of the base.

        Returns:
            Its fit.

        Raises:
            InputError: If it has none.
        """
        if self.fit is None:
            raise InputError("expected a base with a bulk and so a threshold; scale or project")
        return self.fit

    def spikes_above(self, floor: float) -> tuple[Tensor, Tensor, Tensor]:
        """Strengths, left and right vectors of the update's spikes above ``floor``."""
        if self.spikes is not None:
            keep = self.spikes.gamma > floor
            return self.spikes.gamma[keep], self.spikes.u[:, keep], self.spikes.v[:, keep]
        limit, count = min(self.update.shape), FIRST_SPIKES
        while True:
            found = singular_triplet(self.update, min(count, limit), strict=False)
            keep = found.sigma > floor
            if not bool(keep.all()) or count >= limit:
                return found.sigma[keep], found.u[:, keep], found.v[:, keep]
            count *= 2


@runtime_checkable
class Method(Protocol):
    """How a matrix is repaired.

    Attributes:
        rounds: How often a matrix is treated at most, while an intruder remains in it.
    """

    @property
    def rounds(self) -> int:
        """How often a matrix is treated at most."""
        ...

    def correct(self, case: Case) -> Correction:
        """The correction of one matrix."""
        ...


@dataclass(frozen=True)
class Scale:
    """Scale the intruding triplets of the tuned matrix: ``W − (1 − keep) Σ_I σ_i u_i v_iᵀ``.

    The intervention of the paper, whose λ is ``keep``.  It acts on triplets of W, so it takes the
    base's part of them, too (``base_share`` in the record).  A scaled vector is the same vector: it
    stays an intruder until its value leaves the leading ones.

    Attributes:
        keep: What stays of each triplet: 1 keeps all of it, 0 removes it.
        rounds: See :class:`Method`; the paper has one.

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
class ToEdge:
    """Hold the spikes of the update at the threshold: ``γ_j → min(γ_j, level · θ_c)``.

    Below θ_c a generic spike makes no outlier.  A trained update is not generic: where an intruder
    remains, its spikes are held a tenth lower in the next round.

    Attributes:
        level: Where to hold them, in units of θ_c.
        rounds: See :class:`Method`.

    Raises:
        InputError: If ``level`` is not in [0, 1] or ``rounds`` is not positive.

    References:
        Baik, Ben Arous, Péché, arXiv:math/0403022; Benaych-Georges and Nadakuditi,
        arXiv:1103.2221, for rectangular matrices.

    Example:
        >>> ToEdge().level
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
        held = self.level * threshold * LOWER**case.round
        gamma, u, v = case.spikes_above(held)
        return Correction(u * (held - gamma), v)


@dataclass(frozen=True)
class Shrink:
    """Shrink the spikes of the update to what can be told from noise: ``γ → γ√(β_u β_v)``.

    β_u, β_v are the overlaps of a spike's vectors with those of the outlier that it makes, 0 below
    the threshold: the weight that is optimal in the Frobenius norm.  The noise is the bulk of the
    base for a product of two factors, which has none of its own; for a dense update it is the
    update's own bulk, which is dropped.

    A denoiser, not a remedy: the strongest spikes are kept best.

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
        beyond = beyond.clamp_min(fit.edge)  # an outlier on the edge is none
        return Correction(u * _optimal(fit.bulk.strength(beyond), fit), v, anew=True)


@dataclass(frozen=True)
class Project:
    """Take from the update what it does outside the pretrained subspace: ``(I − Z Zᵀ) ΔW``.

    Z spans the parts of the intruding vectors outside the base's leading 2k-space.  Along Z the
    repaired matrix is that of the base, so nothing pretrained is lost, and the rank does not grow.
    Of right vectors ``ΔW (I − Z Zᵀ)``.

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
        columns = columns - Z @ (Z.mT @ columns)  # what the left side has left
        return Correction(torch.cat([-Z, -columns], dim=1), torch.cat([rows, V], dim=1))


METHODS = {"to-edge": ToEdge, "project": Project, "scale": Scale, "shrink": Shrink}
"""The methods by the names of the command line."""


def _optimal(gamma: Tensor, fit: BulkFit) -> Tensor:
    """``γ√(β_u β_v)``."""
    found = fit.bulk.spike(gamma)
    return gamma * (found.left_overlap * found.right_overlap).sqrt()


def _outside(vectors: Tensor, space: Tensor) -> Tensor:
    """An orthonormal basis of the vectors' parts outside the span of ``space``."""
    rest = vectors
    for _ in range(2):  # once more: what is left may be small
        rest = rest - space @ (space.mT @ rest)
    U, S, _ = torch.linalg.svd(rest, full_matrices=False)
    return U[:, S > NEW]
