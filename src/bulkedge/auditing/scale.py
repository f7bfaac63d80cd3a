"""The critical scale of one matrix, measured: judged again with its update scaled.

Each scale is judged as the matrix itself was: where decompositions cost little by them, the base's
once for all scales, elsewhere by products alone.  What a certificate leaves open widens the
bracket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from bulkedge._linmap import LinearMap, LowRank, Sum
from bulkedge.comparison import Pair
from bulkedge.intruder import Judgement, Remember, judge, svd_is_cheap
from bulkedge.records import Recipe
from bulkedge.records.rows import CriticalScale, ScalePoint
from bulkedge.update import ScaledDirections, bracket_scale

from .curve import judged_point


def measured_scale(
    pair: Pair,
    judged: Judgement,
    recipe: Recipe,
    found: CriticalScale | None,
    remember: Remember,
) -> tuple[CriticalScale, list[ScalePoint]]:
    """The critical scale between two scales that were judged.

    Cost: some 10 to 25 judgements, of which each costs less than the first where SVDs are cheap.

    Args:
        pair: The base and its update.
        judged: What was found at s = 1.
        recipe: How many directions, which sides, which ε.
        found: What is expected, where to begin; at 1 if nothing is.
        remember: Where what is computed of the base is kept.

    Returns:
        The bracket, and what was judged at each scale but 1.
    """
    seen: list[ScalePoint] = []
    cheap = recipe.method == "dense" or svd_is_cheap(pair.base.shape, recipe.top_k)
    known, kept = found or CriticalScale(expected=None), _kept(remember)

    def look(scale: float) -> ScaledDirections:
        at_scale = _judge(pair, recipe, scale, kept, dense=cheap)
        scores = (row.score for row in at_scale.directions)
        seen.append(judged_point(scale, scores, recipe.epsilon))
        return _directions(at_scale)

    bracket = bracket_scale(
        look,
        known.expected or 1.0,
        {1.0: _directions(judged)},
        epsilon=recipe.epsilon,
    )
    measured = CriticalScale(
        expected=known.expected,
        aligned=known.aligned,
        low=bracket.low,
        high=bracket.high,
        undecided=bracket.undecided,
    )
    return measured, seen


def _kept(remember: Remember) -> Remember:
    """The same, which computes nothing twice."""
    known: dict[str, Any] = {}

    def kept(what: str, compute: Callable[[], Any]) -> Any:
        if what not in known:
            known[what] = remember(what, compute)
        return known[what]

    return kept


def _judge(pair: Pair, recipe: Recipe, scale: float, remember: Remember, dense: bool) -> Judgement:
    """The leading directions of the base with its update scaled."""
    base, k, spikes = pair.base_map(), recipe.top_k, pair.spikes
    return judge(
        base,
        Sum([base, _scaled(pair, scale)]),
        k,
        epsilon=recipe.epsilon,
        sides=recipe.sides,
        method="dense" if dense else "certified",
        dtype=pair.product_dtype,
        start=None if spikes is None else (spikes.u[:, :k], spikes.v[:, :k]),
        seed=pair.seed(recipe.seed),
        remember=remember,
    )


def _scaled(pair: Pair, scale: float) -> LinearMap:
    """The update times a factor; of two thin factors, it stays one of two."""
    if (thin := pair.low_rank) is not None:
        return LowRank(thin.B, thin.A, scale * thin.scale)
    return scale * cast("LinearMap", pair.update_map())


def _directions(judged: Judgement) -> ScaledDirections:
    """What a search over scales looks at."""
    rows = judged.directions
    scores, lower, upper = (
        torch.tensor([getattr(row, name) for row in rows], dtype=torch.float64)
        for name in ("score", "score_lower", "score_upper")
    )
    vectors = (
        (judged.tuned.u if side == "left" else judged.tuned.v)[:, : len(one.directions)].cpu()
        for side, one in judged.sides.items()
    )
    return ScaledDirections(scores, lower, upper, tuple(vectors))
