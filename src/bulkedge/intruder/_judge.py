"""The leading tuned directions of one matrix, judged against its base.

*Certified*: the k leading tuned triplets by block Golub–Kahan bidiagonalisation, then intervals on
their scores (:func:`bulkedge.intruder.certify`).  Products are taken in single precision (in double
for a base stored so); their rounding is part of every bound.

*Dense*: decompositions of both matrices in float64, for small ones, and where an interval leaves a
verdict open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import DEFAULT_EPSILON, POSITIVE_SHARE, check_values, whole
from bulkedge._linmap import Dense, LinearMap, MatrixLike, as_map
from bulkedge._precision import exact
from bulkedge._verdict import Verdict
from bulkedge.triplet import (
    GolubKahan,
    SingularTriplets,
    Status,
    singular_triplet,
)
from bulkedge.triplet._bidiagonal import step_work
from bulkedge.triplet.solver._start import seeded_by

from ._dense import Base, Remember, compute_anew, factor_base, leading_triplets
from ._search import CHECK_WORK_PER_CUBE
from ._side import (
    ZERO_THRESHOLD,
    Direction,
    OneSide,
    certified_side,
    count_nonzero_values,
    generator_of,
    svd_side,
)
from ._spectrum import all_values
from .score import VectorSide

DecidingMethod = Literal["certified", "dense"]

DENSE_WORK = 6.0
"""Decompositions of base and tuned matrix cost this many times the cube of the shorter side, in the
operations that :attr:`Bidiagonalization.work` counts."""
DENSE_UP_TO = 768
"""Decompositions of base and tuned matrix cost no more than a certificate up to this length of the
shorter side."""
ALL_VALUES_UP_TO = 512
"""All singular values of the base are computed up to this length of the shorter side."""
VECTOR_TOL = 5e-3
"""The tuned vectors are computed to this sine of the angle, which widens every interval."""
MAX_STEPS = 40
"""The search for the tuned vectors takes no more steps than this."""
SIDE_STEPS = 25
"""The search for what the base has of them takes no more steps than this."""
PROBES = 8
"""This many random vectors prove that no tuned vector was missed."""
FAILURE_PROBABILITY = 1e-9
"""A tuned vector is missed with at most this probability, whatever the matrix."""


@dataclass(frozen=True)
class Judgement:
    """The results for one matrix.

    Attributes:
        tuned: The leading tuned triplets, in float64.
        sides: The results for each requested side.
        method: Whether a certificate or SVDs decided.
        spectrum: Singular values of the base, descending, shape ``(min(m, n),)``.
        computed_count: How many leading ones of them are computed; a quadrature gives the others.
        passes: Products with the base, the tuned matrix, or their transposes.
        note: Why SVDs decided although a certificate was tried first; None otherwise.
    """

    tuned: SingularTriplets
    sides: Mapping[VectorSide, OneSide]
    method: DecidingMethod
    spectrum: Tensor
    computed_count: int
    passes: int
    note: str | None = None

    @property
    def norm(self) -> float:
        """``‖W0‖₂``."""
        return float(self.spectrum[0])

    @property
    def base(self) -> tuple[Tensor, Tensor, Tensor]:
        """Leading left vectors, values and right vectors of the base, as far as they are known."""
        return next(iter(self.sides.values())).base

    @property
    def directions(self) -> list[Direction]:
        """The directions of all sides."""
        return [direction for side in self.sides.values() for direction in side.directions]

    @property
    def undecided(self) -> int:
        """How many directions are undecided."""
        return sum(direction.verdict is Verdict.UNDECIDED for direction in self.directions)


def svd_is_cheap(shape: Sequence[int], k: int) -> bool:
    """Whether SVDs of a matrix cost less than the products of a certificate of k directions."""
    return min(shape) <= max(DENSE_UP_TO, 4 * k)


def affordable_steps(shape: tuple[int, int], k: int) -> int | None:
    """How many steps of a search cost half as much as the SVDs that decide where it does not.

    Two searches, for the tuned vectors and in the base, then cost no more than the SVDs, so that
    both together are at most twice as dear as the better way would have been.

    Args:
        shape: ``(m, n)``.
        k: How many directions are judged.

    Returns:
        The number of steps; None where it is beyond what a search takes anyway.
    """
    p, block = min(shape), k + PROBES
    left = DENSE_WORK / 2 * p**3 + shape[0] * shape[1] * p
    for step in range(1, MAX_STEPS):
        left -= (
            step_work(shape, block, step * block) + CHECK_WORK_PER_CUBE * (step * block) ** 3 / 2
        )
        if left < 0:
            return step
    return None


def judge(
    W0: MatrixLike,
    W: MatrixLike,
    k: int = 10,
    *,
    epsilon: float = DEFAULT_EPSILON,
    sides: Sequence[VectorSide] = ("left",),
    method: Literal["auto", "certified", "dense"] = "auto",
    dtype: torch.dtype = torch.float32,
    start: tuple[Tensor, Tensor] | None = None,
    seed: int | None = None,
    remember: Remember = compute_anew,
) -> Judgement:
    """Judge the k leading tuned directions by the cheapest method that decides them.

    Cost: some 15 to 30 products with W0 or W, each with a block of k + 8 vectors; two float64 SVDs
    for small matrices, and if a verdict stays open.

    Args:
        W0: The base, shape ``(m, n)``.
        W: The tuned matrix, of the same shape.
        k: How many leading directions are judged; fewer where the rank is smaller.
        epsilon: Score below which the paper counts an intruder.
        sides: Singular vectors that are compared.
        method: ``"certified"`` leaves verdicts open rather than compute SVDs; ``"dense"`` computes
            them at once.
        dtype: The dtype of the certificate's products.
        start: Start vectors for the search of the tuned ones, ``(m, j)`` and ``(n, j)``.
        seed: Of the random vectors.
        remember: Where the base's SVD and values are kept, if several matrices are judged against
            it.

    Returns:
        The verdicts with their intervals, and what was learnt about the base.

    Raises:
        InputError: If a setting makes no sense, the shapes differ, or an entry is not finite.

    References:
        Shuttleworth et al., arXiv:2410.21228.

    Example:
        >>> W0 = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).double()
        >>> W = W0 + 50 * torch.eye(40, 30).double()[:, :1] @ torch.eye(30).double()[:1]
        >>> judge(W0, W, 1).directions[0].verdict.value
        'intruder'
    """
    check_values("judge", k=(k, whole(1)), epsilon=(epsilon, POSITIVE_SHARE))
    if method not in ("auto", "certified", "dense") or not set(sides) <= {"left", "right"}:
        raise InputError(
            "expected method 'auto', 'certified' or 'dense' and sides of 'left' and 'right', got "
            f"{method!r:.40} and {sides!r:.40}"
        )
    W0, W = as_map(W0), as_map(W)
    if W.shape != W0.shape:
        raise InputError(f"expected two matrices of one shape, got {W0.shape} and {W.shape}")
    if method == "dense" or (method == "auto" and svd_is_cheap(W0.shape, k)):
        return by_svds(W0, W, k, epsilon=epsilon, sides=sides, remember=remember)
    most = affordable_steps(W0.shape, k) if method == "auto" else None
    found, spent = by_products(
        W0,
        W,
        k,
        epsilon=epsilon,
        sides=sides,
        dtype=dtype,
        start=start,
        seed=seed,
        most=most,
        remember=remember,
    )
    if found is None:
        why = "the leading tuned values were not distinguished from zero or not found"
    elif method == "certified" or not found.undecided:
        return found
    else:
        why = f"the certificate left {found.undecided} directions open"
    judged = by_svds(W0, W, k, epsilon=epsilon, sides=sides, remember=remember)
    return replace(judged, passes=judged.passes + spent, note=f"{why}: decided by dense SVDs")


def by_products(
    W0: LinearMap,
    W: LinearMap,
    k: int,
    *,
    epsilon: float = DEFAULT_EPSILON,
    sides: Sequence[VectorSide] = ("left",),
    dtype: torch.dtype = torch.float32,
    start: tuple[Tensor, Tensor] | None = None,
    seed: int | None = None,
    most: int | None = None,
    remember: Remember = compute_anew,
) -> tuple[Judgement | None, int]:
    """Intervals from products alone; see :func:`judge`, where ``most`` is a number of steps.

    Returns:
        The judgement, or None where products do not determine the leading triplets; and how many
        products it took.
    """
    W, A = W.to(dtype), W0.to(dtype)
    size, limits = A.norm_bound(), torch.finfo(dtype)
    if not limits.tiny**0.25 < size < limits.max**0.25:  # its powers are zero or infinite
        return None, 0
    solver = GolubKahan(
        vector_tol=VECTOR_TOL,
        max_steps=MAX_STEPS if most is None else min(most, MAX_STEPS),
        oversample=PROBES,
        failure_probability=FAILURE_PROBABILITY,
        restart=most is None,
        foresee=True,
    )
    begun = None if start is None else _like(start, W)
    tuned = singular_triplet(
        W,
        min(k, *W.shape),
        solver=solver,
        init=begun,
        generator=generator_of(seed),
        strict=False,
    )
    if tuned.status is not Status.CONVERGED or not bool(
        tuned.sigma[-1] > ZERO_THRESHOLD * tuned.sigma[0]
    ):
        return None, tuned.passes
    judged: dict[VectorSide, OneSide] = {
        side: certified_side(
            A,
            tuned,
            side,
            subspace=2 * k,
            epsilon=epsilon,
            frobenius=size,
            max_steps=SIDE_STEPS if most is None else min(most, SIDE_STEPS),
            seed=seed,
        )
        for side in sides
    }
    first = judged[sides[0]]
    spectrum, computed_count = first.spectrum, first.computed_count
    if min(W.shape) <= ALL_VALUES_UP_TO:
        spectrum = remember("values", lambda: all_values(W0).cpu())
        computed_count = len(spectrum)
    passes = tuned.passes + sum(side.passes for side in judged.values())
    judgement = Judgement(_in_double(tuned), judged, "certified", spectrum, computed_count, passes)
    return judgement, passes


def by_svds(
    W0: LinearMap,
    W: LinearMap,
    k: int,
    *,
    epsilon: float = DEFAULT_EPSILON,
    sides: Sequence[VectorSide] = ("left",),
    remember: Remember = compute_anew,
) -> Judgement:
    """Float64 SVDs of both matrices; see :func:`judge`."""
    W0, W = W0.to(torch.float64), W.to(torch.float64)
    base: Base = remember("factors", lambda: factor_base(W0, remember))
    tuned = leading_triplets(W, min(k, *W.shape), base)
    judged: dict[VectorSide, OneSide] = {
        side: svd_side(base, W0.shape, tuned, side, subspace=2 * k, epsilon=epsilon)
        for side in sides
    }
    sigma = base.sigma
    return Judgement(tuned, judged, "dense", sigma.cpu(), len(sigma), tuned.passes + 1)


def judge_vectors(
    W0: LinearMap,
    tuned: SingularTriplets,
    side: VectorSide,
    *,
    subspace: int,
    epsilon: float = DEFAULT_EPSILON,
) -> list[Direction]:
    """Judge tuned vectors that are already known, for example of a matrix in training.

    A small base in memory is decomposed, which costs less than the products; a verdict that a
    certificate leaves open stays open.

    Args:
        W0: The base.
        tuned: The tuned triplets; those with a σ below a thousandth of σ₁ are indistinguishable
            from zero and left out.
        side: Which of their vectors.
        subspace: How many leading base vectors the overlap is taken with.
        epsilon: Score below which the paper counts an intruder.

    Returns:
        One entry per vector that was judged.
    """
    if (count := count_nonzero_values(tuned)) == 0:
        return []
    if min(W0.shape) <= DENSE_UP_TO and isinstance(W0, Dense):
        base, known = factor_base(W0.to(torch.float64)), _first(tuned, count)
        found = svd_side(base, W0.shape, known, side, subspace=subspace, epsilon=epsilon)
    else:
        # from the vectors alone: a digest of the base would take it from its device at every look
        seed = int(seeded_by(tuned.u, tuned.v).integers(2**63))
        found = certified_side(W0, tuned, side, subspace=subspace, epsilon=epsilon, seed=seed)
    return found.directions


def _first(tuned: SingularTriplets, count: int) -> SingularTriplets:
    """The first few of some triplets."""
    return replace(
        tuned,
        sigma=tuned.sigma[:count],
        u=tuned.u[:, :count],
        v=tuned.v[:, :count],
        residuals=tuned.residuals[:count],
        gaps=tuned.gaps[:count],
    )


def _like(start: tuple[Tensor, Tensor], W: LinearMap) -> tuple[Tensor, Tensor]:
    """Vectors in the dtype and on the device of the products of a map."""
    u, v = start
    return u.to(W.device, W.dtype), v.to(W.device, W.dtype)


def _in_double(tuned: SingularTriplets) -> SingularTriplets:
    """The same triplets in float64."""
    return replace(tuned, sigma=exact(tuned.sigma), u=exact(tuned.u), v=exact(tuned.v))
