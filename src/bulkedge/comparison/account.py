"""Every tensor of two or more dimensions of either side, once, with what became of it.

The list comes from the headers alone, not from the pairing: what the pairing has overlooked, or
covers in part, is found here and is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bulkedge.checkpoint import Adapter, Checkpoint, StoredMatrix, TensorInfo, read_header
from bulkedge.records.recipe import Recipe
from bulkedge.records.record import Fate, Side, Skipped, Stored

from .comparison import Comparison
from .leftover import unjudged

Key = tuple[Side, str]
OVERLOOKED = "not compared with anything"
TWICE = "some of its numbers have two counterparts, and which is used is not known"
# the first that holds for a tensor of several parts
ORDER: tuple[Fate, ...] = ("lost", "judged", "excluded", "apart")


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
) -> tuple[list[Stored], list[Skipped]]:
    """What becomes of each tensor.

    Args:
        base: The base.
        tuned: The tuned side.
        comparisons: What is compared, in order.
        dropped: The pairs that are not.
        skipped: What is left out.
        recipe: What is wanted.

    Returns:
        A row for each tensor of two or more dimensions, and further rows of lost ones: those that
        the arguments do not name, and those of which only a part has a counterpart.
    """
    rows = _rows(comparisons)
    fates = _fates(rows, dropped, skipped)
    pairs = [*comparisons, *(pair.comparison for pair in dropped)]
    covered = _covered(pairs, whole=isinstance(tuned, Checkpoint))
    table: list[Stored] = []
    found: list[Skipped] = []
    for side, info in _matrices(base, tuned):
        key: Key = side, info.name
        mine = fates.get(key, set())
        reason = _shortfall(info, covered.get(key))
        if reason is None and not mine:
            reason = None if isinstance(tuned, Adapter) and side == "base" else OVERLOOKED
        if reason is not None and "lost" not in mine:
            short = unjudged(recipe, info.name, (), reason, side)
            found.append(short)
            more: Fate = "lost" if short.lost else "excluded"
            mine.add(more)
        row = Stored(side=side, name=info.name, fate=_first(mine), rows=rows.get(key, []))
        table.append(row)
    return table, found


def _first(fates: set[Fate]) -> Fate:
    """What a tensor counts as."""
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
        for key in _keys(pair.comparison):
            fates.setdefault(key, set()).add(pair.fate)
    for row in skipped:
        fate: Fate = "lost" if row.lost else "excluded" if row.accepted else "apart"
        fates.setdefault((row.side, row.name), set()).add(fate)
    return fates


def matrices_in(side: Checkpoint | Adapter) -> list[TensorInfo]:
    """The tensors of two or more dimensions in the files of one side."""
    if isinstance(side, Checkpoint):
        infos: Iterable[TensorInfo] = side.tensors.values()
    else:
        infos = read_header(side.files[0])[0].values()
    return [info for info in infos if len(info.shape) > 1]


def _matrices(base: Checkpoint, tuned: Checkpoint | Adapter) -> list[tuple[Side, TensorInfo]]:
    """Those of both sides."""
    before: list[tuple[Side, TensorInfo]] = [("base", info) for info in matrices_in(base)]
    return [*before, *(("tuned", info) for info in matrices_in(tuned))]


def _rows(comparisons: Sequence[Comparison]) -> dict[Key, list[int]]:
    """The comparisons that each tensor is read for, by their position."""
    rows: dict[Key, list[int]] = {}
    for position, comparison in enumerate(comparisons):
        for key in dict.fromkeys(_keys(comparison)):
            rows.setdefault(key, []).append(position)
    return rows


def _keys(comparison: Comparison) -> list[Key]:
    """The tensors that a comparison reads, the scales of its weights included."""
    base, tuned = comparison.base, comparison.tuned
    names = [*comparison.stored_names, *(_scales(tuned) if tuned else ())]
    before: list[Key] = [("base", name) for name in (base.info.name, *_scales(base))]
    return [*before, *(("tuned", name) for name in names)]


def _scales(matrix: StoredMatrix) -> list[str]:
    return [] if matrix.scales is None else [matrix.scales.info.name]


def _covered(pairs: Iterable[Comparison], *, whole: bool) -> dict[Key, int]:
    """How many elements of each full tensor belong to a pair; of the base if it must be whole."""
    parts: dict[Key, set[tuple[object, object]]] = {}
    sizes: dict[tuple[Key, object, object], int] = {}

    def add(side: Side, matrix: StoredMatrix) -> None:
        key: Key = side, matrix.info.name
        parts.setdefault(key, set()).add((matrix.expert, matrix.rows))
        sizes[key, matrix.expert, matrix.rows] = matrix.size

    for pair in pairs:
        if whole:
            add("base", pair.base)
        if pair.tuned is not None:
            add("tuned", pair.tuned)
    return {key: sum(sizes[(key, *part)] for part in found) for key, found in parts.items()}


def _shortfall(info: TensorInfo, covered: int | None) -> str | None:
    """What to say of a tensor whose parts do not add up to it; None of others."""
    size = math.prod(info.shape)
    if covered is None or covered == size:
        return None
    if covered > size:
        return TWICE
    return f"only {covered} of its {size} numbers have a counterpart"
