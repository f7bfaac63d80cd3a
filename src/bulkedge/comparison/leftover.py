"""Tensors without a counterpart: which of them can be left alone, and which went unjudged.

The question is what the program that loads the fine-tune has in that place.  A new head stands
beside the base's layers and changes none.  A tuned weight without a counterpart may be a renamed
one, if weights of the base have no counterpart either; one within the base's own blocks changes
what they compute.  A weight that the fine-tune does not store is not that of the base: a program
initialises it at random, unless the model's class has no such layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bulkedge._globs import matches
from bulkedge.checkpoint import Checkpoint, Codec, Resolver, StoredMatrix
from bulkedge.checkpoint.header import EMPTY
from bulkedge.checkpoint.model import OUTPUTS, has_output, is_input, is_output, lacks, shares, ties
from bulkedge.records.recipe import Recipe
from bulkedge.records.tensors import Fate, InputSide, Skipped

from .comparison import Comparison
from .missing import missing_vectors

Shape = tuple[int, ...]
EMBEDDING_AND_OUTPUT = {"embed_tokens.weight": is_input, OUTPUTS[0]: is_output}
"""The two ends of a language model: the name for each that messages use where it is not stored,
and the function that recognises it."""

NO_COUNTERPART = "no counterpart in the base"
NOT_STORED = "not stored in the tuned checkpoint"
EXCLUDED = "excluded by the recipe"
NOT_INCLUDED = "not included by the recipe"
OF_NO_USE = f"{NOT_STORED}, whose class has no such layer"
RENAMED = f"{NO_COUNTERPART}, which has weights left over: is it one of those, renamed?"
IN_A_BLOCK = f"{NO_COUNTERPART}, although it is no head but inside the layers"
MAY_BE_SHARED = f"{NO_COUNTERPART}, or its embedding: the base's config.json would tell"
BASE_LACKS_IT = f"{NO_COUNTERPART}, which by its config.json should have one of its own"
STARTED_ANEW = "not stored in the tuned checkpoint, and by its config.json not the embedding"
NOTHING_BEFORE = (
    "the embedding in the tuned checkpoint; the base, by its config.json, lacks its own"
)
EITHER = "stored, and by config.json the embedding: versions of transformers take one or the other"


@dataclass
class Pairing:
    """Two sides matched.

    Attributes:
        pairs: What to compare.
        skipped: The tensors that are left out, each with its reason.
        excluded: The pairs that the recipe excludes by their name on the tuned side.
        unmatched: The full weights of the tuned side that have no counterpart, by name.
        unjudged_base: The fate of each base tensor whose update cannot be compared, by name.
    """

    pairs: list[Comparison] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    excluded: list[Comparison] = field(default_factory=list)
    unmatched: dict[str, Codec] = field(default_factory=dict)
    unjudged_base: dict[str, Fate] = field(default_factory=dict)

    @property
    def matched_base_names(self) -> set[str]:
        """The base's tensors that have a counterpart, as its files call them."""
        return {pair.base.info.name for pair in (*self.pairs, *self.excluded)}


def set_aside(name: str, reason: str, side: InputSide = "tuned") -> Skipped:
    """The row of a tensor that is left out without loss: it holds no update of a weight."""
    return Skipped(name=name, reason=reason, lost=False, side=side)


def accepted(name: str, reason: str, side: InputSide = "tuned") -> Skipped:
    """The row of a tensor that the recipe leaves out."""
    return Skipped(name=name, reason=reason, lost=False, side=side, accepted=True)


def unjudged(
    recipe: Recipe, name: str, names: Iterable[str], reason: str, side: InputSide
) -> Skipped:
    """The row of a weight that goes unjudged, unless the recipe has left it out anyway.

    Args:
        recipe: What is wanted.
        name: As its file calls it.
        names: All its names, for globs.
        reason: Why it is not judged.
        side: Which input holds it.

    Returns:
        The row.
    """
    if unwanted := why_excluded(recipe, name, *names):
        return accepted(name, unwanted, side)
    return Skipped(name=name, reason=reason, lost=True, side=side)


def why_excluded(recipe: Recipe, *names: str) -> str | None:
    """Why the recipe leaves out a tensor of these names, None if it does not."""
    if recipe.include and not matches(names, recipe.include):
        return NOT_INCLUDED
    return EXCLUDED if matches(names, recipe.exclude) else None


def not_a_weight(codec: Codec) -> str | None:
    """Why a tensor is no weight matrix, None if it is one."""
    if len(codec.shape) < 2:
        return f"{len(codec.shape)}-D tensor: not a matrix"
    if codec.info.empty:
        return "empty tensor on both sides"
    return codec.no_weight


def judge_base(
    base: Checkpoint, tuned: Checkpoint, recipe: Recipe, pairing: Pairing
) -> list[Skipped]:
    """A row for each tensor of the base that the fine-tune does not store.

    Args:
        base: The base.
        tuned: The fine-tune.
        recipe: What is wanted.
        pairing: The tensors that have a counterpart.

    Returns:
        The rows.  A weight counts as lost, unless the class of the fine-tune has no such layer or
        the recipe accepts that it is missing.  A vector is marked missing in these cases.
    """
    rows = []
    matched = pairing.matched_base_names
    pairs = (*pairing.pairs, *pairing.excluded)
    missing = set() if recipe.partial else set(missing_vectors(base, tuned, pairs))
    for name, codec in base.weights.items():
        info = codec.info
        if info.name in matched:
            continue
        if info.empty:
            rows.append(unjudged(recipe, info.name, (name,), EMPTY, "base"))
        elif not_a_weight(codec):
            row = set_aside(info.name, NOT_STORED, "base")
            rows.append(row.model_copy(update={"missing": info.name in missing}))
        elif lacks(tuned.config, name):
            rows.append(set_aside(info.name, OF_NO_USE, "base"))
        elif recipe.partial:
            rows.append(accepted(info.name, NOT_STORED, "base"))
        else:
            rows.append(unjudged(recipe, info.name, (name,), NOT_STORED, "base"))
    return rows


def judge_unmatched(
    base: Checkpoint,
    unmatched: Mapping[str, Codec],
    names: Resolver,
    recipe: Recipe,
    *,
    base_has_unmatched: bool,
    heads: Collection[Shape] = (),
) -> list[Skipped]:
    """A row for each full tensor of the tuned side without a counterpart.

    Args:
        base: The base.
        unmatched: The weights by name.
        names: How tuned names become base names.
        recipe: What is wanted.
        base_has_unmatched: Whether weights of the base have no counterpart either.
        heads: The shapes that :func:`unused_heads` returns.

    Returns:
        The rows.  A new head, or a tensor that is no weight, counts as no loss; others as lost.
    """
    lists = _lists(base.weights)
    rows = []
    for name, codec in unmatched.items():
        info = codec.info
        renamed = base_has_unmatched or codec.shape in heads
        reason = RENAMED if renamed else _why_no_head(name, base, names, lists)
        if info.empty:
            rows.append(unjudged(recipe, info.name, (name,), EMPTY, "tuned"))
        elif not_a_weight(codec) or reason is None:
            rows.append(set_aside(info.name, NO_COUNTERPART))
        else:
            rows.append(unjudged(recipe, info.name, (name,), reason, "tuned"))
    return rows


def unused_heads(base: Checkpoint, tuned: Checkpoint, matched: set[str]) -> set[Shape]:
    """Shapes of the output layers of the base that the class of the fine-tune is said to lack.

    A tuned tensor of such a shape is no new classifier, because it spans the whole vocabulary: it
    is the base's output layer under another name, whatever the configuration says of its class.
    The shapes of the dense layers below the head do not tell: those of a classifier are the same.

    Args:
        base: The base.
        tuned: The fine-tune.
        matched: The base's tensors that have a counterpart.

    Returns:
        The shapes.
    """
    return {
        codec.shape
        for name, codec in base.weights.items()
        if is_output(name) and codec.info.name not in matched and lacks(tuned.config, name)
    }


def judge_embedding_and_output(
    base: Checkpoint, tuned: Checkpoint, recipe: Recipe, matched: set[str]
) -> list[Skipped]:
    """Rows of an embedding or output layer that only one side stores, or ties to the other.

    Args:
        base: The base.
        tuned: The fine-tune.
        recipe: What is wanted.
        matched: The base's tensors that have a counterpart.

    Returns:
        A row for each such layer that goes unjudged although no unmatched tensor shows it.
    """
    rows = []
    for end, named in EMBEDDING_AND_OUTPUT.items():
        base_state, tuned_state = (
            _state(base, end, base.config),
            _state(tuned, end, tuned.config or base.config),
        )
        own = [codec.info.name for name, codec in base.weights.items() if named(name)]
        reason = None
        if tuned_state == "missing" and (base_state == "shared" or matched.intersection(own)):
            reason = None if recipe.partial else STARTED_ANEW
        elif (base_state, tuned_state) == ("missing", "shared"):
            reason = NOTHING_BEFORE
        elif end == OUTPUTS[0] and _in_doubt(base, tuned):
            reason = EITHER
        if reason is not None:
            name = next((name for name in tuned.weights if named(name)), end)
            stored = tuned.weights[name].info.name if name in tuned.weights else name
            rows.append(unjudged(recipe, stored, (name,), reason, "tuned"))
    return rows


def shared_by(name: str, tuned: StoredMatrix) -> StoredMatrix:
    """The tuned tensor that stands for a layer of another name."""
    return replace(tuned, alias=name.removesuffix(".weight"))


def _state(side: Checkpoint, end: str, config: Mapping[str, Any]) -> str:
    """Where a program that loads one side takes its embedding or its output layer from.

    Returns:
        ``stored``: a tensor of its own.  ``shared``: the tensor of the other of the two.
        ``missing``: it has none, but should.  ``none``: it has none, and needs none.
    """
    ours, other = (
        EMBEDDING_AND_OUTPUT[end],
        next(named for name, named in EMBEDDING_AND_OUTPUT.items() if name != end),
    )
    if any(map(ours, side.weights)):
        return "stored"
    if not any(map(other, side.weights)):
        return "none"
    if shares(config):
        return "shared"
    return "missing" if has_output(config) else "none"


def _in_doubt(base: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether the fine-tune stores an output layer that its configuration takes from another."""
    recognised = EMBEDDING_AND_OUTPUT.values()
    both_stored = all(
        any(map(named, side.weights)) for side in (base, tuned) for named in recognised
    )
    tuned_ties, base_ties = (ties(side.config or base.config) is True for side in (tuned, base))
    # where the base ties them, too, both candidates were compared
    return both_stored and tuned_ties and not base_ties


def _why_no_head(name: str, base: Checkpoint, names: Resolver, lists: set[str]) -> str | None:
    """Why a tuned tensor without a counterpart is no new head, None if it is one."""
    end = next((end for end, named in EMBEDDING_AND_OUTPUT.items() if named(name)), None)
    if end is not None and _state(base, end, base.config) == "missing":
        return BASE_LACKS_IT
    if is_output(name) and not base.config and any(map(is_input, base.weights)):
        return MAY_BE_SHARED
    on_either_side = (name, names.rule.add + name.removeprefix(names.rule.strip))
    inside = any(_in_a_block(one, lists) or names.is_inside(one) for one in on_either_side)
    return IN_A_BLOCK if inside else None


def _in_a_block(name: str, lists: set[str]) -> bool:
    """Whether a name is that of a part of a numbered block, in the base or elsewhere."""
    # A block holds layers, which hold parameters; a numbered layer of a head, such as
    # classifier.0.weight, holds parameters itself.
    parts = name.split(".")
    return any(
        part.isdecimal() and (".".join(parts[:i]) in lists or i < len(parts) - 2)
        for i, part in enumerate(parts)
    )


def _lists(names: Iterable[str]) -> set[str]:
    """The names of a model's lists of blocks: what stands before a number in a weight's name."""
    lists = set()
    for name in names:
        parts = name.split(".")
        lists.update(".".join(parts[:i]) for i, part in enumerate(parts) if part.isdecimal())
    return lists
