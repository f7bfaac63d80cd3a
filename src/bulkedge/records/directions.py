"""Whether the directions of a matrix are those that were asked for, and their verdicts fit."""

from __future__ import annotations

from bulkedge._verdict import Verdict, certain_verdict

from .ranges import ROUNDING
from .recipe import Recipe
from .rows import Direction, Matrix


def check_directions(matrix: Matrix, recipe: Recipe) -> None:
    """Raise unless each side has its leading directions once, with the verdicts of their intervals.

    Args:
        matrix: A row of a record.
        recipe: How it was computed.

    Raises:
        ValueError: If one is missing, is there twice, or has a verdict that its scores do not give.
    """
    # a tuned matrix of lower rank has fewer
    most = min(recipe.top_k, *matrix.shape) if matrix.status == "audited" else 0
    number = min(most, max((row.index + 1 for row in matrix.directions), default=0))
    for side in ("left", "right"):
        found = [row.index for row in matrix.directions if row.side == side]
        expected = list(range(number)) if side in recipe.sides else []
        if sorted(found) != expected:
            raise ValueError(
                f"expected {len(expected)} {side} directions of {matrix.name!r:.60}, each once, "
                f"got {len(found)}"
            )
    for row in matrix.directions:
        if not _fits(row, recipe.epsilon):
            raise ValueError(
                f"{matrix.name!r:.60}: the {row.side} direction {row.index} cannot be "
                f"{row.verdict.value} with a score of {row.score_lower:.6g} to "
                f"{row.score_upper:.6g} and epsilon {recipe.epsilon:g}"
            )


def _fits(row: Direction, epsilon: float) -> bool:
    """Whether a verdict is that of its intervals, but for rounding."""
    intervals = ((row.score_lower, row.score_upper), (row.overlap_lower, row.overlap_upper))
    by = ROUNDING if row.verdict is Verdict.UNDECIDED else -ROUNDING
    ends = [end for low, high in intervals for end in _moved(low, high, by)]
    return certain_verdict(epsilon, *ends) is row.verdict


def _moved(low: float, high: float, by: float) -> tuple[float, float]:
    """An interval with both ends moved outwards, or inwards, at most to its middle."""
    middle = (low + high) / 2
    return min(low - by, middle), max(high + by, middle)
