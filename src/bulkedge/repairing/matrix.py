"""One matrix: which of its directions are treated, how, and what that leaves of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._linmap import Dense, LowRank, frobenius
from bulkedge._precision import exact
from bulkedge.comparison import Comparison, Pair, judge_pair, load
from bulkedge.intruder import COUNTED, Direction, Judgement, Verdict
from bulkedge.records import Recipe
from bulkedge.rmt import BulkFit
from bulkedge.triplet import SingularTriplets, singular_triplet
from bulkedge.update._products import measure_further

from .corrected import corrected, in_factors
from .method import Case, Correction, Method
from .record import Treated

EXACT = 1e-9
"""Residual over σ₁ below which a triplet is not computed once more."""


@dataclass(frozen=True)
class Selection:
    """Which directions are treated.

    Attributes:
        mildest: The mildest verdict, one of ``COUNTED``; the first means any new direction.
        significance: Only those whose value noise like the base's bulk reaches with no more than
            this probability; None for any.
    """

    mildest: Verdict = COUNTED[0]
    significance: float | None = None

    def by_verdict(self, verdict: Verdict) -> bool:
        """Whether directions of a verdict are treated."""
        return verdict in COUNTED[COUNTED.index(self.mildest) :]

    def __call__(self, direction: Direction, fit: BulkFit | None) -> bool:
        """Whether a direction is treated in a matrix whose base has that bulk."""
        if self.significance is None or not self.by_verdict(direction.verdict):
            return self.by_verdict(direction.verdict)
        return fit is not None and fit.chance_of(direction.sigma) <= self.significance


@dataclass(frozen=True)
class Repair:
    """What was found for one matrix.

    Attributes:
        pair: Base and tuned matrix as they were.
        after: The same, corrected.
        correction: What was added.
        treated: The directions that were treated, of every round.
        rounds: How many rounds.
        remaining: How many directions would still be treated.
    """

    pair: Pair
    after: Pair
    correction: Correction
    treated: list[Treated]
    rounds: int
    remaining: int

    @property
    def in_factors(self) -> Correction:
        """The correction as one of what the factors add up to."""
        return in_factors(self.pair, self.correction)


def treat(comparison: Comparison, method: Method, selection: Selection, recipe: Recipe) -> Repair:
    """Find the correction of one matrix.

    Cost: what auditing it costs for each round, and k triplets to full precision.

    Args:
        comparison: Which matrix.
        method: What to do.
        selection: Which directions are to be treated.
        recipe: Of the audit that found them.

    Returns:
        The correction; nothing is written.

    Raises:
        InputError: If the method does not apply to this matrix.
    """
    pair = load(comparison, torch.device(recipe.device))
    total, treated = Correction.none(comparison.base.acts_as, pair.base.device), []
    now, rounds, turn = pair, 0, 0
    least = comparison.rounding * norm_of_update(pair)
    while True:
        judged = judge_pair(now, recipe)
        fit = _fit(judged, now)
        chosen = [row for row in judged.directions if selection(row, fit)]
        if not chosen or turn == method.rounds:
            return Repair(pair, now, total, treated, rounds, len(chosen))
        case = _case(now, judged, fit, chosen, recipe, turn)
        step = method.correct(case)
        turn += 1
        if norm_of_change(now, step) <= least:  # it could not be stored
            continue
        rounds += 1
        treated += _rows(case, chosen)
        total = total.then(step)
        now = corrected(pair, total)


def _fit(judged: Judgement, pair: Pair) -> BulkFit | None:
    """The bulk of the base; None where it has none."""
    found = measure_further(pair.base, judged.spectrum, judged.computed_count).spectrum
    return None if found is None else found.fit


def _case(
    pair: Pair,
    judged: Judgement,
    fit: BulkFit | None,
    chosen: list[Direction],
    recipe: Recipe,
    rounds: int,
) -> Case:
    """What a method needs to know."""
    wide = torch.float64
    difference = pair.update_map(wide)
    if difference is None:
        raise TypeError("expected a matrix that differs from its base")
    triplets = _exact(pair, judged)
    index = sorted({row.index for row in chosen})
    found = _matched(judged.tuned, triplets, index)
    sides = {(row.index, row.side) for row in chosen}
    return Case(
        base=pair.base_map(wide),
        tuned=pair.tuned_map(wide),
        update=difference,
        sigma=exact(triplets.sigma[found]),
        u=exact(triplets.u[:, found]),
        v=exact(triplets.v[:, found]),
        left=torch.tensor([(i, "left") in sides for i in index]),
        right=torch.tensor([(i, "right") in sides for i in index]),
        spikes=pair.spikes,
        fit=fit,
        subspace=2 * recipe.top_k,
        round=rounds,
    )


def _exact(pair: Pair, judged: Judgement) -> SingularTriplets:
    """The leading tuned triplets to float64."""
    tuned = judged.tuned
    if bool((tuned.residuals <= EXACT * tuned.sigma[0]).all()):
        return tuned
    start = (tuned.u, tuned.v)
    return singular_triplet(
        pair.tuned_map(torch.float64), len(tuned.sigma), init=start, strict=False
    )


def _matched(rough: SingularTriplets, refined: SingularTriplets, index: list[int]) -> Tensor:
    """The places of rough triplets among refined ones, whose order rounding may have changed."""
    inside = (exact(rough.u[:, index].mT) @ exact(refined.u)).abs()
    inside *= (exact(rough.v[:, index].mT) @ exact(refined.v)).abs()
    places: list[int] = []
    for row in inside:
        row[places] = -1.0
        places.append(int(row.argmax()))
    return torch.tensor(places)


def _rows(case: Case, chosen: list[Direction]) -> list[Treated]:
    """What the record says of the directions of one round."""
    index = sorted({row.index for row in chosen})
    base = (case.u * case.base.matmat(case.v)).sum(dim=0) / case.sigma
    share = dict(zip(index, base.tolist(), strict=True))
    return [
        Treated(
            round=case.round + 1,
            index=row.index,
            side=row.side,
            sigma=row.sigma,
            score=row.score,
            subspace_overlap=row.subspace_overlap,
            verdict=row.verdict,
            base_share=share[row.index],
        )
        for row in chosen
    ]


def norm_of_update(pair: Pair) -> float:
    """``‖W − W0‖_F``."""
    difference = pair.low_rank or pair.update_map()
    if difference is None:
        return 0.0
    if isinstance(difference, LowRank | Dense):  # of these it is exact, and cheap
        return difference.norm_bound()
    return frobenius(difference.to_dense())


def norm_of_change(before: Pair, correction: Correction) -> float:
    """``‖W' − W‖_F``, before it is rounded."""
    if not correction.anew:
        return LowRank(correction.X, correction.Y.mT).norm_bound()
    W = before.tuned_map(torch.float64).to_dense()
    meant = torch.addmm(exact(before.base), correction.X, correction.Y.mT)
    return frobenius(meant - W)
