"""New directions and lowest score of a whole audit, against a factor on the update."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bulkedge.records import Matrix, Record
from bulkedge.records.rows import ScalePoint

from .doubts import untrained

GRID = tuple(2 ** (j / 4) for j in range(-20, 5))
"""The scales at which matrices that were judged at scales of their own are added up."""

Curve = list[tuple[float, float, float]]
"""Scale, new directions and lowest score of each point."""


def whole_curve(record: Record) -> dict[str, Curve]:
    """The curves of all matrices together: new directions summed, the lowest of all scores.

    Matrices whose base looks untrained are left out, as they are where a scale is given, unless all
    are such.  What was judged is at 1; where critical scales were measured each matrix was judged
    at several scales, and is read by lines between them.

    Args:
        record: An audit.

    Returns:
        ``expected`` and ``judged``; of the former nothing without spikes.
    """
    fresh = {id(matrix) for matrix in untrained(record)}
    curves = [m for m in record.matrices if m.scale_curve is not None and m.directions]
    shown = [m for m in curves if id(m) not in fresh] or curves
    expected = [m.scale_curve.expected for m in shown if m.scale_curve and m.scale_curve.expected]
    judged = [m.scale_curve.judged for m in shown if m.scale_curve and m.scale_curve.judged]
    return {"expected": _summed(list(zip(*expected, strict=True))), "judged": _judged(judged)}


def matrix_curve(matrix: Matrix) -> dict[str, Curve] | None:
    """The curves of one matrix; None without.

    Args:
        matrix: Of a record.

    Returns:
        ``expected`` and ``judged``.
    """
    found = matrix.scale_curve
    if found is None:
        return None
    return {
        "expected": [_told(point) for point in found.expected],
        "judged": [_told(point) for point in found.judged],
    }


def _told(point: ScalePoint) -> tuple[float, float, float]:
    """A point in few digits."""
    return float(f"{point.scale:.4g}"), float(f"{point.new:.3g}"), float(f"{point.score:.3g}")


def _summed(columns: Sequence[Sequence[ScalePoint]]) -> Curve:
    """The matrices together at each scale; they share the scales."""
    return [
        _told(
            ScalePoint(
                scale=points[0].scale,
                new=math.fsum(point.new for point in points),
                score=min(point.score for point in points),
            )
        )
        for points in columns
    ]


def _judged(curves: Sequence[Sequence[ScalePoint]]) -> Curve:
    """The same of matrices with scales of their own, as far as all of them were judged."""
    if not curves:
        return []
    # below the least scale at which a matrix was judged nothing of it is new, if nothing was there
    low = max((curve[0].scale for curve in curves if curve[0].new), default=0.0)
    low = max(low, min(curve[0].scale for curve in curves))
    high = min(curve[-1].scale for curve in curves)
    grid = [scale for scale in GRID if low <= scale <= high]
    return _summed([[_read(curve, scale) for curve in curves] for scale in grid])


def _read(curve: Sequence[ScalePoint], scale: float) -> ScalePoint:
    """A curve between its points, by lines over log s; before the first, that one."""
    after = next(i for i, point in enumerate(curve) if point.scale >= scale)
    right = curve[after]
    if after == 0 or right.scale == scale:
        return right.model_copy(update={"scale": scale})
    left = curve[after - 1]
    part = math.log(scale / left.scale) / math.log(right.scale / left.scale)
    new, score = (a + part * (b - a) for a, b in
                  ((left.new, right.new), (left.score, right.score)))  # fmt: skip
    return ScalePoint(scale=scale, new=new, score=score)
