"""Which matrices of a base get a limit, settled from headers alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bulkedge._errors import InputError, NothingAuditedError
from bulkedge._globs import check_globs, matches
from bulkedge.checkpoint import (
    Adapter,
    Checkpoint,
    Codec,
    Layout,
    StoredMatrix,
    open_base,
    open_path,
)
from bulkedge.checkpoint.layout import is_kernel, is_stack
from bulkedge.checkpoint.model import is_output
from bulkedge.checkpoint.packed import refuse_packed
from bulkedge.comparison import Comparison, make_plan
from bulkedge.comparison.leftover import not_a_weight
from bulkedge.records import Skipped, make_recipe
from bulkedge.rmt.empirical_bulk import MIN_VALUES

EMBEDDING = re.compile(r"embed|(?:^|_)embs?(?:$|_)|^(wte|wpe|shared)$|relative_attention_bias")
"""What the name of a layer that looks up rows has in it."""
NAMES = "`bulkedge inspect BASE` lists the names"


@dataclass(frozen=True)
class Wanted:
    """A matrix of the base that gets a limit.

    Attributes:
        matrix: Where it lies.
        module: The path of its layer, by which PEFT knows it; None of a bare parameter.
        update: What an adapter makes of it, if one was given.
    """

    matrix: StoredMatrix
    module: str | None
    update: Comparison | None = None


@dataclass(frozen=True)
class BudgetPlan:
    """What is to be measured.

    Attributes:
        base: The base.
        like: The adapter whose α is to be found, if one was given.
        wanted: The matrices.
        skipped: Every other tensor of two or more dimensions, and parts of the adapter.
    """

    base: Checkpoint
    like: Adapter | None
    wanted: tuple[Wanted, ...]
    skipped: tuple[Skipped, ...]


def plan_budget(
    base: Path, like: Path | None, target: Sequence[str], exclude: Sequence[str]
) -> BudgetPlan:
    """Open the inputs and choose the matrices.

    Args:
        base: The base: a file or a folder.
        like: An adapter of it.
        target: Globs of the matrices that are wanted; without, those that adapters usually update,
            or those that ``like`` updates.
        exclude: Globs of those that are not.

    Returns:
        The plan; only headers have been read.

    Raises:
        CheckpointError: If an input cannot be read.
        InputError: If an adapter stands in the place of the base, or a model in that of ``like``.
        RecipeError: If a glob matches nothing.
        NothingAuditedError: If no matrix is left.
    """
    opened = open_base(base)
    if opened is None:
        raise InputError(f"{base}: is an adapter; give the base model, and the adapter as like")
    refuse_packed(opened)
    if like is None:
        found = _of_base(opened, target, exclude)
    else:
        found = _of_adapter(opened, base, like, target, exclude)
    if not found.wanted:
        reasons = sorted({row.reason for row in found.skipped})[:3]
        raise NothingAuditedError(
            f"no matrix to measure in {base}: {'; '.join(reasons) or 'it is empty'}; name some "
            "with target"
        )
    return found


def _of_base(base: Checkpoint, target: Sequence[str], exclude: Sequence[str]) -> BudgetPlan:
    """Matrices by their names and shapes."""
    check_globs((*target, *exclude), list(base.weights), "tensor of the base", NAMES)
    layout, wanted, skipped = Layout(base, base.config, {}), [], []
    for name, codec in base.weights.items():
        if len(codec.shape) < 2:
            continue
        if (why := _why_not(name, codec, target, exclude)) is not None:
            skipped.append(why)
            continue
        parts = layout.parts(name)
        wanted += [Wanted(part.matrix, _module(name)) for part in parts]
    return BudgetPlan(base, None, tuple(wanted), tuple(skipped))


def _of_adapter(
    base: Checkpoint, path: Path, like: Path, target: Sequence[str], exclude: Sequence[str]
) -> BudgetPlan:
    """The matrices that an adapter updates."""
    adapter = open_path(like)
    if not isinstance(adapter, Adapter):
        raise InputError(f"{like}: is a full model; give a LoRA adapter as like, which has an α")
    plan = make_plan(path, like, make_recipe({}))
    check_globs((*target, *exclude), plan.names, "tensor of base or adapter", NAMES)
    wanted, skipped = [], list(plan.skipped)
    for comparison in plan.comparisons:
        names = (comparison.base.name, comparison.base.info.name, comparison.tuned_name)
        if matches(names, exclude) or (target and not matches(names, target)):
            skipped.append(_left_out(comparison.tuned_name, "left out by target or exclude", True))
        elif comparison.factors is None:
            skipped.append(_left_out(comparison.tuned_name, "trained in full: no α scales it"))
        else:
            module = None if adapter.flattened else _module(comparison.tuned_name)
            wanted.append(Wanted(comparison.base, module, comparison))
    return BudgetPlan(base, adapter, tuple(wanted), tuple(skipped))


def _why_not(
    name: str, codec: Codec, target: Sequence[str], exclude: Sequence[str]
) -> Skipped | None:
    """The row of a tensor that gets no limit; None if it does."""
    names = (name, codec.info.name)
    if reason := not_a_weight(codec):
        return _left_out(name, reason)
    if matches(names, exclude) or (target and not matches(names, target)):
        return _left_out(name, "left out by target or exclude", True)
    if not target and (reason := _unusual(name, codec)):
        return _left_out(name, f"{reason}: name it in --target to have its limit")
    if codec.unreadable:
        return Skipped(name=name, reason=codec.unreadable, lost=True, side="base")
    if len(codec.shape) > 2 and not (is_stack(name, codec.shape) or is_kernel(name, codec.shape)):
        reason = f"{len(codec.shape)}-D tensor: neither a kernel nor a stack of experts by name"
        return Skipped(name=name, reason=reason, lost=True, side="base")
    return None


def _unusual(name: str, codec: Codec) -> str | None:
    """Why adapters do not usually update a weight; None if they do."""
    layer = name.removesuffix(".weight").rpartition(".")[2]
    if EMBEDDING.search(layer) or is_output(name):
        return "an embedding or output layer"
    if min(codec.extent(0 if is_stack(name, codec.shape) else None)) < MIN_VALUES:
        return f"fewer than {MIN_VALUES} singular values make no bulk"
    return None


def _left_out(name: str, reason: str, accepted: bool = False) -> Skipped:
    return Skipped(name=name, reason=reason, lost=False, side="base", accepted=accepted)


def _module(name: str) -> str | None:
    """The path of the layer that a weight, or a part of it, belongs to."""
    whole = name.partition("[")[0]
    return whole.removesuffix(".weight") if whole.endswith(".weight") else None
