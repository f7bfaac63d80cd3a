"""Saved states, checked entry by entry before a resumed run takes anything of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bulkedge._errors import InputError
from bulkedge._fields import Rule, check_values, instance

BY_NAME = instance(Mapping, "a mapping from names")
"""The rule for an entry that holds something for each layer."""


def entries(owner: str, saved: object, **rules: Rule) -> dict[str, Any]:
    """The entries of a saved state.

    Args:
        owner: What it is the state of, for messages: a class, or a layer.
        saved: The state, as it was read.
        rules: A rule for each of its entries.

    Returns:
        The entries as their rules keep them: a plain number for a number.

    Raises:
        InputError: If it is no mapping, or an entry is missing, not known, or not what its rule
            allows.
    """
    state = f"the state of {owner}"
    if not isinstance(saved, Mapping) or set(saved) != set(rules):
        got = sorted(map(str, saved)) if isinstance(saved, Mapping) else type(saved).__name__
        raise InputError(
            f"expected {state} to have the entries {sorted(rules)}, got {got}; give what "
            "state_dict() has returned, unchanged"
        )
    check_values(state, **{name: (saved[name], rule) for name, rule in rules.items()})
    return {name: rule.read(saved[name]) for name, rule in rules.items()}
