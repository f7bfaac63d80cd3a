"""Why the verdict of an audit may mislead: every view shows it, a quiet one included."""

from __future__ import annotations

import statistics

from bulkedge._errors import count, printable
from bulkedge.records import Matrix, Record
from bulkedge.records.recipe import HARMLESS, told_setting

from .base_name import doubted_name

FOREIGN = 0.8
"""The base is doubted from this share of matrices on whose update is as large as the base."""
LEAST = 3
"""The least number of matrices from which the base is doubted."""
LARGEST = 1.0
"""A larger ``‖ΔW‖_F / ‖W0‖_F`` is doubted: less of the base is left than was added to it.

A random other matrix of the same norm has √2, the negative 2, and one of twice the scale 1.
"""
LARGEST_OF_NOISE = 10.0
"""The same of a base that looks like noise, where training may well write more than there was."""
SCALED = 0.1
"""An update that is a multiple of its base is doubted from this factor on: W = c·W0, |c − 1| ≥ 0.1.

Training does not write such an update, a wrong scale does.
"""
PARALLEL = 0.05
"""Three measures of the factor agree to this part where an update is a multiple of its base."""
KEPT = 0.95
"""The least score of its directions."""
APART = 10.0
"""An update is doubted whose size, relative to its base, is this many times the median of the
others'; in the example of docs/quickstart.md the largest is at twice the median."""
NOTABLE = 0.25
"""A smaller one is not doubted for that: less than a quarter of the base's norm has changed."""
PEERS = 5
"""The least number of others that it is compared with."""
PART = "part"
"""The doubt that a record is a part of an audit."""


def doubts(record: Record) -> dict[str, str]:
    """Why the verdict may mislead.

    Args:
        record: An audit.

    Returns:
        Sentences by what they are about: ``part``, ``shard``, ``base``, ``adapter``, ``modules``,
        ``config``, ``size``, ``scaled``, ``apart``, ``vectors``, ``norms``, ``damaged``,
        ``missing``, ``inputs``.
    """
    found: dict[str, str | None] = {
        PART: _part(record),
        "shard": _shard(record),
        "base": _base(record),
        "adapter": doubted_name(record),
        "modules": _modules(record),
        "config": _config(record),
        "size": _size(record),
        "scaled": _scaled(record),
        "apart": _apart(record),
        "vectors": _vectors(record),
        "norms": _norms(record),
        "damaged": _damaged(record),
        "missing": _missing(record),
        "inputs": _inputs(record),
    }
    return {name: text for name, text in found.items() if text is not None}


def settings_of(record: Record) -> str | None:
    """The settings of an audit that are not the defaults and change what it finds.

    Args:
        record: An audit.

    Returns:
        Such as ``"epsilon=0.001, exclude=pooler.*"``; None where all are the defaults.
    """
    recipe = record.recipe
    told = []
    for name, field in type(recipe).model_fields.items():
        value = getattr(recipe, name)
        if name not in HARMLESS and value != field.get_default(call_default_factory=True):
            told.append(f"{name}={told_setting(value)}")
    return printable(", ".join(told)) or None


def part_of(record: Record) -> str | None:
    """``"part 1 of 2"``; None of a whole audit."""
    part = record.shard
    return None if part is None else f"part {part.index} of {part.count}"


def _part(record: Record) -> str | None:
    """That the other parts of an audit are not judged here."""
    if record.shard is None:
        return None
    all_ = count(record.shard.matrices, "matrix", "matrices")
    return (
        f"This is {part_of(record)}, with {len(record.matrices)} of {all_}: `bulkedge merge` "
        "judges the whole."
    )


def _shard(record: Record) -> str | None:
    """That an input is one file of a model in several."""
    named = {"base": record.inputs.base.part, "fine-tune": record.inputs.tuned.part}
    parts = [f"the {name} is file {part}" for name, part in named.items() if part is not None]
    if not parts:
        return None
    told = " and ".join(parts)
    return f"{told[0].upper()}{told[1:]} of a model: nothing in its other files is judged."


def _base(record: Record) -> str | None:
    """Why the base may be another model than the one that was fine-tuned."""
    if is_all_noise(record):
        return "The base looks like noise in every matrix: is this the pretrained model?"
    if _foreign(record):
        return (
            "In nearly every matrix the update is as large as the base: is this the model that "
            "the fine-tune began with?"
        )
    return None


def _size(record: Record) -> str | None:
    """That updates are larger than what they update."""
    found = oversized(record)
    if not found:
        return None
    most = max(found, key=lambda matrix: matrix.relative_update or 0.0)
    others = f", and in {count(len(found) - 1, 'other')}" if len(found) > 1 else ""
    return (
        f"In {printable(most.name)} the update is larger than the base's matrix (‖ΔW‖_F/‖W0‖_F = "
        f"{most.relative_update:.3g}){others}: is it another model, or a wrong scale?"
    )


def _scaled(record: Record) -> str | None:
    """That a tuned matrix is a multiple of its base."""
    found = multiples(record)
    if not found:
        return None
    most, factor = max(found, key=lambda pair: abs(pair[1] - 1))
    others = _likewise(len(found))
    return (
        f"{printable(most.name)} is the base's matrix times {factor:.3g}, but for "
        f"{PARALLEL:.0%} of the change at most{others}: is it damaged, or was it stored with "
        "another scale?"
    )


def _apart(record: Record) -> str | None:
    """That an update is far larger than those of the other matrices."""
    found = standing_apart(record)
    if not found:
        return None
    most, times = max(found, key=lambda pair: pair[1])
    others = _likewise(len(found), "in ")
    return (
        f"In {printable(most.name)} the update is {times:.3g} times as large as the median of the "
        f"others, relative to the base (‖ΔW‖_F/‖W0‖_F = {most.relative_update:.3g}){others}: is "
        "the matrix damaged?"
    )


def _likewise(number: int, where: str = "") -> str:
    """How many others a doubt is about, besides the one that it names."""
    return f", and {where}{count(number - 1, 'other')} likewise" if number > 1 else ""


def _modules(record: Record) -> str | None:
    """Where the names of the tuned side do not go together: a program may not load all of it."""
    found = record.inputs.tuned.disagreements
    return " ".join(map(printable, found)) or None


def _config(record: Record) -> str | None:
    """Where a program would build another model by the configuration of the tuned side."""
    found = record.inputs.tuned.contradictions
    return " ".join(map(printable, found)) or None


def _vectors(record: Record) -> str | None:
    """That a vector, or a tensor that the recipe leaves out, has lost all its numbers."""
    found = [row.name for row in record.skipped if row.zeroed]
    if not found:
        return None
    others = _likewise(len(found))
    return (
        f"{printable(found[0])} of the fine-tune is all zeros, that of the base is not{others}: is "
        "it damaged?"
    )


def _norms(record: Record) -> str | None:
    """That a norm has changed by more than its size."""
    found = [
        (row.relative_change, row.name)
        for row in record.skipped
        if (row.relative_change or 0.0) > LARGEST
    ]
    if not found:
        return None
    change, name = max(found)
    return (
        f"{printable(name)} has changed by {change:.3g} times the size of the base's norm"
        f"{_likewise(len(found))}: is it damaged, or of another model?"
    )


def _damaged(record: Record) -> str | None:
    """That what the recipe leaves out holds no numbers: it may have changed, but not so."""
    found = [row for row in record.skipped if row.not_finite is not None and not row.lost]
    if not found:
        return None
    others = _likewise(len(found))
    return (
        f"{printable(found[0].name)} is left out, but holds {found[0].not_finite} where the base "
        f"does not{others}: is it damaged? Save the model again."
    )


def _missing(record: Record) -> str | None:
    """That a full fine-tune lacks vectors, which a program then starts anew."""
    found = [row.name for row in record.skipped if row.missing]
    if not found:
        return None
    return (
        f"{printable(found[0])} of the base is not stored in the fine-tune{_likewise(len(found))}: "
        "a program that loads it starts that vector anew, without an error. Save the model again; "
        "`--partial` says that the fine-tune is loaded over the base."
    )


def _inputs(record: Record) -> str | None:
    """That moments are of few inputs."""
    found = {
        matrix.name: (matrix.drift_inputs, _width(matrix))
        for matrix in record.matrices
        if matrix.drift_inputs is not None and matrix.drift_inputs < _width(matrix)
    }
    if not found:
        return None
    name = max(found, key=lambda name: found[name][1] - found[name][0])
    inputs, width = found[name]
    return (
        f"The moments are of fewer inputs than a layer is wide, for "
        f"{count(len(found), 'matrix', 'matrices')}, such as {printable(name)}: "
        f"{count(inputs, 'input')} for a width of {width}. Drift on other texts may be larger; "
        "measure more texts."
    )


def oversized(record: Record) -> list[Matrix]:
    """The matrices whose update is larger than an honest one is.

    Args:
        record: An audit.

    Returns:
        Those matrices.
    """
    fresh = {id(matrix) for matrix in untrained(record)}
    return [
        matrix
        for matrix in record.matrices
        if (matrix.relative_update or 0.0) > (LARGEST_OF_NOISE if id(matrix) in fresh else LARGEST)
    ]


def multiples(record: Record) -> list[tuple[Matrix, float]]:
    """The tuned matrices that are multiples of their base, with the factor.

    A multiple keeps all directions, changes the largest singular value by the factor, and has an
    update whose two norms, over those of the base, both are its distance from one.

    Args:
        record: An audit.

    Returns:
        Those matrices that no other doubt on their size names.
    """
    large = {id(matrix) for matrix in oversized(record)}
    pairs = [(m, _factor(m)) for m in record.matrices if id(m) not in large]
    return [(matrix, factor) for matrix, factor in pairs if factor is not None]


def _factor(matrix: Matrix) -> float | None:
    """By what a base was multiplied; None where it was not, or by about one."""
    base, update = matrix.spectral_norm_base, matrix.spectral_norm_update
    whole = matrix.relative_update
    first = [row.sigma for row in matrix.directions if row.index == row.matched_index == 0]
    if not base or not update or not whole or not first:
        return None
    if min(row.score for row in matrix.directions) < KEPT:
        return None
    factor = first[0] / base
    alike = all(abs(abs(factor - 1) - x) <= PARALLEL * x for x in (update / base, whole))
    return factor if alike and abs(factor - 1) >= SCALED else None


def standing_apart(record: Record) -> list[tuple[Matrix, float]]:
    """The matrices whose update is far larger than those of the others.

    Args:
        record: An audit.

    Returns:
        Those that no other doubt on their size names, and how many times the others' median.
    """
    named = {id(m) for m in (*oversized(record), *(m for m, _ in multiples(record)))}
    fresh = {id(matrix) for matrix in untrained(record)}
    sizes = [(m, m.relative_update) for m in record.matrices if id(m) not in fresh]
    known = [(m, size) for m, size in sizes if size]
    if len(known) <= PEERS:
        return []
    usual = statistics.median(size for _, size in known)
    return [
        (matrix, size / usual)
        for matrix, size in known
        if size >= NOTABLE and size >= APART * usual and id(matrix) not in named
    ]


def odd_sizes(record: Record) -> list[Matrix]:
    """The matrices that a doubt on the size of their update is about.

    Args:
        record: An audit.

    Returns:
        The oversized, the multiples of their base, and those that stand apart from the others.
    """
    pairs = (*multiples(record), *standing_apart(record))
    return [*oversized(record), *(matrix for matrix, _ in pairs)]


def untrained(record: Record) -> list[Matrix]:
    """Audited matrices whose base is noise by the Marchenko–Pastur law, nothing standing out."""
    return [matrix for matrix in record.matrices if matrix.looks_untrained]


def is_all_noise(record: Record) -> bool:
    """Whether the base may be no trained model at all."""
    audited = record.summary.audited
    return audited >= LEAST and len(untrained(record)) == audited


def _foreign(record: Record) -> bool:
    """Whether the base may be of another model."""
    sizes = [
        (matrix.spectral_norm_update, matrix.spectral_norm_base)
        for matrix in record.matrices
        if matrix.status == "audited"
    ]
    large = sum(1 for update, base in sizes if update and base and update >= base)
    return len(sizes) >= LEAST and large >= FOREIGN * len(sizes)


def _width(matrix: Matrix) -> int:
    """The number of inputs of a layer."""
    return matrix.shape[0] if matrix.transposed else matrix.shape[1]
