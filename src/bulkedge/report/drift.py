"""What a record says of drift: how far the outputs have moved on the inputs of the moments."""

from __future__ import annotations

from collections.abc import Iterator

from bulkedge._errors import count, printable
from bulkedge.records import Matrix, Record

from .columns import told_drift

NOTABLE = 1e-3
"""The mean drift from which on protecting is advised.

In the experiment of docs/protect.md, copies with a mean drift of 0.0014 to 0.0019 still had not
got back all that the base could do.
"""


def drift_lines(record: Record) -> list[str]:
    """The drift of a fine-tune, in lines: how much, and what could not be measured.

    Args:
        record: An audit.

    Returns:
        Nothing where no moments were given.
    """
    found = record.summary.drift
    if found is None:
        return []
    lines = []
    if found.mean is not None:
        line = (
            f"drift on the inputs of the moments: mean {told_drift(found.mean)} of "
            f"{count(found.measured, 'matrix', 'matrices')}{_of_sums(record)}"
        )
        if worst := most_drifted(record):
            line += f"; most in {worst.name.removesuffix('.weight')} ({told_drift(worst.drift)})"
        lines.append(line + _along_new(record))
    return lines + unmeasured_lines(record)


def unmeasured_lines(record: Record) -> list[str]:
    """What of the drift was not measured, in lines.

    Args:
        record: An audit with moments.

    Returns:
        Nothing where the drift of all that changed is known.
    """
    lines = [f"drift is NOT all: {line}" for line in _vectors(record)]
    return lines + [f"drift NOT measured: {line}" for line in _unknown(record)]


def drift_sentences(record: Record) -> list[str]:
    """The same in sentences, for a page."""
    found = record.summary.drift
    if found is None:
        return []
    sentences = []
    if found.mean is not None:
        sentences.append(
            f"On the inputs of the moments the update changes {found.mean:.2%} of the mean square "
            f"of a layer's outputs (drift, the mean of "
            f"{count(found.measured, 'matrix', 'matrices')}{_of_sums(record)})"
            f"{_along_new(record)}."
        )
    sentences += [f"That is not all: {printable(line)}." for line in _vectors(record)]
    return sentences + [f"Drift was not measured: {printable(line)}." for line in _unknown(record)]


def most_drifted(record: Record) -> Matrix | None:
    """The matrix with the largest drift; None where there is none above zero."""
    known = [matrix for matrix in record.matrices if matrix.drift]
    return max(known, key=lambda matrix: matrix.drift or 0.0, default=None)


def is_notable(record: Record) -> bool:
    """Whether the drift is large enough to advise something against it."""
    found = record.summary.drift
    return found is not None and (found.mean or 0.0) >= NOTABLE


def _of_sums(record: Record) -> str:
    """The ratio of sums, beside the mean of ratios."""
    found = record.summary.drift
    if found is None or found.of_sums is None or found.measured < 2:
        return ""
    return f", {told_drift(found.of_sums)} as the ratio of their sums"


def _along_new(record: Record) -> str:
    """What part of it lies along new directions."""
    found = record.summary.drift
    if found is None or found.along_new is None:
        return ""
    return f"; on average {found.along_new:.0%} of a matrix's drift lies along new directions"


def _vectors(record: Record) -> Iterator[str]:
    """The changed vectors, whose effect no drift holds; the first names as examples."""
    names = [row.name for row in record.skipped if row.changed]
    if names:
        what = "changed biases or other vectors are" if names[1:] else "changed bias or vector is"
        yield f"{len(names)} {what} no part of it: {', '.join(names[:3])}{', …' * bool(names[3:])}"


def _unknown(record: Record) -> Iterator[str]:
    """What could not be measured, one line per reason, with the first name as example."""
    groups: dict[str, list[str]] = {}
    for matrix in record.matrices:
        if matrix.status == "audited" and matrix.drift is None:
            groups.setdefault(matrix.drift_note or "no reason given", []).append(matrix.name)
    for reason, names in groups.items():
        many = f"{len(names)} matrices, such as " if len(names) > 1 else ""
        yield f"{many}{names[0]}: {reason}"
