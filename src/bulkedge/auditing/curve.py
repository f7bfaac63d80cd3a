"""New directions and lowest score against a factor on the update.

What generic spikes of the update's strengths are expected to do follows from the base's singular
values alone; what was judged, at 1 and wherever the critical scale was sought, stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from bulkedge.records import Recipe
from bulkedge.records.rows import ScaleCurve, ScalePoint
from bulkedge.update import BaseSpectrum, budget, predict_spikes

SCALES = tuple(2 ** (j / 2) for j in range(-10, 3))
"""The scales of the expected curve: 1/32 to 2, two to an octave, 1 among them."""


def expected_curve(base: BaseSpectrum, gamma: Tensor, recipe: Recipe) -> list[ScalePoint]:
    """What is expected of generic spikes, each times a scale.

    A spike counts once it stands among the k leading directions, at θ_k, with its chance to be new
    there.  Cost: a prediction of each spike at each scale at which it does.

    Args:
        base: The base.
        gamma: The spikes of the update.
        recipe: How many directions and which sides are judged, and ε.

    Returns:
        A point for each of :data:`SCALES`.
    """
    limit = budget(base, 1, top_k=recipe.top_k).top_k_threshold
    strongest = gamma[: recipe.top_k].cpu()
    points = []
    for scale in SCALES:
        leading = scale * strongest[scale * strongest > limit]
        if not len(leading):
            points.append(ScalePoint(scale=scale, new=0.0, score=1.0))
            continue
        found = predict_spikes(base, leading, epsilon=recipe.epsilon)
        # NaN where float64 does not tell the outlier from the edge: nothing is expected there
        new = sum(getattr(found, f"{side}_new").nan_to_num(0.0).sum() for side in recipe.sides)
        scores = [getattr(found, f"{side}_score").nan_to_num(1.0).min() for side in recipe.sides]
        points.append(ScalePoint(scale=scale, new=float(new), score=float(min(scores))))
    return points


def judged_point(scale: float, scores: Iterable[float], epsilon: float) -> ScalePoint:
    """What was judged at one scale.

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
