"""How certain the verdicts of an audit are, in words, and what is open about the others."""

from __future__ import annotations

from collections.abc import Iterator

from bulkedge._errors import count, printable
from bulkedge._verdict import HALF_THE_ENERGY, Verdict
from bulkedge.records import Direction, Matrix, Record

from .names import short_name

SHOWN = 3
"""So many undecided directions are listed, the rest are counted."""


def certainty(record: Record) -> str:
    """How the verdicts were decided, and how certain they are, in one or two sentences.

    Args:
        record: An audit.

    Returns:
        The sentences.
    """
    rows = [row for matrix in record.matrices for row in matrix.directions]
    decided = [row for row in rows if row.verdict is not Verdict.UNDECIDED]
    undecided = len(rows) - len(decided)
    proved = sum(row.method == "certified" for row in decided)
    svds = len(decided) - proved
    products = "from products with the matrices, except with probability 1e-9"
    if not svds:
        how = f"proved {products}"
    elif not proved:
        how = "certain: two float64 SVDs decided it"
    else:
        by_svds = count(svds, "comes", "come")
        how = (
            f"certain: {count(proved, 'is', 'are')} proved {products}; {by_svds} from float64 SVDs"
        )
    if undecided:
        few = f"{count(undecided, 'verdict is', 'verdicts are')} undecided."
        return f"{few} Each of the others is {how}." if decided else few
    return f"Every verdict is {how}."


def certainty_lines(record: Record) -> list[str]:
    """The same for a terminal.

    Args:
        record: An audit.

    Returns:
        A line; none where nothing was judged.
    """
    if not sum(record.summary.verdicts.values()):
        return []
    said = certainty(record)
    return [f"certainty: {said[0].lower()}{said[1:].removesuffix('.')}"]


def undecided_lines(record: Record) -> list[str]:
    """What is open about the undecided directions.

    Args:
        record: An audit.

    Returns:
        A line for each of the first, and how many more there are.
    """
    found = list(_undecided(record))
    lines = [f"undecided: {_open(record, *pair)}" for pair in found[:SHOWN]]
    if (rest := len(found) - SHOWN) > 0:
        lines.append(f"undecided: {count(rest, 'more direction')}; the record has the intervals")
    return lines


def _undecided(record: Record) -> Iterator[tuple[Matrix, Direction]]:
    """The directions without a verdict, and their matrices."""
    for matrix in record.matrices:
        for row in matrix.directions:
            if row.verdict is Verdict.UNDECIDED:
                yield matrix, row


def _open(record: Record, matrix: Matrix, row: Direction) -> str:
    """What is known of a direction, and what is not."""
    name = f"{printable(short_name(matrix.name))}, {row.side} direction {row.index}"
    limit = record.recipe.epsilon
    if row.score_upper < limit:
        return (
            f"{name}: new, with a score of at most {row.score_upper:.3g}, but rotated or intruder "
            f"is open: between {row.overlap_lower**2:.3g} and {row.overlap_upper**2:.3g} of its "
            f"squared length lies within the base's leading space, and the limit is "
            f"{HALF_THE_ENERGY**2:.3g}"
        )
    return (
        f"{name}: may be new or not: its score is between {row.score_lower:.3g} and "
        f"{row.score_upper:.3g}, and the limit is {limit:g}"
    )
