"""Every tensor of two or more dimensions of either side, once, with what became of it.

The list comes from the headers alone, not from the pairing: what the pairing has overlooked, or
covers in part, is found here and counts as lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bulkedge.checkpoint import Adapter, Checkpoint, StoredMatrix, TensorInfo, read_header
from bulkedge.records.recipe import Recipe
from bulkedge.records.tensors import Fate, InputSide, Skipped, Stored

from .comparison import Comparison
from .leftover import unjudged

Key = tuple[InputSide, str]
"""A tensor: which input holds it, and its name there."""
OVERLOOKED = "not compared with anything"
TWICE = "some of its numbers have two counterparts, and which is used is not known"
ORDER: tuple[Fate, ...] = ("lost", "judged", "excluded", "apart")
"""What a tensor of several parts counts as: the first of these that holds for a part."""


@dataclass(frozen=True)
class Dropped:
    """A pair that is not compared.

    Attributes:
        comparison: The pair.
        fate: What becomes of its tensors.
    """

    comparison: Comparison
    fate: Fate


def account(
    base: Checkpoint,
    tuned: Checkpoint | Adapter,
    comparisons: Sequence[Comparison],
    dropped: Sequence[Dropped],
    skipped: Sequence[Skipped],
    recipe: Recipe,
    unjudged_base: Mapping[str, Fate],
) -> tuple[list[Stored], list[Skipped]]:
    """What becomes of each tensor.

    Args:
        base: The base.
        tuned: The tuned side.
        comparisons: What is compared, in order.
        dropped: The pairs that are not.
        skipped: What is left out.
        recipe: What is wanted.
        unjudged_base: What becomes of the base's tensors whose update is not compared, by name.

    Returns:
        A row for each tensor of two or more dimensions, and further rows of lost ones: those that
        the arguments do not name, and those of which only a part has a counterpart.
    """
    rows = _rows(comparisons)
    fates = _fates(rows, dropped, skipped)
    for name, fate in unjudged_base.items():
        fates.setdefault(("base", name), set()).add(fate)
    pairs = [*comparisons, *(pair.comparison for pair in dropped)]
    covered = _covered(pairs, with_base=isinstance(tuned, Checkpoint))
    table: list[Stored] = []
    unaccounted: list[Skipped] = []
    for side, info in _matrices(base, tuned):
        key: Key = side, info.name
        known = fates.get(key, set())
        reason = _shortfall(*covered[key]) if key in covered else None
        if reason is None and not known:
            reason = None if isinstance(tuned, Adapter) and side == "base" else OVERLOOKED
        if reason is not None and "lost" not in known:
            skipped_row = unjudged(recipe, info.name, (), reason, side)
            unaccounted.append(skipped_row)
            added: Fate = "lost" if skipped_row.lost else "excluded"
            known.add(added)
        row = Stored(side=side, name=info.name, fate=_worst(known), rows=rows.get(key, []))
        table.append(row)
    return table, unaccounted


def _worst(fates: set[Fate]) -> Fate:
    """What a tensor of parts with these fates counts as."""
    for fate in ORDER:
        if fate in fates:
            return fate
    return "kept"


def _fates(
    rows: Iterable[Key], dropped: Iterable[Dropped], skipped: Iterable[Skipped]
) -> dict[Key, set[Fate]]:
    """What is known of each tensor: several things of one that has several parts."""
    fates: dict[Key, set[Fate]] = {key: {"judged"} for key in rows}
    for pair in dropped:
        for key in keys_of(pair.comparison):
            fates.setdefault(key, set()).add(pair.fate)
    for row in skipped:
        fate: Fate = "lost" if row.lost else "excluded" if row.accepted else "apart"
        fates.setdefault((row.side, row.name), set()).add(fate)
    return fates


def matrices_in(side: Checkpoint | Adapter) -> list[TensorInfo]:
    """The tensors of two or more dimensions in the files of one side."""
    if not isinstance(side, Checkpoint):
        infos = side.stored or read_header(side.files[0])[0].values()
        return [info for info in infos if len(info.shape) > 1]
    packed = {codec.info.name for codec in side.weights.values() if len(codec.shape) > 1}
    return [info for info in side.tensors.values() if len(info.shape) > 1 or info.name in packed]


def _matrices(base: Checkpoint, tuned: Checkpoint | Adapter) -> list[tuple[InputSide, TensorInfo]]:
    """The tensors of two or more dimensions of both sides."""
    of_base: list[tuple[InputSide, TensorInfo]] = [("base", info) for info in matrices_in(base)]
    return [*of_base, *(("tuned", info) for info in matrices_in(tuned))]


def _rows(comparisons: Sequence[Comparison]) -> dict[Key, list[int]]:
    """The comparisons that each tensor is read for, by their position."""
    rows: dict[Key, list[int]] = {}
    for position, comparison in enumerate(comparisons):
        for key in dict.fromkeys(keys_of(comparison)):
            rows.setdefault(key, []).append(position)
    return rows


def keys_of(comparison: Comparison) -> list[Key]:
    """The tensors that a comparison reads, with the companions of quantised weights.

    Args:
        comparison: A pair.

    Returns:
        Their sides and names.
    """
    base, tuned = comparison.base, comparison.tuned
    companions = () if tuned is None else tuned.codec.companions
    names = [*comparison.stored_names, *(info.name for info in companions)]
    of_base: list[Key] = [("base", info.name) for info in base.codec.infos]
    return [*of_base, *(("tuned", name) for name in names)]


def _covered(pairs: Iterable[Comparison], *, with_base: bool) -> dict[Key, tuple[int, int]]:
    """How many numbers of each weight belong to a pair, and how many the weight has in all."""
    parts: dict[Key, set[tuple[object, object]]] = {}
    sizes: dict[tuple[Key, object, object], int] = {}
    totals: dict[Key, int] = {}

    def add(side: InputSide, matrix: StoredMatrix, resized: bool) -> None:
        key: Key = side, matrix.info.name
        parts.setdefault(key, set()).add((matrix.expert, matrix.rows))
        sizes[key, matrix.expert, matrix.rows] = matrix.size
        # the other rows of a resized vocabulary have no counterpart, and a row that says so
        totals[key] = matrix.size if resized else math.prod(matrix.codec.shape)

    for pair in pairs:
        if with_base:
            add("base", pair.base, pair.resized is not None)
        if pair.tuned is not None:
            add("tuned", pair.tuned, pair.resized is not None)
    return {
        key: (sum(sizes[(key, *part)] for part in known), totals[key])
        for key, known in parts.items()
    }


def _shortfall(covered: int, size: int) -> str | None:
    """What to say of a tensor whose parts do not add up to it; None where they do."""
    if covered == size:
        return None
    if covered > size:
        return TWICE
    return f"only {covered} of its {size} numbers have a counterpart"
