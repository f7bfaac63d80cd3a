"""Every error that this package raises on purpose.

::

    BulkedgeError
    ├── InputError (ValueError)           an argument has the wrong shape, dtype or range
    ├── RecipeError (ValueError)          a recipe has an unknown field or a bad value
    ├── CheckpointError (ValueError)      a file or folder is missing, damaged or unsupported
    │   └── AdapterError                  the same, for a LoRA adapter
    ├── NothingAuditedError (ValueError)  the two inputs have nothing to compare
    ├── OutputError (OSError)             a result cannot be written where it was asked for
    ├── MissingExtraError (ImportError)   a package is needed that is not installed
    └── ConvergenceError (RuntimeError)   a solver stopped short; its best result is in .partial

    DegenerateWarning (UserWarning)       a derivative that the data do not determine

Each message says what was expected, what was found, and what to do.
"""

from __future__ import annotations

import difflib
import reprlib
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


MAX_PROBLEMS = 10
LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
"""What pydantic calls a limit, and what people call it."""


class BulkedgeError(Exception):
    """Base class of all errors of this package."""


class InputError(BulkedgeError, ValueError):
    """An argument has the wrong shape, dtype or range."""


class RecipeError(BulkedgeError, ValueError):
    """A recipe has an unknown field or a bad value."""


class CheckpointError(BulkedgeError, ValueError):
    """A checkpoint file or folder is missing, damaged, hostile or of a kind not supported."""


class AdapterError(CheckpointError):
    """A LoRA adapter cannot be read, or does not belong to the base."""


class NothingAuditedError(BulkedgeError, ValueError):
    """The base and the tuned checkpoint have nothing to compare."""


class OutputError(BulkedgeError, OSError):
    """A result cannot be written where it was asked for."""


class MissingExtraError(BulkedgeError, ImportError):
    """Something needs a package that is not installed."""


class ConvergenceError(BulkedgeError, RuntimeError):
    """A solver stopped before it reached its tolerance.

    Attributes:
        partial: The best result so far, with its residuals.
    """

    def __init__(self, message: str, partial: object = None) -> None:
        super().__init__(message)
        self.partial = partial


class DegenerateWarning(UserWarning):
    """A derivative of singular vectors where the vectors are not unique to rounding."""


def install(extra: str) -> str:
    """The command that installs an extra where this Python looks for it.

    The package is installed there already, so pip takes it as it is, from an index or not.

    Args:
        extra: Its name in ``pyproject.toml``.

    Returns:
        A line for a shell.
    """
    return f"{shlex.quote(sys.executable or 'python')} -m pip install 'bulkedge[{extra}]'"


def printable(text: str) -> str:
    r"""``text`` with every character that could act on a terminal shown as an escape.

    Names come out of files that strangers made.

    Args:
        text: Anything.

    Returns:
        The same on one line.

    Example:
        >>> print(printable("layer" + chr(27) + "[31m.weight"))
        layer\x1b[31m.weight
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def count(n: int, one: str, many: str | None = None) -> str:
    """A number with its noun.

    Args:
        n: How many.
        one: What one is called.
        many: What several are called; with an s if None.

    Returns:
        Both.

    Example:
        >>> count(1, "layer"), count(2, "matrix", "matrices")
        ('1 layer', '2 matrices')
    """
    return f"{n} {one if n == 1 else many or one + 's'}"


def problems(error: ValidationError) -> str:
    """What a validation found, on one line.

    Args:
        error: From pydantic.

    Returns:
        ``field: what is wrong, got value`` for each, separated by semicolons; the first ten.
    """
    # reprlib stops early, where repr would write out a value built to be endless
    found = error.errors()
    texts = [
        f"{'.'.join(map(str, e['loc'])):.100}: {e['msg']:.200}, got {reprlib.repr(e['input'])}"
        for e in found[:MAX_PROBLEMS]
    ]
    more = [f"and {len(found) - MAX_PROBLEMS} more"] if len(found) > MAX_PROBLEMS else []
    return "; ".join(texts + more)


def settings_problems(
    error: ValidationError,
    source: str,
    fields: Iterable[str],
    spelled: Mapping[str, str] | None = None,
) -> str:
    """What is wrong with settings that a person wrote, and what to write instead.

    Args:
        error: From pydantic.
        source: Where the settings come from.
        fields: The names of all settings.
        spelled: How some were given on the command line, such as ``--top-k``.

    Returns:
        One line; it ends with all names, unless each setting was an option, which has a help.
    """
    known, options = list(fields), spelled or {}
    found = error.errors()
    texts = [_problem(e, known, options) for e in found[:MAX_PROBLEMS]]
    if len(found) > MAX_PROBLEMS:
        texts.append(f"and {len(found) - MAX_PROBLEMS} more")
    line = "; ".join(texts)
    if all(e["loc"] and e["loc"][0] in options for e in found):
        return line
    return f"{source}: {line} (the fields are {', '.join(known)})"


def _plain(limit: Any) -> str:
    """A limit as people write it: 1 for 1.0."""
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


def _problem(e: Any, known: list[str], options: Mapping[str, str]) -> str:
    """One bad setting: its name, what is expected, what was found."""
    place, given = list(e["loc"]), reprlib.repr(e["input"])
    if e["type"] == "extra_forbidden" and len(place) == 1:
        near = difflib.get_close_matches(str(place[0])[:100], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"unknown field {str(place[0])[:100]!r}{hint}"
    name = ".".join(map(str, place))
    if place and place[0] in options:
        name = options[place[0]]
    context = e.get("ctx", {})
    limit = [f"{LIMITS[key]} {_plain(context[key])}" for key in LIMITS if key in context]
    if e["type"] == "tuple_type" and isinstance(e["input"], str):
        return f"{name:.100}: give a list of globs, such as [{given}]"
    what = limit[0] if limit else e["msg"].removeprefix("Value error, ")
    return f"{name:.100}: {what:.200}, got {given}"
