"""By what factor an update must be scaled before it is merged, so that nothing new arises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bulkedge._errors import count, printable
from bulkedge.records import Matrix, Record

from .advice import Step, left_out_globs
from .columns import critical_scale
from .commands import WEAKER, Taken, audit_command, command, free, unseen
from .doubts import untrained
from .merging import MERGED, has_settings, is_full, merge, merged, not_scaled, to_be_merged

MEASURE = "--critical-scale"
DOUBT = "an estimate that is often too high"


@dataclass(frozen=True)
class Weaker:
    """What the critical scales say of the matrices with new directions, now or at a lower strength.

    Attributes:
        scale: The smallest; 1 and more is not believed, since new directions are there.
        measured: Whether it is one that was measured; else it is expected.
        rough: Whether it is expected by the norm of an update alone.
        tried: At how many scales its matrix was judged up to it, if it was measured.
        matrix: Whose it is.
        known: How many matrices it is the smallest of.
        affected: How many of them have new directions now.
        above: How many of these are expected to have none.
        untrained: How many more were left out, since their base looks like noise.
    """

    scale: float
    measured: bool
    rough: bool
    tried: int
    matrix: str
    known: int
    affected: int
    above: int
    untrained: int


def weaker(record: Record) -> Weaker | None:
    """The smallest critical scale of an update that makes new directions.

    A matrix may have a new direction at a smaller scale and none at 1.  Where scales were measured,
    all matrices count.  Where they are only expected, those with new directions do, and those of
    which the law expects none at 1, as it is, and one below: of the rest it is wrong already.  One
    whose base looks untrained has nothing to lose, and is left out unless all are such.

    Args:
        record: An audit.

    Returns:
        It; None without new directions in matrices whose scale is known.
    """
    measured = record.recipe.critical_scale
    judged = [matrix for matrix in record.matrices if critical_scale(matrix) is not None]
    affected = [matrix for matrix in judged if matrix.new_directions]
    if not affected:
        return None
    fresh = {id(matrix) for matrix in untrained(record)}
    if all(id(matrix) in fresh for matrix in affected):
        fresh = set()
    counted = judged if measured else [m for m in judged if m.new_directions or _may_return(m)]
    trained = [matrix for matrix in counted if id(matrix) not in fresh]
    first = min(trained, key=_scale)
    return Weaker(
        scale=_scale(first),
        measured=measured,
        rough=not measured and any(not _is_aligned(matrix) for matrix in trained),
        tried=_tried(first) if measured else 0,
        matrix=first.name.removesuffix(".weight"),
        known=len(trained),
        affected=sum(bool(matrix.new_directions) for matrix in trained),
        above=0 if measured else sum(m.new_directions > 0 and _scale(m) >= 1 for m in trained),
        untrained=len(counted) - len(trained),
    )


def scale_lines(record: Record, taken: Taken = unseen) -> list[str]:
    """How much weaker, in lines of a terminal: the limit, whose it is, and what to do, as commands.

    Args:
        record: An audit.
        taken: Whether something has a name already, in the folder in which commands will run.

    Returns:
        Nothing where nothing has to be weaker; a line that starts with two spaces is a command.
    """
    lines = [f"weaker: {clause}" for clause in _clauses(record)]
    for step in scale_steps(record, taken):
        lines += [f"weaker: {step.text}", *([f"  {step.command}"] if step.command else [])]
    return lines


def scale_sentences(record: Record) -> list[str]:
    """The same in sentences, for a page; the commands are in :func:`scale_steps`."""
    return [f"{clause[0].upper()}{clause[1:]}." for clause in _clauses(record)]


def scale_steps(record: Record, taken: Taken = unseen) -> list[Step]:
    """The commands that measure how much weaker it must be, or write the weaker copy.

    Args:
        record: An audit.
        taken: Whether something has a name already, in the folder in which commands will run.

    Returns:
        Nothing where nothing has to be weaker, or no copy can be written.
    """
    found = weaker(record)
    if found is None:
        return []
    if not found.measured:
        measure = audit_command(record, MEASURE, *left_out_globs(record))
        return [Step("measure how much weaker it must be:", measure)]
    return [] if _unknown(found) else list(_copied(record, found, taken))


def _copied(record: Record, found: Weaker, taken: Taken) -> Iterator[Step]:
    """How the weaker copy is written, once what α does not scale is merged."""
    if not is_full(record) and not has_settings(record):
        return  # its α is elsewhere, and PEFT cannot merge it
    folder = free(MERGED, taken)
    is_merged = not_scaled(record) is not None or to_be_merged(record) is not None
    source = merged(record, folder) if is_merged else record
    if any(m.read_only is not None for m in source.matrices if m.status == "audited"):
        return
    if is_merged:
        how = merge(record, folder)
        yield Step(f"merge it into the model first, into {folder}{how.note}:", how.line)
    options = [
        "--method",
        "rescale",
        "--uniform",
        rounded_down(found.scale),
        *left_out_globs(record),
    ]
    yield Step(
        "this writes the weaker copy, and audits it:",
        command(source, "repair", [*options, "-o", free(WEAKER, taken)]),
    )


def _clauses(record: Record) -> list[str]:
    """What is known, in sentences without capital and full stop."""
    found = weaker(record)
    if found is None:
        return []
    if why := _unknown(found):
        return [f"by how much is NOT known: {why}"]
    at = rounded_down(found.scale)
    if found.measured:
        first = (
            f"{_ways(record)} it at ≤ {at} of its strength to have no new direction (measured: "
            "none at any scale tried up to there)"
        )
    elif found.rough:
        first = f"{at} of its strength may leave no new direction, a guess by its norm alone"
    else:
        first = f"theory expects the first new direction at {at} of its strength, {DOUBT}"
    clauses = [first, _limit(found)]
    if part := not_scaled(record):
        clauses.append(f"α does not scale all of it ({printable(part)})")
    return [*clauses, _off(found)] if found.above else clauses


def _limit(found: Weaker) -> str:
    """Whose limit it is, how it was found, and what was left out."""
    limit = f"the limit is that of {printable(found.matrix)}"
    if found.known > 1:
        limit += f", the lowest of {found.known} matrices"
        if not found.measured:
            limit += " with new directions"
            limit += ", now or at a lower strength" if found.affected < found.known else ""
    if found.measured:
        limit += f": {count(found.tried, 'scale')} tried up to there"
    return f"{limit}; {_left_out(found)}" if found.untrained else limit


def told_weaker(record: Record) -> tuple[float, str, str] | None:
    """The same for a place where there is little room.

    Args:
        record: An audit.

    Returns:
        The scale, the same as text, and what it is; None where nothing has to be weaker, or it is
        not known how much.
    """
    found = weaker(record)
    if found is None or _unknown(found):
        return None
    at = rounded_down(found.scale)
    if found.measured:
        scales = count(found.tried, "scale")
        return found.scale, f"≤ {at}", f"of its strength: none new, {scales} tried"
    why = "a guess by its norm" if found.rough else "first new one expected"
    return found.scale, f"≈ {at}", f"of its strength: {why}"


def rounded_down(scale: float) -> str:
    """A scale in two digits, rounded down, so that it is no more than what it stands for.

    Args:
        scale: A positive number.

    Returns:
        Its digits.

    Example:
        >>> rounded_down(0.3979), rounded_down(0.00512)
        ('0.39', '0.0051')
    """
    digits = 1 - math.floor(math.log10(scale))
    return f"{math.floor(scale * 10**digits * (1 + 1e-12)) / 10**digits:.{digits}f}"


def _may_return(matrix: Matrix) -> bool:
    """Whether new directions are expected at a lower strength, and rightly none at this one."""
    curve = matrix.scale_curve
    at_one = [point.new for point in curve.expected if point.scale == 1] if curve else []
    return at_one == [0] and _scale(matrix) < 1


def _scale(matrix: Matrix) -> float:
    """The critical scale of a matrix that has one."""
    scale = critical_scale(matrix)
    return math.inf if scale is None else scale


def _tried(matrix: Matrix) -> int:
    """At how many scales up to its limit a matrix was judged."""
    judged = matrix.scale_curve.judged if matrix.scale_curve else []
    return sum(point.scale <= _scale(matrix) for point in judged)


def _is_aligned(matrix: Matrix) -> bool:
    """Whether the scale that is expected knows how the update lies to its base."""
    return matrix.critical_scale is not None and matrix.critical_scale.aligned


def _ways(record: Record) -> str:
    """What can be done at a lower strength: a server takes another α of a LoRA alone."""
    return "merge" if is_full(record) or not_scaled(record) else "merge or serve"


def _unknown(found: Weaker) -> str | None:
    """Why the scale is not known; None where it is."""
    if found.scale == 0:
        return f"no scale was found at which nothing is new in {found.matrix}"
    return _off(found) if found.scale >= 1 else None


def _left_out(found: Weaker) -> str:
    """How many matrices the limit leaves out, and why."""
    is_, its = ("is", "its base looks") if found.untrained == 1 else ("are", "their bases look")
    left = count(found.untrained, "matrix", "matrices")
    return f"{left} {is_} left out, because {its} untrained"


def _off(found: Weaker) -> str:
    """How often the expectation is wrong, and what follows."""
    of = f"{found.above} of {count(found.affected, 'matrix', 'matrices')} with new directions"
    return f"the estimate is too high for {of}, which may have to be weaker still"
