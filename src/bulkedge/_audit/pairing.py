"""Which matrix of the tuned side belongs to which of the base, from names and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from bulkedge._errors import AdapterError
from bulkedge.checkpoint import (
    Adapter,
    Checkpoint,
    Layout,
    LoraFactors,
    NameRule,
    TensorInfo,
    Unhandled,
    infer_rule,
)
from bulkedge.checkpoint.layout import CONV1D_LAYERS, CONV1D_MODELS, is_stack

from .comparison import Comparison
from .recipe import Recipe
from .record import Skipped

# comparing a name with all names of a large base takes a while
MAX_NEAREST = 5
NO_COUNTERPART = "no counterpart in the base"

Pairs = tuple[list[Comparison], list[Skipped]]


def pair_checkpoint(base: Checkpoint, tuned: Checkpoint, recipe: Recipe) -> Pairs:
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
    there, here = Layout(base, model, recipe.split), Layout(tuned, model, {})
    rule = infer_rule(tuned.tensors, there.shapes, lambda name, shape: here.shapes[name] == shape)
    pairs, skipped = _pair_tensors(there, here, tuned.tensors, rule)
    if not pairs and tuned.tensors:
        raise AdapterError(_foreign(tuned, base, tuned.tensors, rule))
    found = {pair.base.info.name for pair in pairs}
    for name in base.tensors:
        if name not in found:
            skipped.append(harmless(name, "not stored in the tuned checkpoint"))
    return pairs, skipped


def pair_adapter(base: Checkpoint, adapter: Adapter, recipe: Recipe) -> Pairs:
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
    there = Layout(base, base.config, recipe.split)
    full = Checkpoint(adapter.path, "file", adapter.files, adapter.tensors)
    here = Layout(full, base.config, {})

    def fits(name: str, shape: tuple[int, ...]) -> bool:
        if name in adapter.factors:
            return adapter.factors[name].fits(shape)
        return adapter.tensors[name].shape == shape

    rule = infer_rule({**adapter.tensors, **adapter.factors}, there.shapes, fits)
    pairs, skipped = _pair_tensors(there, here, adapter.tensors, rule)
    lost = [row for row in adapter.unhandled if not row.harmless]
    skipped += [harmless(r.info.name, r.reason) for r in adapter.unhandled if r.harmless]
    replaced = {pair.base.name: pair.tuned for pair in pairs}
    updates: list[Comparison] = []
    strangers = 0
    for name, factors in adapter.factors.items():
        target = rule.find(name) or rule.find(_in_proj(name))
        if target is None:
            reason = NO_COUNTERPART
            strangers += 1
            if strangers <= MAX_NEAREST:
                reason += f" (nearest: {rule.nearest(name)})"
            lost += [Unhandled(info, name, reason) for info in factors.infos]
        else:
            for update in _updates(there, target, factors, name):
                updates.append(replace(update, tuned=replaced.get(update.base.name)))
    if adapter.factors and not updates:
        raise AdapterError(_foreign(adapter, base, adapter.factors, rule))
    skipped += [_lost(row.info.name, row.name, row.reason, recipe) for row in lost]
    updated = {pair.base.name for pair in updates}
    return [*updates, *(p for p in pairs if p.base.name not in updated)], skipped


def _in_proj(name: str) -> str:
    """What MultiheadAttention calls the weight that PEFT updates under the module's own name."""
    return f"{name.removesuffix('.weight')}.in_proj_weight"


def _updates(there: Layout, target: str, factors: LoraFactors, name: str) -> list[Comparison]:
    """One comparison for each matrix of the base that the factors update."""
    transposed = None
    if not is_stack(target, there.shapes[target]):
        transposed = _acts_transposed(factors, target, there)
    return [
        Comparison(
            part.matrix,
            None,
            factors.of(expert=part.expert, rows=part.rows),
            name + part.suffix,
        )
        for part in there.parts(target, transposed=transposed)
    ]


def _pair_tensors(
    there: Layout, here: Layout, tensors: Mapping[str, TensorInfo], rule: NameRule
) -> Pairs:
    """Pair full tensors by name."""
    pairs: list[Comparison] = []
    skipped: list[Skipped] = []
    for name, info in tensors.items():
        target = rule.find(name)
        found = [] if target is None else _pair_parts(there, here, target, name)
        if not found:
            skipped.append(harmless(info.name, NO_COUNTERPART))
        pairs += found
    return pairs, skipped


def _pair_parts(there: Layout, here: Layout, target: str, name: str) -> list[Comparison]:
    """Pair the matrices of one parameter: by the finer of both sides."""
    parts = there.parts(target)
    pairs = []
    for part in parts:
        tuned = here.part(name, part)
        if tuned is not None:
            pairs.append(Comparison(part.matrix, tuned, None, name + part.suffix))
    return pairs


def _acts_transposed(factors: LoraFactors, target: str, there: Layout) -> bool:
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


def harmless(name: str, reason: str) -> Skipped:
    """The row of a tensor with which no update of a weight is lost."""
    return Skipped(name=name, reason=reason, lost=False)


def _lost(stored_name: str, name: str, reason: str, recipe: Recipe) -> Skipped:
    """The row of an update that goes unjudged, unless the recipe has left it out anyway."""
    unwanted = not_wanted(recipe, name)
    return Skipped(name=stored_name, reason=unwanted or reason, lost=not unwanted)


def not_wanted(recipe: Recipe, *names: str) -> str | None:
    """Why the recipe leaves out a tensor of these names, None if it does not."""

    def match(globs: Iterable[str]) -> bool:
        return any(fnmatchcase(name, glob) for name in names for glob in globs)

    if recipe.include and not match(recipe.include):
        return "not included by the recipe"
    if match(recipe.exclude):
        return "excluded by the recipe"
    return None


def _foreign(
    tuned: Checkpoint | Adapter, base: Checkpoint, names: Iterable[str], rule: NameRule
) -> str:
    """The message for a tuned side of which no name fits the base."""
    first = next(iter(names), "")
    return (
        f"{tuned.path}: none of its tensors has a counterpart in {base.path}; the first is "
        f"{first!r}, the nearest there: {rule.nearest(first)}; was it made from another base?"
    )
