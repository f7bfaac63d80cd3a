"""Why the verdict of an audit may mislead: every view shows it, a quiet one included."""

from __future__ import annotations

from bulkedge._errors import count, printable
from bulkedge.records import Matrix, Record
from bulkedge.records.recipe import HARMLESS, told_setting

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


def doubts(record: Record) -> dict[str, str]:
    """Why the verdict may mislead.

    Args:
        record: An audit.

    Returns:
        Sentences by what they are about: ``part``, ``base``, ``adapter``, ``size``, ``inputs``.
    """
    found: dict[str, str | None] = {
        "part": _part(record),
        "base": _base(record),
        "adapter": _adapter(record),
        "size": _size(record),
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


def _adapter(record: Record) -> str | None:
    """That an adapter names another base."""
    named = record.inputs.tuned.trained_on
    if named is None or names_its_base(record):
        return None
    return (
        f"The adapter names {printable(named)} as its base, you gave "
        f"{printable(record.inputs.base.path)}: are they the same model?"
    )


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


def names_its_base(record: Record) -> bool:
    """Whether the base that an adapter names is, by its name, the one that was given.

    Args:
        record: An audit.

    Returns:
        True where the last part of the name is a part of the path; False without a name.
    """
    named = record.inputs.tuned.trained_on
    if named is None:
        return False
    last = named.rstrip("/").rpartition("/")[2]
    return bool(last) and _plain(last) in _plain(record.inputs.base.path)


def untrained(record: Record) -> list[Matrix]:
    """Audited matrices whose base is noise by the Marchenko–Pastur law, nothing standing out."""
    return [
        matrix
        for matrix in record.matrices
        if matrix.status == "audited"
        and matrix.bulk is not None
        and matrix.bulk.white
        and not matrix.bulk.spikes
    ]


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


def _plain(name: str) -> str:
    """A name as indexes, caches and folders all write it."""
    return name.lower().replace("_", "-").replace(".", "-")


def _width(matrix: Matrix) -> int:
    """The number of inputs of a layer."""
    return matrix.shape[0] if matrix.transposed else matrix.shape[1]
