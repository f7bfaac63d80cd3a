"""Which modules an ``adapter_config.json`` names, by PEFT's rules."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import regex

from .patterns import ALL_SECONDS, MATCH_SECONDS, MAX_PATTERN_LENGTH, Patterns

EVERY_LINEAR = "all-linear"
"""What PEFT takes for every linear layer but the last: which these are, no file says."""
# versions of PEFT differ in which of several numbers they take
INDICES = (r".*?\.[^.]*\.(\d+)\.", r".*\.[^.]*\.(\d+)\.")
"""The number of a layer where no pattern says which: the first in a path, or the last."""
NAMED = 3
"""So many modules a line names."""


class _NoMatch(Exception):
    """A pattern that cannot be matched."""


@dataclass(frozen=True)
class Targets:
    """The settings of an adapter that say which modules it updates.

    Attributes:
        settings: What ``adapter_config.json`` says.
    """

    settings: Mapping[str, Any]

    def disagreements(
        self, stored: Collection[str], base: Iterable[str], known: Collection[str]
    ) -> list[str]:
        """Where the configuration and the file name different modules.

        Args:
            stored: The modules that the file has updates of.
            base: The modules of the base, by their path in the tuned model.
            known: Those of ``stored``, and whatever else the file has something of.

        Returns:
            Sentences; none without ``target_modules``, or where both agree.
        """
        try:
            return [*self._of_modules(stored, base, known), *self._of_patterns(known)]
        except _NoMatch as error:
            return [str(error)]

    def _of_modules(
        self, stored: Collection[str], base: Iterable[str], known: Collection[str]
    ) -> list[str]:
        """The same of ``target_modules`` and what limits them."""
        if not self._is_known:
            return []
        lines = []
        if strange := [m for m in stored if not (self.names(m) or self._wraps(m))]:
            lines.append(
                f"The adapter updates {_listed(strange)}, which the target_modules of its "
                "adapter_config.json do not name (or exclude_modules or layers_to_transform leave "
                "out): they are judged, but PEFT would not load them."
            )
        if self.settings["target_modules"] == EVERY_LINEAR:
            return lines
        # experts may be parameters of one module, whose names say nothing of target_modules
        missing = [m for m in base if "experts" not in m.split(".") and m not in known]
        if missing := [m for m in missing if self.names(m)]:
            lines.append(
                f"The adapter_config.json names {_listed(missing)} of the base, of which the "
                "adapter holds no update: is its file complete?"
            )
        return lines

    def _of_patterns(self, known: Collection[str]) -> list[str]:
        """The keys of a LoRA's patterns that no module matches."""
        lines = []
        for field in ("rank_pattern", "alpha_pattern") if self._is_lora else ():
            found = self.settings.get(field)
            if isinstance(found, dict) and found:
                patterns = Patterns(found, field)
                used = {pattern for module in known for pattern in patterns.all(module)}
                if idle := [pattern for pattern in found if pattern not in used]:
                    lines.append(
                        f"{field} of the adapter_config.json names {_listed(idle)}, which matches "
                        "no module that the adapter updates: is it misspelt?"
                    )
        return lines

    @property
    def _is_lora(self) -> bool:
        return self.settings.get("peft_type") == "LORA"

    @property
    def _is_known(self) -> bool:
        """Whether there are targets: without any, PEFT takes those of the model's class."""
        found = self.settings.get("target_modules")
        return bool(found) and (isinstance(found, str) or _are_names(found))

    def names(self, module: str) -> bool:
        """Whether PEFT would update a module, as far as its path says.

        Args:
            module: Its path.

        Returns:
            True where the targets name it and nothing leaves it out.
        """
        if self._matches("exclude_modules", module) or self._is_saved(module):
            return False
        targets = self.settings["target_modules"]
        if targets == EVERY_LINEAR:
            return True
        if isinstance(targets, str) or module in targets:
            return self._matches("target_modules", module)
        return self._matches("target_modules", module) and self._is_in_layers(module)

    def _wraps(self, module: str) -> bool:
        """Whether PEFT wraps a module with what it lies in, as out_proj with its attention."""
        owner, _, name = module.rpartition(".")
        return name == "out_proj" and self.names(owner)

    def _matches(self, field: str, module: str) -> bool:
        """Whether a field names a module: by a pattern of its whole path, or by the end of it."""
        found = self.settings.get(field)
        if isinstance(found, str):
            return self._whole(found, module, field)
        if not _are_names(found):
            return False
        return any(module == name or module.endswith(f".{name}") for name in found)

    def _is_saved(self, module: str) -> bool:
        """Whether the adapter holds a module as a whole."""
        found = self.settings.get("modules_to_save")
        return _are_names(found) and any(f".{name}." in f".{module}." for name in found)

    def _is_in_layers(self, module: str) -> bool:
        """Whether a module lies in a layer that is updated."""
        layers = self.settings.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        wanted = [layers] if isinstance(layers, int) else layers
        given = self.settings.get("layers_pattern")
        names = [given] if isinstance(given, str) and given else given
        indices = INDICES
        if names and _are_names(names):
            indices = tuple(rf"(?:^|.*?\.){name}\.(\d+)\." for name in names)
        found = (self._begin(index, module, "layers_pattern") for index in indices)
        return any(match and int(match[1][:9]) in wanted for match in found)

    def _whole(self, pattern: str, text: str, field: str) -> bool:
        """Whether a pattern is all of a text."""
        return pattern != EVERY_LINEAR and self._begin(rf"(?:{pattern})\Z", text, field) is not None

    def _begin(self, pattern: str, text: str, field: str) -> regex.Match[str] | None:
        """Where a pattern begins a text, found in bounded time: it comes with a file."""
        clock = time.monotonic()
        try:
            if len(pattern) > MAX_PATTERN_LENGTH or self._spent[0] > ALL_SECONDS:
                raise TimeoutError
            return regex.match(pattern, text, timeout=MATCH_SECONDS)
        except (TimeoutError, regex.error, RecursionError, OverflowError):
            raise _NoMatch(
                f"{field} of the adapter_config.json cannot be matched ({pattern!r:.80}), so that "
                "it is not known which modules it names."
            ) from None
        finally:
            self._spent[0] += time.monotonic() - clock

    @cached_property
    def _spent(self) -> list[float]:
        """The seconds that matching has taken."""
        return [0.0]


def _are_names(found: Any) -> TypeGuard[list[str]]:
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


def _listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - NAMED
    return ", ".join(f"{name:.100}" for name in names[:NAMED]) + (f" and {rest} more" * (rest > 0))
