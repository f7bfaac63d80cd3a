"""Which base tensor a tuned tensor belongs to, from the names and shapes alone.

A fine-tune often carries one more prefix than its base (``bert.encoder…`` against ``encoder…``), or
one less.  It does so throughout, so one rule is inferred for the whole checkpoint: the prefix to
strip or to add, or none, that explains most names, shapes agreeing.  Nothing is matched by
likeness: a head named ``classifier.dense`` is not some other ``dense`` of the base.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from bulkedge._errors import CheckpointError

Shape = tuple[int, ...]
Rule = tuple[str, str]


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
        close = difflib.get_close_matches(name, self.base, n=3, cutoff=0.4)
        return ", ".join(map(repr, close)) if close else "none is similar"


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
    # without one fitting shape the names still tell where the mismatch is
    ranked = (fitting if any(fitting.values()) else named).most_common(2)
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        first, second = (_told(rule) for rule, _ in ranked)
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


def _told(rule: Rule) -> str:
    """A rule in words."""
    strip, add = rule
    if not strip and not add:
        return "as they are"
    return f"without {strip!r}" if strip else f"with {add!r} in front"
