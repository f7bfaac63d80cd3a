"""Whether the configuration of an adapter names the modules that its file holds updates of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from bulkedge.checkpoint import Adapter, Checkpoint

from .comparison import Comparison

WEIGHT = ".weight"
TOKENS = "trainable_tokens"
"""The kind of an update of single rows, of which no target has to tell."""


def with_disagreements(
    base: Checkpoint, adapter: Adapter, comparisons: Iterable[Comparison]
) -> Adapter:
    """An adapter with what its configuration and its tensors disagree on.

    Args:
        base: The base.
        adapter: The adapter.
        comparisons: What was paired: how the base's names become those of the tuned model.

    Returns:
        The adapter; the same where it has no targets.
    """
    if adapter.targets is None:
        return adapter
    stored = [_module(n) for n, update in adapter.factors.items() if update.kind != TOKENS]
    of_parameters = [
        name
        for w in adapter.wrapped
        for name in (w.module, *(f"{w.module}.{p}" for p in w.parameters))
    ]
    others = (*(row.name for row in adapter.unhandled), *adapter.tensors)
    known = {*stored, *of_parameters, *map(_module, others)}
    found = adapter.targets.disagreements(stored, _modules(base, comparisons), known)
    return replace(adapter, disagreements=tuple(found))


def _module(name: str) -> str:
    """The module that a weight belongs to."""
    return name.removesuffix(WEIGHT)


def _modules(base: Checkpoint, comparisons: Iterable[Comparison]) -> Iterator[str]:
    """The base's modules with a weight matrix, by their path in the tuned model."""
    for comparison in comparisons:
        if comparison.factors is None:
            continue
        ours, theirs = comparison.base.codec.name.split("."), comparison.tuned_name.split(".")
        same = 0
        while same < min(len(ours), len(theirs)) and ours[-1 - same] == theirs[-1 - same]:
            same += 1
        old, new = (".".join([*names[: len(names) - same], ""]) for names in (ours, theirs))
        break
    else:
        return
    for name, codec in base.weights.items():
        if name.endswith(WEIGHT) and len(codec.shape) > 1 and name.startswith(old.lstrip(".")):
            yield _module(new.lstrip(".") + name[len(old.lstrip(".")) :])
