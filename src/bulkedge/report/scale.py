"""By what factor an update must be scaled before it is merged, so that nothing new arises."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bulkedge._errors import count, printable
from bulkedge.records import Matrix, Record

from .columns import critical_scale
from .doubts import untrained
from .merging import is_full, not_scaled


@dataclass(frozen=True)
class Weaker:
    """What the critical scales say of the matrices with new directions, now or at a lower strength.

    Attributes:
        scale: The smallest; 1 and more is not believed, since new directions are there.
        measured: Whether it is one that was measured; else it is expected.
        rough: Whether it is expected by the norm of an update alone.
        matrix: Whose it is.
        known: How many matrices it is the smallest of.
        affected: How many of them have new directions now.
        above: How many of these are expected to have none.
        untrained: How many more were left out, since their base looks like noise.
    """

    scale: float
    measured: bool
    rough: bool
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
        matrix=first.name.removesuffix(".weight"),
        known=len(trained),
        affected=sum(bool(matrix.new_directions) for matrix in trained),
        above=0 if measured else sum(m.new_directions > 0 and _scale(m) >= 1 for m in trained),
        untrained=len(counted) - len(trained),
    )


def scale_lines(record: Record) -> list[str]:
    """How much weaker, in lines of a terminal: the limit, whose it is, and where it is wrong.

    Args:
        record: An audit.

    Returns:
        Nothing where nothing has to be weaker, or no limit is known.
    """
    found = weaker(record)
    if found is None:
        return []
    if why := _unknown(found):
        return [f"weaker: by how much is NOT known: {why}"]
    how = "measured" if found.measured else "an estimate"
    at = _down(found.scale)
    if found.rough:
        first = (
            f"weaker: {at} of the update may leave no new direction, a guess by its norm alone; "
            "--critical-scale measures it"
        )
    else:
        then = f"{_ways(record)} it at ≤ {at} of its strength ({how})"
        first = f"weaker: to have no new direction, {then}"
    limit = f"weaker: {found.matrix} sets this limit"
    if found.untrained:
        limit += f"; {_left_out(found, 'matrix', 'matrices')}"
    lines = [first, limit]
    if part := not_scaled(record):
        lines.append(f"weaker: {_how_to_merge(part)}")
    return [*lines, f"weaker: {_off(found)}"] if found.above else lines


def scale_sentences(record: Record) -> list[str]:
    """The same in sentences, for a page."""
    found = weaker(record)
    if found is None:
        return []
    if why := _unknown(found):
        return [f"It is not known how much weaker it must be: {printable(why)}."]
    known = count(found.known, "matrix", "matrices")
    if found.measured:
        then = "no direction is new, as measured there and at steps below"
    else:
        then = "no new direction is expected; that is an estimate"
        if found.rough:
            then = "it may have no new direction; that is a guess by its norm alone, and "
            then += "--critical-scale measures it"
        known += " with new directions"
        if found.affected < found.known:
            known += ", now or at a lower strength"
    sentences = [
        f"{_done(record)} at ≤ {_down(found.scale)} of its strength, {then}.",
        f"{printable(found.matrix)} sets this limit, the lowest critical scale of {known}.",
    ]
    if part := not_scaled(record):
        told = _how_to_merge(part)
        sentences.append(f"{told[0].upper()}{told[1:]}.")
    if found.untrained:
        sentences.append(f"{_left_out(found, 'other', 'others')}.")
    if found.above:
        off = _off(found)
        sentences.append(f"{off[0].upper()}{off[1:]}.")
    return sentences


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
    nothing = "nothing is new, measured" if found.measured else "nothing expected to be new"
    if found.rough:
        nothing = "a guess by its norm"
    return found.scale, f"≤ {_down(found.scale)}", f"of its strength: {nothing}"


def _may_return(matrix: Matrix) -> bool:
    """Whether new directions are expected at a lower strength, and rightly none at this one."""
    curve = matrix.scale_curve
    at_one = [point.new for point in curve.expected if point.scale == 1] if curve else []
    return at_one == [0] and _scale(matrix) < 1


def _scale(matrix: Matrix) -> float:
    """The critical scale of a matrix that has one."""
    scale = critical_scale(matrix)
    return math.inf if scale is None else scale


def _is_aligned(matrix: Matrix) -> bool:
    """Whether the scale that is expected knows how the update lies to its base."""
    return matrix.critical_scale is not None and matrix.critical_scale.aligned


def _ways(record: Record) -> str:
    """What can be done at a lower strength: a server takes another α of a LoRA alone."""
    return "merge" if is_full(record) or not_scaled(record) else "merge or serve"


def _done(record: Record) -> str:
    """The same as participles."""
    return "Merged or served" if _ways(record) == "merge or serve" else "Merged"


def _how_to_merge(part: str) -> str:
    """Why a smaller α is not enough, and what is."""
    return (
        f"α does not scale all of it ({printable(part)}): merge it into the model, then "
        "repair --method rescale --uniform writes the weaker copy"
    )


def _unknown(found: Weaker) -> str | None:
    """Why the scale is not known; None where it is."""
    if found.scale == 0:
        return f"no scale was found at which nothing is new in {found.matrix}"
    return _off(found) if found.scale >= 1 else None


def _left_out(found: Weaker, one: str, many: str) -> str:
    """How many matrices the limit leaves out, and why."""
    is_, its = ("is", "its base looks") if found.untrained == 1 else ("are", "their bases look")
    return f"{count(found.untrained, one, many)} {is_} left out, because {its} untrained"


def _off(found: Weaker) -> str:
    """How often the expectation is wrong, and what follows."""
    of = f"{found.above} of {count(found.affected, 'matrix', 'matrices')} with new directions"
    return f"the estimate is too high for {of}, which may have to be weaker still"


def _down(scale: float) -> str:
    """A scale in two digits, rounded down, so that it is no more than what it stands for."""
    digits = 1 - math.floor(math.log10(scale))
    return f"{math.floor(scale * 10**digits * (1 + 1e-12)) / 10**digits:.{digits}f}"
