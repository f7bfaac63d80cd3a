"""The search: when to take another step, and when to pay for a factorisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bulkedge._verdict import Verdict, certain_verdict
from bulkedge.triplet import Bidiagonalization, Ritz
from bulkedge.triplet._bidiagonal import step_work
from bulkedge.triplet._rounding import ROUNDING_PROBES, Rounding, measure_rounding
from bulkedge.triplet.solver._start import Randomness, gaussian

from ._clusters import Clusters, find_clusters, presumed_complete
from ._component_bound import Reached
from ._evidence import CountBound, Evidence, Inside, Proofs, Question, collect, known_clusters
from ._factorisations import Factorisations
from ._intervals import (
    Interval,
    ScoreInterval,
    helpful_min_sigma,
    overlap_interval,
    overlaps_decide,
    score_interval,
    unsettled_at,
)

FIRST_CHECK = 3
"""After so many steps the evidence is evaluated for the first time."""
CHECK_WORK = 2.5e8
"""An evaluation costs this many operations, and some more for each cube of the basis."""
CHECK_WORK_PER_CUBE = 40.0
"""That many more: an SVD of the small matrix."""
NORM_MARGIN = 1.01
"""The search tries to prove that no singular value exceeds the largest one seen times this."""
CUT_MARGIN = 3.0
"""A count is tried only at cuts that are this many of its rounding errors from any Ritz value."""
MIN_SIGMA_FRACTION = 0.5
"""A lower bound of all singular values is tried up to the smallest one seen times this."""
MIN_SIGMA_TRIES = 6
"""After the last step so many lower bounds are tried, each lower than the one before."""
LAST_MIN_SIGMA_FRACTION = 0.95
"""After the last step bounds up to the smallest singular value seen times this are tried."""
FAILURE_PROBABILITY = 1e-9
"""A statement about a matrix is wrong with at most this probability over the random vectors."""
MEASURE_AGAIN = 2
"""The rounding is measured after this many times the steps there were when it was measured last, or
when the search could first have ended: what was assumed or measured then may be too much."""
FLOAT64_COST = 2.0
"""A pass in float64 costs that many in float32."""
FACTORISATION_SPEED = 2
"""A factorisation costs about as much as ``min(m, n) / (2 b)`` steps with a block of b."""


@dataclass(frozen=True)
class Assessment:
    """What is known of every direction from some evidence.

    Attributes:
        evidence: The evidence.
        clusters: The converged clusters of the base, and which are taken for complete.
        group_scores: The interval of the score of each group of directions.
        score: The interval of each direction, shape ``(k,)``.
        overlap: That of its overlap with the base's leading space, shape ``(k,)``.
        verdicts: The verdict on each.
    """

    evidence: Evidence
    clusters: Clusters
    group_scores: ScoreInterval
    score: Interval
    overlap: Interval
    verdicts: tuple[Verdict, ...]

    @property
    def undecided(self) -> int:
        """How many verdicts are open."""
        return self.verdicts.count(Verdict.UNDECIDED)


def assess(question: Question, evidence: Evidence, *, assume_complete: bool = False) -> Assessment:
    """The verdicts that some evidence allows.

    Args:
        question: The directions, and what is asked of them.
        evidence: The evidence.
        assume_complete: Take clusters for complete that probably are.  The assessment then says
            what could be decided if that were proved; it is for planning, not for results.

    Returns:
        The assessment.
    """
    clusters = known_clusters(evidence, assume_complete=assume_complete)
    group_scores = score_interval(question, evidence, clusters)
    by_group = group_scores.lower, group_scores.upper
    ends = (end.clamp(0.0, 1.0)[question.groups] for end in by_group)
    score, overlap = Interval(*ends), overlap_interval(question, evidence, clusters)
    # No component exceeds the score, of whatever vector of the span of a group.
    count = min(question.subspace, *evidence.shape)
    overlap = overlap._replace(upper=torch.minimum(overlap.upper, count**0.5 * score.upper))
    columns = zip(*(x.tolist() for x in (*score, *overlap)), strict=True)
    verdicts = tuple(certain_verdict(question.epsilon, *column) for column in columns)
    return Assessment(evidence, clusters, group_scores, score, overlap, verdicts)


class Search:
    """Takes steps until every verdict is the same at both ends of its interval.

    Args:
        process: The Krylov space, without a step.
        question: The directions, and what is asked of them.
        Y: The directions, shape ``(m, k)``.
        probes: The Gaussian vectors that the process began with, besides the directions.
        frobenius: ``‖W0‖_F``, or more.
        assumed_noise: How much rounding probably disturbs the recurrences: used for planning until
            it is measured.
        max_steps: Steps before the remaining directions are left undecided.
        generator: Source of the vectors that measure the rounding of space and factorisations.
    """

    def __init__(
        self,
        process: Bidiagonalization,
        question: Question,
        Y: Tensor,
        probes: Tensor,
        *,
        frobenius: float,
        assumed_noise: float,
        max_steps: int,
        generator: Randomness,
    ) -> None:
        self.process, self.question, self.probes = process, question, probes
        self.inside = Inside(process, Y)
        # where a bound was above its limit when the evidence was last evaluated
        self.reached = Reached(torch.zeros(0, dtype=torch.float64), 1.0)
        self.frobenius, self.max_steps, self.generator = frobenius, max_steps, generator
        self.rounding, self.proofs = Rounding(assumed_noise), Proofs()
        self.factorisations = Factorisations(process.map, frobenius, generator, FAILURE_PROBABILITY)
        # the smallest x for which no proof was found that every singular value exceeds it
        self.lowest_unproved_bound = float("inf")
        # the step after which the rounding was measured last, 0 before
        self.measured_at = 0
        # the first step after which proofs of completeness would decide every direction
        self.first_decidable_step = max_steps
        self.steps_per_factorisation = min(process.map.shape) // (
            FACTORISATION_SPEED * process.start_size
        )

    def run(self) -> Assessment:
        """The assessment after the last step, which rests on proofs alone."""
        step, due, looks = 0, FIRST_CHECK, []
        while True:
            self.process.extend()
            step += 1
            last = self.process.closed or step == self.max_steps
            if not last and step < due:
                continue
            found = self._check(step, last=last)
            if found is not None and (last or not found.undecided):
                return found
            looks.append((step, self.reached.excess))
            due = step + self._steps_to_wait(looks)

    def _steps_to_wait(self, looks: Sequence[tuple[int, float]]) -> int:
        """How many steps are taken before the evidence is evaluated again.

        Args:
            looks: After which steps it was, and the excess that was found.

        Returns:
            As many as the excess takes to fall to 1 at the pace of the last two, where it falls,
            but no more than there were.  Else what costs as much as an evaluation.
        """
        step, now = looks[-1]
        if len(self.reached.places):
            if len(looks) == 1:
                return 1
            earlier, before = looks[-2]
            if now < before:
                pace = math.log(before / now) / (step - earlier)
                return min(step, math.ceil(math.log(now) / pace))
        size, start = self.process.size, self.process.start_size
        evaluation = CHECK_WORK + CHECK_WORK_PER_CUBE * size**3
        return math.ceil(evaluation / step_work(self.process.map.shape, start, size))

    def _check(self, step: int, *, last: bool) -> Assessment | None:
        """What is certain after a step; a factorisation is paid for where it may settle more.

        Args:
            step: How many steps there were.
            last: Whether there are no more.

        Returns:
            The assessment; None where it is plain already that a direction stays open.
        """
        evidence = self._collect()
        if not last and not self._may_decide(evidence):
            return None
        if self.factorisations.tall and not last:
            optimistic = assess(self.question, evidence, assume_complete=True)
            if self._with_min_sigma(optimistic, tries=1, assume_complete=True).undecided:
                return None
        self.first_decidable_step = min(self.first_decidable_step, step)
        waited = step - self.first_decidable_step >= self.steps_per_factorisation
        due = step >= MEASURE_AGAIN * (self.measured_at or self.first_decidable_step)
        doubtful = not (last or waited or due) and self._measuring_costs_more()
        # by the rounding that was measured last, or assumed
        if doubtful and not self._decides(self._collect(evidence.ritz)):
            return None
        self._measure_rounding(evidence, step)
        found = assess(self.question, self._collect(evidence.ritz))
        found = self._with_min_sigma(found, tries=MIN_SIGMA_TRIES if last else 1, last=last)
        if not found.undecided or not (last or waited):
            return found
        optimistic = assess(self.question, found.evidence, assume_complete=True)
        if found.undecided > optimistic.undecided and self._prove_count(found.evidence):
            found = assess(self.question, replace(found.evidence, proofs=self.proofs))
        return found

    def _may_decide(self, evidence: Evidence) -> bool:
        """Whether every score and overlap is settled if presumed clusters are complete."""
        clusters = known_clusters(evidence, assume_complete=True)
        floor = max(evidence.proofs.min_sigma, self._provable_min_sigma())
        self.reached = unsettled_at(self.question, evidence, clusters, floor, self.reached.places)
        if len(self.reached.places):
            return False
        return self.factorisations.tall or overlaps_decide(self.question, evidence, clusters)

    def _decides(self, evidence: Evidence) -> bool:
        """Whether every score and overlap is settled by what is proved."""
        clusters = known_clusters(evidence)
        floor, nowhere = evidence.proofs.min_sigma, self.reached.places
        if len(unsettled_at(self.question, evidence, clusters, floor, nowhere).places):
            return False
        return overlaps_decide(self.question, evidence, clusters)

    def _with_min_sigma(
        self, found: Assessment, *, tries: int, assume_complete: bool = False, last: bool = False
    ) -> Assessment:
        """The assessment with a lower bound of σ_min, where one decides more and is proved.

        Args:
            found: The assessment.
            tries: How many bounds are tried, each lower than the one before.
            assume_complete: As for :func:`assess`.
            last: Whether there are no more steps, so that float64 is worth its price.

        Returns:
            The assessment with the bound, or as it was.
        """
        for _ in range(tries if self.factorisations.tall and found.undecided else 0):
            evidence, scores = found.evidence, found.group_scores
            x = helpful_min_sigma(self.question, evidence, scores, self._provable_min_sigma())
            if not x > 0 and last:
                provable = self._provable_min_sigma(LAST_MIN_SIGMA_FRACTION)
                x = helpful_min_sigma(self.question, evidence, scores, provable)
            if not x > 0:
                return found
            if self._prove_min_sigma(x, last=last):
                evidence = replace(evidence, proofs=self.proofs)
                return assess(self.question, evidence, assume_complete=assume_complete)
        return found

    def _collect(self, ritz: Ritz | None = None) -> Evidence:
        """The evidence as it is now; the Ritz vectors, if they are known."""
        return collect(
            self.process,
            self.inside,
            self.probes,
            ritz=self.process.ritz() if ritz is None else ritz,
            rounding=self.rounding,
            proofs=self.proofs,
            frobenius=self.frobenius,
            failure_probability=FAILURE_PROBABILITY,
        )

    def _measure_rounding(self, evidence: Evidence, step: int) -> None:
        """Measure what rounding has done to the space so far; every interval allows for it."""
        self.measured_at = step
        count = self.process.left.shape[1] + self.process.right.shape[1]
        drawn = gaussian(count, ROUNDING_PROBES, self.generator)
        self.rounding = measure_rounding(
            self.process, evidence.ritz, drawn, FAILURE_PROBABILITY, self.frobenius
        )

    def _measuring_costs_more(self) -> bool:
        """Whether measuring costs twice what it does to see whether the proofs are enough."""
        block = self.process.start_size + ROUNDING_PROBES
        return FLOAT64_COST * 4 * block * math.prod(self.process.map.shape) > 2 * CHECK_WORK

    def _provable_min_sigma(self, fraction: float = MIN_SIGMA_FRACTION) -> float:
        """The largest lower bound of all singular values that is worth trying to prove."""
        if not self.factorisations.tall:
            return 0.0
        return fraction * min(self.process.min_sigma_upper_bound, self.lowest_unproved_bound)

    def _prove_min_sigma(self, x: float, *, last: bool) -> bool:
        """Whether every singular value is certain to exceed x."""
        # W0ᵀ maps a vector outside the range of a tall W0 to zero, and a singular vector of a tiny
        # value nearly to zero. Products cannot distinguish the two, a factorisation can.
        holds = self.factorisations.all_exceed(x, float64=last)
        if holds:
            self.proofs = replace(self.proofs, min_sigma=x)
        else:
            self.lowest_unproved_bound = x
        return holds

    def _prove_count(self, evidence: Evidence) -> bool:
        """Try to prove how many singular values exceed a cut, from the lowest cut upwards."""
        norm = CountBound(0, NORM_MARGIN * evidence.largest_seen)
        cuts = provable_cuts(evidence, CUT_MARGIN * self.factorisations.rounding)
        for number, x in [*reversed(cuts[-2:]), norm]:
            if self.factorisations.at_most(number, x, self.process, evidence.ritz):
                counts = (*self.proofs.counts, CountBound(number, x))
                self.proofs = replace(self.proofs, counts=counts)
                return True
        return False


def provable_cuts(evidence: Evidence, distance: float) -> list[CountBound]:
    """Cuts at which a count of singular values may be proved: those below presumed clusters.

    Args:
        evidence: What is known of the base.
        distance: How far the square of the cut has to be from those of the Ritz values.

    Returns:
        The number of Ritz values above each cut, and the cut, descending.
    """
    squares = (evidence.values + evidence.rounding.noise).square()
    clusters = find_clusters(evidence.ritz, evidence.rounding)
    return [
        CountBound(each.end, each.low)
        for each in presumed_complete(clusters, evidence.probes)
        if _distance(squares, each.end, each.low**2) > distance
    ]


def _distance(squares: Tensor, count: int, x2: float) -> float:
    """How far x² is from the squares of the values above and below it."""
    below = float(squares[count]) if count < len(squares) else 0.0
    return min(float(squares[count - 1]) - x2, x2 - below)
