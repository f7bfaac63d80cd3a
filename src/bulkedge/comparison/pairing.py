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
    judge_ends,
    judge_strangers,
    not_a_weight,
    set_aside,
    shared_by,
)
from .unusable import row_of, unjudged_base

MAX_NEAREST = 5
"""How many messages name the nearest names: comparing with all names of a large base is slow."""


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
    there = Layout(base, model, recipe.split, tuned.weights)
    here = Layout(tuned, model, {}, base.weights)
    rule = infer_rule(tuned.weights, there.shapes, lambda name, shape: here.shapes[name] == shape)
    names = Resolver(rule, there.shapes, model, str(base.path))
    found = _pair_tensors(there, here, names, recipe)
    if not found.pairs and tuned.weights:
        first = [name for name, codec in tuned.weights.items() if not not_a_weight(codec)]
        raise AdapterError(_foreign(tuned, base, first or tuned.weights, rule))
    found.pairs += _shared(there, here, tuned.config or base.config, found.found)
    left = judge_base(base, tuned, recipe, found.found)
    base_left = any(row.lost or (row.reason == NOT_STORED and row.accepted) for row in left)
    found.skipped += judge_strangers(base, found.strangers, rule, recipe, base_left=base_left)
    found.skipped += judge_ends(base, tuned, recipe, found.found)
    found.skipped += left
    return found


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
    there = Layout(base, base.config, recipe.split, [*adapter.factors, *adapter.tensors])
    full = Checkpoint(adapter.path, "file", adapter.files, adapter.tensors)
    here = Layout(full, base.config, {})
    fits = _fits(adapter)
    rule = infer_rule(fits, there.shapes, lambda name, shape: fits[name](shape))
    known = {}
    if adapter.flattened:
        wanted = [name for name in fits if not _excluded(recipe, name)]
        known = unflatten(wanted, there.shapes, lambda name, shape: fits[name](shape))
    names = Resolver(rule, there.shapes, base.config, str(base.path), known)
    found = _pair_tensors(there, here, names, recipe)
    found.skipped += judge_strangers(base, found.strangers, rule, recipe, base_left=False)
    factors, unassigned = _settle(adapter, there, names)
    lost = [row for row in (*adapter.unhandled, *unassigned) if not row.set_aside]
    found.skipped += [set_aside(r.info.name, r.reason) for r in adapter.unhandled if r.set_aside]
    found.unjudged_base = unjudged_base(there, names, lost, recipe)
    lost += _pair_factors(there, names, factors, recipe, found)
    if factors and not any(pair.factors for pair in found.pairs):
        raise AdapterError(_foreign(adapter, base, factors, rule))
    found.skipped += [row_of(row, recipe) for row in lost]
    if adapter.config.ensure_weight_tying:
        found.pairs, again = _once(found.pairs)
        found.skipped += [set_aside(name, "the same update as the embedding's") for name in again]
    return found


def _pair_factors(
    there: Layout,
    names: Resolver,
    factors: Mapping[str, StoredUpdate],
    recipe: Recipe,
    found: Pairing,
) -> list[Unhandled]:
    """Add the updates to the full tensors that are paired already; those without a counterpart."""
    replaced = {pair.base.name: pair.tuned for pair in found.pairs}
    updates: list[Comparison] = []
    lost: list[Unhandled] = []
    strangers = 0
    for name, update in factors.items():
        if _excluded(recipe, name):
            found.skipped += [accepted(info.name, EXCLUDED) for info in update.infos]
            with suppress(CheckpointError):
                found.left_out += _updates(there, names, update, name)
        elif pairs := _updates(there, names, update, name):
            updates += [replace(pair, tuned=replaced.get(pair.base.name)) for pair in pairs]
        else:
            reason = _stranger(names, name, strangers)
            strangers += 1
            lost += [Unhandled(info, name, reason) for info in update.infos]
    updated = {pair.base.name for pair in updates}
    found.pairs = [*updates, *(p for p in found.pairs if p.base.name not in updated)]
    return lost


def _fits(adapter: Adapter) -> dict[str, Callable[[tuple[int, ...]], bool]]:
    """Every name that an adapter's tensors may go by, with what shape of the base it fits."""
    found: dict[str, Callable[[tuple[int, ...]], bool]] = {}
    for wrapped in adapter.wrapped:
        for parameter in ("weight", *wrapped.parameters):
            found[f"{wrapped.module}.{parameter}"] = wrapped.may_fit
    for name, info in adapter.tensors.items():
        found[name] = partial(eq, info.shape)
    return found | {name: factors.fits for name, factors in adapter.factors.items()}


def _settle(
    adapter: Adapter, there: Layout, names: Resolver
) -> tuple[dict[str, StoredUpdate], list[Unhandled]]:
    """All updates by name, those of bare parameters assigned; and what cannot be assigned."""
    factors, lost = dict(adapter.factors), []
    for wrapped in adapter.wrapped:
        targets = {}
        for parameter in wrapped.parameters:
            name = names.find(f"{wrapped.module}.{parameter}", wrapped.may_fit)
            if name is not None:
                targets[parameter] = Target(there.shapes[name], there.transposed(name))
        (first, *others) = wrapped.layers
        if others and not targets:
            found = _stranger(names, f"{wrapped.module}.{wrapped.parameters[0]}", len(lost))
        elif targets:
            kind = str(there.model.get("model_type", ""))
            found = assign(wrapped, targets, adapter.config, kind)
        else:  # PEFT names no parameter in this module: it is a layer's weight
            plain = plain_factors(wrapped.module, first, adapter.config)
            found = plain if isinstance(plain, str) else {"weight": plain}
        if isinstance(found, str):
            name = f"{wrapped.module}.{'|'.join(wrapped.parameters)}"
            lost += [Unhandled(info, name, found) for info in wrapped.infos]
        else:
            factors |= {f"{wrapped.module}.{name}": update for name, update in found.items()}
    return factors, lost


def _stranger(names: Resolver, name: str, others: int) -> str:
    """What to say of a name that the base lacks, and what is like it, unless many are lacking."""
    like = f" (nearest: {names.rule.nearest(name)})" if others < MAX_NEAREST else ""
    return NO_COUNTERPART + like


def _once(updates: list[Comparison]) -> tuple[list[Comparison], list[str]]:
    """The updates without those of layers that share a tensor updated under its own name."""
    own = {pair.base.info.name for pair in updates if pair.base.alias is None}
    again = [pair for pair in updates if pair.base.alias and pair.base.info.name in own]
    return (
        [pair for pair in updates if pair not in again],
        [name for pair in again for name in pair.stored_names],
    )


def _updates(there: Layout, names: Resolver, factors: StoredUpdate, name: str) -> list[Comparison]:
    """One comparison for each matrix of the base that the factors update; none without one."""
    target, alias = names.find(name, factors.fits), None
    if target is None:
        target, alias = names.find_tied(name, factors.fits), name.removesuffix(".weight")
    if target is None:
        matrix = _in_a_stack(there, names, name, factors.shape)
        matrix = matrix or _in_a_fused(there, names, name, factors.shape)
        return [Comparison(matrix, None, factors, name)] if matrix else []
    transposed = None
    if not is_stack(target, there.shapes[target]):
        transposed = _acts_transposed(factors, target, there)
    return [
        Comparison(
            replace(part.matrix, alias=alias),
            None,
            factors.of(expert=part.expert, rows=part.rows),
            name + part.suffix,
        )
        for part in there.parts(target, transposed=transposed)
    ]


def _pair_tensors(there: Layout, here: Layout, names: Resolver, recipe: Recipe) -> Pairing:
    """Pair full tensors by name."""
    found = Pairing()
    for name, codec in here.weights.items():
        if names.rule.find(name) is None and _excluded(recipe, name):
            found.skipped.append(accepted(codec.info.name, EXCLUDED))
            with suppress(CheckpointError):  # what it may belong to need not be told
                found.left_out += _pair_tensor(there, here, names, name)
        elif pairs := _pair_tensor(there, here, names, name):
            found.pairs += pairs
        else:
            found.strangers[name] = codec
    return found


def _shared(
    there: Layout, here: Layout, model: Mapping[str, Any], found: set[str]
) -> list[Comparison]:
    """The base's embeddings and output layers for which another tensor of the tuned side stands."""
    pairs = []
    for name, codec in there.weights.items():
        if codec.info.name in found:
            continue
        stored = here.weights
        fitting = [n for n in sharing(name, stored, model) if stored[n].shape == codec.shape]
        if len(fitting) == 1:
            (part,) = there.parts(name)
            (tuned,) = here.parts(fitting[0])
            shared = shared_by(name, tuned.matrix)
            pairs.append(Comparison(part.matrix, shared, None, shared.name))
    return pairs


def _pair_tensor(there: Layout, here: Layout, names: Resolver, name: str) -> list[Comparison]:
    """Pair the matrices of one tensor with those of the base; none without a counterpart."""
    fits = partial(eq, here.shapes[name])
    target, alias = names.find(name, fits), None
    if target is None:
        target, alias = names.find_tied(name, fits), name.removesuffix(".weight")
    if target is None:
        matrix = _in_a_stack(there, names, name, here.shapes[name])
        matrix = matrix or _in_a_fused(there, names, name, here.shapes[name])
        return [Comparison(matrix, here.part(name), None, name)] if matrix else []
    parts = there.parts(target)
    tuned = [here.part(name, part.expert, part.rows) for part in parts]
    whole = here.weights[name]
    if (
        None in tuned
        or (is_stack(name, whole.shape) and len({p.expert for p in parts}) != whole.shape[0])
        or (target in there.fused and whole.shape != there.shapes[target])
    ):
        # as a whole: the check of shapes tells what does not fit
        of = there.weights.get(target, parts[0].matrix.codec)
        return [Comparison(StoredMatrix(of), StoredMatrix(whole), None, name)]
    return [
        Comparison(replace(part.matrix, alias=alias), matrix, None, name + part.suffix)
        for part, matrix in zip(parts, tuned, strict=True)
    ]


def _in_a_stack(
    there: Layout, names: Resolver, name: str, shape: tuple[int, ...]
) -> StoredMatrix | None:
    """The rows of a base that stacks the experts where one expert's layer lies."""
    place = place_in_stack(name)
    if place is None or len(shape) != 2:
        return None
    stack, expert, index, of = place
    rows, columns = shape

    def fits(stored: tuple[int, ...]) -> bool:
        return len(stored) == 3 and sorted(stored[1:]) == sorted((of * rows, columns))

    target = names.find(stack, fits)
    if target is None or not fits(there.shapes[target]):
        return None
    return there.part(target, expert, (index * rows, (index + 1) * rows))


def _in_a_fused(
    there: Layout, names: Resolver, name: str, shape: tuple[int, ...]
) -> StoredMatrix | None:
    """The rows of a fused projection of the base where a layer lies."""
    if len(shape) != 2:
        return None
    for fused, index, of in places_in_fused(name):
        place = partial(_place_in_fused, index, of, shape)
        target = names.find(fused, lambda stored, place=place: place(stored) is not None)
        if target is None or target not in there.weights:
            continue
        if rows := place(there.shapes[target]):
            return there.part(target, None, rows)
    return None


def _place_in_fused(
    index: int, of: int, shape: tuple[int, ...], stored: tuple[int, ...]
) -> tuple[int, int] | None:
    """The rows of a layer in a fused tensor of a shape; None where it does not fit."""
    if len(stored) != 2 or stored[1] != shape[1]:
        return None
    return rows_in_fused(index, of, shape[0], stored[0])


def _acts_transposed(factors: StoredUpdate, target: str, there: Layout) -> bool:
    """Whether the base stores ``(in, out)`` what the factors update as ``(out, in)``."""
    shape, model = there.shapes[target], there.model
    if factors.embedding or shape != factors.shape[::-1]:
        return False
    conv1d = target.endswith(CONV1D_LAYERS)
    if shape != factors.shape:
        return factors.fan_in_fan_out or conv1d
    # a square weight does not tell: the model's type does, and PEFT's flag where it is not known
    if "model_type" in model:
        return model["model_type"] in CONV1D_MODELS and conv1d
    return factors.fan_in_fan_out


def _excluded(recipe: Recipe, name: str) -> bool:
    """Whether a tuned name is left out, whatever it belongs to: then that need not be told."""
    return matches((name,), recipe.exclude)


def _foreign(
    tuned: Checkpoint | Adapter, base: Checkpoint, names: Iterable[str], rule: NameRule
) -> str:
    """The message for a tuned side of which no name fits the base."""
    first = next(iter(names), "")
    return (
        f"{tuned.path}: none of its tensors has a counterpart in {base.path}; the first is "
        f"{first!r} (nearest: {rule.nearest(first)}); was it made from another base?"
    )
