"""What to compare with what, settled from headers, before the first number is computed.

What no matrix is read from, such as norms and biases, is read here: it must be finite.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bulkedge._errors import AdapterError, CheckpointError, NothingAuditedError
from bulkedge._globs import check_globs
from bulkedge.checkpoint import (
    Adapter,
    Checkpoint,
    StoredMatrix,
    open_base,
    open_path,
)
from bulkedge.checkpoint.header import EMPTY
from bulkedge.checkpoint.layout import is_kernel, is_stack
from bulkedge.checkpoint.of_base import OfBase
from bulkedge.checkpoint.packed import refuse_packed
from bulkedge.records.recipe import Recipe
from bulkedge.records.tensors import Fate, InputSide, Skipped, Stored

from .account import Dropped, account
from .comparison import Comparison, Vector
from .configs import differing_configs
from .excluded import with_excluded_damage
from .finite import with_damaged, with_zeroed
from .initial import why_not_initial
from .leftover import EXCLUDED, NOT_INCLUDED, Pairing, not_a_weight, set_aside, why_excluded
from .norms import with_norm_changes
from .pairing import pair_adapter, pair_checkpoint
from .parameters import judged_aside
from .prefixes import odd_names
from .targets import with_disagreements
from .vocabulary import common_rows, rows_left_over

__all__ = ["Comparison", "Plan", "make_plan"]

MAX_REASONS = 5
"""The message for an empty plan names no more reasons than this."""
DAMAGED = "a damaged save (such as of ZeRO-3's shards that were not gathered); save it again"


@dataclass(frozen=True)
class Plan:
    """A checked comparison of two inputs.

    Attributes:
        base: The base checkpoint.
        tuned: The tuned checkpoint or adapter.
        comparisons: The matrices to audit, in the base's order.
        skipped: Every other tensor of the tuned side, and of the base where it should have one.
        tensors: Every tensor of two or more dimensions of either side, and its outcome.
        moments: The file of moments that drift is measured with; None without.
        vectors: The vectors of the tuned side, such as biases.
    """

    base: Checkpoint
    tuned: Checkpoint | Adapter
    comparisons: tuple[Comparison, ...]
    skipped: tuple[Skipped, ...]
    tensors: tuple[Stored, ...] = ()
    moments: Path | None = None
    vectors: tuple[Vector, ...] = ()

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        more = () if self.moments is None else (self.moments,)
        return [*self.base.files, *self.tuned.files, *more]

    @property
    def names(self) -> list[str]:
        """What globs may match: the names of either side."""
        return _names(self.base, self.tuned)


def make_plan(base: str | Path, tuned: str | Path, recipe: Recipe) -> Plan:
    """Open both inputs, pair their tensors, and check that each pair fits.

    Args:
        base: The base checkpoint: a file or a folder.
        tuned: The tuned checkpoint, or a LoRA adapter folder.
        recipe: Which tensors are wanted.

    Returns:
        The plan.  Only headers have been read, and tensors that hold no audited matrix.

    Raises:
        CheckpointError: If an input cannot be read, or a pair differs in shape.
        AdapterError: If the adapter does not belong to the base.
        NothingAuditedError: If no matrix is left to compare.
        RecipeError: If a glob of the recipe matches nothing.
    """
    base_checkpoint = open_base(base)
    if base_checkpoint is None:
        raise CheckpointError(_why_no_base(base, tuned))
    refuse_packed(base_checkpoint)
    opened = _open_tuned(tuned)
    if isinstance(opened, Adapter):
        pairing = pair_adapter(base_checkpoint, opened, recipe)
        opened = with_disagreements(base_checkpoint, opened, pairing.pairs)
    else:
        pairing = pair_checkpoint(base_checkpoint, opened, recipe)
        opened = replace(
            opened,
            disagreements=tuple(odd_names((*pairing.pairs, *pairing.excluded))),
            contradictions=tuple(differing_configs(base_checkpoint, opened)),
        )
    not_read = [*_not_read("base", base_checkpoint), *_not_read("tuned", opened)]
    wanted, dropped, not_compared = _choose(pairing, recipe)
    skipped = [*pairing.skipped, *not_read, *not_compared]
    skipped = with_damaged(skipped, base_checkpoint, opened, wanted, recipe)
    check_globs(recipe.split, list(base_checkpoint.weights))
    # a glob may also name a layer that should be stored and is not
    missing = (row.name for row in skipped)
    check_globs((*recipe.include, *recipe.exclude), [*_names(base_checkpoint, opened), *missing])
    if not wanted:
        raise NothingAuditedError(_why_nothing(base, tuned, skipped))
    _check_unique(wanted)
    order = {codec.info.name: i for i, codec in enumerate(base_checkpoint.weights.values())}
    wanted.sort(key=lambda comparison: _place(comparison.base, order))
    tensors, unaccounted = account(
        base_checkpoint, opened, wanted, dropped, skipped, recipe, pairing.unjudged_base
    )
    vectors = tuple(_vectors(opened, dropped, recipe))
    marked = with_excluded_damage(with_zeroed(skipped, vectors), opened, dropped, recipe)
    all_skipped = (*with_norm_changes(marked, dropped), *unaccounted)
    return Plan(
        base_checkpoint,
        opened,
        tuple(wanted),
        all_skipped,
        tuple(tensors),
        None,
        vectors,
    )


def _vectors(
    opened: Checkpoint | Adapter, dropped: Iterable[Dropped], recipe: Recipe
) -> Iterator[Vector]:
    """The vectors that the recipe does not leave out."""
    if isinstance(opened, Adapter):  # the bias of a factor is added to that of the layer
        for row in opened.unhandled:
            names = (row.name, row.info.name)
            if row.set_aside and len(row.info.shape) == 1 and not why_excluded(recipe, *names):
                yield Vector(row.name, None, row.info)
    for each in dropped:
        base, tuned = each.comparison.base, each.comparison.tuned
        if each.fate == "apart" and tuned is not None and len(base.codec.shape) != 2:
            yield Vector(base.codec.name, base.info, tuned.info)


def _open_tuned(path: str | Path) -> Checkpoint | Adapter:
    """The tuned side opened, and checked to hold weights that can be read."""
    opened = open_path(path)
    if isinstance(opened, Adapter):
        return opened
    refuse_packed(opened)
    if any(".lora_A." in name or "lora_down" in name for name in opened.tensors):
        raise AdapterError(
            f"{opened.path}: holds LoRA factors but no adapter_config.json beside them, which has "
            "their scale; give PEFT's adapter folder"
        )
    return opened


def _why_no_base(base: str | Path, tuned: str | Path) -> str:
    """The message for an adapter in the place of the base."""
    both_adapters = False
    with suppress(CheckpointError):  # a damaged tuned side is not what this message is about
        both_adapters = open_base(tuned) is None
    if both_adapters:
        return (
            f"{base}: is an adapter, and so is {tuned}; the base model comes first, and must be a "
            "full model: give the one that the adapter was trained on"
        )
    return f"{base}: is an adapter; the base model comes first, then the fine-tune"


def _not_read(side: InputSide, opened: Checkpoint | Adapter) -> list[Skipped]:
    """A row for each other weights file of a folder, because the user may have meant that one."""
    read = "the sharded checkpoint" if opened.kind == "sharded" else opened.files[0].name
    reason = f"not read: in the {side} folder {read} is taken; name this file to audit it instead"
    rows = [set_aside(name, reason) for name in opened.beside]
    if isinstance(opened, Checkpoint):
        rows += [set_aside(name, why, side) for name, why in opened.superseded.items()]
    return rows


def _choose(
    pairing: Pairing, recipe: Recipe
) -> tuple[list[Comparison], list[Dropped], list[Skipped]]:
    """The pairs to audit, their shapes checked; the other pairs; and a row for each of those."""
    wanted: list[Comparison] = []
    dropped = [Dropped(comparison, "excluded") for comparison in pairing.excluded]
    rows: dict[tuple[str, str], Skipped] = {}  # the experts of a stack share a tensor and its row
    for comparison in pairing.pairs:
        pair = common_rows(comparison)
        why = _why_not(comparison, recipe)
        if why is None and not isinstance(pair, str):
            _check_shapes(pair)
            wanted.append(pair)
            if (left := rows_left_over(pair)) is not None:
                rows.setdefault((left.name, left.reason), left)
            continue
        why = why or (str(pair), "lost")
        reason, fate = why
        dropped.append(Dropped(comparison, fate))
        lost, accepted = fate == "lost", fate == "excluded"
        for name in comparison.stored_names:
            row = Skipped(name=name, reason=reason, lost=lost, accepted=accepted)
            rows.setdefault((name, reason), row)
    return wanted, dropped, list(rows.values())


def _why_not(comparison: Comparison, recipe: Recipe) -> tuple[str, Fate] | None:
    """Why a pair is not compared, and what that makes of it; None if it is."""
    stored = [matrix.info.name for matrix in comparison.matrices]
    names = (comparison.base.name, comparison.tuned_name, *stored)
    if reason := why_excluded(recipe, *names):
        return reason, "excluded"
    base, *tuned = (matrix.codec for matrix in comparison.matrices)
    if {codec.info.empty for codec in (base, *tuned)} == {True, False}:
        return EMPTY, "lost"
    if reason := not_a_weight(base):
        return reason, "apart" if all(map(not_a_weight, tuned)) else "lost"
    for codec in tuned:
        if reason := not_a_weight(codec):
            return f"{reason}, where the base has a weight {base.shape}: {DAMAGED}", "lost"
    return _not_handled(comparison)


def _place(matrix: StoredMatrix, order: dict[str, int]) -> tuple[int, bool, int, tuple[int, int]]:
    """Where a matrix stands in the base: its tensor, whether under another name, expert, rows."""
    shared = matrix.alias is not None
    return order[matrix.info.name], shared, matrix.expert or 0, matrix.rows or (0, 0)


def _not_handled(comparison: Comparison) -> tuple[str, Fate] | None:
    """Why a pair of weights cannot be judged, and what that makes of it; None if it can."""
    for matrix in comparison.matrices:
        if reason := matrix.codec.unreadable:
            return reason, "lost"
    update = comparison.factors
    if isinstance(update, OfBase) and comparison.transposed and not update.may_turn:
        return f"{update.kind} of a weight stored as (in, out), which PEFT does not have", "lost"
    if reason := why_not_initial(comparison):
        return reason, "lost"
    for matrix in comparison.matrices:
        codec = matrix.codec
        name, shape = codec.name, codec.shape
        if len(shape) > 2 and not (is_stack(name, shape) or is_kernel(name, shape)):
            known = judged_aside(comparison, len(shape))
            unknown = f"{len(shape)}-D tensor: neither a kernel nor a stack of experts by name"
            return known or (unknown, "lost")
    return None


def _check_shapes(comparison: Comparison) -> None:
    """Raise unless all parts of a comparison have the base's shape."""
    base, tuned, factors = comparison.base, comparison.tuned, comparison.factors
    if tuned is not None and (tuned.acts_as != base.acts_as or _is_whole_stack(comparison)):
        raise CheckpointError(
            f"{tuned.info.file}: tensor {tuned.name!r} has shape "
            f"{_shape_in_file(tuned)}, expected {_shape_in_file(base)} of {base.name!r} in "
            f"{base.info.file}; give the base that it was tuned from, or leave it "
            f"out with --exclude {base.name!r}"
        )
    if factors is not None and factors.shape != base.acts_as:
        raise AdapterError(
            f"{factors.infos[0].file}: tensor {factors.infos[0].name!r} updates a weight of shape "
            f"{factors.shape}, but {base.name!r} in {base.info.file} has {base.shape}; the "
            "adapter was trained for another base"
        )


def _is_whole_stack(comparison: Comparison) -> bool:
    """Whether a stack of experts would be compared as one matrix."""
    return any(
        matrix.expert is None and is_stack(matrix.codec.name, matrix.codec.shape)
        for matrix in comparison.matrices
    )


def _shape_in_file(matrix: StoredMatrix) -> tuple[int, ...]:
    """The shape for a message: that of the part where a matrix is one, else the weight's."""
    return matrix.shape if matrix.suffix else matrix.codec.shape


def _names(base: Checkpoint, tuned: Checkpoint | Adapter) -> list[str]:
    """What the base and the tuned side call their weights."""
    if isinstance(tuned, Checkpoint):
        stored = [info.name for side in (base, tuned) for info in side.tensors.values()]
        return [*base.weights, *tuned.weights, *stored]
    wrapped = (f"{w.module}.{parameter}" for w in tuned.wrapped for parameter in w.parameters)
    unhandled = (row.name for row in tuned.unhandled)
    return [*base.weights, *tuned.factors, *tuned.tensors, *wrapped, *unhandled]


def _check_unique(comparisons: Iterable[Comparison]) -> None:
    """Raise where two tuned tensors claim one base tensor."""
    seen: dict[str, str] = {}
    for comparison in comparisons:
        other = seen.setdefault(comparison.base.name, comparison.tuned_name)
        if other != comparison.tuned_name:
            raise CheckpointError(
                f"{comparison.base.info.file}: tensor {comparison.base.name!r} has two "
                f"counterparts in the tuned checkpoint, {other!r} and {comparison.tuned_name!r}; "
                "remove one"
            )


def _why_nothing(base: str | Path, tuned: str | Path, skipped: list[Skipped]) -> str:
    """The message for an empty plan: reasons of lost updates of the tuned side come first."""
    groups: dict[tuple[InputSide, bool, str], list[str]] = defaultdict(list)
    for row in skipped:
        groups[row.side, row.lost, row.reason].append(row.name)
    ranked = sorted(groups.items(), key=lambda group: _rank(*group))
    parts = (
        f"{reason} ({len(names)} {'tensor' if len(names) == 1 else 'tensors'}, first {names[0]!r})"
        for (_, _, reason), names in ranked[:MAX_REASONS]
    )
    why = "; ".join(parts) or "the tuned side is empty"
    chosen = any(reason in (EXCLUDED, NOT_INCLUDED) for _, _, reason in groups)
    remedy = "; change --include or --exclude" if chosen else ""
    return f"nothing to audit in {tuned} against {base}: {why}{remedy}"


def _rank(key: tuple[InputSide, bool, str], names: list[str]) -> tuple[bool, bool, int, str]:
    """The place of a reason in the message: by side, by loss, by how many tensors share it."""
    side, lost, reason = key
    return side == "base", not lost, -len(names), reason
