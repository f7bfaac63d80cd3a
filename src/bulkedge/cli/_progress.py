"""How far a command is, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from bulkedge._errors import BulkedgeError, OutputError, printable


@contextmanager
def show_progress(quiet: bool, total: int, doing: str = "auditing") -> Iterator[Any]:
    """A bar with the time left on stderr; nothing without a terminal."""
    with show_phases(quiet) as bar:
        yield bar and (lambda name, done, total_=total: bar(doing, name, done, total_))


@contextmanager
def show_phases(quiet: bool) -> Iterator[Any]:
    """The same for several things that are done one after the other."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    left = (TimeRemainingColumn(), TextColumn("left", style="progress.remaining"))
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), *left)
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(doing: str, name: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = bar.add_task(doing, total=total)
            bar.update(tasks[doing], completed=done, total=total)

        yield advance


@contextmanager
def say_what_is_kept(*folders: Path | None) -> Iterator[None]:
    """If the work within ends early, say on stderr where finished matrices are kept."""
    try:
        yield
    except (KeyboardInterrupt, BulkedgeError) as error:
        from bulkedge.auditing import JOURNAL_NAME

        journals = [folder / JOURNAL_NAME for folder in folders if folder is not None]
        kept = [journal for journal in journals if journal.exists()]
        if kept and not isinstance(error, OutputError):
            where = kept[0] if len(kept) == 1 else f"{len(kept)} journals in {kept[0].parents[1]}"
            line = f"finished matrices are kept in {where}; --resume continues from there"
            click.echo(printable(line), err=True)
        raise
