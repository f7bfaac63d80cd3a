"""Parts of an audit: which matrices a part has, and one record from the records of all parts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bulkedge._errors import CheckpointError, InputError
from bulkedge._fields import check_fields, whole
from bulkedge.comparison.plan import Comparison
from bulkedge.records.record import MAX_SHARDS, Part, Record, Run
from bulkedge.records.summary import summarise

from .engine._order import largest_first
from .inputs import contents


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count``, counted from 1.

    The selection depends only on the shapes, so that every machine agrees: each matrix,
    the largest first, goes to the part with the fewest elements so far.

    Attributes:
        index: Which part.
        count: The number of parts; if there are more than matrices, some are empty.

    Raises:
        InputError: Unless 1 ≤ index ≤ count.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        check_fields(self, index=whole(0), count=whole(0))
        if self.count > MAX_SHARDS:
            raise InputError(f"expected at most {MAX_SHARDS} shards, got {self.count}")
        if not 1 <= self.index <= self.count:
            raise InputError(
                f"expected a shard I/N with 1 ≤ I ≤ N, got {self.index}/{self.count}; the first "
                "is 1"
            )

    def positions(self, comparisons: Sequence[Comparison]) -> list[int]:
        """Which of all comparisons this part has, in order."""
        loads = [0] * self.count
        mine = []
        for i in largest_first(comparisons):
            part = loads.index(min(loads))
            loads[part] += comparisons[i].base.size
            if part == self.index - 1:
                mine.append(i)
        return sorted(mine)


def merge_shards(places: Sequence[str | Path]) -> Record:
    """One record from the records of all parts of an audit: that of the whole, except ``run``.

    Args:
        places: The folders of the parts, or their ``record.json``, in any order.

    Returns:
        The record.  Its run began with the first part; its seconds and jobs are sums.

    Raises:
        CheckpointError: If a record is missing or damaged.
        InputError: If the parts differ in inputs, recipe or versions, or one is missing or doubled.
    """
    parts = {str(place): _read(Path(place)) for place in places}
    if not parts:
        raise InputError("expected the folders of an audit's shards, got none")
    _check_same(parts)
    _check_complete(parts)
    found = sorted((_part(record).index, record) for record in parts.values())
    records = [record for _, record in found]
    rows = {i: row for r in records for i, row in zip(_part(r).positions, r.matrices, strict=True)}
    matrices = [rows[i] for i in sorted(rows)]
    first = records[0]
    jobs = [record.run.jobs for record in records]
    run = Run(
        started=min(record.run.started for record in records),
        seconds=round(sum(record.run.seconds for record in records), 3),
        engine=first.run.engine,
        jobs=None if None in jobs else sum(job or 0 for job in jobs),
        resumed=sum(record.run.resumed for record in records),
    )
    try:
        moments = first.inputs.moments is not None
        summary = summarise(matrices, first.skipped, first.tensors, moments=moments)
    except IndexError:
        raise CheckpointError(
            "the shards' tensors are of more matrices than there are; was a record.json edited?"
        ) from None
    update = {"summary": summary, "matrices": matrices, "shard": None, "run": run}
    return first.model_copy(update=update)


def _read(place: Path) -> Record:
    """The record of one part."""
    path = place / Record.file_name if place.is_dir() else place
    if place.is_dir() and not os.path.lexists(path):  # a link that leads nowhere is no missing file
        raise CheckpointError(
            f"{place}: no {Record.file_name} in it; finish that shard first, with --resume"
        )
    record = Record.from_json(path)
    if record.shard is None:
        raise InputError(f"{place}: expected the record of a shard, got one of a whole audit")
    return record


def _part(record: Record) -> Part:
    """Which part a record has; that it has one was checked."""
    if record.shard is None:
        raise InputError("expected the record of a shard, got one of a whole audit")
    return record.shard


def _check_same(parts: Mapping[str, Record]) -> None:
    """Raise where two parts are not of one audit."""
    (name, first), *others = parts.items()
    for other, record in others:
        for what, mine, theirs in _facts(first, record):
            if mine != theirs:
                raise InputError(
                    f"{name} and {other}: expected shards of one audit, but their {what} differ; "
                    "run one of them again"
                )


def _facts(a: Record, b: Record) -> list[tuple[str, Any, Any]]:
    """What all parts of an audit agree in."""
    one, two = _part(a), _part(b)
    return [
        ("inputs", contents(a.inputs), contents(b.inputs)),
        ("recipes", a.recipe, b.recipe),
        ("versions", a.tool, b.tool),
        ("numbers of shards", one.count, two.count),
        ("numbers of matrices", one.matrices, two.matrices),
        ("skipped tensors", a.skipped, b.skipped),
        ("lists of tensors", a.tensors, b.tensors),
    ]


def _check_complete(parts: Mapping[str, Record]) -> None:
    """Raise where a part is missing or doubled, or matrices are."""
    seen: dict[int, str] = {}
    for name, record in parts.items():
        index = _part(record).index
        if other := seen.get(index):
            raise InputError(f"{other} and {name}: both hold shard {index}; leave one out")
        seen[index] = name
    whole = _part(next(iter(parts.values())))
    if missing := sorted(set(range(1, whole.count + 1)) - set(seen)):
        told = ", ".join(f"{i}/{whole.count}" for i in missing[:10])
        raise InputError(f"expected {whole.count} shards, got {len(seen)}; missing: {told}")
    positions = sorted(i for record in parts.values() for i in _part(record).positions)
    counts = all(len(_part(r).positions) == len(r.matrices) for r in parts.values())
    if not counts or positions != list(range(whole.matrices)):
        raise CheckpointError("the shards' matrices do not add up; was a record.json edited?")
