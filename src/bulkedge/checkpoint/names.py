"""Which base tensor a tuned tensor belongs to, from the names and shapes alone.

A fine-tune often carries one more prefix than its base (``bert.encoder…`` against ``encoder…``), or
one less.  It does so throughout, so one rule is inferred for the whole checkpoint: the prefix to
strip or to add that explains most names, shapes agreeing.  A name that lies in the base as it is
needs no rule.  Nothing is matched by likeness: a head named ``classifier.dense`` is not some other
``dense`` of the base.
"""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from bulkedge._errors import CheckpointError

Shape = tuple[int, ...]


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
    with_suffix = _names_by_suffix(base)
    votes: Counter[tuple[str, str]] = Counter()
    hits: Counter[tuple[str, str]] = Counter()
    for name in tuned:
        if name in base:
            continue
        for rule, target in _candidates(name, base, with_suffix):
            hits[rule] += 1
            votes[rule] += fits(name, base[target])
    # without one fitting shape the names still tell where the mismatch is
    ranked = (votes if any(votes.values()) else hits).most_common(2)
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        first, second = (_told(rule) for rule, _ in ranked)
        raise CheckpointError(
            f"the tuned names fit the base in two ways, {first} or {second}; rename the tuned "
            "tensors, or audit against the part of the base that was tuned"
        )
    strip, add = ranked[0][0] if ranked else ("", "")
    return NameRule(strip, add, frozenset(base))


def _names_by_suffix(base: Iterable[str]) -> dict[str, list[str]]:
    """Base names under each of their proper dotted suffixes."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in base:
        for suffix in _proper_suffixes(name):
            found[suffix].append(name)
    return found


def _proper_suffixes(name: str) -> Iterable[str]:
    """``b.c.weight``, ``c.weight`` for ``a.b.c.weight``: at least a module and its parameter."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(1, len(parts) - 1))


def _candidates(
    name: str, base: Mapping[str, Shape], with_suffix: Mapping[str, list[str]]
) -> Iterable[tuple[tuple[str, str], str]]:
    """Every ``(strip, add)`` that would turn ``name`` into a base name, and that name."""
    for suffix in _proper_suffixes(name):
        if suffix in base:
            yield (name.removesuffix(suffix), ""), suffix
    for target in with_suffix.get(name, ()):
        yield ("", target.removesuffix(name)), target


def _told(rule: tuple[str, str]) -> str:
    """A rule in words."""
    strip, add = rule
    return f"without {strip!r}" if strip else f"with {add!r} in front"
