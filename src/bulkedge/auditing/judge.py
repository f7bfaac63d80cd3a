"""The directions of one matrix: certified from a few products with it, or by two dense SVDs.

*Certified*: the k leading tuned triplets by block Golub–Kahan bidiagonalisation, then intervals on
their scores (:func:`bulkedge.intruder.certify`).  Products are taken in the dtype of the weights,
half precision in float32; the rounding is part of every bound.

*Dense*: float64 SVDs of both matrices.  For small matrices, and where an interval leaves a verdict
open.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bulkedge.comparison.pair import Pair
from bulkedge.intruder import (
    HALF_THE_ENERGY,
    Certificate,
    Scores,
    Verdict,
    base_vectors,
    certify,
    scores,
    ties,
    verdict,
)
from bulkedge.records.recipe import Recipe
from bulkedge.records.rows import Angles, Direction
from bulkedge.triplet import (
    DenseSVD,
    GolubKahan,
    SingularTriplets,
    Status,
    singular_triplet,
    thin_svd,
)

Side = Literal["left", "right"]

SMALL = 384
"""Shorter side up to which two dense SVDs cost less than the passes."""
VALUES = 512
"""Shorter side up to which all singular values of the base are computed, for its bulk."""
TILE = 2048
"""Of how many rows or columns at a time."""
ANGLE = 5e-3
"""To what sine the tuned vectors are sought; it widens every interval."""
STEPS = 40
"""Of the search for the tuned vectors, at most."""
PROBES = 8
"""Random vectors that prove that no tuned vector was missed."""
MISSED = 1e-9
"""With which probability one is, whatever the matrix."""
LEAST = 1e-3
"""Below this part of σ₁ a leading tuned value is not told from zero in single precision."""


@dataclass(frozen=True)
class Judged:
    """What was found of one matrix.

    Attributes:
        tuned: The leading tuned triplets.
        directions: A row a direction and side.
        angles: A row a side.
        spectrum: Singular values of the base, descending, shape ``(min(m, n),)``.
        exact: How many of them are computed; those after are from the quadrature of the
            certificate.
        passes: Products with the base, the tuned matrix, or their transposes.
        norm: ``‖W0‖₂``.
    """

    tuned: SingularTriplets
    directions: list[Direction]
    angles: list[Angles]
    spectrum: Tensor
    exact: int
    passes: int

    @property
    def norm(self) -> float:
        """``‖W0‖₂``."""
        return float(self.spectrum[0])

    @property
    def undecided(self) -> bool:
        """Whether a verdict is open."""
        return any(direction.verdict is Verdict.UNDECIDED for direction in self.directions)


def judge(pair: Pair, recipe: Recipe) -> tuple[Judged, str | None]:
    """The directions of one matrix by the cheapest method that decides them.

    Args:
        pair: Base and tuned matrix.
        recipe: How many, which sides, which method.

    Returns:
        What was found; and why it took a dense SVD, if that was not the plan.
    """
    small = min(pair.base.shape) <= max(SMALL, 4 * recipe.top_k)
    if recipe.method == "dense" or (recipe.method == "auto" and small):
        return dense(pair, recipe), None
    found, spent = _try_certified(pair, recipe)
    if found is None:
        why = "the leading tuned values were not told apart from zero or not found"
    elif recipe.method == "certified" or not found.undecided:
        return found, None
    else:
        open_ = sum(direction.verdict is Verdict.UNDECIDED for direction in found.directions)
        why = f"the certificate left {open_} directions open"
    judged = dense(pair, recipe)
    return replace(judged, passes=judged.passes + spent), f"{why}: decided by dense SVDs"


def certified(pair: Pair, recipe: Recipe) -> Judged | None:
    """Intervals from products alone; None where they are not to be had that way."""
    return _try_certified(pair, recipe)[0]


def _try_certified(pair: Pair, recipe: Recipe) -> tuple[Judged | None, int]:
    """The same, and the products that it took, in vain or not."""
    dtype = torch.float64 if pair.base.dtype is torch.float64 else torch.float32
    W, W0 = pair.tuned_map(dtype), pair.base_map(dtype)
    size, limits = W0.norm_bound(), torch.finfo(dtype)
    if not limits.tiny**0.25 < size < limits.max**0.25:  # its powers are zero or infinite
        return None, 0
    k = min(recipe.top_k, *W.shape)
    spikes = pair.spikes  # of a low-rank update: where to begin
    start = None if spikes is None else (spikes.u[:, :k].to(dtype), spikes.v[:, :k].to(dtype))
    solver = GolubKahan(
        vector_tol=ANGLE, max_steps=STEPS, oversample=PROBES, failure_probability=MISSED
    )
    tuned = singular_triplet(
        W, k, solver=solver, init=start, generator=_generator(pair, recipe), strict=False
    )
    if tuned.status is not Status.CONVERGED or not bool(tuned.sigma[-1] > LEAST * tuned.sigma[0]):
        return None, tuned.passes
    groups, errors = ties(tuned)
    directions, angles, found, passes = [], [], [], tuned.passes
    for side in recipe.sides:
        A, Y = (W0, tuned.u) if side == "left" else (W0.T, tuned.v)
        certificate = certify(
            A,
            Y,
            epsilon=recipe.epsilon,
            errors=errors,
            groups=groups,
            subspace=2 * recipe.top_k,
            frobenius=size,
            generator=_generator(pair, recipe),
        )
        directions += _certified_rows(side, tuned, certificate)
        angles.append(_angles(side, *certificate.cosines, certificate.similarity))
        passes += certificate.passes
        found.append(certificate)
    tuned = replace(tuned, sigma=tuned.sigma.double(), u=tuned.u.double(), v=tuned.v.double())
    spectrum, exact = found[0].spectrum, len(found[0].base_sigma)
    if min(W.shape) <= VALUES:
        spectrum = _singular_values(pair.base).cpu()
        exact = len(spectrum)
    return Judged(tuned, directions, angles, spectrum, exact, passes), passes


def dense(pair: Pair, recipe: Recipe) -> Judged:
    """Float64 SVDs of the base and, where iteration stops short, of the tuned matrix."""
    wide = torch.float64
    W = pair.tuned_map(wide)
    tuned = singular_triplet(W, min(recipe.top_k, *W.shape), solver=DenseSVD())
    U, S, V = thin_svd(pair.base.to(wide))
    directions, angles = [], []
    for side in recipe.sides:
        vectors, Y = (U, tuned.u) if side == "left" else (V, tuned.v)
        known = base_vectors(vectors, S, tuple(pair.base.shape))
        result = scores(Y, known, 2 * recipe.top_k)
        directions += _dense_rows(side, tuned, result, recipe)
        inside = known.vectors[:, : 2 * recipe.top_k].mT @ Y[:, : tuned.rank]
        cosines = torch.linalg.svdvals(inside).clamp_max(1.0)
        angles.append(_angles(side, cosines, cosines, inside.abs().mT))
    return Judged(tuned, directions, angles, S.cpu(), len(S), tuned.passes + 1)


def _singular_values(matrix: Tensor) -> Tensor:
    """All singular values in float64, without a copy of the matrix in float64."""
    # R of [R of the rows so far; the next rows] is R of them all, as stable as one QR of the whole
    # (Demmel et al., arXiv:0808.2664)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    R = tall.new_zeros(0, tall.shape[1], dtype=torch.float64)
    for rows in tall.split(TILE):
        R = torch.linalg.qr(torch.cat([R, rows.double()]), mode="r").R
    return torch.linalg.svdvals(R)


def update_norm(pair: Pair, recipe: Recipe) -> float:
    """``‖W − W0‖₂``, to six digits: its error is quadratic in the residual."""
    if pair.low_rank is not None:
        return float(pair.low_rank.singular_values()[0])
    update = pair.update_map()
    if update is None:
        return 0.0
    solver, generator = GolubKahan(rtol=1e-3), _generator(pair, recipe)
    return float(singular_triplet(update, 1, solver=solver, generator=generator).sigma[0])


def _generator(pair: Pair, recipe: Recipe) -> torch.Generator:
    """Randomness that whoever made the update could not know before it was made."""
    return torch.Generator().manual_seed(pair.seed(recipe.seed))


def _certified_rows(side: Side, tuned: SingularTriplets, found: Certificate) -> list[Direction]:
    """The rows of one side, from a certificate."""
    columns = (
        found.score, found.lower, found.upper, found.matched_index,
        found.overlap, found.overlap_lower, found.overlap_upper,
    )  # fmt: skip
    return [
        _row(side, tuned, i, values, found.verdicts[i], "certified")
        for i, values in enumerate(zip(*(column.tolist() for column in columns), strict=True))
    ]


def _dense_rows(
    side: Side, tuned: SingularTriplets, found: Scores, recipe: Recipe
) -> list[Direction]:
    """The rows of one side, from all base vectors; σ = 0 has arbitrary vectors and gets no row."""
    errors = tuned.vector_errors.tolist()
    rows = []
    for i in range(tuned.rank):
        score, overlap = float(found.score[i]), float(found.subspace_overlap[i])
        what = verdict(score, overlap, epsilon=recipe.epsilon, vector_error=errors[i])
        values = (score, *_around(score, errors[i]), int(found.matched_index[i]))
        values += (overlap, *_around(overlap, errors[i]))
        rows.append(_row(side, tuned, i, values, what, "dense"))
    return rows


def _around(value: float, error: float) -> tuple[float, float]:
    return max(value - error, 0.0), min(value + error, 1.0)


def _row(
    side: Side,
    tuned: SingularTriplets,
    i: int,
    values: tuple[float, ...],
    what: Verdict,
    method: Literal["certified", "dense"],
) -> Direction:
    score, lower, upper, index, overlap, overlap_lower, overlap_upper = values
    return Direction(
        index=i,
        sigma=float(tuned.sigma[i]),
        side=side,
        score=score,
        score_lower=lower,
        score_upper=upper,
        matched_index=int(index),
        subspace_overlap=overlap,
        overlap_lower=overlap_lower,
        overlap_upper=overlap_upper,
        verdict=what,
        method=method,
        residual=float(tuned.residuals[i] / tuned.sigma[0]),
    )


def _angles(side: Side, lower: Tensor, upper: Tensor, similarity: Tensor) -> Angles:
    """The principal angles of one side, and how many of them are wide."""
    outside, inside = int((upper < HALF_THE_ENERGY).sum()), int((lower >= HALF_THE_ENERGY).sum())
    return Angles(
        side=side,
        cosines_lower=lower.tolist(),
        cosines_upper=upper.tolist(),
        similarity=[[round(x, 3) for x in row] for row in similarity.tolist()],
        outside=outside,
        undecided=len(lower) - outside - inside,
    )
