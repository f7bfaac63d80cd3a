"""Two audits side by side: before and after a repair, one fine-tune and another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bulkedge._errors import InputError, count, printable
from bulkedge._verdict import COUNTED, Verdict

from .recipe import HARMLESS, Recipe, told_setting
from .rows import Matrix
from .views import Audited

SAME = ("top_k", "epsilon", "side")
"""The settings that two audits must share for their counts to mean the same."""
MOST_SHOWN = 10
SHOWN = tuple(verdict.value for verdict in (*COUNTED, Verdict.UNDECIDED))
"""The verdicts whose number a line shows."""
NAMED = 5
"""So many audits a warning names."""


@dataclass(frozen=True, repr=False)
class MatrixChange:
    """A matrix in two audits.

    Attributes:
        name: Its name in the base.
        new_first: New directions (score < ε) in the first audit.
        new_second: The same in the second.
        worst_first: The lowest score in the first audit; None where nothing was judged.
        worst_second: The same in the second.
        verdicts_first: How many directions have each verdict in the first audit.
        verdicts_second: The same in the second.
    """

    name: str
    new_first: int
    new_second: int
    worst_first: float | None
    worst_second: float | None
    verdicts_first: Mapping[str, int]
    verdicts_second: Mapping[str, int]

    @property
    def is_changed(self) -> bool:
        """Whether the number of new directions or of a verdict differs."""
        return (self.new_first, self.verdicts_first) != (self.new_second, self.verdicts_second)

    def __repr__(self) -> str:
        """The matrix with its new directions, and with the verdicts that differ, in a line."""
        differ = [
            f"{name} {self.verdicts_first[name]} → {number}"
            for name, number in self.verdicts_second.items()
            if number != self.verdicts_first[name] and name in SHOWN
        ]
        verdicts = f" ({', '.join(differ)})" if differ else ""
        name = printable(self.name.removesuffix(".weight"))
        return f"{name}: {self.new_first} → {self.new_second}{verdicts}"


@dataclass(frozen=True)
class RecordComparison:
    """What two audits found in the same matrices.

    Attributes:
        matrices: Those that both audits have, in the first one's order.
        only_first: Names that only the first audit has.
        only_second: Names that only the second audit has.
        warnings: In what else the audits differ, such as the base: see :func:`differences`.
    """

    matrices: tuple[MatrixChange, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def changed(self) -> list[MatrixChange]:
        """The matrices with other numbers of new directions or verdicts, most changed first."""
        differ = [row for row in self.matrices if row.is_changed]
        return sorted(differ, key=lambda row: -abs(row.new_first - row.new_second))

    def __repr__(self) -> str:
        """The totals, and the matrices that changed most."""
        first = sum(row.new_first for row in self.matrices)
        second = sum(row.new_second for row in self.matrices)
        of = count(len(self.matrices), "matrix that both have", "matrices that both have")
        lines = [f"WARNING: {line}" for line in self.warnings]
        lines.append(f"{count(first, 'new direction')} first, {second} second, in {of}")
        lines += [f"  {row!r}" for row in self.changed[:MOST_SHOWN]]
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
        raise InputError(
            f"expected another record of an audit, got {type(second).__name__}; "
            "Record.from_json reads one from its file"
        )
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
        tuple(differences({"the first": first, "the second": second})),
    )


def differences(records: Mapping[str, Audited]) -> list[str]:
    """Why the numbers of several audits do not mean the same.

    Args:
        records: The audits by name.

    Returns:
        A sentence for each setting that differs and changes what is judged, for the base, and for
        the moments; none of audits that can be compared.
    """
    told = []
    for name in Recipe.model_fields:
        found = _by_value(records, lambda record, name=name: getattr(record.recipe, name))
        if name in HARMLESS or len(found) < 2:
            continue
        meaning = (
            "numbers of new directions mean different things"
            if name in SAME
            else "not the same matrices are judged"
        )
        told.append(f"The audits differ in {name}, so that {meaning}: {_listed(found)}.")
    bases = _by_value(records, lambda record: [file.sha256 for file in record.inputs.base.files])
    if len(bases) > 1:
        paths = [f"{records[names[0]].inputs.base.path} ({_named(names)})" for names in
                 bases.values()]  # fmt: skip
        told.append(f"The files of the bases differ: {printable(', '.join(paths))}.")
    moments = _by_value(
        records,
        lambda record: record.inputs.moments and [f.sha256 for f in record.inputs.moments.files],
    )
    if sum(value != "None" for value in moments) > 1:
        told.append("The drift of the audits is on different inputs: their moments differ.")
    return told


def _by_value(
    records: Mapping[str, Audited], value: Callable[[Audited], object]
) -> dict[str, list[str]]:
    """The names of the audits by some value of theirs."""
    found: dict[str, list[str]] = {}
    for name, record in records.items():
        found.setdefault(told_setting(value(record)), []).append(name)
    return found


def _listed(found: Mapping[str, list[str]]) -> str:
    """Values, each with the audits that have it."""
    parts = (f"{value or 'none'} ({_named(names)})" for value, names in found.items())
    return printable(", ".join(parts))


def _named(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _change(first: Matrix, second: Matrix) -> MatrixChange:
    """One matrix in both audits."""
    worst = [
        min((row.score for row in matrix.directions), default=None) for matrix in (first, second)
    ]
    new = first.new_directions, second.new_directions
    verdicts = _verdicts(first), _verdicts(second)
    return MatrixChange(first.name, *new, worst[0], worst[1], *verdicts)


def _verdicts(matrix: Matrix) -> dict[str, int]:
    """How many directions have each verdict."""
    judged = [direction.verdict for direction in matrix.directions]
    return {verdict.value: judged.count(verdict) for verdict in Verdict}
