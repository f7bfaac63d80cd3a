"""From evidence to intervals: of the score, the overlap and the cosines, and the verdicts.

Pure functions.  Bounds hold for every unit vector in the span of a group of directions, and are
widened by the error of the directions themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bulkedge._precision import exact
from bulkedge._verdict import Verdict, certain_verdict

from ._clusters import Clusters
from ._component_bound import Maximum, Reached, maximize, reaches
from ._evidence import Evidence, Question


class Interval(NamedTuple):
    """Lower and upper bounds in [0, 1], tensors of one shape."""

    lower: Tensor
    upper: Tensor


class ScoreInterval(NamedTuple):
    """The interval of the score of each group, and the bound from above that it rests on.

    Attributes:
        lower: Shape ``(groups,)``; not clamped.
        upper: The same.
        limits: What the squared component has to stay below for the score to stay below ε.
        component: The maximum of the squared component over all base vectors.
    """

    lower: Tensor
    upper: Tensor
    limits: Tensor
    component: Maximum


def score_interval(question: Question, evidence: Evidence, clusters: Clusters) -> ScoreInterval:
    """Bounds on the score of every unit vector in the span of each group.

    Args:
        question: The directions.
        evidence: What is known of the base.
        clusters: Those of the same evidence.

    Returns:
        The interval of each group.
    """
    lower, upper = _score_by_clusters(question, evidence, clusters)
    error = _group_errors(question, evidence)
    aligned = lower - error >= question.epsilon
    # Whether the component stays below ε is asked only where the verdict is not settled.
    limits = (question.epsilon - error).clamp_min(0.0).square().masked_fill(aligned, torch.inf)
    component = _largest_component(question, evidence, limits, evidence.proofs.min_sigma)
    useless = aligned | ~component.squared.isfinite()
    upper = torch.where(useless, upper, torch.minimum(upper, component.squared.sqrt()))
    return ScoreInterval(lower - error, upper + error, limits, component)


def helpful_min_sigma(
    question: Question, evidence: Evidence, score: ScoreInterval, provable: float
) -> float:
    """A lower bound of all singular values that would decide more directions if it were proved.

    Args:
        question: The directions.
        evidence: What is known of the base.
        score: The interval of the same evidence.
        provable: The largest lower bound worth trying to prove.

    Returns:
        The bound, 0 if none would help.
    """
    places = score.component.exceeded_at.tolist()
    x = max((place for place in places if place <= provable), default=0.0)
    if not x > 0:
        return 0.0
    then = _largest_component(question, evidence, score.limits, x)
    settled = then.squared.isfinite() & ~score.component.squared.isfinite()
    return x if bool(settled.any()) else 0.0


def unsettled_at(
    question: Question,
    evidence: Evidence,
    clusters: Clusters,
    min_sigma: float,
    suspects: Tensor,
) -> Reached:
    """Where the bound from above leaves a score open, for planning.

    Args:
        question: The directions.
        evidence: What is known of the base.
        clusters: Those of the same evidence.
        min_sigma: Singular values below this do not count.
        suspects: Values of σ that are tried first.

    Returns:
        Some values of σ; none if every score is settled.
    """
    lower, upper = _score_by_clusters(question, evidence, clusters)
    error = _group_errors(question, evidence)
    asked = (lower - error < question.epsilon) & (upper + error >= question.epsilon)
    if not bool(asked.any()):
        return Reached(suspects[:0], 1.0)
    chosen = asked[question.groups]
    numbers = (asked.cumsum(0) - 1)[question.groups[chosen]]
    limits = (question.epsilon - error[asked]).clamp_min(0.0).square()
    bound = evidence.component_bound.of(chosen)
    span = _span(evidence, min_sigma)
    return reaches(bound, numbers, limits, span, suspects[suspects > min_sigma])


def overlaps_decide(question: Question, evidence: Evidence, clusters: Clusters) -> bool:
    """Whether every verdict is certain if every score is settled, for planning.

    Args:
        question: The directions.
        evidence: What is known of the base.
        clusters: Those of the same evidence.

    Returns:
        False if an overlap leaves a verdict open.
    """
    lower, _ = _score_by_clusters(question, evidence, clusters)
    aligned = lower - _group_errors(question, evidence) >= question.epsilon
    scores = exact(aligned)[question.groups]  # on which side of ε
    overlaps = overlap_interval(question, evidence, clusters)
    columns = zip(*(x.tolist() for x in (scores, scores, *overlaps)), strict=True)
    verdicts = (certain_verdict(question.epsilon, *column) for column in columns)
    return Verdict.UNDECIDED not in verdicts


def overlap_interval(question: Question, evidence: Evidence, clusters: Clusters) -> Interval:
    """Bounds on ``‖U_{2k}ᵀy‖`` for every unit vector in the span of each direction's group.

    Args:
        question: The directions.
        evidence: What is known of the base.
        clusters: Those of the same evidence.

    Returns:
        Of each direction, shape ``(k,)``.
    """
    t, groups = evidence.coordinates, question.groups
    lower = torch.zeros(question.group_count, dtype=torch.float64)
    upper = torch.ones(question.group_count, dtype=torch.float64)
    for space in _leading_spaces(question, evidence, clusters):
        smallest, largest = extreme_norms(t[: space.size], groups)
        if space.size <= question.subspace:
            lower = torch.maximum(lower, smallest - space.error)
        rest = torch.zeros_like(upper).index_add_(0, groups, space.rest.diagonal())
        upper = torch.minimum(upper, ((largest + space.error).square() + rest).sqrt())
    chord = chord_of(question.errors + evidence.rounding.defect)
    lower, upper = (end.clamp(0.0, 1.0)[groups] for end in (lower, upper))
    return Interval((lower - chord).clamp_min(0.0), (upper + chord).clamp_max(1.0))


def cosine_interval(question: Question, evidence: Evidence, clusters: Clusters) -> Interval:
    """Bounds on the cosines of the principal angles with the base's leading space.

    Args:
        question: The directions.
        evidence: What is known of the base.
        clusters: Those of the same evidence.

    Returns:
        Descending, shape ``(k,)``.
    """
    t = evidence.coordinates
    k = t.shape[1]
    lower, upper = torch.zeros(k, dtype=torch.float64), torch.ones(k, dtype=torch.float64)
    # A space that is wrong by the sine δ moves every cosine by at most δ.
    chord = chord_of(question.errors + evidence.rounding.defect)
    own = float(torch.linalg.vector_norm(chord).clamp_max(1.0))
    for space in _leading_spaces(question, evidence, clusters):
        inside = t[: space.size]
        values = torch.linalg.svdvals(inside)
        values = torch.nn.functional.pad(values, (0, k - len(values)))
        if space.size <= question.subspace:
            lower = torch.maximum(lower, values - space.error - own)
        squares = torch.linalg.eigvalsh(inside.mT @ inside + space.rest).flip(0).clamp_min(0.0)
        upper = torch.minimum(upper, squares.sqrt() + space.error + own)
    return Interval(lower.clamp(0.0, 1.0), upper.clamp(0.0, 1.0))


def extreme_norms(rows: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest norm that ``rows`` give to a unit vector of each group.

    Args:
        rows: Coordinates of orthonormal directions on some vectors, shape ``(r, k)``.
        groups: The number of the group of each direction, shape ``(k,)``.

    Returns:
        Both of shape ``(groups,)``.
    """
    sizes = torch.bincount(groups)
    norms = torch.linalg.vector_norm(rows, dim=0)
    smallest = largest = norms[sizes.cumsum(0) - 1]
    for g in (sizes > 1).nonzero().flatten().tolist():
        values = torch.linalg.svdvals(rows[:, groups == g])
        smallest, largest = smallest.clone(), largest.clone()
        largest[g] = values[0] if len(values) else 0.0
        smallest[g] = values[-1] if len(rows) >= int(sizes[g]) else 0.0
    return smallest, largest


def chord_of(sine: Tensor) -> Tensor:
    """``2 sin(θ/2)``: how far two unit vectors at the angle of this sine are apart."""
    return 2 * torch.sin(torch.asin(sine.clamp(0.0, 1.0)) / 2)


def _group_errors(question: Question, evidence: Evidence) -> Tensor:
    """How far a unit vector of each group may be from the true one, shape ``(groups,)``."""
    error = torch.zeros(question.group_count, dtype=torch.float64)
    chord = chord_of(question.errors + evidence.rounding.defect)
    return error.scatter_reduce(0, question.groups, chord, "amax")


def _score_by_clusters(
    question: Question, evidence: Evidence, clusters: Clusters
) -> tuple[Tensor, Tensor]:
    """Bounds on the score of each group by the components on converged Ritz vectors alone."""
    inside = _smallest_in_clusters(question, evidence, clusters)
    if len(inside) == 0:
        return inside.new_zeros(question.group_count), inside.new_ones(question.group_count)
    complete = torch.tensor(clusters.complete)[:, None]
    sizes = torch.tensor([each.size for each in clusters.found], dtype=torch.float64)[:, None]
    # Of a complete cluster one of its base vectors has at least the mean square.
    lower = torch.where(complete, inside / sizes.sqrt(), 0.0).amax(dim=0)
    squares = inside.square()
    # What the direction has on the vectors of one cluster, it does not have on those of another.
    return lower, (1 - squares.sum(dim=0) + squares.amax(dim=0)).clamp(0.0, 1.0).sqrt()


def _smallest_in_clusters(question: Question, evidence: Evidence, clusters: Clusters) -> Tensor:
    """The least that any unit vector of each group has in each cluster, ``(clusters, groups)``."""
    groups = question.groups
    sizes = torch.tensor([each.size for each in clusters.found], dtype=torch.long)
    t = evidence.coordinates[: int(sizes.sum())]
    owner = torch.arange(len(sizes)).repeat_interleave(sizes)
    squares = t.new_zeros(len(sizes), t.shape[1]).index_add_(0, owner, t.square())
    members = torch.bincount(groups)
    found = squares.sqrt()[:, members.cumsum(0) - 1]
    for g in (members > 1).nonzero().flatten().tolist():
        mine = t[:, groups == g].split(sizes.tolist())
        alone = torch.zeros(int(members[g]), dtype=torch.long)
        for i, rows in enumerate(mine):
            found[i, g] = extreme_norms(rows, alone)[0][0]
    errors = torch.tensor([each.error for each in clusters.found], dtype=torch.float64)
    return (found - errors[:, None]).clamp_min(0.0)


def _largest_component(
    question: Question, evidence: Evidence, limits: Tensor, min_sigma: float
) -> Maximum:
    """The largest squared component on any base vector, if no singular value is below min_sigma."""
    span = _span(evidence, min_sigma)
    squared, exceeded_at = torch.zeros_like(limits), torch.zeros_like(limits)
    asked = limits < torch.inf
    if not bool(asked.any()):
        return Maximum(squared, exceeded_at)
    chosen = asked[question.groups]
    numbers = (asked.cumsum(0) - 1)[question.groups[chosen]]
    found = maximize(evidence.component_bound.of(chosen), numbers, limits[asked], span)
    squared[asked], exceeded_at[asked] = found
    return Maximum(squared, exceeded_at)


def _span(evidence: Evidence, min_sigma: float) -> tuple[float, float, float]:
    """Where singular values may be, as :func:`maximize` takes it."""
    ritz = evidence.ritz
    residual = max(ritz.residuals.tolist(), default=0.0)  # none of a space that saw only zeros
    top = float(ritz.sigma[0]) + residual + evidence.rounding.noise
    return min_sigma, top, evidence.frobenius


class _LeadingSpace(NamedTuple):
    """A leading space of the base that Ritz vectors span.

    Attributes:
        size: How many Ritz vectors span it.
        error: Bound on the sine between the two.
        rest: A form on the directions that bounds from above what the base vectors after it, up
            to the 2k-th, add to the square of the overlap, shape ``(k, k)``.
    """

    size: int
    error: float
    rest: Tensor


def _leading_spaces(
    question: Question, evidence: Evidence, clusters: Clusters
) -> Iterator[_LeadingSpace]:
    """Leading spaces of the base that are known; each bounds the overlap with the 2k leading."""
    k, leading = evidence.coordinates.shape[1], clusters.leading
    nothing = torch.zeros(k, k, dtype=torch.float64)
    largest_inside = max((c.end for c in leading if c.end <= question.subspace), default=0)
    cuts = [(0, 0.0, clusters.norm_bound), *((c.end, c.total_error, c.low) for c in leading)]
    for size, error, cut in cuts:
        if size >= question.subspace:
            yield _LeadingSpace(size, error, nothing)
        elif size == largest_inside:  # smaller spaces say less
            for rest in _bounds_on_the_rest(question, evidence, cut):
                yield _LeadingSpace(size, error, rest)


def _bounds_on_the_rest(question: Question, evidence: Evidence, cut: float) -> Iterator[Tensor]:
    """Forms that bound the components on the base vectors between a cut and the 2k-th value."""
    values, top = evidence.values, float(evidence.ritz.sigma[0])
    last = float(values[question.subspace - 1]) if question.subspace <= len(values) else 0.0
    # The 2k-th singular value is at least the 2k-th Ritz value (Cauchy's interlacing), but for
    # rounding in the recurrences and the bases.
    slack = evidence.rounding.noise + 2 * evidence.rounding.defect * top
    low, high = last - slack, cut + slack
    bound = evidence.component_bound
    # The parts of a wide interval may together bound less than the whole.
    cells = [(parts, 2 * i + 1) for parts in (1, 2, 4) for i in range(parts)]
    parts, odd = torch.tensor(cells, dtype=torch.float64).unbind(dim=1)
    radius = (high - low) / 2 / parts
    for forms in bound.projections(low + odd * radius, radius).split([1, 2, 4]):
        yield forms.sum(dim=0)
