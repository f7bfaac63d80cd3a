"""One side of the leading tuned vectors against the base: by a certificate, or by SVDs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._fields import DEFAULT_EPSILON
from bulkedge._linmap import LinearMap
from bulkedge._verdict import Verdict, verdict
from bulkedge.triplet import SingularTriplets

from ._dense import Base
from ._ties import ties
from .certificate import LEADING, certify
from .score import VectorSide, eigenspaces, scores_of

Estimate = tuple[Tensor, Tensor, Tensor]
"""Values, and the lower and upper ends of their intervals, shape ``(k,)`` each."""

ZERO_THRESHOLD = 1e-3
"""In single precision, a tuned value below this part of σ₁ is indistinguishable from zero."""


@dataclass(frozen=True)
class Direction:
    """One leading singular vector of a tuned matrix, judged.

    Attributes:
        index: Rank of its singular value in the tuned matrix, 0 the largest.
        sigma: The singular value.
        side: Whether it is a left or a right vector.
        score: Its largest |cosine| with a base vector of the same side.
        score_lower: Lower end of the interval of the score.
        score_upper: Upper end.
        matched_index: The base vector that attains the score; -1 without one.
        subspace_overlap: Norm of its projection on the base's leading 2k-space.
        overlap_lower: Lower end of the interval of the overlap.
        overlap_upper: Upper end.
        verdict: The verdict that holds at both ends of both intervals.
        residual: Residual of the triplet over the largest singular value.
    """

    index: int
    sigma: float
    side: VectorSide
    score: float
    score_lower: float
    score_upper: float
    matched_index: int
    subspace_overlap: float
    overlap_lower: float
    overlap_upper: float
    verdict: Verdict
    residual: float


@dataclass(frozen=True)
class OneSide:
    """The vectors of one side against the base's.

    Attributes:
        directions: One for each tuned vector.
        cosines_lower: Of the principal angles between the tuned vectors and the base's leading
            2k-space, lower ends, shape ``(k,)``.
        cosines_upper: Upper ends.
        similarity: |cosine| of each tuned vector (rows) with the base's leading 2k, ``(k, 2k)``.
        spectrum: Singular values of the base, descending, shape ``(min(m, n),)``.
        computed_count: How many leading ones of them are computed; a quadrature gives the others.
        passes: Products with the base.
        base: Leading left vectors, values and right vectors of the base, as far as they are known.
    """

    directions: list[Direction]
    cosines_lower: Tensor
    cosines_upper: Tensor
    similarity: Tensor
    spectrum: Tensor
    computed_count: int
    passes: int
    base: tuple[Tensor, Tensor, Tensor]


def certified_side(
    W0: LinearMap,
    tuned: SingularTriplets,
    side: VectorSide,
    *,
    subspace: int,
    epsilon: float = DEFAULT_EPSILON,
    frobenius: float | None = None,
    max_steps: int = 25,
    seed: int | None = None,
) -> OneSide:
    """Intervals on the scores of known tuned vectors, from products with the base.

    Args:
        W0: The base.
        tuned: The tuned triplets, in the dtype of its products; those below a thousandth of σ₁ are
            left out.
        side: Which of their vectors.
        subspace: How many leading base vectors the overlap is taken with.
        epsilon: Score below which the paper counts an intruder.
        frobenius: ``‖W0‖_F``, if it is known.
        max_steps: Steps before the remaining directions are left undecided.
        seed: Of the random vectors.

    Returns:
        The verdicts of that side.
    """
    (groups, errors), count = ties(tuned), count_nonzero_values(tuned)
    A, Y = (W0, tuned.u) if side == "left" else (W0.T, tuned.v)
    found = certify(
        A,
        Y[:, :count],
        epsilon=epsilon,
        errors=errors[:count],
        groups=groups[:count],
        subspace=subspace,
        frobenius=frobenius,
        max_steps=max_steps,
        generator=generator_of(seed),
    )
    directions = _directions(
        side,
        tuned,
        matched=found.matched_index,
        score=(found.score, found.lower, found.upper),
        overlap=(found.overlap, found.overlap_lower, found.overlap_upper),
        verdicts=found.verdicts,
    )
    lower, upper = found.cosines
    own, values, other = found.leading
    return OneSide(
        directions=directions,
        cosines_lower=lower,
        cosines_upper=upper,
        similarity=found.similarity,
        spectrum=found.spectrum,
        computed_count=len(found.base_sigma),
        passes=found.passes,
        base=(own, values, other) if side == "left" else (other, values, own),
    )


def svd_side(
    base: Base,
    shape: tuple[int, int],
    tuned: SingularTriplets,
    side: VectorSide,
    *,
    subspace: int,
    epsilon: float = DEFAULT_EPSILON,
) -> OneSide:
    """Scores of known tuned vectors, from all singular vectors of the base.

    Args:
        base: All singular values and vectors of the base.
        shape: ``(m, n)``.
        tuned: The tuned triplets; a vector of σ = 0 is arbitrary and is not judged.
        side: Which of their vectors.
        subspace: How many leading base vectors the overlap is taken with.
        epsilon: Score below which the paper counts an intruder.

    Returns:
        The verdicts of that side.
    """
    sigma = base.sigma
    Y = (tuned.u if side == "left" else tuned.v)[:, : tuned.rank]
    eigenspace = eigenspaces(sigma, shape)
    inside = base.coordinates(Y, side)[: len(eigenspace)]
    found = scores_of(inside, eigenspace, subspace)
    errors = tuned.vector_errors[: tuned.rank].to(inside)
    verdicts = [
        verdict(score, overlap, epsilon=epsilon, vector_error=error)
        for score, overlap, error in zip(
            *(x.tolist() for x in (found.score, found.subspace_overlap, errors)), strict=True
        )
    ]
    directions = _directions(
        side,
        tuned,
        matched=found.matched_index,
        score=_within(found.score, errors),
        overlap=_within(found.subspace_overlap, errors),
        verdicts=verdicts,
    )
    leading = inside[:subspace]
    return OneSide(
        directions=directions,
        cosines_lower=(cosines := torch.linalg.svdvals(leading).clamp_max(1.0)),
        cosines_upper=cosines,
        similarity=leading.abs().mT,
        spectrum=sigma,
        computed_count=len(sigma),
        passes=0,
        base=base.leading(max(LEADING, subspace) + tuned.sigma.shape[0]),
    )


def _directions(
    side: VectorSide,
    tuned: SingularTriplets,
    *,
    matched: Tensor,
    score: Estimate,
    overlap: Estimate,
    verdicts: Sequence[Verdict],
) -> list[Direction]:
    """One entry per vector, as plain numbers."""
    residuals = tuned.residuals / tuned.sigma[:1]
    columns = (tuned.sigma, residuals, matched, *score, *overlap)
    rows = zip(*(column.tolist() for column in columns), strict=False)
    return [
        Direction(
            index=i,
            sigma=sigma,
            side=side,
            score=s,
            score_lower=s_low,
            score_upper=s_high,
            matched_index=at,
            subspace_overlap=o,
            overlap_lower=o_low,
            overlap_upper=o_high,
            verdict=what,
            residual=residual,
        )
        for i, ((sigma, residual, at, s, s_low, s_high, o, o_low, o_high), what) in enumerate(
            zip(rows, verdicts, strict=False)
        )
    ]


def _within(values: Tensor, errors: Tensor) -> Estimate:
    """Values with an error on either side, in [0, 1]."""
    return values, (values - errors).clamp_min(0.0), (values + errors).clamp_max(1.0)


def count_nonzero_values(tuned: SingularTriplets) -> int:
    """How many tuned values are above zero for certain; vectors of the others are arbitrary."""
    return int((tuned.sigma > ZERO_THRESHOLD * tuned.sigma[0]).sum())


def generator_of(seed: int | None) -> torch.Generator | None:
    """A generator with this seed; None for None."""
    return None if seed is None else torch.Generator().manual_seed(seed)
