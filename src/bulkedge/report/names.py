"""Names of matrices where there is little room: short, and broken only after dots."""

from __future__ import annotations

import re

from rich.cells import cell_len

from bulkedge._errors import printable


def short_name(name: str) -> str:
    """A matrix by its module, which globs know, too.

    Args:
        name: Of its weight.

    Returns:
        The same without ``.weight``, fit to be printed.
    """
    return printable(name.removesuffix(".weight"))


def folded(name: str, room: int) -> list[str]:
    """A name in lines, broken after dots.

    Args:
        name: The name.
        room: How wide a line may be; only a part that is wider stays so.

    Returns:
        The lines.
    """
    lines = [""]
    for part in re.split(r"(?<=\.)", name):
        if lines[-1] and cell_len(lines[-1]) + cell_len(part) > room:
            lines.append("")
        lines[-1] += part
    return lines
