"""The commands that an audit advises: its inputs and settings, as a shell takes them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bulkedge._errors import printable
from bulkedge.records import Record
from bulkedge.records.recipe import Recipe

if TYPE_CHECKING:
    from bulkedge.repairing import RepairRecord

OPTIONS = {"top_k": "--top-k", "epsilon": "--epsilon", "side": "--side", "device": "--device",
           "seed": "--seed"}  # fmt: skip


def audit_command(record: Record, *added: str) -> str:
    """The audit that made a record, as a shell takes it, with options added."""
    method = ["--method", record.recipe.method] if record.recipe.method != "auto" else []
    if "--method" in added:
        method = []
    if record.recipe.critical_scale:
        method.append("--critical-scale")
    if record.inputs.moments is not None:
        method += ["--moments", record.inputs.moments.path]
    return command(record, "audit", [*method, *added])


def repair_command(record: Record, *added: str) -> str:
    """The repair of what a record is of, by the same recipe, with options added."""
    return command(record, "repair", [*added, "-o", "repaired"])


def retry_command(repaired: RepairRecord, added: Sequence[str]) -> str:
    """A repair of the same fine-tune anew, beside the copy that was written.

    Args:
        repaired: What was done.
        added: Options.

    Returns:
        The command.
    """
    folder = f"{repaired.output}-again"
    return command(repaired.before, "repair", [*added, "-o", folder])


def command(record: Record, name: str, added: Sequence[str]) -> str:
    """A command about the inputs of a record, by the same recipe, with options added."""
    recipe = record.recipe
    words = ["bulkedge", name, record.inputs.base.path, record.inputs.tuned.path]
    for field, option in OPTIONS.items():
        if getattr(recipe, field) != Recipe.model_fields[field].default:
            words += [option, str(getattr(recipe, field))]
    words += [w for option in ("include", "exclude") for glob in getattr(recipe, option)
              for w in (f"--{option}", glob)]  # fmt: skip
    words += ["--partial"] if recipe.partial else []
    if recipe.split:  # rows of blocks are in a file alone
        words += ["--recipe", "RECIPE.yaml"]
    return " ".join(shlex.quote(printable(word)) for word in [*words, *added])


def is_relative(record: Record) -> bool:
    """Whether a command about a record works in one folder alone."""
    return not all(
        Path(source.path).is_absolute() for source in (record.inputs.base, record.inputs.tuned)
    )
