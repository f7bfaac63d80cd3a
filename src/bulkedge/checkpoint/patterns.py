"""The rank and alpha patterns of an adapter: regular expressions that come with a file.

They are written by the author of the file, so they are matched by an engine that can be stopped:
each match has a fraction of a second, all of them together ten.  Most of them are plain names, and
a file may hold one for each module of a large model: those are looked up.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping

import regex

from bulkedge._errors import AdapterError

MATCH_SECONDS, ALL_SECONDS = 0.2, 10.0
MAX_PATTERN_LENGTH = 1000
LITERAL = "^"
"""What begins a pattern that is a whole path."""
PLAIN = re.compile(r"(?P<whole>\^?)(?P<name>(?:[A-Za-z0-9_.-]|\\[.-])*)")
WILD = "\n"
"""Stands for a dot, which matches any character but a line break."""


class LiteralPatterns:
    """Patterns without alternatives or repetitions, found by look-up.

    A dot matches any character.  So they are filed by length and by the places of their dots, and
    what stands in these places of a path is left out when it is looked up.
    """

    def __init__(self) -> None:
        self._filed: dict[tuple[bool, int], dict[tuple[int, ...], dict[str, list[str]]]] = {}

    def add(self, pattern: str) -> bool:
        """File a pattern; False for one that is not plain."""
        match = PLAIN.fullmatch(pattern)
        if match is None or len(pattern) > MAX_PATTERN_LENGTH:
            return False
        name = re.sub(r"\\(.)|\.", lambda found: found[1] or WILD, match["name"])
        dots = tuple(i for i, character in enumerate(name) if character == WILD)
        by_dots = self._filed.setdefault((bool(match["whole"]), len(name)), {})
        by_dots.setdefault(dots, {}).setdefault(name, []).append(pattern)
        return True

    def find(self, path: str) -> Iterator[str]:
        """The patterns that match a path without line breaks, in no order."""
        starts = [0, *(i + 1 for i, character in enumerate(path) if character == ".")]
        for start in starts:
            end = path[start:]
            for whole in (False, True) if start == 0 else (False,):
                for dots, names in self._filed.get((whole, len(end)), {}).items():
                    yield from names.get(_masked(end, dots), ())


def _masked(text: str, places: tuple[int, ...]) -> str:
    """A text with a line break in the given places."""
    characters = list(text)
    for place in places:
        characters[place] = WILD
    return "".join(characters)


class Patterns:
    r"""Values by the pattern that ends a module's path, as PEFT matches them.

    Args:
        values: ``{pattern: value}``; the first that matches counts.
        source: The file and field that they come from, for a message.

    Example:
        >>> Patterns({"q_proj": 4, r"layers\.0\..*": 2}, "rank_pattern").value("layers.0.k", 8)
        2
    """

    def __init__(self, values: Mapping[str, float], source: str) -> None:
        self._values = dict(values)
        self._places = {pattern: i for i, pattern in enumerate(self._values)}
        self._literal = LiteralPatterns()
        self._others = [pattern for pattern in self._values if not self._literal.add(pattern)]
        self._source = source
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._found: dict[str, tuple[str | None, str | None]] = {}
        self._left = ALL_SECONDS

    def value(self, module: str, default: float) -> float:
        """The value of a module.

        Args:
            module: Its path.
            default: What holds where no pattern matches.

        Returns:
            The value of the first pattern that ends the path.

        Raises:
            AdapterError: If a pattern is invalid, is too long, or takes too long.
        """
        first, _ = self._matching(module)
        return default if first is None else self._values[first]

    def all(self, module: str) -> list[str]:
        """The patterns that match a module.

        Args:
            module: Its path.

        Returns:
            Those patterns, in no order.

        Raises:
            AdapterError: As :meth:`value`.
        """
        clock = time.monotonic()
        try:
            return self._search(module, clock + self._left)
        finally:
            self._left -= time.monotonic() - clock

    def conflict(self, module: str) -> str | None:
        """What to know of a module for which two patterns have different values.

        Args:
            module: Its path.

        Returns:
            The two patterns, their values, and which one counts; None where all agree.

        Raises:
            AdapterError: As :meth:`value`.
        """
        first, other = self._matching(module)
        if first is None or other is None:
            return None
        return (
            f"{self._source}: {first!r:.80} says {self._values[first]:g} and {other!r:.80} says "
            f"{self._values[other]:g}; the first in the file is taken, as PEFT does, but it sorts "
            "them when it saves: in training the other may have been the first"
        )

    def _matching(self, module: str) -> tuple[str | None, str | None]:
        """The first pattern that matches, and the first that does with another value."""
        if module not in self._found:
            clock = time.monotonic()
            try:
                found = self._search(module, clock + self._left)
            finally:
                self._left -= time.monotonic() - clock
            found.sort(key=self._places.__getitem__)
            first = found[0] if found else None
            other = next((p for p in found if self._values[p] != self._values[found[0]]), None)
            self._found[module] = first, other
        return self._found[module]

    def _search(self, module: str, deadline: float) -> list[str]:
        """All patterns that match, in no order."""
        plain = WILD not in module  # a damaged file may have line breaks in names
        tried = self._others if plain else self._values
        found = [pattern for pattern in tried if self._match(pattern, module, deadline)]
        return [*found, *self._literal.find(module)] if plain else found

    def _match(self, pattern: str, module: str, deadline: float) -> bool:
        left = deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            compiled = self._compile(pattern)
            found = compiled.match(module, timeout=min(MATCH_SECONDS, left))
        except TimeoutError as error:
            # a pattern that is stopped because the total time is over need not be slow
            reason = "all of them took too long" if left < MATCH_SECONDS else str(error)
            raise self._refused(pattern, reason) from None
        # deep nesting exhausts the stack; other faulty patterns are regex.error
        except (regex.error, RecursionError, OverflowError) as error:
            raise self._refused(pattern, str(error)) from None
        return found is not None

    def _refused(self, pattern: str, reason: str) -> AdapterError:
        return AdapterError(
            f"{self._source}: pattern {pattern!r:.80} cannot be matched ({reason}); correct it"
        )

    def _compile(self, pattern: str) -> regex.Pattern[str]:
        """The pattern, compiled once; compiling cannot be stopped, so length is limited."""
        if pattern not in self._compiled:
            if len(pattern) > MAX_PATTERN_LENGTH:
                raise regex.error(f"longer than {MAX_PATTERN_LENGTH} characters")
            self._compiled[pattern] = regex.compile(rf"(.*\.)?({pattern})$")
        return self._compiled[pattern]
