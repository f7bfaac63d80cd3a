"""Scores of tuned vectors as rigorous intervals, without an SVD of the base.

A block Golub–Kahan process on W0, begun with the tuned vectors, gives two kinds of evidence, both
from the same small matrices:

* *from above*: no singular vector of W0, found or not, can have a larger component on y than the
  ellipsoid of :mod:`bulkedge.intruder._component_bound` leaves room for;
* *from below*: where Ritz vectors have converged, :mod:`bulkedge.intruder._clusters` says how near
  they are to singular vectors, and y's components on those are known.

The state of the space is frozen in an ``Evidence`` (:mod:`bulkedge.intruder._evidence`).  Pure
functions turn it into intervals (:mod:`bulkedge.intruder._intervals`).  A ``Search``
(:mod:`bulkedge.intruder._search`) adds steps and factorisations until the verdict on every
direction is the same at both ends of its interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import (
    DEFAULT_EPSILON,
    POSITIVE,
    SHARE,
    check_values,
    instance,
    optional,
    whole,
)
from bulkedge._linmap import MatrixLike, Scaled, as_map, remedy, times_power
from bulkedge._precision import exact, full_precision
from bulkedge._verdict import Verdict
from bulkedge.triplet import Bidiagonalization, Ritz
from bulkedge.triplet.solver._start import gaussian, seeded_by

from ._clusters import presumed_complete
from ._evidence import Question
from ._intervals import Interval, cosine_interval
from ._search import Assessment, Search
from ._spectrum import guess_spectrum

ORTHONORMALITY = 1e-3
"""YᵀY may differ from the identity by this much; rounding in single precision leaves less."""
FALSE_NORM = 1.001
"""A given ‖W0‖_F is refused as false if the largest singular value exceeds it by this factor."""
DROP_TOLERANCE = 4.0
"""Directions smaller than this are not added to the space, in units of eps ‖W0‖_F."""
LEADING = 32
"""So many leading vectors of the base are given back, where they have converged."""
MAX_SHOWN = 8
"""A certificate prints no more directions than this."""
ASSUMED_NOISE = 6.0
"""The recurrences are assumed to err by this, in the same units, until that is measured."""


@dataclass(frozen=True)
class Certificate:
    """Results for k tuned vectors; every figure is in [0, 1], every tensor of shape ``(k,)``.

    Attributes:
        lower: The score is at least this.
        upper: The score is at most this.
        score: The best guess in between: the largest component on a Ritz vector.
        matched_index: The Ritz vector that has it, 0 for the largest value; −1 without one.
        overlap_lower: The overlap ``‖U_{2k}ᵀy‖`` is at least this.
        overlap_upper: The overlap is at most this.
        overlap: The best guess in between.
        verdicts: ``UNDECIDED`` where the ends of an interval disagree.
        cosines: Lower and upper bounds of the cosines of the principal angles between the tuned
            space and the base's leading one, descending.
        similarity: |cosine| of each vector with each of the leading base vectors, as far as they
            have converged, shape ``(k, 2k)``.
        base_sigma: Leading singular values of the base, as far as they have converged.
        leading: The first of them with their left and right vectors, ``(m, q)``, ``(q,)`` and
            ``(n, q)``; no more than 32, or the subspace if that is more.
        spectrum: All singular values of the base, shape ``(min(m, n),)``: first those, then what
            the quadrature of the process makes of the rest.
        steps: Steps that were taken.
        passes: Products with W0 or its transpose.
    """

    lower: Tensor
    upper: Tensor
    score: Tensor
    matched_index: Tensor
    overlap_lower: Tensor
    overlap_upper: Tensor
    overlap: Tensor
    verdicts: tuple[Verdict, ...]
    cosines: tuple[Tensor, Tensor]
    similarity: Tensor
    base_sigma: Tensor
    leading: tuple[Tensor, Tensor, Tensor]
    spectrum: Tensor
    steps: int
    passes: int

    def __repr__(self) -> str:
        """The interval and the verdict of each direction, the first eight, without the tensors."""
        lower, upper = (1e4 * self.lower).floor() / 1e4, (1e4 * self.upper).ceil() / 1e4  # outwards
        rows = zip(lower.tolist(), upper.tolist(), self.verdicts, strict=True)
        shown = [f"{verdict.value} [{low:.4f}, {high:.4f}]" for low, high, verdict in rows]
        more = ", …" if len(shown) > MAX_SHOWN else ""
        directions = ", ".join(shown[:MAX_SHOWN])
        return f"Certificate({directions}{more}, steps={self.steps}, passes={self.passes})"


def certify(
    W0: MatrixLike,
    Y: Tensor,
    *,
    epsilon: float = DEFAULT_EPSILON,
    errors: Tensor | None = None,
    groups: Tensor | None = None,
    subspace: int | None = None,
    frobenius: float | None = None,
    max_steps: int = 25,
    probes: int = 8,
    generator: torch.Generator | None = None,
) -> Certificate:
    """Bound the intruder score of tuned left singular vectors from both sides.

    Cost: two passes over W0 a step, each with a block of at most ``k + probes`` vectors; usually 5
    to 10 steps.

    Args:
        W0: The base, shape ``(m, n)``; for right vectors give the transpose.  One in half
            precision is widened to float32, a tile at a time.
        Y: Tuned left singular vectors, orthonormal columns, shape ``(m, k)``.
        epsilon: The paper's threshold.
        errors: Bound on ``sin ∠`` between each column and the true tuned vector, shape ``(k,)``;
            for tied ones, on that of their span.  Zero if None.
        groups: The number of the group of each direction, ascending from 0: vectors of one group
            are known only as a space, and bounded as such.  If None, each is its own group.
        subspace: How many leading base vectors span the space of the overlap; 2k if None.
        frobenius: ``‖W0‖_F`` if it is known; of a map whose products cancel, its
            ``rounding_scale()``.
        max_steps: Steps before the rest is left undecided.
        probes: Random vectors to start from besides Y: they find leading base vectors to which Y
            is orthogonal, and sample the spectrum.
        generator: Source of the probes; if None, one whose seed is a digest of W0 and Y.

    Returns:
        The intervals and verdicts.

    Raises:
        InputError: If shapes do not fit, Y is not orthonormal, the base is zero or not finite, or
            all its products with Y and the probes are rounding.

    References:
        docs/certificate.md; the definition is Shuttleworth et al., arXiv:2410.21228.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> W0 = torch.randn(200, 150, generator=generator, dtype=torch.float64)
        >>> W0[0, 0] += 60.0
        >>> known = torch.linalg.svd(W0).U[:, :1]
        >>> certify(W0, known).verdicts[0].value
        'aligned'
    """
    check_values(
        "certify",
        epsilon=(epsilon, SHARE),
        subspace=(subspace, optional(whole(1))),
        frobenius=(frobenius, optional(POSITIVE)),
        max_steps=(max_steps, whole(1)),
        probes=(probes, whole(0)),
        generator=(generator, optional(instance(torch.Generator, "a torch.Generator"))),
    )
    A = as_map(W0.detach() if isinstance(W0, Tensor) else W0)
    if isinstance(W0, Tensor) and A.dtype in (torch.float16, torch.bfloat16):
        A = A.to(torch.float32)
    defect = _require_orthonormal(Y, A.shape[0])
    Y = Y.detach()
    _require_errors(errors, Y.shape[1])
    _require_groups(groups, Y.shape[1])
    size = A.rounding_scale() if frobenius is None else frobenius
    power = _power(size, A.dtype)
    if power:  # the squares and fourth powers on the way would be zero or infinite
        found = certify(
            Scaled(A, 2.0**-power),
            Y,
            epsilon=epsilon,
            errors=errors,
            groups=groups,
            subspace=subspace,
            frobenius=times_power(size, -power),
            max_steps=max_steps,
            probes=probes,
            generator=generator,
        )
        return _times_power_of_two(found, power)
    (m, k), unit = Y.shape, size * torch.finfo(A.dtype).eps
    random = generator or seeded_by(A, Y)
    drawn = gaussian(m, max(min(probes, min(A.shape) - k), 0), random)
    block = torch.cat([Y.to(A.device, A.dtype), drawn.to(A.device, A.dtype)], dim=1)
    known = torch.zeros(k, dtype=torch.float64) if errors is None else exact(errors).cpu()
    with torch.no_grad(), full_precision(A.device):
        process = Bidiagonalization(A, torch.linalg.qr(block).Q, DROP_TOLERANCE * unit)
        question = Question(
            epsilon=epsilon,
            errors=known + _outside(Y, process.after) + defect,
            groups=torch.arange(k) if groups is None else groups.cpu(),
            subspace=2 * k if subspace is None else subspace,
        )
        found = Search(
            process,
            question,
            Y,
            drawn,
            frobenius=size,
            assumed_noise=ASSUMED_NOISE * unit,
            max_steps=max_steps,
            generator=random,
        ).run()
        if not len(found.evidence.values):
            raise InputError(
                "expected a base whose products with Y and the probes exceed rounding, got none: "
                "give more probes; or, if it is a sum of maps that cancel, the sum in float64"
            )
        largest = float(found.evidence.ritz.sigma[0])
        if largest > FALSE_NORM * size:
            raise InputError(
                f"expected frobenius to be ‖W0‖_F, got {size:.3g}, less than its largest singular "
                f"value {largest:.3g}; leave it out"
            )
        return _certificate(question, found, process)


def _require_orthonormal(Y: Tensor, rows: int) -> float:
    """``‖YᵀY − I‖_F``; InputError if it is not small, or Y is no block of vectors for the base."""
    if not isinstance(Y, Tensor) or not Y.is_floating_point():
        got = Y.dtype if isinstance(Y, Tensor) else type(Y).__name__
        raise InputError(f"expected Y as a tensor of real vectors, got {got}; convert it first")
    if Y.ndim != 2 or Y.shape[0] != rows or Y.shape[1] == 0:
        raise InputError(f"expected vectors of shape ({rows}, k ≥ 1), got {tuple(Y.shape)}")
    wide = exact(Y)
    eye = torch.eye(Y.shape[1]).to(wide)
    defect = float(torch.linalg.matrix_norm(wide.mT @ wide - eye))
    if not defect < ORTHONORMALITY:
        raise InputError(
            f"expected orthonormal columns, got ‖YᵀY − I‖ = {defect:.2g}; give torch.linalg.qr(Y).Q"
        )
    return defect


def _require_errors(errors: Tensor | None, k: int) -> None:
    """InputError unless errors are k sines."""
    if errors is None:
        return
    fits = isinstance(errors, Tensor) and errors.is_floating_point() and errors.shape == (k,)
    if not fits or not bool(((errors >= 0) & errors.isfinite()).all()):
        raise InputError(f"expected errors as a tensor of {k} numbers ≥ 0, got {errors!r:.60}")


def _require_groups(groups: Tensor | None, k: int) -> None:
    """InputError unless groups are numbered from 0 in ascending order, none left out."""
    if groups is None:
        return
    fits = isinstance(groups, Tensor) and not groups.is_floating_point() and groups.shape == (k,)
    steps = groups.diff() if fits else None
    if steps is None or int(groups[0]) != 0 or not bool(((steps == 0) | (steps == 1)).all()):
        raise InputError(
            f"expected groups as a tensor of {k} integers that ascend from 0, got {groups!r:.60}"
        )


def _power(size: float, dtype: torch.dtype) -> int:
    """The power of two to divide a base of this norm by, so that its fourth power is a number.

    Returns:
        The exponent, within what a float can hold; 0 where nothing is to be done.

    Raises:
        InputError: If the norm is zero or not finite.
    """
    if size == 0:
        raise InputError(
            "expected a base other than zero, got one whose entries are all zero: it has no "
            "singular vectors to compare with; leave the matrix out"
        )
    if not math.isfinite(size):
        raise InputError(
            f"expected a base of finite norm, got {size}; look for NaN and Inf in it, or "
            f"{remedy(torch.float64)}"
        )
    limits = torch.finfo(dtype)
    inside = limits.tiny**0.25 < size < limits.max**0.25
    return 0 if inside else min(max(math.frexp(size)[1], -1000), 1000)


def _times_power_of_two(found: Certificate, power: int) -> Certificate:
    """The certificate of a base that is larger by a power of two: its values are, nothing else."""
    left, sigma, right = found.leading
    return replace(
        found,
        base_sigma=times_power(found.base_sigma, power),
        leading=(left, times_power(sigma, power), right),
        spectrum=times_power(found.spectrum, power),
    )


def _outside(Y: Tensor, block: Tensor) -> Tensor:
    """How far each column is from the span of a block with orthonormal columns."""
    Y, block = exact(Y.to(block.device)), exact(block)
    return torch.linalg.vector_norm(Y - block @ (block.mT @ Y), dim=0).cpu()


def _certificate(question: Question, found: Assessment, process: Bidiagonalization) -> Certificate:
    """The intervals of a search, best guesses inside them, and the spectrum of the base."""
    evidence, t, subspace = found.evidence, found.evidence.coordinates, question.subspace
    best, index = t[: len(evidence.values)].abs().max(dim=0)
    overlap = torch.linalg.vector_norm(t[:subspace], dim=0)
    known = _converged_values(found)
    return Certificate(
        lower=found.score.lower,
        upper=found.score.upper,
        score=_within(best, found.score),
        matched_index=index,
        overlap_lower=found.overlap.lower,
        overlap_upper=found.overlap.upper,
        overlap=_within(overlap, found.overlap),
        verdicts=found.verdicts,
        cosines=cosine_interval(question, evidence, found.clusters),
        similarity=t[:subspace].abs().mT,
        base_sigma=evidence.ritz.sigma[:known],
        leading=_leading(process, evidence.ritz, min(known, max(LEADING, subspace))),
        spectrum=guess_spectrum(
            evidence.ritz,
            known,
            evidence.shape,
            t.shape[1],
            evidence.start_size,
            evidence.frobenius,
        ),
        steps=process.passes // 2,
        passes=process.passes + process.check_passes,
    )


def _leading(process: Bidiagonalization, ritz: Ritz, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading Ritz triplets, in float64."""
    left, right = (
        basis @ small[:, :count].to(basis)
        for basis, small in ((process.left, ritz.left), (process.right, ritz.right))
    )
    return exact(left), ritz.sigma[:count], exact(right)


def _converged_values(found: Assessment) -> int:
    """How many leading Ritz values are singular values, probably or for certain."""
    clusters = found.clusters
    presumed = presumed_complete(clusters.found, found.evidence.probes)
    return max((cluster.end for cluster in (*presumed, *clusters.leading)), default=0)


def _within(guess: Tensor, interval: Interval) -> Tensor:
    """The point of the interval that is nearest to the guess."""
    return torch.minimum(torch.maximum(guess, interval.lower), interval.upper)
