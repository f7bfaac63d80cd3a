"""Settings that a project keeps in a file of its own, found as a linter finds its own."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from bulkedge._errors import RecipeError, printable

READ = "bulkedge.settings"
"""Where the context of a command keeps the settings: their file is read, and named, once."""
YAML, TOML = "bulkedge.yaml", "pyproject.toml"
MAX_BYTES = 2**20


def settings_of(
    options: dict[str, Any], fields: Iterable[str]
) -> tuple[dict[str, Any], Path | None]:
    """The settings of the recipe that was given, else of the project that the command runs in.

    Args:
        options: What was given on the command line, which overrides a setting.
        fields: The settings that the command uses.

    Returns:
        The settings, not yet checked, and their file; None without one.

    Raises:
        RecipeError: If a file cannot be read.
    """
    from bulkedge.records import read_recipe

    context = click.get_current_context(silent=True)
    if context is not None and READ in context.meta:
        return context.meta[READ]
    path: Path | None = options.get("recipe")
    if path is not None:
        found: tuple[dict[str, Any], Path | None] = read_recipe(path), path
    else:
        found = project_settings(Path.cwd()) or ({}, None)
        if found[1] is not None and (line := _told(found[0], found[1], options, set(fields))):
            click.echo(printable(line), err=True)  # it decides what is found
    if context is not None:
        context.meta[READ] = found
    return found


def _told(
    settings: dict[str, Any], path: Path, options: dict[str, Any], fields: set[str]
) -> str | None:
    """Which settings of a project are used; an option overrides its own."""
    known = [str(name) for name in settings if str(name) in fields]
    used = [name for name in known if options.get(name) in (None, ())]
    overridden = [name for name in known if name not in used]
    if not known:
        return None
    line = f"settings of {path}: {', '.join(used) or 'none used'}"
    if overridden:
        line += f" (options override {', '.join(overridden)})"
    unused = also_in(path)
    return line + (f"; [tool.bulkedge] of {unused} is not used" if unused else "")


def project_settings(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The settings of the project that a folder belongs to.

    The first folder that has some counts, from ``folder`` upwards; there, a ``bulkedge.yaml``
    counts before a table ``[tool.bulkedge]`` in ``pyproject.toml``.  One without any setting counts
    as if it were not there.

    Args:
        folder: Where the command was started.

    Returns:
        The settings, not yet checked, and their file; None without any.

    Raises:
        RecipeError: If a file of such a name cannot be read.
    """
    from bulkedge.records import read_recipe

    for place in (folder, *folder.parents):
        own, shared = place / YAML, place / TOML
        if own.is_file() and (found := read_recipe(own, may_be_empty=True)):
            return found, own
        if shared.is_file() and (found := _table(shared)):
            return found, shared
    return None


def also_in(file: Path) -> Path | None:
    """The project file beside a ``bulkedge.yaml`` whose table of settings is not used.

    Args:
        file: Where the settings in use come from.

    Returns:
        The other file; None without one, and where it cannot be read: nothing depends on it.
    """
    other = file.parent / TOML
    if file.name != YAML or not other.is_file():
        return None
    with suppress(RecipeError):
        return other if _table(other) else None
    return None


def _table(file: Path) -> dict[str, Any] | None:
    """The table ``[tool.bulkedge]`` of a file; None without one."""
    if sys.version_info >= (3, 11):
        import tomllib  # novermin: guarded by the version
    else:
        import tomli as tomllib

    try:
        if file.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{file}: has more than {MAX_BYTES} bytes; is it a project file?")
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror}); fix or move it") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are such
        raise RecipeError(f"{file}: not valid TOML: {' '.join(str(error).split())}") from None
    tool = content.get("tool", {})
    found = tool.get("bulkedge") if isinstance(tool, dict) else None
    if found is not None and not isinstance(found, dict):
        raise RecipeError(f"{file}: expected a table [tool.bulkedge], got {type(found).__name__}")
    return found
