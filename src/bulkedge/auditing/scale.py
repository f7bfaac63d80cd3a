"""The critical scale of one matrix, measured: judged again with its update scaled.

Where an SVD of the base costs little, it is computed once, and the secular equation gives the
leading directions of ``W0 + s ΔW`` and their scores for every s.  Elsewhere each s is judged as the
matrix itself was, by products alone: what a certificate leaves open widens the bracket.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import LowRank, Sum
from bulkedge._precision import exact
from bulkedge.comparison import Pair
from bulkedge.intruder import Judgement, judge, svd_is_cheap
from bulkedge.records import Recipe
from bulkedge.records.rows import CriticalScale, ScalePoint
from bulkedge.triplet import thin_svd
from bulkedge.update import Secular, bracket_scale

from .curve import judged_point

SAFETY = 8.0
"""The residual of a vector over the gap bounds its error; a score has to clear ε by this many."""

Probe = Callable[[float], bool | None]
Seen = list[ScalePoint]


def measured_scale(
    pair: Pair, judged: Judgement, recipe: Recipe, found: CriticalScale | None
) -> tuple[CriticalScale, Seen]:
    """The critical scale between two scales that were judged.

    Cost: about a dozen judgements of the matrix; where SVDs are cheap and the update is a product
    of factors, one SVD of the base and as many solutions of the secular equation.

    Args:
        pair: The base and its update.
        judged: What was found at s = 1.
        recipe: How many directions, which sides, which ε.
        found: What is expected, where to begin; at 1 if nothing is.

    Returns:
        The bracket, and what was judged at each scale but 1.
    """
    seen: Seen = []
    probe = _probe(pair, recipe, seen)
    at_one = _is_new(
        [row.score_lower for row in judged.directions],
        [row.score_upper for row in judged.directions],
        recipe.epsilon,
    )
    known = found or CriticalScale(expected=None)
    bracket = bracket_scale(probe, known.expected or 1.0, {1.0: at_one})
    measured = CriticalScale(
        expected=known.expected,
        aligned=known.aligned,
        low=bracket.low,
        high=bracket.high,
        undecided=bracket.undecided,
    )
    return measured, seen


def _probe(pair: Pair, recipe: Recipe, seen: Seen) -> Probe:
    """Whether a scaled update makes something new, by the cheapest way that is exact or proved."""
    shape = (pair.base.shape[0], pair.base.shape[1])
    cheap = recipe.method == "dense" or svd_is_cheap(shape, recipe.top_k)
    if cheap and pair.low_rank is not None:
        return _by_secular_equation(pair.base, pair.low_rank, recipe, seen)
    return _by_judgement(pair, recipe, "dense" if cheap else "certified", seen)


def _by_secular_equation(base: Tensor, update: LowRank, recipe: Recipe, seen: Seen) -> Probe:
    U, S, V = thin_svd(exact(base))
    k = min(recipe.top_k, *base.shape)

    def is_new(scale: float) -> bool | None:
        equation = Secular.from_svd(U, S, V, update.B, update.A, scale * update.scale)
        try:
            found = equation.triplets(k)
        except InputError:  # of lower rank at this scale: its last vectors are arbitrary
            return None
        values = equation.singular_values(min(k + 1, *base.shape))
        error = _vector_errors(values, found.residuals)
        scores = [getattr(found, f"{side}_score") for side in recipe.sides]
        seen.append(judged_point(scale, torch.cat(scores).tolist(), recipe.epsilon))
        return _is_new(
            torch.cat([score - error for score in scores]).tolist(),
            torch.cat([score + error for score in scores]).tolist(),
            recipe.epsilon,
        )

    return is_new


def _vector_errors(values: Tensor, residuals: Tensor) -> Tensor:
    """By how much the scores of the k leading vectors may be off, from residuals and gaps."""
    k = len(residuals)
    gaps = (values[:-1] - values[1:]).abs()
    above = torch.cat([gaps.new_full((1,), math.inf), gaps])[:k]
    below = torch.cat([gaps, values[-1:]])[:k]  # the last of all values ends at 0
    rounding = torch.finfo(values.dtype).eps * values[0]
    return SAFETY * (residuals + rounding) / torch.minimum(above, below)


def _by_judgement(pair: Pair, recipe: Recipe, method: str, seen: Seen) -> Probe:
    base, update, k, spikes = pair.base_map(), pair.update_map(), recipe.top_k, pair.spikes
    seed = pair.seed(recipe.seed)

    def is_new(scale: float) -> bool | None:
        if update is None:
            return False
        judged = judge(
            base,
            Sum([base, scale * update]),
            k,
            epsilon=recipe.epsilon,
            sides=recipe.sides,
            method="dense" if method == "dense" else "certified",
            dtype=pair.product_dtype,
            start=None if spikes is None else (spikes.u[:, :k], spikes.v[:, :k]),
            seed=seed,
        )
        seen.append(judged_point(scale, (row.score for row in judged.directions), recipe.epsilon))
        return _is_new(
            [row.score_lower for row in judged.directions],
            [row.score_upper for row in judged.directions],
            recipe.epsilon,
        )

    return is_new


def _is_new(lower: list[float], upper: list[float], epsilon: float) -> bool | None:
    """Whether a score is below ε for certain; False if all are above, None if it is open."""
    if any(score < epsilon for score in upper):
        return True
    return False if all(score >= epsilon for score in lower) else None
