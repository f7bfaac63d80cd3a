"""Which matrix of the tuned side belongs to which of the base, from names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from operator import eq
from typing import Any

from bulkedge._errors import AdapterError, CheckpointError
from bulkedge._globs import matches
from bulkedge.checkpoint import (
    Adapter,
    Checkpoint,
    Layout,
    NameRule,
    Resolver,
    StoredMatrix,
    StoredUpdate,
    Unhandled,
    infer_rule,
    unflatten,
)
from bulkedge.checkpoint.experts import Target, assign
from bulkedge.checkpoint.fused import places_in_fused, rows_in_fused
from bulkedge.checkpoint.layout import CONV1D_LAYERS, CONV1D_MODELS, is_stack, place_in_stack
from bulkedge.checkpoint.model import sharing
from bulkedge.checkpoint.of_base import OfBase
from bulkedge.checkpoint.peft import plain_factors
from bulkedge.records.recipe import Recipe

from .comparison import Comparison
from .leftover import (
    EXCLUDED,
    NO_COUNTERPART,
    NOT_STORED,
    Pairing,
    accepted,
    judge_base,
    judge_embedding_and_output,
    judge_unmatched,
    not_a_weight,
    set_aside,
    shared_by,
    unused_heads,
)
from .unusable import row_of, unjudged_base

MAX_NEAREST = 5
"""No more messages than this suggest nearest names, because a search in a large base is slow."""


def pair_checkpoint(base: Checkpoint, tuned: Checkpoint, recipe: Recipe) -> Pairing:
    """Pair a full fine-tune with its base.

    Args:
        base: The base.
        tuned: The fine-tune.
        recipe: What is wanted.

    Returns:
        What to compare, and what is left out, with the reason.

    Raises:
        AdapterError: If nothing of the one is in the other.
    """
    model = base.config or tuned.config
    base_layout = Layout(base, model, recipe.split, tuned.weights)
    tuned_layout = Layout(tuned, model, {}, base.weights)
    tuned_shapes = tuned_layout.shapes
    rule = infer_rule(
        tuned.weights, base_layout.shapes, lambda name, shape: tuned_shapes[name] == shape
    )
    names = Resolver(rule, base_layout.shapes, model, str(base.path))
    pairing = _pair_tensors(base_layout, tuned_layout, names, recipe)
    if not pairing.pairs and tuned.weights:
        weights = [name for name, codec in tuned.weights.items() if not not_a_weight(codec)]
        raise AdapterError(_why_wrong_base(tuned, base, weights or tuned.weights, rule))
    tied_by = tuned.config or base.config
    pairing.pairs += _pair_shared(base_layout, tuned_layout, tied_by, pairing.matched_base_names)
    matched = pairing.matched_base_names
    not_stored = judge_base(base, tuned, recipe, pairing)
    pairing.skipped += judge_unmatched(
        base,
        pairing.unmatched,
        names,
        recipe,
        base_has_unmatched=any(
            row.lost or (row.reason == NOT_STORED and row.accepted) for row in not_stored
        ),
        heads=unused_heads(base, tuned, matched),
    )
    pairing.skipped += judge_embedding_and_output(base, tuned, recipe, matched)
    pairing.skipped += not_stored
    return pairing


def pair_adapter(base: Checkpoint, adapter: Adapter, recipe: Recipe) -> Pairing:
    """Pair an adapter's updates and replaced tensors with the base.

    Args:
        base: The base.
        adapter: The adapter.
        recipe: What is wanted.

    Returns:
        What to compare, and what is left out, with the reason.

    Raises:
        AdapterError: If nothing of the one is in the other.
    """
    base_layout = Layout(base, base.config, recipe.split, [*adapter.factors, *adapter.tensors])
    full = Checkpoint(adapter.path, "file", adapter.files, adapter.tensors)
    tuned_layout = Layout(full, base.config, {})
    fits = _shape_checks(adapter)
    rule = infer_rule(fits, base_layout.shapes, lambda name, shape: fits[name](shape))
    known = {}
    if adapter.flattened:
        wanted = [name for name in fits if not _excluded(recipe, name)]
        known = unflatten(wanted, base_layout.shapes, lambda name, shape: fits[name](shape))
    names = Resolver(rule, base_layout.shapes, base.config, str(base.path), known)
    pairing = _pair_tensors(base_layout, tuned_layout, names, recipe)
    pairing.skipped += judge_unmatched(
        base, pairing.unmatched, names, recipe, base_has_unmatched=False
    )
    factors, unassigned = _assign_bare_parameters(adapter, base_layout, names)
    lost = [row for row in (*adapter.unhandled, *unassigned) if not row.set_aside]
    pairing.skipped += [set_aside(r.info.name, r.reason) for r in adapter.unhandled if r.set_aside]
    pairing.unjudged_base = unjudged_base(base_layout, names, lost, recipe)
    lost += _pair_factors(base_layout, names, factors, recipe, pairing)
    wanted_factors = [name for name in factors if not _excluded(recipe, name)]
    if wanted_factors and not any(pair.factors for pair in pairing.pairs):
        raise AdapterError(_why_wrong_base(adapter, base, factors, rule))
    pairing.skipped += [row_of(row, recipe) for row in lost]
    if adapter.config.ensure_weight_tying:
        pairing.pairs, tied = _without_tied_copies(pairing.pairs)
        pairing.skipped += [set_aside(name, "the same update as the embedding's") for name in tied]
    return pairing


def _pair_factors(
    base_layout: Layout,
    names: Resolver,
    factors: Mapping[str, StoredUpdate],
    recipe: Recipe,
    pairing: Pairing,
) -> list[Unhandled]:
    """Add the updates to the pairs of full tensors; returns those that have no counterpart."""
    replaced = {pair.base.name: pair.tuned for pair in pairing.pairs}
    updates: list[Comparison] = []
    lost: list[Unhandled] = []
    unmatched_count = 0
    for name, update in factors.items():
        if _excluded(recipe, name):
            pairing.skipped += [accepted(info.name, EXCLUDED) for info in update.infos]
            with suppress(CheckpointError):
                pairing.excluded += _pair_update(base_layout, names, update, name)
        elif pairs := _pair_update(base_layout, names, update, name):
            updates += [replace(pair, tuned=replaced.get(pair.base.name)) for pair in pairs]
        else:
            reason = _why_no_counterpart(names, name, unmatched_count)
            unmatched_count += 1
            lost += [Unhandled(info, name, reason) for info in update.infos]
    updated = {pair.base.name for pair in updates}
    pairing.pairs = [*updates, *(p for p in pairing.pairs if p.base.name not in updated)]
    return lost


def _shape_checks(adapter: Adapter) -> dict[str, Callable[[tuple[int, ...]], bool]]:
    """For every name that an adapter's tensors may go by: whether a shape of the base fits it."""
    checks: dict[str, Callable[[tuple[int, ...]], bool]] = {}
    for wrapped in adapter.wrapped:
        for parameter in ("weight", *wrapped.parameters):
            checks[f"{wrapped.module}.{parameter}"] = wrapped.may_fit
    for name, info in adapter.tensors.items():
        checks[name] = partial(eq, info.shape)
    return checks | {name: factors.fits for name, factors in adapter.factors.items()}


def _assign_bare_parameters(
    adapter: Adapter, base_layout: Layout, names: Resolver
) -> tuple[dict[str, StoredUpdate], list[Unhandled]]:
    """All updates by name, once those of bare parameters have one; and what cannot get one."""
    factors, lost = dict(adapter.factors), []
    for wrapped in adapter.wrapped:
        targets = {}
        for parameter in wrapped.parameters:
            name = names.find(f"{wrapped.module}.{parameter}", wrapped.may_fit)
            if name is not None:
                targets[parameter] = Target(base_layout.shapes[name], base_layout.transposed(name))
        (first, *others) = wrapped.layers
        if others and not targets:
            wanted = f"{wrapped.module}.{wrapped.parameters[0]}"
            assigned = _why_no_counterpart(names, wanted, len(lost))
        elif targets:
            kind = str(base_layout.model.get("model_type", ""))
            assigned = assign(wrapped, targets, adapter.config, kind)
        else:  # this module has none of the named parameters, so its weight is meant
            plain = plain_factors(wrapped.module, first, adapter.config)
            assigned = plain if isinstance(plain, str) else {"weight": plain}
        if isinstance(assigned, str):
            name = f"{wrapped.module}.{'|'.join(wrapped.parameters)}"
            lost += [Unhandled(info, name, assigned) for info in wrapped.infos]
        else:
            factors |= {f"{wrapped.module}.{name}": update for name, update in assigned.items()}
    return factors, lost


def _why_no_counterpart(names: Resolver, name: str, others: int) -> str:
    """What to say of a name that the base lacks; the nearest name, too, for the first few."""
    nearest = f" (nearest: {names.rule.nearest(name)})" if others < MAX_NEAREST else ""
    return NO_COUNTERPART + nearest


def _without_tied_copies(updates: list[Comparison]) -> tuple[list[Comparison], list[str]]:
    """Each tied tensor updated once: its update under its own name, not under a tied layer's.

    Returns:
        The updates that stay, and the names of the tensors of the others.
    """
    own = {pair.base.info.name for pair in updates if pair.base.alias is None}
    copies = [pair for pair in updates if pair.base.alias and pair.base.info.name in own]
    return (
        [pair for pair in updates if pair not in copies],
        [name for pair in copies for name in pair.stored_names],
    )


def _pair_update(
    base_layout: Layout, names: Resolver, factors: StoredUpdate, name: str
) -> list[Comparison]:
    """One comparison for each matrix of the base that an update changes; none if it has none."""
    target, alias = names.find(name, factors.fits), None
    if target is None:
        target, alias = names.find_tied(name, factors.fits), name.removesuffix(".weight")
    if target is None:
        matrix = _part_of_stack(base_layout, names, name, factors.shape)
        matrix = matrix or _part_of_fused(base_layout, names, name, factors.shape)
        return [Comparison(matrix, None, factors, name)] if matrix else []
    shape, transposed = base_layout.shapes[target], None
    if not is_stack(target, shape):
        placed = factors.on(shape) if isinstance(factors, OfBase) else factors
        transposed = _acts_transposed(placed, target, base_layout)
    if isinstance(factors, OfBase):
        factors = factors.on(shape, transposed=bool(transposed))
    return [
        Comparison(
            replace(part.matrix, alias=alias),
            None,
            factors.of(expert=part.expert, rows=part.rows),
            name + part.suffix,
        )
        for part in base_layout.parts(target, transposed=transposed)
    ]


def _pair_tensors(
    base_layout: Layout, tuned_layout: Layout, names: Resolver, recipe: Recipe
) -> Pairing:
    """Pair full tensors by name."""
    pairing = Pairing()
    for name, codec in tuned_layout.weights.items():
        if names.rule.find(name) is None and _excluded(recipe, name):
            pairing.skipped.append(accepted(codec.info.name, EXCLUDED))
            with suppress(CheckpointError):  # its counterpart may stay unknown
                pairing.excluded += _pair_tensor(base_layout, tuned_layout, names, name)
        elif pairs := _pair_tensor(base_layout, tuned_layout, names, name):
            pairing.pairs += pairs
        else:
            pairing.unmatched[name] = codec
    return pairing


def _pair_shared(
    base_layout: Layout, tuned_layout: Layout, model: Mapping[str, Any], matched: set[str]
) -> list[Comparison]:
    """Pair embeddings and output layers of the base that the fine-tune stores as one tensor."""
    pairs = []
    for name, codec in base_layout.weights.items():
        if codec.info.name in matched:
            continue
        stored = tuned_layout.weights
        width = codec.shape[1:]  # the rows may differ: a vocabulary may be resized
        fitting = [n for n in sharing(name, stored, model) if stored[n].shape[1:] == width]
        if len(fitting) == 1:  # one tensor, and no doubt which, stands for this one
            (part,) = base_layout.parts(name)
            (tuned,) = tuned_layout.parts(fitting[0])
            shared = shared_by(name, tuned.matrix)
            pairs.append(Comparison(part.matrix, shared, None, shared.name))
    return pairs


def _pair_tensor(
    base_layout: Layout, tuned_layout: Layout, names: Resolver, name: str
) -> list[Comparison]:
    """Pair the matrices of one tensor with those of the base; none without a counterpart."""
    fits = partial(eq, tuned_layout.shapes[name])
    target, alias = names.find(name, fits), None
    if target is None:
        target, alias = names.find_tied(name, fits), name.removesuffix(".weight")
    if target is None:
        matrix = _part_of_stack(base_layout, names, name, tuned_layout.shapes[name])
        matrix = matrix or _part_of_fused(base_layout, names, name, tuned_layout.shapes[name])
        return [Comparison(matrix, tuned_layout.part(name), None, name)] if matrix else []
    parts = base_layout.parts(target)
    tuned_parts = [tuned_layout.part(name, part.expert, part.rows) for part in parts]
    whole = tuned_layout.weights[name]
    if (
        None in tuned_parts
        or (is_stack(name, whole.shape) and len({p.expert for p in parts}) != whole.shape[0])
        or (target in base_layout.fused and whole.shape != base_layout.shapes[target])
    ):
        # compared as a whole, so that the check of shapes names what does not fit
        whole_base = base_layout.weights.get(target, parts[0].matrix.codec)
        return [Comparison(StoredMatrix(whole_base), StoredMatrix(whole), None, name)]
    return [
        Comparison(replace(part.matrix, alias=alias), matrix, None, name + part.suffix)
        for part, matrix in zip(parts, tuned_parts, strict=True)
    ]


def _part_of_stack(
    base_layout: Layout, names: Resolver, name: str, shape: tuple[int, ...]
) -> StoredMatrix | None:
    """One expert's layer as rows of the base's stack of experts; None if it has no such stack."""
    place = place_in_stack(name)
    if place is None or len(shape) != 2:
        return None
    stack, expert, index, count = place
    rows, columns = shape

    def fits(stored: tuple[int, ...]) -> bool:
        return len(stored) == 3 and sorted(stored[1:]) == sorted((count * rows, columns))

    target = names.find(stack, fits)
    if target is None or not fits(base_layout.shapes[target]):
        return None
    return base_layout.part(target, expert, (index * rows, (index + 1) * rows))


def _part_of_fused(
    base_layout: Layout, names: Resolver, name: str, shape: tuple[int, ...]
) -> StoredMatrix | None:
    """A layer as rows of a fused projection of the base; None if it has no such projection."""
    if len(shape) != 2:
        return None
    for fused, index, count in places_in_fused(name):
        place = partial(_rows_if_it_fits, index, count, shape)
        target = names.find(fused, lambda stored, place=place: place(stored) is not None)
        if target is None or target not in base_layout.weights:
            continue
        if rows := place(base_layout.shapes[target]):
            return base_layout.part(target, None, rows)
    return None


def _rows_if_it_fits(
    index: int, count: int, shape: tuple[int, ...], stored: tuple[int, ...]
) -> tuple[int, int] | None:
    """The rows that layer ``index`` of ``count`` has in a fused tensor; None if it does not fit."""
    if len(stored) != 2 or stored[1] != shape[1]:
        return None
    return rows_in_fused(index, count, shape[0], stored[0])


def _acts_transposed(factors: StoredUpdate, target: str, base_layout: Layout) -> bool:
    """Whether the base stores ``(in, out)`` what the factors update as ``(out, in)``."""
    shape, model = base_layout.shapes[target], base_layout.model
    stored = base_layout.weights.get(target)
    if factors.embedding or shape != factors.shape[::-1] or (stored and stored.upright):
        return False
    conv1d = target.endswith(CONV1D_LAYERS)
    if shape != factors.shape:
        return factors.fan_in_fan_out or conv1d
    # the shape of a square weight does not tell: the model's type decides, else PEFT's flag
    if "model_type" in model:
        return model["model_type"] in CONV1D_MODELS and conv1d
    return factors.fan_in_fan_out


def _excluded(recipe: Recipe, name: str) -> bool:
    """Whether the recipe excludes a name of the tuned side, whatever its counterpart is."""
    return matches((name,), recipe.exclude)


def _why_wrong_base(
    tuned: Checkpoint | Adapter, base: Checkpoint, names: Iterable[str], rule: NameRule
) -> str:
    """The message for a tuned side none of whose names is in the base."""
    first = next(iter(names), "")
    return (
        f"{tuned.path}: none of its tensors has a counterpart in {base.path}; the first is "
        f"{first!r} (nearest: {rule.nearest(first)}); was it made from another base?"
    )
