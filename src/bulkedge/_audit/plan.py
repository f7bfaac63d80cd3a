"""What to compare with what, settled from headers alone, before the first number is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bulkedge._errors import AdapterError, CheckpointError, NothingAuditedError, RecipeError
from bulkedge.checkpoint import (
    Adapter,
    Checkpoint,
    LoraFactors,
    NameRule,
    TensorInfo,
    Unhandled,
    infer_rule,
    is_adapter,
    open_adapter,
    open_checkpoint,
)
from bulkedge.checkpoint.header import FLOATING

from .recipe import Recipe
from .record import Skipped

# GPT-2 and its kin store these layers as (in, out), transformers' Conv1D
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D_LAYERS = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight")
INDEX_DTYPES = ("BOOL", "I64")
# comparing a name with all names of a large base takes a while
MAX_NEAREST = 5


@dataclass(frozen=True)
class Comparison:
    """One base matrix and what the fine-tune made of it: ``W = (tuned or base) + s·B·A``.

    Attributes:
        base: The base matrix.
        tuned: The full tensor that replaces it, if any.
        factors: The low-rank update on top, if any.
        transposed: Whether both are stored as ``(in, out)``.
        tuned_name: What the tuned side calls it.
    """

    base: TensorInfo
    tuned: TensorInfo | None
    factors: LoraFactors | None
    transposed: bool
    tuned_name: str

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The full tensors of both sides."""
        return (self.base,) if self.tuned is None else (self.base, self.tuned)

    @property
    def stored_names(self) -> list[str]:
        """What the tuned side's file calls the parts of it."""
        factors = (self.factors.A, self.factors.B) if self.factors else ()
        return [info.name for info in (self.tuned, *factors) if info is not None]


@dataclass(frozen=True)
class Plan:
    """A checked comparison of two inputs.

    Attributes:
        base: The base checkpoint.
        tuned: The tuned checkpoint or adapter.
        comparisons: The matrices to audit, in the base's order.
        skipped: Every other tensor of the tuned side, and of the base where it should have one.
    """

    base: Checkpoint
    tuned: Checkpoint | Adapter
    comparisons: tuple[Comparison, ...]
    skipped: tuple[Skipped, ...]


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
    if is_adapter(base):
        raise CheckpointError(f"{base}: is an adapter; the first argument is the base model")
    base_checkpoint = open_checkpoint(base)
    if is_adapter(tuned):
        opened: Checkpoint | Adapter = open_adapter(tuned)
        pairs, skipped = _pair_adapter(base_checkpoint, opened, recipe)
    else:
        opened = open_checkpoint(tuned)
        pairs, skipped = _pair_checkpoint(base_checkpoint, opened)
    wanted = []
    for comparison in pairs:
        either = (comparison.base.name, comparison.tuned_name)
        unwanted = _not_wanted(recipe, *either) or _not_a_weight(comparison)
        unhandled = _not_handled(comparison)
        if reason := unwanted or unhandled:
            names = comparison.stored_names
            skipped += [Skipped(name=name, reason=reason, lost=not unwanted) for name in names]
        else:
            _check_shapes(comparison)
            wanted.append(comparison)
    _check_globs(recipe, [*base_checkpoint.tensors, *_tuned_names(opened)])
    if not wanted:
        raise NothingAuditedError(_why_nothing(base, tuned, skipped))
    _check_unique(wanted)
    order = {name: i for i, name in enumerate(base_checkpoint.tensors)}
    wanted.sort(key=lambda comparison: order[comparison.base.name])
    return Plan(base_checkpoint, opened, tuple(wanted), tuple(skipped))


def _pair_checkpoint(base: Checkpoint, tuned: Checkpoint) -> tuple[list[Comparison], list[Skipped]]:
    """Pair a full fine-tune with its base."""
    if any(".lora_A." in name or "lora_down" in name for name in tuned.tensors):
        raise AdapterError(
            f"{tuned.path}: holds LoRA factors but no adapter_config.json beside them, which has "
            "their scale; give PEFT's adapter folder"
        )
    rule = infer_rule(
        tuned.tensors, _shapes(base), lambda name, shape: tuned.tensors[name].shape == shape
    )
    pairs, skipped = _pair_tensors(base, tuned.tensors, rule, base.config or tuned.config)
    if not pairs and tuned.tensors:
        raise _foreign(tuned.path, base, tuned.tensors, rule)
    found = {pair.base.name for pair in pairs}
    for name in base.tensors:
        if name not in found:
            skipped.append(_harmless(name, "not stored in the tuned checkpoint"))
    return pairs, skipped


def _pair_adapter(
    base: Checkpoint, adapter: Adapter, recipe: Recipe
) -> tuple[list[Comparison], list[Skipped]]:
    """Pair an adapter's updates and replaced tensors with the base."""

    def fits(name: str, shape: tuple[int, ...]) -> bool:
        if name in adapter.factors:
            return adapter.factors[name].fits(shape)
        return adapter.tensors[name].shape == shape

    rule = infer_rule({**adapter.tensors, **adapter.factors}, _shapes(base), fits)
    pairs, skipped = _pair_tensors(base, adapter.tensors, rule, base.config)
    lost = [row for row in adapter.unhandled if not row.harmless]
    skipped += [_harmless(r.info.name, r.reason) for r in adapter.unhandled if r.harmless]
    replaced = {pair.base.name: pair.tuned for pair in pairs}
    updates: dict[str, Comparison] = {}
    strangers = 0
    for name, factors in adapter.factors.items():
        target = rule.find(name)
        if target is None:
            reason = "no counterpart in the base"
            strangers += 1
            if strangers <= MAX_NEAREST:
                reason += f" (nearest: {rule.nearest(name)})"
            lost += [Unhandled(info, name, reason) for info in (factors.A, factors.B)]
        else:
            info = base.tensors[target]
            transposed = _acts_transposed(factors, info, base.config)
            updates[name] = Comparison(info, replaced.get(target), factors, transposed, name)
    if adapter.factors and not updates:
        raise _foreign(adapter.path, base, adapter.factors, rule)
    skipped += [_lost(row.info.name, row.name, row.reason, recipe) for row in lost]
    updated = {pair.base.name for pair in updates.values()}
    return [*updates.values(), *(p for p in pairs if p.base.name not in updated)], skipped


def _pair_tensors(
    base: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    rule: NameRule,
    config: Mapping[str, Any],
) -> tuple[list[Comparison], list[Skipped]]:
    """Pair full tensors by name."""
    pairs, skipped = [], []
    for name, info in tensors.items():
        target = rule.find(name)
        if target is None:
            skipped.append(_harmless(info.name, "no counterpart in the base"))
        else:
            transposed = config.get("model_type") in CONV1D_MODELS and _is_conv1d(target)
            pairs.append(Comparison(base.tensors[target], info, None, transposed, name))
    return pairs, skipped


def _harmless(name: str, reason: str) -> Skipped:
    """The row of a tensor with which no update of a weight is lost."""
    return Skipped(name=name, reason=reason, lost=False)


def _lost(stored_name: str, name: str, reason: str, recipe: Recipe) -> Skipped:
    """The row of an update that goes unjudged, unless the recipe has left it out anyway."""
    unwanted = _not_wanted(recipe, name)
    return Skipped(name=stored_name, reason=unwanted or reason, lost=not unwanted)


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: info.shape for name, info in checkpoint.tensors.items()}


def _is_conv1d(name: str) -> bool:
    """Whether a layer of this name is stored as ``(in, out)`` in a model that has such layers."""
    return name.endswith(CONV1D_LAYERS)


def _acts_transposed(factors: LoraFactors, base: TensorInfo, config: Mapping[str, Any]) -> bool:
    """Whether the base stores ``(in, out)`` what the factors update as ``(out, in)``."""
    if factors.embedding or base.shape != factors.shape[::-1]:
        return False
    if base.shape != factors.shape:
        return factors.fan_in_fan_out or _is_conv1d(base.name)
    # a square weight does not tell: the model's type does, and PEFT's flag where it is not known
    if "model_type" in config:
        return config["model_type"] in CONV1D_MODELS and _is_conv1d(base.name)
    return factors.fan_in_fan_out


def _not_wanted(recipe: Recipe, *names: str) -> str | None:
    """Why the recipe leaves out a tensor of these names, None if it does not."""

    def match(globs: Iterable[str]) -> bool:
        return any(fnmatchcase(name, glob) for name in names for glob in globs)

    if recipe.include and not match(recipe.include):
        return "not included by the recipe"
    if match(recipe.exclude):
        return "excluded by the recipe"
    return None


def _not_a_weight(comparison: Comparison) -> str | None:
    """Why a pair is no pair of weight matrices, None if it is one."""
    for info in comparison.infos:
        if len(info.shape) < 2:
            return f"{len(info.shape)}-D tensor: not a matrix"
        if 0 in info.shape:
            return "empty tensor"
        if info.dtype in INDEX_DTYPES:
            return f"{info.dtype} tensor: indices, not a weight"
    return None


def _not_handled(comparison: Comparison) -> str | None:
    """Why a pair of weights cannot be judged, None if it can."""
    for info in comparison.infos:
        if info.dtype not in FLOATING:
            kind = "complex" if info.dtype.startswith("C") else "quantised"
            return f"{info.dtype} tensor: {kind}, not handled yet"
        if len(info.shape) > 2:
            what = "stacked experts or a convolution" if len(info.shape) == 3 else "a convolution"
            return f"{len(info.shape)}-D tensor, {what}: not handled yet"
    return None


def _check_shapes(comparison: Comparison) -> None:
    """Raise unless all parts of a comparison have the base's shape."""
    base, tuned, factors = comparison.base, comparison.tuned, comparison.factors
    if tuned is not None and tuned.shape != base.shape:
        raise CheckpointError(
            f"{tuned.file}: tensor {tuned.name!r} has shape {tuned.shape}, expected {base.shape} "
            f"of {base.name!r} in {base.file}; give the base that it was tuned from, or "
            f"leave it out with --exclude {base.name!r}"
        )
    if factors is not None and not (comparison.transposed or factors.shape == base.shape):
        raise AdapterError(
            f"{factors.A.file}: tensor {factors.A.name!r} updates a weight of shape "
            f"{factors.shape}, but {base.name!r} in {base.file} has {base.shape}; the adapter was "
            "trained for another base"
        )


def _tuned_names(tuned: Checkpoint | Adapter) -> list[str]:
    """What the tuned side calls its weights."""
    if isinstance(tuned, Checkpoint):
        return list(tuned.tensors)
    return [*tuned.factors, *tuned.tensors, *(row.name for row in tuned.unhandled)]


def _check_globs(recipe: Recipe, names: list[str]) -> None:
    """Raise where a glob matches nothing: misspelt, it must not turn a gate green."""
    for glob in (*recipe.include, *recipe.exclude):
        if not any(fnmatchcase(name, glob) for name in names):
            example = max(names, key=len, default="")
            raise RecipeError(
                f"{glob!r} matches no tensor of either side, whose names look like {example!r}; "
                "see `bulkedge inspect`"
            )


def _check_unique(comparisons: Iterable[Comparison]) -> None:
    """Raise where two tuned tensors claim one base tensor."""
    seen: dict[str, str] = {}
    for comparison in comparisons:
        other = seen.setdefault(comparison.base.name, comparison.tuned_name)
        if other != comparison.tuned_name:
            raise CheckpointError(
                f"{comparison.base.file}: tensor {comparison.base.name!r} has two counterparts in "
                f"the tuned checkpoint, {other!r} and {comparison.tuned_name!r}; remove one"
            )


def _foreign(path: Path, base: Checkpoint, names: Iterable[str], rule: NameRule) -> CheckpointError:
    """The error for a tuned side of which no name fits the base."""
    first = next(iter(names), "")
    return AdapterError(
        f"{path}: none of its tensors has a counterpart in {base.path}; the first is {first!r}, "
        f"the nearest there: {rule.nearest(first)}; was it made from another base?"
    )


def _why_nothing(base: str | Path, tuned: str | Path, skipped: list[Skipped]) -> str:
    """The message for an empty plan."""
    reasons = sorted({row.reason for row in skipped})
    told = "; ".join(reasons[:5]) or "the tuned side is empty"
    return f"nothing to audit in {tuned} against {base}: {told}"
