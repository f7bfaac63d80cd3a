"""Two audits side by side: before and after a repair, one fine-tune and another."""

from __future__ import annotations

from dataclasses import dataclass

from bulkedge._errors import InputError, count, printable

from .rows import Matrix
from .views import Audited

SAME = ("top_k", "epsilon", "side")
"""The settings that two audits must share for their counts to mean the same."""
MOST_SHOWN = 10


@dataclass(frozen=True)
class MatrixChange:
    """A matrix in two audits.

    Attributes:
        name: Its name in the base.
        new_first: New directions (score < ε) in the first audit.
        new_second: The same in the second.
        worst_first: The lowest score in the first audit; None where nothing was judged.
        worst_second: The same in the second.
    """

    name: str
    new_first: int
    new_second: int
    worst_first: float | None
    worst_second: float | None


@dataclass(frozen=True)
class RecordComparison:
    """What two audits found in the same matrices.

    Attributes:
        matrices: Those that both audits have, in the first one's order.
        only_first: Names that only the first audit has.
        only_second: Names that only the second audit has.
    """

    matrices: tuple[MatrixChange, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    @property
    def changed(self) -> list[MatrixChange]:
        """The matrices whose number of new directions differs, the largest change first."""
        differ = [row for row in self.matrices if row.new_first != row.new_second]
        return sorted(differ, key=lambda row: -abs(row.new_first - row.new_second))

    def __repr__(self) -> str:
        """The totals, and the matrices that changed most."""
        first = sum(row.new_first for row in self.matrices)
        second = sum(row.new_second for row in self.matrices)
        of = count(len(self.matrices), "matrix that both have", "matrices that both have")
        lines = [f"{count(first, 'new direction')} first, {second} second, in {of}"]
        for row in self.changed[:MOST_SHOWN]:
            name = printable(row.name.removesuffix(".weight"))
            lines.append(f"  {name}: {row.new_first} → {row.new_second}")
        if (rest := len(self.changed) - MOST_SHOWN) > 0:
            lines.append(f"  and {rest} more")
        alone = len(self.only_first), len(self.only_second)
        if any(alone):
            lines.append(f"  {alone[0]} only in the first, {alone[1]} only in the second")
        return "\n".join(lines)


def compare(first: Audited, second: Audited) -> RecordComparison:
    """Compare two audits, matrix by matrix.

    Args:
        first: One audit.
        second: The other, by the same settings.

    Returns:
        What both found.

    Raises:
        InputError: If the audits judged other directions, or by another ε.
    """
    if not isinstance(second, type(first)):
        raise InputError(f"expected another record of an audit, got {type(second).__name__}")
    for name in SAME:
        mine, other = getattr(first.recipe, name), getattr(second.recipe, name)
        if mine != other:
            raise InputError(
                f"expected two audits of the same {name}, got {mine} and {other}; audit one of "
                "them again"
            )
    ours = {matrix.name: matrix for matrix in first.matrices}
    theirs = {matrix.name: matrix for matrix in second.matrices}
    return RecordComparison(
        tuple(_change(ours[name], theirs[name]) for name in ours if name in theirs),
        tuple(name for name in ours if name not in theirs),
        tuple(name for name in theirs if name not in ours),
    )


def _change(first: Matrix, second: Matrix) -> MatrixChange:
    """One matrix in both audits."""
    worst = [
        min((row.score for row in matrix.directions), default=None) for matrix in (first, second)
    ]
    return MatrixChange(first.name, first.new_directions, second.new_directions, worst[0], worst[1])
