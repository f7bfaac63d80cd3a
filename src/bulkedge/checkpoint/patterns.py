"""The rank and alpha patterns of an adapter: regular expressions that come with a file.

They are written by whoever wrote the file, so they are matched by an engine that can be stopped:
each match has a fraction of a second, all of them together ten.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

import regex

from bulkedge._errors import AdapterError

MATCH_SECONDS, ALL_SECONDS = 0.2, 10.0
MAX_PATTERN_LENGTH = 1000
LITERAL = "^"
"""What begins a pattern that is a whole path."""


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
        # of thousands of whole paths, as a repair writes them, each is looked up, not tried
        self._places = {pattern: i for i, pattern in enumerate(self._values)}
        self._others = [pattern for pattern in self._values if not _is_literal(pattern)]
        self._source = source
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._left = ALL_SECONDS

    def value(self, module: str, default: float) -> float:
        """The value of a module.

        Args:
            module: Its path.
            default: What holds where no pattern matches.

        Returns:
            The value of the first pattern that ends the path.

        Raises:
            AdapterError: If a pattern is none, is too long, or takes too long.
        """
        clock = time.monotonic()
        try:
            exact = LITERAL + re.escape(module)
            place = self._places.get(exact, len(self._places))
            before = (p for p in self._others if self._places[p] < place)
            found = next((p for p in before if self._match(p, module)), exact)
            return self._values.get(found, default)
        finally:
            self._left -= time.monotonic() - clock

    def _match(self, pattern: str, module: str) -> bool:
        try:
            if self._left <= 0:
                raise TimeoutError("all of them took too long")
            compiled = self._compile(pattern)
            found = compiled.match(module, timeout=min(MATCH_SECONDS, self._left))
        # what is nested deeply runs out of stack where others are no patterns
        except (regex.error, TimeoutError, RecursionError, OverflowError) as error:
            raise AdapterError(
                f"{self._source}: pattern {pattern!r:.80} cannot be matched ({error}); mend it"
            ) from None
        return found is not None

    def _compile(self, pattern: str) -> regex.Pattern[str]:
        """The pattern, compiled once; compiling cannot be stopped, so length is limited."""
        if pattern not in self._compiled:
            if len(pattern) > MAX_PATTERN_LENGTH:
                raise regex.error(f"longer than {MAX_PATTERN_LENGTH} characters")
            self._compiled[pattern] = regex.compile(rf"(.*\.)?({pattern})$")
        return self._compiled[pattern]


def _is_literal(pattern: str) -> bool:
    """Whether a pattern is one whole path, and no other."""
    path = re.sub(r"\\(.)", r"\1", pattern.removeprefix(LITERAL), flags=re.DOTALL)
    return pattern == LITERAL + re.escape(path)
