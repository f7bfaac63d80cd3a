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

import reprlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


MAX_PROBLEMS = 10


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


def problems(error: ValidationError) -> str:
    """What a validation found, on one line.

    Args:
        error: From pydantic.

    Returns:
        ``field: what is wrong, got value`` for each, separated by semicolons; the first ten.
    """
    # reprlib stops early, where repr would write out a value built to be endless
    found = error.errors()
    told = [
        f"{'.'.join(map(str, e['loc'])):.100}: {e['msg']:.200}, got {reprlib.repr(e['input'])}"
        for e in found[:MAX_PROBLEMS]
    ]
    more = [f"and {len(found) - MAX_PROBLEMS} more"] if len(found) > MAX_PROBLEMS else []
    return "; ".join(told + more)
