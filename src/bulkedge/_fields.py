"""What the fields of a strategy may hold: one check for solvers, laws, certificates and repairs.

A strategy is a frozen dataclass of settings.  It names a rule for each of its fields, and is then
refused when it is made, not when something far away first uses it::

    def __post_init__(self) -> None:
        check_fields(self, rtol=optional(TOLERANCE), max_steps=whole(1))

A number that fits is kept as a plain Python one, whether it came from Python, NumPy or torch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from ._errors import InputError

DEFAULT_EPSILON = 0.5
"""The score below which Shuttleworth et al. count a direction; the default of every ε."""

SCHEMA_VERSION = "2"
"""The version of the schema that records are written by."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Rule:
    """What one field may hold.

    Attributes:
        limits: The limits in words that follow the name of the field in a message: ``"≥ 1"``.
        kind: What a message says to give instead: ``"a whole number"``.
        read: Turns what was given into the value that is kept; None where it does not fit.
        optional: Whether None is allowed, too.
    """

    limits: str
    kind: str
    read: Callable[[Any], Any]
    optional: bool = False


def check_fields(strategy: Any, **rules: Rule) -> None:
    """Read every field of a frozen dataclass by its rule.

    Args:
        strategy: The object, in its ``__post_init__``.
        rules: One for each field.

    Raises:
        InputError: If a field holds what its rule does not allow.
    """
    for name, rule in rules.items():
        kept = _read(type(strategy).__name__, name, getattr(strategy, name), rule)
        object.__setattr__(strategy, name, kept)


def check_values(owner: object, **settings: tuple[Any, Rule]) -> None:
    """The same for the arguments of a function, or of a class that is no dataclass.

    Args:
        owner: What they are given to: an object, or the name of a function.
        settings: The value of each, and its rule.

    Raises:
        InputError: If one is not what its rule allows.
    """
    for name, (given, rule) in settings.items():
        _read(owner if isinstance(owner, str) else type(owner).__name__, name, given, rule)


def no_truth_value(value: Any) -> Any:
    """A setting that is a number, or a list of some, on its way to pydantic: it takes True for 1.

    Args:
        value: What was given.

    Returns:
        The same.

    Raises:
        ValueError: If it is True or False, or holds one of them.

    Example:
        >>> no_truth_value([1, 2.5])
        [1, 2.5]
    """
    if any(isinstance(x, bool) for x in (value if isinstance(value, list | tuple) else (value,))):
        raise ValueError("expected a number")
    return value


def each(values: Mapping[str, Any], rule: Rule) -> dict[str, tuple[Any, Rule]]:
    """Settings for :func:`check_values` that all have the same rule."""
    return {name: (value, rule) for name, value in values.items()}


def _read(owner: str, name: str, given: Any, rule: Rule) -> Any:
    """The value as it is kept; InputError where it does not fit."""
    kept = None if given is None else rule.read(given)
    if kept is None and not (given is None and rule.optional):
        none = ", or None" if rule.optional else ""
        raise InputError(
            f"expected {name} {rule.limits}, got {given!r}; give {owner} {rule.kind}{none}"
        )
    return kept


def whole(low: int, high: int | None = None) -> Rule:
    """A whole number from ``low`` to ``high``, both included; None is no upper limit."""

    def read(given: Any) -> int | None:
        number = as_whole(given)
        fits = number is not None and low <= number and (high is None or number <= high)
        return number if fits else None

    return Rule(f"≥ {low}" if high is None else f"between {low} and {high}", "a whole number", read)


def number(limits: str, fits: Callable[[float], bool]) -> Rule:
    """A finite real number that ``fits``; ``limits`` says the same in words."""

    def read(given: Any) -> float | None:
        value = as_real(given)
        return value if value is not None and math.isfinite(value) and fits(value) else None

    return Rule(limits, "a number", read)


def optional(rule: Rule) -> Rule:
    """The same, or None."""
    return dataclasses.replace(rule, optional=True)


def one_of(*choices: Any) -> Rule:
    """One of a few words or numbers."""
    words = [f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices]
    limits = f"to be {', '.join(words[:-1])} or {words[-1]}"

    def read(given: Any) -> Any:
        plain = given if isinstance(given, str) else as_real(given)
        return next((choice for choice in choices if choice == plain), None)

    return Rule(limits, "one of these", read)


def instance(kind: type, word: str) -> Rule:
    """An object of one type."""
    return Rule(f"to be {word}", word, lambda given: given if isinstance(given, kind) else None)


def method(name: str, example: str) -> Rule:
    """An object, not a class, with a method of this name."""

    def read(given: Any) -> Any:
        fits = not isinstance(given, type) and callable(getattr(given, name, None))
        return given if fits else None

    return Rule(f"to be an object such as {example}", f"an object with {name}()", read)


TOLERANCE = number("between 0 and 1, the ends excluded", lambda x: 0 < x < 1)
SHARE = number("between 0 and 1", lambda x: 0 <= x <= 1)
POSITIVE = number("to be positive and finite", lambda x: x > 0)
POSITIVE_SHARE = number("between 0, excluded, and 1", lambda x: 0 < x <= 1)
NOT_NEGATIVE = number("≥ 0 and finite", lambda x: x >= 0)
FINITE = number("to be finite", lambda x: True)
FLAG = instance(bool, "True or False")
TEXT = instance(str, "a text")


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that the old name of an argument gives an error with the new one.

    Args:
        names: The new name of each old one.

    Returns:
        A decorator.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                raise InputError(
                    f"{function.__name__}(): expected {names[old]}=, got {old}=, which is its old "
                    "name; a level is a part of the threshold now, wherever it occurs"
                )
            return function(*args, **kwargs)

        return checked

    return decorate


def as_real(given: Any) -> float | None:
    """One real number of Python, NumPy or torch as a float; None for anything else.

    Text, truth values and complex numbers are no real numbers, nor are arrays of one.

    Args:
        given: Anything.

    Returns:
        The number, or None.

    Example:
        >>> as_real(2), as_real("2"), as_real(True), as_real(1j)
        (2.0, None, None, None)
    """
    if isinstance(given, str | bytes | bool) or getattr(given, "ndim", 0) != 0:
        return None
    if not any(kind in str(getattr(given, "dtype", "float")) for kind in ("float", "int")):
        return None
    try:
        return float(given.detach() if hasattr(given, "detach") else given)
    except (TypeError, ValueError, OverflowError):
        return None


def as_path(name: str, given: object) -> str:
    """The path of a model or an adapter as text.

    Args:
        name: What a message calls it.
        given: What the caller gave.

    Returns:
        The path.

    Raises:
        InputError: If it is none: a model in memory, several paths, bytes.

    Example:
        >>> as_path("base", "models/base")
        'models/base'
    """
    path = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    if not isinstance(path, str):
        raise InputError(
            f"expected {name} as the path of one file or folder, got {type(given).__name__}; "
            "a model in memory has to be saved first"
        )
    return path


def as_whole(given: Any) -> int | None:
    """One whole number of Python, NumPy or torch as an int; None for anything else.

    Args:
        given: Anything.

    Returns:
        The number, or None.

    Example:
        >>> as_whole(2), as_whole(2.0), as_whole(True)
        (2, None, None)
    """
    if isinstance(given, bool) or "bool" in str(getattr(given, "dtype", "")):
        return None
    try:
        return operator.index(given)
    except (TypeError, ValueError):  # the latter from tensors of several numbers
        return None
