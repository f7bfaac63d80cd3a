"""Whether the base that was given is, by its names, the one that an adapter names.

Shapes say more: an adapter for other shapes is an error before any report.
"""

from __future__ import annotations

from typing import Literal

from bulkedge._errors import printable
from bulkedge.checkpoint.identity import hub_name, own_name
from bulkedge.records import Record

Names = Literal["same", "other", "unknown"]


def compare_names(record: Record) -> Names | None:
    """What the names of the base say.

    Args:
        record: An audit.

    Returns:
        ``same``: the path, the hub's cache, the model's card or its ``config.json`` has the name.
        ``other``: the path names another model, and nothing the one that the adapter names.
        ``unknown``: a folder such as ``base`` says nothing.  None without a name.
    """
    named, base = record.inputs.tuned.trained_on, record.inputs.base
    if named is None:
        return None
    wanted = _plain(_last(named))
    cached = hub_name(base.path)
    in_path = wanted == _plain(_last(base.path)) if cached else wanted in _plain(base.path)
    words = (_plain(_last(word)) for name in base.known_as for word in name.split())
    if wanted and (in_path or wanted in words):
        return "same"
    return "other" if own_name(named) and own_name(base.path) else "unknown"


def doubted_name(record: Record) -> str | None:
    """What to say where the base is named as another model; None where it is not."""
    if compare_names(record) != "other":
        return None
    named = printable(record.inputs.tuned.trained_on or "")
    return (
        f"The adapter names {named} as its base, you gave {printable(record.inputs.base.path)}: "
        "are they the same model? If so, give the folder that name, or write the name as "
        "`_name_or_path` into its config.json. If not, give the base that it was trained on."
    )


def unknown_name(record: Record) -> str | None:
    """What to note where nothing says whether the base is the one that an adapter names."""
    if compare_names(record) != "unknown":
        return None
    named = printable(record.inputs.tuned.trained_on or "")
    return (
        f"base: the adapter names {named}; the shapes fit, and "
        f"{printable(record.inputs.base.path)} has no name to compare"
    )


def _last(name: str) -> str:
    """The last part of the name of a model."""
    return own_name(name) or name.rstrip("/").rpartition("/")[2]


def _plain(name: str) -> str:
    """A name as indexes, caches and folders all write it."""
    return name.lower().replace("_", "-").replace(".", "-")
