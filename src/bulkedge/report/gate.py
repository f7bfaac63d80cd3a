"""What fails a build: how many directions count as findings, and whether a verdict is doubted."""

from __future__ import annotations

from bulkedge._verdict import COUNTED, Verdict
from bulkedge.records import Direction, Matrix, Record

from .doubts import doubts


def findings(record: Record, mildest: Verdict) -> int:
    """How many directions are as bad as ``mildest``, or may be.

    Where the base's leading 2·top_k directions span the whole space, nothing lies outside of it: no
    direction can be called an intruder there, so that a rotated one counts as one.

    Args:
        record: The audit.
        mildest: The mildest verdict that counts: rotated < intruder.

    Returns:
        The count.
    """
    severe = COUNTED[COUNTED.index(mildest) :]
    found = sum(record.summary.verdicts[verdict] for verdict in severe)
    return found if Verdict.ROTATED in severe else found + len(indistinct(record))


def is_doubted(record: Record) -> bool:
    """Whether something puts the verdict in doubt: see :func:`~bulkedge.report.doubts.doubts`."""
    return bool(doubts(record))


def indistinct(record: Record) -> list[Direction]:
    """Rotated directions that could not have been called intruders: see :func:`findings`."""
    return [
        direction
        for matrix in record.matrices
        for direction in matrix.directions
        if direction.verdict is Verdict.ROTATED
        and _fills(matrix, direction.side, 2 * record.recipe.top_k)
    ]


def _fills(matrix: Matrix, side: str, directions: int) -> bool:
    """Whether so many leading base vectors span all of a side."""
    rows, columns = matrix.shape[::-1] if matrix.transposed else matrix.shape
    length, other = (rows, columns) if side == "left" else (columns, rows)
    return length <= min(directions, other)
