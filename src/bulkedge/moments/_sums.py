"""Sums over the inputs of layers; layers that always had the same inputs share one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from bulkedge._precision import exact

ROWS = 1024
"""Rows of a sum that are added at a time."""


@dataclass
class Sum:
    """A sum that layers with the same inputs share.

    Attributes:
        total: ``Σ x xᵀ`` in float64, or what stands for it.
        count: Number of inputs.
    """

    total: Tensor
    count: int


@dataclass(eq=False)
class Part:
    """What one tensor, that some layers were called with, adds to their sums.

    Attributes:
        total: Its ``Σ x xᵀ``, as it was computed.
        count: Number of its rows.
    """

    total: Tensor
    count: int


def added(sums: Mapping[str, Sum], calls: Mapping[str, Sequence[Part]]) -> dict[str, Sum]:
    """The sums after some calls of layers.

    Args:
        sums: By layer.  What is shared is added to in place, and parted where histories part.
        calls: The inputs of each layer that was called, in order.

    Returns:
        The sums of these layers.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, parts in calls.items():
        groups.setdefault((id(sums.get(name)), *map(id, parts)), []).append(name)
    uses = Counter(id(part) for name, *_ in groups.values() for part in calls[name])
    found: dict[str, Sum] = {}
    for names in groups.values():
        parts = list(calls[names[0]])
        own = _own(names, sums) or _first(parts.pop(0), uses)
        for part in parts:
            _add(own, part)
        found |= dict.fromkeys(names, own)
    return found


def _add(own: Sum, part: Part) -> None:
    """Add a part, some rows at a time: their sum in two dtypes makes a copy."""
    rows = own.total.split(ROWS), part.total.split(ROWS)
    for total, more in zip(*rows, strict=True):
        total += more.to(total.device)
    own.count += part.count


def _first(part: Part, uses: Mapping[int, int]) -> Sum:
    """A sum of one part, which it takes the place of, if no other needs it."""
    total = part.total.clone() if uses[id(part)] > 1 else part.total
    return Sum(exact(total), part.count)


def _own(names: Sequence[str], sums: Mapping[str, Sum]) -> Sum | None:
    """The sum of these layers; a copy where others go on without them."""
    old = sums.get(names[0])
    if old is None or all(name in names for name, own in sums.items() if own is old):
        return old
    return Sum(old.total.clone(), old.count)
