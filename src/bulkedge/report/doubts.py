"""Why a verdict may be about the wrong files: another base, no pretrained one, a damaged one."""

from __future__ import annotations

from bulkedge._errors import count, printable
from bulkedge.records import Matrix, Record

FOREIGN = 0.8
"""The base is doubted from this share of matrices on whose update is as large as the base."""
ABSURD = 10
"""An update so many times as strong as its base is doubted."""
LEAST = 3
"""The least number of matrices from which the base is doubted."""


def doubts_of(record: Record) -> list[str]:
    """Why the files may not be what they should be, in sentences."""
    return [*doubts_of_the_base(record), *_doubts_of_scales(record)]


def _doubts_of_scales(record: Record) -> list[str]:
    """An update far above its base: often a file whose scales are damaged."""
    found = [
        (update / base, matrix)
        for matrix in record.matrices
        if matrix.status == "audited"
        and (update := matrix.spectral_norm_update) and (base := matrix.spectral_norm_base)
        and update > ABSURD * base
    ]  # fmt: skip
    if not found or _foreign(record):
        return []
    ratio, worst = max(found, key=lambda pair: pair[0])
    where = printable(worst.name.partition("[")[0].removesuffix(".weight"))
    if len(found) > 1:
        where += f", and far stronger in {count(len(found) - 1, 'more matrix', 'more matrices')}"
    return [
        f"The update is {ratio:.3g} times as strong as the base in {where}: was the file damaged, "
        "such as a scale of quantised weights?"
    ]


def doubts_of_the_base(record: Record) -> list[str]:
    """Why the base may be another model than the one that was fine-tuned."""
    doubts = []
    if is_all_noise(record):
        doubts.append("The base looks like noise in every matrix: is this the pretrained model?")
    elif _foreign(record):
        doubts.append(
            "In nearly every matrix the update is as large as the base: is this the model that "
            "the fine-tune began with?"
        )
    named = record.inputs.tuned.trained_on
    if named is not None and not names_its_base(record):
        doubts.append(
            f"The adapter names {printable(named)} as its base, you gave "
            f"{printable(record.inputs.base.path)}: are they the same model?"
        )
    return doubts


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


def _plain(name: str) -> str:
    """A name as indexes, caches and folders all write it."""
    return name.lower().replace("_", "-").replace(".", "-")


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
