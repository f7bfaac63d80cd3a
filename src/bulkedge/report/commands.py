"""The commands that an audit advises: its inputs and settings, as a shell takes them.

A command names what it writes.  A page and a file, which are read elsewhere and later, always name
the same.  A terminal knows what is in its folder, and passes a function ``taken`` that says so.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bulkedge._errors import printable
from bulkedge.records import Record
from bulkedge.records.recipe import Recipe

if TYPE_CHECKING:
    from bulkedge.repairing import RepairRecord

OPTIONS = {"top_k": "--top-k", "epsilon": "--epsilon", "side": "--side", "device": "--device",
           "seed": "--seed"}  # fmt: skip
ENDING = re.compile(r"(?<=.)\.[A-Za-z]+$")
"""How the name of a file ends; that of a folder may end in a number."""
BASE_MOMENTS, TASK_MOMENTS = "base.moments", "task.moments"
REPAIRED, PROTECTED, WEAKER = "repaired", "protected", "weaker"
"""What commands write: files of moments, folders."""
Taken = Callable[[str], bool]
"""Whether something has a name already, in the folder in which commands run."""


def unseen(name: str) -> bool:
    """No name is taken, where the folder is not known."""
    return False


def free(name: str, taken: Taken) -> str:
    """A name for what a command writes, since none is written over anything.

    Args:
        name: What it would be called.
        taken: Whether something has a name already.

    Returns:
        The name, with a number if it is taken.

    Example:
        >>> free("base.moments", {"base.moments", "base-2.moments"}.__contains__)
        'base-3.moments'
    """
    if not taken(name):
        return name
    ending = "".join(ENDING.findall(name))
    stem, number = name.removesuffix(ending), 2
    while taken(f"{stem}-{number}{ending}"):
        number += 1
    return f"{stem}-{number}{ending}"


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


def repair_command(record: Record, *added: str, output: str = REPAIRED) -> str:
    """The repair of what a record is of, by the same recipe, with options added."""
    return command(record, "repair", [*added, "-o", output])


def protect_command(record: Record, moments: str, *added: str, output: str = PROTECTED) -> str:
    """The repair that gives back what was forgotten, on moments of the base."""
    return repair_command(
        record, "--method", "protect", "--moments", moments, *added, output=output
    )


def page_command(copy: str, taken: Taken) -> str:
    """A page of both audits of a repair."""
    words = ["bulkedge", "report", copy, "-o", free(f"{copy}.html", taken)]
    return as_line(words)


def retry_command(repaired: RepairRecord, added: Sequence[str], taken: Taken) -> str:
    """A repair of the same fine-tune anew, beside the copy that was written.

    Args:
        repaired: What was done.
        added: Options.
        taken: Whether something has a name already.

    Returns:
        The command.
    """
    return repair_command(repaired.before, *added, output=free(f"{repaired.output}-again", taken))


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
    return as_line([*words, *added])


def as_line(words: Sequence[str]) -> str:
    """Words of a command, as a shell takes them."""
    return " ".join(shlex.quote(printable(word)) for word in words)


def is_relative(record: Record) -> bool:
    """Whether a command about a record works in one folder alone."""
    return not all(
        Path(source.path).is_absolute() for source in (record.inputs.base, record.inputs.tuned)
    )
