"""Which base tensor a tuned tensor belongs to, from the names and shapes alone.

A fine-tune often carries one more prefix than its base (``bert.encoder…`` against ``encoder…``), or
one less.  It does so throughout, so one rule is inferred for the whole checkpoint: the prefix to
strip or to add, or none, that explains most names, shapes agreeing.  Nothing is matched by
similarity: a head named ``classifier.dense`` is not some other ``dense`` of the base.

What that rule leaves over is found by three more, each of which names one base tensor or none:

- the name without the components that models are wrapped in (``model.language_model.layers.0…``
  against ``language_model.model.layers.0…``), and with what transformers 5 renamed under one name;
- the weight that MultiheadAttention calls ``in_proj_weight``, and the old names of BERT's norms;
- the output layer that shares the input embedding.

Two candidates are an error.
"""

from __future__ import annotations

import difflib
import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bulkedge._errors import CheckpointError

from .model import sharing

Shape = tuple[int, ...]
Rule = tuple[str, str]

MAX_CANDIDATES, MAX_COMPARED_LENGTH = 50, 256
GRANITE_LAYERS = frozenset(("input_linear", "output_linear"))
"""Layers of stacked experts whose names say nothing of experts: Granite, JetMoe."""

WRAPPINGS = {
    "model",
    "base_model",
    "language_model",
    "transformer",
    "module",
    "diffusion_model",
    "unet",
}
"""Components that one version or class of a model has in its names and another has not."""

RENAMED = (
    (".block_sparse_moe.input_linear.weight", ".mlp.experts.gate_up_proj"),
    (".block_sparse_moe.output_linear.weight", ".mlp.experts.down_proj"),
    (".block_sparse_moe.", ".mlp."),
    (".mlp.router.layer.weight", ".mlp.gate.weight"),
    (".mlp.router.weight", ".mlp.gate.weight"),
    (".experts.fc1.weight", ".experts.gate_up_proj"),
    (".experts.fc2.weight", ".experts.down_proj"),
    (".embed_out.", ".lm_head."),
    # vision transformers
    (".encoder.layer.", ".layers."),
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)
"""Parts of names and what transformers 5 renamed them to, replaced in this order."""

NORMS = ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta"))
"""The ends of names that BERT's norms have now, and had in the first checkpoints."""


def of_experts(name: str) -> bool:
    """Whether a parameter of this name holds the experts of a mixture, if it has an axis for it."""
    parts = name.split(".")
    return "experts" in parts or not GRANITE_LAYERS.isdisjoint(parts[-2:])


@dataclass(frozen=True)
class NameRule:
    """How tuned names become base names.

    Attributes:
        strip: Prefix taken off a tuned name, with its dot; empty for none.
        add: Prefix put in front of a tuned name, with its dot; empty for none.
        base: The names of the base.
    """

    strip: str
    add: str
    base: frozenset[str]

    def find(self, name: str) -> str | None:
        """The base tensor that the tuned tensor ``name`` belongs to, None without one."""
        if name in self.base:
            return name
        if name.startswith(self.strip):
            candidate = self.add + name.removeprefix(self.strip)
            return candidate if candidate in self.base else None
        return None

    def nearest(self, name: str) -> str:
        """The most similar names of the base, for a message."""
        # difflib is slow: it compares the ends of the few names that share most components
        parts = set(name.split("."))
        ranked = heapq.nsmallest(
            MAX_CANDIDATES,
            self.base,
            key=lambda other: (-len(parts.intersection(other.split("."))), other),
        )
        ends = {other[-MAX_COMPARED_LENGTH:]: other for other in ranked}
        found = difflib.get_close_matches(name[-MAX_COMPARED_LENGTH:], ends, n=3, cutoff=0.4)
        close = [ends[end] for end in found]
        return ", ".join(map(repr, close)) if close else "none is similar"


@dataclass(frozen=True)
class Resolver:
    """How each tuned name becomes a base name.

    Attributes:
        rule: The rule for the whole checkpoint.
        shapes: Shapes of the base tensors, by name.
        model: The base's configuration.
        source: The base, for a message.
        known: Base names of the tuned names that are known beforehand.
    """

    rule: NameRule
    shapes: Mapping[str, Shape]
    model: Mapping[str, Any]
    source: str
    known: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str, fits: Callable[[Shape], bool]) -> str | None:
        """The base tensor that a tuned tensor belongs to.

        Args:
            name: The tuned name.
            fits: Whether the tuned tensor can belong to a base tensor of a shape.

        Returns:
            A base name; None without one.

        Raises:
            CheckpointError: If several base tensors could be meant.
        """
        if found := self.known.get(name):
            return found
        names = (name, f"{name.removesuffix('.weight')}.in_proj_weight", *_norms(name))
        found = (self.rule.find(one) or self._unwrapped(one, fits) for one in names)
        return next((one for one in found if one is not None), None)

    def find_tied(self, name: str, fits: Callable[[Shape], bool]) -> str | None:
        """The base tensor of a layer that shares it and is not stored.

        Args:
            name: The tuned name.
            fits: See :meth:`find`.

        Returns:
            The embedding for the output layer, or the reverse; None if they are not shared.

        Raises:
            CheckpointError: If several base tensors could be meant.
        """
        return self._only(name, sharing(name, self.shapes, self.model), fits)

    def is_inside(self, name: str) -> bool:
        """Whether a name lies within a module of the base that holds a tensor.

        Args:
            name: The tuned name, such as ``lm_head.parametrizations.weight.original1``.

        Returns:
            Whether one of its parents does, by its name without wrappings.
        """
        core = _core(name)
        return any(core[:i] in self._modules for i in range(1, len(core)))

    def _unwrapped(self, name: str, fits: Callable[[Shape], bool]) -> str | None:
        """The base tensor of the same name but for what models are wrapped in."""
        return self._only(name, self._by_core.get(_core(name), []), fits)

    def _only(self, name: str, candidates: list[str], fits: Callable[[Shape], bool]) -> str | None:
        """The only candidate, or the only one of them of a fitting shape."""
        if len(candidates) > 1:
            candidates = [n for n in candidates if fits(self.shapes[n])] or candidates
        if len(candidates) > 1:
            listed = ", ".join(map(repr, candidates[:5]))
            raise CheckpointError(
                f"{self.source}: {name!r} of the tuned side may belong to any of {listed}; rename "
                "it, or leave it out with --exclude"
            )
        return candidates[0] if candidates else None

    @cached_property
    def _by_core(self) -> dict[tuple[str, ...], list[str]]:
        """Base names by what is left of them without wrappings."""
        found: dict[tuple[str, ...], list[str]] = {}
        for name in self.shapes:
            found.setdefault(_core(name), []).append(name)
        return found

    @cached_property
    def _modules(self) -> set[tuple[str, ...]]:
        """The modules of the base that hold a tensor, without wrappings."""
        return {core[:-1] for core in self._by_core}


def _core(name: str) -> tuple[str, ...]:
    """The components of a name without wrappings, renamed ones under one name."""
    name = f".{name}"
    for fragment, other in RENAMED:
        name = name.replace(fragment, other)
    return tuple(part for part in name.split(".")[1:] if part not in WRAPPINGS)


def _norms(name: str) -> Iterator[str]:
    """What versions of transformers call the vector of a norm besides."""
    for new, old in NORMS:
        for end, other in ((new, old), (old, new)):
            if name.endswith(end):
                yield name.removesuffix(end) + other


def infer_rule(
    tuned: Iterable[str],
    base: Mapping[str, Shape],
    fits: Callable[[str, Shape], bool],
) -> NameRule:
    """The one prefix rule that explains most of the tuned names.

    Args:
        tuned: Names of the tuned tensors.
        base: Shapes of the base tensors, by name.
        fits: Whether the tuned tensor of a name can belong to a base tensor of a shape.

    Returns:
        The rule; without any evidence, one that matches equal names only.

    Raises:
        CheckpointError: If two rules explain the names equally well.
    """
    names = set(tuned)
    fitting: Counter[Rule] = Counter()
    named: Counter[Rule] = Counter()
    for rule, name, target in _candidates(names, base):
        named[rule] += 1
        fitting[rule] += fits(name, base[target])
    # if no shape fits, a rule by names alone leads to the message about the first mismatch
    ranked = (fitting if any(fitting.values()) else named).most_common(2)
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        first, second = (_in_words(rule) for rule, _ in ranked)
        raise CheckpointError(
            f"the tuned names fit the base in two ways, {first} or {second}; rename the tuned "
            "tensors, or audit against the part of the base that was tuned"
        )
    strip, add = ranked[0][0] if ranked else ("", "")
    return NameRule(strip, add, frozenset(base))


def _candidates(tuned: Collection[str], base: Collection[str]) -> Iterator[tuple[Rule, str, str]]:
    """Every rule that turns a tuned name into a base name, with the two names."""
    for name in tuned:
        if name in base:
            yield ("", ""), name, name
        for suffix in _proper_suffixes(name):
            if suffix in base:
                yield (name.removesuffix(suffix), ""), name, suffix
    for target in base:
        for suffix in _proper_suffixes(target):
            if suffix in tuned:
                yield ("", target.removesuffix(suffix)), suffix, target


def _proper_suffixes(name: str) -> Iterator[str]:
    """``b.c.weight``, ``c.weight`` for ``a.b.c.weight``: at least a module and its parameter."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(1, len(parts) - 1))


def _in_words(rule: Rule) -> str:
    """A rule in words."""
    strip, add = rule
    if not strip and not add:
        return "as they are"
    return f"without {strip!r}" if strip else f"with {add!r} in front"
