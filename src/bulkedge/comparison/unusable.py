"""Parts of an adapter that cannot be used, and the weights of the base that go unjudged with them.

A weight whose update cannot be read is not the base's own any more: it must not count as equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from bulkedge._errors import CheckpointError
from bulkedge.checkpoint import Layout, Resolver, Unhandled, unflatten
from bulkedge.checkpoint.fused import places_in_fused
from bulkedge.checkpoint.layout import place_in_stack
from bulkedge.records.recipe import Recipe
from bulkedge.records.tensors import Fate, Skipped

from .leftover import unjudged


def row_of(row: Unhandled, recipe: Recipe) -> Skipped:
    """The row of a part that goes unjudged, unless the recipe has left it out anyway.

    Args:
        row: The part.
        recipe: What is wanted.

    Returns:
        The row.
    """
    return unjudged(recipe, row.info.name, (row.name,), row.reason, "tuned")


def unjudged_base(
    base_layout: Layout, names: Resolver, lost: Iterable[Unhandled], recipe: Recipe
) -> dict[str, Fate]:
    """What becomes of the base's tensors that unusable parts of an adapter update.

    Args:
        base_layout: The base's parameters and their matrices.
        names: How tuned names become base names.
        lost: The parts of the adapter that cannot be used.
        recipe: What is wanted.

    Returns:
        Fates by the name of a tensor in its file.
    """
    lost = list(lost)
    flattened = _flattened(base_layout, lost)
    found: dict[str, Fate] = {}
    for row in lost:
        fate: Fate = "lost" if row_of(row, recipe).lost else "excluded"
        known = flattened.get(row.name)
        for target in {known} if known else _targets(names, row.name):
            for codec in base_layout.pieces(target):
                if found.get(codec.info.name) != "lost":
                    found[codec.info.name] = fate
    return found


def _targets(names: Resolver, name: str) -> set[str]:
    """The parameters of the base that an update of a name changes, by the name alone."""
    path, _, last = name.rpartition(".")
    # the name may be a layer's, its weight's, that of a part of its update, or of one parameter of
    # several, separated by |
    wanted = {name, f"{name}.weight", *(f"{path}.{part}" for part in last.split("|"))}
    wanted |= set() if last == "bias" else {f"{path}.weight"}
    stacks = (place_in_stack(each) for each in wanted)
    wanted |= {place[0] for place in stacks if place}
    wanted |= {fused for each in wanted for fused, _, _ in places_in_fused(each)}
    found: set[str | None] = set()
    for each in wanted:
        with suppress(CheckpointError):  # ambiguous: none is known to be updated
            found.add(names.find(each, _anything) or names.find_tied(each, _anything))
    return {target for target in found if target is not None}


def _flattened(base_layout: Layout, lost: Iterable[Unhandled]) -> dict[str, str]:
    """The base names of layers whose names have underscores for dots."""
    with suppress(CheckpointError):  # ambiguous: none is known to be updated
        return unflatten({row.name for row in lost}, base_layout.shapes, _any_name)
    return {}


def _anything(shape: tuple[int, ...]) -> bool:
    """Any shape: that of an update that cannot be used is not known."""
    return True


def _any_name(name: str, shape: tuple[int, ...]) -> bool:
    """Any name and shape."""
    return True
