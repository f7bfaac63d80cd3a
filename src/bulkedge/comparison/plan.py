"""What to compare with what, settled from headers alone, before the first number is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bulkedge._errors import AdapterError, CheckpointError, NothingAuditedError
from bulkedge._globs import check_globs
from bulkedge.checkpoint import (
    Adapter,
    Checkpoint,
    StoredMatrix,
    is_adapter,
    is_lora_file,
    open_adapter,
    open_checkpoint,
    open_lora_file,
)
from bulkedge.checkpoint.header import EMPTY, FLOATING
from bulkedge.checkpoint.layout import is_kernel, is_stack
from bulkedge.checkpoint.quantised import FP8, SCALES, refuse_packed
from bulkedge.records.recipe import Recipe
from bulkedge.records.record import Fate, Skipped, Stored

from .account import Dropped, account
from .comparison import Comparison
from .leftover import Pairing, harmless, not_a_weight, not_wanted
from .pairing import pair_adapter, pair_checkpoint

__all__ = ["Comparison", "Plan", "make_plan"]

DAMAGED = "a damaged save (of a model in shards, such as ZeRO-3's, gathered by none); save it again"


@dataclass(frozen=True)
class Plan:
    """A checked comparison of two inputs.

    Attributes:
        base: The base checkpoint.
        tuned: The tuned checkpoint or adapter.
        comparisons: The matrices to audit, in the base's order.
        skipped: Every other tensor of the tuned side, and of the base where it should have one.
        tensors: Every tensor of two or more dimensions of either side, and what becomes of it.
    """

    base: Checkpoint
    tuned: Checkpoint | Adapter
    comparisons: tuple[Comparison, ...]
    skipped: tuple[Skipped, ...]
    tensors: tuple[Stored, ...] = ()

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
        The plan; only headers have been read.

    Raises:
        CheckpointError: If an input cannot be read, or a pair differs in shape.
        AdapterError: If the adapter does not belong to the base.
        NothingAuditedError: If no matrix is left to compare.
        RecipeError: If a glob of the recipe matches nothing.
    """
    base_checkpoint = None if is_adapter(base) else open_checkpoint(base)
    if base_checkpoint is None or is_lora_file(base_checkpoint):
        raise CheckpointError(
            f"{base}: is an adapter; the base model comes first, then what was made of it"
        )
    refuse_packed(base_checkpoint)
    opened = open_adapter(tuned) if is_adapter(tuned) else _open_tuned(tuned)
    if isinstance(opened, Adapter):
        found = pair_adapter(base_checkpoint, opened, recipe)
    else:
        found = pair_checkpoint(base_checkpoint, opened, recipe)
    skipped = found.skipped
    skipped += [*_not_read("base", base_checkpoint), *_not_read("tuned", opened)]
    wanted, dropped = _choose(found, recipe)
    check_globs(recipe.split, list(base_checkpoint.tensors))
    lost = (row.name for row in skipped)  # of layers, too, that should be stored and are not
    check_globs((*recipe.include, *recipe.exclude), [*_names(base_checkpoint, opened), *lost])
    if not wanted:
        raise NothingAuditedError(_why_nothing(base, tuned, skipped))
    _check_unique(wanted)
    order = {info.name: i for i, info in enumerate(base_checkpoint.tensors.values())}
    wanted.sort(key=lambda comparison: _place(comparison.base, order))
    tensors, more = account(base_checkpoint, opened, wanted, dropped, skipped, recipe)
    return Plan(base_checkpoint, opened, tuple(wanted), (*skipped, *more), tuple(tensors))


def _open_tuned(path: str | Path) -> Checkpoint | Adapter:
    """A tuned side without a configuration of PEFT."""
    opened = open_checkpoint(path)
    if is_lora_file(opened):
        return open_lora_file(opened)
    refuse_packed(opened)
    if any(".lora_A." in name or "lora_down" in name for name in opened.tensors):
        raise AdapterError(
            f"{opened.path}: holds LoRA factors but no adapter_config.json beside them, which has "
            "their scale; give PEFT's adapter folder"
        )
    return opened


def _not_read(side: str, opened: Checkpoint | Adapter) -> list[Skipped]:
    """The other weights files of a folder: whoever named it may have meant one of them."""
    read = "the sharded checkpoint" if opened.kind == "sharded" else opened.files[0].name
    reason = f"not read: in the {side} folder {read} is taken; name this file to audit it instead"
    return [harmless(name, reason) for name in opened.beside]


def _choose(found: Pairing, recipe: Recipe) -> tuple[list[Comparison], list[Dropped]]:
    """The pairs to audit, their shapes checked; the others are added to what is skipped."""
    wanted, told = [], set()
    dropped = [Dropped(comparison, "excluded") for comparison in found.left_out]
    for comparison in found.pairs:
        if (why := _why_not(comparison, recipe)) is None:
            _check_shapes(comparison)
            wanted.append(comparison)
            continue
        reason, fate = why
        dropped.append(Dropped(comparison, fate))
        for name in comparison.stored_names:
            if (name, reason) not in told:  # once for all experts
                told.add((name, reason))
                lost, accepted = fate == "lost", fate == "excluded"
                row = Skipped(name=name, reason=reason, lost=lost, accepted=accepted)
                found.skipped.append(row)
    return wanted, dropped


def _why_not(comparison: Comparison, recipe: Recipe) -> tuple[str, Fate] | None:
    """Why a pair is not compared, and what that makes of it; None if it is."""
    full = [matrix.info.name for matrix in comparison.matrices]
    either = (comparison.base.name, comparison.tuned_name, *full)
    if reason := not_wanted(recipe, *either):
        return reason, "excluded"
    base, *tuned = (matrix.info for matrix in comparison.matrices)
    if {info.empty for info in (base, *tuned)} == {True, False}:
        return EMPTY, "lost"
    if reason := not_a_weight(base):
        return reason, "apart" if all(map(not_a_weight, tuned)) else "lost"
    for info in tuned:
        if reason := not_a_weight(info):
            return f"{reason}, where the base has a weight {base.shape}: {DAMAGED}", "lost"
    reason = _not_handled(comparison)
    return (reason, "lost") if reason else None


def _place(matrix: StoredMatrix, order: dict[str, int]) -> tuple[int, bool, int, tuple[int, int]]:
    """Where a matrix stands in the base: its tensor, its expert, its rows."""
    shared = matrix.alias is not None
    return order[matrix.info.name], shared, matrix.expert or 0, matrix.rows or (0, 0)


def _not_handled(comparison: Comparison) -> str | None:
    """Why a pair of weights cannot be judged, None if it can."""
    for matrix in comparison.matrices:
        info = matrix.info
        if info.dtype in FP8 and matrix.scales is None:
            return f"{info.dtype} tensor: no {info.name}{SCALES} of fitting blocks beside it"
        if info.dtype not in FLOATING and matrix.scales is None:
            kind = "complex" if info.dtype.startswith("C") else "quantised"
            return f"{info.dtype} tensor: {kind}, not handled yet"
        many = len(info.shape) > 2
        if many and not (is_stack(info.name, info.shape) or is_kernel(info.name, info.shape)):
            return f"{len(info.shape)}-D tensor: neither a kernel nor a stack of experts by name"
    return None


def _check_shapes(comparison: Comparison) -> None:
    """Raise unless all parts of a comparison have the base's shape."""
    base, tuned, factors = comparison.base, comparison.tuned, comparison.factors
    if tuned is not None and (tuned.acts_as != base.acts_as or _is_whole_stack(comparison)):
        raise CheckpointError(
            f"{tuned.info.file}: tensor {tuned.name!r} has shape {_told(tuned)}, expected "
            f"{_told(base)} of {base.name!r} in {base.info.file}; give the base that it was tuned "
            f"from, or leave it out with --exclude {base.name!r}"
        )
    if factors is not None and factors.shape != base.acts_as:
        raise AdapterError(
            f"{factors.A.file}: tensor {factors.A.name!r} updates a weight of shape "
            f"{factors.shape}, but {base.name!r} in {base.info.file} has {base.shape}; the "
            "adapter was trained for another base"
        )


def _is_whole_stack(comparison: Comparison) -> bool:
    """Whether all experts of one side would be compared with something else as one matrix."""
    return any(
        matrix.expert is None and is_stack(matrix.info.name, matrix.info.shape)
        for matrix in comparison.matrices
    )


def _told(matrix: StoredMatrix) -> tuple[int, ...]:
    """A shape for a message: the stored tensor's, or that of the part."""
    return matrix.shape if matrix.suffix else matrix.info.shape


def _names(base: Checkpoint, tuned: Checkpoint | Adapter) -> list[str]:
    """What the base and the tuned side call their weights."""
    if isinstance(tuned, Checkpoint):
        stored = [info.name for side in (base, tuned) for info in side.tensors.values()]
        return [*base.tensors, *tuned.tensors, *stored]
    wrapped = (f"{w.module}.{parameter}" for w in tuned.wrapped for parameter in w.parameters)
    unhandled = (row.name for row in tuned.unhandled)
    return [*base.tensors, *tuned.factors, *tuned.tensors, *wrapped, *unhandled]


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
    """The message for an empty plan."""
    reasons = sorted({row.reason for row in skipped})
    told = "; ".join(reasons[:5]) or "the tuned side is empty"
    return f"nothing to audit in {tuned} against {base}: {told}"
