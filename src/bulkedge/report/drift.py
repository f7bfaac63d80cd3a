"""What a record says of drift: how far the outputs have moved on the inputs of the moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bulkedge._errors import count, printable
from bulkedge._globs import matches, unwrapped
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
            f"{count(found.measured, 'matrix', 'matrices')}{_of_sums(record)}{_of_biases(record)}"
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
            f"{count(found.measured, 'matrix', 'matrices')}{_of_sums(record)}{_of_biases(record)})"
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


def _of_biases(record: Record) -> str:
    """The most that it can be with what changed biases add."""
    found = record.summary.drift
    if found is None or found.bound is None:
        return ""
    return f", at most {told_drift(found.bound)} with the changed biases of the layers"


def _along_new(record: Record) -> str:
    """What part of it lies along new directions."""
    found = record.summary.drift
    if found is None or found.along_new is None:
        return ""
    return f"; on average {found.along_new:.0%} of a matrix's drift lies along new directions"


def _vectors(record: Record) -> Iterator[str]:
    """The changed vectors, whose effect no drift holds; how to accept that they have changed."""
    names = [row.name for row in record.skipped if row.changed and not row.bounded]
    if names:
        what = "changed norms or other vectors are" if names[1:] else "changed norm or vector is"
        every = dict.fromkeys((*record.recipe.exclude, *globs_of(names, record)))
        globs = " ".join(f"--exclude '{glob}'" for glob in every)
        yield (
            f"{len(names)} {what} no part of it: {', '.join(names[:3])}{', …' * bool(names[3:])}; "
            f"to accept that they have changed: {globs} (NaN, Inf or zeros there stay a doubt)"
        )


def globs_of(names: Iterable[str], record: Record) -> list[str]:
    """Globs that match vectors, and no matrix of a record.

    Args:
        names: Of vectors, such as ``layers.0.input_norm.weight``.
        record: An audit.

    Returns:
        Such as ``*.input_norm.weight``; a name where its glob would match a matrix.
    """
    stored = [row.name for row in record.tensors]
    found = dict[str, None]()
    for name in names:
        glob = _ending(unwrapped(name))
        found[name if matches(stored, [glob]) else glob] = None
    return list(found)


def _ending(name: str) -> str:
    """A glob for what a vector and its module are called, whatever lies above."""
    parts = name.split(".")
    named = [i for i, part in enumerate(parts[:-1]) if not part.isdecimal()]
    first = named[-1] if named else 0
    kept = ["*" if part.isdecimal() else part for part in parts[first:]]
    return ".".join(kept if first == 0 else ["*", *kept])


def _unknown(record: Record) -> Iterator[str]:
    """What could not be measured, one line per reason, with the first name as example."""
    groups: dict[str, list[str]] = {}
    for matrix in record.matrices:
        if matrix.status in ("audited", "unchanged") and matrix.drift is None:
            groups.setdefault(matrix.drift_note or "no reason given", []).append(matrix.name)
    for reason, names in groups.items():
        many = f"{len(names)} matrices, such as " if len(names) > 1 else ""
        yield f"{many}{names[0]}: {reason}"
