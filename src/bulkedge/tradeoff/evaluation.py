"""How a model is evaluated: a command that prints numbers, or a function that returns them."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from bulkedge._errors import InputError, printable
from bulkedge._fields import as_real
from bulkedge.auditing.inputs import as_text, digests
from bulkedge.records.frontier import Evaluation
from bulkedge.records.source import File

SLOT = "{model}"
"""What stands for the path of the model in a command."""
TAIL = 2**16
"""How many bytes of what a command has printed are read, from its end."""
SHOWN = 5
"""How many of its last lines an error repeats."""

Evaluate: TypeAlias = str | Callable[[Path], Mapping[str, float]]
"""A command with ``{model}`` in it, or a function of the path of a model."""


class Failed(InputError):
    """The evaluation of one model did not give its numbers."""


@dataclass(frozen=True)
class Command:
    """A command, run without a shell.

    Attributes:
        words: The program and its arguments; ``{model}`` in them is the path of the model.
        text: As it was given.
    """

    words: tuple[str, ...]
    text: str

    @classmethod
    def parse(cls, text: str) -> Command:
        """Split as a shell would, but for everything else that a shell does.

        Args:
            text: The command.

        Returns:
            The command.

        Raises:
            InputError: If its quotes do not match, or it does not name the model.
        """
        try:
            words = tuple(shlex.split(text))
        except ValueError as error:
            raise InputError(
                f"{text!r:.200}: no command ({error}); quote it as in a shell"
            ) from None
        if not words or not any(SLOT in word for word in words[1:]):
            raise InputError(
                f"expected a command with {SLOT} where the path of the model goes, got "
                f'{text!r:.200}; write it as in "python my_eval.py {SLOT}"'
            )
        return cls(words, text)

    def for_record(self) -> Evaluation:
        """What the record says of it, with the digests of the files that it names."""
        named = [Path(word) for word in self.words if SLOT not in word and _is_file(word)]
        known = digests(named)
        files = [
            File(name=as_text(path), sha256=known[path], bytes=path.stat().st_size)
            for path in dict.fromkeys(named)
        ]
        return Evaluation(by="command", text=as_text(self.text), files=files)

    def call_of(self, model: Path) -> str:
        """The command for one model, to be typed."""
        return as_text(shlex.join(self._for(model)))

    def run(self, model: Path, log: Path) -> dict[str, float]:
        """The numbers of one model.

        Args:
            model: Its path.
            log: Where what is printed goes: this name with ``.out`` and ``.err``.

        Returns:
            The numbers by name.

        Raises:
            Failed: If it cannot be started, fails, or prints no numbers; what it printed to stderr
                last is part of the message.
        """
        out, err = (log.with_name(f"{log.name}.{ending}") for ending in ("out", "err"))
        log.parent.mkdir(exist_ok=True)
        with out.open("wb") as stdout, err.open("wb") as stderr:
            try:
                ended = subprocess.run(  # noqa: S603 — the caller's own command, no shell
                    self._for(model), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
                )
            except (OSError, ValueError) as error:
                raise Failed(
                    f"{self.call_of(model)}: cannot be started ({error}); name an existing program"
                ) from None
        if ended.returncode != 0:
            raise Failed(f"{self.call_of(model)}: {_ending(ended.returncode)}; {_last(err)}")
        try:
            return _parsed(_tail(out))
        except InputError as error:
            raise Failed(f"{self.call_of(model)}: exit code 0, {error}; {_last(err)}") from None

    def _for(self, model: Path) -> list[str]:
        """The words with a path that is right from everywhere, and no option."""
        return [word.replace(SLOT, os.path.abspath(model)) for word in self.words]


@dataclass(frozen=True)
class Function:
    """A function of Python; it is known by its name.

    Attributes:
        call: The function.
    """

    call: Callable[[Path], Mapping[str, float]]

    @property
    def name(self) -> str:
        """Module and name."""
        kind = self.call if hasattr(self.call, "__qualname__") else type(self.call)
        return f"{kind.__module__}.{kind.__qualname__}"

    def for_record(self) -> Evaluation:
        """See :meth:`Command.for_record`."""
        return Evaluation(by="function", text=self.name, files=[])

    def call_of(self, model: Path) -> str:
        """The call for one model."""
        return as_text(f"{self.name}({str(model)!r})")

    def run(self, model: Path, log: Path) -> dict[str, float]:
        """See :meth:`Command.run`; what the function raises is not caught."""
        found: Any = self.call(model)
        try:
            return _numbers(found)
        except InputError as error:
            raise Failed(f"{self.call_of(model)}: {error}") from None


def evaluator(given: Evaluate) -> Command | Function:
    """A command or a function, checked.

    Args:
        given: Either.

    Returns:
        What evaluates a model.

    Raises:
        InputError: If it is neither.
    """
    if isinstance(given, str):
        return Command.parse(given)
    if not callable(given):
        raise InputError(f"expected evaluate to be a command or a function, got {given!r:.60}")
    return Function(given)


def _is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL
        return False


def _ending(code: int) -> str:
    return f"ended by signal {-code}" if code < 0 else f"failed with exit code {code}"


def _tail(path: Path) -> list[str]:
    """The last lines of a file that are not blank."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def _last(err: Path) -> str:
    """What was printed to stderr last, on one line."""
    lines = [printable(line.strip())[:300] for line in _tail(err)[-SHOWN:]]
    said = f"the last lines of stderr: {' | '.join(lines)}" if lines else "nothing on stderr"
    return f"{said} (all of it in {err})"


def _parsed(lines: list[str]) -> dict[str, float]:
    """The numbers in the last line of what was printed."""
    line = lines[-1] if lines else ""
    try:
        found = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            'expected a last line of stdout such as {"task": 0.76, "kept": 0.11}, got '
            f"{printable(line)[:120]!r}"
        ) from None
    return _numbers(found)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no name stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InputError("expected each number once, got two of one name")
    return found


def _numbers(found: Any) -> dict[str, float]:
    """Finite numbers by name, at least two."""
    if not isinstance(found, Mapping) or len(found) < 2:
        raise InputError(
            'expected at least two numbers with names, such as {"task": 0.76, "kept": 0.11}, got '
            f"{printable(repr(found))[:120]}"
        )
    values = {}
    for name, given in found.items():
        value = as_real(given)
        if not isinstance(name, str) or value is None or not math.isfinite(value):
            what = f"{printable(repr(name))[:60]}: {printable(repr(given))[:60]}"
            raise InputError(f"expected finite numbers, got {what}; print no other values")
        if not name.isprintable():  # half of a character could stand in no record
            raise InputError(f"expected names of printable characters, got {name!r:.60}")
        values[name] = value
    return values
