"""New directions and lowest score against a factor on the update.

What is expected follows from how the update lies to the leading vectors of its base.  What was
judged, at 1 and wherever the critical scale was sought, stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from bulkedge.records import Recipe
from bulkedge.records.rows import ScaleCurve, ScalePoint
from bulkedge.update import BaseSpectrum, UpdateSVD, aligned_scores

SCALES = tuple(2 ** (j / 2) for j in range(-10, 3))
"""The scales of the expected curve: 1/32 to 2, two to an octave, 1 among them."""


def expected_curve(
    base: BaseSpectrum, leading: tuple[Tensor, Tensor, Tensor], update: UpdateSVD, recipe: Recipe
) -> list[ScalePoint]:
    """What the scaled update is expected to do, by :func:`bulkedge.update.aligned_scores`.

    Args:
        base: The base.
        leading: Its leading triplets.
        update: The spikes of the update.
        recipe: How many directions and which sides are judged, and ε.

    Returns:
        A point for each of :data:`SCALES`.
    """
    top_k = min(recipe.top_k, len(base.values))
    found = aligned_scores(base, leading, update, SCALES, top_k=top_k, sides=recipe.sides)
    return [
        judged_point(scale, scores.flatten().tolist(), recipe.epsilon)
        for scale, scores in zip(SCALES, found, strict=True)
    ]


def judged_point(scale: float, scores: Iterable[float], epsilon: float) -> ScalePoint:
    """What all scores at one scale come to.

    Args:
        scale: The factor.
        scores: Of all directions of all sides.
        epsilon: Below it a direction is new.

    Returns:
        The point.
    """
    found = list(scores)
    new = sum(score < epsilon for score in found)
    return ScalePoint(scale=scale, new=new, score=min(1.0, *found))


def scale_curve(expected: Sequence[ScalePoint], judged: Iterable[ScalePoint]) -> ScaleCurve:
    """Both together, what was judged in the order of its scales.

    Args:
        expected: From :func:`expected_curve`.
        judged: In any order, one for each scale.

    Returns:
        The curve.
    """
    return ScaleCurve(expected=list(expected), judged=sorted(judged, key=lambda p: p.scale))
