"""What fails a build: one list of failures, which every view shows and the exit code follows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bulkedge._errors import InputError, count, printable
from bulkedge._verdict import COUNTED, Verdict
from bulkedge.records import Direction, Matrix, Record

from .columns import told_drift
from .doubts import PART, doubts, part_of
from .drift import unmeasured_lines

FOUND, UNKNOWN = 1, 2
"""The exit codes of a failure: something was found, or could not be judged."""
NOT_JUDGED, NOT_REPAIRED = "not-judged", "not-repaired"
MAX_DRIFT, DOUBT = "max-drift", "doubt"
"""Rules that are no verdicts."""
SENTENCE = re.compile(r".+?[.?](?=\s|$)", re.DOTALL)
"""A sentence; the points in names are followed by no space."""
NAMED = 5
"""So many matrices a line names."""
Refused = Mapping[str, str]
"""Why a repair refused a matrix, by its name."""
Repairs = Mapping[str, Sequence[str]]
"""What repairs did, in sentences, by the names of records; ``""`` of one record alone."""


@dataclass(frozen=True)
class Failure:
    """One reason why a build fails.

    Attributes:
        rule: A verdict, or ``not-judged``, ``not-repaired``, ``max-drift`` or ``doubt``.
        about: The matrix or tensor, or what else it is about.
        message: What is wrong, and by how much.
        code: The exit code: 1 for what was found, 2 for what could not be judged.
        option: The option that asks for it, as on a command line; empty where none does.
        brief: The number that fails, for a list of names; the first sentence of a doubt.
        details: More lines, such as one for each direction.
        of_matrix: Whether ``about`` is a matrix of the record.
    """

    rule: str
    about: str
    message: str
    code: int
    option: str = ""
    brief: str = ""
    details: tuple[str, ...] = ()
    of_matrix: bool = False


@dataclass(frozen=True)
class Gate:
    """What fails a build, besides what could not be judged, which always does.

    Attributes:
        fail_on: The mildest verdict that fails it; None for none.
        max_drift: The mean drift above which it fails; None for any.
        fail_on_doubt: Whether a doubt fails it.

    Raises:
        InputError: If a limit is none.

    Example:
        >>> Gate(fail_on=None, max_drift=0.01).max_drift
        0.01
    """

    fail_on: Verdict | None = COUNTED[0]
    max_drift: float | None = None
    fail_on_doubt: bool = False

    def __post_init__(self) -> None:
        if self.fail_on is not None and self.fail_on not in COUNTED:
            names = ", ".join(verdict.value for verdict in COUNTED)
            raise InputError(f"fail_on: expected a verdict of {names}, or None, got {self.fail_on}")
        if self.max_drift is not None and not self.max_drift >= 0:
            raise InputError(f"max_drift: expected a number of at least 0, got {self.max_drift}")

    def failures(self, record: Record, refused: Refused | None = None) -> list[Failure]:
        """Why an audit fails a build.

        Args:
            record: The audit.
            refused: Why a repair refused a matrix, by its name.

        Returns:
            The failures, those of exit code 2 first; none of an audit that passes.
        """
        return [
            *_unjudged(record),
            *(
                Failure(NOT_REPAIRED, name, f"NOT repaired: {why}", UNKNOWN)
                for name, why in (refused or {}).items()
            ),
            *self._of_unknown_drift(record),
            *self._of_directions(record),
            *self._of_drift(record),
            *self._of_doubts(record),
        ]

    def exit_code(self, record: Record, refused: Refused | None = None) -> int:
        """A linter's exit code: 2 outranks 1, and 0 is an audit that passes."""
        return max((failure.code for failure in self.failures(record, refused)), default=0)

    def _of_directions(self, record: Record) -> Iterator[Failure]:
        """The matrices with directions as bad as ``fail_on``, or that may be, the worst first."""
        if self.fail_on is None:
            return
        severe = COUNTED[COUNTED.index(self.fail_on) :]
        alike = {id(d) for d in indistinct(record)} if Verdict.ROTATED not in severe else set[int]()
        found: list[tuple[float, Failure]] = []
        for matrix in record.matrices:
            for verdict in COUNTED:
                rows = [
                    d
                    for d in matrix.directions
                    if d.verdict is verdict and (verdict in severe or id(d) in alike)
                ]
                if rows:
                    lowest = min(d.score for d in rows)
                    found.append((lowest, self._failure(record, matrix, rows)))
        yield from (failure for _, failure in sorted(found, key=lambda pair: pair[0]))

    def _failure(self, record: Record, matrix: Matrix, rows: Sequence[Direction]) -> Failure:
        """One matrix with directions of one verdict."""
        verdict, epsilon = rows[0].verdict, record.recipe.epsilon
        lowest = min(d.score for d in rows)
        message = (
            f"{count(len(rows), f'{verdict.value} direction')}, lowest score {lowest:.3f}: "
            f"{epsilon - lowest:.3f} below epsilon {epsilon:g}"
        )
        return Failure(
            verdict.value,
            matrix.name,
            message,
            FOUND,
            option=f"--fail-on {self.fail_on.value if self.fail_on else 'never'}",
            brief=f"{lowest:.3f} < {epsilon:g}",
            details=tuple(map(_told, rows)),
            of_matrix=True,
        )

    def _of_unknown_drift(self, record: Record) -> Iterator[Failure]:
        """That a limit on the drift cannot be checked."""
        if self.max_drift is None or record.summary.drift_known:
            return
        option = f"--max-drift {self.max_drift:g}"
        why = ["no drift was measured: give the inputs to measure it on (--moments FILE)"]
        if record.inputs.moments is not None:
            why = unmeasured_lines(record) or ["no matrix changed whose drift could be measured"]
        for line in why:
            yield Failure(MAX_DRIFT, "drift not known", line, UNKNOWN, option)

    def _of_drift(self, record: Record) -> Iterator[Failure]:
        """That the mean drift exceeds its limit, and which matrices do."""
        limit, found = self.max_drift, record.summary.drift
        if limit is None or found is None:
            return
        mean = max(found.mean or 0.0, found.bound or 0.0)
        if not mean > limit:
            return
        each = [(m.drift_bound or m.drift or 0.0, m.name) for m in record.matrices]
        above = sorted(((drift, name) for drift, name in each if drift > limit), reverse=True)
        biases = "" if found.bound is None else ", with the most that changed biases can add,"
        names = _listed([f"{name} ({told_drift(drift)})" for drift, name in above])
        yield Failure(
            MAX_DRIFT,
            "mean drift",
            f"the mean drift{biases} {told_drift(mean)} is {told_drift(mean - limit)} above "
            f"{limit:g}; {count(len(above), 'matrix exceeds', 'matrices exceed')} it: {names}",
            FOUND,
            option=f"--max-drift {limit:g}",
            details=tuple(
                f"{name}: drift {told_drift(drift)}, {told_drift(drift - limit)} above"
                for drift, name in above
            ),
        )

    def _of_doubts(self, record: Record) -> Iterator[Failure]:
        """What puts the verdict in doubt."""
        if self.fail_on_doubt:
            for about, doubt in doubts(record).items():
                if about == PART:  # which the whole is not
                    continue
                (first,) = SENTENCE.findall(doubt)[:1] or [doubt]
                yield Failure(DOUBT, about, doubt, FOUND, "--fail-on-doubt", brief=first)


def build_fails(record: Record) -> tuple[str, str]:
    """What to put before a line of :func:`failure_lines`: a part of an audit fails no build.

    Args:
        record: The audit.

    Returns:
        Its beginning, to be stressed, and the rest.
    """
    part = part_of(record)
    if part is None:
        return "Fails", "with"
    rest = "ends with exit code 0, and `bulkedge merge` decides on the whole. Of this part alone:"
    return part.capitalize(), rest


def failure_lines(failures: Sequence[Failure]) -> list[str]:
    """The failures in lines, one for each option that asks for them.

    Args:
        failures: From :meth:`Gate.failures`.

    Returns:
        Lines that name the exit code, the option, the matrices, and by how much they exceed it.
    """
    groups: dict[tuple[int, str, str], list[Failure]] = {}
    for failure in failures:
        kind = "" if failure.of_matrix and failure.option else failure.rule
        groups.setdefault((failure.code, failure.option, kind), []).append(failure)
    return [
        f"exit code {code}{f', {option}' if option else ''}: {_group(group)}"
        for (code, option, _), group in groups.items()
    ]


def _group(group: Sequence[Failure]) -> str:
    """What failures of one kind have in common, and the first of their names."""
    first = group[0]
    if first.rule == MAX_DRIFT:
        return printable("; ".join(failure.message for failure in group))
    if first.rule == DOUBT:  # what it is about has no name but in the sentence
        told = "; ".join(failure.brief for failure in group)
        return printable(f"{count(len(group), 'doubt')}: {told}")
    names = dict[str, str]()
    for failure in group:  # of two verdicts on a matrix the worse comes first
        names.setdefault(failure.about, failure.brief)
    listed = _listed([f"{n} ({brief})" if brief else n for n, brief in names.items()])
    if first.of_matrix and first.option:
        found = count(len(names), "matrix", "matrices")
        return printable(f"new directions in {found} (lowest score): {listed}")
    told = {NOT_REPAIRED: "NOT repaired", NOT_JUDGED: "NOT judged"}.get(first.rule, first.rule)
    return printable(f"{told}: {listed}")


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _told(found: Direction) -> str:
    """A direction in a line."""
    return (
        f"direction {found.index} ({found.side}): {found.verdict.value}, score {found.score:.3f} "
        f"in [{found.score_lower:.3f}, {found.score_upper:.3f}], sigma {found.sigma:.4g}"
    )


def _unjudged(record: Record) -> list[Failure]:
    """What could not be judged; the audit as a whole where nothing was, and nothing says why."""
    found = list(_open(record))
    # a part of an audit may have no matrix that changed; the whole may not
    if found or record.shard is not None or sum(record.summary.verdicts.values()):
        return found
    why = "no matrix that could be judged differs from the base"
    message = f"no direction was judged: {why}"
    return [Failure(NOT_JUDGED, "the whole audit", message, UNKNOWN, brief=why)]


def _open(record: Record) -> Iterator[Failure]:
    """Matrices and tensors that could not be judged."""
    for matrix in record.matrices:
        if matrix.status in ("not_finite", "failed"):
            why = matrix.note or matrix.status
            yield Failure(NOT_JUDGED, matrix.name, why, UNKNOWN, of_matrix=True)
        open_ = [d for d in matrix.directions if d.verdict is Verdict.UNDECIDED]
        if open_:
            yield Failure(
                Verdict.UNDECIDED.value,
                matrix.name,
                f"{count(len(open_), 'direction')} undecided",
                UNKNOWN,
                details=tuple(map(_told, open_)),
                of_matrix=True,
            )
    for row in record.skipped:
        if row.lost:
            yield Failure(NOT_JUDGED, row.name, row.reason, UNKNOWN)


def indistinct(record: Record) -> list[Direction]:
    """Rotated directions that could not have been called intruders.

    Where the base's leading 2·top_k directions span the whole space, nothing lies outside of it: no
    direction can be called an intruder there, so that a rotated one counts as one.

    Args:
        record: An audit.

    Returns:
        Those directions.
    """
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
