"""What fails a build, as options and as settings of a project; and the end of a command."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from bulkedge._errors import RecipeError, printable
from bulkedge._verdict import COUNTED

from ._settings import settings_of

if TYPE_CHECKING:
    from bulkedge.records import Record
    from bulkedge.report import Gate

GATE_FIELDS = ("fail_on", "max_drift", "fail_on_doubt")
"""The settings of a project that say what fails a build."""
COUNTED_NAMES = [verdict.value for verdict in COUNTED]
"""The verdicts that an option may name, the mildest first."""
CHOICES = [*COUNTED_NAMES, "never"]

Command = TypeVar("Command", bound=Callable[..., None])


def _not_negative(
    context: click.Context, option: click.Parameter, value: float | None
) -> float | None:
    """A limit; NaN, which nothing exceeds, is none."""
    if value is not None and not value >= 0:
        raise click.BadParameter(f"expected a number of at least 0, got {value}")
    return value


def gate_options(command: Command) -> Command:
    """The options that say what fails a build; settings of a project take their place."""
    options = (
        click.option(
            "--fail-on",
            type=click.Choice(CHOICES),
            help="The mildest verdict that makes the exit code 1; "
            f"{COUNTED_NAMES[0]}: any new direction.  [default: {COUNTED_NAMES[0]}]",
        ),
        click.option(
            "--max-drift",
            type=float,
            callback=_not_negative,
            metavar="X",
            help="The mean drift above which the exit code is 1; needs --moments.",
        ),
        click.option(
            "--fail-on-doubt/--no-fail-on-doubt",
            default=None,
            help="Exit code 1 where something puts the verdict in doubt, such as another base.  "
            "[default: no]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def gate_of(options: Mapping[str, Any], default: str = COUNTED_NAMES[0]) -> Gate:
    """What fails the build: the options, else the settings of the project.

    Args:
        options: What was given on the command line.
        default: The mildest verdict that fails it where nothing says another.

    Returns:
        The gate.

    Raises:
        RecipeError: If a setting is wrong.
    """
    from bulkedge._verdict import Verdict
    from bulkedge.report import Gate

    usable = [name for name in GATE_FIELDS if name in options]
    settings, path = settings_of(dict(options), usable)
    found = {name: _checked(name, settings[name], path) for name in usable if name in settings}
    found |= {name: options[name] for name in usable if options[name] is not None}
    fail_on = found.get("fail_on", default)
    return Gate(
        fail_on=None if fail_on == "never" else Verdict(fail_on),
        max_drift=found.get("max_drift"),
        fail_on_doubt=found.get("fail_on_doubt", False),
    )


def check_settings(
    settings: Mapping[Any, Any],
    path: Path | None,
    fields: Collection[str],
    options: Collection[str],
) -> None:
    """Refuse bad settings of the gate, and options that a settings file does not take.

    Args:
        settings: From the file.
        path: The file.
        fields: The settings of a recipe.
        options: The names of the options of the command.

    Raises:
        RecipeError: If there is one.
    """
    for name, value in settings.items():
        plain = str(name).replace("-", "_")
        if name in GATE_FIELDS:
            _checked(name, value, path)
        elif plain in fields:
            continue
        elif near := difflib.get_close_matches(plain, GATE_FIELDS, n=1):
            raise RecipeError(f"{path}: unknown field {name!r:.100}; did you mean {near[0]}?")
        elif plain in options:
            raise RecipeError(
                f"{path}: {str(name)!r:.40} is an option of the command and no setting: give "
                f"--{plain.replace('_', '-')} on the command line"
            )


def _checked(name: str, value: Any, path: Path | None) -> Any:
    """A setting of the gate."""
    if name == "fail_on":
        good, expected = value in CHOICES, f"one of {', '.join(CHOICES)}"
    elif name == "fail_on_doubt":
        good, expected = isinstance(value, bool), "true or false"
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        good, expected = number and 0 <= value < math.inf, "a number of at least 0"
    if not good:
        raise RecipeError(f"{path}: {name}: expected {expected}, got {value!r:.60}")
    return value


def end(
    records: Mapping[str, Record],
    gate: Gate,
    refused: Mapping[str, str] | None = None,
) -> NoReturn:
    """Say on stderr what fails the build, and exit.

    Args:
        records: What was audited, by name; one alone has the name ``""``.
        gate: What fails the build.
        refused: Why a repair refused a matrix, by its name.
    """
    from bulkedge.report import failure_lines

    code = 0
    for name, record in records.items():
        failures = gate.failures(record, refused)
        code = max((code, *(failure.code for failure in failures)))  # not judged outranks found
        for line in failure_lines(failures):
            click.echo(printable(f"{name}: {line}" if name else line), err=True)
    sys.exit(code)
